import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt import manifest
from capfilt.errors import InputError, MismatchError
from capfilt.manifest import Identity, canonical_json, differences, file_digest
from capfilt.shards import RunDir

BASE = Identity(
    "score", 1, {"max_tokens": 35, "inner": {"a": 1}}, {"images": "f"}, {"matcher": "w"}
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.text(), values, max_size=4)


@given(configs, configs)
def test_fingerprints_are_equal_when_the_configs_are(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    same = canonical_json(left) == canonical_json(right)
    assert (Identity("s", 1, left).fingerprint == Identity("s", 1, right).fingerprint) == same


@given(configs)
def test_the_order_of_keys_does_not_matter(config: dict[str, Any]) -> None:
    turned = dict(reversed(list(config.items())))
    assert Identity("s", 1, config).fingerprint == Identity("s", 1, turned).fingerprint


@pytest.mark.parametrize(
    "other",
    [
        Identity("scorer", BASE.version, BASE.config, BASE.upstream, BASE.weights),
        Identity("score", 2, BASE.config, BASE.upstream, BASE.weights),
        Identity("score", 1, {**BASE.config, "max_tokens": 36}, BASE.upstream, BASE.weights),
        Identity("score", 1, BASE.config, {"images": "g"}, BASE.weights),
        Identity("score", 1, BASE.config, BASE.upstream, {"matcher": "v"}),
        Identity("score", 1, BASE.config, BASE.weights, BASE.upstream),
    ],
)
def test_every_part_counts(other: Identity) -> None:
    assert other.fingerprint != BASE.fingerprint


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"x", math.nan, math.inf])
def test_what_can_not_be_serialised_is_an_error(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _ = Identity("s", 1, {"x": value}).fingerprint


def signed(tmp_path: Path) -> tuple[RunDir, str]:
    run = RunDir(str(tmp_path))
    path = run.manifest("scores", "web-00000")
    manifest.sign(run, path, BASE, rows=2, counts={"ok": 2}, seconds=1.23456, extra={"more": 1})
    return run, path


def test_what_is_signed_is_done(tmp_path: Path) -> None:
    run, path = signed(tmp_path)
    record = manifest.read(run, path)
    assert record is not None and record["fingerprint"] == BASE.fingerprint
    assert (record["rows"], record["counts"], record["more"]) == (2, {"ok": 2}, 1)
    assert str(tmp_path) not in json.dumps(record)
    assert manifest.is_done(run, path, BASE)
    assert not manifest.is_done(run, run.manifest("scores", "web-00001"), BASE)


def test_what_is_signed_and_gone_is_not_done(tmp_path: Path) -> None:
    run, path = signed(tmp_path)
    table = run.table("scores", "web-00000")
    assert not manifest.is_done(run, path, BASE, table=table)
    run.write_text(table, "")
    assert manifest.is_done(run, path, BASE, table=table)


def test_another_identity_names_the_keys_and_the_way_out(tmp_path: Path) -> None:
    run, path = signed(tmp_path)
    now = Identity("score", 2, {"max_tokens": 40, "inner": {"a": 1, "b": [1]}}, {"images": "f"}, {})
    with pytest.raises(MismatchError) as caught:
        manifest.is_done(run, path, now)
    message = str(caught.value)
    for line in ("version: 1 there, 2 now", "score.max_tokens: 35 there, 40 now",
                 "score.inner.b: None there, [1] now", "weights.matcher: 'w' there, None now", "--redo score"):  # fmt: skip
        assert line in message
    assert "upstream" not in message
    assert not manifest.is_done(run, path, now, stale_is_pending=True)


def test_tuples_are_as_json_stores_them(tmp_path: Path) -> None:
    stored = json.loads(
        canonical_json({"version": 1, "config": {"a": (1, 2)}, "upstream": {}, "weights": {}})
    )
    now = {"stage": "s", "version": 1, "config": {"a": (1, 2)}, "upstream": {}, "weights": {}}
    assert differences(stored, now) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"fingerprint": 3}', "\ufffd"])
def test_what_is_no_manifest_says_so(tmp_path: Path, text: str) -> None:
    run = RunDir(str(tmp_path))
    run.write_text(run.at("m.json"), text)
    with pytest.raises(InputError, match=r"m\.json is not a manifest .* delete it"):
        manifest.read(run, run.at("m.json"))


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf")

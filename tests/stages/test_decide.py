"""What the filter keeps: books that balance, one reason each, in the order that is documented."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt import manifest
from capfilt.config import Config, Filter
from capfilt.errors import ConfigError, InputError
from capfilt.evaluation.calibration import Calibration, SourceCalibration, write_calibration
from capfilt.expression import columns_of, compile_expression
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, IMAGES, REASONS, SCORES, check
from capfilt.shards import RunDir, Shard
from capfilt.stage import identify, identify_shared
from capfilt.stages.decide import ORDER, FilterStage, Rules, find_cut, share_of


def row(key: str, name: str, itm: float | None, itc: float | None = 0.0, error: str | None = None,
        source: str | None = None, caption: str = "a dog runs", content: str | None = None) -> dict:  # fmt: skip
    source = source or ("synthetic" if name.startswith("synthetic") else "web")
    source = "human" if key.startswith("human") else source
    uid = hashlib.sha256((content or f"{key}/{name}").encode()).hexdigest()
    return {
        "pair_id": f"{key}/{name}", "key": key, "source": source, "caption": caption,
        "uid": None if error == "download_failed" else uid,
        "itm_prob": None if error else itm, "itc_sim": None if error else itc, "error": error,
    }  # fmt: skip


def make_run(folder: Path, shards: dict[str, list[dict]], matcher: str = "m" * 64) -> RunDir:
    run = RunDir(str(folder))
    for name, rows in shards.items():
        rows = sorted(rows, key=lambda each: each["pair_id"])
        run.write_table(run.table("scores", name), pa.Table.from_pylist(rows, SCORES))
        pictures = {}
        for number, each in enumerate(rows):
            pictures[each["key"]] = {
                "key": each["key"], "source": name.split("-")[0], "url": f"http://a.example/{number}",
                "captions": [], "status": "success", "width": 100 + 50 * (number % 4), "height": 100,
                "reason": None,
            }  # fmt: skip
        images = [pictures[key] for key in sorted(pictures)]
        run.write_table(run.table("images", name), pa.Table.from_pylist(images, IMAGES))
        for table in ("scores", "images"):
            weights = {"matcher": matcher} if table == "scores" else {}
            identity = Identity(table, 1, {}, {}, weights)
            path = run.manifest(table, name)
            manifest.sign(run, path, identity, rows=len(rows), counts={}, seconds=0.0)
    return run


def reasons(run: RunDir, shard: str = "web-00000", **options: object) -> dict[str, str]:
    transform = FilterStage(Filter(**options), run).open("cpu")
    table = check(transform(Shard(run, shard)), DECISIONS, "decisions")
    return dict(zip(table["pair_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


K = [f"web-00000-{n:05d}" for n in range(6)]

PAIRS = st.lists(
    st.tuples(
        st.integers(0, 7),  # picture
        st.integers(0, 3),  # text
        st.booleans(),  # synthetic
        st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0, 0.3, 0.31]),
        st.sampled_from([-0.5, -0.0, 0.0, 0.5]),
        st.sampled_from([None, None, None, "empty_caption", "download_failed"]),
        st.integers(0, 5),  # content
    ),
    max_size=40,
    unique_by=lambda each: each[:3],
)


def test_every_rule_gives_its_reason(tmp_path):
    run = make_run(
        tmp_path,
        {
            "human-00000": [row("human-00000-00000", "text0", 0.0, content="same")],
            "web-00000": [
                row(K[0], "text0", None, error="download_failed"),
                row(K[1], "text0", 0.9, content="same"),
                row(K[2], "text0", 0.1, 0.9),
                row(K[3], "text0", 0.9, -0.9),
                row(K[4], "text0", 0.5, 0.0),
                row(K[5], "text0", 0.9, 0.9),
            ],
        },
    )
    found = reasons(run, itm_threshold=0.5, itc_threshold=-0.5, fused_threshold=0.3)
    assert [found[f"{key}/text0"] for key in K] == [
        "download_failed", "duplicate", "itm_below_threshold", "itc_below_threshold",
        "fused_below_threshold", "kept",
    ]  # fmt: skip
    assert reasons(run, "human-00000", itm_threshold=1.0) == {"human-00000-00000/text0": "kept"}
    assert set(ORDER) < set(REASONS)


def test_a_duplicate_counts_where_its_first_copy_is_dropped(tmp_path):
    """`make_run` gives the n-th row the URL http://a.example/n."""
    same = [row(key, "text0", 0.9, content="same") for key in K[:3]]
    run = make_run(
        tmp_path / "urls",
        {"web-00000": same, "web-00001": [row("web-00001-00000", "text0", 0.9, content="same")]},
    )
    assert list(reasons(run).values()) == ["kept", "duplicate", "duplicate"]
    found = reasons(run, expression="not endswith(url, '/0')")
    assert list(found.values()) == ["duplicate", "kept", "duplicate"]
    # in other shards too, and where all are dropped one has the reason
    assert set(reasons(run, expression="key == 'web-00001-00000'").values()) == {"duplicate"}
    assert list(reasons(run, "web-00001", expression="key == 'web-00001-00000'").values()) == [
        "kept"
    ]
    nowhere = reasons(run, expression="itm_prob > 1")
    assert list(nowhere.values()) == ["expression", "duplicate", "duplicate"]
    stage = FilterStage(Filter(expression="width > 1"), run)
    assert stage.reads_all == ("scores", "images"), "pictures decide which copy counts"


def test_a_duplicate_is_rather_human_than_web_than_synthetic(tmp_path):
    rows = [row(K[0], name, 0.7, content="same") for name in ("synthetic0", "text0")]
    run = make_run(tmp_path / "a", {"web-00000": rows})
    web, synthetic = f"{K[0]}/text0", f"{K[0]}/synthetic0"
    assert reasons(run) == {synthetic: "duplicate", web: "kept"}
    found = reasons(run, itm_threshold=0.5, synthetic_itm_threshold=0.8)
    assert found == {synthetic: "duplicate", web: "kept"}
    found = reasons(run, itm_threshold=0.8, synthetic_itm_threshold=0.5)
    assert found == {synthetic: "kept", web: "duplicate"}
    human = row("human-00000-00000", "text0", 0.0, content="same")
    run = make_run(tmp_path / "b", {"web-00000": rows, "human-00000": [human]})
    assert set(reasons(run).values()) == {"duplicate"}
    assert set(reasons(run, "human-00000").values()) == {"kept"}


@settings(max_examples=60, deadline=None)
@given(
    pairs=PAIRS, threshold=st.sampled_from([None, 0.3]), own=st.sampled_from([None, 0.6]),
    expression=st.sampled_from([None, "not endswith(url, '1')", "itc_sim >= 0"]),
)  # fmt: skip
def test_of_the_same_content_exactly_one_pair_is_kept_if_any_passes(
    tmp_path_factory, pairs, threshold, own, expression
):
    shards: dict[str, list[dict]] = {"web-00000": [], "web-00001": []}
    for picture, text, synthetic, itm, itc, error, content in pairs:
        name = f"web-{picture % 2:05d}"
        kind = "synthetic" if synthetic else "text"
        shards[name].append(
            row(f"{name}-{picture:05d}", f"{kind}{text}", itm, itc, error, content=f"{content}")
        )
    run = make_run(tmp_path_factory.mktemp("run"), shards)
    config = {"itm_threshold": threshold, "synthetic_itm_threshold": own, "expression": expression}
    one = {k: v for name in shards for k, v in reasons(run, name, **config).items()}
    config["drop_duplicates"] = False
    all_ = {k: v for name in shards for k, v in reasons(run, name, **config).items()}
    uids = {each["pair_id"]: each["uid"] for name in shards for each in shards[name]}
    kept = [uids[k] for k, v in one.items() if v == "kept"]
    assert sorted(kept) == sorted({uids[k] for k, v in all_.items() if v == "kept"})
    assert all(one[k] in (all_[k], "duplicate") for k in one)


def test_the_score_at_a_threshold_is_kept(tmp_path):
    run = make_run(tmp_path, {"web-00000": [row(K[0], "text0", 0.5)]})
    assert set(reasons(run, itm_threshold=0.5).values()) == {"kept"}


def test_synthetic_texts_may_have_thresholds_of_their_own(tmp_path):
    web = [("a", 0.6, 0.1), ("b", 0.4, 0.9)]
    synthetic = [("c", 0.6, 0.3), ("d", 0.4, 0.3), ("e", 0.8, 0.1)]
    rows = [row(f"{name}-0", "text0", itm, itc) for name, itm, itc in web]
    rows += [row(f"{name}-0", "synthetic0", itm, itc) for name, itm, itc in synthetic]
    run = make_run(tmp_path, {"web-00000": rows})

    def kept(**options):
        found = reasons(run, **options).items()
        return "".join(sorted(pair_id[0] for pair_id, reason in found if reason == "kept"))

    assert kept(itm_threshold=0.5) == "ace"
    assert kept(itm_threshold=0.5, synthetic_itm_threshold=0.7) == "ae"
    assert kept(itm_threshold=0.5, synthetic_itm_threshold=0.0) == "acde"
    assert kept(itm_threshold=None, synthetic_itm_threshold=0.7) == "abe"
    assert kept(itm_threshold=None, itc_threshold=0.2) == "bcd"
    assert kept(itm_threshold=None, itc_threshold=0.2, synthetic_itc_threshold=-1.0) == "bcde"
    assert reasons(run, synthetic_itm_threshold=0.7)["c-0/synthetic0"] == "itm_below_threshold"


def test_a_rule_over_scores_replaces_the_default_threshold():
    assert Filter().itm_threshold == 0.5
    assert Filter(top_fraction=0.3).itm_threshold is None
    assert Filter(fused_threshold=0.3).itm_threshold is None
    assert Filter(top_fraction=0.3, itm_threshold=0.2).itm_threshold == 0.2
    assert Filter(best_of=1).itm_threshold == 0.5


def test_best_of_keeps_the_best_synthetic_texts_that_pass(tmp_path):
    rows = [row(K[0], f"synthetic{n}", itm) for n, itm in enumerate([0.6, 0.9, 0.7, 0.2])]
    rows += [row(K[0], "text0", 0.55), row(K[1], "synthetic0", 0.51)]
    run = make_run(tmp_path, {"web-00000": rows})
    found = reasons(run, best_of=2)
    assert found[f"{K[0]}/synthetic0"] == "not_best"
    assert found[f"{K[0]}/synthetic3"] == "itm_below_threshold"
    assert Counter(found.values())["kept"] == 4
    assert Counter(reasons(run, best_of=1).values())["kept"] == 3


def test_synthetic_only_where_web_was_dropped(tmp_path):
    rows = [
        row(K[0], "text0", 0.9), row(K[0], "synthetic0", 0.9),
        row(K[1], "text0", 0.1), row(K[1], "synthetic0", 0.9),
    ]  # fmt: skip
    run = make_run(tmp_path, {"web-00000": rows})
    found = reasons(run, synthetic_only_where_web_dropped=True)
    assert found[f"{K[0]}/synthetic0"] == "web_text_kept"
    assert found[f"{K[1]}/synthetic0"] == "kept"


@settings(max_examples=40, deadline=None)
@given(
    pairs=PAIRS, fraction=st.floats(0, 1), rank=st.sampled_from(["itm", "itc", "fused"]),
    duplicates=st.booleans(), best=st.sampled_from([None, 1, 2]), threshold=st.sampled_from([None, 0.3]),
    only=st.booleans(), held=st.sampled_from([1, 3, 1000]),
)  # fmt: skip
def test_the_books_balance_and_the_top_fraction_is_exact(
    tmp_path_factory, pairs, fraction, rank, duplicates, best, threshold, only, held
):
    shards: dict[str, list[dict]] = {"web-00000": [], "web-00001": [], "human-00000": []}
    for picture, text, synthetic, itm, itc, error, content in pairs:
        name = f"web-{picture % 2:05d}"
        kind = "synthetic" if synthetic else "text"
        shards[name].append(
            row(f"{name}-{picture:05d}", f"{kind}{text}", itm, itc, error, content=f"{content}")
        )
    shards["human-00000"].append(row("human-00000-00000", "text0", 0.0, content="human"))
    run = make_run(tmp_path_factory.mktemp("run"), shards)
    config = {
        "rank_by": rank, "drop_duplicates": duplicates, "best_of": best, "itm_threshold": threshold,
    }  # fmt: skip
    without = {k: v for name in shards for k, v in reasons(run, name, **config).items()}
    rows = {each["pair_id"]: each for name in shards for each in shards[name]}
    assert set(without) == set(rows)
    assert set(without.values()) <= set(REASONS)

    config["top_fraction"] = fraction
    top = {k: v for name in shards for k, v in reasons(run, name, **config).items()}

    def order(pair_id: str) -> tuple:
        each = rows[pair_id]
        itm, itc = float(np.float32(each["itm_prob"])), float(np.float32(each["itc_sim"]))
        score = {"itm": itm, "itc": itc, "fused": (0.5 * itm + 0.5 * itc) / 1.0}[rank]
        return (-score, each["uid"], pair_id)

    judged = [k for k, v in without.items() if rows[k]["source"] != "human"]
    counted = [k for k in judged if rows[k]["error"] is None and without[k] != "duplicate"]
    open_ = sorted((k for k in judged if without[k] == "kept"), key=order)
    expected = set(open_[: share_of(len(counted), fraction)])
    assert {k for k in judged if top[k] == "kept"} == expected
    # the other reasons stay as they were, and human pairs are untouched
    assert all(top[k] == without[k] for k in without if without[k] != "kept")
    assert top["human-00000-00000/text0"] == "kept"

    # the same cut, however little is held at once
    rules = Rules(Filter(**config), pa.array([], pa.string()))
    assert find_cut(run, rules, held) == find_cut(run, rules)

    config["synthetic_only_where_web_dropped"] = only
    last = {k: v for name in shards for k, v in reasons(run, name, **config).items()}
    kept_web = {
        rows[k]["key"] for k, v in last.items() if v == "kept" and rows[k]["source"] == "web"
    }
    for pair_id, reason in last.items():
        same_picture = rows[pair_id]["key"] in kept_web and rows[pair_id]["source"] == "synthetic"
        if only and same_picture:
            assert reason != "kept"
        if reason == "web_text_kept":
            assert same_picture and top[pair_id] == "kept"


def test_expressions_decide_over_scores_and_pictures(tmp_path):
    rows = [
        row(K[0], "text0", 0.9, caption="A Dog runs"),  # width 100
        row(K[1], "text0", 0.9, caption="stock photo"),  # 150
        row(K[2], "text0", 0.9, caption=""),  # 200
        row(K[3], "text0", 0.9, 0.1, caption="one two three four"),  # 250
    ]
    run = make_run(tmp_path, {"web-00000": rows})

    def kept(expression: str) -> list[int]:
        found = reasons(run, expression=expression)
        assert set(found.values()) <= {"kept", "expression"}
        return [n for n in range(4) if found[f"{K[n]}/text0"] == "kept"]

    assert kept("width >= 200") == [2, 3]
    assert kept("100 < width < 250 and itm_prob > 0.4") == [1, 2]
    assert kept("width * height > 100 * 150 or contains(caption, 'Dog')") == [0, 2, 3]
    assert kept("not contains(lower(caption), 'stock')") == [0, 2, 3]
    assert kept("words(caption) >= 3") == [0, 3]
    assert kept("words(caption) == 0") == [2]
    assert kept("len(caption) > 10") == [1, 3]
    assert kept("width / height >= 1.5 and startswith(caption, 's')") == [1]
    assert kept("original_width is None") == [0, 1, 2, 3]
    assert kept("original_width > 3") == []
    assert kept("not original_width > 3") == []  # unknown stays unknown
    assert kept("width in [100, 250]") == [0, 3]
    assert kept("source not in ('web',)") == []
    assert kept("itc_sim in [-1, 0.1, 0]") == [0, 1, 2]
    assert kept("itc_sim - 1 in (-1.0, -2)") == [0, 1, 2]
    assert kept("matches(url, '/[01]$') and abs(itc_sim - 0.1) > -1") == [0, 1]
    assert kept("True") == [0, 1, 2, 3]


def test_expressions_decide_over_columns_of_one_s_own(tmp_path):
    rows = [row(K[n], name, 0.9) for n in range(4) for name in ("text0", "synthetic0")]
    run = make_run(tmp_path / "run", {"web-00000": rows})
    scored = {each["pair_id"]: each for each in rows}
    path = tmp_path / "mine.csv"

    def kept(text: str, expression: str = "own.aesthetic > 5") -> set[str]:
        path.write_text(text)
        found = reasons(run, expression=expression, columns=str(path))
        return {pair for pair, reason in found.items() if reason == "kept"}

    by_key = f"key,aesthetic,tag\n{K[0]},7.5,a\n{K[1]},3,b\n{K[2]},,c\n"
    first = {f"{K[0]}/text0", f"{K[0]}/synthetic0"}
    assert kept(by_key) == first  # too low, empty, and not in the table
    assert kept(by_key, "own.tag in ['a', 'b'] and itm_prob > 0.5 and own.aesthetic < 9") == first | {
        f"{K[1]}/text0", f"{K[1]}/synthetic0"
    }  # fmt: skip
    assert kept(f"pair_id,aesthetic\n{K[3]}/text0,6\n") == {f"{K[3]}/text0"}
    uid = scored[f"{K[2]}/synthetic0"]["uid"]
    assert kept(f"uid,aesthetic\n{uid},6\n") == {f"{K[2]}/synthetic0"}
    urls = Shard(run, "web-00000").read("images").to_pylist()
    assert kept(f"url,aesthetic\n{urls[1]['url']},6\n") == {
        f"{urls[1]['key']}/text0", f"{urls[1]['key']}/synthetic0"
    }  # fmt: skip
    for text, said in (
        (f"key,other\n{K[0]},1\n", "no column 'aesthetic'"),
        ("name,aesthetic\na,1\n", "which pair a row is of"),
        (f"key,aesthetic\n{K[0]},1\n{K[0]},2\n", "more than once"),
    ):
        with pytest.raises(InputError, match=said):
            kept(text)
    with pytest.raises(ConfigError, match="does not fit"):
        kept(by_key, "own.tag > 5")
    with pytest.raises(ValueError, match="gives no table of your own"):
        Filter(expression="own.aesthetic > 5")
    with pytest.raises(ConfigError):
        compile_expression("caption.aesthetic > 5")
    # the file's content is part of the identity
    path.write_text(by_key)
    stage = FilterStage(Filter(expression="own.aesthetic > 5", columns=str(path)), run)
    before = identify(stage, run, "web-00000", identify_shared(stage, run)).fingerprint
    path.write_text(by_key + f"{K[3]},9,d\n")
    assert identify(stage, run, "web-00000", identify_shared(stage, run)).fingerprint != before
    path.unlink()
    with pytest.raises(InputError, match=r"filter\.columns"):
        stage.weights()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "caption.upper() == 'A'", "caption[0] == 'a'", "widht > 3",
        "(lambda: 1)() == 1", "[x for x in (1, 2)]", "width", "width > 1 and 3", "", "width >", "1 if True else 0",
        "f'{caption}' == 'a'", "caption == None", "width is 3", "width in other", "width in [-height]", "width in [not 1]", "contains(caption, url)",
        "len(caption, caption) > 1", "width ** 9 > 1", "b'a' == caption", "contains(caption)", "x := 3",
        "(" * 90 + "width > 1" + ")" * 90 + " and " + "not " * 60 + "True", "width > 1j", "lower(caption=caption) == 'a'",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ConfigError):
        compile_expression(text)
    with pytest.raises(ValueError, match="expression"):
        Config(run_dir="r", human={"pairs": "h"}, web={"pairs": "w"}, filter={"expression": text})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_a_config_error(text):
    try:
        compile_expression(text)
        columns_of(text)
    except ConfigError:
        pass


def test_a_type_that_does_not_fit_is_found_before_anything_is_decided(tmp_path):
    run = make_run(tmp_path, {"web-00000": [row(K[0], "text0", 0.5)]})
    with pytest.raises(ConfigError, match="does not fit"):
        FilterStage(Filter(expression="lower(width) == 'a'"), run).open("cpu")


def test_reads_and_identity_follow_the_options(tmp_path):
    run = make_run(tmp_path, {"web-00000": [row(K[0], "text0", 0.5)]})
    assert FilterStage(Filter(), run).reads == ("scores",)
    assert FilterStage(Filter(expression="width > 3"), run).reads == ("scores", "images")
    assert FilterStage(Filter(drop_duplicates=False), run).reads_all == ()
    assert FilterStage(Filter(drop_duplicates=False, top_fraction=0.5), run).reads_all == (
        "scores",
    )
    with pytest.raises(InputError, match="capfilt calibrate"):
        FilterStage(Filter(calibration=str(tmp_path / "none.json")), run).weights()


def test_calibration_gives_thresholds_a_source(tmp_path):
    path = tmp_path / "calibration.json"
    web = SourceCalibration(0.4, 0.5, (-2.0, 2.0), (0.0, 1.0))  # an ITM probability of 0.599
    synthetic = SourceCalibration(-1.4, 0.9, (-2.0, 2.0), (0.5, 1.0))  # 0.198
    write_calibration(
        path,
        Calibration("m" * 64, "itm", (1.0, 0.0), 0.95, {"web": web, "synthetic": synthetic}, {}),
    )
    rows = [
        row(K[0], "text0", 0.59), row(K[1], "text0", 0.61), row(K[2], "synthetic0", 0.3),
        row(K[3], "synthetic0", 0.1), row(K[4], "text0", 0.7),
    ]  # fmt: skip
    run = make_run(tmp_path / "run", {"web-00000": rows})
    found = reasons(run, calibration=str(path))
    assert list(found.values()) == ["below_precision", "kept", "kept", "below_precision", "kept"]
    # by ITM alone the synthetic text would be last
    ranked = reasons(run, calibration=str(path), top_fraction=0.4, rank_by="probability")
    assert [k for k, v in ranked.items() if v == "kept"] == [f"{K[2]}/synthetic0", f"{K[4]}/text0"]
    digest = FilterStage(Filter(calibration=str(path)), run).weights()
    assert digest == {"calibration": path}
    other = make_run(tmp_path / "other", {"web-00000": rows}, matcher="n" * 64)
    with pytest.raises(InputError, match="matcher"):
        reasons(other, calibration=str(path))
    with pytest.raises(ValueError, match="calibration"):
        Filter(rank_by="probability")

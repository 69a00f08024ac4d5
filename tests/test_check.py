import json

import pytest
from tiny import Tiny

from capfilt.check import check
from capfilt.config import load
from capfilt.errors import CapfiltError, MismatchError
from capfilt.pipeline import device_for, run, slow_bf16


def test_check_finds_work_of_another_config(tiny: Tiny) -> None:
    lines = check(load(tiny.config))
    assert any(line.endswith("0 of 5 shards of pictures are there") for line in lines)
    run(load(tiny.config), steps=("ingest",))
    lines = check(load(tiny.config))
    assert any(line.endswith("5 of 5 shards of pictures are there") for line in lines)
    tiny.values["download"]["max_side_px"] = 64
    with pytest.raises(MismatchError, match=r"max_side_px: None there, 64 now"):
        check(load(tiny.config))


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        ({"calibration": "no.json"}, r"filter\.calibration: no\.json is not there; write it with `capfilt calibrate"),
        ({"calibration": "{folder}/human.jsonl"}, r"human\.jsonl"),
        ({"columns": "no.csv", "expression": "own.a > 1"}, r"filter\.columns: no\.csv is not there"),
        ({"columns": "{folder}/own.csv", "expression": "own.b > 1"}, r"has no column 'b'"),
        ({"columns": "{folder}/own.csv", "expression": "own.a > 1"}, r"does not fit"),
        ({"expression": "caption > 5"}, r"filter\.expression 'caption > 5' does not fit"),
        ({"expression": "matches(caption, '(')"}, r"does not fit .*regular expression"),
    ],
)  # fmt: skip
def test_what_the_filter_reads_is_checked_before_anything_runs(
    tiny: Tiny, filter_: dict[str, str], message: str
) -> None:
    (tiny.folder / "own.csv").write_text("key,a\nweb-00000-00000,x\n")
    folder = str(tiny.folder)
    tiny.values["filter"] = {key: text.replace("{folder}", folder) for key, text in filter_.items()}
    with pytest.raises(CapfiltError, match=message):
        check(load(tiny.config))
    with pytest.raises(CapfiltError, match=message):
        run(load(tiny.config))
    assert not tiny.run.exists(tiny.run.at("images"))


def test_own_columns_are_told(tiny: Tiny) -> None:
    (tiny.folder / "own.csv").write_text("key,a\nweb-00000-00000,1\n")
    tiny.values["filter"] = {
        "columns": str(tiny.folder / "own.csv"),
        "expression": "own.a > 1 and matches(caption, 'a|b')",
    }
    assert f"filter   {tiny.folder}/own.csv: 1 rows by key" in check(load(tiny.config))


@pytest.mark.parametrize("where", ["{folder}/human/0.png", "../human/0.png"])
def test_pictures_outside_of_the_folder_are_told(tiny: Tiny, where: str) -> None:
    path = where.replace("{folder}", str(tiny.folder))
    (tiny.folder / "human.jsonl").write_text(json.dumps({"image": path, "caption": "x"}) + "\n")
    with pytest.raises(CapfiltError, match=r"human\.images: none of the first 1 paths .*/0\.png"):
        check(load(tiny.config))


@pytest.mark.parametrize(
    ("able", "told"),
    [({"avx2": True}, True), ({"avx512_f": True, "avx512_bf16": True}, False), ({"bf16": True}, False)],
)  # fmt: skip
def test_bf16_without_its_instructions_is_told(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    able: dict[str, bool],
    told: bool,
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    tiny.values |= {"device": "cpu", "score": {"precision": "bf16"}}
    notes = [line for line in check(load(tiny.config)) if line.startswith("note ")]
    assert ("note     score.precision: bf16" in notes[-1] if notes else False) is told
    assert device_for("score", load(tiny.config)) == "cpu"
    assert ("--set score.precision=fp32" in caplog.text) is told
    tiny.values["score"]["precision"] = "fp32"
    assert not slow_bf16(load(tiny.config))

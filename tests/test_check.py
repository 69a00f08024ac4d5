import pytest
from tiny import Tiny

from capfilt.check import check
from capfilt.config import load
from capfilt.errors import MismatchError
from capfilt.pipeline import run


def test_check_finds_work_of_another_config(tiny: Tiny) -> None:
    lines = check(load(tiny.config))
    assert any(line.endswith("0 of 5 shards of pictures are there") for line in lines)
    run(load(tiny.config), steps=("ingest",))
    lines = check(load(tiny.config))
    assert any(line.endswith("5 of 5 shards of pictures are there") for line in lines)
    tiny.values["download"]["max_side_px"] = 64
    with pytest.raises(MismatchError, match=r"max_side_px: None there, 64 now"):
        check(load(tiny.config))

"""What the captioner's validation compares."""

from pathlib import Path

import pytest
from small_run import TINY, picture, tiny_med, write_shard

from capfilt.config import Config
from capfilt.errors import InputError
from capfilt.models.tokens import load_tokenizer
from capfilt.shards import RunDir
from capfilt.training.captioner import _caption_scores
from capfilt.training.data import Stream, take_inventory


def scores(folder: Path, texts: list[str]) -> dict[str, float]:
    run = RunDir(str(folder))
    rows = [{"image": picture(i)[0], "captions": [text]} for i, text in enumerate(texts)]
    write_shard(run, "human-00000", rows)
    config = Config.model_validate(
        {"run_dir": str(folder), "human": {"pairs": "x"}, "web": {"pairs": "x"}, "model": {"preset": "base"}}
    )  # fmt: skip
    inventory = take_inventory(run, ("human",))
    assert len(inventory) == len(texts)
    stream = Stream(run, inventory, TINY, batch_size=2, seed=0, use_features=False, train=False)
    return _caption_scores(tiny_med().eval(), load_tokenizer(), stream, None, config, "cpu")


def test_pictures_without_a_word_to_compare_with_are_left_out(tmp_path: Path) -> None:
    words = scores(tmp_path / "words", ["a red dog", "a green house", "two trees"])
    assert scores(tmp_path / "more", ["a red dog", "a green house", "two trees", "???"]) == words
    with pytest.raises(InputError, match="none of the 2 pictures held out has a text with a word"):
        scores(tmp_path / "none", ["???", "? ?"])

from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.errors import InputError
from capfilt.models.tokens import clean, decode, load_tokenizer, prompt_ids, tokenize


def test_clean() -> None:
    assert clean('  A "big" DOG!!  runs (fast)...#1; ~ok:*yes ') == "a big dog runs fast 1 ok yes"
    assert clean("a\nb\tc") == "a b c"
    assert clean(" ".join(["w"] * 50)) == " ".join(["w"] * 30)
    assert clean("it's 5-o'clock, ok?") == "it's 5-o'clock, ok?"
    assert clean("...") == ""


def test_tokenize_and_decode() -> None:
    tokenizer = load_tokenizer()
    ids, mask = tokenize(tokenizer, ["a dog", "a dog runs over the green grass"], 8, "enc")
    assert ids.shape == mask.shape == (2, 8)
    assert ids[:, 0].tolist() == [30523, 30523]
    assert ids[0].tolist() == [30523, 1037, 3899, 102, 0, 0, 0, 0] and mask[0].tolist() == [
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert ids[1, -1] == 102  # cut, and still ended
    assert tokenize(tokenizer, ["a"], 8)[0][0, 0] == 101
    assert tokenize(tokenizer, ["a"], 8, "dec")[0][0, 0] == 30522
    assert tokenize(tokenizer, [""], 8)[0].tolist() == [[101, 102]]
    assert decode(tokenizer, ids[0].tolist()) == "a dog"
    assert prompt_ids(tokenizer) == [30522, 1037, 3861, 1997]


def test_saved_tokenizer_loads(tmp_path: Path) -> None:
    load_tokenizer().save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert tokenize(again, ["a dog"], 8, "dec")[0].tolist() == [[30522, 1037, 3899, 102]]


def test_folders_without_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(InputError, match="bert-base-uncased"):
        load_tokenizer(tmp_path)

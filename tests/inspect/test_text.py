"""Pairs as text: the right ones, aligned, and harmless to the terminal."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import InputError, UsageError
from capfilt.inspect.text import format_pairs, printable, sample_pairs
from capfilt.shards import RunDir


def test_filters_combine(run: RunDir) -> None:
    rows = sample_pairs(run, dropped=True, reason="itm_below_threshold", source="synthetic", n=500)
    assert rows and all(
        (row["reason"], row["source"], row["keep"]) == ("itm_below_threshold", "synthetic", False)
        for row in rows
    )
    kept = sample_pairs(run, dropped=False, n=500)
    dropped = sample_pairs(run, dropped=True, n=500)
    everything = sample_pairs(run, n=500)
    assert all(row["keep"] for row in kept) and not any(row["keep"] for row in dropped)
    assert sorted(row["pair_id"] for row in kept + dropped) == [
        row["pair_id"] for row in everything
    ]


def test_draw_is_by_seed(run: RunDir) -> None:
    first = sample_pairs(run, n=10, seed=3)
    assert len(first) == 10 and first == sample_pairs(run, n=10, seed=3)
    assert first != sample_pairs(run, n=10, seed=4)
    assert set(first[0]) == {
        "pair_id",
        "key",
        "source",
        "caption",
        "itm_prob",
        "itc_sim",
        "keep",
        "reason",
    }


def test_wrong_words_are_explained(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'itm' is unknown; there are kept, itm_below"):
        sample_pairs(run, reason="itm")
    with pytest.raises(UsageError, match="web, human, synthetic"):
        sample_pairs(run, source="www")
    with pytest.raises(UsageError, match="holds no dropped pairs"):
        sample_pairs(run, dropped=True, reason="kept")
    with pytest.raises(UsageError, match="at least 1"):
        sample_pairs(run, n=0)
    with pytest.raises(InputError, match="no decisions yet"):
        sample_pairs(RunDir(str(tmp_path)))


def test_table_is_aligned(run: RunDir) -> None:
    text = format_pairs(sample_pairs(run, n=60))
    lines = text.splitlines()
    assert len(lines) == 61
    at = lines[0].index("caption")
    assert all(len(line) < at or line[at - 2 : at] == "  " for line in lines)
    assert "\x1b" not in text and "\u202e" not in text
    assert format_pairs([]) == "no such pairs"


def test_printable_keeps_what_people_write() -> None:
    for text in ("a café", "黒い猫", "صورة", "👩‍👩‍👧", "a — b"):
        assert printable(text) == text
    assert printable("\x1b]0;x\x07a\r\nb\u202ec\x9b1m") == r"\x1b]0;x\x07a\r\nb\u202ec\x9b1m"


@given(st.text())
def test_printable_leaves_no_control(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() or all(
        char.isprintable() or unicodedata.category(char) in {"Zs", "Cn"} or char in "\u200c\u200d"
        for char in shown
    )

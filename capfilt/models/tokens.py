"""Texts to token ids: bert-base-uncased's vocabulary with `[DEC]` and `[ENC]`; text cleaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from capfilt.errors import InputError
from capfilt.models.text_tower import CLS_ID, DEC_ID, ENC_ID, PAD_ID, SEP_ID
from capfilt.models.weights import minilm_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "a picture of "
MAX_WORDS = 30

FirstToken = Literal["cls", "enc", "dec"]
_FIRST = {"cls": CLS_ID, "enc": ENC_ID, "dec": DEC_ID}
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def clean(text: str, max_words: int = MAX_WORDS) -> str:
    """BLIP's text cleaning.

    Lower case, the characters `. ! " ( ) * # : ; ~` to spaces, spaces collapsed, cut to `max_words`
    words.
    """
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split()[:max_words])


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Load a BERT tokenizer and give it `[DEC]` (30522) and `[ENC]` (30523).

    Args:
        folder: with `tokenizer.json` or `vocab.txt`, such as a model folder of capfilt's or a BLIP
            checkpoint; None: the vocabulary that comes with MiniLM, which is bert-base-uncased's.

    Raises:
        InputError: there is no tokenizer, or its vocabulary is not bert-base-uncased's.
    """
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    where = minilm_folder() if folder is None else Path(folder)
    # from_pretrained makes a vocabulary of five special tokens out of a folder without files:
    # everything is [UNK]
    if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise InputError(
            f"{where}: no tokenizer.json and no vocab.txt; "
            "a tokenizer can't be made without a vocabulary"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = BertTokenizerFast.from_pretrained(str(where))
    except Exception as error:
        raise InputError(
            f"{where}: not a readable tokenizer ({type(error).__name__}: {error})"
        ) from None
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    expected = {"[PAD]": PAD_ID, "[CLS]": CLS_ID, "[SEP]": SEP_ID, "[DEC]": DEC_ID, "[ENC]": ENC_ID}
    for token, wanted in expected.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise InputError(
                f"{where}: the vocabulary ({len(tokenizer)} tokens) gives {token} the id {found}, "
                f"not {wanted}; "
                "MED needs bert-base-uncased's vocabulary"
            )
    if tokenizer.unk_token_id in tokenizer("a picture of a dog")["input_ids"]:
        raise InputError(
            f"{where}: the vocabulary knows no common words; "
            "MED needs bert-base-uncased's vocabulary"
        )
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    first_token: FirstToken = "cls",
) -> tuple[Tensor, Tensor]:
    """Encode texts, padded on the right to the longest of them.

    Args:
        tokenizer: from `load_tokenizer`.
        texts: N texts, cleaned.
        max_length: longest text in tokens, first token and `[SEP]` included; longer ones are cut.
        first_token: `cls` for ITC, `enc` for ITM, `dec` for LM.

    Returns:
        ids `[N, L]` and mask `[N, L]` (1 for tokens, 0 for padding), int64.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)[
        "input_ids"
    ]
    longest = max((len(ids) for ids in encoded), default=0)
    ids = torch.full((len(encoded), longest), PAD_ID, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(encoded):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    if longest:
        ids[:, 0] = _FIRST[first_token]
    return ids, mask


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str = PROMPT) -> list[int]:
    """`[DEC]` and the prompt's tokens, without `[SEP]`: what `generation.generate` starts from."""
    return [DEC_ID, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """A caption's text, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

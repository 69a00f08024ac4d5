"""MED against transformers' BLIP with random weights: same embeddings, logits, loss and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, oracle
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipModel,
)

from capfilt.models import hub
from capfilt.models.generation import generate
from capfilt.models.med import MED


def batch(shape: tuple[int, ...], first: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    size, vocab = shape[8], shape[10]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, size, size, generator=generator)
    ids = torch.randint(103, vocab, (3, 9), generator=generator)
    ids[:, 0] = first
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4)):
        ids[row, length - 1] = 102
        ids[row, length:], mask[row, length:] = 0, 0
    return pixels, ids, mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [101, 140], ids=["cls", "enc"])
def test_matcher(shape: tuple[int, ...], first: int, tmp_path: Path) -> None:
    blip = oracle(BlipForImageTextRetrieval, shape, tmp_path)
    model = hub.load(tmp_path, kinds="matcher")
    pixels, ids, mask = batch(shape, first)
    with torch.no_grad():
        expected = blip(ids, pixels, attention_mask=mask).itm_score
        similarity = blip(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
        tokens = model.encode_image(pixels)
        logits = model.itm_logits(ids, mask, model.cross_keys_values(model.adapt(tokens)))
        ours = model.embed_image(tokens) @ model.embed_text(ids, mask).T
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, similarity, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01  # the comparison would pass on a constant


@pytest.mark.parametrize("shape", SHAPES)
def test_captioner_logits_and_loss(shape: tuple[int, ...], tmp_path: Path) -> None:
    blip = oracle(BlipForConditionalGeneration, shape, tmp_path)
    model = hub.load(tmp_path)
    pixels, ids, mask = batch(shape, 5)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    with torch.no_grad():
        expected = blip(pixels, ids, attention_mask=mask, labels=labels)
        kv = model.cross_keys_values(model.image(pixels), "decoder")
        logits = model.lm_logits(ids, mask, kv)
        unmasked = model.lm_logits(ids, None, kv)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unmasked[mask.bool()], logits[mask.bool()], atol=1e-5, rtol=1e-5)
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        label_smoothing=0.1,
        ignore_index=-100,
    )
    torch.testing.assert_close(flat, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_blip_model(shape: tuple[int, ...], tmp_path: Path) -> None:
    blip = oracle(BlipModel, shape, tmp_path)
    model = hub.load(tmp_path, kinds="blip_model")
    pixels, ids, mask = batch(shape)
    with torch.no_grad():
        expected = blip(ids, pixels, attention_mask=mask)
        image, text = model.embed_image(model.encode_image(pixels)), model.embed_text(ids, mask)
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        image @ text.T / model.temp, expected.logits_per_image, atol=1e-3, rtol=1e-4
    )


def test_interpolated_positions(tmp_path: Path) -> None:
    blip = oracle(BlipForImageTextRetrieval, SHAPES[0], tmp_path)
    _, ids, mask = batch(SHAPES[0])
    pixels = torch.randn(3, 3, 80, 80, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = blip(ids, pixels, attention_mask=mask, interpolate_pos_encoding=True).itm_score
        for model in (hub.load(tmp_path), hub.load(tmp_path, image_size_px=80)):
            logits = model.itm_logits(ids, mask, model.cross_keys_values(model.image(pixels)))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def generated(model: MED, pixels: Tensor, **settings: object) -> list[list[int]]:
    kv = model.cross_keys_values(model.image(pixels), "decoder")
    captions = generate(model, kv, [5, 110, 111], **settings)  # type: ignore[arg-type]
    return [c.token_ids for c in captions]


def reference(blip: torch.nn.Module, pixels: Tensor, **settings: object) -> list[list[int]]:
    prompt = torch.tensor([[5, 110, 111, 102]]).repeat(
        len(pixels), 1
    )  # transformers cuts the last one off
    out = blip.generate(pixels, input_ids=prompt, do_sample=False, **settings)  # type: ignore[operator]
    texts = [row[3:].tolist() for row in out]
    return [text[: text.index(102)] if 102 in text else text for text in texts]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("sep_bias", [0.0, 3.0, 6.0])
def test_greedy_and_beam_tokens(
    shape: tuple[int, ...], penalty: float, sep_bias: float, tmp_path: Path
) -> None:
    blip = oracle(BlipForConditionalGeneration, shape, tmp_path)
    with torch.no_grad():  # texts of several lengths
        blip.text_decoder.cls.predictions.bias[102] += sep_bias  # type: ignore[union-attr,index,operator]
    blip.save_pretrained(tmp_path)  # type: ignore[operator]
    model = hub.load(tmp_path)
    pixels = torch.randn(8, 3, shape[8], shape[8], generator=torch.Generator().manual_seed(2))
    limits: dict[str, object] = {"min_length": 6, "max_length": 14, "repetition_penalty": penalty}
    assert generated(model, pixels, method="greedy", **limits) == reference(
        blip, pixels, num_beams=1, **limits
    )
    for beams in (2, 3):
        ours = generated(model, pixels, method="beam", num_beams=beams, **limits)
        assert ours == reference(blip, pixels, num_beams=beams, **limits)
    longer = generated(model, pixels, method="beam", num_beams=3, length_penalty=2.0, **limits)
    assert longer == reference(blip, pixels, num_beams=3, length_penalty=2.0, **limits)


@pytest.mark.parametrize(
    ("cls", "kind"), [(BlipForConditionalGeneration, "captioner"), (BlipForImageTextRetrieval, "matcher"), (BlipModel, "blip_model")]
)  # fmt: skip
def test_back_to_transformers(cls: type, kind: hub.Kind, tmp_path: Path) -> None:
    blip = oracle(cls, SHAPES[0], tmp_path / "in")
    hub.save_transformers(hub.load(tmp_path / "in"), tmp_path / "out", cls.__name__)
    again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[attr-defined]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again.eval()
    pixels, ids, mask = batch(SHAPES[0])
    with torch.no_grad():
        first = blip(input_ids=ids, pixel_values=pixels, attention_mask=mask)
        second = again(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    field = {"captioner": "logits", "matcher": "itm_score", "blip_model": "logits_per_text"}[kind]
    torch.testing.assert_close(second[field], first[field], atol=1e-5, rtol=1e-5)

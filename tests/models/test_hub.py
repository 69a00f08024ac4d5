from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LITE, SHAPES, TINY, oracle, tiny
from transformers import BlipForImageTextRetrieval, ViTConfig, ViTModel

from capfilt.errors import ConfigError, InputError
from capfilt.models import hub, med_files
from capfilt.models.med_config import MEDConfig

# heads are 64 wide in the original release, whose files carry no config
ORIGINAL = MEDConfig(
    image_size_px=32, vision_width=64, vision_depth=1, vision_heads=1, vision_mlp_width=48, vocab_size=160,
    text_width=128, text_depth=2, text_heads=2, text_ffn_width=32, max_positions=24, embed_dim=16,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["captioner", "matcher", "pretrained"])
def test_original_key_names(kind: hub.Kind, tmp_path: Path) -> None:
    model = tiny(ORIGINAL)
    state = hub.export_state(model, kind, original=True)
    assert "visual_encoder.blocks.0.attn.qkv.weight" in state
    own = {
        "captioner": "text_decoder.bert",
        "matcher": "text_encoder",
        "pretrained": "text_encoder",
    }[kind]
    assert f"{own}.encoder.layer.1.crossattention.self.key.weight" in state
    state[f"{own}.embeddings.position_ids"] = torch.arange(24)[None]
    if kind != "matcher":
        state["text_decoder.cls.predictions.decoder.weight"] = model.decoder.embeddings.word.weight
    if kind != "captioner":
        state |= {
            "visual_encoder_m.cls_token": torch.zeros(1),
            "image_queue": torch.zeros(1),
            "queue_ptr": torch.zeros(1),
        }
    torch.save({"model": state, "epoch": 3}, tmp_path / "blip.pth")
    again = hub.load(tmp_path / "blip.pth")
    assert again.config == dataclasses.replace(
        ORIGINAL, embed_dim=256 if kind == "captioner" else 16
    )
    filled = {entry.ours for entry in hub.names(ORIGINAL, kind, original=True)}
    mine, theirs = model.state_dict(), again.state_dict()
    for name in filled:
        assert torch.equal(mine[name], theirs[name]), name
    if kind == "pretrained":
        assert filled | {"encoder", "decoder"} >= set(mine) - {"temp"}


def test_absent_tower_starts_as_a_copy(tmp_path: Path) -> None:
    oracle(BlipForImageTextRetrieval, SHAPES[0], tmp_path)
    model = hub.load(tmp_path)
    for one, other in zip(model.encoder.layers, model.decoder.layers, strict=True):
        assert one.self_attention is not other.self_attention
        assert torch.equal(one.self_attention.qkv.weight, other.self_attention.qkv.weight)


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    oracle(BlipForImageTextRetrieval, SHAPES[0], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray.weight"] = torch.zeros(1)
    state["itm_head.bias"] = torch.zeros(5)
    del state["text_encoder.encoder.layer.0.attention.self.key.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        hub.load(tmp_path)
    message = str(error.value)
    assert (
        "unknown: stray.weight" in message and "itm_head.bias (file: (5,), model: (2,))" in message
    )
    assert "missing: text_encoder.encoder.layer.0.attention.self.key.bias" in message
    assert "model.safetensors" in message


def test_bin_files(tmp_path: Path) -> None:
    oracle(BlipForImageTextRetrieval, SHAPES[0], tmp_path)
    expected = hub.load(tmp_path).state_dict()
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = hub.load(tmp_path).state_dict()
    # a captioner's head has no place in the file and starts at random
    assert all(torch.equal(expected[n], found[n]) for n in found if not n.startswith("lm_head."))


def test_the_wrong_kind(tmp_path: Path) -> None:
    oracle(BlipForImageTextRetrieval, SHAPES[0], tmp_path)
    with pytest.raises(InputError, match="this is a matcher, not a captioner: it lacks a part"):
        hub.load(tmp_path, kinds="captioner")
    with pytest.raises(InputError, match="this is a matcher, not a captioner or pretrained"):
        hub.load(tmp_path, kinds=("captioner", "pretrained"))
    assert hub.load(tmp_path, kinds=("matcher", "pretrained")).config.text_width == SHAPES[0][0]
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a checkpoint of BLIP; its keys begin: weight"):
        hub.load(tmp_path)


def test_own_folders(tmp_path: Path) -> None:
    med_files.save(tiny(), tmp_path)
    assert hub.load(tmp_path).config == TINY
    with pytest.raises(InputError, match="image_size_px"):
        hub.load(tmp_path, image_size_px=64)


@pytest.mark.parametrize(
    ("config", "architecture", "what"),
    [
        (LITE, "BlipForConditionalGeneration", "image_tower"),
        (dataclasses.replace(TINY, text_pool="mean"), "BlipForImageTextRetrieval", "text_pool is mean"),
        (dataclasses.replace(TINY, itm_from_itc=True), "BlipForImageTextRetrieval", "itm_from_itc"),
        (TINY, "BlipModel", "text_pool is first"),
        (TINY, "BlipForQuestionAnswering", "architecture"),
    ],
)  # fmt: skip
def test_what_blip_can_not_express(
    config: MEDConfig, architecture: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=what):
        hub.save_transformers(tiny(config), tmp_path, architecture)


@pytest.mark.parametrize("source", ["vit", "timm", "blip"])
def test_init_vit(source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=48,
                  patch_size=16, layer_norm_eps=1e-6), add_pooling_layer=False
    ).eval()  # fmt: skip
    model = tiny()
    if source == "vit":
        vit.save_pretrained(tmp_path)
    else:
        # through the ViT names first, then out under the others
        vit.save_pretrained(tmp_path)
        donor = tiny(dataclasses.replace(TINY, image_size_px=48))
        hub.init_vit(donor, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        state = hub.export_state(donor, "captioner", original=True)
        if source == "timm":
            root = "visual_encoder."
            state = {k.removeprefix(root): v for k, v in state.items() if k.startswith(root)} | {
                "head.bias": torch.zeros(3)
            }
        torch.save({"model": state}, tmp_path / "pytorch_model.bin")
    hub.init_vit(model, tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="takes no ViT weights"):
        hub.init_vit(tiny(LITE), tmp_path)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such folder"):
        hub.load("nobody/nothing-at-all")

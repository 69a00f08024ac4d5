"""Small random models that several test files use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig

TINY = MEDConfig(
    image_size_px=32, vision_width=32, vision_depth=2, vision_heads=2, vision_mlp_width=48,
    vocab_size=160, text_width=32, text_depth=2, text_heads=4, text_ffn_width=64, max_positions=24, embed_dim=16,
)  # fmt: skip
LITE = dataclasses.replace(
    TINY, image_tower="efficientnet_lite", image_size_px=64, text_pool="mean", image_pool="mean",
    projection_hidden=24, itm_from_itc=True,
)  # fmt: skip


def tiny(config: MEDConfig = TINY, seed: int = 0) -> MED:
    """Weights large enough that outputs differ between tokens and images."""
    torch.manual_seed(seed)
    model = MED(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.2)
    return model


SHAPES = [
    # text width, depth, heads, ffn; vision width, depth, heads, mlp; image, patch; vocabulary
    (32, 2, 4, 64, 48, 2, 4, 96, 32, 16, 200),
    (48, 3, 6, 80, 32, 1, 2, 64, 48, 8, 333),
    (32, 1, 2, 128, 32, 3, 8, 64, 64, 16, 150),
]


def blip_config(shape: tuple[int, ...]) -> BlipConfig:
    tw, td, th, tf, vw, vd, vh, vm, size, patch, vocab = shape
    return BlipConfig(
        text_config=BlipTextConfig(
            vocab_size=vocab, hidden_size=tw, encoder_hidden_size=vw, num_hidden_layers=td, num_attention_heads=th,
            intermediate_size=tf, max_position_embeddings=40, bos_token_id=5, sep_token_id=102, pad_token_id=0,
            label_smoothing=0.1,
        ),
        vision_config=BlipVisionConfig(
            hidden_size=vw, num_hidden_layers=vd, num_attention_heads=vh, intermediate_size=vm, image_size=size,
            patch_size=patch, initializer_range=0.02,
        ),
        image_text_hidden_size=24,
        projection_dim=20,
    )  # fmt: skip


def oracle(cls: type, shape: tuple[int, ...], folder: Path) -> torch.nn.Module:
    """A random BLIP of transformers', also saved."""
    torch.manual_seed(sum(shape))
    model = cls(blip_config(shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def texts(rows: int = 4, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(103, 160, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0
    return ids * mask, mask

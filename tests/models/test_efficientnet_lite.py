from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.errors import InputError
from capfilt.models.efficientnet_lite import (
    VARIANTS,
    EfficientNetLite,
    MBConv,
    SameConv,
    load_imagenet,
    map_channels,
)


@pytest.mark.parametrize(("variant", "blocks", "last"), [("lite0", 16, 320), ("lite1", 21, 320), ("lite2", 21, 352), ("lite3", 24, 384), ("lite4", 30, 448)])  # fmt: skip
def test_variants(variant: str, blocks: int, last: int) -> None:
    trunk = EfficientNetLite(variant)
    assert len(trunk.blocks) == blocks and trunk.head.in_channels == last
    assert trunk.stem.out_channels == 32 and VARIANTS[variant].image_size_px % 4 == 0


@pytest.mark.parametrize("side", [33, 64, 70])
def test_feature_map(side: int) -> None:
    trunk = EfficientNetLite("lite0").eval().double()
    pixels = torch.randn(6, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        features = trunk(pixels)
        assert features.shape == (6, 1280, math.ceil(side / 32), math.ceil(side / 32))
        assert features.min() >= 0 and features.max() <= 6
        torch.testing.assert_close(features[5:], trunk(pixels[5:]), atol=1e-5, rtol=1e-4)


def test_all_levels_stand_behind_the_last_map() -> None:
    torch.manual_seed(0)
    plain, trunk = EfficientNetLite("lite2").eval(), EfficientNetLite("lite2", True).eval()
    trunk.load_state_dict(plain.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    ends = []
    for number in (0, 3, 6, 10, 14, 19, 20):  # the last block of each stage
        plain.blocks[number].register_forward_hook(lambda _, __, out: ends.append(out))
    with torch.no_grad():
        features, last = trunk(pixels), plain(pixels)
    channels = [16, 24, 48, 88, 120, 208, 352]
    assert [end.shape[1] for end in ends] == channels
    assert features.shape == (1, 1280 + sum(channels), 2, 2)
    assert features.shape[1] == map_channels("lite2", True) and map_channels("lite2") == 1280
    torch.testing.assert_close(features[:, :1280], last)
    means = torch.cat([end.mean((2, 3)) for end in ends], dim=1)
    torch.testing.assert_close(features[:, 1280:].mean((2, 3)), means, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1), (7, 3, 1)]
)
def test_same_padding(side: int, kernel: int, stride: int) -> None:
    conv = SameConv(1, 1, kernel, stride)
    x = torch.randn(1, 1, side, side)
    out = conv(x)
    n = math.ceil(side / stride)
    assert out.shape == (1, 1, n, n)
    before = max((n - 1) * stride + kernel - side, 0) // 2  # TensorFlow puts the smaller half first
    padded = F.pad(x, (before, 9, before, 9))
    for row in range(n):
        for column in range(n):
            window = padded[
                0,
                0,
                row * stride : row * stride + kernel,
                column * stride : column * stride + kernel,
            ]
            expected = (window * conv.weight[0, 0]).sum() + conv.bias[0]
            torch.testing.assert_close(out[0, 0, row, column], expected, atol=1e-5, rtol=1e-5)


def imagenet_like(trunk: EfficientNetLite) -> dict[str, Tensor]:
    """A random state dict under ImageNet's key names, with batch norms apart."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {"_fc.weight": torch.zeros(5, 1280), "_fc.bias": torch.zeros(5)}

    def add(conv: SameConv, name: str, norm: str) -> None:
        state[f"{name}.weight"] = torch.randn(conv.weight.shape) * 0.3
        n = conv.out_channels
        state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.rand(n) + 0.5, torch.randn(n) * 0.3
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = (
            torch.randn(n) * 0.1,
            torch.rand(n) + 0.5,
        )
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add(trunk.stem, "_conv_stem", "_bn0")
    for i, block in enumerate(trunk.blocks):
        assert isinstance(block, MBConv)
        if block.expand is not None:
            add(block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        add(block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        add(block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    add(trunk.head, "_conv_head", "_bn1")
    return state


def test_folding_is_convolution_then_batch_norm() -> None:
    trunk = EfficientNetLite("lite0").eval()
    state = imagenet_like(trunk)
    load_imagenet(trunk, state, "weights.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = F.conv2d(F.pad(x, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)
        normed = F.batch_norm(
            plain, state["_bn0.running_mean"], state["_bn0.running_var"], state["_bn0.weight"], state["_bn0.bias"], eps=1e-3
        )  # fmt: skip
        torch.testing.assert_close(trunk.stem(x), normed, atol=1e-4, rtol=1e-4)


def test_wrong_weights_are_listed() -> None:
    state = imagenet_like(EfficientNetLite("lite0"))
    state["stray"] = torch.zeros(1)
    del state["_bn0.bias"]
    with pytest.raises(InputError, match=r"weights\.pth.*missing _bn0\.bias.*unknown stray"):
        load_imagenet(EfficientNetLite("lite0"), state, "weights.pth")
    with pytest.raises(InputError, match="EfficientNet-lite2"):
        load_imagenet(
            EfficientNetLite("lite2"), imagenet_like(EfficientNetLite("lite0")), "weights.pth"
        )


def test_unknown_variant() -> None:
    with pytest.raises(InputError, match="lite7"):
        EfficientNetLite("lite7")

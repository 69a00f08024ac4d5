"""EfficientNet-Lite trunks, lite0 to lite4: MBConv blocks, ReLU6, no squeeze-and-excitation.

The batch norms are folded into the convolutions when the weights are loaded: a frozen trunk always
runs them with their stored statistics, so a convolution with a bias is the same function and
faster.

The last feature map knows objects and has forgotten much of colour and texture; with `all_levels`
the outputs of the seven stages, averaged to the last map's grid, stand beside it.

Dimensions: B batch, S image side in pixels, h = w = ceil(S / 32), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import InputError

STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BATCH_NORM_EPS = 1e-3
CPU_BATCH = 4  # more images at once fall out of a core's cache: 19.6 against 25.2 ms an image at 32


class Variant(NamedTuple):
    """How one EfficientNet-Lite is scaled, and the image side that it was trained at."""

    width: float
    depth: float
    image_size_px: int


class Stage(NamedTuple):
    """One row of EfficientNet-B0's table, before scaling."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


VARIANTS = {
    "lite0": Variant(1.0, 1.0, 224),
    "lite1": Variant(1.0, 1.1, 240),
    "lite2": Variant(1.1, 1.2, 260),
    "lite3": Variant(1.2, 1.4, 280),
    "lite4": Variant(1.4, 1.8, 300),
}

STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _scaled_channels(channels: int, width: float) -> int:
    # to the nearest multiple of 8, but never more than a tenth below
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads "SAME": the odd pixel to the bottom and right."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C', ceil(h / stride), ceil(w / stride)]`."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = x.shape[-2:]
        bottom, right = (
            max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            for side in (height, width)
        )
        if bottom == right and bottom % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, bottom // 2, 1, self.groups)
        x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class MBConv(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, project 1x1; a skip where the shape allows."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        middle = inputs * expand
        self.expand = SameConv(inputs, middle, 1) if expand > 1 else None
        self.depthwise = SameConv(middle, middle, kernel, stride, groups=middle)
        self.project = SameConv(middle, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C', h', w']`."""
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.skip else y


def map_channels(variant: str, all_levels: bool = False) -> int:
    """C, the channels of a trunk's feature map."""
    if not all_levels:
        return HEAD_CHANNELS
    width = VARIANTS[variant].width
    return HEAD_CHANNELS + sum(_scaled_channels(stage.channels, width) for stage in STAGES)


class EfficientNetLite(nn.Module):
    """The trunk: pixels `[B, 3, S, S]` to the last feature map `[B, C, h, w]`.

    C is 1280, and more with `all_levels` (`map_channels`).
    """

    def __init__(self, variant: str = "lite0", all_levels: bool = False) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(
                f"lite_variant: {variant!r} is not an EfficientNet-Lite; use {', '.join(VARIANTS)}"
            )
        width, depth, _ = VARIANTS[variant]
        self.variant = variant
        self.all_levels = all_levels
        self.stage_ends: list[int] = []
        self.stem = SameConv(3, STEM_CHANNELS, 3, stride=2)
        blocks: list[MBConv] = []
        channels = STEM_CHANNELS
        for number, stage in enumerate(STAGES):
            outputs = _scaled_channels(stage.channels, width)
            # the first and the last stage keep their depth in the Lite family
            fixed = number in (0, len(STAGES) - 1)
            for i in range(stage.repeats if fixed else math.ceil(stage.repeats * depth)):
                stride = stage.stride if i == 0 else 1
                blocks.append(MBConv(channels, outputs, stage.kernel, stride, stage.expand))
                channels = outputs
            self.stage_ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, HEAD_CHANNELS, 1)
        for module in self.modules():
            if isinstance(module, SameConv):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pixels scaled as (x - 127) / 128.

        Args:
            pixel_values: `[B, 3, S, S]`.

        Returns:
            The feature map `[B, C, h, w]`: the head's 1280 channels after its ReLU6 (values 0 to
            6), then those of the stages with `all_levels`.
        """
        if pixel_values.device.type == "cpu" and len(pixel_values) > CPU_BATCH:
            return torch.cat([self.forward(part) for part in pixel_values.split(CPU_BATCH)])
        # depthwise convolutions on CPU run up to twice as fast in channels-last order
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        levels: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.all_levels and number in self.stage_ends:
                levels.append(x)
        last = F.relu6(self.head(x), inplace=True)
        if not levels:
            return last
        grid = (int(last.shape[2]), int(last.shape[3]))
        return torch.cat([last, *(F.adaptive_avg_pool2d(level, grid) for level in levels)], dim=1)


class EfficientNetLites(nn.Module):
    """Several trunks that look at the same pixels: what one overlooks another may see."""

    def __init__(self, variants: list[str], all_levels: bool = False) -> None:
        super().__init__()
        self.trunks = nn.ModuleList([EfficientNetLite(variant, all_levels) for variant in variants])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, S, S]` to the feature maps of all trunks, one behind the other."""
        return torch.cat([trunk(pixel_values) for trunk in self.trunks], dim=1)


def load_imagenet(trunk: EfficientNetLite, state: Mapping[str, Tensor], where: str) -> None:
    """Fill a trunk from an ImageNet state dict, folding the batch norms into the convolutions.

    Args:
        trunk: the module to fill, in place.
        state: keys such as `_conv_stem.weight`, `_blocks.3._bn1.running_var`; the classifier `_fc`
            is left aside.
        where: the file, for messages.

    Raises:
        InputError: keys are missing, unknown or of another shape; the message lists them.
    """
    pairs: list[tuple[SameConv, str, str]] = [(trunk.stem, "_conv_stem", "_bn0")]
    for i, block in enumerate(trunk.blocks):
        prefix = f"_blocks.{i}."
        assert isinstance(block, MBConv)
        if block.expand is not None:
            pairs.append((block.expand, prefix + "_expand_conv", prefix + "_bn0"))
        pairs.append((block.depthwise, prefix + "_depthwise_conv", prefix + "_bn1"))
        pairs.append((block.project, prefix + "_project_conv", prefix + "_bn2"))
    pairs.append((trunk.head, "_conv_head", "_bn1"))

    wanted: dict[str, tuple[int, ...]] = {}
    for conv, conv_name, norm_name in pairs:
        wanted[f"{conv_name}.weight"] = tuple(conv.weight.shape)
        for part in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{norm_name}.{part}"] = (conv.out_channels,)
    ignored = ("num_batches_tracked", "_fc.weight", "_fc.bias")
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [
        f"unknown {key}" for key in state if key not in wanted and not key.endswith(ignored)
    ]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {shape}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(
            f"{where}: not the weights of an EfficientNet-{trunk.variant}: "
            f"{'; '.join(problems[:20])}{more}. Set lite_variant to the file's variant."
        )
    with torch.no_grad():
        for conv, conv_name, norm_name in pairs:
            scale = (
                state[f"{norm_name}.weight"]
                / (state[f"{norm_name}.running_var"] + BATCH_NORM_EPS).sqrt()
            )
            conv.weight.copy_(state[f"{conv_name}.weight"] * scale[:, None, None, None])
            shift = state[f"{norm_name}.bias"] - state[f"{norm_name}.running_mean"] * scale
            conv.get_parameter("bias").copy_(shift)

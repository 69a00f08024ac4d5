"""The vision transformer of BLIP (paper, section 3.1): pre-norm blocks and a `[CLS]` token.

Dimensions: B batch, S image side in pixels, G = S / patch_size, P = 1 + G * G image tokens,
D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """Resize a table of learned positions to another square grid (bicubic); `[CLS]` keeps its row.

    Args:
        positions: `[1, 1 + G * G, D]`.
        grid: patches along one side of the new image.

    Returns:
        `[1, 1 + grid * grid, D]`; the table itself when the size is unchanged.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    # bicubic kernels exist in fp32 on every device, so the resize doesn't run in bf16
    resized = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    resized = resized.to(positions.dtype).permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    return torch.cat([cls, resized], dim=1)


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole samples while training."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Zero the branch `[B, ...]` of some samples and scale up the others."""
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        return branch * (torch.empty(shape, device=branch.device).bernoulli_(keep) / keep).to(
            branch.dtype
        )


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, P, D]` to `[B, P, D]`."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = (
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        )
        x = x + self.drop_path(self.proj(attended))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Vision transformer: pixels `[B, 3, S, S]` to tokens `[B, 1 + G * G, D]`, `[CLS]` first."""

    def __init__(
        self,
        *,
        image_size_px: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        layer_norm_eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        grid = image_size_px // patch_size
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, width))
        # the rate grows linearly with depth, as in the released code
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_width, layer_norm_eps, r) for r in rates
        )
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.gradient_checkpointing = False
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels.

        Args:
            pixel_values: `[B, 3, S, S]`; S any multiple of the patch size: positions are
                interpolated.

        Returns:
            `[B, 1 + G * G, D]` after the last LayerNorm.
        """
        patches = self.patch_embed(pixel_values)
        grid = patches.shape[-1]
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat(
            [self.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1
        )
        x = x + interpolate_positions(self.pos_embed, grid).to(x.dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

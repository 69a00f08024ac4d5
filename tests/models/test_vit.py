from __future__ import annotations

import torch

from capfilt.models.vit import DropPath, ViT, interpolate_positions


def test_positions_of_the_same_grid_are_untouched() -> None:
    table = torch.randn(1, 17, 8)
    assert interpolate_positions(table, 4) is table


def test_interpolated_positions_keep_cls_and_a_smooth_ramp() -> None:
    ramp = torch.arange(8.0)
    grid = ramp[:, None, None] * torch.tensor([1.0, 0.0]) + ramp[None, :, None] * torch.tensor(
        [0.0, 1.0]
    )
    table = torch.cat([torch.full((1, 1, 2), 9.0), grid.reshape(1, 64, 2)], 1)
    resized = interpolate_positions(table, 16)
    assert resized.shape == (1, 257, 2)
    assert torch.equal(resized[:, 0], table[:, 0])
    inner = resized[0, 1:].view(16, 16, 2)[4:-4, 4:-4]
    expected = (torch.arange(4, 12) + 0.5) / 2 - 0.5
    torch.testing.assert_close(inner[..., 0], expected[:, None].expand(8, 8), atol=0.06, rtol=0)
    torch.testing.assert_close(inner[..., 1], expected[None, :].expand(8, 8), atol=0.06, rtol=0)


def test_any_square_size() -> None:
    vit = ViT(image_size_px=32, patch_size=8, width=16, depth=1, heads=2, mlp_width=32, layer_norm_eps=1e-6, drop_path=0.0)  # fmt: skip
    for side in (32, 48, 16):
        assert vit(torch.randn(2, 3, side, side)).shape == (2, 1 + (side // 8) ** 2, 16)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3))
    assert torch.equal(out[:, 0], out[:, 2])
    assert abs(float(out.mean()) - 1.0) < 0.05
    assert torch.equal(drop.eval()(torch.ones(4, 3)), torch.ones(4, 3))

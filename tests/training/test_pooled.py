import torch

from capfilt.training import pooled


def test_channel_scale_is_that_of_all_cells() -> None:
    scale = pooled._ChannelScale(6)
    parts = [torch.randn(3, 4, 6) * 5 + 2, torch.randn(1, 4, 6)]
    for part in parts:
        scale.add(part)
    mean, std = scale.mean_and_std()
    cells = torch.cat([part.flatten(0, 1) for part in parts])
    torch.testing.assert_close(mean, cells.mean(0))
    torch.testing.assert_close(std, cells.std(0, correction=0))

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

from capfilt.errors import InputError
from capfilt.models import text_tower


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.001])
def test_dropout(probability: float) -> None:
    x = torch.randn(300, 301, requires_grad=True)
    drop = text_tower.Dropout(probability).train()
    torch.manual_seed(0)
    out = drop(x)
    torch.manual_seed(0)
    assert torch.equal(drop(x), out)
    assert not torch.equal(drop(x), out)
    rate = float((out == 0).float().mean())
    assert rate == pytest.approx(probability, abs=0.005)
    kept = out != 0
    scale = out[kept] / x[kept]
    assert scale.max() - scale.min() < 1e-5
    assert float(scale.detach().mean()) * (1 - rate) == pytest.approx(1.0, abs=0.01)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad != 0, kept)
    assert drop.eval()(x) is x


def test_a_text_too_long() -> None:
    with pytest.raises(InputError, match="max_positions"):
        tiny().embed_text(torch.full((1, 25), 110), None)

"""The momentum encoder moves as the equation says, once per tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import MismatchError
from capfilt.models.momentum import momentum_copy, momentum_update


class Tied(torch.nn.Module):
    """A weight in two places, a running statistic, an integer buffer and an integer parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.count = torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False)


def test_copy_is_frozen_in_eval_and_apart() -> None:
    model = Tied().train()
    slow = momentum_copy(model)
    assert not slow.training and model.training
    assert not any(p.requires_grad for p in slow.parameters())
    assert slow.second.weight is slow.first.weight
    assert slow.first.weight.data_ptr() != model.first.weight.data_ptr()


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_update(momentum: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Tied()
    slow = momentum_copy(model)
    old = {n: p.clone() for n, p in slow.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) if p.is_floating_point() else 3)
    model.norm(torch.randn(5, 3))
    momentum_update(slow, model, momentum)
    for name, p in model.named_parameters():
        got = dict(slow.named_parameters())[name]
        if p.is_floating_point():
            want = momentum * old[name] + (1 - momentum) * p
            torch.testing.assert_close(got.data, want.data)
        else:
            assert torch.equal(got, p)
    for name, b in model.named_buffers():
        assert torch.equal(dict(slow.named_buffers())[name], b)
    assert slow.second.weight is slow.first.weight


def test_refuses_another_model() -> None:
    with pytest.raises(MismatchError, match="momentum_copy"):
        momentum_update(torch.nn.Linear(2, 2), Tied())

"""The momentum encoder: a slow copy of the model that gives ITC its targets and queue.

Source: BLIP, 2022 (arXiv 2201.12086), section 3.2 (ITC); ALBEF (arXiv 2107.07651), section 3.3.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from capfilt.errors import MismatchError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def momentum_copy(model: ModuleT) -> ModuleT:
    """Make the momentum encoder's first state: a frozen copy in evaluation mode.

    Tensors that the model shares between its parts are shared in the copy too. The copy is in
    evaluation mode, so its targets carry no dropout noise.

    Args:
        model: the online model, or the parts of it that ITC needs (unwrapped from DDP).

    Returns:
        The copy.
    """
    slow = copy.deepcopy(model)
    slow.requires_grad_(False)
    return slow.eval()


@torch.no_grad()
def momentum_update(momentum_model: nn.Module, model: nn.Module, momentum: float = 0.995) -> None:
    """Move in place: slow = momentum * slow + (1 - momentum) * model.

    A parameter that is shared between parts moves once. Buffers (running statistics, position ids)
    and parameters that are not floating point are copied.

    Args:
        momentum_model: what `momentum_copy` made.
        model: the online model (unwrapped from DDP).
        momentum: 0 copies, 1 stands still.

    Raises:
        MismatchError: the two models have not the same parameters and buffers.
    """
    slow, fast = _tensors(momentum_model), _tensors(model)
    if slow.keys() != fast.keys():
        raise MismatchError(
            "the momentum model has not the same tensors as the model: only one of them has "
            f"{sorted(slow.keys() ^ fast.keys())[:8]}; make it anew with momentum_copy"
        )
    buffers = {name for name, _ in model.named_buffers()}
    moved = [n for n, t in fast.items() if t.is_floating_point() and n not in buffers]
    if moved:
        torch._foreach_lerp_([slow[n] for n in moved], [fast[n] for n in moved], 1.0 - momentum)
    for name in fast.keys() - set(moved):
        slow[name].copy_(fast[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tensor once."""
    return {
        **{name: p.data for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }

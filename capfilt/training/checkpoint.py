"""Checkpoints that a stopped training goes on from; written beside and renamed, so never half there.

One file holds everything that the next step depends on. Random draws don't need to be in it: they
are keyed by (seed, step).
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capfilt.models.momentum import _tensors as tensors_of
from capfilt.training.optim import AveragedWeights

FILE = re.compile(r"^step-(\d+)\.pt$")


def save_checkpoint(
    folder: Path,
    step: int,
    fingerprint: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    averaged: AveragedWeights | None = None,
    others: dict[str, nn.Module] | None = None,
    best: dict[str, Any] | None = None,
) -> Path:
    """Writes `step-<n>.pt` and deletes the older ones.

    Args:
        folder: the training's checkpoint folder.
        step: steps done.
        fingerprint: of the training; a checkpoint of another one is not gone on from.
        model: the model; only what is trained is stored.
        optimizer: its state.
        averaged: the averaged weights, if any.
        others: modules with a state of their own (momentum encoder, queue).
        best: what validation found so far, plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "fingerprint": fingerprint,
        "model": {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
        "optimizer": optimizer.state_dict(),
        "averaged": averaged.state_dict() if averaged else None,
        "others": {name: dict(tensors_of(other)) for name, other in (others or {}).items()},
        "best": json.dumps(best) if best else None,
    }
    path = folder / f"step-{step}.pt"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for other in folder.iterdir():
        found = FILE.match(other.name)
        if (found and int(found[1]) < step) or other.suffix == ".tmp":
            other.unlink()
    return path


def load_checkpoint(
    folder: Path,
    fingerprint: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    averaged: AveragedWeights | None = None,
    others: dict[str, nn.Module] | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """Restores the newest checkpoint of this training in place.

    Returns:
        The steps done (0 when there is none) and what validation had found.
    """
    for path in sorted(
        (path for path in folder.glob("step-*.pt") if FILE.match(path.name)),
        key=lambda path: -int(FILE.match(path.name)[1]),  # type: ignore[index]
    ):
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["fingerprint"] != fingerprint:
            continue
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in state["model"].items():
                named[name].copy_(weight)
            for name, other in (others or {}).items():
                for key, tensor in tensors_of(other).items():
                    tensor.copy_(state["others"][name][key])
                if hasattr(other, "_read_count"):
                    other._read_count()
        optimizer.load_state_dict(state["optimizer"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        return int(state["step"]), json.loads(state["best"]) if state["best"] else None
    return 0, None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, if any."""
    found = [path for path in folder.glob("step-*.pt") if FILE.match(path.name)]
    return max(found, key=lambda path: int(FILE.match(path.name)[1]), default=None)  # type: ignore[index]


def remove_checkpoints(folder: Path) -> None:
    """Deletes the folder: the finished model stands beside it."""
    shutil.rmtree(folder, ignore_errors=True)

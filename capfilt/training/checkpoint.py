"""Checkpoints that a stopped training goes on from; written beside and renamed, never half there.

One file holds everything that the next step depends on and that training moves; what a warm-up of
the heads found beforehand is in a file of its own. Random draws don't need to be kept: they are
keyed by (seed, step). The names carry the start of the training's fingerprint, so that two
trainings in one folder leave each other's files alone. The last two checkpoints are kept: should
the last one be damaged, the one before takes its place.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import MismatchError
from capfilt.training.optim import AveragedWeights

log = logging.getLogger(__name__)

KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    fingerprint: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    averaged: AveragedWeights | None = None,
    others: dict[str, nn.Module] | None = None,
    validation: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and deletes this training's older ones but the one before.

    Args:
        folder: the training's checkpoint folder.
        step: steps done.
        fingerprint: of the training; a checkpoint of another one is not gone on from.
        model: the model; only what is trained is stored.
        optimizer: its state.
        averaged: the averaged weights, if any.
        others: modules with a state of their own (momentum encoder, queue).
        validation: what validation found so far, plain values.
    """
    path = _path(folder, "step", step, fingerprint)
    _write(
        path,
        {
            "step": step,
            "fingerprint": fingerprint,
            "model": trained_weights(model),
            "optimizer": optimizer.state_dict(),
            "averaged": averaged.state_dict() if averaged else None,
            "others": {name: other.state_dict() for name, other in (others or {}).items()},
            "validation": json.dumps(validation),
        },
    )
    steps = _steps(folder, "step", fingerprint)
    for old in steps[KEPT:]:
        _path(folder, "step", old, fingerprint).unlink()
    # the oldest checkpoint that is left goes back to the best weights of its time, or later ones
    of_its_time = [best for best in _steps(folder, "best", fingerprint) if best <= steps[:KEPT][-1]]
    for old in of_its_time[1:]:
        _path(folder, "best", old, fingerprint).unlink()
    for torn in folder.glob(f"*-{fingerprint[:12]}.tmp"):
        torn.unlink()
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
    """Restores the newest readable checkpoint of this training in place.

    Returns:
        The steps done (0 when there is none) and what validation had found.

    Raises:
        MismatchError: the checkpoint is this training's, and was written by other code.
    """
    for step in _steps(folder, "step", fingerprint):
        path = _path(folder, "step", step, fingerprint)
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            # of damaged bytes torch raises nearly anything: RuntimeError, EOFError, KeyError, ...
            log.warning("%s can't be read (%s); going on from the one before", path, error)
            continue
        if state["fingerprint"] != fingerprint:
            continue
        try:
            load_trained_weights(model, state["model"])
            for name, other in (others or {}).items():
                other.load_state_dict(state["others"][name])
            optimizer.load_state_dict(state["optimizer"])
            if averaged is not None:
                averaged.load_state_dict(state["averaged"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise MismatchError(
                f"{path} does not fit this model ({error}): another version of capfilt wrote it; "
                f"delete {folder} to train from the start"
            ) from None
        return int(state["step"]), json.loads(state["validation"])
    return 0, None


def save_best(folder: Path, step: int, fingerprint: str, model: nn.Module) -> None:
    """Keeps the weights that validation liked best, found again by their step."""
    _write(_path(folder, "best", step, fingerprint), trained_weights(model))


def load_best(folder: Path, step: int, fingerprint: str, model: nn.Module) -> None:
    """Puts the weights that `save_best` kept back into the model."""
    path = _path(folder, "best", step, fingerprint)
    load_trained_weights(model, torch.load(path, weights_only=True, map_location="cpu"))


def save_warmup(
    folder: Path, fingerprint: str, tensors: dict[str, Tensor], weights: dict[str, float]
) -> None:
    """Keeps what a warm-up found: tensors of the model by name, and the web pairs' weights."""
    found = {"tensors": tensors, "weights": json.dumps(weights)}
    _write(_path(folder, "warmup", 0, fingerprint), found)


def load_warmup(
    folder: Path, fingerprint: str, tensors: dict[str, Tensor]
) -> dict[str, float] | None:
    """Puts what `save_warmup` kept back into the model's tensors, in place.

    Returns:
        The web pairs' weights; None when there is nothing, or it can't be read.

    Raises:
        MismatchError: it is this training's, and was written by other code.
    """
    path = _path(folder, "warmup", 0, fingerprint)
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # as for checkpoints
        log.warning("%s can't be read (%s); the heads are warmed up anew", path, error)
        return None
    different = tensors.keys() ^ found["tensors"].keys() or {
        name for name, tensor in tensors.items() if tensor.shape != found["tensors"][name].shape
    }
    if different:
        raise MismatchError(
            f"{path} does not fit this model ({', '.join(sorted(different)[:8])}): another version "
            f"of capfilt wrote it; delete {folder} to train from the start"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found["tensors"][name])
    weights: dict[str, float] = json.loads(found["weights"])
    return weights


def last_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The newest checkpoint of a training, if any."""
    steps = _steps(folder, "step", fingerprint)
    return _path(folder, "step", steps[0], fingerprint) if steps else None


def remove_checkpoints(folder: Path) -> None:
    """Deletes the folder: the finished model stands beside it."""
    shutil.rmtree(folder, ignore_errors=True)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training moves, each once."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trained_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fills a model in place from `trained_weights`' output.

    Raises:
        ValueError: the two have not the same names.
    """
    wanted = trained_weights(model)
    if different := sorted(wanted.keys() ^ weights.keys()):
        raise ValueError(f"only one of file and model has {', '.join(different[:8])}")
    for name, weight in weights.items():
        wanted[name].copy_(weight)


def _path(folder: Path, kind: str, step: int, fingerprint: str) -> Path:
    return folder / f"{kind}-{step}-{fingerprint[:12]}.pt"


def _steps(folder: Path, kind: str, fingerprint: str) -> list[int]:
    """The steps of a training's files, newest first."""
    name = re.compile(rf"^{kind}-(\d+)-{re.escape(fingerprint[:12])}\.pt$")
    if not folder.is_dir():
        return []
    return sorted((int(m[1]) for p in folder.iterdir() if (m := name.match(p.name))), reverse=True)


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

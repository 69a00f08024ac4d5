"""The training loop: schedule, step, log, checkpoint. What is learned is the caller's `loss_of`.

Order of start-up: the run's own checkpoint if the training was stopped, else the model as given.
Random draws are keyed by (seed, step), so a stopped and resumed training gives the same losses.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.config import Optim
from capfilt.errors import DivergenceError
from capfilt.models.med import MED
from capfilt.training import checkpoint
from capfilt.training.data import Batch, Stream
from capfilt.training.optim import AveragedWeights, build_optimizer, set_learning_rate

log = logging.getLogger(__name__)

LossOf = Callable[[Batch, int, torch.Generator], dict[str, Tensor]]
"""From a batch, the step and a seeded generator to the losses; `loss` is what is minimised."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Called with the steps done, the steps in all, and the last logged values."""
Validate = Callable[[], dict[str, float]]
"""Measures the model; `score` is what is maximised."""


def train(
    model: MED,
    stream: Stream,
    loss_of: LossOf,
    config: Optim,
    *,
    folder: Path,
    fingerprint: str,
    seed: int,
    device: str,
    others: dict[str, torch.nn.Module] | None = None,
    validate: Validate | None = None,
    validate_every: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a model in place; its best (or averaged, or last) weights are in it afterwards.

    Args:
        model: the MED, on `device`.
        stream: gives the batches.
        loss_of: the objective.
        config: how long and how fast.
        folder: of the model; the log and the checkpoints go there.
        fingerprint: of the training; a checkpoint of another one is left alone.
        seed: of every draw.
        device: where it runs.
        others: modules with a state that must survive a stop (momentum encoders, queue).
        validate: measures the model, at the end of each epoch and of the training.
        validate_every: steps between validations; an epoch by default.
        progress: told after each step.

    Returns:
        `steps`, `seconds`, and what validation found.

    Raises:
        DivergenceError: the loss is NaN or infinite; names the step, the keys of the batch and the
            last good checkpoint.
    """
    per_epoch = max(1, len(stream.inventory) // stream.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    optimizer = build_optimizer(model, config)
    averaged = AveragedWeights(model, config.average_weights) if config.average_weights else None
    checkpoints = folder / "checkpoints"
    start, best = checkpoint.load_checkpoint(
        checkpoints, fingerprint, model, optimizer, averaged=averaged, others=others
    )
    if start:
        log.info("going on from step %d of %d in %s", start, steps, checkpoints)
    log_file = folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    _cut_log(log_file, start)
    began = time.perf_counter()
    batches = stream.batches(start)
    model.train()
    for step in range(start, steps):
        batch = next(batches)
        torch.manual_seed(hash((seed, step)) & 0x7FFFFFFF)
        generator = torch.Generator().manual_seed(hash((seed, step, 1)) & 0x7FFFFFFF)
        set_learning_rate(optimizer, config, step, steps)
        values: dict[str, float] = {}
        for part in slices(batch, config.gradient_accumulation):
            with torch.autocast(
                torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"
            ):
                losses = loss_of(part, step, generator)
            share = len(part.keys) / len(batch.keys)
            (losses["loss"] * share).backward()
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + float(value.detach()) * share
        if not math.isfinite(values["loss"]):
            last = checkpoint.last_checkpoint(checkpoints)
            raise DivergenceError(
                f"the loss is {values['loss']} at step {step} of {steps} ({values}); the batch's keys "
                f"are {', '.join(batch.keys[:8])}, …; the last good checkpoint is {last or 'none yet'}. "
                f"Lower lr (is {config.lr}), raise warmup_steps or set clip_grad_norm, and start again"
            )
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.temp.clamp_(0.001, 0.5)
        if averaged is not None:
            averaged.update(model)
        done = step + 1
        if done % config.log_every == 0 or done == steps:
            record = {
                "step": done,
                **{name: round(value, 5) for name, value in values.items()},
                "lr": optimizer.param_groups[0]["lr"],
                "temp": round(float(model.temp), 5),
                "seconds": round(time.perf_counter() - began, 2),
            }
            with open(log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if progress is not None:
            progress(done, steps, values)
        if validate is not None and (done == steps or done % (validate_every or per_epoch) == 0):
            best = _validated(model, averaged, validate, best, done, folder, log_file)
        if done % config.checkpoint_every == 0 and done < steps:
            checkpoint.save_checkpoint(
                checkpoints,
                done,
                fingerprint,
                model,
                optimizer,
                averaged=averaged,
                others=others,
                best=best,
            )
    if averaged is not None:
        averaged.swap(model)
    if best is not None and (folder / "best.pt").exists():
        weights = torch.load(folder / "best.pt", weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
    model.eval()
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 2),
        **({"best": best} if best else {}),
    }


def slices(batch: Batch, count: int) -> list[Batch]:
    """A batch in about equal parts, for gradient accumulation (each finds its negatives in itself)."""
    if count == 1:
        return [batch]
    size = math.ceil(len(batch.keys) / count)
    parts = []
    for start in range(0, len(batch.keys), size):
        cut = slice(start, start + size)
        parts.append(
            Batch(
                batch.keys[cut],
                batch.image_ids[cut],
                batch.captions[cut],
                batch.human[cut],
                None if batch.features is None else batch.features[cut],
                None if batch.pixels is None else batch.pixels[cut],
            )
        )
    return parts


def _validated(
    model: MED,
    averaged: AveragedWeights | None,
    validate: Validate,
    best: dict[str, Any] | None,
    step: int,
    folder: Path,
    log_file: Path,
) -> dict[str, Any]:
    if averaged is not None:
        averaged.swap(model)
    model.eval()
    with torch.inference_mode():
        found = validate()
    record = {"step": step, **{name: round(value, 5) for name, value in found.items()}}
    with open(log_file, "a", encoding="utf-8") as file:
        file.write(json.dumps({"validation": True, **record}) + "\n")
    if best is None or found["score"] > best["score"]:
        best = record
        weights = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        temporary = folder / "best.tmp"
        torch.save(weights, temporary)
        temporary.replace(folder / "best.pt")
    if averaged is not None:
        averaged.swap(model)
    model.train()
    return best


def _cut_log(log_file: Path, start: int) -> None:
    """Drops what was logged after the checkpoint that the training goes on from."""
    if not log_file.exists():
        return
    lines = log_file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    log_file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

"""The training loop: schedule, step, log, checkpoint. What is learned is the caller's `loss_of`.

Order of start-up: the run's own checkpoint if the training was stopped, else the model as given.
Random draws are keyed by (seed, step), so a stopped and resumed training gives the same losses.

With several processes (see `ranks`) each computes its rows of the batch, the gradients are
averaged, and all make the same step; only the first one writes and validates.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.config import Optim
from capfilt.errors import DivergenceError, InputError, MissingExtraError
from capfilt.models.med import MED
from capfilt.training import checkpoint, ranks
from capfilt.training.data import Batch, Stream
from capfilt.training.optim import (
    AveragedWeights,
    build_optimizer,
    freeze_layers,
    gradient_norm,
    set_learning_rate,
)

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a model in place; its best (or averaged, or last) weights are in it afterwards.

    Args:
        model: the MED, on `device`.
        stream: gives the batches.
        loss_of: the objective; its generator is in the same state on all ranks.
        config: how long and how fast.
        folder: of the model; the log and the checkpoints go there.
        fingerprint: of the training; a checkpoint of another one is left alone.
        seed: of every draw.
        device: where it runs.
        others: modules with a state that must survive a stop (momentum encoders, queue).
        validate: measures the model, at the end of each epoch and of the training.
        progress: told after each step.

    Returns:
        `steps`, `seconds`, and what validation found.

    Raises:
        DivergenceError: the loss or its gradient is NaN or infinite; names the step, the keys of
            the batch and the last good checkpoint.
        ConfigError: the batch does not divide by the number of processes.
        InputError: the processes don't see the same checkpoints, or a picture can't be read.
        MismatchError: this training's checkpoint was written by other code.
        MissingExtraError: `tensorboard` is set, and not installed.
    """
    ranks.start()
    first = ranks.is_first()
    per_epoch = max(1, len(stream.inventory) // stream.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    freeze_layers(model, config.freeze_layers)
    if config.freeze_words:
        for tower in (model.encoder, model.decoder):
            tower.embeddings.word.weight.requires_grad_(False)
    if config.freeze_ffn:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.feed_forward.requires_grad_(False)
    optimizer = build_optimizer(model, config)
    ranks.send_from_first([model, *(others or {}).values()])
    averaged = AveragedWeights(model, config.average_weights) if config.average_weights else None
    checkpoints = folder / "checkpoints"
    start, validation = checkpoint.load_checkpoint(
        checkpoints, fingerprint, model, optimizer, averaged=averaged, others=others
    )
    if len(starts := set(ranks.gather(start))) > 1:
        raise InputError(
            f"{checkpoints}: the processes found checkpoints of different steps "
            f"({sorted(starts)}); run_dir must be on a disk that all of them see"
        )
    if validation is None:
        validation = {"best": None, "waited": 0}
    log_file = folder / "log.jsonl"
    board = None
    if first:
        if start:
            log.info("going on from step %d of %d in %s", start, steps, checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        _cut_log(log_file, start)
        board = _open_board(folder / "tensorboard", start) if config.tensorboard else None
    began = time.perf_counter()
    done = start
    model.train()
    batches = stream.batches(start, rank=ranks.rank(), world_size=ranks.world_size())
    with closing(batches):  # type: ignore[type-var]
        for step in range(start, steps):
            batch = next(batches)
            torch.manual_seed(_draws(seed, step, 1 + ranks.rank()))  # dropout
            generator = torch.Generator().manual_seed(_draws(seed, step, 0))
            set_learning_rate(optimizer, config, step, steps)
            sums: dict[str, Tensor] = {}
            for part in slices(batch, config.gradient_accumulation):
                with torch.autocast(
                    torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"
                ):
                    losses = loss_of(part, step, generator)
                share = len(part.keys) / len(batch.keys)
                (losses["loss"] * share).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().float() * share
            # one tensor: each read of a value off a GPU waits for it
            own = torch.stack(list(sums.values())).cpu()
            values = dict(zip(sums, ranks.average(own).tolist(), strict=True))
            finite = math.isfinite(values["loss"])
            if finite:
                ranks.average_gradients(model.parameters())
                finite = math.isfinite(gradient_norm(model, config.clip_grad_norm))
            if not finite:  # a step now would leave nothing but NaN in the weights
                own_values = dict(zip(sums, own.tolist(), strict=True))
                last = checkpoint.last_checkpoint(checkpoints, fingerprint)
                raise _diverged(batch, own_values, config, f"step {step} of {steps}", last)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.temp.clamp_(0.001, 0.5)
            if averaged is not None:
                averaged.update(model)
            done = step + 1
            if first and (done % config.log_every == 0 or done == steps):
                record = {
                    "step": done,
                    **{name: round(value, 5) for name, value in values.items()},
                    "lr": optimizer.param_groups[0]["lr"],
                    "temp": round(float(model.temp.detach()), 5),
                    "seconds": round(time.perf_counter() - began, 2),
                }
                _log(record, log_file, board, "train")
            if first and progress is not None:
                progress(done, steps, values)
            if validate is not None and (done == steps or done % per_epoch == 0):
                if first:
                    found = _validated(model, averaged, validate)
                    record = {"step": done, **{name: round(v, 5) for name, v in found.items()}}
                    _log({"validation": True, **record}, log_file, board, "validation")
                    best = validation["best"]
                    if best is None or found["score"] > best["score"]:
                        _save_best(model, averaged, checkpoints, done, fingerprint)
                        validation = {"best": {**record, "score": found["score"]}, "waited": 0}
                    else:
                        validation = {"best": best, "waited": validation["waited"] + 1}
                validation = ranks.from_first(validation)
                if config.patience is not None and validation["waited"] >= config.patience:
                    log.info(
                        "stopped at step %d of %d: no better since %s", done, steps, validation
                    )
                    break
            if first and done % config.checkpoint_every == 0 and done < steps:
                checkpoint.save_checkpoint(
                    checkpoints,
                    done,
                    fingerprint,
                    model,
                    optimizer,
                    averaged=averaged,
                    others=others,
                    validation=validation,
                )
    if averaged is not None:
        averaged.swap(model)
    best = validation["best"]
    if best is not None:
        checkpoint.load_best(checkpoints, best["step"], fingerprint, model)
    model.eval()
    if board is not None:
        board.close()
    return {
        "steps": done,
        "seconds": round(time.perf_counter() - began, 2),
        **({"best": best} if best else {}),
    }


def slices(batch: Batch, count: int) -> list[Batch]:
    """A batch in about equal parts, for gradient accumulation.

    Each part finds its negatives in itself, so ITC and ITM see fewer of them. LM is the same as
    that of the whole batch, whose captions each part carries for the count of tokens.
    """
    if count == 1:
        return [batch]
    size = math.ceil(len(batch.keys) / count)
    parts = []
    for start in range(0, len(batch.keys), size):
        cut = slice(start, start + size)
        parts.append(
            replace(
                batch,
                keys=batch.keys[cut],
                image_ids=batch.image_ids[cut],
                captions=batch.captions[cut],
                human=batch.human[cut],
                features=None if batch.features is None else batch.features[cut],
                pixels=None if batch.pixels is None else batch.pixels[cut],
                whole=batch.captions,
            )
        )
    return parts


def _draws(seed: int, step: int, purpose: int) -> int:
    """A seed for the draws of one step: 0 those that all ranks share, 1 and on each rank's own."""
    return int(np.random.SeedSequence([seed, step, purpose]).generate_state(1)[0])


def _diverged(
    batch: Batch, own: dict[str, float], config: Optim, where: str, last: Path | None
) -> DivergenceError:
    """The error that names the step, the losses and the keys of the ranks where it happened.

    Where every loss is finite, a gradient wasn't, and all ranks have the same one.
    """
    everyone = ranks.gather((own, batch.keys))
    bad = [report for report in everyone if not math.isfinite(report[0]["loss"])]
    what, found = ("loss", bad) if bad else ("gradient", everyone)
    losses = "; ".join(
        ", ".join(f"{name} {value:g}" for name, value in own.items()) for own, _ in found
    )
    keys = [key for _, keys in found for key in keys]
    return DivergenceError(
        f"the {what} is NaN or infinite at {where} ({losses}). The batch's keys are "
        f"{', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}. The last good checkpoint is "
        f"{last or 'none yet'}. Lower lr (is {config.lr}), raise warmup_steps (is "
        f"{config.warmup_steps}) or set clip_grad_norm (is {config.clip_grad_norm})"
    )


def _validated(
    model: MED, averaged: AveragedWeights | None, validate: Validate
) -> dict[str, float]:
    if averaged is not None:
        averaged.swap(model)
    model.eval()
    with torch.inference_mode():
        found = validate()
    model.train()
    if averaged is not None:
        averaged.swap(model)
    return found


def _save_best(
    model: MED, averaged: AveragedWeights | None, folder: Path, step: int, fingerprint: str
) -> None:
    """Keeps the weights that were validated: the averaged ones, if any."""
    if averaged is not None:
        averaged.swap(model)
    checkpoint.save_best(folder, step, fingerprint, model)
    if averaged is not None:
        averaged.swap(model)


def _open_board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "tensorboard: true needs the package tensorboard; run: "
            "pip install 'capfilt[tensorboard]'"
        ) from None
    # what was written after the checkpoint that the training goes on from is hidden
    return SummaryWriter(str(folder), purge_step=start + 1)


def _log(record: dict[str, Any], log_file: Path, board: Any, part: str) -> None:
    with open(log_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if board is not None:
        for name, value in record.items():
            if name not in ("step", "validation"):
                board.add_scalar(f"{part}/{name}", value, record["step"])


def _cut_log(log_file: Path, start: int) -> None:
    """Drops what was logged after the checkpoint that the training goes on from."""
    if not log_file.exists():
        return
    lines = log_file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    temporary = log_file.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(log_file)

"""Pretrains the tiny MED on a small run: in a test's process, or as one that may be killed.

python train_tiny.py RUN FOLDER FINGERPRINT SETTINGS-AS-JSON
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_run import TINY, WITH_DROPOUT, tiny_med

from capfilt.config import Model, Pretrain
from capfilt.models.folder import preset_tokenizer
from capfilt.models.med import MED
from capfilt.shards import RunDir
from capfilt.training import objectives
from capfilt.training.data import Stream, take_inventory
from capfilt.training.loop import train
from capfilt.training.pretrain import pretrain_losses

FULL: dict[str, Any] = {
    "epochs": 4, "batch_size": 8, "lr": 1e-3, "warmup_steps": 3, "log_every": 1, "checkpoint_every": 5,
    "freeze_image": False, "average_weights": 0.9, "clip_grad_norm": 1.0,
    "itc": {"momentum": 0.9, "queue_size": 24, "alpha": 0.4}, "itm": {"easy_epochs": 1},
}  # fmt: skip
"""Everything that has a state."""


def train_tiny(
    run: Path,
    folder: Path,
    fingerprint: str,
    values: dict[str, Any],
    dropout: bool = False,
    **further: Any,
) -> tuple[MED, dict[str, Any]]:
    settings = Pretrain.model_validate(values)
    inventory = take_inventory(RunDir(str(run)), ("human", "web"))
    model = tiny_med(WITH_DROPOUT if dropout else TINY)
    tokenizer = preset_tokenizer(Model())
    stream = Stream(
        RunDir(str(run)),
        inventory,
        TINY,
        batch_size=settings.batch_size,
        seed=3,
        use_features=False,
    )
    contrast = objectives.Contrast(model, settings.itc, "cpu", 6)
    loss_of = partial(
        pretrain_losses,
        model=model,
        tokenizer=tokenizer,
        contrast=contrast,
        vocabulary=objectives.vocabulary_in_use(tokenizer, inventory.captions(), ""),
        settings=settings,
        weights={},
        lm_only_steps=0,
        easy_steps=4,
        device="cpu",
    )
    if "score" in further:
        score = further.pop("score")
        further["validate"] = partial(score, model)
    found = train(
        model,
        stream,
        further.pop("wrap", lambda losses: losses)(loss_of),
        settings,
        folder=folder,
        fingerprint=fingerprint,
        seed=7,
        device="cpu",
        others=contrast.state(),
        **further,
    )
    return model, found


def temperature_score(model: MED) -> dict[str, float]:
    """Any number that the weights decide."""
    return {"score": float(model.vision_proj.weight.detach().abs().sum() % 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    run, folder, fingerprint, values = sys.argv[1:]
    options = json.loads(values)
    model, _ = train_tiny(
        Path(run),
        Path(folder),
        fingerprint,
        options["settings"],
        dropout=options["dropout"],
        score=temperature_score,
    )
    from capfilt.training import ranks

    torch.save(dict(model.named_parameters()), Path(folder) / f"end-{ranks.rank()}.pt")

"""Pretraining: ITC + ITM + LM, summed, on web and human pairs (paper, section 3.2)."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.config import Config, Pretrain
from capfilt.models import folder as model_folder
from capfilt.models.med import MED
from capfilt.shards import RunDir
from capfilt.training import objectives
from capfilt.training.data import Batch, Stream, take_inventory
from capfilt.training.loop import Progress, train


def pretrain(
    run: RunDir, config: Config, folder: Path, fingerprint: str, device: str, progress: Progress | None
) -> dict[str, Any]:
    """Pretrains a MED on the pairs of `images/` and saves it.

    Args:
        run: the run folder.
        config: of the run; `pretrain` must be there.
        folder: where the model goes.
        fingerprint: of this training.
        device: where it runs.
        progress: told after each step.

    Returns:
        What the manifest records.

    Raises:
        InputError: too few pairs.
        DivergenceError: the loss became NaN or infinite.
    """
    settings = config.pretrain
    assert settings is not None
    inventory = take_inventory(run, ("web", "human"))
    model = model_folder.fresh_model(config.model, settings.freeze_image).to(device)
    tokenizer = model_folder.preset_tokenizer(config.model)
    stream = Stream(
        run,
        inventory,
        model.config,
        batch_size=settings.batch_size,
        seed=config.seed,
        use_features=model_folder.uses_features(config.model, settings.freeze_image),
    )
    vocabulary = objectives.vocabulary_in_use(tokenizer, inventory.all_captions(), config.captioner.prompt)
    per_epoch = max(1, len(inventory) // settings.batch_size)
    contrast = objectives.Contrast(
        model, settings.itc, device, round(settings.itc.alpha_warmup_epochs * per_epoch)
    )
    loss_of = partial(
        pretrain_losses,
        model=model,
        tokenizer=tokenizer,
        contrast=contrast,
        vocabulary=vocabulary.to(device),
        settings=settings,
        easy_steps=round(settings.itm.easy_epochs * per_epoch),
        device=device,
    )
    result = train(
        model,
        stream,
        loss_of,
        settings,
        folder=folder,
        fingerprint=fingerprint,
        seed=config.seed,
        device=device,
        others=contrast.state(),
        progress=progress,
    )
    model_folder.save(model, tokenizer, folder, vocabulary=vocabulary)
    return {**result, "pictures": len(inventory), "left_out": dict(inventory.skipped)}


def pretrain_losses(
    batch: Batch,
    step: int,
    generator: torch.Generator,
    *,
    model: MED,
    tokenizer: Any,
    contrast: objectives.Contrast,
    vocabulary: Tensor,
    settings: Pretrain,
    easy_steps: int,
    device: str,
) -> dict[str, Tensor]:
    """ITC + ITM + LM of one batch; one pass of the image, four of the text."""
    features = objectives.image_features(model, batch, device)
    image_ids = batch.image_ids.to(device)
    features, cells = objectives.drop_cells(features, settings.image_dropout, generator)
    ids, mask = objectives.tokenize(tokenizer, batch.captions, settings.max_tokens, first_token="cls")
    ids, mask = ids.to(device), mask.to(device)
    embedded = objectives.Embedded(model.embed_image(features), model.embed_text(ids, mask))
    itc = contrast.loss(model, embedded, features, ids, mask, image_ids, step)
    adapted = model.adapt(features, cells)
    cross = model.cross_keys_values(adapted, "encoder")
    itm, right = objectives.itm_objective(
        model,
        tokenizer,
        batch.captions,
        embedded,
        cross,
        image_ids,
        hardness=min(1.0, step / easy_steps) if easy_steps else 1.0,
        max_tokens=settings.max_tokens,
        generator=generator,
        further=[],
    )
    if model.config.sharing in ("none", "all_but_cross_attention"):
        cross = model.cross_keys_values(adapted, "decoder")
    lm = objectives.lm_objective(
        model,
        tokenizer,
        batch.captions,
        cross,
        prompt="",
        max_tokens=settings.max_tokens,
        label_smoothing=settings.label_smoothing,
        vocabulary=vocabulary,
    )
    loss = itc + settings.itm_weight * itm + settings.lm_weight * lm
    return {"loss": loss, "itc": itc, "itm": itm, "lm": lm, "itm_accuracy": right}

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
from capfilt.training import objectives, ranks
from capfilt.training.data import Batch, Stream, take_inventory
from capfilt.training.loop import Progress, train
from capfilt.training.warmup import warm_up_heads


def pretrain(
    run: RunDir,
    config: Config,
    folder: Path,
    fingerprint: str,
    device: str,
    progress: Progress | None,
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
    make_stream = partial(
        Stream,
        run,
        inventory,
        model.config,
        batch_size=settings.batch_size,
        seed=config.seed,
        use_features=config.model.caches_features,
        crop_scale=(0.2, 1.0),
    )
    vocabulary = None
    if config.model.preset == "small":
        vocabulary = objectives.vocabulary_in_use(
            tokenizer, inventory.captions(), config.captioner.prompt
        ).to(device)
    per_epoch = max(1, len(inventory) // settings.batch_size)
    steps = max(1, round(settings.epochs * per_epoch))
    weights: dict[str, float] = {}
    if settings.head_warmup is not None:
        weights = warm_up_heads(
            model,
            tokenizer,
            make_stream(train=False),
            settings.head_warmup,
            max_tokens=settings.max_tokens,
            seed=config.seed,
            device=device,
            folder=folder,
            fingerprint=fingerprint,
            progress=lambda done, total: progress(done, total, {}) if progress else None,
        )
    contrast = objectives.Contrast(
        model, settings.itc, device, round(settings.itc.alpha_warmup_epochs * per_epoch)
    )
    loss_of = partial(
        pretrain_losses,
        model=model,
        tokenizer=tokenizer,
        contrast=contrast,
        vocabulary=vocabulary,
        weights=weights,
        settings=settings,
        lm_only_steps=round(settings.lm_only_share * steps),
        easy_steps=round(settings.itm.easy_epochs * per_epoch),
        device=device,
    )
    result = train(
        model,
        make_stream(),
        loss_of,
        settings,
        folder=folder,
        fingerprint=fingerprint,
        seed=config.seed,
        device=device,
        others=contrast.state(),
        progress=progress,
    )
    if ranks.is_first():
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
    vocabulary: Tensor | None,
    weights: dict[str, float],
    settings: Pretrain,
    lm_only_steps: int,
    easy_steps: int,
    device: str,
) -> dict[str, Tensor]:
    """ITC + ITM + LM of one batch; one pass of the image, five of the text."""
    weight = objectives.pair_weights(batch, weights, device)
    features = objectives.image_features(model, batch, device)
    image_ids = batch.image_ids.to(device)
    features = objectives.augment_features(features, settings.image_dropout, generator)
    found: dict[str, Tensor] = {}
    loss = torch.zeros((), device=device)
    if step < lm_only_steps:
        adapted = model.adapt(features)
        cross = model.cross_keys_values(adapted, "encoder")
    else:
        ids, mask = objectives.tokenize(
            tokenizer, batch.captions, settings.max_tokens, first_token="cls"
        )
        ids, mask = ids.to(device), mask.to(device)
        embedded = objectives.embed(model, features, ids, mask)
        itc = contrast.loss(
            model, embedded, features, batch.pixels, ids, mask, image_ids, step, weight
        )
        adapted = model.adapt(features, embedded.known_images)
        cross = model.cross_keys_values(adapted, "encoder")
        since = step - lm_only_steps
        itm, right = objectives.itm_objective(
            model,
            tokenizer,
            batch.captions,
            embedded,
            adapted,
            cross,
            image_ids,
            hardness=min(1.0, since / easy_steps) if easy_steps else 1.0,
            max_tokens=settings.max_tokens,
            generator=generator,
            further=[],
            weight=weight,
        )
        found = {"itc": itc, "itm": itm, "itm_accuracy": right}
        loss = itc + settings.itm_weight * itm
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
        weight=weight,
        whole=batch.whole if weight is None else None,
    )
    return {"loss": loss + settings.lm_weight * lm, "lm": lm, **found}

"""Finetuning of the matcher, the paper's filter, with ITC + ITM on human pairs (section 3.3)."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.config import Config, Matcher
from capfilt.evaluation.retrieval import recall_at_embeds
from capfilt.models import folder as model_folder
from capfilt.models.med import MED
from capfilt.shards import RunDir
from capfilt.training import objectives, ranks
from capfilt.training.data import Batch, Stream, take_inventory
from capfilt.training.labelled import Labelled, fit_start, labelled_itm
from capfilt.training.loop import Progress, train
from capfilt.training.swaps import WordSwaps
from capfilt.training.warmup import warm_up_heads


def finetune_matcher(
    run: RunDir,
    config: Config,
    folder: Path,
    fingerprint: str,
    device: str,
    progress: Progress | None,
    *,
    labelled: Labelled | None = None,
) -> dict[str, Any]:
    """Finetunes the matcher on the human pairs and saves it.

    Args:
        run: this argument and the next five as in `pretrain`.
        config: of the run.
        folder: where the model goes.
        fingerprint: of this training.
        device: where it runs.
        progress: told after each step.
        labelled: reviewed pairs that it learns from too.

    Returns:
        What the manifest records.

    Raises:
        InputError: too few human pairs.
        DivergenceError: the loss became NaN or infinite.
    """
    settings = config.matcher
    sources = ("web", "human") if settings.web_pairs else ("human",)
    inventory, held_out = take_inventory(run, sources).split(settings.val_fraction, config.seed)
    model, tokenizer, vocabulary = model_folder.start(run, config, settings)
    model = model.to(device)
    make_stream = partial(Stream, run, seed=config.seed, use_features=config.model.caches_features)
    weights: dict[str, float] = {}
    if settings.head_warmup is not None:
        everything = inventory if settings.web_pairs else take_inventory(run, ("web", "human"))
        weights = warm_up_heads(
            model,
            tokenizer,
            make_stream(everything, model.config, batch_size=settings.batch_size, train=False),
            settings.head_warmup,
            max_tokens=settings.max_tokens,
            seed=config.seed + 1,
            device=device,
            folder=folder,
            fingerprint=fingerprint,
            progress=lambda done, total: progress(done, total, {}) if progress else None,
            reviewed={} if labelled is None else labelled.web_pictures,
        )
    if labelled is not None and model.config.itm_from_itc:
        fit_start(model, tokenizer, labelled, settings.max_tokens, device)
    per_epoch = max(1, len(inventory) // settings.batch_size)
    contrast = objectives.Contrast(
        model, settings.itc, device, round(settings.itc.alpha_warmup_epochs * per_epoch)
    )
    swaps = WordSwaps({}, {})
    if settings.itm.word_swap:
        swaps = WordSwaps.learn(model, tokenizer, inventory.captions())
    foreign: list[str] = []
    if settings.itm.web_negatives:
        foreign = list(take_inventory(run, ("web",)).captions())
    loss_of = partial(
        matcher_losses,
        model=model,
        tokenizer=tokenizer,
        contrast=contrast,
        settings=settings,
        swaps=swaps,
        foreign=foreign,
        weights=weights if settings.web_pairs else {},
        labelled=labelled,
        easy_steps=round(settings.itm.easy_epochs * per_epoch),
        device=device,
    )
    validate = None
    if len(held_out) > 1:
        val = make_stream(held_out, model.config, batch_size=settings.batch_size, train=False)
        validate = partial(_mean_recall, model, tokenizer, val, settings.max_tokens, device)
    result = train(
        model,
        make_stream(inventory, model.config, batch_size=settings.batch_size),
        loss_of,
        settings,
        folder=folder,
        fingerprint=fingerprint,
        seed=config.seed + 1,
        device=device,
        others=contrast.state(),
        validate=validate,
        progress=progress,
    )
    if ranks.is_first():
        model_folder.save(model, tokenizer, folder, vocabulary=vocabulary)
    found = {**result, "pictures": len(inventory), "left_out": dict(inventory.skipped)}
    if labelled is not None:
        right = int(labelled.match.sum())
        wrong = len(labelled.texts) - right
        found["labels"] = {"folder": settings.labels, "right": right, "wrong": wrong}
    return found


def matcher_losses(
    batch: Batch,
    step: int,
    generator: torch.Generator,
    *,
    model: MED,
    tokenizer: Any,
    contrast: objectives.Contrast,
    settings: Matcher,
    swaps: WordSwaps,
    foreign: list[str],
    weights: dict[str, float],
    labelled: Labelled | None,
    easy_steps: int,
    device: str,
) -> dict[str, Tensor]:
    """ITC + ITM of one batch, and ITM of some reviewed pairs if there are any."""
    weight = objectives.pair_weights(batch, weights, device)
    features = objectives.image_features(model, batch, device)
    image_ids = batch.image_ids.to(device)
    features = objectives.augment_features(features, settings.image_dropout, generator)
    ids, mask = objectives.tokenize(
        tokenizer, batch.captions, settings.max_tokens, first_token="cls"
    )
    ids, mask = ids.to(device), mask.to(device)
    embedded = objectives.embed(model, features, ids, mask)
    itc = contrast.loss(model, embedded, features, batch.pixels, ids, mask, image_ids, step, weight)
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    further: list[tuple[int, str]] = []
    for row, caption in enumerate(batch.captions):
        if rng.random() < settings.itm.word_swap:
            swapped = swaps.swap(caption, rng)
            if swapped is not None:
                further.append((row, swapped))
        if foreign and rng.random() < settings.itm.web_negatives:
            further.append((row, foreign[int(rng.integers(len(foreign)))]))
    adapted = model.adapt(features, embedded.known_images)
    itm, right = objectives.itm_objective(
        model,
        tokenizer,
        batch.captions,
        embedded,
        adapted,
        model.cross_keys_values(adapted, "encoder"),
        image_ids,
        hardness=min(1.0, step / easy_steps) if easy_steps else 1.0,
        max_tokens=settings.max_tokens,
        generator=generator,
        further=further,
        weight=weight,
    )
    found = {"itc": itc, "itm": itm, "itm_accuracy": right}
    if labelled is not None:
        found["itm_labelled"] = labelled_itm(
            model,
            tokenizer,
            labelled,
            count=settings.labels_per_step // settings.gradient_accumulation,
            max_tokens=settings.max_tokens,
            generator=generator,
            device=device,
        )
        itm = itm + found["itm_labelled"]
    loss = settings.itc_weight * itc + settings.itm_weight * itm
    return {"loss": loss, **found}


def _mean_recall(
    model: MED, tokenizer: Any, stream: Stream, max_tokens: int, device: str
) -> dict[str, float]:
    """Mean recall of ITC retrieval among held-out pictures, with the first text of each."""
    images, texts = [], []
    for batch in stream.in_order():
        features = objectives.image_features(model, batch, device)
        ids, mask = objectives.tokenize(tokenizer, batch.captions, max_tokens, first_token="cls")
        images.append(model.embed_image(features))
        texts.append(model.embed_text(ids.to(device), mask.to(device)))
    image, text = (torch.cat(parts).float().cpu() for parts in (images, texts))
    found = recall_at_embeds(image, text, np.arange(len(text)))["mean_recall"]
    return {"score": found, "mean_recall": found}

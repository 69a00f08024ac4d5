"""Finetuning of the captioner with LM on human pairs (paper, section 3.3)."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.config import Captioner, Config
from capfilt.errors import InputError
from capfilt.evaluation.captions import caption_scores, tokenize
from capfilt.models import folder as model_folder
from capfilt.models.generation import generate, read_images
from capfilt.models.med import MED
from capfilt.models.tokens import decode, prompt_ids
from capfilt.shards import RunDir
from capfilt.training import objectives, ranks
from capfilt.training.data import Batch, Stream, take_inventory
from capfilt.training.loop import Progress, train


def finetune_captioner(
    run: RunDir,
    config: Config,
    folder: Path,
    fingerprint: str,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Finetunes the captioner on the human pairs and saves it; arguments as in `pretrain`.

    Raises:
        InputError: too few human pairs.
        DivergenceError: the loss became NaN or infinite.
    """
    settings = config.captioner
    inventory, held_out = take_inventory(run, ("human",)).split(settings.val_fraction, config.seed)
    model, tokenizer, _ = model_folder.start(run, config, settings)
    model = model.to(device)
    make_stream = partial(Stream, run, seed=config.seed, use_features=config.model.caches_features)
    # it writes only words that people wrote, whatever pretraining saw in the web's texts
    vocabulary = None
    if config.model.preset == "small":
        vocabulary = objectives.vocabulary_in_use(tokenizer, inventory.captions(), settings.prompt)
        vocabulary = vocabulary.to(device)
    loss_of = partial(
        captioner_losses,
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        settings=settings,
        device=device,
    )
    validate = None
    if len(held_out) > 1:
        val = make_stream(held_out, model.config, batch_size=settings.batch_size, train=False)
        validate = partial(_caption_scores, model, tokenizer, val, vocabulary, config, device)
    result = train(
        model,
        make_stream(inventory, model.config, batch_size=settings.batch_size),
        loss_of,
        settings,
        folder=folder,
        fingerprint=fingerprint,
        seed=config.seed + 2,
        device=device,
        validate=validate,
        progress=progress,
    )
    if ranks.is_first():
        model_folder.save(model, tokenizer, folder, vocabulary=vocabulary)
    return {**result, "pictures": len(inventory), "left_out": dict(inventory.skipped)}


def captioner_losses(
    batch: Batch,
    step: int,
    generator: torch.Generator,
    *,
    model: MED,
    tokenizer: Any,
    vocabulary: Tensor | None,
    settings: Captioner,
    device: str,
) -> dict[str, Tensor]:
    """LM of one batch."""
    features = objectives.image_features(model, batch, device)
    features = objectives.augment_features(features, settings.image_dropout, generator)
    cross = model.cross_keys_values(model.adapt(features), "decoder")
    lm = objectives.lm_objective(
        model,
        tokenizer,
        batch.captions,
        cross,
        prompt=settings.prompt,
        max_tokens=settings.max_tokens,
        label_smoothing=settings.label_smoothing,
        vocabulary=vocabulary,
        whole=batch.whole,
    )
    return {"loss": lm, "lm": lm}


def _caption_scores(
    model: MED,
    tokenizer: Any,
    stream: Stream,
    vocabulary: Tensor | None,
    config: Config,
    device: str,
) -> dict[str, float]:
    """CIDEr + BLEU-4 of greedy captions of held-out pictures, against all their texts."""
    prompt = prompt_ids(tokenizer, config.captioner.prompt)
    written: list[str] = []
    for batch in stream.in_order():
        features = objectives.image_features(model, batch, device)
        cross, bonus = read_images(model, features, config.caption.word_bonus, vocabulary)
        captions = generate(
            model,
            cross,
            prompt,
            method="greedy",
            top_k=None,
            repetition_penalty=config.caption.repetition_penalty,
            min_length=config.caption.min_tokens,
            max_length=config.caption.max_tokens,
            vocab_ids=vocabulary,
            bonus=bonus,
        )
        written += [decode(tokenizer, caption.token_ids) for caption in captions]
    references = list(stream.inventory.texts())
    # a text of question marks alone is a text, and says nothing that could be compared
    compared = [row for row, texts in enumerate(references) if any(map(tokenize, texts))]
    if not compared:
        raise InputError(
            f"captioner.val_fraction: none of the {len(references)} pictures held out has a text "
            "with a word; set val_fraction: 0, or give better texts"
        )
    found = caption_scores([written[i] for i in compared], [references[i] for i in compared])
    return {
        "score": found["cider"] + found["bleu4"],
        "cider": found["cider"],
        "bleu4": found["bleu4"],
    }

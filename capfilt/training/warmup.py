"""A cheap start of ITC: the two projection heads on frozen towers, before anything else is trained.

The pooled output of both towers is worked out once; a step is then two small MLPs and takes
milliseconds. It happens at least twice: on the human pairs alone, which tells how much each web
pair deserves to be believed, and on all pairs weighted by that; each further round weighs anew. Not
in the paper, which had 14 million pairs and needed no head start.

Dimensions: N pictures, M distinct texts, B batch, E ITC embedding.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capfilt.config import HeadWarmup
from capfilt.models import losses
from capfilt.models.med import MED, zero_last_layer
from capfilt.models.med_files import unique_state
from capfilt.models.text_tower import Dropout
from capfilt.training import ranks
from capfilt.training.checkpoint import load_warmup, save_warmup
from capfilt.training.data import Stream
from capfilt.training.optim import cosine_batches
from capfilt.training.pooled import Pooled, pool_pairs
from capfilt.training.start_itm import start_itm_from_itc


def warm_up_heads(
    model: MED,
    tokenizer: Any,
    stream: Stream,
    config: HeadWarmup,
    *,
    max_tokens: int,
    seed: int,
    device: str,
    folder: Path,
    fingerprint: str,
    progress: Callable[[int, int], None],
    reviewed: Mapping[str, bool] | None = None,
) -> dict[str, float]:
    """Trains the ITC heads in place and weighs the web pairs.

    What it finds is kept among the training's checkpoints: a training that was stopped goes on from
    the same heads.

    Args:
        model: the MED.
        tokenizer: of its text tower.
        stream: all pairs, not augmented.
        config: how long and how fast.
        max_tokens: longest text.
        seed: of the draws.
        device: where the model runs.
        folder: of the model; `web_weights.json` and the checkpoint go there.
        fingerprint: of the training.
        progress: told after each step.
        reviewed: web pictures whose text people found right or wrong: they weigh 1 or 0.

    Returns:
        Key to weight (0..1) of the web pictures, see `weigh`. A human pair weighs 1 and isn't
        listed.
    """
    torch.manual_seed(seed)
    reset_heads(model, config.dropout)
    model.config = replace(model.config, text_residual_scale=config.text_residual_scale)
    kept = load_warmup(folder / "checkpoints", fingerprint, _found_here(model))
    if kept is not None:
        return kept
    pooled = pool_pairs(model, tokenizer, stream, max_tokens, device)
    web = np.flatnonzero(~pooled.human)
    everything = np.arange(len(pooled.keys))
    fresh = [p.detach().clone() for p in _head_parameters(model)]
    weights: dict[str, float] = {}
    verdicts = {key: float(right) for key, right in (reviewed or {}).items()}
    if len(web):
        total = config.steps + config.rounds * config.weighted_steps
        fit = _Fit(model, pooled, config, seed)
        fit.run(np.flatnonzero(pooled.human), None, config.steps, lambda n: progress(n, total))
        for number in range(config.rounds):
            weights = weigh(model, pooled, web)
            weights |= {key: verdicts[key] for key in weights.keys() & verdicts.keys()}
            # a new start: what the round before learned is in the weights
            with torch.no_grad():
                for parameter, value in zip(_head_parameters(model), fresh, strict=True):
                    parameter.copy_(value)
            given = np.array([weights.get(key, 1.0) for key in pooled.keys], np.float32)
            fit = _Fit(model, pooled, config, seed + 1 + number)
            done = config.steps + number * config.weighted_steps
            fit.run(
                everything, given, config.weighted_steps, partial(_later, progress, done, total)
            )
    else:
        _Fit(model, pooled, config, seed).run(
            everything, None, config.steps, lambda n: progress(n, config.steps)
        )
    if model.config.itm_from_itc:
        start_itm_from_itc(model, tokenizer, pooled, weights, max_tokens, config.word_steps, seed)
    if not ranks.is_first():
        return weights
    save_warmup(folder / "checkpoints", fingerprint, _found_here(model), weights)
    temporary = folder / "web_weights.json.tmp"
    temporary.write_text(json.dumps(weights), encoding="utf-8")
    os.replace(temporary, folder / "web_weights.json")
    return weights


@torch.inference_mode()
def weigh(model: MED, pooled: Pooled, web: np.ndarray) -> dict[str, float]:
    """Weighs web pictures by the rank of the similarity with their best text.

    The least similar quarter weighs 0, the most similar quarter 1, between them it rises evenly.
    """
    model.eval()
    images = model.project_image(pooled.images[torch.from_numpy(web)])
    texts = model.project_text(pooled.texts)
    sims = np.array(
        [
            float((texts[pooled.owned[row]] @ image).max())
            for row, image in zip(web, images, strict=True)
        ]
    )
    ranks = np.argsort(np.argsort(sims, kind="stable"), kind="stable")
    return {
        pooled.keys[row]: round(min(1.0, max(0.0, 2 * float(rank) / max(1, len(web) - 1) - 0.5)), 4)
        for row, rank in zip(web, ranks, strict=True)
    }


def reset_heads(model: MED, dropout: float) -> None:
    """Gives both heads and the temperature a fresh start; `dropout` is then the image head's."""
    with torch.no_grad():
        for head in (model.vision_proj, model.text_proj):
            for part in head.modules():
                if isinstance(part, nn.LayerNorm):
                    part.reset_parameters()
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=0.02)
                    nn.init.zeros_(part.bias)
            if head is model.text_proj and model.config.text_residual:
                zero_last_layer(head)
        model.temp.fill_(0.07)
    dropouts = [part for part in model.vision_proj.modules() if isinstance(part, Dropout)]
    for before, between in zip(dropouts[::2], dropouts[1::2], strict=True):
        before.probability, between.probability = dropout / 2, dropout


def _found_here(model: MED) -> dict[str, Tensor]:
    """All of a model that isn't a tower: what a warm-up may change."""
    towers = ("vision.", "encoder.", "decoder.")
    return {n: t for n, t in unique_state(model).items() if not n.startswith(towers)}


def _later(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _head_parameters(model: MED) -> list[torch.nn.Parameter]:
    return [*model.vision_proj.parameters(), *model.text_proj.parameters(), model.temp]


class _Fit:
    """ITC on pooled features: AdamW on the heads, cosine to 0."""

    def __init__(self, model: MED, pooled: Pooled, config: HeadWarmup, seed: int) -> None:
        self.model, self.pooled, self.config = model, pooled, config
        self.rng = np.random.default_rng([seed, 7])
        torch.manual_seed(seed)

    def _by_head(self, embeds: Tensor) -> Iterable[Tensor]:
        """`[N, E]` to one `[N, E / heads]` a head, of length 1."""
        count = self.model.config.itc_heads
        return (math.sqrt(count) * part for part in embeds.chunk(count, dim=1))

    def run(
        self,
        rows: np.ndarray,
        weights: np.ndarray | None,
        steps: int,
        progress: Callable[[int], None],
    ) -> None:
        """Trains on some of the pictures."""
        model, pooled, config = self.model, self.pooled, self.config
        model.train()
        parameters = _head_parameters(model)
        optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
        batches = cosine_batches(self.rng, rows, config.batch_size, steps, optimizer, config.lr)
        for step, batch in enumerate(batches):
            own = [pooled.owned[row] for row in batch]
            texts = [texts[int(self.rng.integers(len(texts)))] for texts in own]
            device = pooled.images.device
            weight = None if weights is None else torch.from_numpy(weights[batch]).to(device)
            image_ids = torch.tensor(batch, device=device)
            # each head learns by itself: together they are better only as far as they differ
            heads = zip(
                self._by_head(model.project_image(pooled.images[batch])),
                self._by_head(model.project_text(pooled.texts[texts])),
                strict=True,
            )
            parts = [
                losses.itc_loss(image, text, model.temp, image_ids=image_ids, sample_weight=weight)
                for image, text in heads
            ]
            loss = torch.stack(parts).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.clamp_temp(model.temp, 0.01)
            progress(step + 1)

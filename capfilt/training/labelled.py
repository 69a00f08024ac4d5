"""Reviewed pairs as further examples of ITM: what people found right or wrong in a run.

They come beside the human pairs: positives where the text was right, hard negatives where it was
wrong. Texts are looked for in `images/` and `captions/`, and not in `scores/`, which the trained
matcher will replace.

Dimensions: N reviewed pairs, K pictures of them, B pairs drawn, P image tokens, Dv width of the
tower.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from capfilt.errors import InputError
from capfilt.models.images import open_rgb, pixels
from capfilt.models.med import MED
from capfilt.models.tokens import clean, tokenize
from capfilt.schema import pair_uid
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)

PULL = 10.0
"""How strongly `fit_start` holds the scale at 1: a scale of 2 must save so many half nats."""


@dataclass(frozen=True)
class Labelled:
    """Reviewed pairs.

    Attributes:
        pictures: K, each as its table has it: encoded, or float16 `[P, Dv]` if `cached`.
        cached: whether they are the image tower's output.
        rows: the picture of each pair, int64 `[N]`.
        texts: cleaned, N.
        match: int64 `[N]`, 1 for right and 0 for wrong.
        web_pictures: key to whether a text that came with the picture was found right.
    """

    pictures: list[bytes]
    cached: bool
    rows: Tensor
    texts: list[str]
    match: Tensor
    web_pictures: Mapping[str, bool] = field(default_factory=dict)


def read_labelled(run: RunDir, verdicts: Mapping[str, bool], *, use_features: bool) -> Labelled:
    """Finds the reviewed pairs of a run, and their pictures.

    Args:
        run: the run that was reviewed.
        verdicts: by a pair's uid or pair id, whether it is right (`labels.verdicts_of`).
        use_features: read `features/` instead of the pictures.

    Raises:
        InputError: the run holds none of them, or lacks features.
    """
    pictures: list[bytes] = []
    rows: list[int] = []
    texts: list[str] = []
    match: list[int] = []
    web_pictures: dict[str, bool] = {}
    seen: set[str] = set()
    for name in run.shards("images"):
        shard = Shard(run, name)
        place: dict[str, int] = {}
        for pair_id, uid, key, text in _texts(shard):
            pair = uid if uid in verdicts else pair_id
            cleaned = clean(text) if pair in verdicts and pair not in seen else ""
            if cleaned:
                seen.add(pair)
                rows.append(place.setdefault(key, len(pictures) + len(place)))
                texts.append(cleaned)
                match.append(int(verdicts[pair]))
                if key.startswith("web-") and "/text" in pair_id:
                    web_pictures[key] = web_pictures.get(key, False) or verdicts[pair]
        if place:
            pictures += _pictures(shard, list(place), use_features)
    if not texts:
        raise InputError(
            f"none of the {len(verdicts)} reviewed pairs is in {run.path}: the labels are of "
            "another run, or its pictures and texts have changed since; give labels/ of this run"
        )
    if len(seen) < len(verdicts):
        log.warning(
            "%d of %d reviewed pairs are not in %s and are left out",
            len(verdicts) - len(seen),
            len(verdicts),
            run.path,
        )
    return Labelled(
        pictures, use_features, torch.tensor(rows), texts, torch.tensor(match), web_pictures
    )


def _texts(shard: Shard) -> Iterator[tuple[str, str, str, str]]:
    """Pair id, uid, key and text of each pair of a shard whose picture can be used."""
    digests: dict[str, str] = {}
    columns = ["key", "captions", "reason", "sha256"]
    for image in shard.read("images", columns).to_pylist():
        if image["reason"] is None:
            digests[image["key"]] = image["sha256"]
            for number, text in enumerate(image["captions"] or ()):
                uid = pair_uid(image["sha256"], text or "")
                yield f"{image['key']}/text{number}", uid, image["key"], text or ""
    if shard.run.exists(shard.run.manifest("captions", shard.name)):
        for row in shard.read("captions", ["pair_id", "key", "caption"]).to_pylist():
            if row["key"] in digests:
                uid = pair_uid(digests[row["key"]], row["caption"])
                yield row["pair_id"], uid, row["key"], row["caption"]


def _pictures(shard: Shard, keys: list[str], use_features: bool) -> list[bytes]:
    """Some pictures of a shard, in the order of their keys."""
    name, column = ("features", "tokens") if use_features else ("images", "image")
    table = shard.read(name, ["key", column])
    table = table.filter(pc.is_in(table["key"], value_set=pa.array(keys)))
    found = dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))
    if missing := [key for key in keys if key not in found]:
        raise InputError(
            f"{shard.run.table(name, shard.name)} has no features of {len(missing)} reviewed "
            f"pictures, {missing[0]} for one; delete it and its manifest and run `capfilt features "
            "CONFIG`"
        )
    return [found[key] for key in keys]


@torch.no_grad()
def fit_start(
    model: MED, tokenizer: PreTrainedTokenizerBase, labelled: Labelled, max_tokens: int, device: str
) -> None:
    """Fits scale and bias of `ITMStart`'s logit to the reviewed pairs (Platt's scaling).

    What its parts weigh against each other stays: some hundred pairs can't tell, and pairs that
    were chosen for their score would turn them against each other. Few pairs, or pairs of like
    scores, change the scale little; it stays above 0, so the order of pairs stays.

    Args:
        model: with `itm_from_itc`; its `itm_start` is changed.
        tokenizer: of its text tower.
        labelled: the pairs.
        max_tokens: longest text.
        device: where the model is.
    """
    model.eval()
    start, parts = model.itm_start, []
    for rows in torch.arange(len(labelled.texts)).split(64):
        texts = [labelled.texts[i] for i in rows.tolist()]
        ids, mask = (x.to(device) for x in tokenize(tokenizer, texts, max_tokens))
        features = _features(model, labelled, labelled.rows[rows].tolist(), device)
        pooled_image = model.pool_image(features)
        pooled_text = model.pool_text(ids, mask)
        image, text = model.project_image(pooled_image), model.project_text(pooled_text)
        parts.append(start(image, text, ids, pooled_image, pooled_text).cpu())
    logits, match = torch.cat(parts).double(), labelled.match.double()
    design = torch.stack([logits, torch.ones_like(logits)], dim=1)
    before = torch.tensor([1.0, 0.0], dtype=torch.float64)  # scale, shift
    pull = torch.tensor([PULL, 1.0], dtype=torch.float64)
    found = before.clone()
    for _ in range(50):  # Newton's method on a convex loss: it needs some ten steps
        probability = (design @ found).sigmoid()
        gradient = design.T @ (probability - match) + pull * (found - before)
        weight = (probability * (1 - probability))[:, None]
        step = torch.linalg.solve(design.T @ (design * weight) + pull.diag(), gradient)
        # a full step may overshoot where all pairs are told apart with certainty
        found = found - step / max(1.0, float(step.abs().max()))
    scale, shift = max(0.1, float(found[0])), float(found[1])
    start.weights.mul_(scale)
    start.bias.mul_(scale).add_(shift)


def labelled_itm(
    model: MED,
    tokenizer: PreTrainedTokenizerBase,
    labelled: Labelled,
    *,
    count: int,
    max_tokens: int,
    generator: torch.Generator,
    device: str,
) -> Tensor:
    """ITM loss of `count` reviewed pairs drawn at random, as many right as wrong where both exist.

    Args:
        model: in training.
        tokenizer: of its text tower.
        labelled: the pairs.
        count: how many a step; at least one of each kind is drawn.
        max_tokens: longest text.
        generator: source of the draws (CPU); in the same state on all ranks.
        device: where the model is.
    """
    right, wrong = (torch.nonzero(labelled.match == value)[:, 0] for value in (1, 0))
    parts = [part for part in (right, wrong) if len(part)]
    share = max(1, count // len(parts))
    chosen = torch.cat(
        [part[torch.randint(len(part), (share,), generator=generator)] for part in parts]
    )
    texts = [labelled.texts[i] for i in chosen.tolist()]
    features = _features(model, labelled, labelled.rows[chosen].tolist(), device)
    known = model.known_image(features)
    first, first_mask = tokenize(tokenizer, texts, max_tokens, first_token="cls")
    with torch.no_grad():
        first, first_mask = first.to(device), first_mask.to(device)
        pooled_texts = model.pool_text(first, first_mask)
        known_texts = model.known_text(pooled_texts)
    ids, mask = tokenize(tokenizer, texts, max_tokens, first_token="enc")
    pooled = model.pool_image(features).detach()
    start = model.itm_start_of(known, known_texts, ids.to(device), pooled, pooled_texts)
    cross = model.cross_keys_values(model.adapt(features, known), "encoder")
    rows = torch.arange(len(texts), device=device)
    logits = model.itm_logits(ids.to(device), mask.to(device), cross, image_index=rows, start=start)
    return F.cross_entropy(logits.float(), labelled.match[chosen].to(device))


def _features(model: MED, labelled: Labelled, rows: list[int], device: str) -> Tensor:
    """The image tower's output of some pictures, `[B, P, Dv]`; a tower that is trained learns."""
    pictures = [labelled.pictures[row] for row in rows]
    if not labelled.cached:
        config = model.config
        shown = pixels(
            [open_rgb(data) for data in pictures], config.image_size_px, config.image_tower
        )
        return model.encode_image(shown.to(device))
    raw = np.stack([np.frombuffer(data, np.float16) for data in pictures])
    tokens = raw.reshape(len(rows), -1, model.config.image_width)
    return torch.from_numpy(tokens).to(device, torch.float32)

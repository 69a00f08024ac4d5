"""Reviewed pairs as further examples of ITM: what people found right or wrong in this very run.

They come beside the human pairs: positives where the text was right, hard negatives where it was
wrong. Dimensions: N reviewed pairs, K pictures of them, P image tokens, Dv width of the tower.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

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
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """Reviewed pairs.

    Attributes:
        features: image tower's output of the pictures, float16 `[K, P, Dv]`.
        rows: the picture of each pair, int64 `[N]`.
        texts: cleaned, N.
        match: int64 `[N]`, 1 for right and 0 for wrong.
    """

    features: Tensor
    rows: Tensor
    texts: list[str]
    match: Tensor


@torch.no_grad()
def read_labelled(
    run: RunDir, verdicts: Mapping[str, bool], model: MED, *, use_features: bool, device: str
) -> Labelled:
    """Finds the reviewed pairs in the run's `scores/`, and their pictures.

    Args:
        run: the run that was reviewed.
        verdicts: by a pair's uid or pair id, whether it is right (`labels.verdicts_of`).
        model: encodes the pictures, once, where there are no cached features.
        use_features: read `features/`.
        device: where the model is.

    Raises:
        InputError: the run holds none of them.
    """
    wanted = pa.array(sorted(verdicts), pa.string())
    found: list[tuple[str, str, bool]] = []
    features: list[np.ndarray] = []
    place: dict[str, int] = {}
    seen: set[str] = set()
    for name in run.shards("scores", ("web", "human")):
        shard = Shard(run, name)
        table = shard.read("scores", ["pair_id", "key", "uid", "caption", "error"])
        here = pc.or_kleene(
            pc.is_in(table["uid"], value_set=wanted), pc.is_in(table["pair_id"], value_set=wanted)
        )
        pairs = []
        for row in table.filter(pc.and_(here, pc.is_null(table["error"]))).to_pylist():
            pair = row["uid"] if row["uid"] in verdicts else row["pair_id"]
            if pair not in seen:
                seen.add(pair)
                pairs.append((row["key"], clean(row["caption"]), verdicts[pair]))
        if pairs:
            keys = sorted({key for key, _, _ in pairs})
            place.update({key: len(place) + i for i, key in enumerate(keys)})
            features.extend(_features(shard, keys, model, use_features, device))
            found.extend(pairs)
    if not found:
        raise InputError(
            f"none of the {len(verdicts)} reviewed pairs is in {run.at('scores')}; the labels are "
            "of another run, or this one is not scored"
        )
    if len(seen) < len(verdicts):
        log.warning("%d reviewed pairs are not in the run", len(verdicts) - len(seen))
    return Labelled(
        torch.from_numpy(np.stack(features)),
        torch.tensor([place[key] for key, _, _ in found]),
        [text for _, text, _ in found],
        torch.tensor([int(match) for _, _, match in found]),
    )


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
        count: how many a step.
        max_tokens: longest text.
        generator: source of the draws (CPU).
        device: where the model is.
    """
    right, wrong = (torch.nonzero(labelled.match == value)[:, 0] for value in (1, 0))
    parts = [part for part in (right, wrong) if len(part)]
    share = max(1, count // len(parts))
    chosen = torch.cat(
        [part[torch.randint(len(part), (share,), generator=generator)] for part in parts]
    )
    texts = [labelled.texts[i] for i in chosen.tolist()]
    features = labelled.features[labelled.rows[chosen]].to(device, torch.float32)
    first, first_mask = tokenize(tokenizer, texts, max_tokens, first_token="cls")
    with torch.no_grad():
        text_embeds = model.embed_text(first.to(device), first_mask.to(device))
        similarity = (model.embed_image(features) * text_embeds).sum(-1)
    ids, mask = tokenize(tokenizer, texts, max_tokens, first_token="enc")
    cross = model.cross_keys_values(model.adapt(features), "encoder")
    rows = torch.arange(len(texts), device=device)
    logits = model.itm_logits(
        ids.to(device), mask.to(device), cross, image_index=rows, itc_sim=similarity
    )
    return F.cross_entropy(logits.float(), labelled.match[chosen].to(device))


def _features(
    shard: Shard, keys: list[str], model: MED, use_features: bool, device: str
) -> list[np.ndarray]:
    """The image tower's output of some pictures of a shard, `[P, Dv]` each, by key."""
    column = "tokens" if use_features else "image"
    table = shard.read("features" if use_features else "images", ["key", column])
    table = table.filter(pc.is_in(table["key"], value_set=pa.array(keys))).sort_by("key")
    if use_features:
        width = model.config.image_width
        cells = [np.frombuffer(value.as_buffer(), np.float16) for value in table["tokens"]]
        return [cell.reshape(-1, width) for cell in cells]
    found = []
    for value in table["image"]:
        picture = open_rgb(value.as_py())
        shown = pixels([picture], model.config.image_size_px, model.config.image_tower).to(device)
        found.append(model.encode_image(shown)[0].half().cpu().numpy())
    return found

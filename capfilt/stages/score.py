"""`score`: ITM probability and ITC similarity of every pair, by the matcher (paper, section 3.3).

Each picture goes through its tower once for all its texts. A pair that can't be scored keeps its
row, with the reason. What needs torch is imported when the matcher is opened: a run with nothing to
do ends at once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from capfilt.config import Score
from capfilt.schema import SCORES, pair_uid
from capfilt.shards import Shard
from capfilt.stage import Transform

if TYPE_CHECKING:
    import torch

    from capfilt.models.med import MED


@dataclass(frozen=True)
class ScoreStage:
    """The stage `score`: `images/` and `captions/` to `scores/`, one row a pair."""

    config: Score
    model: Path
    use_features: bool
    source: str
    name: str = "score"
    version: int = 1
    table: str = "scores"
    schema: pa.Schema = field(default=SCORES, repr=False)
    reads_all: tuple[str, ...] = ()
    count_by: str | None = "source"
    cheap: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Web and human shards are scored apart: only web ones have captions."""
        return (self.source,)

    @property
    def reads(self) -> tuple[str, ...]:
        """The pictures (or features), and the synthetic texts of web ones."""
        tables = ["images"]
        if self.use_features:
            tables.append("features")
        if self.source == "web":
            tables.append("captions")
        return tuple(tables)

    def weights(self) -> dict[str, Path]:
        """The matcher."""
        return {"matcher": self.model / "model.safetensors"}

    def open(self, device: str) -> Transform:
        """Loads the matcher."""
        from capfilt.models import folder as model_folder

        model, tokenizer, _ = model_folder.load(self.model)
        return partial(
            score_shard,
            model=model.to(device).eval(),
            tokenizer=tokenizer,
            config=self.config,
            use_features=self.use_features,
            source=self.source,
            device=device,
        )


def score_shard(
    shard: Shard,
    *,
    model: MED,
    tokenizer: object,
    config: Score,
    use_features: bool,
    source: str,
    device: str,
) -> pa.Table:
    """Scores of all pairs of a shard."""
    import torch

    from capfilt.models.tokens import clean
    from capfilt.stages.batches import autocast, image_batches

    images = shard.read("images", ["key", "captions", "reason", "sha256"])
    rows: dict[str, dict[str, object]] = {}
    pairs: dict[str, list[str]] = defaultdict(list)

    def add(
        pair_id: str, key: str, origin: str, text: str, reason: str | None, digest: str
    ) -> None:
        error = reason or (None if clean(text) else "empty_caption")
        rows[pair_id] = {
            "pair_id": pair_id,
            "key": key,
            "source": origin,
            "caption": text,
            "uid": None if reason else pair_uid(digest, text),
            "itm_prob": None,
            "itc_sim": None,
            "error": error,
        }
        if error is None:
            pairs[key].append(pair_id)

    digests = {}
    for image in images.to_pylist():
        digests[image["key"]] = image["sha256"]
        for number, text in enumerate(image["captions"]):
            pair_id = f"{image['key']}/text{number}"
            add(pair_id, image["key"], source, text or "", image["reason"], image["sha256"])
    if source == "web":
        for caption in shard.read("captions", ["pair_id", "key", "caption"]).to_pylist():
            digest = digests[caption["key"]]
            add(caption["pair_id"], caption["key"], "synthetic", caption["caption"], None, digest)
    if source == "web" or config.human:
        with torch.inference_mode():
            for keys, features in image_batches(
                shard, model, use_features, config.batch_size, device, config.precision
            ):
                names = [pair_id for key in keys for pair_id in pairs[key]]
                owners = [row for row, key in enumerate(keys) for _ in pairs[key]]
                if not names:
                    continue
                texts = [str(rows[name]["caption"]) for name in names]
                with autocast(device, config.precision):
                    itm, itc = score_pairs(model, tokenizer, features, texts, owners, config)
                for name, probability, similarity in zip(names, itm, itc, strict=True):
                    rows[name]["itm_prob"] = probability
                    rows[name]["itc_sim"] = similarity
    ordered = [rows[pair_id] for pair_id in sorted(rows)]
    return pa.Table.from_pylist(ordered, schema=SCORES)


def score_pairs(
    model: MED,
    tokenizer: object,
    features: torch.Tensor,
    texts: list[str],
    owners: list[int],
    config: Score,
) -> tuple[list[float], list[float]]:
    """ITM probabilities and ITC similarities of texts with their pictures.

    Args:
        model: in evaluation mode.
        tokenizer: of its text tower.
        features: `[B, P, Dv]`, the pictures.
        texts: N texts, as they came.
        owners: the row of `features` that each text belongs to, N.
        config: of the scoring.

    Returns:
        Probabilities 0..1 and cosines -1..1, N each.
    """
    import torch

    from capfilt.models.tokens import clean, tokenize

    device = features.device
    pooled = model.pool_image(features)
    images = model.project_image(pooled)
    cross = model.cross_keys_values(model.adapt(features), "encoder")
    cleaned = [clean(text) for text in texts]
    # texts of like length go together, so that a long one does not pad the others
    order = sorted(range(len(texts)), key=lambda i: len(cleaned[i]))
    itm, itc = [0.0] * len(texts), [0.0] * len(texts)
    step = max(1, 2 * config.batch_size)
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        part = [cleaned[i] for i in chosen]
        rows = torch.tensor([owners[i] for i in chosen], device=device)
        ids, mask = tokenize(tokenizer, part, config.max_tokens, first_token="cls")  # type: ignore[arg-type]
        ids, mask = ids.to(device), mask.to(device)
        pooled_texts = model.pool_text(ids, mask)
        embeds = model.project_text(pooled_texts)
        similarity = (images[rows] * embeds).sum(-1)
        itm_start = model.itm_start_of(images[rows], embeds, ids, pooled[rows], pooled_texts)
        if config.first_token == "enc":
            ids, mask = tokenize(tokenizer, part, config.max_tokens, first_token="enc")  # type: ignore[arg-type]
            ids, mask = ids.to(device), mask.to(device)
        logits = model.itm_logits(ids, mask, cross, image_index=rows, start=itm_start)
        probability = logits.float().softmax(-1)[:, 1]
        for place, p, s in zip(chosen, probability.tolist(), similarity.tolist(), strict=True):
            itm[place], itc[place] = p, s
    return itm, itc

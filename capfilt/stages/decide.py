"""`filter`: which pairs are kept, and for each other one the reason why not (paper, section 3.3).

Reads scores only: another threshold needs no model. Human pairs are kept whatever their score, as in
the paper; only an empty text, a picture that can't be used or a duplicate drops one.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.config import Filter
from capfilt.schema import DECISIONS
from capfilt.shards import RunDir, Shard
from capfilt.stage import Transform


@dataclass(frozen=True)
class FilterStage:
    """The stage `filter`: `scores/` to `decisions/`, the same rows."""

    config: Filter
    run: RunDir
    name: str = "filter"
    version: int = 1
    table: str = "decisions"
    schema: pa.Schema = field(default=DECISIONS, repr=False)
    reads: tuple[str, ...] = ("scores",)
    sources: tuple[str, ...] = ("web", "human")
    count_by: str | None = "reason"
    cheap: bool = True

    @property
    def reads_all(self) -> tuple[str, ...]:
        """Duplicates are looked for in the whole run."""
        return ("scores",) if self.config.drop_duplicates else ()

    def weights(self) -> dict[str, Path]:
        """None: no model takes part."""
        return {}

    def open(self, device: str) -> Transform:
        """Finds the duplicates of the whole run, once."""
        duplicates = find_duplicates(self.run) if self.config.drop_duplicates else frozenset()
        return partial(decide, config=self.config, duplicates=duplicates)


def find_duplicates(run: RunDir) -> frozenset[str]:
    """The pair ids whose picture and text stand earlier in the run (human pairs count as first).

    Holds 8 bytes a pair of the run: 0.8 GB for a hundred million.
    """
    shards = run.shards("scores", ("human",)) + run.shards("scores", ("web",))
    seen: list[np.ndarray] = []
    for name in shards:
        uids = Shard(run, name).read("scores", ["uid"]).column("uid").drop_null()
        # the first 64 bits of a sha256; candidates are confirmed by the whole uid below
        seen.append(np.array([int(uid[:16], 16) for uid in uids.to_pylist()], dtype=np.uint64))
    hashes = np.sort(np.concatenate(seen)) if seen else np.empty(0, np.uint64)
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not repeated:
        return frozenset()
    first: set[str] = set()
    duplicates: list[str] = []
    for name in shards:
        table = Shard(run, name).read("scores", ["pair_id", "uid"])
        for pair_id, uid in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if uid is None or int(uid[:16], 16) not in repeated:
                continue
            if uid in first:
                duplicates.append(pair_id)
            first.add(uid)
    return frozenset(duplicates)


def decide(shard: Shard, *, config: Filter, duplicates: frozenset[str]) -> pa.Table:
    """One decision for every scored or unscorable pair of a shard; the first reason that holds.

    The order is: no score (with the reason), duplicate, ITM, ITC. A probability equal to the
    threshold is kept.
    """
    scores = shard.read("scores", ["pair_id", "source", "itm_prob", "itc_sim", "error"])
    judged = pc.not_equal(scores["source"], "human")
    reason = pa.chunked_array([pa.nulls(scores.num_rows, pa.string())])
    if config.itc_threshold is not None:
        below = pc.and_(judged, pc.less(scores["itc_sim"], config.itc_threshold))
        reason = pc.if_else(below, "itc_below_threshold", reason)
    if config.itm_threshold is not None:
        below = pc.and_(judged, pc.less(scores["itm_prob"], config.itm_threshold))
        reason = pc.if_else(below, "itm_below_threshold", reason)
    repeated = pc.is_in(scores["pair_id"], value_set=pa.array(sorted(duplicates), pa.string()))
    reason = pc.if_else(repeated, "duplicate", reason)
    reason = pc.coalesce(scores["error"], reason, "kept")
    return pa.table(
        {
            "pair_id": scores["pair_id"],
            "source": scores["source"],
            "keep": pc.equal(reason, "kept"),
            "reason": reason,
        },
    )

"""The stage protocol, and `run_shard`, which every engine calls.

A stage reads the tables of one shard and writes one table under the same shard name. It owns one
folder of the run. What it may depend on is in its `Identity`; the rest (device, batch size, number
of workers) must not change its output.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.manifest import Identity
from capfilt.schema import check
from capfilt.shards import PICTURES_A_GROUP, ROWS_A_GROUP, RunDir, Shard

Transform = Callable[[Shard], pa.Table]


class Stage(Protocol):
    """What a stage is. Frozen dataclasses implement it."""

    @property
    def name(self) -> str:
        """As on the command line and in messages."""
        ...

    @property
    def version(self) -> int:
        """Raised when the same config would give other output."""
        ...

    @property
    def table(self) -> str:
        """The folder that it writes."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Of the table that it writes."""
        ...

    @property
    def config(self) -> BaseModel:
        """Its frozen config: what decides the output."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The tables of the same shard that it reads."""
        ...

    @property
    def reads_all(self) -> tuple[str, ...]:
        """The tables of which it reads all shards (a global decision)."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """The shards that it runs on (`web`, `human`)."""
        ...

    @property
    def count_by(self) -> str | None:
        """The column of its output that the manifest counts."""
        ...

    @property
    def cheap(self) -> bool:
        """Whether it is redone without asking when the config changes: it needs no model."""
        ...

    def weights(self) -> dict[str, Path]:
        """The weight files (or manifests of model folders) that decide the output, by name."""
        ...

    def open(self, device: str) -> Transform:
        """Loads what is needed once per worker; returns a pure function from a shard to a table."""
        ...


@runtime_checkable
class Citing(Protocol):
    """A stage whose manifests quote something that people will want to know of its output."""

    def citation(self) -> dict[str, Any]:
        """What they quote; decides nothing, so it is no part of the fingerprint."""
        ...


@dataclass(frozen=True)
class Shared:
    """The part of a stage's identity that is the same for all shards, worked out once a run."""

    upstream: dict[str, str]
    weights: dict[str, str]


def identify_shared(stage: Stage, run: RunDir) -> Shared:
    """Digests of the weights, and of the tables of which the stage reads every shard.

    Raises:
        InputError: a model that the stage needs is not there yet.
    """
    upstream = {}
    for table in stage.reads_all:
        prints = []
        for name in run.shards(table):
            record = manifest.read(run, run.manifest(table, name))
            prints.append((name, manifest.signature(record) if record else None))
        listed = manifest.canonical_json(prints).encode()
        upstream[f"{table}/*"] = hashlib.sha256(listed).hexdigest()
    weights = {}
    for name, weight_file in stage.weights().items():
        if not weight_file.exists():
            raise InputError(
                f"stage {stage.name} needs the {name} model, and {weight_file} is not there: "
                f"train it first (`capfilt finetune {name} CONFIG`, or `capfilt run CONFIG`)"
            )
        weights[name] = manifest.file_digest(weight_file)
    return Shared(upstream, weights)


def identify(stage: Stage, run: RunDir, shard: str, shared: Shared) -> Identity:
    """The identity of a stage's work on a shard.

    Raises:
        InputError: something that the stage reads is not there yet.
    """
    upstream = {}
    for table in stage.reads:
        path = run.manifest(table, shard)
        record = manifest.read(run, path)
        if record is None:
            raise InputError(
                f"stage {stage.name} reads {table}/{shard}, and {path} is not there: "
                f"run the stage that writes {table}/ first, or `capfilt run`"
            )
        upstream[table] = manifest.signature(record)
    return Identity(
        stage.name,
        stage.version,
        manifest.deciding_config(stage.config),
        {**upstream, **shared.upstream},
        shared.weights,
    )


@dataclass(frozen=True)
class Written:
    """What `run_shard` wrote: rows, and their counts by the stage's `count_by` column."""

    rows: int
    counts: dict[str, int]


def run_shard(transform: Transform, stage: Stage, shard: Shard, identity: Identity) -> Written:
    """Runs a stage on one shard: transform, check, write by rename, sign.

    Raises:
        InputError: the table does not fit the stage's schema or is not sorted.
    """
    start = time.perf_counter()
    where = f"{stage.table}/{shard.name}"
    table = check(transform(shard), stage.schema, where)
    names = table.column(0)
    first = table.column_names[0]
    # a position (key, pair_id) stands once; the same content (uid) may be exported twice
    in_order = pc.less_equal if first == "uid" else pc.less
    if len(names) > 1 and not pc.all(in_order(names[:-1], names[1:])).as_py():
        unique = "" if first == "uid" else " unique"
        raise InputError(f"{where}: rows are not sorted by a{unique} {first}")
    run = shard.run
    signature = run.manifest(stage.table, shard.name)
    digest = run.write_table(
        run.table(stage.table, shard.name),
        table,
        PICTURES_A_GROUP if stage.table == "images" else ROWS_A_GROUP,
        unsign=signature,
    )
    counts: dict[str, int] = {}
    if stage.count_by is not None:
        values = table.column(stage.count_by).to_pylist()
        counts = dict(Counter("ok" if value is None else str(value) for value in values))
    manifest.sign(
        run,
        signature,
        identity,
        rows=table.num_rows,
        counts=counts,
        seconds=time.perf_counter() - start,
        sha256=digest,
        extra=stage.citation() if isinstance(stage, Citing) else None,
    )
    return Written(table.num_rows, counts)

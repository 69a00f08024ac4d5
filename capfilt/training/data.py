"""What a training reads of a run: pictures (or their cached features) and texts, in a seeded order.

Shards are read a window at a time and shuffled inside it, so that memory stays bounded however large
the run is. A set that fits one window is read once.

Dimensions: B batch, P image tokens, Dv width of the image tower.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from capfilt.errors import InputError
from capfilt.models.images import augment, open_rgb, pixels
from capfilt.models.med import MEDConfig
from capfilt.models.tokens import clean
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)

WINDOW_ROWS = 20_000
"""Pictures held in memory at a time (3.5 GB of cached features, less of encoded pictures)."""


@dataclass(frozen=True)
class Batch:
    """One step's pairs.

    Attributes:
        keys: of the pictures, B.
        image_ids: int64 `[B]`, equal for equal pictures.
        captions: one cleaned text a picture, B.
        human: bool `[B]`, whether the pair is human-labelled.
        features: float32 `[B, P, Dv]` from the cache, or None.
        pixels: float32 `[B, 3, S, S]`, or None.
    """

    keys: list[str]
    image_ids: Tensor
    captions: list[str]
    human: Tensor
    features: Tensor | None
    pixels: Tensor | None


@dataclass(frozen=True)
class Inventory:
    """What a run holds for training, read from the tables' metadata columns only.

    Attributes:
        shards: names of the shards with usable pairs, with the usable rows of each.
        captions: cleaned, non-empty texts of each usable row, by shard.
        skipped: rows that can't be used, by reason.
        examples: a few keys of those, by reason.
    """

    shards: dict[str, np.ndarray]
    captions: dict[str, list[list[str]]]
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of usable pictures."""
        return sum(len(rows) for rows in self.shards.values())

    def all_captions(self) -> list[str]:
        """Every usable text, in order."""
        return [text for shard in self.captions.values() for texts in shard for text in texts]

    def split(self, fraction: float, seed: int) -> "tuple[Inventory, Inventory]":
        """Splits pictures by a hash of their key: about `fraction` of them go to the second part."""
        parts = []
        for held_out in (False, True):
            shards, captions = {}, {}
            for name, rows in self.shards.items():
                chosen = [
                    i for i, row in enumerate(rows) if (_unit(seed, name, row) < fraction) == held_out
                ]
                if chosen:
                    shards[name] = rows[chosen]
                    captions[name] = [self.captions[name][i] for i in chosen]
            parts.append(Inventory(shards, captions))
        return parts[0], parts[1]


def _unit(seed: int, name: str, row: int) -> float:
    digest = hashlib.blake2b(f"{seed}|{name}|{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def take_inventory(run: RunDir, sources: tuple[str, ...], max_words: int = 30) -> Inventory:
    """Lists the usable pairs of some sources; what can't be used is counted and named.

    Raises:
        InputError: fewer than two usable pictures are left.
    """
    inventory = Inventory({}, {})
    for name in run.shards("images", sources):
        table = Shard(run, name).read("images", ["key", "captions", "reason"])
        rows, captions = [], []
        for row, (key, texts, reason) in enumerate(zip(*table.to_pydict().values(), strict=True)):
            cleaned = [text for text in (clean(text or "", max_words) for text in texts) if text]
            if reason is None and not cleaned:
                reason = "empty_caption"
            if reason is not None:
                inventory.skipped[reason] += 1
                inventory.examples.setdefault(reason, [])
                if len(inventory.examples[reason]) < 3:
                    inventory.examples[reason].append(key)
                continue
            rows.append(row)
            captions.append(cleaned)
        if rows:
            inventory.shards[name] = np.array(rows)
            inventory.captions[name] = captions
    for reason, count in inventory.skipped.items():
        named = ", ".join(inventory.examples[reason])
        log.info("%d %s pictures left out of training: %s (%s, …)", count, sources, reason, named)
    if len(inventory) < 2:
        raise InputError(
            f"training needs at least two pictures with a text from {' and '.join(sources)}, found "
            f"{len(inventory)}; left out: {dict(inventory.skipped) or 'none'}. "
            f"See {run.at('images')} and the inputs in the config"
        )
    return inventory


class Stream:
    """Endless seeded batches of an inventory; `skip` steps over what a stopped training has seen."""

    def __init__(
        self,
        run: RunDir,
        inventory: Inventory,
        model: MEDConfig,
        *,
        batch_size: int,
        seed: int,
        use_features: bool,
        train: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepares the order; reads nothing yet.

        Args:
            run: the run folder.
            inventory: the pairs.
            model: gives the picture size and the tower's normalisation.
            batch_size: pictures a step, over all ranks.
            seed: of the order, the texts drawn and the augmentation.
            use_features: read `features/` instead of decoding pictures.
            train: augment pictures and draw a text a picture; else the first text.
            rank: of this process; it gets every `world_size`-th row of a batch.
            world_size: processes.
        """
        self.run, self.inventory, self.model = run, inventory, model
        self.batch_size, self.seed, self.use_features = batch_size, seed, use_features
        self.train, self.rank, self.world_size = train, rank, world_size
        self._window: tuple[list[str], dict[str, pa.Table]] | None = None

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields batches from a step on, for ever; the last, smaller batch of an epoch is left out."""
        per_epoch = max(1, len(self.inventory) // self.batch_size)
        step = start_step
        while True:
            epoch, offset = divmod(step, per_epoch)
            for position, members in enumerate(self._epoch(epoch)):
                if position < offset:
                    continue
                yield self._load(members, epoch, step)
                step += 1

    def in_order(self) -> Iterator[Batch]:
        """Yields every picture once, in order, the last batch as it comes (for validation)."""
        members = [(name, i) for name, rows in self.inventory.shards.items() for i in range(len(rows))]
        for start in range(0, len(members), self.batch_size):
            yield self._load(members[start : start + self.batch_size], 0, 0)

    def _epoch(self, epoch: int) -> Iterator[list[tuple[str, int]]]:
        """Batches of (shard, position in the shard's usable rows), shuffled inside windows of shards."""
        rng = np.random.default_rng([self.seed, epoch])
        names = list(self.inventory.shards)
        pending: list[tuple[str, int]] = []
        given = 0
        window: list[tuple[str, int]] = []
        size = min(self.batch_size, len(self.inventory))
        order = [names[i] for i in rng.permutation(len(names))]
        for number, name in enumerate(order):
            window += [(name, i) for i in range(len(self.inventory.shards[name]))]
            if len(window) < WINDOW_ROWS and number < len(order) - 1:
                continue
            pending += [window[i] for i in rng.permutation(len(window))]
            window = []
            while len(pending) >= size:
                yield pending[:size]
                pending = pending[size:]
                given += 1

    def _load(self, members: list[tuple[str, int]], epoch: int, step: int) -> Batch:
        members = members[self.rank :: self.world_size]
        rng = np.random.default_rng([self.seed, 1, step, self.rank])
        captions, keys, features, pictures = [], [], [], []
        for name, position in members:
            texts = self.inventory.captions[name][position]
            captions.append(texts[int(rng.integers(len(texts)))] if self.train else texts[0])
            table = self._table(name)
            row = int(self.inventory.shards[name][position])
            keys.append(table["key"][row].as_py())
            if self.use_features:
                raw = np.frombuffer(table["tokens"][row].as_buffer(), np.float16)
                features.append(raw.reshape(self.model.image_tokens, self.model.image_width))
            else:
                picture = open_rgb(table["image"][row].as_py())
                if self.train:
                    picture = augment(picture, rng, self.model.image_size_px)
                pictures.append(
                    pixels([picture], self.model.image_size_px, self.model.image_tower)
                )
        ids = [int(hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), 16) >> 1 for key in keys]
        return Batch(
            keys=keys,
            image_ids=torch.tensor(ids),
            captions=captions,
            human=torch.tensor([name.startswith("human") for name, _ in members]),
            features=torch.from_numpy(np.stack(features)).float() if features else None,
            pixels=torch.cat(pictures) if pictures else None,
        )

    def _table(self, name: str) -> dict[str, pa.Array]:
        if self._window is None:
            self._window = ([], {})
        names, tables = self._window
        if name not in tables:
            held = sum(len(table["key"]) for table in tables.values())
            columns = ["key", "tokens"] if self.use_features else ["key", "image"]
            read = Shard(self.run, name).read("features" if self.use_features else "images", columns)
            if self.use_features:
                read = _aligned(read, self.run, name)
            while names and held + read.num_rows > 2 * WINDOW_ROWS:
                held -= len(tables.pop(names.pop(0))["key"])
            names.append(name)
            tables[name] = {column: read.column(column).combine_chunks() for column in columns}
        return tables[name]


def _aligned(features: pa.Table, run: RunDir, name: str) -> pa.Table:
    """Features in the rows of `images/` (pictures that can't be used have none)."""
    keys = Shard(run, name).read("images", ["key"]).column("key")
    rows = pa.compute.index_in(keys, value_set=features.column("key").combine_chunks())
    return pa.table({"key": keys, "tokens": features.column("tokens").combine_chunks().take(rows)})

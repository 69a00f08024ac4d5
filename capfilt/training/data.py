"""What a training reads of a run: pictures (or their cached features) and texts, in a seeded order.

Pictures and texts are read a window of shards at a time and shuffled inside it, so that memory
holds a window of them however large the run is; of all others only 16 bytes each, which say that
they can be used. A set that fits one window is read once.

Dimensions: B batch, P image tokens, Dv width of the image tower.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from capfilt.errors import ConfigError, InputError
from capfilt.models.images import augment, one_ahead, open_stored, pixels
from capfilt.models.med_config import MEDConfig
from capfilt.models.tokens import MAX_WORDS, clean
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)

WINDOW_ROWS = 20_000
"""Pictures shuffled together, and held in memory, at a time: 2.5 GB of Lite0's features
at 224 px, or of encoded pictures of 125 kB. A larger shard is a window of its own."""

Member = tuple[str, int]
"""A picture: its shard, and its position among the shard's usable rows."""


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
        whole: captions of the whole batch, when this is a slice of it (gradient accumulation).
    """

    keys: list[str]
    image_ids: Tensor
    captions: list[str]
    human: Tensor
    features: Tensor | None
    pixels: Tensor | None
    whole: list[str] | None = None


@dataclass(frozen=True)
class Inventory:
    """What a run holds for training: which rows of `images/` are usable pairs.

    Attributes:
        run: the run folder.
        shards: names of the shards with usable pairs, with the usable rows of each.
        image_ids: int64, of each usable row, by shard: equal where the pictures' bytes are.
        max_words: texts are cut to so many words.
        skipped: rows that can't be used, by reason.
        examples: a few keys of those, by reason.
    """

    run: RunDir
    shards: dict[str, np.ndarray]
    image_ids: dict[str, np.ndarray]
    max_words: int = MAX_WORDS
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of usable pictures."""
        return sum(len(rows) for rows in self.shards.values())

    def texts(self) -> Iterator[list[str]]:
        """The cleaned texts of each usable picture, in order; reads the tables."""
        for name, rows in self.shards.items():
            column = Shard(self.run, name).read("images", ["captions"])["captions"]
            for texts in column.take(pa.array(rows)):
                yield cleaned(texts, self.max_words)

    def captions(self) -> Iterator[str]:
        """Every usable text, in order; reads the tables."""
        return (text for own in self.texts() for text in own)

    def split(self, fraction: float, seed: int) -> "tuple[Inventory, Inventory]":
        """Splits pictures by a hash of their key: about `fraction` of them go to the second part.

        Raises:
            InputError: the first part has fewer than two pictures.
        """
        parts = []
        for held_out in (False, True):
            part = Inventory(self.run, {}, {}, self.max_words)
            for name, rows in self.shards.items():
                chosen = [
                    i
                    for i, row in enumerate(rows)
                    if (_unit(seed, name, row) < fraction) == held_out
                ]
                if chosen:
                    part.shards[name] = rows[chosen]
                    part.image_ids[name] = self.image_ids[name][chosen]
            parts.append(part)
        parts[0].skipped.update(self.skipped)
        parts[0].examples.update(self.examples)
        if fraction and len(parts[1]) < 2:
            log.warning(
                "val_fraction: %s of %d pictures holds out %d, too few to measure: the last "
                "weights are kept and patience does nothing; raise it",
                fraction,
                len(self),
                len(parts[1]),
            )
        if len(parts[0]) < 2:
            raise InputError(
                f"val_fraction: {fraction} of {len(self)} pictures held out leaves {len(parts[0])} "
                "to train on; lower it, or give more pictures"
            )
        return parts[0], parts[1]


def _unit(seed: int, name: str, row: int) -> float:
    return _hash(f"{seed}|{name}|{row}") / 2**64


def _hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def cleaned(texts: pa.ListScalar, max_words: int) -> list[str]:
    """The texts of a picture that can be used: cleaned, without those of which nothing is left."""
    return [text for text in (clean(text or "", max_words) for text in texts.as_py() or []) if text]


def take_inventory(run: RunDir, sources: tuple[str, ...], max_words: int = MAX_WORDS) -> Inventory:
    """Lists the usable pairs of some sources; what can't be used is counted and named.

    Raises:
        InputError: fewer than two usable pictures are left.
    """
    inventory = Inventory(run, {}, {}, max_words)
    for name in run.shards("images", sources):
        columns = ["key", "reason", "sha256"]
        table = Shard(run, name).read("images", [*columns, "captions"])
        rows, ids = [], []
        listed = zip(*table.select(columns).to_pydict().values(), strict=True)
        for row, (key, reason, sha256) in enumerate(listed):
            if reason is None and not cleaned(table["captions"][row], max_words):
                reason = "empty_caption"
            if reason is not None:
                inventory.skipped[reason] += 1
                inventory.examples.setdefault(reason, [])
                if len(inventory.examples[reason]) < 3:
                    inventory.examples[reason].append(key)
                continue
            rows.append(row)
            ids.append(int(sha256[:16], 16) >> 1 if sha256 else _hash(key) >> 1)
        if rows:
            inventory.shards[name] = np.array(rows)
            inventory.image_ids[name] = np.array(ids)
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
    """Endless seeded batches of an inventory, from any step on."""

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
        crop_scale: tuple[float, float] = (0.5, 1.0),
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
            crop_scale: share of a picture's area that an augmented one shows (`images.augment`).
        """
        self.run, self.inventory, self.model = run, inventory, model
        self.batch_size, self.seed, self.use_features = batch_size, seed, use_features
        self.train, self.crop_scale = train, crop_scale
        self._held: dict[str, _Pictures] = {}

    def batches(
        self, start_step: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yields batches from a step on, for ever; the last, smaller batch of an epoch is left out.

        What a row holds depends on the seed, the step and its place in the batch only. A rank gets
        its part of the rows, and all ranks' parts in order are the batch of a single process.

        Args:
            start_step: steps that a stopped training has done.
            rank: of this process.
            world_size: processes.

        Raises:
            ConfigError: the batch does not divide by the number of processes.
        """
        size = min(self.batch_size, len(self.inventory))
        if size % world_size:
            raise ConfigError(
                f"batch_size: a batch of {size} pictures does not divide by {world_size} "
                "processes; set it to a multiple, or start another number of processes"
            )
        steps = self._steps(start_step, rank * size // world_size, size // world_size)
        return one_ahead(steps, self._load)

    def in_order(self) -> Iterator[Batch]:
        """Yields every picture once, in order, the last batch as it comes (for validation)."""
        members = [
            (name, i) for name, rows in self.inventory.shards.items() for i in range(len(rows))
        ]
        parts = (members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size))
        steps = (_Step(part, {name for name, _ in part}, 0, 0) for part in parts)
        return one_ahead(steps, self._load)

    def _steps(self, start_step: int, first: int, count: int) -> "Iterator[_Step]":
        per_epoch = max(1, len(self.inventory) // self.batch_size)
        epoch, done = divmod(start_step, per_epoch)
        step = start_step
        while True:
            for position, (members, window) in enumerate(self._epoch(epoch)):
                if position >= done:
                    yield _Step(members[first : first + count], window, step, first)
                    step += 1
            epoch, done = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[tuple[list[Member], set[str]]]:
        """An epoch's batches, shuffled inside windows of shards, with the shards of the window."""
        rng = np.random.default_rng([self.seed, epoch])
        names = list(self.inventory.shards)
        size = min(self.batch_size, len(self.inventory))
        pending: list[Member] = []
        for window in self._windows([names[i] for i in rng.permutation(len(names))]):
            rows = [(name, i) for name in window for i in range(len(self.inventory.shards[name]))]
            pending += [rows[i] for i in rng.permutation(len(rows))]
            while len(pending) >= size:
                yield pending[:size], set(window)
                pending = pending[size:]

    def _windows(self, names: list[str]) -> Iterator[list[str]]:
        window: list[str] = []
        rows = 0
        for name in names:
            more = len(self.inventory.shards[name])
            if window and rows + more > WINDOW_ROWS:
                yield window
                window, rows = [], 0
            window.append(name)
            rows += more
        yield window

    def _load(self, step: "_Step", decoders: ThreadPoolExecutor) -> Batch:
        # of earlier windows only what this batch still needs stays in memory
        needed = step.window | {name for name, _ in step.members}
        self._held = {name: held for name, held in self._held.items() if name in needed}
        rngs = [
            np.random.default_rng([self.seed, 1, step.number, step.first_row + i])
            for i in range(len(step.members))
        ]
        keys, captions, values = [], [], []
        for (name, position), rng in zip(step.members, rngs, strict=True):
            if name not in self._held:
                self._held[name] = self._read(name)
            held = self._held[name]
            texts = cleaned(held.captions[position], self.inventory.max_words)
            captions.append(texts[int(rng.integers(len(texts)))] if self.train else texts[0])
            keys.append(held.keys[position].as_py())
            values.append(held.values[int(held.rows[position])])
        features = pictures = None
        if self.use_features:
            shape = (self.model.image_tokens, self.model.image_width)
            raw = [np.frombuffer(value.as_buffer(), np.float16).reshape(shape) for value in values]
            features = torch.from_numpy(np.stack(raw).astype(np.float32))
        else:
            shards = [name for name, _ in step.members]
            data = (value.as_py() for value in values)
            decoded = list(decoders.map(self._picture, data, rngs, shards, keys))
            pictures = pixels(decoded, self.model.image_size_px, self.model.image_tower)
        return Batch(
            keys=keys,
            image_ids=torch.tensor([int(self.inventory.image_ids[n][i]) for n, i in step.members]),
            captions=captions,
            human=torch.tensor([name.startswith("human") for name, _ in step.members]),
            features=features,
            pixels=pictures,
        )

    def _picture(self, data: bytes, rng: np.random.Generator, shard: str, key: str) -> Image.Image:
        picture = open_stored(data, self.run.table("images", shard), key)
        if not self.train:
            return picture
        return augment(picture, rng, self.model.image_size_px, self.crop_scale)

    def _read(self, name: str) -> "_Pictures":
        """A shard's usable pictures, or their features, with their texts."""
        rows = self.inventory.shards[name]
        columns = ["key", "captions"] + ["image"] * (not self.use_features)
        images = Shard(self.run, name).read("images", columns)
        keys, captions = (
            images[column].combine_chunks().take(pa.array(rows)) for column in columns[:2]
        )
        if not self.use_features:
            return _Pictures(keys, captions, _bytes(images["image"]), rows)
        features = Shard(self.run, name).read("features", ["key", "tokens"])
        places = pa.compute.index_in(keys, value_set=features["key"].combine_chunks())
        if places.null_count:
            missing = keys[places.is_null().to_pylist().index(True)]
            raise InputError(
                f"{self.run.table('features', name)} has no features of {places.null_count} "
                f"pictures, {missing} for one; delete it and its manifest and run "
                "`capfilt features CONFIG`"
            )
        return _Pictures(keys, captions, _bytes(features["tokens"]), places.to_numpy())


def _bytes(column: pa.ChunkedArray) -> pa.LargeBinaryArray:
    # 64-bit offsets: the pictures of one shard may well be more than 2 GB
    return column.cast(pa.large_binary()).combine_chunks()


@dataclass(frozen=True)
class _Step:
    """What one batch is made of: pictures, the shards to keep, the step, the place of row 0."""

    members: list[Member]
    window: set[str]
    number: int
    first_row: int


@dataclass(frozen=True)
class _Pictures:
    """A shard in memory: key and texts of its usable rows, the file's values, each row's place."""

    keys: pa.Array
    captions: pa.ListArray
    values: pa.Array
    rows: np.ndarray

"""`ingest`: pictures that are on disk, with a list of their texts, become `images/`."""

import os
import stat
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from capfilt.config import Config, Human, Web
from capfilt.errors import InputError
from capfilt.schema import IMAGES
from capfilt.shards import Shard
from capfilt.stage import Transform
from capfilt.stages.lists import (
    CAPTION_COLUMNS,
    caption_lists,
    check_places,
    check_texts,
    find_column,
    read_list,
    shard_names,
    shard_rows,
    text_column,
    warn_of_line_breaks,
)
from capfilt.stages.pictures import (
    Limits,
    Picture,
    images_table,
    in_threads,
    inspect,
    not_fetched,
)

Source = Literal["human", "web"]


class IngestConfig(BaseModel):
    """What of the config decides the output."""

    model_config = ConfigDict(frozen=True)

    image_column: str
    caption_column: str | None
    limit: int | None
    shard_size: int
    min_side_px: int
    max_area_px: int
    max_side_px: int | None


@dataclass(frozen=True)
class _Input:
    """A checked list: the columns that matter, and the folder of the pictures."""

    table: pa.Table
    image_column: str
    caption_column: str
    path: str
    folder: Path


def list_shards(config: Config, source: Source) -> list[str]:
    """The shards that the list of a source makes.

    Raises:
        InputError: the list or the folder of pictures is missing, or a column of the list.
    """
    rows = _open_list(config, source).table.num_rows
    return shard_names(source, rows, config.download.shard_size)


def first_pictures(config: Config, source: Source, count: int) -> tuple[Path, list[str]]:
    """The folder of a source's pictures, and the paths in it that the first rows of its list name.

    Raises:
        InputError: the list or the folder of pictures is missing, or a column of the list.
    """
    listed = _open_list(config, source)
    return listed.folder, [
        path or "" for path in text_column(listed.table.slice(0, count), listed.image_column)
    ]


def section_of(config: Config, source: Source) -> Human | Web:
    """The config's section of a source.

    Raises:
        InputError: the run has no human pairs.
    """
    section = config.human if source == "human" else config.web
    if section is None:
        raise InputError("human: not set, so there are no human pairs")
    return section


def _open_list(config: Config, source: Source) -> _Input:
    section = section_of(config, source)
    if section.pairs is None:
        raise InputError(f"{source}.pairs: not set, so there is nothing to ingest")
    path = section.pairs
    table = read_list(path, f"{source}.pairs", section.limit)
    image_column = find_column(table, (section.image_column,), path, f"{source}.image_column")
    check_places(table, image_column, path, f"{source}.image_column")
    wanted = (section.caption_column,) if section.caption_column else CAPTION_COLUMNS
    caption_column = find_column(table, wanted, path, f"{source}.caption_column")
    check_texts(table, caption_column, path, f"{source}.caption_column")
    folder = Path(section.images) if section.images is not None else Path(path).parent
    if not folder.is_dir():
        raise InputError(
            f"{source}.images: folder {str(folder)!r} is not there; give the folder that the paths "
            f"in {path} start from"
        )
    return _Input(table, image_column, caption_column, path, folder)


@dataclass(frozen=True)
class IngestStage:
    """Reads the pictures of a list from disk.

    A row of the list is a row of the table, with one text or several. The identity covers the list
    and not the pictures' bytes (each row has their digest): who exchanges pictures under the same
    names deletes the manifests of the shards to read them again.

    Attributes:
        settings: the run's whole config.
        source: which section of it, `human` or `web`.
    """

    settings: Config
    source: Source

    name: str = field(default="ingest", init=False)
    table: str = field(default="images", init=False)
    schema: pa.Schema = field(default=IMAGES, init=False, repr=False)
    reads: tuple[str, ...] = field(default=(), init=False)
    reads_all: tuple[str, ...] = field(default=(), init=False)
    count_by: str | None = field(default="reason", init=False)
    cheap: bool = field(default=False, init=False)

    @property
    def version(self) -> int:
        """2 where pictures are shrunk: 16-bit ones came out white, and thin ones too thin."""
        return 1 if self.settings.download.max_side_px is None else 2

    @property
    def sources(self) -> tuple[str, ...]:
        """Only its own source."""
        return (self.source,)

    @property
    def config(self) -> IngestConfig:
        """What decides the output: the columns, and what is taken of the pictures."""
        section = section_of(self.settings, self.source)
        download = self.settings.download
        return IngestConfig(
            image_column=section.image_column,
            caption_column=section.caption_column,
            limit=section.limit,
            shard_size=download.shard_size,
            min_side_px=download.min_side_px,
            max_area_px=download.max_area_px,
            max_side_px=download.max_side_px,
        )

    def weights(self) -> dict[str, Path]:
        """The list: its digest is part of the identity."""
        pairs = section_of(self.settings, self.source).pairs
        return {"pairs": Path(pairs)} if pairs is not None else {}

    def citation(self) -> dict[str, Any]:
        """How many shards the list makes: later steps know by it when one is not finished."""
        return {"list_shards": len(list_shards(self.settings, self.source))}

    def open(self, device: str) -> Transform:
        """Reads the list; the function that it returns reads a shard's pictures."""
        listed = _open_list(self.settings, self.source)
        warn_of_line_breaks(listed.table, listed.image_column, listed.path)
        return partial(self._read_shard, listed)

    def _read_shard(self, listed: _Input, shard: Shard) -> pa.Table:
        config = self.config
        rows = shard_rows(listed.table, shard.name, config.shard_size)
        paths = text_column(rows, listed.image_column)
        limits = Limits(config.min_side_px, config.max_area_px, config.max_side_px)
        pictures = in_threads(
            partial(_read_picture, listed.folder, limits=limits),
            paths,
            self.settings.download.threads,
        )
        captions = caption_lists(rows, listed.caption_column)
        return images_table(shard.name, self.source, paths, captions, pictures)


def is_inside(path: str) -> bool:
    """Whether a path of a list stays inside the images folder."""
    parts = os.path.normpath(path).split(os.sep)
    return not os.path.isabs(path) and parts[0] != os.pardir


def _read_picture(folder: Path, path: str | None, limits: Limits) -> Picture:
    if not path:
        return not_fetched("the row names no file")
    if not is_inside(path):
        return Picture("image_unreadable", "outside the images folder")
    try:
        with open(folder / os.path.normpath(path), "rb", opener=_open_regular) as file:
            data = file.read()
    except FileNotFoundError:
        return not_fetched("no such file")
    except (OSError, ValueError) as error:
        return not_fetched(getattr(error, "strerror", None) or str(error))
    return inspect(data, limits)


def _open_regular(path: str, flags: int) -> int:
    """Opens regular files only: a pipe or device would block or never end."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file")
    return descriptor

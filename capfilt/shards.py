"""Shards on disk: their paths, reading them, and writing them so that no half is ever seen.

A path may be any that fsspec understands (`runs/demo`, `s3://bucket/run`).
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from capfilt.errors import InputError, UsageError

ROWS_A_GROUP = 1000
"""Rows of a Parquet row group: what readers such as `datasets` hold in memory at once."""

PICTURES_A_GROUP = 100
"""Rows of a row group of `images/`: what is read for one picture of the review page."""

LOCK = "run.lock"
"""The file in a run folder that names the process which writes into it."""

SHARD_NAME = re.compile(r"^(web|human)-\d{5,}$")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run; each stage owns a folder in it.

    Attributes:
        path: local path or fsspec URL.
    """

    path: str

    @cached_property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.path)[0]

    def at(self, *parts: str) -> str:
        """The path of something in the run folder."""
        return "/".join([self.path.rstrip("/"), *parts])

    def local(self, *parts: str) -> str:
        """The same, for what must lie on a local disk (models, the raw download).

        Raises:
            InputError: the run folder is remote.
        """
        if not self.is_local:
            raise InputError(
                f"run_dir {self.path!r} is remote: downloads and models need a local folder; set a "
                "local one, and copy export/ to where it shall be when the run is done"
            )
        return self.at(*parts).removeprefix("file://")

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.path or self.path.startswith("file://")

    def table(self, table: str, shard: str) -> str:
        """The Parquet file of a shard's table."""
        return self.at(table, f"{shard}.parquet")

    def manifest(self, table: str, shard: str) -> str:
        """The manifest that signs a shard's table."""
        return self.at(table, f"{shard}.manifest.json")

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self._fs.exists(path))

    def shards(
        self, table: str = "images", sources: tuple[str, ...] = ("web", "human")
    ) -> list[str]:
        """Names of the signed shards of a table, sorted."""
        if not self.exists(self.at(table)):
            return []
        found = []
        for path in self._fs.ls(self.at(table), detail=False):
            name = os.path.basename(path)
            if name.endswith(".manifest.json"):
                shard = name.removesuffix(".manifest.json")
                if SHARD_NAME.match(shard) and shard.split("-")[0] in sources:
                    found.append(shard)
        return sorted(found)

    def read_text(self, path: str) -> str:
        """A small text file, whole."""
        with self._fs.open(path, "r", encoding="utf-8") as file:
            return str(file.read())

    def write_text(self, path: str, text: str) -> None:
        """Writes a text file by rename, so that a reader sees all of it or nothing."""
        self._write(path, lambda file: file.write(text.encode()))

    def write_table(
        self,
        path: str,
        table: pa.Table,
        rows_a_group: int = ROWS_A_GROUP,
        *,
        unsign: str | None = None,
    ) -> str:
        """Writes a Parquet file by rename.

        Args:
            path: of the file.
            table: what it holds.
            rows_a_group: rows of a row group, at most.
            unsign: the manifest of what the file replaces; removed at the last moment, since an
                old signature must not stand beside a new table.

        Returns:
            The sha256 of what was written, hex.
        """

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
                # no group at all when it is empty: `datasets` can't read a group without rows
                if table.num_rows:
                    writer.write_table(table, row_group_size=rows_a_group)

        return self._write(path, write, unsign)

    def digest(self, path: str) -> str:
        """The sha256 of a file, hex."""
        with self._fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def remove(self, path: str) -> None:
        """Deletes a file or a folder with what is in it, if it is there."""
        if self.exists(path):
            self._fs.rm(path, recursive=True)

    def remove_unfinished(self, start: str) -> None:
        """Deletes what killed processes left of writing files whose paths begin with `start`.

        Only in a local folder, which is locked: elsewhere another process may be writing them.
        """
        folder, prefix = os.path.split(start)
        if not self.is_local or not self.exists(folder):
            return
        for path in self._fs.ls(folder, detail=False):
            name = os.path.basename(path)
            if name.startswith(prefix) and name.endswith(".tmp"):
                self._fs.rm(path)

    def _write(
        self, path: str, write: Callable[[BinaryIO], object], unsign: str | None = None
    ) -> str:
        self._fs.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with self._fs.open(temporary, "wb") as file:
                write(file)
                if isinstance(self._fs, LocalFileSystem):
                    file.flush()
                    os.fsync(file.fileno())
            # before the rename: under the final name another process could have put its own
            digest = self.digest(temporary)
            if unsign is not None:
                self.remove(unsign)
            self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm(temporary)
            raise
        return digest


@contextlib.contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Lets one process at a time write into a run folder; reading needs no lock.

    A process that ends, in whatever way, holds the lock no longer. A remote folder is not locked,
    nor is one on a file system that knows no locks.

    Raises:
        UsageError: another process is writing into it.
    """
    if not run.is_local:
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(run.local())
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text(encoding="utf-8") if path.exists() else ""
        raise UsageError(
            f"{run.path} is being written by {holder or 'another process'}: wait until it has "
            "ended, or choose another run_dir"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


@dataclass(frozen=True)
class Shard:
    """One shard of a run, seen by a stage: the tables that lie under its name."""

    run: RunDir
    name: str

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a table of this shard.

        Args:
            table: its folder in the run (`images`, `captions`, …).
            columns: which to read; all by default.

        Raises:
            InputError: the file is missing or isn't readable Parquet.
        """
        path = self.run.table(table, self.name)
        try:
            with fsspec.open(path, "rb") as file:
                # Arrow's threads would let go of the Python file when they like: at the
                # interpreter's end that aborts the process
                return pq.ParquetFile(file, pre_buffer=False).read(columns, use_threads=False)
        except FileNotFoundError:
            raise InputError(
                f"{path} is missing although its manifest is there: run the step that writes "
                f"{table}/ again, or `capfilt run CONFIG`"
            ) from None
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{path} can't be read ({error}); delete it and its manifest to redo it"
            ) from None

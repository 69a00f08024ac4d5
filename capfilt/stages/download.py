"""`download`: the URLs of the web list become `images/`, fetched by img2dataset.

img2dataset works on many shards at once and starts slowly, so it is run as a child process for
many pending shards together (`AT_ONCE`). What it leaves (one raw Parquet file a shard, bytes as
fetched) is then checked and put in order shard by shard.
"""

import json
import logging
import os
import shutil
import signal
import string
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from capfilt import manifest
from capfilt.config import Config, Download
from capfilt.errors import PartialError
from capfilt.schema import IMAGES
from capfilt.shards import RunDir, Shard
from capfilt.stage import Transform, identify, identify_shared
from capfilt.stages.lists import (
    CAPTION_COLUMNS,
    caption_lists,
    check_places,
    check_texts,
    find_column,
    first_row,
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

log = logging.getLogger(__name__)

AT_ONCE = 200_000
"""Rows of the list that one run of img2dataset fetches, if a shard isn't larger: what it leaves is
on disk a second time until it is put in order, and nothing is finished before."""

CHILD = """
import json, os, signal, sys, threading

def follow_parent():
    # standard input ends when the parent does, however it ends
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)

options = json.loads(sys.stdin.readline())
threading.Thread(target=follow_parent, daemon=True).start()
from img2dataset import download
download(**options)
"""
"""The program of the child process; it leads a process group of its own."""


class ListConfig(BaseModel):
    """What of the config's `web` section decides the output."""

    model_config = ConfigDict(frozen=True)

    url_column: str
    caption_column: str | None
    limit: int | None


class DownloadConfig(Download):
    """What of the config decides the output."""

    web: ListConfig


@dataclass(frozen=True)
class _Input:
    """A checked list, and its columns that matter."""

    table: pa.Table
    url_column: str
    caption_column: str
    path: str


def list_shards(config: Config) -> list[str]:
    """The shards that the list of URLs makes.

    Raises:
        InputError: the list is missing, or a column of it.
    """
    return shard_names("web", _open_list(config).table.num_rows, config.download.shard_size)


def _open_list(config: Config) -> _Input:
    web = config.web
    assert web.urls is not None, "download runs only with web.urls"
    table = read_list(web.urls, "web.urls", web.limit)
    url_column = find_column(table, (web.url_column,), web.urls, "web.url_column")
    check_places(table, url_column, web.urls, "web.url_column")
    wanted = (web.caption_column,) if web.caption_column else CAPTION_COLUMNS
    caption_column = find_column(table, wanted, web.urls, "web.caption_column")
    check_texts(table, caption_column, web.urls, "web.caption_column")
    return _Input(table, url_column, caption_column, web.urls)


@dataclass(frozen=True)
class DownloadStage:
    """Fetches the pictures of `web.urls`; a URL that fails is a row with a reason.

    The identity covers the whole list. What a URL answers is outside of it: a dead link stays dead
    in the books until it is retried.

    Attributes:
        run: the run folder, which must be local.
        settings: the run's whole config.
        retry: shards of which only the pictures that could not be fetched are fetched, once more;
            all others stay as they are. Without any, whole shards are fetched.
    """

    run: RunDir
    settings: Config
    retry: tuple[str, ...] = ()

    name: str = field(default="download", init=False)
    table: str = field(default="images", init=False)
    schema: pa.Schema = field(default=IMAGES, init=False, repr=False)
    reads: tuple[str, ...] = field(default=(), init=False)
    reads_all: tuple[str, ...] = field(default=(), init=False)
    sources: tuple[str, ...] = field(default=("web",), init=False)
    count_by: str | None = field(default="reason", init=False)
    cheap: bool = field(default=False, init=False)

    @property
    def version(self) -> int:
        """2 where pictures are shrunk: 16-bit ones came out white, and thin ones too thin."""
        return 1 if self.settings.download.max_side_px is None else 2

    @property
    def config(self) -> DownloadConfig:
        """What decides the output: the download options, and how the list is read."""
        web = self.settings.web
        listing = ListConfig(
            url_column=web.url_column, caption_column=web.caption_column, limit=web.limit
        )
        return DownloadConfig(**self.settings.download.model_dump(), web=listing)

    def weights(self) -> dict[str, Path]:
        """The list: its digest is part of the identity."""
        return {"urls": Path(str(self.settings.web.urls))}

    def citation(self) -> dict[str, Any]:
        """How many shards the list makes: later steps know by it when one is not finished."""
        return {"list_shards": len(list_shards(self.settings))}

    def open(self, device: str) -> Transform:
        """Reads the list; the function that it returns starts img2dataset when it needs to."""
        if self.retry:
            return _Retry(self, Path(self.run.local("download")) / "retry").convert
        listed = _open_list(self.settings)
        warn_of_line_breaks(listed.table, listed.url_column, listed.path)
        return _Fetch(self, listed, Path(self.run.local("download"))).convert

    def pending(self) -> list[str]:
        """The shards that are not signed with this identity."""
        shards = list_shards(self.settings)
        shared = identify_shared(self, self.run)
        return [
            shard
            for shard in shards
            if not manifest.is_done(
                self.run,
                self.run.manifest(self.table, shard),
                identify(self, self.run, shard, shared),
                table=self.run.table(self.table, shard),
                stale_is_pending=True,
            )
        ]

    def with_failures(self) -> tuple[str, ...]:
        """The finished shards that hold a picture which could not be fetched.

        Raises:
            MismatchError: a shard was downloaded with another config.
        """
        shared = identify_shared(self, self.run)
        found = []
        for shard in list_shards(self.settings):
            path, made = self.run.manifest(self.table, shard), self.run.table(self.table, shard)
            identity = identify(self, self.run, shard, shared)
            if manifest.is_done(self.run, path, identity, table=made):
                record = manifest.read(self.run, path)
                if record is not None and record["counts"].get("download_failed"):
                    found.append(shard)
        return tuple(found)


class _Fetch:
    """One opening of the stage: the raw download, and the conversion of its shards.

    Beside the raw shards lies a plan that says which shard of the run each one is, and under which
    identity. A run that was killed goes on with the raw shards that were finished.
    """

    def __init__(self, stage: DownloadStage, listed: _Input, folder: Path) -> None:
        self.stage = stage
        self.listed = listed
        self.raw = folder / "raw"
        self.plan = folder / "plan.json"
        self.urls = folder / "urls.parquet"
        self.log = folder / "img2dataset.log"
        shared = identify_shared(stage, stage.run)
        self.fingerprint = identify(stage, stage.run, "", shared).fingerprint
        self.waiting = stage.pending()

    def convert(self, shard: Shard) -> pa.Table:
        """The `images/` table of a shard; fetches it, and the pending ones after it, if need be.

        Raises:
            PartialError: img2dataset did not finish the shard.
        """
        raw = self._raw_shard(shard.name)
        if raw is None and shard.name in self.waiting:
            self._fetch_from(shard.name)
            raw = self._raw_shard(shard.name)
        if raw is None:
            raise PartialError(
                f"img2dataset did not finish shard {shard.name} ({self.log} says why); "
                "the same command again goes on from here"
            )
        table = self._convert(shard.name, raw)
        # gone before the table is signed: a run killed in between fetches this shard once more
        raw.unlink()
        if not any(self.raw.glob("*.parquet")):
            shutil.rmtree(self.raw)
            self.plan.unlink()
            self.urls.unlink(missing_ok=True)
        return table

    def _raw_shard(self, shard: str) -> Path | None:
        """The raw file of a shard, if img2dataset finished it under the same identity."""
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
            number = plan["shards"].index(shard)
        except (OSError, ValueError, KeyError):
            return None
        raw = self.raw / f"{number:05d}.parquet"
        return raw if _finished(raw) and plan["fingerprint"] == self.fingerprint else None

    def _fetch_from(self, shard: str) -> None:
        """Runs img2dataset over all rows of a pending shard, and of some after it."""
        download = self.stage.settings.download
        begin = self.waiting.index(shard)
        end = begin + max(1, AT_ONCE // download.shard_size)
        shards, self.waiting = self.waiting[begin:end], self.waiting[end:]
        self.plan.unlink(missing_ok=True)
        shutil.rmtree(self.raw, ignore_errors=True)
        self.raw.mkdir(parents=True)
        rows = [shard_rows(self.listed.table, shard, download.shard_size) for shard in shards]
        urls = text_column(pa.concat_tables(rows), self.listed.url_column)
        # img2dataset cuts this list every shard_size rows: raw shard i is the i-th pending shard
        starts = [first_row(shard, download.shard_size) for shard in shards]
        numbers = [
            start + row
            for start, table in zip(starts, rows, strict=True)
            for row in range(table.num_rows)
        ]
        pq.write_table(
            pa.table({"url": [_fetchable(url) for url in urls], "row": numbers}),
            self.urls,
        )
        plan = {"fingerprint": self.fingerprint, "shards": shards}
        self.plan.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        log.info(
            "img2dataset fetches %d URLs in %d shards; its log is %s",
            len(urls),
            len(shards),
            self.log,
        )
        processes = min(download.processes, len(shards))
        _fetch_raw(self.urls, self.raw, download, processes, self.log)

    def _convert(self, shard: str, raw: Path) -> pa.Table:
        settings = self.stage.settings
        download = settings.download
        listed = shard_rows(self.listed.table, shard, download.shard_size)
        first = first_row(shard, download.shard_size)
        count = listed.num_rows
        urls = text_column(listed, self.listed.url_column)
        lost = not_fetched(f"img2dataset lost this row; see {self.log.name}")
        pictures = [lost] * count
        exif: list[str | None] = [None] * count
        for row, picture, found in _checked(raw, range(first, first + count), download):
            pictures[row - first], exif[row - first] = picture, found
        for position, url in enumerate(urls):
            if not _fetchable(url):
                error = "unsupported URL scheme" if url and url.strip() else "the row has no URL"
                pictures[position] = not_fetched(error)
        captions = caption_lists(listed, self.listed.caption_column)
        return images_table(shard, "web", urls, captions, pictures, exif)


class _Retry:
    """One more try for the pictures of some finished shards that could not be fetched.

    What can't be fetched this time either keeps its row, so a retry that gets nothing changes
    nothing. If it is stopped, the shards that it has not come to are as they were.
    """

    def __init__(self, stage: DownloadStage, folder: Path) -> None:
        self.stage = stage
        self.raw = folder / "raw"
        self.urls = folder / "urls.parquet"
        self.log = folder.parent / "img2dataset.log"
        self.fetched: dict[str, range] | None = None

    def convert(self, shard: Shard) -> pa.Table:
        """The `images/` table of a shard, with what was fetched now.

        Raises:
            PartialError: img2dataset did not come to an end of the shard's pictures.
        """
        if self.fetched is None:
            self.fetched = self._fetch_failed()
        download = self.stage.settings.download
        start = first_row(shard.name, download.shard_size)
        old = shard.read("images")
        pictures = [_stored(row) for row in old.drop_columns(["captions"]).to_pylist()]
        exif = old["exif"].to_pylist()
        places = self.fetched[shard.name]
        size = download.shard_size
        for number in range(places.start // size, -(-places.stop // size)) if places else ():
            raw = self.raw / f"{number:05d}.parquet"
            if not _finished(raw):
                raise PartialError(
                    f"img2dataset did not finish the retry of shard {shard.name} ({self.log} says "
                    "why), which stays as it was; the same command again tries once more"
                )
            for row, picture, found in _checked(raw, range(start, start + len(pictures)), download):
                if picture.reason != "download_failed":
                    pictures[row - start], exif[row - start] = picture, found
        if shard.name == self.stage.retry[-1]:
            shutil.rmtree(self.raw.parent)
        urls, captions = old["url"].to_pylist(), old["captions"].to_pylist()
        return images_table(shard.name, "web", urls, captions, pictures, exif)

    def _fetch_failed(self) -> dict[str, range]:
        """Fetches all of them, and says which places of the list for img2dataset are a shard's."""
        download = self.stage.settings.download
        urls: list[str] = []
        rows: list[int] = []
        places = {}
        for name in self.stage.retry:
            first = first_row(name, download.shard_size)
            start = len(urls)
            table = Shard(self.stage.run, name).read("images", ["url", "reason"])
            for place, row in enumerate(table.to_pylist()):
                if row["reason"] == "download_failed" and _fetchable(row["url"]):
                    urls.append(_fetchable(row["url"]))
                    rows.append(first + place)
            places[name] = range(start, len(urls))
        shutil.rmtree(self.raw.parent, ignore_errors=True)
        self.raw.mkdir(parents=True)
        if urls:
            pq.write_table(pa.table({"url": urls, "row": rows}), self.urls)
            log.info("img2dataset retries %d URLs; its log is %s", len(urls), self.log)
            _fetch_raw(self.urls, self.raw, download, download.processes, self.log)
        return places


def _stored(row: dict[str, Any]) -> Picture:
    """A row of `images/` as the picture, or the reason, that it was made of."""
    names = ("sha256", "original_width", "original_height", "width", "height", "image")
    return Picture(row["reason"], row["error_message"], **{name: row[name] for name in names})


def _finished(raw: Path) -> bool:
    """Whether img2dataset has come to the end of a raw shard."""
    # it writes the statistics after it has closed the pictures' file
    return raw.is_file() and raw.with_name(f"{raw.stem}_stats.json").is_file()


def _checked(
    raw: Path, rows: range, download: Download
) -> Iterator[tuple[int, Picture, str | None]]:
    """Those of a raw shard's pictures that are of some rows of the list: row, picture, EXIF."""
    limits = Limits(download.min_side_px, download.max_area_px, download.max_side_px)
    for batch in pq.ParquetFile(raw).iter_batches(batch_size=100):
        wanted = [row for row in batch.to_pylist() if row["row"] in rows]
        outcomes = in_threads(partial(_check_row, limits=limits), wanted, download.threads)
        for row, picture in zip(wanted, outcomes, strict=True):
            yield row["row"], picture, row["exif"]


def _fetch_raw(urls: Path, raw: Path, download: Download, processes: int, log_file: Path) -> None:
    """Runs img2dataset over a list with the columns `url` and `row`; see `run_img2dataset`."""
    code = run_img2dataset(
        {
            "url_list": str(urls),
            "input_format": "parquet",
            "url_col": "url",
            "save_additional_columns": ["row"],
            "output_folder": str(raw),
            "output_format": "parquet",
            "number_sample_per_shard": download.shard_size,
            "processes_count": processes,
            "thread_count": download.threads,
            "timeout": download.timeout_s,
            "retries": download.retries,
            "user_agent_token": download.user_agent,
            # the bytes as fetched: they are decoded and checked here
            "disable_all_reencoding": True,
            "resize_mode": "no",
            "extract_exif": True,
            "compute_hash": None,
            # the folder is fresh; "overwrite" would delete img2dataset's own scratch folder
            "incremental_mode": "incremental",
        },
        log_file,
    )
    if code:
        log.warning("img2dataset ended with code %d; its log is %s", code, log_file)


def _fetchable(url: str | None) -> str:
    """The URL as img2dataset may have it, or `""`, which it fails without reaching out.

    Only http and https: the library under img2dataset would open `file:` and `ftp:` also. What is
    not ASCII, or a space, is percent-encoded, without which it would refuse the URL.
    """
    url = (url or "").strip()
    if url.split(":", 1)[0].lower() not in ("http", "https"):
        return ""
    return urllib.parse.quote(url, safe=string.punctuation)


def _check_row(row: dict[str, Any], limits: Limits) -> Picture:
    """A raw row of img2dataset as a picture, or the reason why there is none."""
    if row["jpg"] is None:
        return not_fetched(row["error_message"] or row["status"] or "no bytes and no message")
    return inspect(row["jpg"], limits)


def run_img2dataset(options: dict[str, Any], log_file: Path) -> int:
    """Runs `img2dataset.download(**options)` in a child process, to its end.

    The child and its workers die with this process, even if that is killed.

    Args:
        options: the keyword arguments, as JSON values.
        log_file: takes what it prints.

    Returns:
        Its exit code.
    """
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    with open(log_file, "ab") as output:
        child = subprocess.Popen(
            # -P: what lies in the working directory is not imported
            [sys.executable, "-P", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(options).encode() + b"\n")
            child.stdin.flush()
            return child.wait()
        except BrokenPipeError:
            return child.wait()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            child.stdin.close()

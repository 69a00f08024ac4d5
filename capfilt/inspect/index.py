"""A run's pairs as two duckdb tables, `run.pairs` and `run.pictures`.

The Parquet tables are read once into a duckdb file beside them (`.inspect/`, named by the
manifests' fingerprints, so that the next start takes no time).
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from capfilt import manifest
from capfilt.errors import MissingExtraError
from capfilt.manifest import canonical_json
from capfilt.schema import RULE_REASONS
from capfilt.shards import RunDir, Shard

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

LAYOUT = 5
"""Raised when the duckdb file's tables change."""

_THRESHOLD_REASONS = ("kept", *RULE_REASONS)
"""What a threshold that is tried stands in the place of; other reasons hold whatever the score."""


def import_duckdb() -> Any:
    """The duckdb module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise MissingExtraError(
            'the review page needs duckdb, Starlette and uvicorn: pip install "capfilt[inspect]"'
        ) from None
    return duckdb


def prints_of(run: RunDir, shard: str) -> list[Any]:
    """What a shard's tables are known by: their manifests' fingerprints and when they were made."""
    found = []
    for table in ("images", "scores", "decisions"):
        record = manifest.read(run, run.manifest(table, shard))
        found.append([table, record["fingerprint"], record.get("finished")] if record else None)
    return found


def version_of(prints: Mapping[str, list[Any]]) -> str:
    """A digest of all that is read, from `prints_of` each shard."""
    known = canonical_json([LAYOUT, *prints.items()])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def attach(
    connection: "duckdb.DuckDBPyConnection",
    run: RunDir,
    shards: Sequence[str],
    version: str,
    may_write: bool,
) -> None:
    """Attaches the run as `run`, from an earlier call's file or from the tables.

    Args:
        connection: in memory.
        run: the run folder.
        shards: names, in the order in which their rows are numbered.
        version: of what is read, from `version_of`.
        may_write: keep what was read in `<run>/.inspect/`.
    """
    duckdb = import_duckdb()
    folder = None
    if "://" not in run.path:
        folder = Path(run.path) / ".inspect"
        cached = folder / f"{version}.duckdb"
        if cached.is_file():
            try:
                connection.execute(f"ATTACH {_literal(cached)} AS run (READ_ONLY)")
                return
            except duckdb.Error as error:  # of another duckdb, or damaged: read the tables again
                log.warning("%s can't be used (%s)", cached, error)
    if folder is not None and may_write:
        temporary = folder / f"{version}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            folder.mkdir(exist_ok=True)
            for old in folder.glob("*.duckdb"):
                old.unlink()
            connection.execute(f"ATTACH {_literal(temporary)} AS run")
            _fill(connection, run, shards)
            connection.execute("DETACH run")
            os.replace(temporary, cached)
            connection.execute(f"ATTACH {_literal(cached)} AS run (READ_ONLY)")
            return
        except (OSError, duckdb.IOException) as error:
            log.warning("%s can't be written, so nothing is kept there (%s)", folder, error)
            connection.execute("DETACH DATABASE IF EXISTS run")
        finally:
            for left in (temporary, Path(f"{temporary}.wal")):
                left.unlink(missing_ok=True)
    connection.execute("ATTACH ':memory:' AS run")
    _fill(connection, run, shards)


def _literal(path: Path) -> str:
    """A path of our own (never of a request) as an SQL string: ATTACH takes no parameters."""
    return "'" + str(path).replace("'", "''") + "'"


def _fill(connection: "duckdb.DuckDBPyConnection", run: RunDir, shards: Sequence[str]) -> None:
    connection.execute(
        """
        CREATE TABLE run.pictures (
            picture BIGINT, shard INTEGER, position INTEGER, key VARCHAR, url VARCHAR,
            sha256 VARCHAR, status VARCHAR, error_message VARCHAR, width INTEGER, height INTEGER,
            original_width INTEGER, original_height INTEGER, has_image BOOLEAN
        );
        CREATE TEMP TABLE staging (
            row BIGINT, shard INTEGER, picture BIGINT, pair_id VARCHAR, key VARCHAR,
            source VARCHAR, caption VARCHAR, words VARCHAR, uid VARCHAR, itm FLOAT, itc FLOAT,
            keep BOOLEAN, reason VARCHAR, eligible BOOLEAN
        );
        """
    )
    rows = pictures = 0
    quoted = ", ".join(f"'{reason}'" for reason in _THRESHOLD_REASONS)
    for number, name in enumerate(shards):
        shard = Shard(run, name)
        scores = shard.read("scores")
        images = _image_rows(shard, pictures)
        decided = run.exists(run.manifest("decisions", name))
        if decided:
            decisions = shard.read("decisions", ["pair_id", "keep", "reason"])
        else:
            decisions = pa.table(
                {
                    "pair_id": pa.array([], pa.string()),
                    "keep": pa.array([], pa.bool_()),
                    "reason": pa.array([], pa.string()),
                }
            )
        for view, table in (("scores", scores), ("images", images), ("decisions", decisions)):
            connection.register(f"shard_{view}", table)
        connection.execute(
            f"""
            INSERT INTO run.pictures
            SELECT picture, {number}, position, key, url, sha256, status, error_message, width,
                   height, original_width, original_height, has_image
            FROM shard_images ORDER BY position;
            INSERT INTO staging
            SELECT {rows} + row_number() OVER (ORDER BY s.pair_id) - 1, {number},
                   -- a pair whose picture has no row stands alone
                   coalesce(i.picture, -{rows} - row_number() OVER (ORDER BY s.pair_id)),
                   s.pair_id, s.key, s.source, s.caption, lower(s.caption), s.uid,
                   CASE WHEN isnan(s.itm_prob) THEN NULL ELSE s.itm_prob END,
                   CASE WHEN isnan(s.itc_sim) THEN NULL ELSE s.itc_sim END,
                   d.keep, coalesce(d.reason, s.error),
                   CASE WHEN d.reason IS NULL THEN s.error IS NULL
                        ELSE d.reason IN ({quoted}) END
            FROM shard_scores s
            LEFT JOIN shard_decisions d ON d.pair_id = s.pair_id
            LEFT JOIN shard_images i ON i.key = s.key
            ORDER BY s.pair_id;
            """
        )
        for view in ("scores", "images", "decisions"):
            connection.unregister(f"shard_{view}")
        rows += scores.num_rows
        pictures += images.num_rows
    # disagreement: how far apart a pair stands in the two rankings, 0..1
    connection.execute(
        """
        CREATE TABLE run.pairs AS
        SELECT s.*, r.disagreement FROM staging s LEFT JOIN (
            SELECT row, abs(percent_rank() OVER (ORDER BY itm)
                            - percent_rank() OVER (ORDER BY itc))::FLOAT AS disagreement
            FROM staging WHERE itm IS NOT NULL AND itc IS NOT NULL
        ) r ON r.row = s.row
        ORDER BY s.row;
        DROP TABLE staging;
        """
    )


def _image_rows(shard: Shard, first: int) -> pa.Table:
    """What is known of a shard's pictures, without their bytes."""
    names = [
        "key",
        "url",
        "sha256",
        "status",
        "error_message",
        "width",
        "height",
        "original_width",
        "original_height",
    ]
    table = shard.read("images", [*names, "reason"])
    count = table.num_rows
    has_image = pa.array([value is None for value in table["reason"].to_pylist()], pa.bool_())
    return (
        table.select(names)
        .append_column("picture", pa.array(range(first, first + count), pa.int64()))
        .append_column("position", pa.array(range(count), pa.int32()))
        .append_column("has_image", has_image)
    )

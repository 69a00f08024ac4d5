"""Search over the ITC embeddings of a run: by text, by picture, or "more like this".

The table that it reads, `embeddings/<shard>.parquet`, is optional:

| column | type | what |
|---|---|---|
| `id` | string | the picture's `key`, or the text's `pair_id` |
| `kind` | string | `image` or `text` |
| `vector` | fixed-size list of float32 or float16, or binary (float16) | the ITC embedding, [D] |

Texts and pictures share one space (paper, section 3.1), so each kind is searched with either. The
vectors are copied once into one memory-mapped float16 array a kind; a query is then a streamed
product, exact, with a few MB of memory.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import InputError
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)

KINDS = ("image", "text")
TABLE = "embeddings"
MISSING = (
    "This run has no embeddings/ table, so pairs can't be searched by meaning. "
    "The filters above search words."
)

_CHUNK = 32_768


@dataclass(frozen=True)
class Embedder:
    """What turns a query into an ITC embedding; the caller brings the matcher model.

    Attributes:
        text: from a text to its embedding, [D].
        picture: from encoded picture bytes to the picture's embedding, [D].
    """

    text: Callable[[str], np.ndarray]
    picture: Callable[[bytes], np.ndarray]


@dataclass
class _Kind:
    """All vectors of one kind, of unit length."""

    ids: pa.Array
    vectors: np.ndarray  # [N, D] float16, memory-mapped


@dataclass
class Embeddings:
    """The embeddings of a run; read at the first search.

    Attributes:
        run: its folder.
        shards: those that have embeddings.
    """

    run: RunDir
    shards: list[str]
    _kinds: dict[str, _Kind] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def top(
        self, query: np.ndarray, kind: str, count: int = 500, without: str | None = None
    ) -> list[tuple[str, float]]:
        """The most similar ids, best first.

        Args:
            query: embedding, [D]; need not be of unit length.
            kind: what to find, `image` or `text`.
            count: how many.
            without: an id to leave out (the query itself).

        Returns:
            Ids with their cosine similarity; ties in the order of the run.

        Raises:
            InputError: another dimension than the table's, or a query that has no direction.
        """
        found = self._kind(kind)
        query = np.asarray(query, np.float32).reshape(-1)
        total, width = found.vectors.shape
        if total == 0:
            return []
        if query.shape[0] != width:
            raise InputError(
                f"the query's embedding has {query.shape[0]} numbers, and those in "
                f"{self.run.path}/{TABLE} have {width}: they are of another matcher"
            )
        length = float(np.linalg.norm(query))
        if not np.isfinite(length) or length == 0:
            raise InputError("the query has no embedding (all zero, or not finite)")
        query = query / length
        similarity = np.empty(total, np.float32)
        for start in range(0, total, _CHUNK):
            part = found.vectors[start : start + _CHUNK].astype(np.float32)
            similarity[start : start + _CHUNK] = part @ query
        wanted = min(count + (without is not None), total)
        best = np.argpartition(-similarity, wanted - 1)[:wanted]
        best = best[np.lexsort((best, -similarity[best]))]
        ids = found.ids.take(pa.array(best)).to_pylist()
        pairs = zip(ids, similarity[best].tolist(), strict=True)
        return [(name, value) for name, value in pairs if name != without][:count]

    def vector(self, name: str, kind: str) -> np.ndarray | None:
        """The embedding of a picture (its key) or a text (its pair id), [D]; None without one."""
        found = self._kind(kind)
        index = pc.index(found.ids, pa.scalar(name, found.ids.type)).as_py()
        return None if index < 0 else np.asarray(found.vectors[index], np.float32)

    def _kind(self, kind: str) -> _Kind:
        if kind not in KINDS:
            raise InputError(f"kind is {kind[:80]!r}, expected one of {', '.join(KINDS)}")
        with self._lock:
            if kind not in self._kinds:
                self._kinds[kind] = self._load(kind)
            return self._kinds[kind]

    def _load(self, kind: str) -> _Kind:
        """Copies a kind's vectors into one unlinked file that is mapped, shard by shard."""
        ids: list[pa.Array] = []
        width: int | None = None
        total = 0
        # nothing else opens this file, and it goes when the process does
        with tempfile.TemporaryFile(prefix="capfilt-embeddings-") as file:
            for where, names, vectors in self._read(kind):
                if width not in (None, vectors.shape[1]):
                    raise InputError(
                        f"{where}: vectors of {vectors.shape[1]} numbers, and others of {width}; "
                        "score the run again with one matcher"
                    )
                width = vectors.shape[1]
                lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
                vectors = vectors / np.maximum(lengths, 1e-12)
                file.write(np.ascontiguousarray(vectors, np.float16).data)
                ids.append(names)
                total += len(names)
            file.flush()
            if total == 0 or width is None:
                return _Kind(pa.array([], pa.string()), np.empty((0, 0), np.float16))
            mapped = np.memmap(file, np.float16, "r", shape=(total, width))
        return _Kind(pa.concat_arrays(ids), mapped)

    def _read(self, kind: str) -> Iterator[tuple[str, pa.Array, np.ndarray]]:
        for name in self.shards:
            where = f"{TABLE}/{name}"
            table = Shard(self.run, name).read(TABLE)
            columns = ("id", "kind", "vector")
            missing = [column for column in columns if column not in table.column_names]
            if missing:
                raise InputError(f"{where}: columns missing: {missing}")
            table = table.filter(pc.equal(table["kind"], kind)).combine_chunks()
            if table.num_rows:
                ids = table["id"].combine_chunks().cast(pa.string())
                yield where, ids, _matrix(table["vector"].combine_chunks(), where)


def _matrix(column: Any, where: str) -> np.ndarray:
    """A column of vectors as float32, [N, D]."""
    if column.null_count:
        raise InputError(f"{where}: column 'vector' is null in a row")
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        matrix = flat.reshape(len(column), column.type.list_size).astype(np.float32)
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        cells = column.to_pylist()
        if len({len(cell) for cell in cells}) > 1 or len(cells[0]) % 2 or not cells[0]:
            raise InputError(f"{where}: column 'vector' is not float16 of one width in all rows")
        matrix = np.frombuffer(b"".join(cells), np.float16).reshape(len(cells), -1)
        matrix = matrix.astype(np.float32)
    else:
        raise InputError(
            f"{where}: column 'vector' is {column.type}, expected a fixed-size list of floats, "
            "or float16 as binary"
        )
    if not np.isfinite(matrix).all():
        raise InputError(f"{where}: column 'vector' holds NaN or infinity")
    return matrix


def open_embeddings(run: RunDir) -> Embeddings | None:
    """The embeddings of a run, or None where `score` stored none."""
    shards = run.shards(TABLE)
    if not shards and "://" not in run.path and os.path.isdir(run.at(TABLE)):
        log.warning("%s has no signed shards: search by meaning is off", run.at(TABLE))
    return Embeddings(run, shards) if shards else None

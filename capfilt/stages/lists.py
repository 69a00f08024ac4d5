"""Reading the lists that a run starts from: one row a picture, as CSV, TSV, JSONL or Parquet."""

import contextlib
import csv
import json
import logging
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from capfilt.errors import InputError

log = logging.getLogger(__name__)

CAPTION_COLUMNS = ("captions", "caption", "text")
"""Where the text is looked for when the config names no column, in this order."""

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def shard_names(source: str, rows: int, shard_size: int) -> list[str]:
    """`web-00000`, … for so many rows."""
    return numbered_shards(source, math.ceil(rows / shard_size))


def numbered_shards(source: str, count: int) -> list[str]:
    """The names of the first so many shards of a source."""
    return [f"{source}-{number:05d}" for number in range(count)]


def shard_rows(table: pa.Table, shard: str, shard_size: int) -> pa.Table:
    """The rows of a list that make up a shard."""
    return table.slice(first_row(shard, shard_size), shard_size)


def first_row(shard: str, shard_size: int) -> int:
    """The row of the list that a shard begins with."""
    return int(shard.rsplit("-", 1)[1]) * shard_size


def shard_keys(shard: str, rows: int) -> list[str]:
    """The keys of a shard's rows, in order (and sorted, up to 100,000 rows)."""
    return [f"{shard}-{row:05d}" for row in range(rows)]


def read_list(path: str, yaml_key: str, limit: int | None = None) -> pa.Table:
    """A whole list. Read once a process, as long as the file stays the same.

    Args:
        path: the file; its ending says what it is.
        yaml_key: the config's key that named it, for messages.
        limit: take only the first so many rows.

    Returns:
        Its columns, by name. Everything in CSV and TSV is text, as it stands there.

    Raises:
        InputError: it is missing, empty, or not what its ending says.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(
            f"{yaml_key}: {path!r} is not there ({error.strerror}); give the path of a list, "
            "relative to the working directory"
        ) from None
    if Path(path).suffix.lower() not in FORMATS or not Path(path).is_file():
        raise InputError(f"{yaml_key}: {path!r} is not a file ending in {', '.join(FORMATS)}")
    table = _read(path, yaml_key, status.st_mtime_ns, status.st_size)
    if len(set(table.column_names)) < len(table.column_names):
        raise InputError(f"{yaml_key}: {path} has a column twice: {table.column_names}")
    if table.num_rows == 0:
        raise InputError(f"{yaml_key}: {path} has no rows")
    return table.slice(0, limit)


@lru_cache(maxsize=4)
def _read(path: str, yaml_key: str, mtime_ns: int, size: int) -> pa.Table:
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix == ".jsonl":
            return _read_jsonl(path, yaml_key)
        return _read_delimited(path, "\t" if suffix == ".tsv" else ",")
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{yaml_key}: {path} can't be read as {suffix[1:]}: {error}") from None
    except OSError as error:
        raise InputError(f"{yaml_key}: {path} can't be read: {error.strerror or error}") from None


def _read_delimited(path: str, delimiter: str) -> pa.Table:
    if delimiter == "\t":
        # a TSV's row is a line, and a quote need not be closed
        with contextlib.suppress(pa.ArrowInvalid):
            return _without_quotes(_read_rows(path, delimiter, quotes=False))
    table = _read_rows(path, delimiter, quotes=True)
    if any(_line_breaks(column) for column in table.columns):
        _check_quotes(path, delimiter)
    return table


def _read_rows(path: str, delimiter: str, quotes: bool) -> pa.Table:
    with open(path, encoding="utf-8-sig", newline="") as file:
        # empty lines are skipped below, too
        if quotes:
            lines = csv.reader(file, delimiter=delimiter)
        else:
            lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        header = next(filter(None, lines), [])
    if not header:
        return pa.table({})
    return pa.csv.read_csv(
        path,
        # a row may not be longer than a block
        read_options=pa.csv.ReadOptions(block_size=16 << 20),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
        ),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )


def _without_quotes(table: pa.Table) -> pa.Table:
    """Names and values that stand in quotes as a whole, as what the quotes hold."""
    columns = [_unquoted(column) for column in table.columns]
    names = _unquoted(pa.array(table.column_names, pa.string())).to_pylist()
    return pa.Table.from_arrays(columns, names=names)


def _unquoted(values: Any) -> Any:
    quoted = pc.match_substring_regex(values, '^"([^"]|"")*"$')
    inner = pc.replace_substring(pc.utf8_slice_codeunits(values, 1, -1), '""', '"')
    return pc.if_else(quoted, inner, values)


def _line_breaks(column: pa.ChunkedArray) -> int:
    """How many texts of a column hold a line break."""
    if not pa.types.is_string(column.type):
        return 0
    return int(pc.sum(pc.match_substring_regex(column, "[\r\n]")).as_py() or 0)


def _check_quotes(path: str, delimiter: str) -> None:
    """A quote that is not closed makes one value of all rows up to the next one.

    Arrow doesn't mind; Python's reader does.

    Raises:
        csv.Error: there is one.
    """
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        start = 1
        try:
            for _ in rows:
                start = rows.line_num + 1
        except csv.Error as error:
            raise csv.Error(
                f"the row that begins in line {start}: {error}. A quote there isn't closed, or "
                "stands inside a value without being doubled"
            ) from None


def warn_of_line_breaks(table: pa.Table, column: str, path: str) -> None:
    """Says so when a URL or path holds a line break: rows may have run together."""
    found = _line_breaks(table.column(column))
    if found:
        log.warning(
            "%s: %d of column %r hold a line break: is a quote in the wrong place?",
            path,
            found,
            column,
        )


def _read_jsonl(path: str, yaml_key: str) -> pa.Table:
    columns: dict[str, list[str | list[str] | None]] = {}
    rows = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                plain = _plain_row(row)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{yaml_key}: {path}, line {number} is not JSON: {error}"
                ) from None
            if plain is None:
                raise InputError(f"{yaml_key}: {path}, line {number} is not an object: {row!r}")
            for name in plain.keys() - columns.keys():
                columns[name] = [None] * rows
            for name, values in columns.items():
                values.append(plain.get(name))
            rows += 1
    # one type a column: a list where any row has one
    made = {}
    for name, values in columns.items():
        if any(isinstance(value, list) for value in values):
            lists = [
                value if isinstance(value, list) or value is None else [value] for value in values
            ]
            made[name] = pa.array(lists, pa.list_(pa.string()))
        else:
            made[name] = pa.array(values, pa.string())
    return pa.table(made)


def _plain_row(row: Any) -> dict[str, str | list[str] | None] | None:
    """A line of JSON as the values of a row; None where it is no object."""
    if not isinstance(row, dict):
        return None
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> str | list[str] | None:
    """A JSON value as a text, a list of texts, or None."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_text(item) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        value = "" if value is None else json.dumps(value, ensure_ascii=False)
    # JSON can spell half a surrogate pair, which no UTF-8 can hold
    return str(value).encode("utf-8", "replace").decode()


def find_column(table: pa.Table, wanted: tuple[str, ...], path: str, yaml_key: str) -> str:
    """The first of `wanted` that the list has, by its exact name or else in other case.

    Raises:
        InputError: it has none of them.
    """
    lower = {name.lower(): name for name in reversed(table.column_names)}
    for name in wanted:
        if name in table.column_names:
            return name
    for name in wanted:
        if name.lower() in lower:
            return lower[name.lower()]
    raise InputError(
        f"{path} has no column {' or '.join(repr(name) for name in wanted)}; it has "
        f"{table.column_names}. Set {yaml_key} to the one that is meant"
    )


def text_column(table: pa.Table, column: str) -> list[str | None]:
    """A column of URLs or paths, as text."""
    values = table.column(column).to_pylist()
    return [value if value is None else str(value) for value in values]


def check_places(table: pa.Table, column: str, path: str, yaml_key: str) -> None:
    """Sees that a column can hold URLs or paths.

    Raises:
        InputError: it holds something else, such as the pictures themselves.
    """
    kind = table.schema.field(column).type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise InputError(
            f"{path}: column {column!r} holds {str(kind)[:60]}, expected URLs or paths as text. "
            f"Set {yaml_key} to another column; pictures in the list itself are not read, write "
            "them to files first"
        )


def check_texts(table: pa.Table, column: str, path: str, yaml_key: str) -> None:
    """Sees that a column holds text or lists of text.

    Raises:
        InputError: it holds something else.
    """
    kind = table.schema.field(column).type
    is_list = any(is_(kind) for is_ in (pa.types.is_list, pa.types.is_large_list))
    inner = kind.value_type if is_list else kind
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    if pa.types.is_null(inner) or str(inner) in ("string", "large_string", "string_view"):
        return
    values = table.column(column)
    raise InputError(
        f"{path}: column {column!r} holds {kind}, expected text or lists of text (row 0: "
        f"{values[0].as_py()!r}). Set {yaml_key} to another column"
    )


def caption_lists(table: pa.Table, column: str) -> list[list[str]]:
    """The texts of each row as a list that is never empty: no text at all is one empty text."""
    return [
        [text or "" for text in value] or [""] if isinstance(value, list) else [value or ""]
        for value in table.column(column).to_pylist()
    ]

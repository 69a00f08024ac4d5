"""The tables of a run: their Arrow schemas, the closed list of reasons, and the check of both.

Every table is one Parquet file a shard, sorted by its first column. The field metadata `doc` is
where the README's data contract is generated from.
"""

import hashlib
import json

import pyarrow as pa

from capfilt.errors import InputError

SOURCES = ("web", "human", "synthetic")

REASONS = {
    "kept": "the pair is in the export",
    "itm_below_threshold": "the ITM probability is below its source's `filter.itm_threshold`",
    "itc_below_threshold": "the ITC similarity is below its source's `filter.itc_threshold`",
    "fused_below_threshold": "the fused score is below `filter.fused_threshold`",
    "below_precision": "the score is below what `filter.calibration` found for its precision",
    "expression": "`filter.expression` does not hold",
    "not_best": "`filter.best_of` other synthetic texts of the picture are better",
    "below_top_fraction": "the pair is not among the best `filter.top_fraction` of the run",
    "web_text_kept": "a web text is kept (`filter.synthetic_only_where_web_dropped`)",
    "empty_caption": "there is no text",
    "duplicate": "another pair with the same picture and the same text counts in its place",
    "download_failed": "the picture could not be fetched",
    "image_unreadable": "the bytes are not a picture, or a broken one",
    "image_too_small": "a side is shorter than `download.min_side_px`",
    "image_too_large": "the area is over `download.max_area_px`",
}
"""Why a pair is kept or dropped. A decision has exactly one of these."""

RULE_REASONS = (
    "itm_below_threshold",
    "itc_below_threshold",
    "fused_below_threshold",
    "below_precision",
    "expression",
    "not_best",
    "below_top_fraction",
    "web_text_kept",
)
"""Those of the rules over scores and columns, in the order in which `filter` looks for them."""


def pair_uid(sha256: str, caption: str) -> str:
    """The content address of a pair: sha256 of the picture's digest, a newline and the text."""
    return hashlib.sha256(f"{sha256}\n{caption}".encode()).hexdigest()


def _field(name: str, kind: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def _datasets_features(schema: pa.Schema) -> str:
    """The features of a schema as `datasets` reads them from a Parquet file's metadata.

    Written by hand, since importing `datasets` takes a second.
    """
    features: dict[str, dict[str, str]] = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            features[field.name] = {"_type": "Image"}
        else:
            kind = {"float": "float32"}.get(str(field.type), str(field.type))
            features[field.name] = {"dtype": kind, "_type": "Value"}
    return json.dumps({"info": {"features": features}})


IMAGES = pa.schema(
    [
        _field("key", pa.string(), "`<shard>-<row>`, unique in the run"),
        _field("source", pa.string(), "`web` or `human`"),
        _field("url", pa.string(), "where the picture came from", nullable=True),
        _field("captions", pa.list_(pa.string()), "the texts that came with the picture"),
        _field("status", pa.string(), "img2dataset's: `success`, `failed_to_download`, …"),
        _field("error_message", pa.string(), "what failed, in words", nullable=True),
        _field("reason", pa.string(), "null, or why the picture can't be used", nullable=True),
        _field("width", pa.int32(), "pixels, as stored", nullable=True),
        _field("height", pa.int32(), "pixels, as stored", nullable=True),
        _field("original_width", pa.int32(), "pixels, as fetched", nullable=True),
        _field("original_height", pa.int32(), "pixels, as fetched", nullable=True),
        _field("exif", pa.string(), "JSON", nullable=True),
        _field("sha256", pa.string(), "of the fetched bytes, hex", nullable=True),
        _field("image", pa.binary(), "encoded; null when it can't be used", nullable=True),
    ]
)

FEATURES = pa.schema(
    [
        _field("key", pa.string(), "the picture"),
        _field("tokens", pa.large_binary(), "of the frozen image tower: float16 [P, D]"),
    ]
)

CAPTIONS = pa.schema(
    [
        _field("pair_id", pa.string(), "`<key>/synthetic<n>`"),
        _field("key", pa.string(), "the picture"),
        _field("source", pa.string(), "`synthetic`"),
        _field("caption", pa.string(), "the captioner's text"),
        _field("logprob", pa.float32(), "summed log-probability of its tokens"),
    ]
)

SCORES = pa.schema(
    [
        _field("pair_id", pa.string(), "`<key>/text<n>` or `<key>/synthetic<n>`"),
        _field("key", pa.string(), "the picture"),
        _field("source", pa.string(), "`web`, `human` or `synthetic`"),
        _field("caption", pa.string(), "the text, as it came"),
        _field("uid", pa.string(), "content address of the pair (picture and text)", nullable=True),
        _field("itm_prob", pa.float32(), "ITM's probability of a match, 0..1", nullable=True),
        _field("itc_sim", pa.float32(), "cosine of the ITC embeddings, -1..1", nullable=True),
        _field("error", pa.string(), "null, or the reason why it has no score", nullable=True),
    ]
)

DECISIONS = pa.schema(
    [
        _field("pair_id", pa.string(), "the pair"),
        _field("source", pa.string(), "`web`, `human` or `synthetic`"),
        _field("keep", pa.bool_(), "whether it is exported"),
        _field("reason", pa.string(), "`kept`, or the one reason why not"),
    ]
)

EXPORT = pa.schema(
    [
        _field("uid", pa.string(), "content address of the pair"),
        _field(
            "image",
            pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]),
            "datasets' Image feature: decodes to a PIL image",
            # never null (export sees to it), but `datasets` knows the feature only when nullable
            nullable=True,
        ),
        _field("caption", pa.string(), "the text"),
        _field("source", pa.string(), "`web`, `human` or `synthetic`"),
        _field("itm_prob", pa.float32(), "ITM's probability of a match", nullable=True),
        _field("itc_sim", pa.float32(), "cosine of the ITC embeddings", nullable=True),
        _field("width", pa.int32(), "pixels"),
        _field("height", pa.int32(), "pixels"),
        _field("url", pa.string(), "where the picture came from", nullable=True),
        _field("sha256", pa.string(), "of the fetched bytes, hex"),
    ]
)
EXPORT = EXPORT.with_metadata({"huggingface": _datasets_features(EXPORT)})

EMBEDDINGS = pa.schema(
    [
        _field("id", pa.string(), "the picture's `key`, or the text's `pair_id`"),
        _field("kind", pa.string(), "`image` or `text`"),
        _field("vector", pa.binary(), "the ITC embedding, of unit length: float16 [D]"),
    ]
)

TABLES = {
    "images": IMAGES,
    "features": FEATURES,
    "captions": CAPTIONS,
    "scores": SCORES,
    "embeddings": EMBEDDINGS,
    "decisions": DECISIONS,
    "export": EXPORT,
}


def check(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Returns `table` in the columns and types of `schema`, or says what does not fit.

    Args:
        table: what a stage produced or a file holds.
        schema: one of this module's schemas.
        where: what to call the table in the message.

    Raises:
        InputError: a column is missing, extra, of another type, or null where it must not be.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    extra = [name for name in table.column_names if name not in schema.names]
    if missing or extra:
        raise InputError(
            f"{where}: columns missing: {missing or 'none'}, unknown: {extra or 'none'}; "
            f"expected {schema.names}"
        )
    table = table.select(schema.names)
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise InputError(
                f"{where}: column {field.name!r} is {column.type}, expected {field.type}"
            )
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise InputError(f"{where}: column {field.name!r} is null in row {row}")
    return table.cast(schema)


def contract_markdown() -> str:
    """The data contract as Markdown tables, for the README."""
    parts = []
    for name, schema in TABLES.items():
        rows = [f"**`{name}/`**", "", "| column | type | what |", "|---|---|---|"]
        for field in schema:
            kind = "struct" if pa.types.is_struct(field.type) else str(field.type)
            kind = kind.replace("list<item: string>", "list of string")
            optional = " or null" if field.nullable and kind != "struct" else ""
            doc = field.metadata[b"doc"].decode()
            rows.append(f"| `{field.name}` | {kind}{optional} | {doc} |")
        parts.append("\n".join(rows))
    reasons = ["**Reasons**", "", "| reason | what |", "|---|---|"]
    reasons += [f"| `{name}` | {doc} |" for name, doc in REASONS.items()]
    return "\n\n".join([*parts, "\n".join(reasons)]) + "\n"

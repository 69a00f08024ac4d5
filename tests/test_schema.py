import json

import pyarrow as pa
import pytest

from capfilt.errors import InputError
from capfilt.schema import CAPTIONS, DECISIONS, EXPORT, REASONS, TABLES, check, contract_markdown


def captions(**changes: object) -> pa.Table:
    columns = {
        "pair_id": pa.array(["a", "b"]),
        "key": pa.array(["a", "b"]),
        "source": pa.array(["synthetic"] * 2),
        "caption": pa.array(["x", ""]),
        "logprob": pa.array([-1.0, -2.0], pa.float32()),
    }
    return pa.table({**columns, **changes})


def test_columns_are_put_in_order() -> None:
    table = captions().select(["logprob", "key", "caption", "source", "pair_id"])
    checked = check(table, CAPTIONS, "captions/web-00000")
    assert checked.schema.equals(CAPTIONS, check_metadata=True)
    assert checked.to_pylist() == captions().to_pylist()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            captions().drop_columns(["key"]),
            r"captions/w: columns missing: \['key'\], unknown: none",
        ),
        (captions(more=pa.array([1, 2])), r"missing: none, unknown: \['more'\]"),
        (captions(logprob=pa.array([1.0, 2.0])), r"'logprob' is double, expected float"),
        (captions(caption=pa.array(["x", None])), r"'caption' is null in row 1"),
    ],
)
def test_what_does_not_fit_is_said(table: pa.Table, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(table, CAPTIONS, "captions/w")


def test_an_empty_table_fits() -> None:
    for name, schema in TABLES.items():
        assert check(schema.empty_table(), schema, name).num_rows == 0


def test_every_table_starts_with_what_it_is_sorted_by() -> None:
    firsts = {name: schema.names[0] for name, schema in TABLES.items()}
    assert set(firsts.values()) == {"key", "pair_id", "uid", "id"}
    assert DECISIONS.names == ["pair_id", "source", "keep", "reason"]


def test_the_contract_names_every_column_and_reason() -> None:
    text = contract_markdown()
    for name, schema in TABLES.items():
        assert f"**`{name}/`**" in text
        for field in schema:
            assert f"| `{field.name}` | " in text and field.metadata[b"doc"]
    assert all(f"| `{reason}` |" in text for reason in REASONS)


def test_the_features_are_those_that_datasets_would_write() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features.from_arrow_schema(EXPORT)
    assert isinstance(features["image"], datasets.Image)
    ours = json.loads(EXPORT.metadata[b"huggingface"])
    assert ours == json.loads(features.arrow_schema.metadata[b"huggingface"])

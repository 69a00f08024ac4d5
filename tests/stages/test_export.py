import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt import manifest
from capfilt.config import Export
from capfilt.engine.local import run_stage
from capfilt.errors import InputError
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, EXPORT, IMAGES, SCORES
from capfilt.shards import RunDir
from capfilt.stages import export
from capfilt.stages.export import ExportStage


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def put(run: RunDir, table: str, shard: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    run.write_table(run.table(table, shard), pa.Table.from_pylist(rows, schema))
    identity = Identity(table, 1, {})
    manifest.sign(run, run.manifest(table, shard), identity, rows=len(rows), counts={}, seconds=0)


def shard(run: RunDir, name: str, keeps: list[tuple[str, str, bool]], pictures: int = 3) -> None:
    """Writes what export reads; `keeps` are (pair_id without the shard, source, keep)."""
    images = [
        {"key": f"{name}-{i:05d}", "source": name[:3], "url": f"http://h/{i}", "captions": ["x"],
         "status": "success", "width": 12, "height": 8, "sha256": f"s{i}", "image": png(i)}
        for i in range(pictures)
    ]  # fmt: skip
    images[-1].update(image=None, reason="download_failed", width=None, height=None, sha256=None)
    put(run, "images", name, images, IMAGES)
    scores, decisions = [], []
    for pair, source, keep in sorted(keeps):
        key = f"{name}-{pair.split('/')[0]}"
        scored = {
            "pair_id": f"{name}-{pair}",
            "key": key,
            "source": source,
            "caption": f"text {pair}",
        }
        uid = {"uid": f"u{hash(pair) % 7}", "itm_prob": 0.75, "itc_sim": 0.25} if keep else {}
        scores.append(scored | uid)
        decisions.append(
            {
                "pair_id": f"{name}-{pair}",
                "source": source,
                "keep": keep,
                "reason": "kept" if keep else "duplicate",
            }
        )
    put(run, "scores", name, scores, SCORES)
    put(run, "decisions", name, decisions, DECISIONS)


@pytest.fixture()
def run(tmp_path: Path) -> RunDir:
    run = RunDir(str(tmp_path / "run"))
    shard(
        run,
        "web-00000",
        [
            ("00000/text0", "web", True),
            ("00000/synthetic0", "synthetic", True),
            ("00001/text0", "web", False),
            ("00001/synthetic0", "synthetic", True),
            ("00002/text0", "web", False),
        ],
    )
    shard(run, "web-00001", [("00000/text0", "web", False)])
    shard(run, "human-00000", [("00000/text0", "human", True), ("00000/text1", "human", True)])
    return run


def do(run: RunDir, config: Export = Export(), **options: Any) -> list[str]:  # noqa: B008
    names = ["human-00000", "web-00000", "web-00001"]
    result = run_stage(ExportStage(config), run, names, **options)
    assert not result.failed
    return [run.table("export", name) for name in names]


def test_the_kept_pairs_and_no_others(run: RunDir) -> None:
    files = do(run)
    got = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert sorted(row["caption"] for row in got) == [
        "text 00000/synthetic0",
        "text 00000/text0",
        "text 00000/text0",
        "text 00000/text1",
        "text 00001/synthetic0",
    ]
    for row in got:
        number = int(row["sha256"][1:])
        assert row["image"]["bytes"] == png(number)
        assert row["image"]["path"].endswith(f"-{number:05d}")
        assert row["caption"].startswith(f"text {number:05d}/")
        assert (row["width"], row["height"], row["itm_prob"]) == (12, 8, 0.75)
    for path in files:
        uids = pq.read_table(path).column("uid").to_pylist()
        assert uids == sorted(uids)
    assert pq.read_table(files[2]).num_rows == 0


def test_without_the_human_pairs(run: RunDir) -> None:
    do(run)
    files = do(run, Export(human=False))
    assert [pq.read_table(path).num_rows for path in files] == [0, 3, 0]


def test_the_same_content_twice_stays_twice(run: RunDir) -> None:
    pairs = [("00000/text0", "web", True), ("00000/text1", "web", True)]
    shard(run, "web-00001", pairs)
    table = pq.read_table(run.table("scores", "web-00001"))
    same = table.set_column(4, SCORES.field("uid"), pa.array(["u", "u"]))
    run.write_table(run.table("scores", "web-00001"), same)
    assert pq.read_table(do(run)[2]).column("uid").to_pylist() == ["u", "u"]


def test_a_kept_pair_without_a_picture_is_an_error(run: RunDir) -> None:
    shard(run, "web-00001", [("00002/text0", "web", True)])
    result = run_stage(ExportStage(Export()), run, ["web-00001"])
    assert "picture web-00001-00002, which images/ has no bytes of" in result.failed["web-00001"]


def test_chunks_give_the_same_table(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pq.read_table(do(run)[1])
    monkeypatch.setattr(export, "ROWS_A_CHUNK", 2)
    run.remove(run.manifest("export", "web-00000"))
    assert pq.read_table(do(run)[1]).equals(whole)


def test_datasets_duckdb_and_polars_read_it(run: RunDir, tmp_path: Path) -> None:
    files = do(run)
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == EXPORT.names
    assert len(loaded) == 5
    assert isinstance(loaded[0]["image"], Image.Image) and loaded[0]["image"].size == (12, 8)
    metadata = json.loads(loaded.features.arrow_schema.metadata[b"huggingface"])
    assert metadata == json.loads(EXPORT.metadata[b"huggingface"])

    duckdb = pytest.importorskip("duckdb")
    query = f"select * from read_parquet({files!r})"
    relation = duckdb.sql(query)
    assert relation.columns == EXPORT.names and len(relation.fetchall()) == 5
    polars = pytest.importorskip("polars")
    frame = polars.concat([polars.read_parquet(path) for path in files])
    assert frame.columns == EXPORT.names and frame.height == 5
    assert frame["image"].struct.field("bytes")[0][:4] == b"\x89PNG"


def test_a_calibration_that_is_missing_is_told() -> None:
    with pytest.raises(InputError, match=r"filter\.calibration: nope\.json is not there"):
        ExportStage(Export(), Path("nope.json")).weights()

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.config import Config
from capfilt.engine.local import StageResult, run_stage
from capfilt.errors import InputError, MismatchError
from capfilt.shards import RunDir
from capfilt.stages.ingest import IngestStage, list_shards


def config(tmp_path: Path, human: dict[str, Any] | None = None, **download: Any) -> Config:
    pairs = {"pairs": str(tmp_path / "pairs.jsonl"), **(human or {})}
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "human": pairs,
            "web": {"pairs": str(tmp_path / "pairs.jsonl")},
            "download": {"shard_size": 3, "threads": 2, **download},
        }
    )


def run(settings: Config, source: Any = "human", **options: Any) -> StageResult:
    stage = IngestStage(settings, source)
    return run_stage(stage, RunDir(settings.run_dir), list_shards(settings, source), **options)


def rows(settings: Config, source: str = "human") -> list[dict[str, Any]]:
    found = sorted((Path(settings.run_dir) / "images").glob(f"{source}-*.parquet"))
    return [row for path in found for row in pq.read_table(path).to_pylist()]


def write(tmp_path: Path, listed: list[dict[str, Any]]) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def picture(path: Path, size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)


def test_pictures_and_their_texts(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub/b.jpg", (20, 20))
    picture(tmp_path / "tiny.png", (2, 2))
    (tmp_path / "c.jpg").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    picture(tmp_path.parent / "outside.png")
    write(
        tmp_path,
        [
            {"image": "a.png", "captions": ["one", "two"]},
            {"image": "sub/../sub/b.jpg", "captions": "three"},
            {"image": "a.png", "captions": []},
            {"image": "missing.png", "captions": None},
            {"image": "c.jpg", "captions": ["half a pair \ud83d"]},
            {"image": "../outside.png", "captions": ["x"]},
            {"image": str(tmp_path / "a.png"), "captions": ["x"]},
            {"image": None, "captions": ["x"]},
            {"image": "tiny.png", "captions": ["x"]},
            {"image": "folder.png", "captions": ["x"]},
            {"image": "pipe.png", "captions": ["x"]},
            {"image": "nul\0.png", "captions": ["x"]},
        ],
    )
    settings = config(tmp_path)
    assert run(settings).rows == 12
    got = rows(settings)
    assert [row["captions"] for row in got[:5]] == [
        ["one", "two"],
        ["three"],
        [""],
        [""],
        ["half a pair ?"],
    ]
    assert [row["reason"] for row in got] == [
        None,
        None,
        None,
        "download_failed",
        "image_unreadable",
        "image_unreadable",
        "image_unreadable",
        "download_failed",
        "image_too_small",
        "download_failed",
        "download_failed",
        "download_failed",
    ]
    assert [row["key"] for row in got[:4]] == [
        "human-00000-00000",
        "human-00000-00001",
        "human-00000-00002",
        "human-00001-00000",
    ]
    assert {row["source"] for row in got} == {"human"}
    assert got[0]["image"] == (tmp_path / "a.png").read_bytes()
    assert got[1]["url"] == "sub/../sub/b.jpg"
    assert got[3]["error_message"] == "no such file"
    assert got[5]["error_message"] == got[6]["error_message"] == "outside the images folder"
    assert all((row["image"] is None) == (row["reason"] is not None) for row in got)


def test_only_where_pictures_are_shrunk_there_is_a_new_version(tmp_path: Path) -> None:
    assert IngestStage(config(tmp_path), "human").version == 1
    assert IngestStage(config(tmp_path, max_side_px=64), "human").version == 2


def test_web_pictures_from_disk(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, [{"image": "a.png", "text": "t"}] * 4)
    settings = config(tmp_path)
    assert list_shards(settings, "web") == ["web-00000", "web-00001"]
    run(settings, "web")
    assert [row["source"] for row in rows(settings, "web")] == ["web"] * 4


def test_another_images_folder_and_columns(tmp_path: Path) -> None:
    picture(tmp_path / "pics/a.png")
    pq.write_table(pa.table({"file": ["a.png"], "words": [["x", None]]}), tmp_path / "l.parquet")
    human = {
        "pairs": str(tmp_path / "l.parquet"),
        "images": str(tmp_path / "pics"),
        "image_column": "file",
        "caption_column": "words",
    }
    settings = config(tmp_path, human)
    run(settings)
    (row,) = rows(settings)
    assert (row["reason"], row["captions"]) == (None, ["x", ""])


def test_another_list_is_another_identity(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, [{"image": "a.png", "text": "t"}])
    settings = config(tmp_path)
    run(settings)
    assert run(settings).skipped == 1
    write(tmp_path, [{"image": "a.png", "text": "u"}])
    with pytest.raises(MismatchError, match=r"weights\.pairs"):
        run(settings)
    run(settings, redo=True)
    assert rows(settings)[0]["captions"] == ["u"]


@pytest.mark.parametrize(
    ("listed", "human", "message"),
    [
        (None, {}, r"human\.pairs: .*pairs\.jsonl' is not there"),
        ([], {}, r"human\.pairs: .*has no rows"),
        (
            [{"image": "a", "text": "b"}],
            {"images": "/nope"},
            r"human\.images: folder '/nope' is not there",
        ),
        ([{"img": "a", "text": "b"}], {}, r"no column 'image'; it has .*Set human\.image_column"),
        ([{"image": "a", "alt": "b"}], {}, r"no column 'captions' .*Set human\.caption_column"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, listed: list[dict[str, Any]] | None, human: dict[str, Any], message: str
) -> None:
    if listed is not None:
        write(tmp_path, listed)
    with pytest.raises(InputError, match=message):
        list_shards(config(tmp_path, human), "human")


@pytest.mark.parametrize(
    "values", [pa.array([3]), pa.array([[3]]), pa.array([[["a"]]]), pa.array([{"a": "b"}])]
)
def test_a_caption_column_of_other_things(tmp_path: Path, values: pa.Array) -> None:
    """Told when the list is opened, so `check` tells it."""
    picture(tmp_path / "a.png")
    pq.write_table(pa.table({"image": ["a.png"], "text": values}), tmp_path / "l.parquet")
    settings = config(tmp_path, {"pairs": str(tmp_path / "l.parquet")})
    with pytest.raises(InputError, match=r"holds .*, expected text .*Set human\.caption_column"):
        list_shards(settings, "human")


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a"], pa.large_string()),
        pa.array(["a"]).dictionary_encode(),
        pa.array([["a"]], pa.large_list(pa.string())),
        pa.array([None], pa.null()),
    ],
)
def test_texts_of_every_kind(tmp_path: Path, values: pa.Array) -> None:
    picture(tmp_path / "a.png")
    pq.write_table(pa.table({"image": ["a.png"], "text": values}), tmp_path / "l.parquet")
    settings = config(tmp_path, {"pairs": str(tmp_path / "l.parquet")})
    assert run(settings).counts == {"ok": 1}
    assert rows(settings)[0]["captions"] == (["a"] if values[0].is_valid else [""])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(
        st.sampled_from(["a.png", "bad.png", "missing.png", "../up.png", "", None]),
        min_size=1,
        max_size=9,
    ),
    shard_size=st.integers(1, 5),
)
def test_books_close(
    tmp_path_factory: pytest.TempPathFactory, names: list[str | None], shard_size: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("books")
    picture(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write(tmp_path, [{"image": name, "text": str(i)} for i, name in enumerate(names)])
    settings_ = config(tmp_path, shard_size=shard_size)
    result = run(settings_)
    got = rows(settings_)
    keys = [row["key"] for row in got]
    assert result.rows == len(got) == len(names) == sum(result.counts.values())
    assert keys == sorted(set(keys))
    assert [row["captions"] for row in got] == [[str(i)] for i in range(len(names))]
    assert [row["reason"] is None for row in got] == [name == "a.png" for name in names]


def test_pictures_in_the_list_itself_are_told(tmp_path: Path) -> None:
    path = tmp_path / "hub.parquet"
    rows = [{"image": {"bytes": b"\x89PNG", "path": None}, "caption": "a dog"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    settings = Config.model_validate(
        {"run_dir": str(tmp_path / "run"), "human": {"pairs": str(path)}, "web": {"urls": "x"}}
    )
    with pytest.raises(
        InputError, match=r"column 'image' holds struct<.*write them to files first"
    ):
        list_shards(settings, "human")

import json
from pathlib import Path

import pytest
from tiny import COLOURS, Tiny, picture

from capfilt import manifest, pipeline
from capfilt.check import check
from capfilt.config import Config, load
from capfilt.engine.local import StageResult
from capfilt.errors import InputError, MismatchError, PartialError, UsageError
from capfilt.manifest import Identity
from capfilt.pipeline import Update
from capfilt.schema import REASONS
from capfilt.shards import RunDir, Shard, locked


def do(tiny: Tiny, *steps: str, redo: str | None = None) -> list[StageResult]:
    return pipeline.run(load(tiny.config), steps=steps, redo=redo)


def test_only_the_first_of_several_processes_locks(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tiny.run):
        with pytest.raises(UsageError, match="is being written by"):
            do(tiny, "ingest")
        monkeypatch.setattr(pipeline.ranks, "is_first", lambda: False)
        assert do(tiny, "ingest") == []


def test_steps_run_in_order_and_report(tiny: Tiny) -> None:
    seen: list[Update] = []
    (ingest,) = pipeline.run(load(tiny.config), steps=("ingest",), report=seen.append)
    assert (ingest.done, ingest.rows, ingest.failed) == (5, 12, {})
    assert seen[-1].result is ingest and all(update.step == "ingest" for update in seen)
    assert max(update.done for update in seen[:-1]) == 3
    tiny.score()
    # the order is the pipeline's, whatever the order of the names
    results = do(tiny, "report", "export", "filter")
    assert [result.stage for result in results] == ["filter", "export", "report"]
    assert [result.done for result in do(tiny, "filter", "export", "report")] == [0, 0, 0]


def test_every_pair_has_one_reason(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter")
    decided = [
        row
        for name in tiny.run.shards("decisions")
        for row in Shard(tiny.run, name).read("decisions").to_pylist()
    ]
    assert len(decided) == 12 and {row["reason"] for row in decided} <= set(REASONS)
    reasons = {row["pair_id"]: row["reason"] for row in decided}
    assert reasons["web-00000-00001/text0"] == "image_unreadable"
    assert reasons["web-00000-00002/text0"] == "download_failed"
    assert reasons["web-00001-00001/text0"] == "empty_caption"
    assert all(row["keep"] for row in decided if row["source"] == "human")


def test_another_threshold_needs_no_redo(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter", "export", "report")
    tiny.values["filter"] = {"itm_threshold": 0.9}
    results = do(tiny, "ingest", "filter", "export", "report")
    assert [result.done for result in results] == [0, 5, 5, 1]


def test_what_a_killed_process_left_of_the_report_is_removed(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter")
    for name in ("report.html.0a1b2c3d.tmp", "report.manifest.json.0a1b2c3d.tmp", "mine.tmp"):
        Path(tiny.run.at(name)).write_text("half")
    do(tiny, "report")
    assert [path.name for path in Path(tiny.run.path).glob("*.tmp")] == ["mine.tmp"]


def test_a_table_that_is_gone_is_made_again(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter", "export")
    for table, step in (("images", "ingest"), ("decisions", "filter"), ("export", "export")):
        path = Path(tiny.run.table(table, "web-00001"))
        before = path.read_bytes()
        path.unlink()
        (result,) = do(tiny, step)
        assert result.done == 1 and path.read_bytes() == before
    Path(tiny.run.table("images", "web-00001")).unlink()
    assert any("4 of 5 shards" in line for line in check(load(tiny.config)))


def test_export_and_report_take_no_decisions_of_another_filter(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    with pytest.raises(InputError, match=r"not decided yet: run `capfilt filter CONFIG`"):
        do(tiny, "report")
    tiny.values["filter"] = {"itm_threshold": 0.9}
    do(tiny, "filter", "export", "report")
    page = Path(tiny.run.at("report.html"))
    before = page.read_bytes()
    tiny.values["filter"] = {"itm_threshold": 0.4}
    for step in ("export", "report"):
        with pytest.raises(
            MismatchError,
            match=r"filter\.itm_threshold: 0\.9 there, 0\.4 now(.|\n)*`capfilt filter CONFIG`",
        ):
            do(tiny, step)
    assert page.read_bytes() == before
    assert [result.done for result in do(tiny, "filter", "export", "report")] == [5, 5, 1]
    # scored anew
    manifest.sign(
        tiny.run,
        tiny.run.manifest("scores", "web-00000"),
        Identity("score", 2, {}),
        rows=3,
        counts={},
        seconds=0,
    )
    with pytest.raises(MismatchError, match=r"upstream\.scores"):
        do(tiny, "export")


def test_changed_content_makes_later_work_stale(tiny: Tiny) -> None:
    """The fingerprint of the pictures stays; what is fetched again may be other bytes."""
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter", "export")
    shard = "web-00001"
    tiny.run.remove(tiny.run.manifest("images", shard))
    assert do(tiny, "ingest")[0].done == 1
    assert do(tiny, "export")[0].done == 0, "the same pictures again"
    before = manifest.read(tiny.run, tiny.run.manifest("images", shard))
    (tiny.folder / "web" / "3.png").write_bytes(picture("white"))
    tiny.run.remove(tiny.run.manifest("images", shard))
    do(tiny, "ingest")
    after = manifest.read(tiny.run, tiny.run.manifest("images", shard))
    assert before is not None and after is not None
    assert before["fingerprint"] == after["fingerprint"]
    assert manifest.signature(before) != manifest.signature(after)
    assert do(tiny, "export")[0].done == 1


def test_a_shorter_list_is_an_error_or_cleared(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter", "export")
    listed = tiny.folder / "web.jsonl"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(MismatchError, match=r"images holds web-00001, web-00002 of an older run"):
        do(tiny, "ingest")
    assert len(tiny.run.shards("images", ("web",))) == 3, "nothing is deleted without being asked"
    do(tiny, "ingest", redo="ingest")
    assert tiny.run.shards("images", ("web",)) == ["web-00000"]
    tiny.score()
    do(tiny, "filter", "export")
    for table in ("decisions", "export"):
        assert tiny.run.shards(table, ("web",)) == ["web-00000"], table


@pytest.mark.parametrize("list_is_there", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_later_steps_wait_for_a_shard_that_is_not_finished(
    tiny: Tiny, list_is_there: bool, told: bool
) -> None:
    """It must not look as if the list had become shorter: their work would be cleared away."""
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter", "export")
    if not told:  # manifests of before said nothing of the list
        for name in tiny.run.shards("images"):
            path = Path(tiny.run.manifest("images", name))
            record = json.loads(path.read_text())
            assert record.pop("list_shards") == {"web": 3, "human": 2}[name.split("-")[0]]
            path.write_text(json.dumps(record))
    tiny.run.remove(tiny.run.manifest("images", "web-00002"))
    if not list_is_there:
        (tiny.folder / "web.jsonl").rename(tiny.folder / "moved.jsonl")
    if told or list_is_there:
        tiny.values["matcher"] = {"itm": {"web_negatives": 0.5}}
        for step in ("features", "matcher", "caption", "score", "filter", "export"):
            with pytest.raises(InputError, match=r"lacks web-00002 .*`capfilt ingest CONFIG`"):
                do(tiny, step)
        assert len(tiny.run.shards("decisions")) == len(tiny.run.shards("export")) == 5
    else:
        assert [result.skipped for result in do(tiny, "export")] == [4]


def test_later_steps_need_no_list(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    for source in ("human", "web"):
        (tiny.folder / f"{source}.jsonl").unlink()
    assert [result.done for result in do(tiny, "filter", "export", "report")] == [5, 5, 1]


def test_later_steps_need_shards_of_both_sources(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter")
    for name in tiny.run.shards("images", ("web",)):
        tiny.run.remove(tiny.run.manifest("images", name))
    with pytest.raises(InputError, match=r"no finished shards of web pairs: run `capfilt ingest"):
        do(tiny, "filter")
    assert len(tiny.run.shards("decisions")) == 5


def test_a_shard_that_fails_stops_after_its_step(tiny: Tiny) -> None:
    do(tiny, "ingest")
    tiny.score()
    do(tiny, "filter")
    path = Path(tiny.run.table("images", "web-00000"))
    good = path.read_bytes()
    path.write_bytes(b"torn")
    with pytest.raises(PartialError, match=r"1 of 5 shards failed in export(.|\n)*web-00000"):
        do(tiny, "export", "report")
    assert not tiny.run.exists(tiny.run.at("report.html"))
    path.write_bytes(good)
    assert do(tiny, "export")[0].done == 1


def downloading(tiny: Tiny) -> Config:
    listed = "".join(f"http://127.0.0.1:9/{n}.png,{colour}\n" for n, colour in enumerate(COLOURS))
    (tiny.folder / "urls.csv").write_text("url,caption\n" + listed)
    tiny.values["web"] = {"urls": str(tiny.folder / "urls.csv")}
    return load(tiny.config)


def test_retry_names_only_shards_with_failures_and_leaves_them_signed(tiny: Tiny) -> None:
    from capfilt.stage import identify, identify_shared
    from capfilt.stages.download import DownloadStage

    config = downloading(tiny)
    stage = DownloadStage(tiny.run, config)
    counts = {"web-00000": {"ok": 3}, "web-00001": {"ok": 2, "download_failed": 1}}
    shared = identify_shared(stage, tiny.run)
    for name, counted in counts.items():
        identity = identify(stage, tiny.run, name, shared)
        path = tiny.run.manifest("images", name)
        manifest.sign(tiny.run, path, identity, rows=3, counts=counted, seconds=1)
        tiny.run.write_text(tiny.run.table("images", name), "pictures")
    assert pipeline.failed_shards(config) == ("web-00001",)
    assert tiny.run.shards("images") == ["web-00000", "web-00001"]
    assert stage.pending() == ["web-00002"]
    tiny.values["download"]["timeout_s"] = 3
    with pytest.raises(MismatchError, match=r"timeout_s"):
        pipeline.failed_shards(load(tiny.config))


def test_nothing_to_retry_where_nothing_is_downloaded(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"web\.urls is not set"):
        pipeline.failed_shards(load(tiny.config))


def test_the_demo_serves_only_when_something_is_pending(tiny: Tiny) -> None:
    config = downloading(tiny).model_copy(update={"demo": None})
    with pipeline._demo_server(config, needed=True):
        pass
    values = {**tiny.values, "demo": {"serve": str(tiny.folder / "nothing"), "port": 1}}
    broken = Config.model_validate(values)
    with pipeline._demo_server(broken, needed=False):
        pass
    with pytest.raises(InputError, match=r"demo\.serve"), pipeline._demo_server(broken, True):
        pass


def test_models_wait_for_what_they_read(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"holds no finished shards of human pairs"):
        do(tiny, "matcher")
    do(tiny, "ingest")
    with pytest.raises(InputError, match=r"capfilt features CONFIG"):
        do(tiny, "matcher")
    tiny.values["pretrain"] = {}
    with pytest.raises(InputError, match=r"capfilt pretrain CONFIG"):
        do(tiny, "matcher")


@pytest.mark.parametrize("how", ["safetensors", "torch"])
def test_a_full_disk_in_a_training_is_an_os_error(tiny: Tiny, how: str) -> None:
    from safetensors import SafetensorError

    def train(*_: object) -> dict[str, object]:
        if how == "safetensors":
            raise SafetensorError("I/O error: No space left on device")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail] unexpected pos") from None

    identity = Identity("captioner", 1, {})
    with pytest.raises(OSError, match="No space left on device"):
        pipeline._train(identity, tiny.run, load(tiny.config), False, pipeline._ignore, train)

    def broken(*_: object) -> dict[str, object]:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        pipeline._train(identity, tiny.run, load(tiny.config), False, pipeline._ignore, broken)


def test_status_reads_manifests_only(tiny: Tiny) -> None:
    do(tiny, "ingest")
    path = tiny.run.at("models", "matcher", "manifest.json")
    manifest.sign(
        tiny.run,
        path,
        Identity("matcher", 1, {}),
        rows=1,
        counts={},
        seconds=2.0,
        extra={"training": {"steps": 5}},
    )
    for name in tiny.run.shards("images"):
        Path(tiny.run.table("images", name)).unlink()
    found = pipeline.status(load(tiny.config))
    assert found["tables"]["images"]["shards"] == 5 and found["tables"]["images"]["rows"] == 12
    assert found["models"]["matcher"] == {"seconds": 2.0, "steps": 5}
    assert found["report"] is None


def test_note_of() -> None:
    result = StageResult("filter", rows=2000, seconds=4.0, counts={"kept": 3, "duplicate": 1})
    assert pipeline.note_of(result) == "2,000 rows, 500/s, 75% kept"
    result = StageResult("export", rows=2, seconds=1.0, counts={"web": 1, "human": 1})
    assert pipeline.note_of(result) == "2 rows, 2/s"
    counts = {"ok": 3, "image_unreadable": 1000, "download_failed": 2}
    result = StageResult("ingest", rows=2, seconds=1.0, counts=counts)
    assert pipeline.note_of(result) == "2 rows, 2/s, 2 download_failed, 1,000 image_unreadable"


def test_an_empty_run_folder_has_a_status(tmp_path: Path) -> None:
    values = {"run_dir": str(tmp_path / "no"), "human": {"pairs": "a"}, "web": {"pairs": "b"}}
    found = pipeline.status(Config.model_validate(values))
    assert all(table["shards"] == 0 for table in found["tables"].values())
    assert not RunDir(str(tmp_path / "no")).exists(str(tmp_path / "no"))


def test_a_remote_run_folder_is_refused_before_anything_is_done(tiny: Tiny) -> None:
    tiny.values["run_dir"] = "s3://bucket/run"
    with pytest.raises(InputError, match=r"'s3://bucket/run' is remote: .* copy export/"):
        do(tiny, "ingest")

"""The pairs of a run: filters, orders, pages, thresholds, pictures, labels attached."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import add_embeddings, add_human, calibrate, jpeg, make_run

from capfilt.errors import CapfiltError, InputError, MissingExtraError
from capfilt.inspect import index, pictures, queries, tables
from capfilt.inspect.filters import HIGH, ORDERS, Query, _cursor, parse_query, parse_thresholds
from capfilt.inspect.labels import Label, utc_now
from capfilt.inspect.queries import Run
from capfilt.inspect.search import open_embeddings
from capfilt.inspect.thresholds import Thresholds, decided_thresholds
from capfilt.shards import RunDir, Shard

pytest.importorskip("duckdb", reason='NOT tested: pip install "capfilt[inspect]"')

HALF = Thresholds(0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("queries") / "run")


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    opened = queries.open_run(str(folder))
    yield opened
    opened.close()


def everything(run: Run, query: Query, thresholds: Thresholds = HALF) -> list[dict]:
    found: list[dict] = []
    while True:
        page = run.page(query, thresholds, "ann")
        found += page.pairs
        if page.next is None:
            assert len(found) == page.total
            return found
        query = replace(query, after=_cursor({"after": page.next}, "after"))


def scores(folder: Path) -> dict[str, dict]:
    run = RunDir(str(folder))
    rows = {}
    for name in run.shards("scores"):
        for row in Shard(run, name).read("scores").to_pylist():
            rows[row["pair_id"]] = row
        for row in Shard(run, name).read("decisions").to_pylist():
            rows[row["pair_id"]] |= row
    return rows


def test_every_pair_is_there_once_in_the_order_of_the_run(run: Run, folder: Path) -> None:
    found = [pair["pair_id"] for pair in everything(run, Query(limit=7))]
    assert found == sorted(scores(folder))


@pytest.mark.parametrize("order", sorted(set(ORDERS) - {"similar"}))
@pytest.mark.parametrize("descending", [False, True])
def test_pages_forward_and_back_are_the_same_in_every_order(
    run: Run, order: str, descending: bool
) -> None:
    query = Query(order=order, descending=descending, limit=11, seed=5)
    pages = [run.page(query, HALF, "ann")]
    while pages[-1].next:
        cursor = _cursor({"after": pages[-1].next}, "after")
        pages.append(run.page(replace(query, after=cursor), HALF, "ann"))
    names = [pair["pair_id"] for page in pages for pair in page.pairs]
    assert len(set(names)) == len(names) == pages[0].total
    assert pages[0].previous is None
    back = pages[-1]
    for expected in reversed(pages[:-1]):
        assert back.previous is not None
        cursor = _cursor({"before": back.previous}, "before")
        back = run.page(replace(query, before=cursor), HALF, "ann")
        assert back.pairs == expected.pairs
        assert back.next == expected.next
    assert back.previous is None


def test_orders_sort_by_what_they_say_with_unscored_pairs_last(run: Run) -> None:
    thresholds = Thresholds(0.7, synthetic=(0.4, None))
    limits = {"web": 0.7, "human": 0.7, "synthetic": 0.4}
    by = {
        "itm": lambda pair: pair["itm"],
        "itc": lambda pair: pair["itc"],
        "threshold": lambda pair: abs(pair["itm"] - limits[pair["source"]]),
        "uncertain": lambda pair: abs(pair["itm"] - 0.5),
        "disagreement": lambda pair: -pair["disagreement"],
    }
    for order, value in by.items():
        found = everything(run, Query(order=order, limit=50), thresholds)
        scored = [pair for pair in found if pair["itm"] is not None]
        assert [value(pair) for pair in scored] == sorted(value(pair) for pair in scored)
        assert all(pair["itm"] is None for pair in found[len(scored) :])
        turned = everything(run, Query(order=order, descending=True, limit=50), thresholds)
        assert [pair["itm"] for pair in turned[-6:]] == [None] * 6


def test_random_depends_on_the_seed_only_and_is_even(run: Run) -> None:
    first = [pair["row"] for pair in everything(run, Query(order="random", seed=1))]
    again = [pair["row"] for pair in everything(run, Query(order="random", seed=1, limit=50))]
    other = [pair["row"] for pair in everything(run, Query(order="random", seed=2))]
    assert first == again != other
    place = np.arange(len(first))
    assert abs(np.corrcoef(place, first)[0, 1]) < 0.3
    assert abs(np.corrcoef(np.argsort(first), np.argsort(other))[0, 1]) < 0.3


def test_high_begins_with_the_best_scored_of_each_source_in_random_order(run: Run) -> None:
    first = everything(run, Query(order="high", seed=1))
    assert [pair["row"] for pair in first] == [
        pair["row"] for pair in everything(run, Query(order="high", seed=1, limit=50))
    ]
    drawn = [pair for pair in first if pair["reason"] not in ("download_failed", "duplicate")]
    best = {}
    for source in ("web", "synthetic"):
        itm = [pair["itm"] for pair in drawn if pair["source"] == source]
        best[source] = sorted(itm)[-round(HIGH * len(itm)) :][0]
    is_high = [pair["itm"] >= best[pair["source"]] for pair in drawn]
    count = sum(is_high)
    assert 0.35 * len(drawn) < count < 0.5 * len(drawn)
    assert all(is_high[:count]) and not any(is_high[count:])
    # and within these no order by score or place is left
    high = drawn[:count]
    assert {pair["source"] for pair in high[: count // 2]} == {"web", "synthetic"}
    for name in ("itm", "row"):
        assert abs(np.corrcoef(np.arange(count), [pair[name] for pair in high])[0, 1]) < 0.5
    other = everything(run, Query(order="high", seed=2))
    assert [pair["row"] for pair in other] != [pair["row"] for pair in first]
    assert Query(order="high", review="todo").sampling == "high"


def test_samples_are_of_pairs_that_a_threshold_decides_on(tmp_path: Path) -> None:
    """Human pairs are kept unseen, and what has no picture or is a duplicate is dropped unseen."""
    folder = make_run(tmp_path / "run")
    add_human(folder)
    opened = queries.open_run(str(folder))
    rows = scores(folder)
    human = [name for name, row in rows.items() if row["source"] == "human"]
    unseen = [
        name for name, row in rows.items() if row["reason"] in ("download_failed", "duplicate")
    ]
    for order, last in (
        ("random", {*human, *unseen}),
        ("high", {*human, *unseen}),
        ("threshold", {*human}),
        ("uncertain", {*human}),
    ):
        found = [pair["pair_id"] for pair in everything(opened, Query(order=order, review="todo"))]
        # those that have no score are among the unseen
        end = len(last) if order in ("random", "high") else len(human) + 6
        assert len(found) == len(rows) == 134 and last <= set(found[-end:])
    # within the human ones the random order is one all the same
    found = [pair["pair_id"] for pair in everything(opened, Query(order="random", source="human"))]
    assert sorted(found) == sorted(human) != found
    opened.close()


def test_filters_combine(run: Run, folder: Path) -> None:
    rows = scores(folder)
    query = parse_query(
        {
            "keep": "yes",
            "source": "web",
            "itm_min": "0.6",
            "words": "LAKE photo",
            "shard": "web-00001",
        }
    )
    expected = [
        name
        for name, row in sorted(rows.items())
        if row["keep"]
        and row["source"] == "web"
        and row["itm_prob"] is not None
        and row["itm_prob"] >= 0.6
        and "lake" in row["caption"]
        and "photo" in row["caption"]
        and name.startswith("web-00001")
    ]
    assert expected
    assert [pair["pair_id"] for pair in everything(run, query)] == expected
    lost = everything(run, parse_query({"reason": "download_failed"}))
    assert len(lost) == 6 and not any(pair["has_image"] for pair in lost)
    one = everything(run, parse_query({"key": "web-00001-00003"}))
    assert [pair["pair_id"][-10:] for pair in one] == ["synthetic0", "0003/text0"]
    assert everything(run, parse_query({"shard": "../../etc"})) == []
    assert everything(run, parse_query({"words": "%' OR 1=1 --"})) == []


def test_a_card_holds_the_other_texts_of_its_picture(run: Run) -> None:
    page = run.page(parse_query({"key": "web-00000-00002/text0"}), HALF, "ann")
    (pair,) = page.pairs
    assert [text["pair_id"] for text in pair["texts"]] == ["web-00000-00002/synthetic0"]
    assert pair["url"].startswith("https://example.org/")


@pytest.mark.parametrize("t_itm", ["0.2", "0.5", "0.81", "off"])
@pytest.mark.parametrize("t_itc", ["off", "0.1"])
@pytest.mark.parametrize(
    ("own", "section"),
    [
        ({}, {}),
        ({"t_synthetic_itm": "0.9"}, {"synthetic_itm_threshold": 0.9}),
        (
            {"t_synthetic_itm": "off", "t_synthetic_itc": "0.3"},
            {"synthetic_itm_threshold": 0.0, "synthetic_itc_threshold": 0.3},
        ),
    ],
)
def test_trying_a_threshold_agrees_with_the_stage_filter(
    run: Run, folder: Path, t_itm: str, t_itc: str, own: dict[str, str], section: dict[str, float]
) -> None:
    import pyarrow as pa

    from capfilt.config import Filter
    from capfilt.stages.decide import Rules, decide

    tried = parse_thresholds({"t_itm": t_itm, "t_itc": t_itc, **own}, Thresholds())
    result = run.try_thresholds(tried)
    before = scores(folder)
    duplicates = pa.array([name for name, row in before.items() if row["reason"] == "duplicate"])
    config = Filter(itm_threshold=tried.itm, itc_threshold=tried.itc, **section)
    rules = Rules(config, duplicates)
    assert decided_thresholds(config.model_dump()).of("web") == tried.of("web")
    kept = set()
    for name in run.shards:
        table = decide(Shard(run.run, name), rules=rules)
        kept |= {row["pair_id"] for row in table.to_pylist() if row["keep"]}
    assert result["all"]["would_keep"] == len(kept)
    kept_before = {name for name, row in before.items() if row["keep"]}
    for change, expected in (("joins", kept - kept_before), ("leaves", kept_before - kept)):
        assert result["all"][change] == len(expected)
        found = everything(run, Query(changes=change), tried)
        assert {pair["pair_id"] for pair in found} == expected


@pytest.mark.parametrize("score", ["itm", "itc", "fused"])
def test_a_calibrated_run_is_shown_as_it_was_decided(tmp_path: Path, score: str) -> None:
    folder = make_run(tmp_path / "run")
    limits = calibrate(folder, score, best_of=1)
    opened = queries.open_run(str(folder))
    rules = opened.summary()["rules"]
    assert rules == {"best_of": 1, "calibration": {"target": 0.95, "digest": "c" * 64}}
    own = opened.thresholds()
    assert own.as_run
    result = opened.try_thresholds(own)["all"]
    assert result["would_keep"] == result["kept"] and result["joins"] == result["leaves"] == 0
    # near the threshold is near that of the source, in the score that was calibrated
    pairs = everything(opened, Query(order="threshold"), own)

    def distance(pair: dict[str, Any]) -> float:
        if pair["itm"] is None:
            return 1e300
        logit = np.log(pair["itm"] / (1 - pair["itm"]))
        values = {"itm": logit, "itc": pair["itc"], "fused": logit + 2 * pair["itc"]}
        return abs(float(values[score]) - limits[pair["source"]])

    distances = [distance(pair) for pair in pairs]
    assert distances == pytest.approx(sorted(distances), abs=1e-6) and len(pairs) == 114
    # a threshold that is tried stands in the place of all that
    tried = parse_thresholds({"t_itm": "0.4"}, own)
    assert not tried.as_run and opened.try_thresholds(tried)["all"]["joins"] > 0
    opened.close()


def test_histograms_count_every_scored_pair(run: Run, folder: Path) -> None:
    for score in ("itm", "itc"):
        histogram = run.histogram(score)
        scored = sum(row["itm_prob"] is not None for row in scores(folder).values())
        assert sum(sum(numbers) for numbers in histogram["sources"].values()) == scored
    with pytest.raises(InputError):
        run.histogram("caption")


def test_pictures_are_small_new_jpegs_and_nothing_else_is_read(run: Run) -> None:
    data = run.thumbnail("web-00001-00003")
    assert data is not None and data.startswith(b"\xff\xd8")
    assert run.thumbnail("web-00000-00005") is None  # not a picture
    assert run.thumbnail("web-00000-00009") is None  # not fetched
    for key in ("../../etc/passwd", "/etc/passwd", "web-00000", "web-99999-00000", "", "x\0y"):
        assert run.thumbnail(key) is None


def test_a_picture_costs_one_row_group(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    where = RunDir(str(folder))
    path = where.table("images", "web-00000")
    where.write_table(path, Shard(where, "web-00000").read("images"), rows_a_group=10)
    opened = queries.open_run(str(folder))
    for row in (0, 9, 10, 28):
        found = opened.picture_bytes(f"web-00000-{row:05d}")
        assert found == (None if row % 10 == 9 else jpeg(row))
    assert sorted(opened._pictures.groups) == [("web-00000", 0), ("web-00000", 1), ("web-00000", 2)]
    assert {len(cells) for cells in opened._pictures.groups.values()} == {10}
    # the report reads the groups alone that hold a picture that it shows
    keys = {"web-00000-00003", "web-00000-00021"}
    rows = tables.read_pictures(where, "web-00000", keys, ["image"])
    assert {key: row["image"] for key, row in rows.items()} == {
        "web-00000-00003": jpeg(3),
        "web-00000-00021": jpeg(21),
    }
    opened.close()


def test_large_row_groups_are_read_up_to_the_picture(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Column:
        total_uncompressed_size = 1 << 40

    expected = run.picture_bytes("web-00000-00028")
    run._pictures.groups.clear()
    monkeypatch.setattr(pictures, "_column_of", lambda group, name: Column())
    assert run.picture_bytes("web-00000-00028") == expected
    assert not run._pictures.groups


def test_duckdb_opens_no_file_once_the_run_is_open(run: Run) -> None:
    for sql in ("SELECT * FROM read_text('/etc/passwd')", "ATTACH '/tmp/x.duckdb' AS other"):
        with pytest.raises(Exception, match="disabled by configuration"):
            run._rows(sql)


def test_the_second_start_reads_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries.open_run(str(folder)).close()
    assert list((folder / ".inspect").glob("*.duckdb"))

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(index, "_fill", fail)
    queries.open_run(str(folder)).close()
    queries.open_run(str(folder), may_write=False).close()


def test_read_only_leaves_no_trace(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    before = sorted(folder.rglob("*"))
    opened = queries.open_run(str(folder), may_write=False)
    assert opened.summary()["pairs"] == 57
    opened.close()
    assert sorted(folder.rglob("*")) == before


def test_a_pair_without_a_picture_s_row_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    where = RunDir(str(folder))
    images = Shard(where, "web-00000").read("images")
    where.write_table(where.table("images", "web-00000"), images.slice(2))
    opened = queries.open_run(str(folder))
    found = everything(opened, Query())
    assert len(found) == 57
    assert [len(pair["texts"]) for pair in found[:5]] == [0, 0, 0, 0, 1]
    assert opened.thumbnail("web-00000-00000") is None
    opened.close()


def test_a_run_without_decisions_can_be_reviewed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    shutil.rmtree(folder / "decisions")
    opened = queries.open_run(str(folder))
    reasons = {row["reason"] for row in opened.summary()["counts"]}
    assert reasons == {None, "download_failed"}
    tried = opened.try_thresholds(Thresholds(0.5))["all"]
    assert tried["kept"] == 0 and 0 < tried["would_keep"] == tried["joins"] < 54
    assert len(everything(opened, Query(keep=False))) == 57
    opened.close()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"capfilt\[inspect\]\""):
        queries.open_run(str(make_run(tmp_path / "run", shards=1, pictures=1)))


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    queries.open_run(str(folder)).close()
    (index,) = (folder / ".inspect").iterdir()
    index.write_bytes(b"damage")
    opened = queries.open_run(str(folder))
    assert opened.summary()["pairs"] == 57
    opened.close()


def test_a_folder_that_is_no_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match="not there"):
        queries.open_run(str(tmp_path / "none"))
    with pytest.raises(CapfiltError, match="no scores yet"):
        queries.open_run(str(tmp_path))


def test_labels_follow_the_content_and_estimate_the_precision(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    opened = queries.open_run(str(folder))
    pairs = everything(opened, Query(order="random", seed=3, source="web", keep=True))
    for number, pair in enumerate(pairs[:20]):
        basis = opened.label_basis(pair["pair_id"])
        assert basis is not None and basis["matcher"] == "f" * 64
        verdict = "wrong" if number < 5 else "right"
        sampling = "random" if number % 2 else "threshold"
        opened.labels.append(
            Label(**basis, verdict=verdict, reviewer="ann", time=utc_now(), sampling=sampling)
        )
    result = opened.try_thresholds(Thresholds(0.5))["all"]["precision"]
    assert result["any"]["labels"] == 20 and result["any"]["precision"] == 0.75
    assert result["random"]["labels"] == 10 and result["random"]["precision"] == 0.8
    assert result["random"]["low"] == pytest.approx(0.490, abs=1e-3)  # Wilson, 8 of 10
    assert result["random"]["high"] == pytest.approx(0.943, abs=1e-3)
    assert result["random"]["sources"] == ["web"]
    assert len(everything(opened, Query(review="mine"))) == 20
    assert len(everything(opened, Query(review="todo"))) == 94
    # what was picked by its score comes again in a random sample, which would be biased without it
    sample = Query(order="random", seed=3, review="todo", source="web")
    left = [pair["pair_id"] for pair in everything(opened, sample)]
    picked = [pair["pair_id"] for number, pair in enumerate(pairs[:20]) if number % 2 == 0]
    drawn = [pair["pair_id"] for number, pair in enumerate(pairs[:20]) if number % 2]
    assert set(picked) <= set(left) and not set(drawn) & set(left)
    assert len(everything(opened, Query(review="wrong"))) == 5
    # a label of other content under the same id is not this pair's
    basis = opened.label_basis(pairs[20]["pair_id"])
    assert basis is not None
    stranger = {**basis, "uid": "0" * 64}
    opened.labels.append(Label(**stranger, verdict="right", reviewer="ann", time=utc_now()))
    assert len(everything(opened, Query(review="mine"))) == 20
    # and one that moved is found by its content
    moved = {**basis, "pair_id": "web-00077-00000/text0"}
    opened.labels.append(Label(**moved, verdict="right", reviewer="bob", time=utc_now()))
    assert [pair["pair_id"] for pair in everything(opened, Query(review="labelled"))].count(
        pairs[20]["pair_id"]
    ) == 1
    opened.labels.append(Label(**basis, verdict="wrong", reviewer="eve", time=utc_now()))
    disputed = everything(opened, Query(review="disputed"))
    assert [pair["pair_id"] for pair in disputed] == [pairs[20]["pair_id"]]
    opened.close()


def test_a_page_that_was_reviewed_meanwhile_is_no_dead_end(tmp_path: Path) -> None:
    opened = queries.open_run(str(make_run(tmp_path / "run")))
    query = Query(order="random", seed=9, review="todo", source="web", limit=15)

    def label(pairs: list[dict[str, Any]]) -> None:
        for pair in pairs:
            basis = opened.label_basis(pair["pair_id"])
            assert basis is not None
            given = Label(
                **basis, verdict="right", reviewer="ann", time=utc_now(), sampling=query.sampling
            )
            opened.labels.append(given)

    def page(**place: str) -> queries.Page:
        (name,) = place
        return opened.page(replace(query, **{name: _cursor(place, name)}), HALF, "ann")

    first = opened.page(query, HALF, "ann")
    ahead = page(after=first.next)
    assert ahead.previous is not None
    label(first.pairs)
    # nothing is before the second page now, and a page that was fetched before that knows no better
    second = page(after=first.next)
    assert second.pairs and second.previous is None
    back = page(before=ahead.previous)
    assert back.pairs == second.pairs and back.previous is None and back.next is not None
    # some of the first page are left: there is a way back to them
    opened.labels.undo("ann")
    back = page(before=page(after=first.next).previous)
    assert [pair["pair_id"] for pair in back.pairs] == [first.pairs[-1]["pair_id"]]
    # the last page, all reviewed and loaded again
    shown, cursor = second, first.next
    while True:
        label(shown.pairs)
        if shown.next is None:
            break
        cursor = shown.next
        shown = page(after=cursor)
    left = page(after=cursor)
    assert [pair["pair_id"] for pair in left.pairs] == [first.pairs[-1]["pair_id"]]
    assert left.total == 1 and left.previous is left.next is None
    opened.close()


def test_labels_of_another_matcher_are_no_estimate(tmp_path: Path) -> None:
    """This one may have been taught with them; `calibrate` leaves them out too."""
    opened = queries.open_run(str(make_run(tmp_path / "run")))
    pairs = everything(opened, Query(order="random", seed=3, source="web", keep=True))
    matchers = [None] * 2 + ["f" * 64] * 4 + ["0" * 64] * 6
    for number, (pair, matcher) in enumerate(zip(pairs, matchers, strict=False)):
        said = {**opened.label_basis(pair["pair_id"]), "matcher": matcher}
        verdict = "wrong" if number < 3 else "right"
        opened.labels.append(
            Label(**said, verdict=verdict, reviewer="ann", time=utc_now(), sampling="random")
        )
    found = opened.try_thresholds(HALF)["all"]
    for estimate in found["precision"].values():
        assert estimate["labels"] == 6 and estimate["precision"] == 0.5
    assert found["other_matcher"] == 6
    # the cards and the filters still show them
    assert len(everything(opened, Query(review="mine"))) == 12
    opened.close()


@pytest.mark.parametrize("as_binary", [False, True])
def test_search_finds_the_nearest_both_ways(tmp_path: Path, as_binary: bool) -> None:
    folder = make_run(tmp_path / "run")
    assert open_embeddings(RunDir(str(folder))) is None
    add_embeddings(folder, as_binary=as_binary)
    found = open_embeddings(RunDir(str(folder)))
    assert found is not None
    vector = found.vector("web-00001-00004", "image")
    assert vector is not None and found.vector("nothing", "image") is None
    assert found.top(vector, "text", 3)[0][0] == "web-00001-00004/text0"
    assert found.top(vector, "image", 1) == [("web-00001-00004", pytest.approx(1, abs=2e-3))]
    assert found.top(vector, "image", 60, "web-00001-00004")[0][0] != "web-00001-00004"
    values = [value for _, value in found.top(vector, "text", 1000)]
    assert len(values) == 120 and values == sorted(values, reverse=True)
    with pytest.raises(InputError, match="another matcher"):
        found.top(np.ones(5), "text")
    with pytest.raises(InputError, match="no embedding"):
        found.top(np.zeros(8), "text")
    opened = queries.open_run(str(folder))
    numbers = opened.numbers_of("image", found.top(vector, "image", 5))
    page = opened.page(Query(order="similar"), HALF, "ann", numbers, True)
    assert page.pairs[0]["key"] == "web-00001-00004"
    assert {pair["key"] for pair in page.pairs} <= {
        name for name, _ in found.top(vector, "image", 5)
    }
    kept = opened.page(Query(order="similar", keep=True), HALF, "ann", numbers, True)
    assert kept.total <= page.total
    opened.close()

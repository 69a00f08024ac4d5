"""Calibration: probabilities that come true, thresholds that keep their word, and clear refusals."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt import calibrate as driver
from capfilt import manifest
from capfilt.errors import InputError, UsageError
from capfilt.evaluation import calibration as cal
from capfilt.inspect.calibration_page import calibration_page
from capfilt.inspect.labels import Label, LabelStore
from capfilt.manifest import Identity
from capfilt.schema import SCORES
from capfilt.shards import RunDir

MATCHER = "m" * 64


def drawn(
    count: int, kind: str, random: np.random.Generator, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a kind of pair, as a fair matcher gives them."""
    centre = {"match": 2.0, "random": -2.5, "near": -0.8, "swap": 0.5}[kind] + shift
    logit = random.normal(centre, 1.3, count)
    return 1 / (1 + np.exp(-logit)), 0.1 * logit + random.normal(0.2, 0.08, count)


def web(count: int, share: float, seed: int = 0) -> tuple[cal.Pool, np.ndarray]:
    """A pool, and which of it match."""
    random = np.random.default_rng(seed)
    kinds = random.choice(
        ["match", "random", "near", "swap"], count, p=[share, *((1 - share) * np.array([0.75, 0.17, 0.08]))]
    )  # fmt: skip
    itm, itc = np.empty(count), np.empty(count)
    for kind in ("match", "random", "near", "swap"):  # a set would come in another order each time
        rows = kinds == kind
        itm[rows], itc[rows] = drawn(int(rows.sum()), kind, random)
    return cal.Pool(itm, itc, count), kinds == "match"


def made_up(count: int = 600, seed: int = 1) -> cal.Examples:
    random = np.random.default_rng(seed)
    parts = [(kind, drawn(count, kind, random)) for kind in ("match", "random", "near", "swap")]
    kinds = np.array([kind for kind, _ in parts for _ in range(count)], object)
    images = np.array(
        [f"{kind in ('match', 'swap')}{i // 3}" for kind, _ in parts for i in range(count)], object
    )
    return cal.Examples(
        np.concatenate([each[0] for _, each in parts]), np.concatenate([each[1] for _, each in parts]),
        kinds == "match", images, kinds,
    )  # fmt: skip


def reviewed(pool: cal.Pool, match: np.ndarray, rows: np.ndarray) -> cal.Examples:
    return cal.Examples(
        pool.itm[rows], pool.itc[rows], match[rows], np.array([f"i{row}" for row in rows], object),
        np.array(["label"] * len(rows), object),
    )  # fmt: skip


def fit(examples: cal.Examples, pool: cal.Pool, target: float = 0.95, **options) -> cal.Calibration:
    options.setdefault("resamples", 0)
    return cal.calibrate(
        {"web": examples}, {"web": pool}, target=target, matcher=MATCHER, **options
    )


@pytest.mark.parametrize("share", [0.25, 0.45, 0.8])
@pytest.mark.parametrize("target", [0.9, 0.95])
def test_made_up_pairs_find_the_mix_and_keep_the_precision(share, target):
    pool, match = web(6000, share)
    found = fit(made_up(), pool, target)
    part = found.report["sources"]["web"]
    assert abs(part["match_share"] - share) < 0.06
    keep = found.keeps(pool.itm, pool.itc, "web")
    assert abs(match[keep].mean() - target) < 0.035
    assert abs(part["recall"] - keep[match].mean()) < 0.1
    assert part["precision"] >= target


def test_the_share_of_matches_matters():
    """The same examples on a worse web give a higher threshold."""
    good, bad = (fit(made_up(), web(4000, share)[0], score="itm") for share in (0.8, 0.25))
    assert good.sources["web"].threshold < bad.sources["web"].threshold


@pytest.mark.parametrize("near_threshold", [False, True])
def test_labels_keep_the_precision_however_they_were_picked(near_threshold):
    pool, match = web(8000, 0.45)
    random = np.random.default_rng(3)
    chance = np.exp(-np.abs(pool.itm - 0.5) * 3) if near_threshold else np.ones(len(match))
    precisions = []
    for _ in range(4):
        rows = random.choice(len(match), 400, False, chance / chance.sum())
        found = fit(reviewed(pool, match, rows), pool, 0.9)
        precisions.append(match[found.keeps(pool.itm, pool.itc, "web")].mean())
    assert abs(np.mean(precisions) - 0.9) < 0.03
    assert found.report["labels"] == "reviewed"


def test_the_interval_holds_the_truth_and_halving_it_is_told():
    pool, match = web(5000, 0.5)
    rows = np.random.default_rng(0).choice(len(match), 300, False)
    found = fit(reviewed(pool, match, rows), pool, 0.9, resamples=60)
    part = found.report["sources"]["web"]
    low, high = part["precision_interval"]
    true = match[found.keeps(pool.itm, pool.itc, "web")].mean()
    assert low - 0.02 < true < high + 0.02 and low < part["precision"] < high
    assert part["more_labels"] == 900
    assert part["auc_interval"][0] < part["auc"] < part["auc_interval"][1]
    assert found.report["noise_ratio"] == pytest.approx(1 - part["precision"])


def test_an_image_is_never_on_both_sides_of_a_split():
    images = made_up().image
    folds = cal.fold_of(images, 0)
    assert len({(image, fold) for image, fold in zip(images, folds, strict=True)}) == len(
        set(images)
    )
    assert np.bincount(folds).min() > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.floats(0, 1)), min_size=1, max_size=30), st.floats(0.01, 0.99))  # fmt: skip
def test_the_threshold_is_the_lowest_that_reaches_the_target(pairs, target):
    scores = np.array([score for score, _ in pairs])
    probability = np.array([p for _, p in pairs])
    threshold, best = cal.pick_threshold(scores, probability, target)
    means = {t: probability[scores >= t].mean() for t in set(scores.tolist())}
    assert best == pytest.approx(max(means.values()))
    fitting = [t for t, mean in means.items() if mean >= target + 1e-9]
    if fitting:
        assert threshold is not None and threshold <= min(fitting)
    if threshold is not None:
        assert means[threshold] >= target - 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(cal.METHODS)))
def test_more_score_is_never_less_probability(seed, method):
    random = np.random.default_rng(seed)
    scores = random.normal(size=60)
    match = random.random(60) < 0.5
    match[:2] = [True, False]
    curve = cal.METHODS[method](scores, match, random.random(60) + 0.01)
    values = curve(np.linspace(-5, 5, 200))
    assert (np.diff(values) >= -1e-12).all() and (values >= 0).all() and (values <= 1).all()


def test_files_come_back_as_they_were(tmp_path: Path):
    pool, _ = web(2000, 0.5)
    found = fit(made_up(200), pool, 0.9, resamples=25)
    path = tmp_path / "deep" / "calibration.json"
    cal.write_calibration(path, found)
    again = cal.read_calibration(path)
    assert again.sources == found.sources and again.score == found.score
    np.testing.assert_array_equal(
        again.probability(pool.itm, pool.itc, "web"), found.probability(pool.itm, pool.itc, "web")
    )
    first = path.read_bytes()
    cal.write_calibration(path, fit(made_up(200), pool, 0.9, resamples=25))
    assert path.read_bytes() == first
    page = calibration_page(again)
    assert page.count("<svg") == 3 and "http" not in page and "web texts" in page
    with pytest.raises(InputError, match="nothing on synthetic"):
        again.keeps(pool.itm, pool.itc, "synthetic")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other"}',
     '{"format": "capfilt-calibration-1", "sources": {"web": {"threshold": 0.5, "match_share": 0.5, "x": [1, 0], "y": [0, 1]}}, "matcher": "m", "score": "itm", "weights": [1, 1], "target": 0.9}',
     '{"format": "capfilt-calibration-1", "sources": {}, "matcher": "m", "score": "other", "weights": [1, 1], "target": 0.9}'],
)  # fmt: skip
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no calibration"):
        cal.read_calibration(path)
    with pytest.raises(InputError, match="capfilt calibrate"):
        cal.read_calibration(tmp_path / "none.json")


def test_clear_errors():
    pool, match = web(2000, 0.5)
    some = np.arange(300)
    with pytest.raises(UsageError, match="too few"):
        fit(reviewed(pool, match, some[:15]), pool)
    with pytest.raises(UsageError, match="are right: a calibration needs both"):
        fit(reviewed(pool, np.ones(2000, bool), some), pool)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        fit(reviewed(pool, match, some), pool, 1.0)
    with pytest.raises(UsageError, match="none of itm"):
        fit(reviewed(pool, match, some), pool, score="sum")
    noise = np.random.default_rng(0).random(2000) < 0.3
    with pytest.raises(UsageError, match=r"no threshold reaches precision 0\.99"):
        fit(reviewed(pool, noise, some), pool, 0.99, score="itm")


def test_what_is_out_of_reach_says_how_far_it_is():
    pool, match = web(4000, 0.5)
    wrong = np.random.default_rng(5).random(4000) < 0.25  # a fourth of the best are wrong too
    rows = np.random.default_rng(6).choice(4000, 600, False)
    with pytest.raises(UsageError) as error:
        fit(reviewed(pool, match & ~wrong, rows), pool, 0.97, score="itm")
    said = str(error.value)
    assert "no threshold reaches precision 0.97" in said and "web texts 0." in said
    best = float(said.split("web texts ")[1].split(" ")[0])
    assert 0.7 < best < 0.97 and "% of the right ones" in said and "review more pairs" in said
    lower = float(said.split("--target precision=")[1].split(")")[0])
    assert lower <= best
    assert fit(reviewed(pool, match & ~wrong, rows), pool, lower - 0.05, score="itm")


def test_a_curve_that_ends_in_a_few_lucky_labels_reaches_nothing():
    """Isotonic regression says 1.0 at the top where the top ten happen to be right."""
    scores = np.linspace(0.01, 0.99, 400)
    pool = cal.Pool(scores, scores, 400)
    match = np.random.default_rng(0).random(400) < 0.5
    match[-10:] = True
    match[-40:-10:2] = False
    examples = reviewed(pool, match, np.arange(400))
    with pytest.raises(UsageError, match=r"no threshold reaches precision 0\.95"):
        fit(examples, pool, 0.95, score="itc")


def test_few_labels_above_the_threshold_are_no_promise():
    pool, match = web(6000, 0.5)
    some = np.random.default_rng(1).choice(6000, 60, False)
    part = fit(reviewed(pool, match, some), pool, 0.9, resamples=60).report["sources"]["web"]
    assert part["kept_labels"] < cal.labels_to_show(0.9) == 35 and cal.labels_to_show(0.95) == 73
    assert any("few labels lie above the threshold" in each for each in part["warnings"])
    many = np.random.default_rng(1).choice(6000, 5000, False)
    found = fit(reviewed(pool, match, many), pool, 0.9, resamples=60)
    assert found.report["warnings"] == [] == found.report["sources"]["web"]["warnings"]
    checked = found.report["sources"]["web"]["held_out"]
    assert abs(checked["precision"] - 0.9) < 0.03 and checked["labels"] > 1000
    assert abs(checked["recall"] - found.report["sources"]["web"]["recall"]) < 0.05


def test_every_reason_to_doubt_is_told():
    def said(**values):
        found = {
            "threshold": 0.5, "kept_labels": 500, "precision_interval": (0.94, 0.96),
            "held_out": {"precision": 0.95, "recall": 0.8, "labels": 500}, "recall": 0.8,
            "best_precision": 0.97, "best_recall": 0.5, **values,
        }  # fmt: skip
        scores = np.linspace(0, 1, 100)
        return cal.warnings_of(found, 0.95, scores, scores)

    assert said() == []
    assert "takes 73" in said(kept_labels=40)[0]
    assert "as low as 88.0%" in said(precision_interval=(0.88, 0.99))[0]
    assert said(precision_interval=(0.93, 0.99)) == []
    assert (
        "91.0% of the 40 that are kept"
        in said(held_out={"precision": 0.91, "recall": 0.8, "labels": 40})[0]
    )
    assert "none are kept" in said(held_out={"precision": None, "recall": 0.0, "labels": 0})[0]
    assert "keeps 3.0% of the right ones; the precision that keeps 10%" in said(recall=0.03)[0]
    assert (
        "none of them are kept; the best that the labels bear out is 90.0%"
        in said(threshold=None, best_precision=0.9)[0]
    )


def test_a_source_that_cannot_be_had_is_said_and_the_other_is_kept():
    pool, match = web(4000, 0.5)
    other, _ = web(4000, 0.5, seed=9)
    noise = np.random.default_rng(3).random(4000) < 0.4
    rows = np.random.default_rng(2).choice(4000, 1500, False)
    found = cal.calibrate(
        {"web": reviewed(pool, match, rows), "synthetic": reviewed(other, noise, rows)},
        {"web": pool, "synthetic": other}, target=0.9, matcher=MATCHER, score="itm", resamples=0,
    )  # fmt: skip
    assert found.sources["synthetic"].threshold is None
    assert found.sources["web"].threshold is not None
    assert [each for each in found.report["warnings"] if "none of them are kept" in each] == [
        f"synthetic texts: {found.report['sources']['synthetic']['warnings'][0]}"
    ]
    assert not found.keeps(other.itm, other.itc, "synthetic").any()
    cited = cal.promise(found)
    assert cited["warnings"] == found.report["warnings"] and cited["target"] == 0.9
    json.dumps(cited, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans(), st.floats(0.1, 2)), min_size=1, max_size=30), st.integers(1, 8))  # fmt: skip
def test_the_best_that_can_be_reached(rows, fewest):
    scores, match, weights = (np.array(column) for column in zip(*rows, strict=True))
    precision, recall = cal.best_reachable(scores, match, weights, fewest)
    allowed = {}
    for threshold in set(scores.tolist()):
        kept = scores >= threshold
        if kept.sum() >= min(fewest, len(rows)):
            right = weights[kept & match].sum()
            allowed[threshold] = (
                right / weights[kept].sum(),
                right / max(weights[match].sum(), 1e-12),
            )
    assert precision == pytest.approx(max(each[0] for each in allowed.values()))
    assert any(
        (precision, recall) == (pytest.approx(p), pytest.approx(r)) for p, r in allowed.values()
    )


def test_curves_have_bands_that_hold_them():
    pool, match = web(3000, 0.5)
    rows = np.random.default_rng(0).choice(3000, 400, False)
    lines = fit(reviewed(pool, match, rows), pool, 0.8, resamples=60).report["sources"]["web"][
        "curves"
    ]
    for name in ("true_positive", "precision"):
        low, high = (np.array(each) for each in lines[f"{name}_interval"])
        line = np.array(lines[name])
        assert len(low) == len(high) == len(line) and (low <= high).all()
        inside = (low - 0.02 <= line) & (line <= high + 0.02)
        assert inside.mean() > 0.9
    assert "precision_interval" not in fit(reviewed(pool, match, rows), pool, 0.8).report["sources"]["web"]["curves"]  # fmt: skip


# --- a run ---------------------------------------------------------------------------------------


def scored_run(folder: Path, count: int = 400) -> tuple[RunDir, dict[str, bool]]:
    """A run of made-up scores, and which of its pairs match, by pair id."""
    run = RunDir(str(folder))
    truth: dict[str, bool] = {}
    for source, text in (("web", "text0"), ("synthetic", "synthetic0")):
        pool, match = web(count, 0.5, seed=len(source))
        for row in range(count):
            truth[f"web-{row % 2:05d}-{row:05d}/{text}"] = bool(match[row])
        if source == "web":
            pools = {source: pool}
        else:
            pools[source] = pool
    for number in range(2):
        rows = []
        for source, pool in pools.items():
            suffix = "text0" if source == "web" else "synthetic0"
            for row in range(number, count, 2):
                key = f"web-{number:05d}-{row:05d}"
                rows.append({"pair_id": f"{key}/{suffix}", "key": key, "source": source, "caption": f"text {row}",
                             "uid": f"{source}{row:08d}".encode().hex(), "itm_prob": pool.itm[row], "itc_sim": pool.itc[row],
                             "error": None})  # fmt: skip
        name = f"web-{number:05d}"
        rows.sort(key=lambda each: each["pair_id"])
        run.write_table(run.table("scores", name), pa.Table.from_pylist(rows, SCORES))
        identity = Identity("score", 1, {}, {}, {"matcher": MATCHER})
        manifest.sign(run, run.manifest("scores", name), identity, rows=1, counts={}, seconds=0.0)
    return run, truth


def config_of(folder: Path, **extra):
    from capfilt.config import Config

    values = {
        "run_dir": str(folder),
        "human": {"pairs": "h.jsonl"},
        "web": {"pairs": "w.jsonl"},
        "pretrain": None,
    }
    return Config.model_validate({**values, **extra})


def review(
    folder: Path, truth: dict[str, bool], count: int, matcher: str = MATCHER, **more
) -> None:
    store = LabelStore(folder)
    lines = []
    for number, (pair_id, match) in enumerate(
        sorted(truth.items(), key=lambda each: hash_of(each[0]))
    ):
        if number >= count:
            break
        verdict = more.get("verdict") or ("right" if match else "wrong")
        lines.append(
            Label(pair_id, None, verdict, "ann", "2025-01-31T12:00:00Z", matcher=matcher).line()
        )
    store.import_lines("\n".join(lines))


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def test_a_run_is_calibrated_from_its_labels(tmp_path: Path):
    run, truth = scored_run(tmp_path / "run")
    review(tmp_path / "run" / "labels", truth, 400)
    config = config_of(tmp_path / "run")
    found, path = driver.run_calibration(config, target=0.9)
    assert path == tmp_path / "run" / "calibration.json" and path.with_suffix(".html").exists()
    assert set(found.sources) == {"web", "synthetic"}
    assert json.loads(path.read_text())["matcher"] == MATCHER
    from capfilt.config import Filter
    from capfilt.shards import Shard
    from capfilt.stages.decide import FilterStage

    kept, decide = [], FilterStage(Filter(calibration=str(path)), run).open("cpu")
    for name in run.shards("scores"):
        table = decide(Shard(run, name))
        kept += [truth[row["pair_id"]] for row in table.to_pylist() if row["keep"]]
    assert abs(np.mean(kept) - 0.9) < 0.07


def config_file(folder: Path) -> Path:
    path = folder.parent / "run.yaml"
    path.write_text(
        f"run_dir: {folder}\nhuman: {{pairs: h.jsonl}}\nweb: {{pairs: w.jsonl}}\npretrain: null\n"
    )
    return path


def test_an_unreliable_promise_is_told_wherever_it_is_shown(tmp_path: Path, capfilt):
    run, truth = scored_run(tmp_path / "run")
    config = config_file(tmp_path / "run")
    review(tmp_path / "run" / "labels", truth, 90)
    said = capfilt("calibrate", config, "--target", "precision=0.9")
    assert said.code == 0, said.err
    assert "warning: web texts: few labels lie above the threshold" in said.out
    assert "expected noise ratio of the web and synthetic texts: " in said.out
    assert "on held-out labels" in said.out
    path = tmp_path / "run" / "calibration.json"
    stored = json.loads(path.read_text())["report"]
    assert stored["warnings"] and stored["target"] == 0.9
    page = path.with_suffix(".html").read_text()
    assert "rely on this precision yet" in page and "few labels lie above" in page
    assert page.count("class='band'") == 4 and page.count("class='goal'") == 2
    found = capfilt("calibrate", config, "--target", "precision=0.9", "--json").json
    assert found["warnings"] == stored["warnings"]
    # the decisions, the export and the report quote it
    from capfilt.config import Filter, load
    from capfilt.engine.local import run_stage
    from capfilt.inspect.report import summary, write_report
    from capfilt.stages.decide import FilterStage
    from capfilt.stages.export import ExportStage

    assert run_stage(
        FilterStage(Filter(calibration=str(path)), run), run, run.shards("scores")
    ).done
    quoted = manifest.read(run, run.manifest("decisions", "web-00000"))
    assert quoted["calibration"]["warnings"] == stored["warnings"]
    assert ExportStage(load(config).export, path).citation() == {
        "calibration": quoted["calibration"]
    }
    assert ExportStage(load(config).export).citation() == {}
    facts = summary(run)
    assert facts["calibration"]["digest"] == quoted["weights"]["calibration"]
    assert facts["noise_ratios"]["web"]["filtered"] == quoted_below(run)
    images_for(run)
    html = Path(write_report(run, load(config))).read_text()
    assert "What the calibration promised" in html and "few labels lie above" in html
    assert facts["calibration"]["digest"][:12] in html


def quoted_below(run: RunDir) -> int:
    from capfilt.shards import Shard

    rows = [row for name in run.shards("decisions") for row in Shard(run, name).read("decisions").to_pylist()]  # fmt: skip
    return sum(row["reason"] == "below_precision" and row["source"] == "web" for row in rows)


def images_for(run: RunDir) -> None:
    """Rows of images/ for the run's pairs, without pictures."""
    from capfilt.schema import IMAGES
    from capfilt.shards import Shard

    for name in run.shards("scores"):
        keys = sorted(set(Shard(run, name).read("scores")["key"].to_pylist()))
        blank = dict.fromkeys(IMAGES.names)
        rows = [
            {**blank, "key": key, "source": "web", "captions": [], "status": "success"}
            for key in keys
        ]
        run.write_table(run.table("images", name), pa.Table.from_pylist(rows, IMAGES))
        identity = Identity("images", 1, {})
        manifest.sign(run, run.manifest("images", name), identity, rows=len(rows), counts={}, seconds=0.0)  # fmt: skip


def test_a_precision_that_is_out_of_reach_ends_with_2(tmp_path: Path, capfilt):
    _, truth = scored_run(tmp_path / "run")
    random = np.random.default_rng(0)
    review(tmp_path / "run" / "labels", {pair: bool(random.random() < 0.5) for pair in truth}, 400)
    said = capfilt("calibrate", config_file(tmp_path / "run"), "--target", "precision=0.99")
    assert said.code == 2 and "no threshold reaches precision 0.99" in said.err
    assert "synthetic texts 0." in said.err and "ask for less" in said.err
    assert not (tmp_path / "run" / "calibration.json").exists()


def test_votes_drafts_and_unknown_pairs(tmp_path: Path, caplog):
    run, truth = scored_run(tmp_path / "run")
    folder = tmp_path / "labels"
    review(folder, truth, 300)
    store = LabelStore(folder)
    some = min(truth, key=hash_of)
    for who, verdict in (("bob", "wrong"), ("eve", "wrong"), ("joe", "unsure")):
        store.append(Label(some, None, verdict, who, "2025-02-01T12:00:00Z", matcher=MATCHER))
    store.append(Label("gone-1/text0", None, "right", "bob", "2025-02-01T12:00:00Z"))
    from capfilt.inspect.labels import read_labels

    with caplog.at_level(logging.WARNING):
        found = driver.from_labels(run, read_labels(folder), folder, MATCHER, ("web", "synthetic"))
    assert "1 labelled pairs are not among" in caplog.text
    assert len(found["web"]) + len(found["synthetic"]) == 300
    sourced = found["synthetic" if "synthetic" in some else "web"]
    assert not sourced.match[list(sourced.image).index(some.partition("/")[0])]


def test_labels_that_cannot_be_used_are_refused(tmp_path: Path):
    _, truth = scored_run(tmp_path / "run")
    config = config_of(tmp_path / "run")

    def message(folder: str) -> str:
        with pytest.raises(UsageError) as error:
            driver.run_calibration(config, target=0.9, labels=tmp_path / folder)
        return str(error.value)

    review(tmp_path / "other", truth, 200, matcher="n" * 64)
    assert "another matcher" in message("other")
    review(tmp_path / "few", truth, 20)
    assert "too few" in message("few")
    review(tmp_path / "one", truth, 200, verdict="right")
    assert "a calibration needs both" in message("one")
    assert "too few" in message("empty")
    with pytest.raises(UsageError):
        driver.run_calibration(
            config, target=0.9
        )  # no labels, nothing held out, not even human pairs
    with pytest.raises(InputError, match="capfilt score"):
        driver.run_calibration(config_of(tmp_path / "nothing"), target=0.9)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 human and 60 web pictures scored by a random matcher."""
    import torch

    from capfilt.config import Score
    from capfilt.models import folder as model_folder
    from capfilt.models.med import MED
    from capfilt.models.med_config import MEDConfig
    from capfilt.models.tokens import load_tokenizer
    from capfilt.shards import Shard
    from capfilt.stage import identify, identify_shared, run_shard
    from capfilt.stages.score import ScoreStage

    folder = tmp_path_factory.mktemp("tiny") / "run"
    run = RunDir(str(folder))
    write_pictures(run, {"human-00000": 70, "web-00000": 60})
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = MED(
        MEDConfig(
            image_size_px=32, vision_width=32, vision_depth=1, vision_heads=2, vision_mlp_width=48,
            vocab_size=len(tokenizer), text_width=32, text_depth=2, text_heads=4, text_ffn_width=48,
            max_positions=40, embed_dim=16,
        )
    ).eval()  # fmt: skip
    model_folder.save(model, tokenizer, folder / "models" / "matcher", vocabulary=None)
    stage = ScoreStage(Score(), folder / "models" / "matcher", False, "web")
    shard = Shard(run, "web-00000")
    run_shard(
        stage.open("cpu"),
        stage,
        shard,
        identify(stage, run, shard.name, identify_shared(stage, run)),
    )
    return folder


def write_pictures(run: RunDir, sizes: dict[str, int]) -> None:
    import hashlib
    import io

    from PIL import Image

    from capfilt.schema import CAPTIONS, IMAGES

    colours = (
        "red",
        "green",
        "blue",
        "white",
        "black",
        "yellow",
        "pink",
        "brown",
        "orange",
        "gray",
    )
    things = ("dog", "house", "tree", "boat", "ball", "horse", "chair")
    for name, size in sizes.items():
        source = name.partition("-")[0]
        rows, captions = [], []
        for row in range(size):
            buffer = io.BytesIO()
            Image.new("RGB", (24 + row, 30), colours[row % 10]).save(buffer, "PNG")
            key, data = f"{name}-{row:05d}", buffer.getvalue()
            text = f"a {colours[row % 10]} {things[row // 10]}"
            rows.append({**dict.fromkeys(IMAGES.names), "key": key, "source": source, "status": "success", "image": data,
                         "captions": [text], "sha256": hashlib.sha256(data).hexdigest(), "width": 24 + row, "height": 30})  # fmt: skip
            captions.append({"pair_id": f"{key}/synthetic0", "key": key, "source": "synthetic", "caption": f"{text} there",
                             "logprob": -1.0})  # fmt: skip
        tables = [("images", IMAGES, rows)] + (
            [("captions", CAPTIONS, captions)] if source == "web" else []
        )
        for table, schema, listed in tables:
            run.write_table(run.table(table, name), pa.Table.from_pylist(listed, schema))
            manifest.sign(
                run,
                run.manifest(table, name),
                Identity(table, 1, {}),
                rows=size,
                counts={},
                seconds=0.0,
            )


def test_pairs_are_made_up_where_there_are_no_labels(tiny_run: Path, tmp_path: Path):
    config = config_of(tiny_run, matcher={"val_fraction": 0.5})
    found, _ = driver.run_calibration(config, target=0.1, out=tmp_path / "c.json")
    assert found.report["labels"] == "made up"
    mix = found.report["sources"]["web"]["mix"]
    assert {"match", "random", "near"} <= set(mix) and sum(mix.values()) == pytest.approx(1)
    with pytest.raises(UsageError, match="val_fraction"):
        driver.run_calibration(config_of(tiny_run), target=0.1, out=tmp_path / "c.json")
    with pytest.raises(UsageError, match="too few"):
        driver.run_calibration(
            config_of(tiny_run, matcher={"val_fraction": 0.05}), target=0.1, out=tmp_path / "c.json"
        )


def test_human_pairs_of_ones_own_serve_too(tiny_run: Path, tmp_path: Path):
    from PIL import Image

    lines = []
    for number in range(30):
        Image.new("RGB", (30, 30), (8 * number, 0, 90)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"a dog number {number}"}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    random = np.random.default_rng(0)
    made = driver._MadeUp(RunDir(str(tiny_run)), config_of(tiny_run), "cpu", False, random)
    _, texts = driver._read_pools(made.run, random)
    found = made.examples(tmp_path / "own.jsonl", texts)
    assert set(found) == {"web", "synthetic"}
    assert int(found["web"].match.sum()) == 30 and not found["web"].reviewed
    assert set(found["web"].kind) >= {"match", "random", "near"}
    own = dict(texts["web"])
    asked = made._mismatches(texts["web"], *load(tiny_run))
    assert all(pair.text != own[pair.key] for pair in asked)


def load(folder: Path):
    from capfilt.models import folder as model_folder

    return model_folder.load(folder / "models" / "matcher")[:2]

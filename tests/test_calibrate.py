"""`capfilt calibrate` on runs: labels, made-up pairs, and what it refuses."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_up_scores import MATCHER, web

from capfilt import calibrate as driver
from capfilt import manifest
from capfilt.config import load as load_config
from capfilt.errors import InputError, UsageError
from capfilt.inspect.labels import Label, LabelStore
from capfilt.manifest import Identity
from capfilt.schema import SCORES
from capfilt.shards import RunDir


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


def test_the_line_that_says_how_to_use_it_can_be_pasted(tmp_path: Path, capfilt):
    import shlex

    _, truth = scored_run(tmp_path / "my run")
    review(tmp_path / "my run" / "labels", truth, 400)
    given = f"run_dir={tmp_path / 'my run'}"
    config = config_file(tmp_path / "elsewhere")
    said = capfilt("calibrate", config, "--set", given, "--target", "precision=0.9")
    assert said.code == 0, said.err
    (line,) = [each for each in said.out.splitlines() if each.startswith("use it")]
    words = shlex.split(line.removeprefix("use it"))
    file = f"filter.calibration={tmp_path / 'my run' / 'calibration.json'}"
    assert words == ["capfilt", "filter", str(config), "--set", given, "--set", file]
    # a threshold of the config would hold beside it
    both = ("--set", "filter.itm_threshold=0.99")
    said = capfilt("calibrate", config, "--set", given, *both, "--target", "precision=0.9")
    assert "turned off by the line below: itm_threshold\n" in said.out
    words = shlex.split(said.out.splitlines()[-1].removeprefix("use it"))
    assert words[5:] == [*both, "--set", "filter.itm_threshold=null", "--set", file]
    decided = load_config(config, tuple(words[4::2])).filter
    assert decided.itm_threshold is None and decided.calibration is not None
    # and a folder that is not there is called that
    gone = tmp_path / "lables"
    said = capfilt("calibrate", config, "--set", given, "--labels", gone)
    assert said.code == 2 and f"labels '{gone}': the folder is not there" in said.err


def test_labels_of_another_source_promise_nothing(tmp_path: Path, capfilt):
    _, truth = scored_run(tmp_path / "run")
    web_texts = {pair: match for pair, match in truth.items() if pair.endswith("/text0")}
    others = {pair: match for pair, match in truth.items() if pair not in web_texts}
    review(tmp_path / "run" / "labels", web_texts, 300)
    review(tmp_path / "run" / "labels", others, 8)
    said = capfilt("calibrate", config_file(tmp_path / "run"), "--target", "precision=0.9")
    assert said.code == 0, said.err
    told = "synthetic texts: too few labels are of these texts (8), so no threshold is chosen"
    assert f"warning: {told}" in said.out
    path = tmp_path / "run" / "calibration.json"
    stored = json.loads(path.read_text())
    assert stored["sources"]["synthetic"]["threshold"] is None
    assert stored["sources"]["web"]["threshold"] is not None
    assert [each for each in stored["report"]["warnings"] if each.startswith(told)]
    assert "too few labels" in path.with_suffix(".html").read_text()
    # where the own labels don't reach it either, that is said too
    said = capfilt("calibrate", config_file(tmp_path / "run"), "--target", "precision=0.999999")
    assert said.code == 2 and "synthetic texts have too few labels of their own (8)" in said.err
    # too few of each source, though enough in all
    review(tmp_path / "split", web_texts, 30)
    review(tmp_path / "split", others, 30)
    with pytest.raises(
        UsageError, match=r"few of each source \(web texts: \d+ right, \d+ wrong; synth"
    ):
        driver.run_calibration(config_of(tmp_path / "run"), target=0.9, labels=tmp_path / "split")


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_human_pairs_of_ones_own_serve_too(
    tiny_run: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
):
    import torch
    from PIL import Image

    from capfilt.models.med import MED

    rounded: set[bool] = set()
    real = MED.encode_image
    monkeypatch.setattr(
        MED,
        "encode_image",
        lambda model, values: (
            rounded.add(torch.is_autocast_enabled("cpu")),
            real(model, values),
        )[1],
    )
    lines = []
    for number in range(30):
        Image.new("RGB", (30, 30), (8 * number, 0, 90)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"a dog number {number}"}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    random = np.random.default_rng(0)
    config = config_of(tiny_run, score={"precision": precision})
    made = driver._MadeUp(RunDir(str(tiny_run)), config, "cpu", False, random)
    _, texts = driver._read_pools(made.run, random)
    found = made.examples(tmp_path / "own.jsonl", texts)
    assert set(found) == {"web", "synthetic"}
    assert rounded == {precision == "bf16"}  # as `score` computes what the calibration is for
    assert int(found["web"].match.sum()) == 30 and not found["web"].reviewed
    assert set(found["web"].kind) >= {"match", "random", "near"}
    own = dict(texts["web"])
    asked = made._mismatches(texts["web"], *load(tiny_run))
    assert all(pair.text != own[pair.key] for pair in asked)


def load(folder: Path):
    from capfilt.models import folder as model_folder

    return model_folder.load(folder / "models" / "matcher")[:2]

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import typer.main
from tiny import Said, Tiny

from capfilt import cli, pipeline
from capfilt.errors import PartialError
from capfilt.shards import locked

Cli = Callable[..., Said]
ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "pyarrow", "pydantic", "numpy", "transformers", "datasets", "pandas")


def process(*words: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "capfilt.cli", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def imported(stderr: str) -> set[str]:
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def commands() -> dict[str, typer.core.TyperCommand]:
    found = {}

    def walk(prefix: str, command: object) -> None:
        for name, child in getattr(command, "commands", {}).items():
            if hasattr(child, "commands"):
                walk(f"{prefix}{name} ", child)
            else:
                found[f"{prefix}{name}"] = child

    walk("", typer.main.get_command(cli.app))
    return found


def test_help_answers_without_heavy_imports() -> None:
    found = process("--help", options=("-X", "importtime"))
    assert found.returncode == 0 and "finetune" in found.stdout
    assert not imported(found.stderr) & set(HEAVY)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example(name: str, capfilt: Cli) -> None:
    said = capfilt(*name.split(), "--help")
    assert said.code == 0 and f"Example: capfilt {name} " in said.out
    assert "The run's YAML file." in said.out or name == "inspect"


def test_every_step_is_a_command() -> None:
    names = {name.split()[-1] for name in commands()}
    assert set(pipeline.ORDER) <= names


def test_version(capfilt: Cli) -> None:
    assert capfilt("--version").out.startswith("capfilt 0.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_dir: [", ["run.yaml", "not valid YAML", "line"]),
        ("download: {shard_sise: 3}", ["shard_sise", "did you mean 'shard_size'", "line"]),
        ("filter: {itm_threshold: 2}", ["filter.itm_threshold", "is 2"]),
        ("seed: 1\nseed: 2", ["'seed' is there twice"]),
    ],
)
def test_a_bad_config_is_one_message(
    tiny: Tiny, capfilt: Cli, text: str, expected: list[str]
) -> None:
    path = tiny.config
    path.write_text(path.read_text().replace("download:\n  shard_size: 3\n", "") + text + "\n")
    said = capfilt("run", path)
    assert said.code == 2 and said.out == "" and said.err.startswith("error: ")
    assert "Traceback" not in said.err
    for part in [str(path), *expected]:
        assert part in said.err


def test_a_missing_config_list_folder_or_column(tiny: Tiny, capfilt: Cli) -> None:
    said = capfilt("ingest", tiny.folder / "nope.yaml")
    assert said.code == 2 and "nope.yaml" in said.err
    for key, value, expected in (
        ("human.pairs", "gone.jsonl", "human.pairs: 'gone.jsonl' is not there"),
        ("human.images", "gone", "human.images: folder 'gone' is not there"),
        ("human.image_column", "file", "no column 'file'; it has ['"),
        ("web.caption_column", "alt", "Set web.caption_column to the one that is meant"),
    ):
        for command in ("ingest", "check"):
            said = capfilt(command, tiny.config, "--set", f"{key}={value}")
            assert said.code == 2 and expected in said.err and said.out == ""


def test_check_names_all_problems_at_once(tiny: Tiny, capfilt: Cli) -> None:
    said = capfilt("check", tiny.config)
    assert said.code == 0 and said.out.endswith("can run\n")
    assert "of the first 7 pictures 6 are there" in said.out
    overrides = ("--set", "human.pairs=a.csv", "--set", "demo={serve: nofolder}")
    said = capfilt(
        "check",
        tiny.config,
        *overrides,
        "--set",
        f"matcher.init={tiny.folder}",
        "--set",
        f"web.images={tiny.folder / 'human' / '..'}",
    )
    assert said.code == 2
    for part in ("a.csv", "nofolder", "holds no weights", "none of the first 7 pictures"):
        assert part in said.err
    assert not tiny.run.exists(tiny.run.path), "check writes nothing"
    assert capfilt("check", tiny.config, "--json").json["config"] == str(tiny.config)


def test_bad_rows_are_in_the_books(tiny: Tiny, capfilt: Cli) -> None:
    said = capfilt("ingest", tiny.config, "--json")
    assert said.code == 0
    (step,) = said.json["steps"]
    assert step["counts"] == {"ok": 10, "download_failed": 1, "image_unreadable": 1}
    assert "12 rows" in said.err and said.err.count("\n") == 1, "one line a step off a terminal"
    assert capfilt("ingest", tiny.config, "--quiet").err == ""


def test_another_config_is_refused_until_redo(tiny: Tiny, capfilt: Cli) -> None:
    assert capfilt("ingest", tiny.config).code == 0
    said = capfilt("ingest", tiny.config, "--set", "download.min_side_px=25")
    assert said.code == 2 and "ingest.min_side_px: 8 there, 25 now" in said.err
    assert "choose another run_dir" in said.err
    assert capfilt("check", tiny.config, "--set", "download.min_side_px=25").code == 2
    said = capfilt("ingest", tiny.config, "--redo", "--json", "--set", "download.min_side_px=25")
    assert said.code == 0 and said.json["steps"][0]["counts"]["image_too_small"] == 5


def test_a_shorter_list_leaves_no_old_shards(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    capfilt("filter", tiny.config)
    capfilt("export", tiny.config)
    for name in ("web-00001", "web-00002"):
        # as if they were there under the same identity: only the list decides what belongs
        assert name in tiny.run.shards("export")
    tiny.values["web"]["limit"] = 3
    said = capfilt("ingest", tiny.config)
    assert said.code == 2 and "web-00001, web-00002" in said.err and "--redo ingest" in said.err
    said = capfilt("ingest", tiny.config, "--redo")
    assert said.code == 0 and tiny.run.shards("images", ("web",)) == ["web-00000"]
    tiny.score()
    assert capfilt("filter", tiny.config).code == 0
    assert capfilt("export", tiny.config).code == 0
    assert tiny.run.shards("export", ("web",)) == ["web-00000"]
    assert not tiny.run.exists(tiny.run.table("export", "web-00002"))


def test_a_shard_that_fails(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    capfilt("filter", tiny.config)
    Path(tiny.run.table("images", "web-00000")).write_bytes(b"torn")
    with_space = tiny.folder / "a run.yaml"
    with_space.write_text(tiny.config.read_text())
    said = capfilt("export", with_space)
    lines = said.err.splitlines()
    assert said.code == 1 and "1 of 5 shards failed in export" in said.err
    assert "web-00000" in said.err and "Traceback" not in said.err
    assert lines[-1] == f"resume with: capfilt export '{with_space}'"
    assert len(tiny.run.shards("export")) == 4


def test_a_run_that_is_being_written_is_left_alone_and_may_be_read(
    tiny: Tiny, capfilt: Cli
) -> None:
    assert capfilt("ingest", tiny.config).code == 0
    tiny.score()
    assert capfilt("filter", tiny.config).code == 0
    run = tiny.run.path
    with locked(tiny.run):
        for words in (
            ["run", tiny.config],
            ["filter", tiny.config],
            ["report", tiny.config],
            ["report", run],
        ):
            said = capfilt(*words)
            assert said.code == 2 and f"written by process {os.getpid()} on " in said.err, words
        for words in (["status", tiny.config], ["check", tiny.config], ["inspect", run, "--text"]):
            assert capfilt(*words).code == 0, words
    assert capfilt("report", run).code == 0


def test_steps_that_come_too_early_say_what_to_run(tiny: Tiny, capfilt: Cli) -> None:
    for step in ("filter", "export", "report", "caption", "score"):
        said = capfilt(step, tiny.config)
        assert said.code == 2 and "capfilt" in said.err, step
    capfilt("ingest", tiny.config)
    said = capfilt("score", tiny.config)
    assert said.code == 2 and "capfilt" in said.err
    said = capfilt("download", tiny.config, "--retry-failed")
    assert said.code == 2 and "web.urls is not set" in said.err


def test_the_light_steps_import_no_torch(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    for words in (["ingest"], ["filter"], ["export"], ["report"], ["status"], ["check"]):
        found = process(*words, tiny.config, options=("-X", "importtime"))
        assert found.returncode == 0, found.stderr[-2000:]
        assert not imported(found.stderr) & {"torch", "transformers"}, words


def test_results_on_stdout(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    tiny.values["filter"] = {"itm_threshold": 0.8}
    said = capfilt("filter", tiny.config)
    assert said.out.startswith("filter: 12 rows in ") and "kept" in said.err
    again = capfilt("filter", tiny.config)
    assert again.out.startswith("nothing to do") and "done before" in again.err
    capfilt("export", tiny.config)
    page = capfilt("report", tiny.config).out.strip()
    assert Path(page).read_text().startswith("<!")
    assert capfilt("report", tiny.config, "--json").json["books_close"] is True
    # the folder is enough, and the next run signs the page again
    run = Path(page).parent
    assert capfilt("report", run).out.strip() == page
    assert "<summary>Config" not in Path(page).read_text(encoding="utf-8")
    assert capfilt("report", run, "--set", "seed=1").code == 2
    assert capfilt("report", tiny.config).code == 0
    assert "<summary>Config" in Path(page).read_text(encoding="utf-8")
    status = capfilt("status", tiny.config, "--json").json
    assert status["tables"]["decisions"]["rows"] == 12 and status["report"] == page
    assert "decisions" in capfilt("status", tiny.config).out
    rows = capfilt("inspect", tiny.run.path, "--json", "--dropped", "-n", "50").json
    assert {row["reason"] for row in rows} >= {"itm_below_threshold", "empty_caption"}
    text = capfilt("inspect", tiny.run.path, "--text", "--kept").out
    assert "human-00000-00000/text0" in text
    assert capfilt("inspect", tiny.run.path, "--kept", "--dropped").code == 2
    assert capfilt("inspect", tiny.folder / "norun").code == 2


def test_inspect_serves_the_page(tiny: Tiny, capfilt: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    app = pytest.importorskip("capfilt.inspect.app")
    capfilt("ingest", tiny.config)
    seen = {}

    def serve(run_dir: str, **options: object) -> None:
        seen.update(options, run_dir=run_dir)
        options["on_ready"]("http://127.0.0.1:1/")  # type: ignore[operator]

    monkeypatch.setattr(app, "serve", serve)
    said = capfilt("inspect", tiny.run.path, "--port", "1234", "--token", "secret-1", "--read-only")
    assert said.code == 0 and "http://127.0.0.1:1/" in said.out
    assert (seen["port"], seen["token"], seen["read_only"]) == (1234, "secret-1", True)
    assert seen["open_browser"] is True and seen["host"] == "127.0.0.1"


def test_a_step_that_the_config_lacks(tiny: Tiny, capfilt: Cli) -> None:
    tiny.values["model"] = {"preset": "base"}
    for step, why in (("download", "web.urls"), ("features", "model.preset"), ("pretrain", "null")):
        said = capfilt(step, tiny.config)
        assert said.code == 0 and f"has no step {step}: " in said.out and why in said.out
        assert "nothing to do" not in said.out
    assert not tiny.run.exists(tiny.run.path)


def test_what_could_not_be_read_is_on_the_line_of_its_step(tiny: Tiny, capfilt: Cli) -> None:
    said = capfilt("ingest", tiny.config)
    assert ", 1 download_failed, 1 image_unreadable in " in said.err


def test_a_calibration_that_is_missing_is_called_so(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    capfilt("filter", tiny.config)
    for step in ("filter", "export", "report"):
        said = capfilt(step, tiny.config, "--set", "filter.calibration=nope.json")
        assert said.code == 2 and "`capfilt calibrate CONFIG`" in said.err
        assert "finetune" not in said.err


def test_redo_names_a_step(tiny: Tiny, capfilt: Cli) -> None:
    said = capfilt("run", tiny.config, "--redo", "nothing")
    assert said.code == 2 and "'nothing' is none of download, ingest" in said.err


def test_of_several_redos_the_first_step_counts(
    tiny: Tiny, capfilt: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(pipeline, "run", lambda *_, redo, **__: asked.append(redo) or [])
    capfilt("run", tiny.config, "--redo", "score", "--redo", "captioner", "--redo", "filter")
    capfilt("run", tiny.config)
    assert asked == ["captioner", None]


def test_interrupted(tiny: Tiny, capfilt: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    said = capfilt("ingest", tiny.config)
    assert said.code == 130 and said.err.splitlines()[-1].startswith("resume with: capfilt ingest")


@pytest.mark.skipif(os.name == "nt", reason="resource limits")
def test_a_full_disk_is_one_message(tiny: Tiny, capfilt: Cli) -> None:
    capfilt("ingest", tiny.config)
    tiny.score()
    capfilt("filter", tiny.config)
    found = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 4; exec "$0" -m capfilt.cli report "$1"',
            sys.executable,
            tiny.config,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = found.stderr.splitlines()
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert lines[-2] == "error: File too large; what is finished is kept"
    assert lines[-1] == f"resume with: capfilt report {tiny.config}"
    assert not list(Path(tiny.run.path).glob("report*")), "nothing half written"


def test_a_folder_that_may_not_be_written_is_named(
    tiny: Tiny, capfilt: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "run/images")

    monkeypatch.setattr(pipeline, "run", fail)
    said = capfilt("ingest", tiny.config)
    assert said.code == 1 and "error: run/images: Permission denied; what is" in said.err
    assert "Traceback" not in said.err


def test_resume_line_quotes(monkeypatch: pytest.MonkeyPatch, capfilt: Cli, tiny: Tiny) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PartialError("some failed")

    monkeypatch.setattr(pipeline, "run", fail)
    said = capfilt("run", tiny.config, "--set", "filter.itm_threshold=0.6", "--set", "seed= 1")
    assert said.code == 1
    assert said.err.splitlines()[-1].endswith("--set filter.itm_threshold=0.6 --set 'seed= 1'")


def test_as_a_process(tiny: Tiny) -> None:
    done = process("ingest", tiny.config, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"][0]["rows"] == 12
    assert done.stderr.count("\n") == 1 and "\r" not in done.stderr
    wrong = process("ingest", tiny.config, "--set", "download.nope=1")
    assert wrong.returncode == 2 and "download.nope" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert process("ingest").returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_stopped_by_ctrl_c(tiny: Tiny) -> None:
    """A download of addresses that never answer, stopped in the middle."""
    (tiny.folder / "urls.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.png,x\n")
    tiny.values["web"] = {"urls": str(tiny.folder / "urls.csv")}
    child = subprocess.Popen(
        [sys.executable, "-m", "capfilt.cli", "download", str(tiny.config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = Path(tiny.run.local("download")) / "img2dataset.log"
    deadline = time.monotonic() + 120
    while not log.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert err.splitlines()[-1] == f"resume with: capfilt download {tiny.config}"

"""README.md fits the code: its generated parts, its commands, the files that it names.

python tests/test_docs.py     writes the generated parts anew (`make docs`)
"""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from capfilt import cli
from capfilt.config import Config, load
from capfilt.schema import contract_markdown

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

TESTED = {
    "make demo": "test_quickstart.py, reduced; whole under `slow`",
    "make test": "this suite",
    "pip install -e .": "test_packages.py, under `slow`",
    'pip install -e ".[inspect]"': "made by `make test`",
    "capfilt inspect runs/quickstart": "inspect/test_browser.py and test_cli.py (it serves until ^C)",
    "capfilt calibrate pipelines/quickstart.yaml --target precision=0.95": (
        "test_calibrate.py (it needs labels)"
    ),
    "capfilt run pipelines/quickstart.yaml --set filter.calibration=runs/quickstart/calibration.json": (
        "stages/test_decide.py (it needs the file that calibrate writes)"
    ),
    "capfilt finetune matcher pipelines/quickstart.yaml --labels runs/quickstart/labels": (
        "training/test_labelled.py (it needs labels)"
    ),
    "capfilt run pipelines/quickstart.yaml --set matcher.labels=runs/quickstart/labels --redo score": (
        "training/test_labelled.py (it needs labels)"
    ),
    "capfilt run pipelines/quickstart.yaml --set caption.top_p=0.8 --redo caption": (
        "test_pipeline.py (the commands after it would have to repeat its --set)"
    ),
}
"""Commands of the README that no test runs as they stand, and what stands for each."""


def commands() -> list[tuple[str, str]]:
    """Each command of the CLI with the first line of its help."""
    found: list[tuple[str, str]] = []

    def walk(prefix: str, command: object) -> None:
        for name, child in getattr(command, "commands", {}).items():
            if hasattr(child, "commands"):
                walk(f"{prefix}{name} ", child)
            else:
                summary = (child.help or "").split("\n\n")[0].replace("\n", " ").strip()
                found.append((f"{prefix}{name}", summary))

    walk("", typer.main.get_command(cli.app))
    order = ["run", *_ORDER]
    place = {name: number for number, name in enumerate(order)}
    return sorted(found, key=lambda one: place.get(one[0], len(place)))


_ORDER = (
    "download",
    "ingest",
    "features",
    "pretrain",
    "finetune captioner",
    "finetune matcher",
    "caption",
    "score",
    "filter",
    "export",
    "report",
)


def commands_markdown() -> str:
    rows = [f"| `capfilt {name}` | {summary} |" for name, summary in commands()]
    return "\n".join(["| command | what |", "|---|---|", *rows]) + "\n"


GENERATED = {"commands": commands_markdown, "contract": contract_markdown}


def generate(text: str) -> str:
    """The README with its generated parts written anew."""
    for name, make in GENERATED.items():
        block = re.compile(rf"<!-- generated: {name} -->\n.*?<!-- end -->", re.DOTALL)
        assert len(block.findall(text)) == 1, f"README.md needs one block `generated: {name}`"
        start, stop = block.search(text).span()  # type: ignore[union-attr]
        text = f"{text[:start]}<!-- generated: {name} -->\n\n{make()}\n<!-- end -->{text[stop:]}"
    return text


def command_lines() -> list[str]:
    """The commands in the README's console and bash blocks, without prompts and comments."""
    found = []
    text = README.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(console|bash|sh|shell)\n(.*?)^```", text, re.M | re.S):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            words = line.removeprefix("$ ").split(" #")[0].strip()
            if words and not words.startswith("#"):
                found.append(re.sub(r"\s+", " ", words))
    return found


def test_the_generated_parts_are_in_step() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == generate(text), "README.md is out of step: run `make docs`"


def test_generating_twice_changes_nothing() -> None:
    text = generate(README.read_text(encoding="utf-8"))
    assert generate(text) == text


def test_what_stands_for_a_command_stands_for_one_of_the_readme() -> None:
    assert set(TESTED) <= set(command_lines())


def test_the_quickstarts_header_has_the_readmes_figures() -> None:
    """Wall time, AUC, right, kept and named captions."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| `([^`]+)`", README.read_text(encoding="utf-8"), re.M
    )
    figures = [
        figure.split(",")[0]
        for what, figure, command in rows
        if "quickstart_quality" in command or what.startswith("whole quickstart")
    ]
    header = (
        (ROOT / "pipelines" / "quickstart.yaml").read_text(encoding="utf-8").split("run_dir")[0]
    )
    assert len(figures) == 5 and [one for one in figures if one not in header] == []


def test_the_readme_has_commands() -> None:
    assert "make demo" in command_lines() and "make test" in command_lines()


@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_readme(line: str) -> None:
    """A capfilt command must parse, with options that are there and files that ship."""
    if line in TESTED:
        return
    words = shlex.split(line)
    assert words[0] == "capfilt", (
        f"no test runs `{line}`: add it to TESTED, with what stands for it"
    )
    command = typer.main.get_command(cli.app)
    rest = words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"`{line}`: no such command"
        command = command.commands[rest.pop(0)]
    context = command.make_context(words[0], list(rest), resilient_parsing=False)
    config = context.params.get("config")
    if config is not None and str(config).startswith("pipelines/"):
        load(ROOT / config, tuple(context.params.get("overrides") or ()))


def test_a_shipped_pipeline_takes_lists_of_ones_own() -> None:
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^capfilt run (pipelines/\S+) (--set .*human\.pairs=.*)$", text, re.M)
    assert len(found) == 1
    config, options = found[0]
    loaded = load(ROOT / config, tuple(shlex.split(options)[1::2]))
    assert loaded.human is not None and loaded.human.pairs == "data/human.jsonl"
    assert (loaded.web.pairs, loaded.run_dir) == ("data/web.jsonl", "runs/mine")


def test_the_yaml_blocks_are_configs() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    found = [Config.model_validate(yaml.safe_load(block)) for block in blocks]
    assert len(found) >= 4
    for config in found:
        assert [
            p for step in ("pretrain", "captioner", "matcher") if (p := config.start_problem(step))
        ] == []


def test_links_and_paths_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", text)
    for link in {one or other for one, other in links}:
        assert "://" in link or link.startswith("mailto:") or (ROOT / link).exists(), link


def test_pictures_are_shown_and_small() -> None:
    text = README.read_text(encoding="utf-8")
    pictures = sorted((ROOT / ".github").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert f"](.github/{picture.name})" in text
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size <= 200_000


def test_make_targets_are_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    head = makefile.split("\n\n")[0]
    assert [name for name in phony[1].split() if f"# make {name} " not in head] == []


if __name__ == "__main__":
    README.write_text(generate(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name} is in step")

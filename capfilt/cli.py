"""The command line. The one module that prints: progress on stderr, results on stdout."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt import __version__
from capfilt.errors import CapfiltError, PartialError

if TYPE_CHECKING:
    from capfilt.config import Config
    from capfilt.pipeline import Update

app = typer.Typer(
    name="capfilt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a noisy pile of web image-text pairs into a clean, captioned training set.\n\n"
    "A run is a YAML file and a folder. `capfilt run` does every step in order and skips what is done; "
    "each step is also a command of its own.",
)
finetune = typer.Typer(
    no_args_is_help=True, help="Finetune the captioner or the matcher on the human pairs."
)
app.add_typer(finetune, name="finetune")

ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a config value, as in --set filter.itm_threshold=0.6. May be repeated.",
    ),
]
RedoOption = Annotated[
    bool,
    typer.Option("--redo", help="Replace this step's work where it was done with another config."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log more on stderr.")]


def main() -> None:
    """Runs the command line; errors that capfilt explains become one message and an exit code."""
    try:
        app()
    except CapfiltError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, PartialError):
            print(f"resume with: {' '.join(['capfilt', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, and", file=sys.stderr)
        print(f"resume with: {' '.join(['capfilt', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(130)


def _version(shown: bool) -> None:
    if shown:
        print(f"capfilt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def run(
    config: ConfigArg,
    overrides: SetOption = [],
    redo: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="Replace the work of this step and of those after it where it was done with another "
            "config (see the list of steps in `capfilt status`).",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Do every step in order; skip what is done.

    Example: capfilt run pipelines/quickstart.yaml --set filter.itm_threshold=0.6
    """
    from capfilt.pipeline import ORDER

    if redo is not None and redo not in ORDER:
        raise typer.BadParameter(f"{redo!r} is none of {', '.join(ORDER)}", param_hint="--redo")
    _run(config, overrides, ORDER, redo, as_json, quiet, verbose)


def _step(step: str, help_text: str) -> Callable[..., None]:
    def command(
        config: ConfigArg,
        overrides: SetOption = [],
        redo: RedoOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        _run(config, overrides, (step,), step if redo else None, as_json, quiet, verbose)

    command.__doc__ = help_text
    return command


_STEPS = {
    "download": "Fetch the web pictures from their URLs, through img2dataset.\n\n"
    "Writes images/. A URL that fails is a row with a reason. Pictures on disk: use ingest.",
    "ingest": "Read pictures on disk with their texts (human pairs; web pairs with web.pairs).\n\nWrites images/.",
    "features": "Run the frozen image tower once over every picture (small preset only).\n\nWrites features/.",
    "pretrain": "Pretrain a MED with ITC + ITM + LM on web and human pairs.\n\nWrites models/pretrain/. "
    "Goes on where it was stopped.",
    "caption": "Write synthetic captions for the web pictures.\n\nWrites captions/.",
    "score": "Score every pair with the matcher.\n\nWrites scores/.",
    "filter": "Decide which pairs are kept, from the scores alone.\n\nWrites decisions/. Needs no model: "
    "try thresholds with --set filter.itm_threshold=0.6",
    "export": "Write the kept pairs as Parquet shards that datasets.load_dataset reads.\n\nWrites export/.",
}
for _name, _text in _STEPS.items():
    app.command(_name)(_step(_name, _text))
finetune.command("captioner")(
    _step("captioner", "Finetune the captioner with LM on the human pairs.\n\nWrites models/captioner/.")
)
finetune.command("matcher")(
    _step(
        "matcher",
        "Finetune the matcher (the paper's filter) with ITC + ITM on the human pairs.\n\n"
        "Writes models/matcher/.",
    )
)


@app.command()
def report(
    config: ConfigArg,
    overrides: SetOption = [],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the static page that shows what was kept, what was dropped, and why.

    One HTML file (report.html in the run folder) that opens from disk.
    """
    _logging(verbose)
    loaded = _load(config, overrides)
    from capfilt import pipeline
    from capfilt.inspect.report import summary
    from capfilt.shards import RunDir

    with _Progress(quiet) as progress:
        pipeline.run(loaded, steps=("report",), report=progress.update)
    found = {"report": f"{loaded.run_dir}/report.html", **summary(RunDir(loaded.run_dir))}
    print(json.dumps(found, indent=1) if as_json else found["report"])


@app.command()
def status(config: ConfigArg, overrides: SetOption = [], as_json: JsonOption = False) -> None:
    """Show what a run holds, from its manifests alone."""
    loaded = _load(config, overrides)
    from capfilt import pipeline

    found = pipeline.status(loaded)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"run folder {found['run_dir']}")
    print(f"{'table':<10} {'shards':>7} {'rows':>10} {'seconds':>9}  counts")
    for name, table in found["tables"].items():
        counts = ", ".join(f"{key} {count:,}" for key, count in sorted(table["counts"].items()))
        print(f"{name:<10} {table['shards']:>7,} {table['rows']:>10,} {table['seconds']:>9,.1f}  {counts}")
    for name in ("pretrain", "captioner", "matcher"):
        model = found["models"].get(name)
        done = "not finished" if model is None else f"{model['steps']:,} steps in {model['seconds']:,.1f} s"
        print(f"model {name:<10} {done}")
    print(f"report     {found['report'] or 'not written'}")


@app.command()
def check(config: ConfigArg, overrides: SetOption = []) -> None:
    """Check the config and that its inputs are there; do nothing else."""
    loaded = _load(config, overrides)
    from capfilt import pipeline

    for line in pipeline.check(loaded):
        print(line)


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    text: Annotated[bool, typer.Option("--text", help="Print pairs in the terminal.")] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only dropped pairs.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Only kept pairs.")] = False,
    reason: Annotated[str | None, typer.Option(help="Only this reason.")] = None,
    source: Annotated[str | None, typer.Option(help="Only web, human or synthetic.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many pairs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Look at what was kept and what was dropped, with scores and reasons.

    Example: capfilt inspect runs/quickstart --text --dropped --reason itm_below_threshold -n 20
    """
    from capfilt.errors import InputError, UsageError
    from capfilt.inspect.text import format_pairs, sample_pairs
    from capfilt.shards import RunDir

    if dropped and kept:
        raise UsageError("--dropped and --kept exclude each other")
    if not run_dir.is_dir():
        raise InputError(f"run folder {str(run_dir)!r} is not there; give the run_dir of a config")
    del text  # the one way of looking so far
    only = True if dropped else (False if kept else None)
    rows = sample_pairs(
        RunDir(str(run_dir)), dropped=only, reason=reason, source=source, n=count, seed=seed
    )
    print(json.dumps(rows, indent=1) if as_json else format_pairs(rows))


def _load(path: Path, overrides: list[str]) -> "Config":
    from capfilt.config import load

    return load(path, tuple(overrides))


def _logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def _run(
    path: Path,
    overrides: list[str],
    steps: tuple[str, ...],
    redo: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    start = time.perf_counter()
    _logging(verbose)
    config = _load(path, overrides)
    from capfilt import pipeline

    with _Progress(quiet) as progress:
        results = pipeline.run(config, steps=steps, redo=redo, report=progress.update)
    worked = sum(result.done for result in results)
    found: dict[str, Any] = {
        "run_dir": config.run_dir,
        "steps": [vars(result) for result in results],
        "seconds": round(time.perf_counter() - start, 1),
    }
    whole = len(steps) > 1
    if whole:
        from capfilt.inspect.report import summary
        from capfilt.shards import RunDir

        found["summary"] = summary(RunDir(config.run_dir))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if not worked:
        print(f"nothing to do: every step of {path} is done in {config.run_dir}")
    if whole:
        _print_summary(config, found)
    elif worked:
        for result in results:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(result.counts.items()))
            print(f"{result.stage}: {result.rows:,} rows in {result.seconds:.1f} s" + (f" ({counts})" if counts else ""))


def _print_summary(config: "Config", found: dict[str, Any]) -> None:
    summary = found["summary"]
    print(f"{'source':<10} {'pairs':>8} {'kept':>8} {'dropped':>8}")
    for source, counts in summary["sources"].items():
        print(f"{source:<10} {counts['in']:>8,} {counts['kept']:>8,} {counts['dropped']:>8,}")
    print(f"training set  {config.run_dir}/export/*.parquet")
    print(f"report        {config.run_dir}/report.html")
    print(f"took          {found['seconds']:.1f} s")


class _Progress:
    """One line a step on stderr: what is done, the rate and the time left."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.step = ""

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def update(self, update: "Update") -> None:
        """Shows an update."""
        if self.quiet:
            return
        if update.result is not None:
            self._close()
            if update.result.done == 0 and not update.result.failed:
                print(f"{update.step:<10} done before", file=sys.stderr)
            self.step = ""
            return
        if self.step != update.step or (self.bar is not None and self.bar.total != update.total):
            self._close()
            from tqdm import tqdm

            self.step = update.step
            self.bar = tqdm(
                total=update.total,
                desc=f"{update.step:<10}",
                unit=f" {update.unit}",
                file=sys.stderr,
                mininterval=0.5,
                dynamic_ncols=True,
            )
        self.bar.set_postfix_str(update.note, refresh=False)
        self.bar.update(update.done - self.bar.n)


if __name__ == "__main__":
    main()

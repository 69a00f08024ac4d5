"""The command line. The one module that prints: progress on stderr, results on stdout."""

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from capfilt import __version__
from capfilt.errors import CapfiltError, PartialError

if TYPE_CHECKING:
    from capfilt.config import Config
    from capfilt.engine.local import StageResult
    from capfilt.pipeline import Update

# plain help: typer would write its markup wherever rich happens to be installed
typer.core.HAS_RICH = False

app = typer.Typer(
    name="capfilt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a noisy pile of web image-text pairs into a clean, captioned training set.\n\n"
    "A run is a YAML file and a folder. `capfilt run` does every step in order and skips what is "
    "done; each step is also a command of its own.\n\n"
    "Example: capfilt run pipelines/quickstart.yaml",
)
finetune = typer.Typer(
    no_args_is_help=True,
    help="Finetune the captioner or the matcher on the human pairs.\n\n"
    "Example: capfilt finetune matcher pipelines/quickstart.yaml",
)
app.add_typer(finetune, name="finetune")

ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
SetOption = Annotated[
    list[str] | None,
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
    """Runs the command line; errors that can be explained become one message and an exit code."""
    try:
        app()
    except CapfiltError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, PartialError):
            print(_resume(), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # a full disk, a folder that may not be written, a network that is gone
        logging.getLogger(__name__).info("where it happened", exc_info=True)
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what is finished is kept", file=sys.stderr)
        print(_resume(), file=sys.stderr)
        sys.exit(CapfiltError.exit_code)
    except SystemExit as stop:
        # what typer makes of an interrupt
        if stop.code == 130:
            print(f"stopped; what is finished is kept\n{_resume()}", file=sys.stderr)
        raise


def _resume() -> str:
    """The line that says how to go on; the last on stderr."""
    return f"resume with: {shlex.join(['capfilt', *sys.argv[1:]])}"


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
    overrides: SetOption = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="Replace the work of this step and of those after it where it was done with "
            "another config or input. Steps: download, ingest, features, pretrain, captioner, "
            "matcher, caption, score, filter, export, report. Of several the first one counts.",
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

    for step in redo or ():
        if step not in ORDER:
            raise typer.BadParameter(f"{step!r} is none of {', '.join(ORDER)}", param_hint="--redo")
    first = min(redo, key=ORDER.index) if redo else None
    _run(config, overrides, ORDER, first, as_json, quiet, verbose)


def _step(step: str, help_text: str, command_line: str | None = None) -> Callable[..., None]:
    def command(
        config: ConfigArg,
        overrides: SetOption = None,
        redo: RedoOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        _run(config, overrides, (step,), step if redo else None, as_json, quiet, verbose)

    example = f"capfilt {command_line or step} pipelines/quickstart.yaml"
    command.__doc__ = f"{help_text}\n\nExample: {example}"
    return command


@app.command()
def download(
    config: ConfigArg,
    overrides: SetOption = None,
    redo: RedoOption = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Fetch once more the pictures that could not be fetched; the others stay.",
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fetch the web pictures from their URLs, through img2dataset.

    Writes images/. A URL that fails is a row with a reason. Pictures on disk: use ingest.

    Example: capfilt download pipelines/quickstart.yaml --retry-failed
    """
    if retry_failed:
        from capfilt import pipeline

        failed = pipeline.failed_shards(_load(config, overrides))
        if not quiet:
            named = ", ".join(failed) or "none"
            print(f"shards with pictures that could not be fetched: {named}", file=sys.stderr)
    step = "download"
    redone = step if redo else None
    _run(config, overrides, (step,), redone, as_json, quiet, verbose, retry=retry_failed)


_STEPS = {
    "ingest": "Read pictures on disk with their texts.\n\n"
    "Writes images/: human pairs, and web pairs where the config gives web.pairs.",
    "features": "Run the frozen image tower once over every picture.\n\n"
    "Writes features/. Only the small preset has them.",
    "pretrain": "Pretrain a MED with ITC + ITM + LM on web and human pairs.\n\n"
    "Writes models/pretrain/. Goes on where it was stopped.",
    "caption": "Write synthetic captions for the web pictures.\n\nWrites captions/.",
    "score": "Score every pair with the matcher.\n\nWrites scores/.",
    "filter": "Decide which pairs are kept, from the scores alone.\n\n"
    "Writes decisions/. Needs no model. What can be set, each with --set or in the YAML:\n\n\b\n"
    "  --set filter.itm_threshold=0.6              ITM probability at least 0.6\n"
    "  --set filter.itc_threshold=0.2              ITC similarity at least 0.2\n"
    "  --set filter.itm_threshold=0.6 --set filter.synthetic_itm_threshold=0.8\n"
    "                                              another one for synthetic texts\n"
    "  --set 'filter.fuse={itm: 0.7, itc: 0.3}' --set filter.fused_threshold=0.4\n"
    "                                              a weighted mean of both at least 0.4\n"
    "  --set filter.calibration=runs/quickstart/calibration.json\n"
    "                                              what `capfilt calibrate` promised\n"
    "  --set 'filter.expression=\"width >= 200 and itm_prob > 0.4\"'\n"
    "                                              a condition over the columns\n"
    "  --set filter.columns=mine.csv --set 'filter.expression=\"own.aesthetic > 5\"'\n"
    "                                              over your own columns, by pair_id, uid, key or\n"
    "                                              url\n"
    "  --set filter.best_of=1                      the best synthetic text a picture\n"
    "  --set filter.top_fraction=0.3               the best 30 % of the whole run\n"
    "  --set filter.top_fraction=0.3 --set filter.rank_by=fused\n"
    "                                              ranked by the weighted mean instead of ITM\n"
    "  --set filter.calibration=runs/quickstart/calibration.json --set filter.best_of=1 \\\n"
    "      --set filter.rank_by=probability        ranked by ITM and ITC as calibrated\n"
    "  --set filter.synthetic_only_where_web_dropped=true\n"
    "                                              synthetic texts only of pictures of which\n"
    "                                              no web text is kept\n"
    "  --set filter.drop_duplicates=false          the same picture and text more than once\n",
    "export": "Write the kept pairs as Parquet.\n\n"
    "Writes export/, which datasets.load_dataset, DuckDB and Polars read as it is.",
}
for _name, _text in _STEPS.items():
    app.command(_name)(_step(_name, _text))
finetune.command("captioner")(
    _step(
        "captioner",
        "Finetune the captioner with LM on the human pairs.\n\nWrites models/captioner/.",
        "finetune captioner",
    )
)


@finetune.command("matcher")
def finetune_matcher(
    config: ConfigArg,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Learn from the pairs that were reviewed in `capfilt inspect` too: labels/ of the "
            "run. Short for --set matcher.labels=FOLDER; a matcher that differs only in what it "
            "learnt from labels is replaced without --redo.",
        ),
    ] = None,
    overrides: SetOption = None,
    redo: RedoOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Finetune the matcher with ITC + ITM on the human pairs.

    Writes models/matcher/, the filter of the paper.

    With --labels it also learns what reviewers found: that a right text fits its picture, and that
    a wrong one doesn't. It starts where it does without labels, so the same verdicts give the same
    matcher. Review pairs, finetune the matcher, then score, filter and export again with it:

    \b
      capfilt inspect runs/quickstart
      capfilt finetune matcher pipelines/quickstart.yaml --labels runs/quickstart/labels
      capfilt run pipelines/quickstart.yaml \\
          --set matcher.labels=runs/quickstart/labels --redo score

    Example: capfilt finetune matcher pipelines/quickstart.yaml --labels runs/quickstart/labels
    """  # noqa: D301 - click keeps the lines after a backspace as they are
    given = list(overrides or ())
    if labels is not None:
        overrides = [*given, f"matcher.labels={json.dumps(str(labels))}"]
        from capfilt import pipeline

        redo = redo or pipeline.differs_in_labels_alone(_load(config, overrides))
    _run(config, overrides, ("matcher",), "matcher" if redo else None, as_json, quiet, verbose)
    from capfilt.training import ranks

    if labels is not None and not as_json and ranks.is_first():
        options = [word for one in [*given, f"matcher.labels={labels}"] for word in ("--set", one)]
        words = ["capfilt", "run", str(config), *options, "--redo", "score"]
        print(f"go on with  {shlex.join(words)}")


@app.command()
def report(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN", help="The run's YAML file. Or the run's folder.")
    ],
    overrides: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the static page that shows what was kept, what was dropped, and why.

    One HTML file (report.html in the run folder) that opens from disk. Given the folder alone, it
    is drawn by the defaults of the `report` section and holds no config.

    Example: capfilt report pipelines/quickstart.yaml
    """
    _logging(verbose)
    from capfilt import pipeline
    from capfilt.inspect.report import summary
    from capfilt.shards import RunDir

    if config.is_dir():
        from capfilt.errors import UsageError

        if overrides:
            raise UsageError("--set overrides a config: give the run's YAML file, not its folder")
        run_dir = RunDir(str(config))
        pipeline.report_without_config(run_dir)
    else:
        loaded = _load(config, overrides)
        run_dir = RunDir(loaded.run_dir)
        with _Progress(quiet) as progress:
            pipeline.run(loaded, steps=("report",), report=progress.update)
    found = {"report": run_dir.at("report.html"), **summary(run_dir)}
    print(json.dumps(found, indent=1) if as_json else found["report"])


@app.command()
def status(config: ConfigArg, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Show what a run holds, from its manifests alone.

    Example: capfilt status pipelines/quickstart.yaml --json
    """
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
        numbers = f"{table['shards']:>7,} {table['rows']:>10,} {table['seconds']:>9,.1f}"
        print(f"{name:<10} {numbers}  {counts}".rstrip())
    for name in ("pretrain", "captioner", "matcher"):
        model = found["models"].get(name)
        done = "not finished"
        if model is not None:
            done = f"{model.get('steps', 0):,} steps in {model['seconds']:,.1f} s"
        print(f"model {name:<10} {done}")
    print(f"report     {found['report'] or 'not written'}")


@app.command()
def check(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check the config and that its inputs are there; do nothing else.

    Looks at the lists and their columns, the folders, the weights, what the filter reads, and
    whether the run folder holds work of another config.

    Example: capfilt check pipelines/quickstart.yaml
    """
    _logging(verbose)
    loaded = _load(config, overrides)
    from capfilt.check import check

    lines = check(loaded)
    if as_json:
        print(json.dumps({"config": str(config), "found": lines}, indent=1))
        return
    print("\n".join([*lines, f"{config} can run"]))


@app.command()
def calibrate(
    config: ConfigArg,
    target: Annotated[
        str, typer.Option(metavar="precision=P", help="What the kept texts of a source shall hold.")
    ] = "precision=0.95",
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder of review labels; labels/ of the run by default, where it is."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of labels: human pairs that nothing was trained on (a list as "
            "human.pairs). Without labels and this, those that matcher.val_fraction held out.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file; calibration.json in the run by default.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="What is calibrated: itm, itc, fused, or auto (the best of them).")
    ] = "auto",
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find thresholds that keep a promised precision, from labels.

    Writes a file for filter.calibration, and a page with its charts beside it. Needs the run's
    scores.

    Example: capfilt calibrate pipelines/quickstart.yaml --target precision=0.95
    """
    _logging(verbose)
    from capfilt.errors import UsageError

    name, _, number = target.partition("=")
    try:
        wanted = float(number)
    except ValueError:
        wanted = -1.0
    if name.strip() != "precision" or not 0 < wanted < 1:
        raise UsageError(f"--target {target!r}: expected precision=P with P between 0 and 1")
    loaded = _load(config, overrides)
    from capfilt.calibrate import run_calibration
    from capfilt.inspect.calibration_page import rows_of
    from capfilt.pipeline import device_of

    found, path = run_calibration(
        loaded,
        target=wanted,
        labels=labels,
        pairs=pairs,
        out=out,
        score=score,
        device=lambda: device_of(loaded),
        use_features=loaded.model.caches_features,
    )
    if as_json:
        print(json.dumps({"calibration": str(path), **found.report}, indent=1))
        return
    for source, numbers in found.report["sources"].items():
        print(f"{source} texts")
        for title, value in rows_of(numbers):
            print(f"  {title:<29} {value}")
    noise = found.report["noise_ratio"]
    if noise is not None:
        print(f"expected noise ratio of the web and synthetic texts: {noise:.1%}")
    for warning in found.report["warnings"]:
        print(f"warning: {warning}")
    print(f"charts  {path.with_suffix('.html')}")
    # a threshold that the config names holds beside the calibration: less would be kept
    beside = loaded.filter.named_thresholds()
    if beside:
        print(f"set in the config, and turned off by the line below: {', '.join(beside)}")
    off = [f"filter.{name}=null" for name in beside]
    given = [*(overrides or ()), *off, f"filter.calibration={path}"]
    options = [word for one in given for word in ("--set", one)]
    print(f"use it  {shlex.join(['capfilt', 'filter', str(config), *options])}")


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    text: Annotated[
        bool, typer.Option("--text", help="Print pairs in the terminal instead.")
    ] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only dropped pairs.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Only kept pairs.")] = False,
    reason: Annotated[str | None, typer.Option(help="Only this reason.")] = None,
    source: Annotated[str | None, typer.Option(help="Only web, human or synthetic.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many pairs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the pairs as JSON (with --text or without).")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address of the page; another than loopback needs --token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes 8765 or a free one.")
    ] = 0,
    token: Annotated[
        str | None, typer.Option(help="What a browser must bring once, in the URL.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Scheme and host that browsers ask, where a proxy stands before the page "
            "(https://review.example.org); needs --token; give --port too.",
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="The page writes no labels and no decisions.")
    ] = False,
    reviewer: Annotated[
        str | None, typer.Option(help="Name for the labels; your login name by default.")
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Open no browser; only print the address.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Look at what was kept and what was dropped, with scores and reasons.

    Serves the review page until it is stopped (Ctrl-C); with --text or --json, prints pairs.

    Example: capfilt inspect runs/quickstart --text --dropped --reason itm_below_threshold -n 20
    """
    _logging(verbose)
    from capfilt.errors import InputError, UsageError

    if dropped and kept:
        raise UsageError("--dropped and --kept exclude each other")
    if not run_dir.is_dir():
        raise InputError(f"run folder {str(run_dir)!r} is not there; give the run_dir of a config")
    if not (text or as_json):
        from capfilt.inspect.app import serve
        from capfilt.inspect.embedder import open_embedder
        from capfilt.shards import RunDir

        with contextlib.suppress(KeyboardInterrupt):
            serve(
                str(run_dir),
                host=host,
                port=port,
                token=token,
                origin=origin,
                read_only=read_only,
                reviewer=reviewer,
                embedder=open_embedder(RunDir(str(run_dir))),
                open_browser=not no_browser,
                on_ready=lambda url: print(f"review page of {run_dir}: {url}", flush=True),
            )
        return
    from capfilt.inspect.text import format_pairs, sample_pairs
    from capfilt.shards import RunDir

    only = True if dropped else (False if kept else None)
    rows = sample_pairs(
        RunDir(str(run_dir)), dropped=only, reason=reason, source=source, n=count, seed=seed
    )
    print(json.dumps(rows, indent=1) if as_json else format_pairs(rows))


_NO_STEP = {
    "download": "web.urls is not set (`capfilt ingest` reads the pictures of web.pairs)",
    "features": "model.preset is not small, the only one that has them",
    "pretrain": "pretrain is null",
}
"""Why a config may lack a step."""


def _load(path: Path, overrides: list[str] | None) -> "Config":
    from capfilt.config import load

    return load(path, tuple(overrides or ()))


def _logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def _run(
    path: Path,
    overrides: list[str] | None,
    steps: tuple[str, ...],
    redo: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    retry: bool = False,
) -> None:
    start = time.perf_counter()
    _logging(verbose)
    config = _load(path, overrides)
    from capfilt import pipeline
    from capfilt.training import ranks

    with _Progress(quiet or not ranks.is_first()) as progress:
        results = pipeline.run(config, steps=steps, redo=redo, retry=retry, report=progress.update)
    if not ranks.is_first():
        return
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
    if not results:
        print(f"{path} has no step {steps[0]}: {_NO_STEP[steps[0]]}")
    elif not worked:
        print(f"nothing to do: every step of {path} is done in {config.run_dir}")
    if whole:
        _print_summary(config, found)
    elif worked:
        for result in results:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(result.counts.items()))
            done = f"{result.stage}: {result.rows:,} rows in {result.seconds:.1f} s"
            print(done + (f" ({counts})" if counts else ""))


def _print_summary(config: "Config", found: dict[str, Any]) -> None:
    summary = found["summary"]
    print(f"{'source':<10} {'pairs':>8} {'kept':>8} {'dropped':>8}")
    for source, counts in summary["sources"].items():
        print(f"{source:<10} {counts['in']:>8,} {counts['kept']:>8,} {counts['dropped']:>8,}")
    print(f"training set  {config.run_dir}/export/*.parquet")
    print(f"report        {config.run_dir}/report.html")
    print(f"took          {found['seconds']:.1f} s")


class _Progress:
    """One line a step on stderr: what is done, the rate and the time left.

    On a terminal the line moves while the step runs; elsewhere only its last state is written.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.moving = sys.stderr.isatty()
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
            print(f"{update.step:<10} {_outcome(update.result)}", file=sys.stderr)
            self.step = ""
        elif self.moving:
            self._move(update)

    def _move(self, update: "Update") -> None:
        if self.step != update.step or (self.bar is not None and self.bar.total != update.total):
            self._close()
            from tqdm import tqdm

            self.step = update.step
            self.bar = tqdm(
                total=update.total,
                desc=f"{update.step:<10}",
                unit=f" {update.unit}",
                file=sys.stderr,
                leave=False,
                mininterval=0.5,
                dynamic_ncols=True,
            )
        self.bar.set_postfix_str(update.note, refresh=False)
        self.bar.update(update.done - self.bar.n)


def _outcome(result: "StageResult") -> str:
    """What a step did, as in `2,500 rows, 310/s, 61% kept in 8.1 s`."""
    from capfilt.pipeline import note_of

    if result.failed:
        return (
            f"{len(result.failed):,} shards failed, {result.done:,} done in {result.seconds:.1f} s"
        )
    if result.done == 0:
        return "done before"
    if result.rows == 0:
        return f"done in {result.seconds:.1f} s"
    return f"{note_of(result)} in {result.seconds:.1f} s"


if __name__ == "__main__":
    main()

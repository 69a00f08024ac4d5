"""The order of the stages, as plain Python: what `capfilt run` does, and each command a part of it.

Torch is imported only where a model is opened: a run with nothing to do ends at once.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capfilt import manifest
from capfilt.config import Config
from capfilt.engine.local import StageResult, run_stage
from capfilt.errors import ConfigError, InputError, MismatchError, PartialError, UsageError
from capfilt.identities import (
    identify_finetuning,
    identify_training,
    image_shards,
    matcher_verdicts,
    model_manifest,
    start_weights,
)
from capfilt.manifest import Identity
from capfilt.schema import REASONS
from capfilt.shards import RunDir, locked
from capfilt.stage import Stage, identify, identify_shared
from capfilt.training import ranks

log = logging.getLogger(__name__)

ORDER = (
    "download",
    "ingest",
    "features",
    "pretrain",
    "captioner",
    "matcher",
    "caption",
    "score",
    "filter",
    "export",
    "report",
)
"""All steps of a run, in order."""
TRAININGS = ("pretrain", "captioner", "matcher")
"""The steps that all processes of `torchrun` share."""
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What torch calls the CPU instructions without which bf16 is worked out in a roundabout way."""


@dataclass(frozen=True)
class Update:
    """How far a step is.

    Attributes:
        step: one of `ORDER`.
        done: shards or training steps finished now.
        total: of them.
        unit: `shards` or `steps`.
        note: what else is worth showing.
        result: set once, when the step is over.
    """

    step: str
    done: int
    total: int
    unit: str
    note: str = ""
    result: StageResult | None = None


Report = Callable[[Update], None]


def _ignore(update: Update) -> None:
    """Shows no progress."""


def run(
    config: Config,
    *,
    steps: tuple[str, ...] = ORDER,
    redo: str | None = None,
    retry: bool = False,
    report: Report = _ignore,
) -> list[StageResult]:
    """Runs steps of a run; what is done already is skipped.

    Args:
        config: of the run.
        steps: which ones; all by default.
        redo: replace this step's work, and that of the steps after it, where it was done with
            another config.
        retry: let `download` fetch once more what could not be fetched.
        report: told how far each step is.

    Returns:
        A result for each step.

    Raises:
        ConfigError: a training among them can't start as the config wants it.
        UsageError: inputs are missing, the folder holds work of another config, or another process
            is writing into it.
        PartialError: shards failed; the others are done.
    """
    for step in steps:
        if problem := config.start_problem(step):
            raise ConfigError(problem)
    run_dir = RunDir(config.run_dir)
    run_dir.local()  # an error at once, where it is remote
    with locked(run_dir) if ranks.is_first() else contextlib.nullcontext():
        return _run_steps(run_dir, config, steps, redo, retry, report)


def _run_steps(
    run_dir: RunDir,
    config: Config,
    steps: tuple[str, ...],
    redo: str | None,
    retry: bool,
    report: Report,
) -> list[StageResult]:
    if "filter" in steps and len(steps) > 1:
        from capfilt.stages.decide import FilterStage

        # before hours of training, and not after them
        FilterStage(config.filter, run_dir).read_inputs()
    replaceable = ORDER[ORDER.index(redo) :] if redo else ()
    results: list[StageResult] = []
    for step in ORDER:
        if step not in steps:
            continue
        result = None
        if ranks.is_first() or step in TRAININGS:
            first = retry_failed(config, report) if retry and step == "download" else None
            result = _RUNNERS[step](run_dir, config, step in replaceable, report)
            if first is not None and result is not None:
                result = _with_retried(first, result)
        ranks.wait()  # the next step reads what the first process wrote
        if result is None:
            continue
        results.append(result)
        report(Update(step, result.done, result.done, "", result=result))
        if result.failed:
            named = "\n".join(f"  {shard}: {what}" for shard, what in result.failed.items())
            shards = result.done + result.skipped + len(result.failed)
            raise PartialError(
                f"{len(result.failed)} of {shards} shards failed in {step}; the others are done:\n"
                f"{named}"
            )
    return results


def device_of(config: Config) -> str:
    """The device that a config names, `auto` resolved; sets the number of threads."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.device != "auto":
        return config.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def slow_bf16(config: Config, steps: tuple[str, ...] = ORDER) -> list[str]:
    """Keys of steps that ask for bf16 where the CPU lacks the instructions: fp32 is faster there.

    On two AVX2 cores a bf16 matrix product took eight times as long as one in fp32.
    """
    asked = [
        f"{step}.precision"
        for step in steps
        if getattr(getattr(config, step, None), "precision", None) == "bf16"
    ]
    if not asked or device_of(config) != "cpu":
        return []
    import torch

    able = torch.cpu.get_capabilities()
    return [] if any(able.get(name) for name in BF16_INSTRUCTIONS) else asked


def device_for(step: str, config: Config) -> str:
    """The device that a step with a model runs on; warns where its bf16 is slow there."""
    for key in slow_bf16(config, (step,)):
        log.warning(
            "%s is bf16, for which this CPU has no instructions: --set %s=fp32 is faster by far",
            key,
            key,
        )
    return device_of(config)


def _run_tables(
    stage: Stage, run_dir: RunDir, shards: list[str], config: Config, redo: bool, report: Report
) -> StageResult:
    """Runs a stage over its shards, once nothing of an older and longer run lies among them."""

    def device() -> str:
        # what opens no model must not wait for torch
        opens_model = stage.table in ("features", "captions", "scores", "embeddings")
        return device_for(stage.name, config) if opens_model else "cpu"

    clear_leftovers(stage, run_dir, shards, replace=redo or stage.cheap)
    if shards:
        report(Update(stage.name, 0, len(shards), "shards"))
    progress = _reported(stage.name, report)
    return run_stage(stage, run_dir, shards, device=device, redo=redo, progress=progress)


def _reported(step: str, report: Report) -> Callable[[StageResult, int, int], None]:
    """What tells of each shard that a stage has finished."""
    return lambda result, done, total: report(Update(step, done, total, "shards", note_of(result)))


def note_of(result: StageResult) -> str:
    """Rows, rate and share kept of what a stage did, as in `2,500 rows, 310/s, 61% kept`.

    Where nothing is decided yet, what failed is told instead: `12 rows, 128/s, 1 download_failed`.
    """
    parts = [f"{result.rows:,} rows", f"{result.rows / max(result.seconds, 1e-9):,.0f}/s"]
    if "kept" in result.counts:
        parts.append(f"{result.counts['kept'] / max(1, sum(result.counts.values())):.0%} kept")
    else:
        failed = sorted(name for name in result.counts if name in REASONS)
        parts += [f"{result.counts[name]:,} {name}" for name in failed]
    return ", ".join(parts)


def clear_leftovers(stage: Stage, run_dir: RunDir, shards: list[str], replace: bool) -> None:
    """Removes shards that the run doesn't have any more (its list has become shorter).

    Raises:
        MismatchError: there are some and they may not be removed: they would mix with the run's.
    """
    left = [name for name in run_dir.shards(stage.table, stage.sources) if name not in set(shards)]
    if not left:
        return
    if not replace:
        raise MismatchError(
            f"{run_dir.at(stage.table)} holds {', '.join(left)} of an older run, which the config "
            f"and its lists don't make any more (they make {len(shards)}); nothing was deleted. "
            f"Set it back, choose another run_dir, or delete them and redo this stage and those "
            f"after it with `capfilt run CONFIG --redo {stage.name}`"
        )
    for name in left:
        run_dir.remove(run_dir.manifest(stage.table, name))
        run_dir.remove(run_dir.table(stage.table, name))


def _download(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult | None:
    if config.web.urls is None:
        return None
    from capfilt.stages.download import DownloadStage, list_shards

    stage = DownloadStage(run_dir, config)
    with _demo_server(config, needed=bool(stage.pending())):
        return _run_tables(stage, run_dir, list_shards(config), config, redo, report)


@contextlib.contextmanager
def _demo_server(config: Config, needed: bool) -> Iterator[None]:
    if config.demo is None or not needed:
        yield
        return
    from capfilt.demo import serve

    with serve(config.demo.serve, config.demo.port):
        yield


def failed_shards(config: Config) -> tuple[str, ...]:
    """The downloaded shards that hold a picture which could not be fetched.

    Raises:
        UsageError: the run downloads nothing.
        MismatchError: the shards were downloaded with another config.
    """
    if config.web.urls is None:
        raise UsageError("web.urls is not set: this run downloads nothing that could be retried")
    from capfilt.stages.download import DownloadStage

    return DownloadStage(RunDir(config.run_dir), config).with_failures()


def retry_failed(config: Config, report: Report = _ignore) -> StageResult:
    """Fetches once more the pictures that could not be fetched; all others stay as they are.

    Raises:
        UsageError: the run downloads nothing, or its shards were downloaded with another config.
    """
    from capfilt.stages.download import DownloadStage

    shards = failed_shards(config)
    run_dir = RunDir(config.run_dir)
    stage = DownloadStage(run_dir, config, shards)
    progress = _reported(stage.name, report)
    with _demo_server(config, needed=bool(shards)):
        return run_stage(stage, run_dir, list(shards), again=True, progress=progress)


def _ingest(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.stages.ingest import IngestStage, list_shards

    results = []
    for source in config.sources:
        if source == "web" and config.web.pairs is None:
            continue
        stage = IngestStage(config, source)
        shards = list_shards(config, source)
        results.append(_run_tables(stage, run_dir, shards, config, redo, report))
    return _merged("ingest", results)


def _with_retried(retried: StageResult, result: StageResult) -> StageResult:
    """What a download did, with the shards that it retried before and then found finished."""
    result.done += retried.done
    result.skipped -= retried.done + len(retried.failed)
    result.rows += retried.rows
    result.seconds += retried.seconds
    result.failed.update(retried.failed)
    return result


def _merged(name: str, results: list[StageResult]) -> StageResult:
    total = StageResult(name)
    for result in results:
        total.done += result.done
        total.skipped += result.skipped
        total.failed.update(result.failed)
        total.rows += result.rows
        total.seconds += result.seconds
        for key, value in result.counts.items():
            total.counts[key] = total.counts.get(key, 0) + value
    return total


def _features(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult | None:
    if not config.model.caches_features:
        return None
    from capfilt.stages.features import FeaturesStage

    shards = image_shards(run_dir, config, config.sources)
    return _run_tables(FeaturesStage(config.model), run_dir, shards, config, redo, report)


def _train(
    identity: Identity,
    run_dir: RunDir,
    config: Config,
    redo: bool,
    report: Report,
    train: Callable[..., dict[str, Any]],
) -> StageResult:
    """Trains a model if its folder isn't signed for the same training yet."""
    step = identity.stage
    path = model_manifest(run_dir, step)
    result = StageResult(step)
    if manifest.is_done(run_dir, path, identity, stale_is_pending=redo):
        result.skipped = 1
        return result
    folder = Path(run_dir.local("models", step))
    if ranks.is_first():
        run_dir.remove(path)
    device = ranks.own_device(device_for(step, config))
    start = time.perf_counter()

    def progress(done: int, total: int, values: dict[str, float]) -> None:
        note = " ".join(f"{name} {value:.3f}" for name, value in values.items() if name != "loss")
        report(Update(step, done, total, "steps", note))

    from safetensors import SafetensorError

    try:
        found = train(run_dir, config, folder, identity.fingerprint, device, progress)
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error
    except RuntimeError as error:
        # how torch.save tells of a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    result.done = 1
    result.rows = int(found.get("pictures", 0))
    result.seconds = time.perf_counter() - start
    if not ranks.is_first():
        return result
    manifest.sign(
        run_dir,
        path,
        identity,
        rows=result.rows,
        counts={},
        seconds=result.seconds,
        extra={"training": found},
    )
    _remove_checkpoints(folder)
    return result


def _remove_checkpoints(folder: Path) -> None:
    from capfilt.training.checkpoint import remove_checkpoints

    remove_checkpoints(folder / "checkpoints")


def _pretrain(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult | None:
    if config.pretrain is None:
        return None

    def train(*arguments: Any) -> dict[str, Any]:
        from capfilt.training.pretrain import pretrain

        return pretrain(*arguments)

    deciding = {
        "pretrain": manifest.deciding_config(config.pretrain),
        "model": manifest.deciding_config(config.model),
        "seed": config.seed,
    }
    identity = identify_training(
        "pretrain",
        run_dir,
        config,
        sources=("human", "web"),
        deciding=deciding,
        weights=start_weights(config),
    )
    return _train(identity, run_dir, config, redo, report, train)


def _captioner(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    def train(*arguments: Any) -> dict[str, Any]:
        if config.captioner.checkpoint is not None:
            return _take_checkpoint(config, "captioner", arguments[2])
        from capfilt.training.captioner import finetune_captioner

        return finetune_captioner(*arguments)

    identity = identify_finetuning("captioner", config.captioner, run_dir, config, {})
    return _train(identity, run_dir, config, redo, report, train)


def _matcher(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    verdicts = matcher_verdicts(config)
    identity = identify_finetuning("matcher", config.matcher, run_dir, config, verdicts)
    path = model_manifest(run_dir, "matcher")
    if not verdicts:
        _check_forgotten_labels(run_dir, path, redo)
    labelled = None
    if verdicts and not manifest.is_done(run_dir, path, identity, stale_is_pending=redo):
        from capfilt.training.labelled import read_labelled

        # labels of another run are an error before the matcher that is there loses its signature
        labelled = read_labelled(run_dir, verdicts, use_features=config.model.caches_features)

    def train(*arguments: Any) -> dict[str, Any]:
        if config.matcher.checkpoint is not None:
            return _take_checkpoint(config, "matcher", arguments[2])
        from capfilt.training.matcher import finetune_matcher

        return finetune_matcher(*arguments, labelled=labelled)

    return _train(identity, run_dir, config, redo, report, train)


def _check_forgotten_labels(run_dir: RunDir, path: str, redo: bool) -> None:
    """A config without labels must not take the place of a matcher with them unnoticed."""
    record = manifest.read(run_dir, path)
    if record is None or "labels" not in record.get("weights", {}):
        return
    folder = record["training"]["labels"]["folder"]
    if redo:
        log.warning(
            "the matcher in %s learnt from the labels in %s; the config has no matcher.labels, so "
            "a matcher without them takes its place",
            run_dir.path,
            folder,
        )
        return
    raise MismatchError(
        f"{path}: this matcher learnt from the labels in {folder!r}, and the config has no "
        f"matcher.labels; nothing was overwritten. Go on with it by --set matcher.labels={folder} "
        "(or the same in the YAML), or train one without labels with `capfilt run CONFIG --redo "
        "matcher`"
    )


def differs_in_labels_alone(config: Config) -> bool:
    """Whether the run has the config's matcher but for the labels that it learnt from.

    Raises:
        InputError: the labels, or what the matcher is trained on, are missing.
    """
    run_dir = RunDir(config.run_dir)
    record = manifest.read(run_dir, model_manifest(run_dir, "matcher"))
    if record is None:
        return False
    verdicts = matcher_verdicts(config)
    identity = identify_finetuning("matcher", config.matcher, run_dir, config, verdicts)
    changed = {key for key, _, _ in manifest.differences(record, asdict(identity))}
    return changed <= {"weights.labels", "matcher.matcher.labels_per_step"}


def _take_checkpoint(config: Config, step: str, folder: Path) -> dict[str, Any]:
    """Writes the checkpoint that the config names for a step into the run, untrained."""
    from capfilt.models import folder as model_folder

    name_or_folder = getattr(config, step).checkpoint
    model, tokenizer, vocabulary = model_folder.load_checkpoint(
        name_or_folder, f"{step}.checkpoint", config.model
    )
    if ranks.is_first():
        model_folder.save(model, tokenizer, folder, vocabulary=vocabulary)
    return {"checkpoint": name_or_folder, "steps": 0}


def _caption(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.stages.caption import CaptionSettings, CaptionStage

    stage = CaptionStage(
        CaptionSettings(caption=config.caption, prompt=config.captioner.prompt, seed=config.seed),
        Path(run_dir.local("models", "captioner")),
        config.model.caches_features,
    )
    return _run_tables(
        stage, run_dir, image_shards(run_dir, config, ("web",)), config, redo, report
    )


def _score(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.stages.embed import Embedding, EmbedStage
    from capfilt.stages.score import ScoreStage

    folder = Path(run_dir.local("models", "matcher"))
    image_shards(run_dir, config, config.sources)  # both are there before one is scored
    results = []
    for source in config.sources:
        stage = ScoreStage(config.score, folder, config.model.caches_features, source)
        shards = image_shards(run_dir, config, (source,))
        results.append(_run_tables(stage, run_dir, shards, config, redo, report))
        if config.score.store_embeddings:
            embedding = Embedding(
                max_tokens=config.score.max_tokens, batch_size=config.score.batch_size
            )
            second = EmbedStage(embedding, folder, config.model.caches_features, source)
            found = _run_tables(second, run_dir, shards, config, redo, report)
            found.rows = 0  # the same pairs again
            results.append(found)
    return _merged("score", results)


def _filter(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.stages.decide import FilterStage

    stage = FilterStage(config.filter, run_dir)
    shards = image_shards(run_dir, config, config.sources)
    return _run_tables(stage, run_dir, shards, config, redo, report)


def _check_decisions(run_dir: RunDir, config: Config, shards: list[str]) -> None:
    """What is exported and reported must be what this config's filter decides.

    Raises:
        InputError: a shard isn't decided yet.
        MismatchError: one was decided by another filter, or before it was scored anew.
    """
    from capfilt.stages.decide import FilterStage

    stage = FilterStage(config.filter, run_dir)
    shared = identify_shared(stage, run_dir)
    for shard in shards:
        path = run_dir.manifest("decisions", shard)
        record = manifest.read(run_dir, path)
        if record is None:
            raise InputError(
                f"{path} is not there, so {shard} is not decided yet: run `capfilt filter CONFIG` "
                "first, or `capfilt run CONFIG`"
            )
        identity = identify(stage, run_dir, shard, shared)
        if record["fingerprint"] != identity.fingerprint:
            raise MismatchError(
                f"{path} was decided with another config or input than this one's, so nothing was "
                f"written. What differs:\n{manifest.listed_differences(record, identity)}\n"
                "Decide anew with `capfilt filter CONFIG` (and its --set, if it had any), or set "
                "it back"
            )


def _export(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.stages.export import ExportStage

    shards = image_shards(run_dir, config, config.sources)
    _check_decisions(run_dir, config, shards)
    cited = config.filter.calibration
    stage = ExportStage(config.export, None if cited is None else Path(cited))
    return _run_tables(stage, run_dir, shards, config, redo, report)


def _report(run_dir: RunDir, config: Config, redo: bool, report: Report) -> StageResult:
    from capfilt.inspect.report import report_identity

    _check_decisions(run_dir, config, image_shards(run_dir, config, config.sources))
    result = StageResult("report")
    identity = report_identity(run_dir, config)
    path = run_dir.at("report.manifest.json")
    if manifest.is_done(run_dir, path, identity, stale_is_pending=True) and run_dir.exists(
        run_dir.at("report.html")
    ):
        result.skipped = 1
        return result
    from capfilt.inspect.report import write_report

    start = time.perf_counter()
    run_dir.remove_unfinished(run_dir.at("report."))
    write_report(run_dir, config)
    result.done, result.seconds = 1, time.perf_counter() - start
    manifest.sign(run_dir, path, identity, rows=0, counts={}, seconds=result.seconds)
    return result


def report_without_config(run_dir: RunDir) -> None:
    """Writes the report of a run folder of which the config is not at hand.

    It is not signed: `capfilt run CONFIG` writes it anew.

    Raises:
        InputError: nothing was decided yet.
        UsageError: another process is writing into the folder.
    """
    from capfilt.inspect.report import write_report

    with locked(run_dir):
        write_report(run_dir, None)
        run_dir.remove(run_dir.at("report.manifest.json"))


_RUNNERS: dict[str, Callable[[RunDir, Config, bool, Report], StageResult | None]] = {
    "download": _download,
    "ingest": _ingest,
    "features": _features,
    "pretrain": _pretrain,
    "captioner": _captioner,
    "matcher": _matcher,
    "caption": _caption,
    "score": _score,
    "filter": _filter,
    "export": _export,
    "report": _report,
}


def status(config: Config) -> dict[str, Any]:
    """What a run holds, from its manifests alone."""
    run_dir = RunDir(config.run_dir)
    tables = {}
    for table in ("images", "features", "captions", "scores", "decisions", "export"):
        shards = run_dir.shards(table)
        rows, seconds, counts = 0, 0.0, dict[str, int]()
        for shard in shards:
            record = manifest.read(run_dir, run_dir.manifest(table, shard))
            if record is None:
                continue
            rows += record["rows"]
            seconds += record["seconds"]
            for name, count in record["counts"].items():
                counts[name] = counts.get(name, 0) + count
        tables[table] = {
            "shards": len(shards),
            "rows": rows,
            "seconds": round(seconds, 1),
            "counts": counts,
        }
    models = {}
    for name in TRAININGS:
        record = manifest.read(run_dir, model_manifest(run_dir, name))
        if record is not None:
            models[name] = {"seconds": record["seconds"], **record.get("training", {})}
    page = run_dir.at("report.html")
    return {
        "run_dir": config.run_dir,
        "tables": tables,
        "models": models,
        "report": page if run_dir.exists(page) else None,
    }

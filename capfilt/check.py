"""Whether a run could start, before it does: what `capfilt check` looks at."""

import importlib.util
from pathlib import Path
from typing import Literal

from capfilt import manifest
from capfilt.config import Config
from capfilt.errors import ConfigError, InputError, UsageError
from capfilt.identities import checkpoint_digest, matcher_verdicts, start_weights
from capfilt.pipeline import TRAININGS, clear_leftovers, slow_bf16
from capfilt.shards import RunDir
from capfilt.stage import Stage, identify, identify_shared


def check(config: Config) -> list[str]:
    """Looks whether a run could start: lists, columns, folders, weights, what the folder holds.

    Returns:
        What was found, a line each.

    Raises:
        UsageError: something is missing or doesn't fit; all problems in one message.
    """
    found: list[str] = []
    problems: list[UsageError] = []
    for look in (
        _check_web,
        _check_human,
        _check_demo,
        _check_trainings,
        _check_weights,
        _check_labels,
        _check_filter,
        _check_device,
        _check_run,
    ):
        try:
            found += look(config)
        except UsageError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError("\n".join(str(problem) for problem in problems))
    return found


def _check_web(config: Config) -> list[str]:
    if config.web.urls is None:
        return _check_pictures(config, "web")
    from capfilt.stages.download import list_shards

    shards = list_shards(config)
    if importlib.util.find_spec("img2dataset") is None:
        raise InputError("download needs img2dataset: pip install img2dataset")
    return [f"web      {config.web.urls}: to download in {len(shards):,} shards"]


def _check_human(config: Config) -> list[str]:
    return [] if config.human is None else _check_pictures(config, "human")


def _check_pictures(config: Config, source: Literal["human", "web"]) -> list[str]:
    from capfilt.stages.ingest import first_pictures, is_inside, list_shards, section_of

    shards = list_shards(config, source)
    folder, paths = first_pictures(config, source, 100)
    inside = [path for path in paths if is_inside(path)]
    if not inside:
        raise InputError(
            f"{source}.images: none of the first {len(paths)} paths of {source}.pairs leads into "
            f"the folder {str(folder)!r}; the first is {paths[0]!r}. Write them relative to that "
            f"folder, which {source}.images sets"
        )
    there = sum((folder / path).is_file() for path in inside)
    if not there:
        raise InputError(
            f"{source}.images: none of the first {len(paths)} pictures of {source}.pairs is there; "
            f"the first should be {str(folder / inside[0])!r}. Set {source}.images to the folder "
            f"that the paths start from, or {source}.image_column"
        )
    listed = section_of(config, source).pairs
    return [
        f"{source:<8} {listed}: {len(shards):,} shards; of the first {len(paths)} pictures {there} "
        "are there"
    ]


def _check_demo(config: Config) -> list[str]:
    if config.demo is None:
        return []
    if not Path(config.demo.serve).is_dir():
        raise InputError(
            f"demo.serve: folder {config.demo.serve!r} is not there; give the folder that holds "
            "the demo's pictures (relative to the working directory)"
        )
    return [f"demo     {config.demo.serve}, to be served on port {config.demo.port}"]


def _check_trainings(config: Config) -> list[str]:
    problems = [problem for step in TRAININGS if (problem := config.start_problem(step))]
    if problems:
        raise ConfigError("\n".join(problems))
    pretrain = config.pretrain
    if pretrain is not None and config.model.preset == "small" and pretrain.head_warmup is None:
        return [
            "note     the small preset learns little in one pass without pretrain.head_warmup; "
            "pipelines/quickstart.yaml and flickr8k-small.yaml have settings that were tried"
        ]
    return []


def _check_weights(config: Config) -> list[str]:
    found = []
    if config.fresh_trainings() or config.model.caches_features:
        for name, digest in start_weights(config).items():
            found.append(f"weights  {name} {digest[:16]}")
    for key, value in (
        ("matcher.init", config.matcher.init),
        ("matcher.checkpoint", config.matcher.checkpoint),
        ("captioner.init", config.captioner.init),
        ("captioner.checkpoint", config.captioner.checkpoint),
    ):
        if value is None:
            continue
        try:
            digests = checkpoint_digest(value)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        where = "a name on the model hub; no folder here has it" if "hub" in digests else "is there"
        found.append(f"weights  {key}: {value} ({where})")
    return found


def _check_labels(config: Config) -> list[str]:
    verdicts = matcher_verdicts(config)
    if not verdicts:
        return []
    right = sum(verdicts.values())
    return [f"labels   {config.matcher.labels}: {right:,} right, {len(verdicts) - right:,} wrong"]


def _check_filter(config: Config) -> list[str]:
    from capfilt.stages.decide import FilterStage

    run_dir = RunDir(config.run_dir)
    calibration, own = FilterStage(config.filter, run_dir).read_inputs()
    found = []
    if calibration is not None:
        for shard in run_dir.shards("scores", ("web",)):
            calibration.check_matcher(run_dir, shard)
        found.append(f"filter   {config.filter.calibration}: precision {calibration.target}")
    if own is not None:
        found.append(f"filter   {config.filter.columns}: {own.table.num_rows:,} rows by {own.by}")
    return found


def _check_device(config: Config) -> list[str]:
    if config.device in ("auto", "cpu"):
        lines = [f"device   {config.device}"]
        if slow := slow_bf16(config):
            lines.append(
                f"note     {', '.join(slow)}: bf16, for which this CPU has no instructions; "
                "fp32 is faster here"
            )
        return lines
    import torch

    found = torch.cuda if config.device == "cuda" else torch.backends.mps
    if not found.is_available():
        raise UsageError(
            f"device: {config.device!r}, and torch finds none; set device: auto or cpu"
        )
    return [f"device   {config.device}"]


def _check_run(config: Config) -> list[str]:
    """What of the inputs is in the run folder already; an older run's work is found here."""
    from capfilt.stages import download, ingest

    run_dir = RunDir(config.run_dir)
    done = total = 0
    for source in config.sources:
        stage: Stage
        try:
            if source == "web" and config.web.urls is not None:
                shards, stage = (
                    download.list_shards(config),
                    download.DownloadStage(run_dir, config),
                )
            else:
                shards = ingest.list_shards(config, source)
                stage = ingest.IngestStage(config, source)
        except InputError:
            continue  # the list is missing, which is said elsewhere
        clear_leftovers(stage, run_dir, shards, replace=False)
        shared = identify_shared(stage, run_dir)
        total += len(shards)
        done += sum(
            manifest.is_done(
                run_dir,
                run_dir.manifest(stage.table, shard),
                identify(stage, run_dir, shard, shared),
                table=run_dir.table(stage.table, shard),
            )
            for shard in shards
        )
    return [f"run      {config.run_dir}: {done:,} of {total:,} shards of pictures are there"]

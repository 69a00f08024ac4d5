"""The local engine: runs a stage over the shards that have no manifest yet, one after another."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from capfilt import manifest
from capfilt.errors import CapfiltError
from capfilt.shards import RunDir, Shard
from capfilt.stage import Stage, identify, identify_shared, run_shard

log = logging.getLogger(__name__)


@dataclass
class StageResult:
    """What a stage did.

    Attributes:
        stage: its name.
        done: shards (or models) finished now.
        skipped: shards that were finished before.
        failed: shard name to what went wrong.
        rows: rows written now.
        counts: rows by reason or source, of all shards.
        seconds: wall time.
    """

    stage: str
    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


Progress = Callable[[StageResult, int, int], None]
"""Called with the result so far, the shards finished and the shards to do."""


def run_stage(
    stage: Stage,
    run: RunDir,
    shards: list[str],
    *,
    device: str | Callable[[], str] = "cpu",
    redo: bool = False,
    again: bool = False,
    progress: Progress | None = None,
) -> StageResult:
    """Runs a stage over shards; a shard that fails is recorded and the others go on.

    Args:
        stage: what to run.
        run: the run folder.
        shards: names of the shards.
        device: where its models run; a function is asked only when there is something to do.
        redo: replace work that was done with another config.
        again: do also what is done already, and replace it.
        progress: told after each shard.

    Returns:
        What was done, skipped and failed.

    Raises:
        MismatchError: a shard was done with another config and may not be replaced.
        InputError: something that the stage reads is missing.
    """
    start = time.perf_counter()
    result = StageResult(stage.name)
    totals: Counter[str] = Counter()
    pending = []
    shared = identify_shared(stage, run)
    for name in shards:
        identity = identify(stage, run, name, shared)
        path = run.manifest(stage.table, name)
        done = manifest.is_done(
            run,
            path,
            identity,
            table=run.table(stage.table, name),
            stale_is_pending=redo or stage.cheap,
        )
        if done and not again:
            result.skipped += 1
            record = manifest.read(run, path)
            totals.update(record["counts"] if record else {})
        else:
            pending.append((name, identity))
    transform = None
    if pending:
        run.remove_unfinished(run.at(stage.table, ""))
        transform = stage.open(device if isinstance(device, str) else device())
    for position, (name, identity) in enumerate(pending):
        assert transform is not None
        try:
            written = run_shard(transform, stage, Shard(run, name), identity)
        except (CapfiltError, OSError, ValueError, RuntimeError) as error:
            log.debug("shard %s of stage %s failed", name, stage.name, exc_info=True)
            result.failed[name] = f"{type(error).__name__}: {error}"
        else:
            totals.update(written.counts)
            result.done += 1
            result.rows += written.rows
        result.counts = dict(totals)
        result.seconds = time.perf_counter() - start
        if progress is not None:
            progress(result, position + 1, len(pending))
    result.counts = dict(totals)
    result.seconds = time.perf_counter() - start
    return result

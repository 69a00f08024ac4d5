"""The static report of a run: one HTML file that opens from disk and needs no network."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image, ImageOps

from capfilt import manifest
from capfilt.config import Config, Report
from capfilt.errors import InputError
from capfilt.inspect import charts
from capfilt.inspect.tables import (
    BELOW_THRESHOLD,
    ITC_BINS,
    NO_PICTURE,
    REASON_NAMES,
    DecidedShard,
    Drawn,
    Strata,
    Tally,
    count_reasons,
    decided_shards,
    draw,
    read_pairs,
    read_pictures,
    shard_groups,
)
from capfilt.inspect.text import clipped, printable
from capfilt.inspect.thresholds import Thresholds, decided_thresholds
from capfilt.manifest import Identity
from capfilt.schema import REASONS, RULE_REASONS, SOURCES
from capfilt.shards import RunDir

VERSION = 3
MODELS = ("pretrain", "captioner", "matcher")
STAGE_TABLES = ("images", "features", "captions", "scores", "decisions", "export")

PAPER_NOISE_RATIOS = {"synthetic, nucleus sampling": 0.25, "synthetic, beam search": 0.19}
"""Share of synthetic texts that the paper's filter removes; it gives no such share of web texts
(BLIP, section 4.3)."""

_SHOWN = ("web", "synthetic", "human")
_ITM_BARS = 20
_ITC_BARS = 24
_UNSCORED_EXAMPLES = 8
_SHARDS_LISTED = 200
_LONGEST_TEXT = 300


def report_identity(run: RunDir, config: Config) -> Identity:
    """What decides the report: the decisions, the trained models, and how the page is drawn."""
    upstream = {}
    prints = [
        (name, _fingerprint(run, run.manifest("decisions", name)))
        for name in run.shards("decisions")
    ]
    upstream["decisions/*"] = hashlib.sha256(manifest.canonical_json(prints).encode()).hexdigest()
    for model in MODELS:
        found = _fingerprint(run, run.at("models", model, "manifest.json"))
        if found is not None:
            upstream[f"models/{model}"] = found
    drawn = {**manifest.deciding_config(config.report), "seed": config.seed}
    return Identity("report", VERSION, drawn, upstream)


def summary(run: RunDir) -> dict[str, Any]:
    """The run in numbers, as plain JSON values; all zero where nothing was decided yet.

    Returns:
        `run`, `pairs_in`, `kept`, `dropped`, `books_close` (as many pairs decided as scored),
        `sources` (by source: `in`, `kept`, `dropped`, `kept_share`, `reasons`), `noise_ratios` (by
        source: `judged` texts, those `filtered` for a score below a threshold, their `share`; what
        a later rule dropped was judged and passed),
        `paper_noise_ratios`, `thresholds` (by source: `itm`, `itc`), `calibration` (what it
        promised, with its `warnings` and its `digest`; None where none decided).
    """
    return _summary(run, count_reasons(run))


def write_report(run: RunDir, config: Config | None) -> str:
    """Writes `report.html` into the run folder.

    Args:
        run: a run whose decisions are done.
        config: its config; `report` and `seed` decide how the page is drawn. None draws it by the
            defaults and without the config.

    Returns:
        The path of the page.

    Raises:
        InputError: nothing was decided yet, or a table is missing or doesn't fit the others.
    """
    if not run.shards("decisions"):
        raise InputError(f"{run.path} has no decisions yet: run `capfilt filter` or `capfilt run`")
    drawn = Report() if config is None else config.report
    tally, pairs, unscored = _scan(run, config)
    facts = _summary(run, tally)
    side = drawn.thumbnail_px
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("capfilt.inspect"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["percent"] = _percent
    templates.filters["text"] = lambda text: clipped(printable(str(text)), _LONGEST_TEXT)
    style = templates.get_template("report.css").render(thumbnail_px=side)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = templates.get_template("report.html").render(
        name=run.path.rstrip("/").rsplit("/", 1)[-1],
        style=style,
        style_hash=digest,
        facts=facts,
        reasons=REASONS,
        below_threshold=BELOW_THRESHOLD,
        paper=PAPER_NOISE_RATIOS,
        pictures={kind: _pictures_in(run, kind) for kind in ("web", "human")},
        frame={
            "width": charts.WIDTH,
            "height": charts.HEIGHT,
            "left": charts.LEFT,
            "right": charts.WIDTH - charts.RIGHT,
            "top": charts.TOP,
            "floor": charts.HEIGHT - charts.BOTTOM,
        },
        histograms=_histograms(tally, facts["thresholds"]),
        keep=_keep_curve(tally, _one_threshold(facts["thresholds"])),
        trainings=_trainings(run),
        grids=[
            ("kept", "Kept pairs", _cards(run, pairs[True].take(drawn.pairs), side, True)),
            (
                "dropped",
                "Dropped pairs",
                _cards(run, pairs[False].take(drawn.pairs), side, False),
            ),
        ],
        unscored=_unscored(run, unscored.take(_UNSCORED_EXAMPLES * len(NO_PICTURE))),
        config=config
        and yaml.safe_dump(
            config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=90
        ),
        stages=_provenance(run),
    )
    path = run.at("report.html")
    run.write_text(path, page)
    return path


def _scan(run: RunDir, config: Config | None) -> tuple[Tally, dict[bool, Strata], Strata]:
    """One pass over scores and decisions: the tally, and rows drawn for the grids and examples."""
    count, seed = (Report().pairs, 0) if config is None else (config.report.pairs, config.seed)
    tally = Tally()
    pairs = {keep: Strata(count) for keep in (True, False)}
    unscored = Strata(_UNSCORED_EXAMPLES)
    groups = shard_groups(run.shards("decisions"), seed)
    for shard in decided_shards(run):
        tally.add(shard)
        draws = draw(seed, shard.name, len(shard.reason)) + groups[shard.name]
        for stratum, rows in _strata(shard):
            reason = stratum[0]
            target = unscored if reason in NO_PICTURE else pairs[reason == "kept"]
            target.add(stratum, shard.name, rows, draws[rows])
    return tally, pairs, unscored


def _strata(shard: DecidedShard) -> list[tuple[tuple[str, ...], npt.NDArray[np.int64]]]:
    """Rows of a shard by reason, source and tenth of the ITM probability.

    Human pairs are never filtered, so their scores make no strata of their own; neither do scores
    of pairs that were dropped for another reason.
    """
    tenth = np.clip(np.nan_to_num(shard.itm_prob, nan=0.0) * 10, 0, 9).astype(np.int64)
    by_score = np.isin(
        shard.reason, [REASON_NAMES.index(name) for name in ("kept", *BELOW_THRESHOLD)]
    ) & (shard.source != SOURCES.index("human"))
    tenth[~by_score] = 0
    cells = (shard.reason.astype(np.int64) * len(SOURCES) + shard.source) * 10 + tenth
    found: list[tuple[tuple[str, ...], npt.NDArray[np.int64]]] = []
    for cell in np.unique(cells):
        rest, step = divmod(int(cell), 10)
        reason, source = divmod(rest, len(SOURCES))
        stratum = (REASON_NAMES[reason], SOURCES[source], str(step))
        found.append((stratum, np.flatnonzero(cells == cell)))
    return found


def _summary(run: RunDir, tally: Tally) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    noise: dict[str, dict[str, Any]] = {}
    for source in _SHOWN:
        reasons = tally.of_source(source)
        total, kept = sum(reasons.values()), reasons.get("kept", 0)
        sources[source] = {
            "in": total,
            "kept": kept,
            "dropped": total - kept,
            "kept_share": kept / total if total else None,
            "reasons": reasons,
        }
        if source != "human":
            filtered = sum(reasons.get(reason, 0) for reason in BELOW_THRESHOLD)
            # the rules that come after the thresholds drop what has passed these
            judged = kept + sum(reasons.get(reason, 0) for reason in RULE_REASONS)
            noise[source] = {
                "judged": judged,
                "filtered": filtered,
                "share": filtered / judged if judged else None,
            }
    pairs_in = 0
    for name in run.shards("scores"):
        record = manifest.read(run, run.manifest("scores", name))
        pairs_in += int(record["rows"]) if record else 0
    kept_pairs = sum(counts["kept"] for counts in sources.values())
    decided = sum(counts["in"] for counts in sources.values())
    return {
        "run": run.path.rstrip("/").rsplit("/", 1)[-1],
        "pairs_in": pairs_in,
        "kept": kept_pairs,
        "dropped": decided - kept_pairs,
        "books_close": decided == pairs_in,
        "sources": sources,
        "noise_ratios": noise,
        "paper_noise_ratios": PAPER_NOISE_RATIOS,
        "thresholds": _thresholds(run),
        "calibration": _calibration(run),
    }


def _thresholds(run: RunDir) -> dict[str, dict[str, float | None]]:
    """The thresholds that the decisions were made with, as their manifest says, by source."""
    found = Thresholds(None)
    for name in run.shards("decisions"):
        record = manifest.read(run, run.manifest("decisions", name))
        if record:
            found = decided_thresholds(record.get("config", {}))
            break
    return found.by_source()


def _one_threshold(thresholds: dict[str, dict[str, float | None]]) -> float | None:
    """The ITM threshold, for a chart of all sources; None where they have different ones."""
    web, synthetic = thresholds["web"]["itm"], thresholds["synthetic"]["itm"]
    return web if web == synthetic else None


def _calibration(run: RunDir) -> dict[str, Any] | None:
    """What the calibration that decided promised, as the decisions' manifests quote it."""
    for name in run.shards("decisions"):
        record = manifest.read(run, run.manifest("decisions", name))
        if record:
            digest = (record.get("weights") or {}).get("calibration")
            if digest is None:
                return None
            return {"digest": digest, **(record.get("calibration") or {})}
    return None


def _pictures_in(run: RunDir, kind: str) -> int:
    records = [
        manifest.read(run, run.manifest("images", name)) for name in run.shards("images", (kind,))
    ]
    return sum(int(record["rows"]) for record in records if record)


def _histograms(
    tally: Tally, thresholds: dict[str, dict[str, float | None]]
) -> list[tuple[str, list[charts.Chart]]]:
    itm, itc = [], []
    for source in _SHOWN:
        at = SOURCES.index(source)
        # human pairs are kept whatever their score, so no threshold stands in their charts
        marks = thresholds.get(source, {})
        if tally.itm[at].any():
            dropped, kept = tally.itm[at].reshape(2, _ITM_BARS, -1).sum(axis=2).tolist()
            edges = [step / _ITM_BARS for step in range(_ITM_BARS + 1)]
            mark = marks.get("itm")
            itm.append(charts.histogram(source, "ITM probability", edges, kept, dropped, mark))
        if tally.itc[at].any():
            edges, kept, dropped = _cropped(tally.itc[at])
            mark = marks.get("itc")
            itc.append(charts.histogram(source, "ITC similarity", edges, kept, dropped, mark))
    named = [("ITM probability", itm), ("ITC similarity", itc)]
    return [(name, found) for name, found in named if found]


def _cropped(bins: npt.NDArray[np.int64]) -> tuple[list[float], list[int], list[int]]:
    """ITC bins [2, ITC_BINS] in use, merged to at most 24 bars, with their edges."""
    used = np.flatnonzero(bins.sum(axis=0))
    merge = 1
    while (used[-1] // merge - used[0] // merge + 1) > _ITC_BARS:
        merge *= 2
    # a few bars at least, so that a single one doesn't fill the chart
    first = max(used[0] // merge - 1, 0)
    last = min(used[-1] // merge + 1, ITC_BINS // merge - 1)
    dropped, kept = bins.reshape(2, -1, merge).sum(axis=2)[:, first : last + 1].tolist()
    width = 2 / ITC_BINS * merge
    edges = [round(-1 + width * at, 6) for at in range(first, last + 2)]
    return edges, kept, dropped


def _keep_curve(tally: Tally, threshold: float | None) -> dict[str, Any] | None:
    """The chart, and the same as rows of a table at a few thresholds."""
    shares = {}
    for source in _SHOWN:
        at = SOURCES.index(source)
        counts = tally.itm[at].sum(axis=0)
        if counts.sum():
            # pairs at or over the lower edge of each bin; nothing reaches past the last edge
            above = np.append(counts[::-1].cumsum()[::-1], 0)
            shares[source] = (above / counts.sum()).tolist()[:-1]
    if not shares:
        return None
    count = tally.itm.shape[-1]
    grid = [at / count for at in range(count)]
    rows = [
        (at / 10, {source: values[at * count // 10] for source, values in shares.items()})
        for at in range(1, 10)
    ]
    return {"chart": charts.keep_curve(shares, grid, threshold), "rows": rows, "names": [*shares]}


@dataclass(frozen=True)
class Training:
    """The loss log of one training, as charts."""

    name: str
    steps: int
    charts: list[charts.Chart]


def _trainings(run: RunDir) -> list[Training]:
    found = []
    for model in MODELS:
        path = run.at("models", model, "log.jsonl")
        if not run.exists(path):
            continue
        by_step: dict[float, dict[str, float]] = {}
        for line in run.read_text(path).splitlines():
            values = _log_line(line)
            if "step" in values:
                # a training that was stopped and goes on repeats a few steps: the last stands
                by_step[values["step"]] = values
        steps = sorted(by_step)
        drawn = []
        names = dict.fromkeys(name for step in steps for name in by_step[step])
        for name in names:
            if name in {"step", "epoch", "lr", "seconds", "time"}:
                continue
            there = [step for step in steps if name in by_step[step]]
            title = f"{model}: {name.upper() if len(name) <= 3 else name.replace('_', ' ')}"
            drawn.append(charts.curve(title, "step", there, [by_step[s][name] for s in there]))
        if drawn:
            found.append(Training(model, int(steps[-1]), drawn))
    return found


def _log_line(line: str) -> dict[str, float]:
    """The finite numbers of a line of a loss log; none of a line that a kill cut off."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _cards(run: RunDir, drawn: Sequence[Drawn], side: int, kept: bool) -> list[dict[str, Any]]:
    """The drawn pairs with thumbnails; the surest first, the borderline last."""
    pairs = read_pairs(run, drawn)
    thumbnails: dict[str, str | None] = {}
    urls: dict[str, str | None] = {}
    for shard in sorted({pair["shard"] for pair in pairs}):
        keys = {pair["key"] for pair in pairs if pair["shard"] == shard}
        for key, row in read_pictures(run, shard, keys, ["url", "image"]).items():
            thumbnails[key] = None if row["image"] is None else _thumbnail(row["image"], side)
            urls[key] = row["url"]
    for pair in pairs:
        pair["thumbnail"] = thumbnails.get(pair["key"])
        pair["url"] = urls.get(pair["key"])

    def surest(pair: dict[str, Any]) -> tuple[int, float, str]:
        score = -1.0 if pair["itm_prob"] is None else pair["itm_prob"]
        group = _SHOWN.index(pair["source"]) if kept else REASON_NAMES.index(pair["reason"])
        return group, -score if kept else score, pair["pair_id"]

    return sorted(pairs, key=surest)


def _thumbnail(data: bytes, side: int) -> str | None:
    """A picture as a data: URI, at twice `side` pixels for dense screens; None when unreadable."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (2 * side, 2 * side))
            picture = ImageOps.exif_transpose(opened)
            picture.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
            if picture.mode in {"P", "LA", "PA", "RGBA"} or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                ground = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(ground, picture)
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "WEBP", quality=75, method=4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _unscored(run: RunDir, drawn: Sequence[Drawn]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Examples of pairs without a usable picture, by reason."""
    pairs = sorted(
        read_pairs(run, drawn), key=lambda one: (REASON_NAMES.index(one["reason"]), one["pair_id"])
    )
    for shard in sorted({pair["shard"] for pair in pairs}):
        here = [pair for pair in pairs if pair["shard"] == shard]
        rows = read_pictures(run, shard, {pair["key"] for pair in here}, ["url", "error_message"])
        for pair in here:
            row = rows.get(pair["key"], {})
            pair["url"], pair["error_message"] = row.get("url"), row.get("error_message")
    return [
        (reason, list(group)) for reason, group in groupby(pairs, lambda one: str(one["reason"]))
    ]


@dataclass(frozen=True)
class StageRecord:
    """What the manifests say of one stage or model."""

    name: str
    shards: list[tuple[str, dict[str, Any]]]
    rows: int
    seconds: float
    versions: str

    @property
    def fingerprint(self) -> str:
        """Of the only shard, or how many there are."""
        prints = sorted({record["fingerprint"][:12] for _, record in self.shards})
        return prints[0] if len(prints) == 1 else f"{len(prints)} different"


def _provenance(run: RunDir) -> dict[str, Any]:
    records = []
    for table in STAGE_TABLES:
        shards = [(name, run.manifest(table, name)) for name in run.shards(table)]
        records.append(_stage_record(run, table, shards))
    for model in MODELS:
        records.append(
            _stage_record(
                run, f"models/{model}", [(model, run.at("models", model, "manifest.json"))]
            )
        )
    there = [record for record in records if record is not None]
    return {
        "records": there,
        "shards": [
            (record.name, name, signed) for record in there for name, signed in record.shards
        ][:_SHARDS_LISTED],
        "count": sum(len(record.shards) for record in there),
    }


def _stage_record(run: RunDir, name: str, paths: list[tuple[str, str]]) -> StageRecord | None:
    shards = []
    for shard, path in paths:
        record = manifest.read(run, path)
        if record is not None:
            shards.append((shard, record))
    if not shards:
        return None
    versions = {
        " ".join(f"{package} {value}" for package, value in record.get("versions", {}).items())
        for _, record in shards
    }
    return StageRecord(
        name,
        shards,
        sum(int(record.get("rows") or 0) for _, record in shards),
        sum(float(record.get("seconds") or 0) for _, record in shards),
        "; ".join(sorted(versions)),
    )


def _fingerprint(run: RunDir, path: str) -> str | None:
    record = manifest.read(run, path)
    return None if record is None else str(record["fingerprint"])


def _percent(share: float | None) -> str:
    """A share in words: 0.256 is 25.6 %."""
    if share is None:
        return "–"
    number = f"{share * 100:.1f}".removesuffix(".0")
    return f"{number}\u00a0%"

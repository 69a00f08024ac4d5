"""A calibration as a file: probabilities and thresholds for the scores of one matcher.

`calibration_fit` makes it, `capfilt filter` decides by it, and the export and the report cite it.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.shards import RunDir

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
FORMAT = "capfilt-calibration-1"
SCORES = ("itm", "itc", "fused")


@dataclass(frozen=True)
class SourceCalibration:
    """One source's threshold and curve.

    Attributes:
        threshold: scores from here on are kept; None where no threshold reaches the precision.
        match_share: estimated share of matches among the source's scored pairs.
        x: scores, ascending.
        y: probability of a match at each of them; linear between, constant beyond.
    """

    threshold: float | None
    match_share: float
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What `capfilt calibrate` writes and `filter.calibration` reads.

    Attributes:
        matcher: digest of the weights that gave the scores.
        score: `itm` (its logit), `itc`, or `fused` (a weighted sum of both).
        weights: of ITM's logit and of ITC, for `fused`.
        target: the precision that was asked for.
        sources: by source.
        report: what was measured, for people.
    """

    matcher: str
    score: str
    weights: tuple[float, float]
    target: float
    sources: dict[str, SourceCalibration]
    report: dict[str, Any] = field(default_factory=dict)

    def score_of(self, itm: Floats, itc: Floats) -> Floats:
        """The score that is calibrated, from ITM probabilities and ITC similarities, [N]."""
        return combined(self.score, self.weights, itm, itc)

    def probability(self, itm: Floats, itc: Floats, source: str) -> Floats:
        """Probability of a match of pairs of a source, [N].

        Raises:
            InputError: the calibration has nothing on that source.
        """
        curve = self._source(source)
        return np.interp(self.score_of(itm, itc), curve.x, curve.y)

    def keeps(self, itm: Floats, itc: Floats, source: str) -> Bools:
        """Whether pairs of a source reach its threshold, [N].

        Raises:
            InputError: the calibration has nothing on that source.
        """
        threshold = self._source(source).threshold
        if threshold is None:
            return np.zeros(len(itm), dtype=bool)
        return np.asarray(self.score_of(itm, itc) >= threshold)

    def _source(self, source: str) -> SourceCalibration:
        if source not in self.sources:
            raise InputError(
                f"the calibration has nothing on {source} texts ({', '.join(self.sources)} only); "
                "redo it with `capfilt calibrate CONFIG`"
            )
        return self.sources[source]

    def check_matcher(self, run: RunDir, shard: str) -> None:
        """Sees that a shard's scores are of the matcher that was calibrated.

        Raises:
            InputError: they are of another one.
        """
        path = run.manifest("scores", shard)
        record = manifest.read(run, path)
        found = (record or {}).get("weights", {}).get("matcher")
        if found != self.matcher:
            raise InputError(
                f"the calibration is of matcher {self.matcher[:12]}…, and {path} says that the "
                f"scores are of {str(found)[:12]}…; redo it with `capfilt calibrate CONFIG`"
            )


def read_calibration(path: str | Path) -> Calibration:
    """Reads a calibration file.

    Raises:
        InputError: it is missing, or no calibration.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        sources = {}
        for name, part in values.pop("sources").items():
            x, y = np.asarray(part["x"], np.float64), np.asarray(part["y"], np.float64)
            fits = x.ndim == 1 and x.shape == y.shape and len(x) > 0
            if not fits or not np.isfinite([x, y]).all() or (np.diff(x) < 0).any():
                raise ValueError(f"the curve of {name} is not two rows of ascending numbers")
            threshold = part["threshold"]
            sources[name] = SourceCalibration(
                None if threshold is None else float(threshold),
                float(part["match_share"]),
                tuple(x.tolist()),
                tuple(y.tolist()),
            )
        weights = (float(values["weights"][0]), float(values["weights"][1]))
        if values["score"] not in SCORES:
            raise ValueError(f"its score is {values['score']!r}, expected one of {SCORES}")
        return Calibration(
            str(values["matcher"]),
            values["score"],
            weights,
            float(values["target"]),
            sources,
            dict(values.get("report") or {}),
        )
    except FileNotFoundError:
        raise InputError(
            f"calibration {str(path)!r} is not there; write it with `capfilt calibrate CONFIG`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path} is no calibration ({type(error).__name__}: {error}); write it again with "
            "`capfilt calibrate CONFIG`"
        ) from None


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Writes a calibration file by rename; the same calibration gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def combined(score: str, weights: tuple[float, float], itm: Floats, itc: Floats) -> Floats:
    """The score that is calibrated, [N]: ITM's logit, ITC's cosine, or a weighted sum."""
    if score == "itm":
        return logit(itm)
    if score == "itc":
        return np.asarray(itc, np.float64)
    return weights[0] * logit(itm) + weights[1] * np.asarray(itc, np.float64)


def promise(calibration: Calibration) -> dict[str, Any]:
    """What a calibration says of the pairs that it keeps, short enough to be cited.

    Returns:
        `target`, `score`, `weights`, `matcher`, `labels`, `noise_ratio`, `warnings`, and in
        `sources`, for each, its `threshold`, the expected `precision` and `recall` with their
        intervals, the `held_out` check, and its `noise_ratio`; what a file does not say is None.
    """
    report = calibration.report
    wanted = (
        "threshold",
        "precision",
        "precision_interval",
        "recall",
        "recall_interval",
        "held_out",
        "noise_ratio",
    )
    return {
        "target": calibration.target,
        "score": calibration.score,
        "weights": list(calibration.weights),
        "matcher": calibration.matcher,
        "labels": report.get("labels"),
        "noise_ratio": report.get("noise_ratio"),
        "warnings": list(report.get("warnings") or ()),
        "sources": {
            source: {name: part.get(name) for name in wanted}
            for source, part in (report.get("sources") or {}).items()
        },
    }


def cite(path: str | Path | None) -> dict[str, Any]:
    """What a manifest quotes of a calibration file; nothing where there is none.

    Raises:
        InputError: it is missing, or no calibration.
    """
    return {} if path is None else {"calibration": promise(read_calibration(path))}


def logit(probability: Floats) -> Floats:
    """Log-odds, [N]; probabilities are kept 1e-6 away from 0 and 1."""
    p = np.clip(np.asarray(probability, np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))

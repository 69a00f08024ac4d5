"""The thresholds that a decision was made with, or is tried with, by source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Thresholds:
    """A decision to try out, in the terms of the `filter` section.

    Attributes:
        itm: ITM probability below which a pair is dropped; None is off.
        itc: ITC similarity below which a pair is dropped; None is off.
        synthetic: both for synthetic texts, where they are others; None takes those above.
        as_run: what the run decided, by rules that are no such thresholds (a calibration, say).
    """

    itm: float | None = 0.5
    itc: float | None = None
    synthetic: tuple[float | None, float | None] | None = None
    as_run: bool = False

    def of(self, source: str) -> dict[str, float | None]:
        """The thresholds of a source by score, `itm` and `itc`."""
        own = self.synthetic if source == "synthetic" and self.synthetic else (self.itm, self.itc)
        return dict(zip(("itm", "itc"), own, strict=True))

    def by_source(self) -> dict[str, dict[str, float | None]]:
        """`of` the sources that have thresholds; human pairs are kept whatever their score."""
        return {source: self.of(source) for source in ("web", "synthetic")}


def decided_thresholds(config: Mapping[str, Any]) -> Thresholds:
    """The thresholds in a `filter` section that decided."""
    web = config.get("itm_threshold"), config.get("itc_threshold")
    own = config.get("synthetic_itm_threshold"), config.get("synthetic_itc_threshold")
    found = tuple(b if a is None else a for a, b in zip(own, web, strict=True))
    return Thresholds(*web, (found[0], found[1]) if found != web else None)

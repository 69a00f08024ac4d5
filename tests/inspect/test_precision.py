from typing import Any

import pytest

from capfilt.inspect.precision import pooled, precision_of, wilson


def test_the_pooled_precision_weighs_sources_by_what_they_keep() -> None:
    def part(would_keep: int, right: int, judged: int) -> dict[str, Any]:
        row = {"at_random": True, "is_right": right, "is_wrong": judged - right, "pairs": judged}
        return {"would_keep": would_keep, "precision": precision_of([row])}

    # nine in ten labels are of web texts, and nine in ten kept texts are synthetic
    found = pooled({"web": part(100, 90, 90), "synthetic": part(900, 5, 10)})
    assert found["precision"] == pytest.approx(0.1 * 1.0 + 0.9 * 0.5)
    assert found["labels"] == 100 and found["sources"] == ["web", "synthetic"]
    low, high = wilson(5, 10)
    assert found["low"] == pytest.approx(0.55 - 0.9 * (0.5 - low), abs=2e-3)
    assert found["high"] == pytest.approx(0.55 + 0.9 * (high - 0.5), abs=2e-3)
    # one source alone has Wilson's own interval, and a source without labels is not spoken for
    alone = pooled({"web": part(100, 8, 10), "synthetic": part(900, 0, 0)})
    assert (alone["low"], alone["high"]) == pytest.approx(wilson(8, 10))
    assert alone["sources"] == ["web"]
    nothing = pooled({"web": part(0, 8, 10)})
    assert nothing["precision"] is None and (nothing["low"], nothing["high"]) == (0.0, 1.0)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1.0)

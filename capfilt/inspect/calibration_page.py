"""The page of a calibration: one HTML file with its charts inline, which opens from disk."""

from collections.abc import Sequence
from html import escape
from typing import Any

from capfilt.evaluation.calibration import Calibration

_SIDE, _MARGIN = 268, 42
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--paper:#fff;--line:#2563a8;--faint:#8a919c;
--warn:#b3400f}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--paper:#16181c;--line:#7fb2ea;
--faint:#7d8590;--warn:#f2875a}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:2rem auto;
max-width:60rem;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
th{font-weight:500}.charts{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}figcaption{font-size:.9rem}
.axis{stroke:var(--faint);fill:none}.guide{stroke:var(--faint);stroke-dasharray:3 3;fill:none}
.line{stroke:var(--line);stroke-width:2;fill:none}.dot{fill:var(--line)}
.band{fill:var(--line);opacity:.18}.goal{stroke:var(--warn);stroke-dasharray:5 3;fill:none}
.warn{border-left:4px solid var(--warn);padding:.2rem 0 .2rem .8rem}
.warn ul{margin:.2rem 0;padding-left:1.2rem}
"""


def calibration_page(calibration: Calibration) -> str:
    """The report of a calibration as HTML."""
    report = calibration.report
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Calibration</title><style>{_STYLE}</style></head><body><h1>Calibration</h1>",
        f"<p>For a precision of {calibration.target:.1%} in what is kept of each source. Labels: "
        f"{escape(str(report.get('labels', 'unknown')))}. Score: {escape(calibration.score)}. "
        f"Matcher {escape(calibration.matcher[:16])}.</p>",
    ]
    if report.get("warnings"):
        listed = "".join(f"<li>{escape(str(each))}</li>" for each in report["warnings"])
        parts.append(
            "<div class='warn' role='note'><strong>Don't rely on this precision yet.</strong>"
            f"<ul>{listed}</ul></div>"
        )
    if report.get("labels") == "made up":
        parts.append(
            "<p>No one judged these pairs: the share of matches was estimated from the scores. "
            "Noise of a kind that was not made up (neither another picture's text nor one wrong "
            "word) is not in these numbers; review some kept pairs at random to be sure.</p>"
        )
    if report.get("noise_ratio") is not None:
        parts.append(
            f"<p>Expected noise in the exported web and synthetic texts: "
            f"{report['noise_ratio']:.1%}.</p>"
        )
    for source, found in report.get("sources", {}).items():
        parts.append(_section(str(source), found, calibration.target))
    return "".join([*parts, "</body></html>\n"])


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a source in words, for the page and the terminal."""
    threshold = found["threshold"]
    shown = "none reaches the precision" if threshold is None else f"{threshold:.4f}"
    if found.get("own_labels") is not None:
        shown = "none, for want of labels of these texts"
    elif found["itm_threshold"] is not None:
        shown = f"ITM probability {found['itm_threshold']:.4f}"
    rows = [
        ("scored pairs", f"{found['pairs']:,}"),
        ("examples", f"{found['right']:,} right, {found['wrong']:,} wrong"),
        ("share of matches", _with_interval(found["match_share"], found["match_share_interval"])),
        ("threshold", shown),
        ("kept", f"{found['kept']:,} ({found['kept_share']:.1%})"),
        ("expected precision", _with_interval(found["precision"], found["precision_interval"])),
        ("expected recall", _with_interval(found["recall"], found["recall_interval"])),
        ("on held-out labels", _held_out(found.get("held_out"))),
        ("expected noise ratio", f"{found['noise_ratio']:.1%}"),
        ("AUC", _with_interval(found["auc"], found["auc_interval"], "{:.3f}")),
        ("curve", str(found["method"])),
    ]
    if found["mix"]:
        mix = ", ".join(f"{kind} {share:.0%}" for kind, share in found["mix"].items())
        rows.insert(3, ("estimated mix", mix))
    uncovered = found.get("uncovered") or {"share": 0.0}
    if uncovered["share"]:
        told = f"{uncovered['share']:.1%} of the pairs ({uncovered['where']})"
        rows.append(("covered by no label", told))
    if found["more_labels"] is not None:
        rows.append(("labels to halve the interval", f"{found['more_labels']:,} more"))
    return rows


def _held_out(found: dict[str, Any] | None) -> str:
    if not found or found["precision"] is None:
        return "unknown"
    kept = f"{found['precision']:.1%} right of {found['labels']:,} kept"
    return f"{kept}, recall {found['recall']:.1%}"


def _with_interval(
    value: float | None, interval: Sequence[float] | None, form: str = "{:.1%}"
) -> str:
    if value is None:
        return "unknown"
    told = form.format(value)
    if interval is None:
        return told
    return f"{told} ({form.format(interval[0])} to {form.format(interval[1])})"


def _section(source: str, found: dict[str, Any], target: float) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in rows_of(found)
    )
    curves, bins = found["curves"], found["reliability"]
    recall = curves["true_positive"]
    charts = [
        _chart(
            "ROC",
            "false positives",
            "true positives",
            curves["false_positive"],
            recall,
            True,
            band=curves.get("true_positive_interval"),
        ),
        _chart(
            "Precision and recall",
            "recall",
            "precision",
            recall,
            curves["precision"],
            False,
            band=curves.get("precision_interval"),
            goal=target,
        ),
        _chart(
            "Reliability (held out)",
            "predicted",
            "observed",
            [row["predicted"] for row in bins],
            [row["observed"] for row in bins],
            True,
            dots=True,
        ),
    ]
    return (
        f"<h2>{escape(source)} texts</h2><table>{rows}</table>"
        f"<div class='charts'>{''.join(charts)}</div>"
    )


def _chart(
    title: str,
    x_name: str,
    y_name: str,
    x: Sequence[float],
    y: Sequence[float],
    diagonal: bool,
    dots: bool = False,
    band: Sequence[Sequence[float]] | None = None,
    goal: float | None = None,
) -> str:
    """A line in the unit square, with what 95 % of resamples span, and a level to reach."""

    def at(value: float, upwards: bool) -> float:
        return round(_MARGIN + (1 - value if upwards else value) * (_SIDE - 2 * _MARGIN), 1)

    points = [(at(a, False), at(b, True)) for a, b in zip(x, y, strict=True)]
    line = " ".join(f"{a},{b}" for a, b in points)
    low, high = _MARGIN, _SIDE - _MARGIN
    drawn = [f"<rect class='axis' x='{low}' y='{low}' width='{high - low}' height='{high - low}'/>"]
    if diagonal:
        drawn.append(f"<line class='guide' x1='{low}' y1='{high}' x2='{high}' y2='{low}'/>")
    if band is not None:
        there, back = list(zip(x, band[0], strict=True)), list(zip(x, band[1], strict=True))[::-1]
        outline = " ".join(f"{at(a, False)},{at(b, True)}" for a, b in [*there, *back])
        drawn.append(
            f"<polygon class='band' points='{outline}'><title>95 % of resamples</title></polygon>"
        )
    if goal is not None:
        level = at(goal, True)
        drawn.append(
            f"<line class='goal' x1='{low}' y1='{level}' x2='{high}' y2='{level}'>"
            f"<title>asked for: {goal:.1%}</title></line>"
        )
    drawn.append(f"<polyline class='line' points='{line}'/>")
    if dots:
        drawn += [
            f"<circle class='dot' cx='{a}' cy='{b}' r='3'><title>predicted {p:.0%}, "
            f"observed {o:.0%}</title></circle>"
            for (a, b), p, o in zip(points, x, y, strict=True)
        ]
    for value in (0, 0.5, 1):
        drawn.append(
            f"<text x='{at(value, False)}' y='{high + 14}' text-anchor='middle'>{value:g}</text>"
        )
        drawn.append(
            f"<text x='{low - 5}' y='{at(value, True) + 4}' text-anchor='end'>{value:g}</text>"
        )
    drawn.append(f"<text x='{_SIDE / 2}' y='{_SIDE - 4}' text-anchor='middle'>{x_name}</text>")
    drawn.append(
        f"<text x='10' y='{_SIDE / 2}' text-anchor='middle' "
        f"transform='rotate(-90 10 {_SIDE / 2})'>{y_name}</text>"
    )
    return (
        f"<figure><svg viewBox='0 0 {_SIDE} {_SIDE}' width='{_SIDE}' height='{_SIDE}' role='img' "
        f"aria-label='{title}: {y_name} by {x_name}'>{''.join(drawn)}</svg>"
        f"<figcaption>{title}</figcaption></figure>"
    )

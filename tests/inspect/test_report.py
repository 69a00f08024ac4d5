"""The static report: complete, closed to the outside, and robust to runs that lack something."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capfilt import manifest
from capfilt.config import Config
from capfilt.errors import InputError
from capfilt.inspect import charts, report, tables
from capfilt.inspect.report import report_identity, summary, write_report
from capfilt.inspect.tables import Strata, Tally
from capfilt.schema import DECISIONS, TABLES
from capfilt.shards import RunDir

MakeRun = Callable[..., RunDir]

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags and text, and refuses tags that close out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(run: RunDir, config: Config) -> tuple[str, Page]:
    html = Path(write_report(run, config)).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    return html, page


@pytest.fixture(scope="module")
def html(run: RunDir) -> str:
    config = Config.model_validate(
        {"run_dir": "x", "human": {"pairs": "h"}, "web": {"urls": "<i>urls</i>.csv"}}
    )
    return render(run, config)[0]


def test_nothing_reaches_outside(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style"
            if name in {"src", "href", "srcset", "xlink:href"}:
                assert str(value).startswith(("data:image/webp;base64,", "#"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"style-src 'sha256-{digest}';" in policy


def test_captions_are_escaped(html: str, run: RunDir) -> None:
    shown = Page(html).text
    assert "<script>alert" not in html and "<b>start" not in html and "<i>urls" not in html
    assert "quick <b>start" in shown and "<i>urls</i>.csv" in shown
    assert "\x1b" not in html and "\u202e" not in html


def test_accessible(html: str) -> None:
    page = Page(html)
    assert next(page.all("html"))["lang"] == "en"
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert all(a.get("alt") for a in page.all("img"))
    assert all(
        (a.get("role") == "img" and a.get("aria-label")) or a.get("aria-hidden")
        for a in page.all("svg")
    )
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    count = sum(1 for _ in page.all("table"))
    assert count == sum(1 for _ in page.all("caption")) > 0
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(html: str, scheme: str) -> None:
    roots = re.findall(r":root \{(.*?)\}", html, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", roots[0]))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6})", roots[1]))

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def ratio(name: str, ground: str = "ground") -> float:
        low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "quiet", "kept", "dropped"):
        assert ratio(name) >= 4.5, name
    assert ratio("ink", "raised") >= 4.5
    for name in ("other", "line-a", "line-b", "mark"):
        assert ratio(name) >= 3, name


def test_shows_everything(html: str, run: RunDir) -> None:
    page = Page(html)
    facts = summary(run)
    assert f"{facts['kept']} of {facts['pairs_in']} pairs kept" in page.text
    assert "The books close" in page.text
    assert "25 % with nucleus sampling, 19 % with beam search" in page.text
    labels = [str(a["aria-label"]) for a in page.all("svg") if "aria-label" in a]
    for start in (
        "web: ",
        "synthetic: ",
        "human: ",
        "pretrain: LM",
        "captioner: LM",
        "matcher: ITM",
        "Share of scored",
    ):
        assert any(label.startswith(start) for label in labels), start
    assert "Connection refused" in page.text and "http://127.0.0.1:1/" in page.text
    assert sum(1 for _ in page.all("img")) >= 90
    for table in ("images", "scores", "decisions"):
        record = manifest.read(run, run.manifest(table, "web-00000"))
        assert record is not None and record["fingerprint"][:12] in page.text
    assert "itm_threshold: 0.5" in page.text
    assert "threshold 0.5" in page.text


def test_grid_is_stratified_and_shows_side_by_side(run: RunDir, config: Config) -> None:
    _, pairs, unscored = report._scan(run, config)
    dropped = tables.read_pairs(run, pairs[False].take(config.report.pairs))
    assert {pair["reason"] for pair in dropped} == {
        "itm_below_threshold",
        "duplicate",
        "empty_caption",
    }
    kept = tables.read_pairs(run, pairs[True].take(config.report.pairs))
    assert len(kept) == len({pair["pair_id"] for pair in kept}) == config.report.pairs
    assert {pair["source"] for pair in kept} == {"web", "human", "synthetic"}
    assert {int(pair["itm_prob"] * 10) for pair in kept if pair["source"] == "synthetic"} >= {
        5,
        6,
        7,
        8,
        9,
    }
    both = [pair for pair in kept if pair["others"]]
    assert all({pair["key"]} == {other["key"] for other in pair["others"]} for pair in both)
    assert any(
        other["source"] == "web" and not other["keep"] for pair in both for other in pair["others"]
    )
    failed = tables.read_pairs(run, unscored.take(99))
    assert {pair["reason"] for pair in failed} == {
        "download_failed",
        "image_unreadable",
        "image_too_large",
    }


def test_deterministic_by_seed(run: RunDir, config: Config) -> None:
    first, again = render(run, config)[0], render(run, config)[0]
    other = render(run, config.model_copy(update={"seed": 1}))[0]
    assert first == again
    assert re.findall(r"web-\d+-\d+/\w+", first) != re.findall(r"web-\d+-\d+/\w+", other)


def test_reads_few_pictures(
    tmp_path: Path, make_run: MakeRun, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(f"web-{at:05d}" for at in range(12))
    run = make_run(tmp_path / "run", shards=names, pictures=22)
    opened = set()
    real = tables.read_pictures

    def spy(run: RunDir, shard: str, keys: set[str], columns: Any) -> Any:
        if "image" in columns:
            opened.add(shard)
        return real(run, shard, keys, columns)

    monkeypatch.setattr(report, "read_pictures", spy)
    small = config.model_copy(update={"report": config.report.model_copy(update={"pairs": 4})})
    write_report(run, small)
    assert 0 < len(opened) <= tables.SHARDS_TOGETHER


@pytest.mark.parametrize(
    "lacking",
    [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"synthetic": False},
        {"models": False},
        {"shards": ("web-00000",)},
        {"shards": ("human-00000",)},
        {"shards": ("web-00000",), "pictures": 1},
    ],
    ids=str,
)
def test_runs_that_lack_something(
    tmp_path: Path, make_run: MakeRun, config: Config, lacking: dict[str, Any]
) -> None:
    run = make_run(
        tmp_path / "run", **{"shards": ("human-00000", "web-00000"), "pictures": 12, **lacking}
    )
    _, page = render(run, config)
    assert "pairs kept" in page.text
    json.dumps(summary(run), allow_nan=False)


def test_nothing_decided(tmp_path: Path, config: Config) -> None:
    run = RunDir(str(tmp_path / "young"))
    assert summary(run)["pairs_in"] == 0
    with pytest.raises(InputError, match="no decisions yet"):
        write_report(run, config)


def test_broken_picture_and_unscored_shards(
    tmp_path: Path, make_run: MakeRun, config: Config
) -> None:
    run = make_run(tmp_path / "run", shards=("web-00000",), pictures=12)
    path = run.table("images", "web-00000")
    table = pq.read_table(path)
    broken = pa.array([b"\xff\xd8\xff no picture"] * table.num_rows, pa.binary())
    at = table.schema.get_field_index("image")
    run.write_table(path, table.set_column(at, TABLES["images"].field("image"), broken))
    _, page = render(run, config)
    assert "picture can’t be shown" in page.text and not list(page.all("img"))


def test_scores_without_decisions_are_said(
    tmp_path: Path, make_run: MakeRun, config: Config
) -> None:
    run = make_run(tmp_path / "run", shards=("web-00000", "web-00001"), pictures=12)
    run.remove(run.manifest("decisions", "web-00001"))
    assert not summary(run)["books_close"]
    assert "The books do not close" in render(run, config)[1].text


def test_other_pairs_in_decisions(tmp_path: Path, make_run: MakeRun, config: Config) -> None:
    run = make_run(tmp_path / "run", shards=("web-00000",), pictures=12)
    path = run.table("decisions", "web-00000")
    run.write_table(path, pq.read_table(path).slice(1))
    with pytest.raises(InputError, match="web-00000 don't hold the same pairs"):
        write_report(run, config)


def test_summary_counts(run: RunDir) -> None:
    facts = json.loads(json.dumps(summary(run), allow_nan=False))
    rows = [
        row
        for name in run.shards("decisions")
        for row in pq.read_table(run.table("decisions", name)).to_pylist()
    ]
    assert (
        facts["pairs_in"] == len(rows) == facts["kept"] + facts["dropped"] and facts["books_close"]
    )
    for source, counts in facts["sources"].items():
        own = [row for row in rows if row["source"] == source]
        assert counts["in"] == len(own) == sum(counts["reasons"].values())
        assert counts["kept"] == sum(row["keep"] for row in own)
    web = facts["noise_ratios"]["web"]
    assert web["filtered"] == facts["sources"]["web"]["reasons"]["itm_below_threshold"]
    assert web["share"] == web["filtered"] / (web["filtered"] + facts["sources"]["web"]["kept"])
    both = {"itm": 0.5, "itc": None}
    assert facts["thresholds"] == {"web": both, "synthetic": both}
    assert set(facts["paper_noise_ratios"].values()) == {0.25, 0.19}


def test_what_a_later_rule_dropped_has_passed_the_threshold(
    make_run: Callable[..., RunDir], tmp_path: Path, config: Config
) -> None:
    run = make_run(tmp_path / "run")
    later = ("not_best", "expression", "below_top_fraction", "web_text_kept")
    before = summary(run)["noise_ratios"]
    for name in run.shards("decisions", ("web",)):
        path = run.table("decisions", name)
        rows = pq.read_table(path).to_pylist()
        for at, row in enumerate(row for row in rows if row["keep"]):
            if at % 3 == 0:
                row |= {"keep": False, "reason": later[at // 3 % len(later)]}
        run.write_table(path, pa.Table.from_pylist(rows, DECISIONS))
    facts = summary(run)
    assert facts["noise_ratios"] == before
    reasons = facts["sources"]["synthetic"]["reasons"]
    assert set(later) <= set(reasons) and before["synthetic"]["filtered"]
    html = Path(write_report(run, config)).read_text()
    told = f"{before['synthetic']['filtered']:,} of {before['synthetic']['judged']:,} judged"
    assert told in html and "other reasons (a later rule, duplicate" in html


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"itm_threshold": 0.5, "itc_threshold": 0.25},
         "; below an ITM probability of 0.5 or an ITC similarity of 0.25 it was dropped."),
        ({"itm_threshold": 0.5, "synthetic_itm_threshold": 0.75},
         "; a web text was dropped below an ITM probability of 0.5"
         "; a synthetic text was dropped below an ITM probability of 0.75."),
        ({"itm_threshold": None, "synthetic_itc_threshold": 0.25},
         "; a synthetic text was dropped below an ITC similarity of 0.25."),
        ({"itm_threshold": None}, "every web and synthetic text against its picture."),
    ],
)  # fmt: skip
def test_the_report_says_the_thresholds(
    tmp_path: Path, make_run: MakeRun, section: dict[str, float | None], said: str
) -> None:
    run = make_run(tmp_path / "run", shards=("web-00000",), pictures=6)
    for name in run.shards("decisions"):
        path = run.manifest("decisions", name)
        record = manifest.read(run, path)
        record["config"] = {**record["config"], "itc_threshold": None, **section}
        run.write_text(path, json.dumps(record))
    page = Path(write_report(run, None)).read_text(encoding="utf-8")
    lead = " ".join(page.split('<p class="lead">')[1].split("</p>")[0].split())
    assert lead.endswith(said)


def test_identity_follows_decisions_models_and_look(
    tmp_path: Path, make_run: MakeRun, config: Config
) -> None:
    run = make_run(tmp_path / "run", shards=("web-00000",), pictures=6)
    first = report_identity(run, config)
    assert first == report_identity(run, config) and first.stage == "report"
    assert report_identity(run, config.model_copy(update={"threads": 3})) == first
    wider = config.model_copy(update={"report": config.report.model_copy(update={"pairs": 9})})
    assert report_identity(run, wider).fingerprint != first.fingerprint
    run.remove(run.at("models", "matcher", "manifest.json"))
    without = report_identity(run, config)
    assert without.fingerprint != first.fingerprint
    run.remove(run.manifest("decisions", "web-00000"))
    assert report_identity(run, config).fingerprint != without.fingerprint


def test_histograms_hold_every_score(run: RunDir) -> None:
    tally = Tally()
    scored = 0
    for shard in tables.decided_shards(run):
        tally.add(shard)
        scored += int(np.isfinite(shard.itm_prob).sum())
    assert tally.itm.sum() == tally.itc.sum() == scored
    marks = {"web": {"itm": 0.5, "itc": None}, "synthetic": {"itm": 0.25, "itc": None}}
    bars = [chart for _, found in report._histograms(tally, marks) for chart in found]
    assert (
        len(bars) == 6
        and [chart.marker is not None for chart in bars] == [True, True, False] + [False] * 3
    )
    assert [chart.marker.label for chart in bars[:2]] == ["0.5", "0.25"]
    assert report._one_threshold({"web": marks["web"], "synthetic": marks["web"]}) == 0.5
    assert report._one_threshold(marks) is None


def test_tally_puts_a_score_on_an_edge_above_it() -> None:
    tally = Tally()
    probabilities = np.array([0.0, 0.5, np.float32(0.7), 1.0], np.float32)
    reasons = np.zeros(4, np.int8)
    tally.add(tables.DecidedShard("web-00000", reasons, reasons, probabilities, probabilities))
    keep = report._keep_curve(tally, 0.5)
    assert keep is not None
    shares = {threshold: row["web"] for threshold, row in keep["rows"]}
    assert shares[0.5] == 0.75 and shares[0.7] == 0.5 and shares[0.8] == 0.25


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), min_size=1, max_size=5),
    st.integers(1, 8),
)
def test_strata_keep_the_lowest_draws(parts: list[list[float]], size: int) -> None:
    strata = Strata(size)
    everything = []
    for at, part in enumerate(parts):
        name = f"web-{at:05d}"
        strata.add(("x",), name, np.arange(len(part)), np.array(part))
        everything += [(value, name, row) for row, value in enumerate(part)]
    found = [(one.draw, one.shard, one.row) for one in strata.take(size)]
    assert found == sorted(everything)[:size]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_enclose_the_range(low: float, span: float, about: int) -> None:
    high = low + span
    if high <= low:
        return
    found = charts.ticks(low, high, about)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-3 and found[-1] >= high - step * 1e-3
    assert len(found) <= about + 3


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0] * 20, [1e-9, 5e9] * 500])
def test_curve_of_odd_values(values: list[float]) -> None:
    chart = charts.curve("LM", "step", [float(at) for at in range(len(values))], values)
    assert chart.lines and "nan" not in chart.lines[0].path
    assert 0 < len(chart.y_ticks) < 12 and len(chart.bands) <= 120


def test_log_lines_that_are_no_numbers() -> None:
    assert report._log_line('{"step": 3, "lm": NaN, "note": "x", "ok": true}') == {"step": 3.0}
    assert report._log_line('{"step": 3, "l') == report._log_line("[1]") == {}


def test_thumbnail_is_small_and_not_enlarged() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (400, 100), (0, 0, 0, 0)).save(buffer, "PNG")
    uri = report._thumbnail(buffer.getvalue(), 56)
    assert uri is not None
    shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert shown.size == (112, 28) and shown.getpixel((5, 5)) == (255, 255, 255)
    assert report._thumbnail(b"GIF89a", 56) is None

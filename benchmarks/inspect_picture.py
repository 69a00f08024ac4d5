"""Takes the README's picture of the review page, in chromium.

    python benchmarks/inspect_picture.py [RUN] [--out .github/inspect.png]

RUN is a finished quickstart; it is copied, not touched. Without one, the pictures and the web texts
are those of `sample_data/`, and the synthetic texts and all scores are made up. Some verdicts are
given in random order, from `sample_data/web/truth.csv`, so that the page has a precision to show.

Needs `pip install "capfilt[inspect]" playwright` and chromium.
"""

import argparse
import csv
import hashlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from in_browser import browser_tab, find_chromium
from PIL import Image

from capfilt import manifest
from capfilt.inspect import app
from capfilt.inspect.labels import Label
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, IMAGES, SCORES
from capfilt.shards import RunDir, Shard

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "sample_data/web"
SHARD = "web-00000"
MATCHER = "0" * 64
WIDTH, HEIGHT = 1280, 1130
LARGEST = 200_000
"""Bytes of the picture."""


def truth() -> dict[str, bool]:
    """Whether the text fits the picture, by the picture's file name, where that is known."""
    with (WEB / "truth.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["url"].rsplit("/", 1)[1]: row["match"] == "true" for row in rows if row["match"]}


def make_run(folder: Path, threshold: float = 0.5) -> None:
    """A run of the sample pictures; a fair matcher's scores are drawn for each text."""
    random = np.random.default_rng(7)
    with (WEB / "truth.csv").open(encoding="utf-8", newline="") as file:
        known = {row["url"]: row for row in csv.DictReader(file)}
    with (WEB / "urls.csv").open(encoding="utf-8", newline="") as file:
        listed = [row for row in csv.DictReader(file) if known.get(row["url"], {}).get("match")]
    images: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    for number, row in enumerate(listed):
        key, told = f"{SHARD}-{number:05d}", known[row["url"]]
        data = (WEB / "images" / row["url"].rsplit("/", 1)[1]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
        sides = {"width": width, "height": height}
        sides |= {f"original_{name}": side for name, side in sides.items()}
        images.append(
            {
                **dict.fromkeys(IMAGES.names),
                **sides,
                "key": key,
                "source": "web",
                "url": row["url"],
                "captions": [row["caption"]],
                "status": "success",
                "sha256": digest,
                "image": data,
            }
        )
        right = bool(random.random() < 0.75)
        named = told["label"] if right else known[listed[number - 3]["url"]]["label"]
        article = "an" if named[:1].lower() in "aeiou" else "a"
        for source, suffix, text, fits in (
            ("synthetic", "synthetic0", f"{article} {named}", right),
            ("web", "text0", row["caption"], told["match"] == "true"),
        ):
            logit = random.normal(2.2 if fits else -2.6, 2.3)
            itm = float(np.float32(1 / (1 + np.exp(-logit))))
            uid = hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
            pair = {"pair_id": f"{key}/{suffix}", "source": source}
            itc = float(np.clip(0.3 + 0.09 * logit + random.normal(0, 0.07), -1, 1))
            scores.append(
                {**pair, "key": key, "caption": text, "uid": uid, "itm_prob": itm, "itc_sim": itc}
            )
            keep = itm >= threshold
            reason = "kept" if keep else "itm_below_threshold"
            decisions.append({**pair, "keep": keep, "reason": reason})
    run = RunDir(str(folder))
    config = {"itm_threshold": threshold, "itc_threshold": None}
    for table, schema, rows in (
        ("images", IMAGES, images),
        ("scores", SCORES, scores),
        ("decisions", DECISIONS, decisions),
    ):
        run.write_table(run.table(table, SHARD), pa.Table.from_pylist(rows, schema))
        weights = {"matcher": MATCHER} if table == "scores" else {}
        identity = Identity(table, 1, config, {}, weights)
        path = run.manifest(table, SHARD)
        manifest.sign(run, path, identity, rows=len(rows), counts={}, seconds=0.0)


def copy_run(source: Path, folder: Path) -> None:
    """What the page reads of a finished run."""
    for table in ("images", "scores", "decisions"):
        shutil.copytree(source / table, folder / table)


def review(folder: Path, page: app.Page, count: int = 300) -> None:
    """Verdicts on web texts in random order, by the truth, of two reviewers."""
    known, random = truth(), np.random.default_rng(3)
    run = RunDir(str(folder))
    lines = []
    for name in run.shards("scores", ("web",)):
        urls = Shard(run, name).read("images", ["key", "url"])
        by_key = dict(zip(*(column.to_pylist() for column in urls.columns), strict=True))
        for row in Shard(run, name).read("scores").to_pylist():
            fits = known.get((by_key[row["key"]] or "").rsplit("/", 1)[-1])
            if row["source"] != "web" or fits is None or row["itm_prob"] is None:
                continue
            label = Label(
                row["pair_id"],
                row["uid"],
                "right" if fits else "wrong",
                "ann" if random.random() < 0.7 else "bo",
                "2026-01-31T12:00:00Z",
                row["itm_prob"],
                row["itc_sim"],
                sampling="random",
            )
            lines.append(label.line())
    chosen = random.choice(len(lines), min(count, len(lines)), False)
    page.run.labels.import_lines("\n".join(lines[at] for at in chosen))
    page.run.refresh_labels()


def take(page: app.Page, query: str, chromium: str) -> Image.Image:
    """The page as it looks in a window, light."""
    size = {"width": WIDTH, "height": HEIGHT}
    looks = {"color_scheme": "light", "device_scale_factor": 1}
    with browser_tab(page, chromium, viewport=size, **looks) as (tab, url):
        tab.goto(f"{url}/?{query}")
        tab.wait_for_selector(".card img")
        tab.wait_for_selector(".histogram")
        tab.wait_for_load_state("networkidle")
        tab.keyboard.press("j")
        tab.wait_for_timeout(500)
        shot = tab.screenshot()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / ".github/inspect.png")
    parser.add_argument("--query", default="order=random&seed=3&t_itm=0.650&t_synthetic_itm=0.500")
    arguments = parser.parse_args()
    chromium = find_chromium()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "quickstart")
        if arguments.run is None:
            make_run(folder)
        else:
            copy_run(arguments.run, folder)
        page = app.open_page(str(folder), reviewer="ann")
        try:
            review(folder, page)
            picture = take(page, arguments.query, chromium)
        finally:
            page.run.close()
    # a palette makes it a third of the size, and nobody sees it
    colours = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours.save(arguments.out, optimize=True)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {picture.width} x {picture.height} pixels, {size:,} bytes")
    if size > LARGEST:
        raise SystemExit(f"that is more than {LARGEST:,} bytes; take a smaller window")


if __name__ == "__main__":
    main()

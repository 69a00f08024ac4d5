"""How fast the review page is on a large run, measured in a browser.

Makes up a run (a web and a synthetic text a picture, tiny pictures), opens it twice, and times in
chromium: the first screen from navigation, the next screens by key and by button, other orders and
filters, and the threshold slider. A screen counts once its cards are painted and once its visible
pictures are decoded.

    python benchmarks/inspect_speed.py --pairs 1000000 --shards 100

Needs `pip install "capfilt[inspect]" playwright` and chromium.
"""

import argparse
import hashlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from in_browser import browser_tab, find_chromium
from PIL import Image

from capfilt import manifest
from capfilt.inspect import app
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, IMAGES, SCORES
from capfilt.shards import PICTURES_A_GROUP, ROWS_A_GROUP, RunDir

WORDS = ["a", "photo", "of", "dog", "lake", "red", "car", "woman", "street", "old", "house", "near"]


def pictures(count: int) -> list[bytes]:
    """A few hundred different JPEGs."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        pixels = random.integers(0, 255, (6, 6, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((48, 48)).save(out, "JPEG")
        made.append(out.getvalue())
    return made


def make_run(folder: str, pairs: int, shards: int) -> None:
    run = RunDir(folder)
    random = np.random.default_rng(0)
    stock = pictures(500)
    digests = [hashlib.sha256(data).hexdigest() for data in stock]
    each = pairs // shards // 2
    for number in range(shards):
        name = f"web-{number:05d}"
        keys = [f"{name}-{row:05d}" for row in range(each)]
        chosen = random.integers(0, len(stock), each).tolist()
        captions = [" ".join(random.choice(WORDS, 9)) + f" {row}" for row in range(2 * each)]
        null = pa.nulls(each, pa.string())
        side = pa.array([48] * each, pa.int32())
        images = {
            "key": keys,
            "source": ["web"] * each,
            "url": [f"https://example.org/{key}.jpg" for key in keys],
            "captions": [[text] for text in captions[1::2]],
            "status": ["success"] * each,
            "error_message": null,
            "reason": null,
            "width": side,
            "height": side,
            "original_width": side,
            "original_height": side,
            "exif": null,
            "sha256": [digests[index] for index in chosen],
            "image": [stock[index] for index in chosen],
        }
        itm = np.clip(random.beta(0.7, 0.7, 2 * each), 0, 1).astype(np.float32)
        pair_ids = [f"{key}/{suffix}" for key in keys for suffix in ("synthetic0", "text0")]
        scores = {
            "pair_id": pair_ids,
            "key": [key for key in keys for _ in range(2)],
            "source": ["synthetic", "web"] * each,
            "caption": captions,
            "uid": [hashlib.sha256(pair.encode()).hexdigest() for pair in pair_ids],
            "itm_prob": itm,
            "itc_sim": random.normal(0.2, 0.15, 2 * each).clip(-1, 1).astype(np.float32),
            "error": pa.nulls(2 * each, pa.string()),
        }
        keep = itm >= 0.5
        decisions = {
            "pair_id": pair_ids,
            "source": scores["source"],
            "keep": keep,
            "reason": np.where(keep, "kept", "itm_below_threshold").tolist(),
        }
        tables: tuple[tuple[str, dict[str, Any], pa.Schema], ...] = (
            ("images", images, IMAGES),
            ("scores", scores, SCORES),
            ("decisions", decisions, DECISIONS),
        )
        for table, columns, schema in tables:
            made = pa.table(columns, schema)
            rows = PICTURES_A_GROUP if table == "images" else ROWS_A_GROUP
            run.write_table(run.table(table, name), made, rows)
            identity = Identity(table, 1, {"itm_threshold": 0.5})
            path = run.manifest(table, name)
            manifest.sign(run, path, identity, rows=made.num_rows, counts={}, seconds=0)


# Waits, from inside the page, for other cards than those that are shown; then for their pictures.
WATCH = """(act) => new Promise((done) => {
    const first = () => document.querySelector("#grid .card");
    const before = first();
    const start = performance.now();
    const pictures = (painted) => {
        const visible = [...document.querySelectorAll("#grid img")].filter((image) => {
            const box = image.getBoundingClientRect();
            return box.top < innerHeight && box.bottom > 0;
        });
        if (visible.every((image) => image.complete)) done([painted, performance.now() - start]);
        else requestAnimationFrame(() => pictures(painted));
    };
    const watch = () => {
        if (first() && first() !== before) {
            requestAnimationFrame(() => setTimeout(() => pictures(performance.now() - start), 0));
        } else requestAnimationFrame(watch);
    };
    const [kind, selector, value] = act;
    const element = document.querySelector(selector);
    if (kind === "click") element.click();
    if (kind === "set") {
        element.value = value;
        element.dispatchEvent(new Event("input", { bubbles: true }));
    }
    watch();
})"""

FIRST = """() => new Promise((done) => {
    const watch = () => {
        const images = [...document.querySelectorAll("#grid img")].filter((image) =>
            image.getBoundingClientRect().top < innerHeight);
        if (document.querySelector("#grid .card") && images.every((image) => image.complete)) {
            done([performance.getEntriesByName("capfilt:screen")[0].startTime, performance.now()]);
        } else requestAnimationFrame(watch);
    };
    watch();
})"""

SLIDE = """() => new Promise((done) => {
    const line = document.querySelector("#threshold-text");
    const slider = document.querySelector(".plot input");
    const start = performance.now();
    new MutationObserver((_, observer) => {
        observer.disconnect();
        done(performance.now() - start);
    }).observe(line, { childList: true, characterData: true, subtree: true });
    slider.value = Number(slider.value) + 0.03;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
})"""


def measure(folder: str, chromium: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in ("open_first_s", "open_again_s"):
        start = time.perf_counter()
        page = app.open_page(folder, reviewer="benchmark")
        figures[name] = round(time.perf_counter() - start, 2)
        if name == "open_first_s":
            page.run.close()
    screens: list[tuple[str, float, float]] = []
    with browser_tab(page, chromium, viewport={"width": 1280, "height": 900}) as (tab, url):
        tab.goto(url, wait_until="commit")
        tab.wait_for_selector(".card")
        painted, complete = tab.evaluate(FIRST)
        figures["first_screen_ms"] = {"cards": round(painted), "pictures": round(complete)}
        tab.wait_for_selector(".histogram")

        def act(name: str, kind: str, selector: str, value: str = "") -> None:
            painted, complete = tab.evaluate(WATCH, [kind, selector, value])
            screens.append((name, painted, complete))

        for order in ("pair", "random", "high", "threshold", "disagreement"):
            if order != "pair":
                act(f"sort by {order}", "set", "[name=order]", order)
            for number in range(12):
                tab.wait_for_timeout(700 if number % 2 else 0)  # a look, and a hasty click
                how = "after a look" if number % 2 else "at once"
                act(f"next, {order}, {how}", "click", ".next")
        act("previous", "click", ".previous")
        act("dropped only", "set", "[name=keep]", "no")
        act("words", "set", "[name=words]", "red lake")
        act("next, filtered", "click", ".next")
        slides = []
        for _ in range(8):
            tab.wait_for_timeout(200)
            slides.append(tab.evaluate(SLIDE))
        figures["threshold_ms"] = {
            "median": round(statistics.median(slides)),
            "max": round(max(slides)),
        }
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, painted, complete in screens:
        kinds.setdefault(name, []).append((painted, complete))
    figures["screens_ms"] = {
        name: {
            "cards median": round(statistics.median(each[0] for each in times)),
            "cards max": round(max(each[0] for each in times)),
            "pictures max": round(max(each[1] for each in times)),
        }
        for name, times in kinds.items()
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--run", help="keep the made-up run here, and use it if it is there")
    arguments = parser.parse_args()
    chromium = find_chromium()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.run or f"{temporary}/run"
        if not Path(folder, "decisions").exists():
            make_run(folder, arguments.pairs, arguments.shards)
        figures = measure(folder, chromium)
    print(json.dumps({"pairs": arguments.pairs, "shards": arguments.shards, **figures}, indent=1))


if __name__ == "__main__":
    main()

"""The committed sample data: what it holds, that its tables line up, and that it is as bad as the web."""

from __future__ import annotations

import collections
import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1] / "sample_data"
IMAGE_URL = "http://127.0.0.1:18780/images/"
UNREADABLE = {"truncated", "not_an_image", "empty_file", "too_large", "too_small"}
RIGHT = {"clean", "html", "non_ascii", "quoted", "very_long", "duplicate"}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def human() -> list[dict[str, list[str]]]:
    lines = (ROOT / "human/captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def urls() -> list[dict[str, str]]:
    return read_csv(ROOT / "web/urls.csv")


@pytest.fixture(scope="module")
def truth() -> list[dict[str, str]]:
    return read_csv(ROOT / "web/truth.csv")


def file_of(url: str) -> Path:
    return ROOT / "web/images" / url.removeprefix(IMAGE_URL)


def test_size_is_at_most_16_mb() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    shipped = [path for path in files if "cache" not in str(path.relative_to(ROOT))]
    sizes = [path.stat().st_size for path in shipped]
    assert len(sizes) > 2400
    assert sum(-(-size // 4096) * 4096 for size in sizes) < 16e6


def test_human_pictures_open_and_each_has_captions(human: list[dict[str, list[str]]]) -> None:
    assert len(human) >= 1500
    assert len({str(row["image"]) for row in human}) == len(human)
    on_disk = {f"images/{path.name}" for path in (ROOT / "human/images").iterdir()}
    assert on_disk == {str(row["image"]) for row in human}
    for row in human:
        with Image.open(ROOT / "human" / str(row["image"])) as image:
            image.load()
            assert min(image.size) >= 60
            assert image.mode == "P"
            assert len(image.getcolors() or []) > 1, f"{row['image']} is blank"
        assert 1 <= len(row["captions"]) <= 3
        for caption in row["captions"]:
            assert caption == caption.lower() == " ".join(caption.split())
            assert not re.search(r"\ban? (an?|the|some)\b|\ba [ai]\w|[:;()]", caption), caption


def test_truth_lines_up_with_urls(urls: list[dict[str, str]], truth: list[dict[str, str]]) -> None:
    assert list(urls[0]) == ["url", "caption"]
    assert list(truth[0]) == [
        "row",
        "url",
        "match",
        "kind",
        "label",
        "noun",
        "origin",
        "licence",
    ]
    assert len(urls) == len(truth) >= 950
    for index, (row, said) in enumerate(zip(urls, truth, strict=True)):
        assert said["row"] == str(index)
        assert said["url"] == row["url"]
        assert said["match"] in ("true", "false", "")
        gone = said["kind"] in UNREADABLE or said["kind"] == "dead_link"
        assert (said["match"] == "") == gone == (said["licence"] == ""), said
        if not gone:
            assert (said["match"] == "true") == (said["kind"] in RIGHT), said
            assert said["label"], said


def test_right_texts_name_the_thing(
    urls: list[dict[str, str]], truth: list[dict[str, str]]
) -> None:
    for row, said in zip(urls, truth, strict=True):
        if said["match"] == "true":
            assert said["noun"].rstrip("s") in row["caption"].lower(), (row, said)


def test_wrong_texts_do_not_name_the_thing(
    urls: list[dict[str, str]], truth: list[dict[str, str]]
) -> None:
    for row, said in zip(urls, truth, strict=True):
        if said["kind"] == "swapped":
            assert not re.search(rf"\b{re.escape(said['noun'])}\b", row["caption"].lower()), row


def test_as_bad_as_the_web(urls: list[dict[str, str]], truth: list[dict[str, str]]) -> None:
    kinds = collections.Counter(said["kind"] for said in truth)
    wrong = sum(said["match"] == "false" for said in truth) / len(truth)
    assert 0.33 <= wrong <= 0.38
    assert 0.20 <= kinds["swapped"] / len(truth) <= 0.24
    assert kinds["dead_link"] >= 12
    assert kinds["duplicate"] >= 1
    assert {*UNREADABLE, "html", "non_ascii", "quoted", "very_long"} <= set(kinds)
    captions = [row["caption"] for row in urls]
    assert "" in captions
    assert any(caption and not caption.strip() for caption in captions)
    assert any("<b>" in caption for caption in captions)
    assert any("&amp;" in caption for caption in captions)
    assert any("<script>" in caption for caption in captions)
    assert any('"' in caption and "\n" in caption for caption in captions)
    assert any(not caption.isascii() for caption in captions)
    assert any(len(caption.split()) >= 200 for caption in captions)
    pairs = collections.Counter((row["url"], row["caption"]) for row in urls)
    assert max(pairs.values()) == 2
    assert any("127.0.0.1:9/" in row["url"] for row in urls)
    assert any("no-such-host.invalid" in row["url"] for row in urls)


def test_web_files_exist_or_are_meant_to_be_missing(truth: list[dict[str, str]]) -> None:
    for said in truth:
        if said["kind"] == "dead_link":
            assert not (said["url"].startswith(IMAGE_URL) and file_of(said["url"]).exists())
        else:
            assert file_of(said["url"]).is_file(), said
    named = {said["url"].removeprefix(IMAGE_URL) for said in truth}
    assert {path.name for path in (ROOT / "web/images").iterdir()} <= named


def test_web_pictures_open(truth: list[dict[str, str]]) -> None:
    good = {said["url"] for said in truth if said["match"]}
    assert len(good) >= 850
    for url in good:
        assert re.fullmatch(r"\d{4}\.(png|jpg)", file_of(url).name)
        with Image.open(file_of(url)) as image:
            image.load()
            assert 40 <= min(image.size) <= max(image.size) <= 128, url
            assert len(image.convert("L").getcolors() or []) > 1, f"{url} is blank"


def test_broken_files_are_broken(truth: list[dict[str, str]]) -> None:
    for said in truth:
        path = file_of(said["url"])
        if said["kind"] == "empty_file":
            assert path.stat().st_size == 0
        elif said["kind"] in ("truncated", "not_an_image"):
            with pytest.raises(OSError), Image.open(path) as image:
                image.load()
        elif said["kind"] == "too_large":
            assert path.stat().st_size < 120_000
            header = path.read_bytes()[16:24]
            width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:])
            assert width * height == 100_000_000
        elif said["kind"] == "too_small":
            with Image.open(path) as image:
                assert image.size == (1, 1)


def test_each_origin_has_a_licence(truth: list[dict[str, str]]) -> None:
    text = (ROOT / "LICENSES.md").read_text()
    shares: collections.Counter[str] = collections.Counter()
    for said in truth:
        if said["origin"]:
            origin = said["origin"].split(":")[0]
            shares[origin] += 1
            assert origin in text
            assert said["licence"] in text
    assert set(shares) == {"twemoji", "fluent-flat", "fluent-modern", "openclipart"}
    assert 0.15 <= shares["openclipart"] / shares.total() <= 0.25
    for name in re.findall(r"`(licenses/[^`]+)`", text):
        assert (ROOT / name).stat().st_size > 500

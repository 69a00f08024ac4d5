import csv
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt import demo, pipeline
from capfilt.config import Config
from capfilt.engine.local import StageResult, run_stage
from capfilt.errors import InputError, MismatchError, PartialError
from capfilt.shards import RunDir
from capfilt.stages import download
from capfilt.stages.download import DownloadStage, list_shards

HTML = 'A <b>red</b> apple &amp; "pear"'

FAKE = """
import json, os, sys
import pyarrow as pa, pyarrow.parquet as pq

def download(url_list, output_folder, number_sample_per_shard, **options):
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(json.dumps({"url_list": url_list, **options}) + "\\n")
    rows = pq.read_table(url_list).to_pylist()
    pq.write_table(pq.read_table(url_list), os.path.dirname(os.environ["FAKE_CALLS"]) + "/asked.parquet")
    for number, start in enumerate(range(0, len(rows), number_sample_per_shard)):
        out = []
        for row in reversed(rows[start : start + number_sample_per_shard]):
            name = row["url"].rsplit("/", 1)[-1]
            if "crash" in name and not os.path.exists(os.environ["FAKE_WEB"] + "/fixed"):
                sys.exit("crashed")
            if "lost" in name:
                continue
            path = os.path.join(os.environ["FAKE_WEB"], name)
            found = name and os.path.exists(path)
            out.append({**row, "jpg": open(path, "rb").read() if found else None, "exif": None,
                        "status": "success" if found else "failed_to_download",
                        "error_message": None if found else "HTTP Error 404"})
        schema = pa.schema([("url", pa.string()), ("row", pa.int64()), ("jpg", pa.binary()),
                            ("exif", pa.string()), ("status", pa.string()), ("error_message", pa.string())])
        pq.write_table(pa.Table.from_pylist(out, schema), f"{output_folder}/{number:05d}.parquet")
        open(f"{output_folder}/{number:05d}_stats.json", "w").write("{}")
"""


def encoded(size: tuple[int, int], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3))
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path) -> None:
    """A small web with everything in it that the web has."""
    jpeg = encoded((60, 40), "JPEG")
    (folder / "good.jpg").write_bytes(jpeg)
    (folder / "good.png").write_bytes(encoded((32, 32)))
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.jpg").write_text("<html>Not found</html>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "dot.png").write_bytes(encoded((1, 1)))
    (folder / "large.png").write_bytes(encoded((200, 100)))


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("url", "text"))
        writer.writerows(rows)


def config(tmp_path: Path, **options: Any) -> Config:
    web = {"urls": str(tmp_path / "urls.csv"), **options.pop("web", {})}
    limits = {"shard_size": 4, "max_area_px": 10_000, "retries": 0, "threads": 4, **options}
    return Config.model_validate(
        {"run_dir": str(tmp_path / "run"), "human": {"pairs": "x"}, "web": web, "download": limits}
    )


def run(settings: Config, **options: Any) -> StageResult:
    run_dir = RunDir(settings.run_dir)
    return run_stage(DownloadStage(run_dir, settings), run_dir, list_shards(settings), **options)


def table(settings: Config) -> list[dict[str, Any]]:
    folder = Path(settings.run_dir) / "images"
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def calls(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture()
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for img2dataset that reads a folder; it starts in no time."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "img2dataset.py").write_text(FAKE)
    (tmp_path / "web").mkdir()
    fill(tmp_path / "web")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("FAKE_WEB", str(tmp_path / "web"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    return tmp_path


def test_real_img2dataset_over_http(tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    fill(web)
    with demo.serve(web, 0) as base:
        rows = [
            (f"{base}/good.jpg", "two\nlines, and a comma"),
            (f"{base}/dead.jpg", "dead"),
            (f"{base}/cut.jpg", "cut"),
            (f"{base}/text.jpg", "text"),
            (f"{base}/empty.jpg", "empty"),
            (f"{base}/dot.png", "dot"),
            (f"{base}/large.png", "large"),
            (f"file://{web}/good.png", "local file"),
            (f"{base}/good.png", HTML),
            (f"{base}/good.png", HTML),
        ]
        write_csv(tmp_path / "urls.csv", rows)
        settings = config(tmp_path)
        result = run(settings)
    assert not result.failed, (tmp_path / "run/download/img2dataset.log").read_text()
    assert result.done == 3 and result.rows == len(rows)
    got = table(settings)
    assert [row["url"] for row in got] == [url for url, _ in rows]
    assert [row["captions"] for row in got] == [[text] for _, text in rows]
    assert [row["reason"] for row in got] == [
        None,
        "download_failed",
        "image_unreadable",
        "image_unreadable",
        "image_unreadable",
        "image_too_small",
        "image_too_large",
        "download_failed",
        None,
        None,
    ]
    assert result.counts == {
        "ok": 3,
        "download_failed": 2,
        "image_unreadable": 3,
        "image_too_small": 1,
        "image_too_large": 1,
    }
    assert "404" in got[1]["error_message"]
    assert got[7]["error_message"] == "unsupported URL scheme"
    assert got[0]["image"] == (web / "good.jpg").read_bytes()
    assert (got[0]["width"], got[0]["height"]) == (60, 40)
    assert [row["key"] for row in got[3:6]] == [
        "web-00000-00003",
        "web-00001-00000",
        "web-00001-00001",
    ]
    assert [path.name for path in (tmp_path / "run/download").iterdir()] == ["img2dataset.log"]


def test_books_close_and_the_second_run_does_nothing(fake: Path) -> None:
    names = ["good.png", "lost.png", "cut.jpg", "", "good.jpg"]
    write_csv(fake / "urls.csv", [(f"http://h/{name}" if name else "", name) for name in names])
    settings = config(fake)
    assert run(settings).rows == 5
    got = table(settings)
    assert [row["reason"] for row in got] == [
        None,
        "download_failed",
        "image_unreadable",
        "download_failed",
        None,
    ]
    assert got[1]["error_message"] == "img2dataset lost this row; see img2dataset.log"
    assert got[3]["error_message"] == "the row has no URL"
    again = run(settings)
    assert (again.done, again.skipped, len(calls(fake))) == (0, 2, 1)


def test_resume_fetches_only_the_shards_without_a_manifest(fake: Path) -> None:
    write_csv(fake / "urls.csv", [(f"http://h/good.png?{i}", str(i)) for i in range(12)])
    settings = config(fake, shard_size=3)
    run(settings)
    before = table(settings)
    for number in (1, 3):
        (fake / f"run/images/web-{number:05d}.manifest.json").unlink()
        (fake / f"run/images/web-{number:05d}.parquet").unlink()
    result = run(settings)
    assert (result.done, result.skipped) == (2, 2)
    assert table(settings) == before
    assert len(calls(fake)) == 2


def test_a_crash_keeps_what_was_finished_and_the_next_run_goes_on(fake: Path) -> None:
    names = ["good.png"] * 4 + ["crash.png"] + ["good.jpg"] * 4
    write_csv(fake / "urls.csv", [(f"http://h/{name}", name) for name in names])
    settings = config(fake, shard_size=4)
    first = run(settings)
    assert first.done == 1 and set(first.failed) == {"web-00001", "web-00002"}
    assert "did not finish shard web-00001" in first.failed["web-00001"]
    assert len(calls(fake)) == 1, "one start for all shards, also when it breaks off"
    (fake / "web/fixed").touch()
    second = run(settings)
    assert (second.done, second.skipped, second.failed) == (2, 1, {})
    assert len(table(settings)) == 9


def test_some_shards_are_fetched_at_once_and_finished_before_the_next(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "AT_ONCE", 7)  # two shards of 3
    write_csv(fake / "urls.csv", [(f"http://h/good.png?{i}", str(i)) for i in range(14)])
    settings = config(fake, shard_size=3)
    finished: list[int] = []
    fetch_raw = download._fetch_raw

    def watched(*arguments: Any) -> None:
        finished.append(len(list((fake / "run/images").glob("*.manifest.json"))))
        fetch_raw(*arguments)

    monkeypatch.setattr(download, "_fetch_raw", watched)
    assert run(settings).done == 5
    assert finished == [0, 2, 4]
    assert [row["captions"] for row in table(settings)] == [[str(i)] for i in range(14)]
    assert not (fake / "run/download/raw").exists()
    # one shard that went missing in the middle is fetched alone
    (fake / "run/images/web-00002.manifest.json").unlink()
    assert (run(settings).done, len(finished)) == (1, 4)


def test_raw_shards_of_a_killed_run_are_used_unless_the_config_changed(fake: Path) -> None:
    write_csv(fake / "urls.csv", [("http://h/good.png", str(i)) for i in range(8)])
    settings = config(fake)
    stage = DownloadStage(RunDir(settings.run_dir), settings)
    raw = fake / "run/download"
    fetch = download._Fetch(stage, download._open_list(settings), raw)
    raw.mkdir(parents=True)
    fetch._fetch_from("web-00000")
    assert len(calls(fake)) == 1
    other = config(fake, timeout_s=11)
    run(other)
    assert len(calls(fake)) == 2
    assert len(table(other)) == 8


def retry(settings: Config) -> StageResult:
    (result,) = pipeline.run(settings, steps=("download",), retry=True)
    return result


def test_a_retry_fetches_only_what_failed_and_keeps_the_rest(fake: Path) -> None:
    names = ["good.png", "late.png", "cut.jpg", "", "late.jpg", "good.jpg", "gone.png"]
    write_csv(fake / "urls.csv", [(f"http://h/{name}" if name else "", name) for name in names])
    settings = config(fake, shard_size=2)
    run(settings)
    before = table(settings)
    for path in (fake / "web").iterdir():
        path.rename(path.with_name(f"{path.name}.away"))
    signed = {path: path.read_bytes() for path in (fake / "run/images").iterdir()}
    result = retry(settings)
    assert (result.done, result.skipped, result.failed) == (4, 0, {})
    assert table(settings) == before, "what the server has lost since stays"
    tables = {path for path in signed if path.suffix == ".parquet"}
    assert all(path.read_bytes() == signed[path] for path in tables), "later steps stay done"
    (fake / "web/late.png").write_bytes(encoded((20, 20)))
    (fake / "web/late.jpg").write_text("no picture")
    result = retry(settings)
    assert result.counts == {"ok": 3, "image_unreadable": 2, "download_failed": 2}
    asked = [name for name in pq.read_table(fake / "asked.parquet")["url"].to_pylist()]
    assert asked == ["http://h/late.png", "http://h/late.jpg", "http://h/gone.png"]
    after = table(settings)
    assert (after[1]["reason"], after[1]["width"], after[4]["reason"]) == (
        None,
        20,
        "image_unreadable",
    )
    assert [row for place, row in enumerate(after) if place not in (1, 4)] == [
        row for place, row in enumerate(before) if place not in (1, 4)
    ]
    assert run(settings).skipped == 4
    assert [path.name for path in (fake / "run/download").iterdir()] == ["img2dataset.log"]


def test_a_retry_that_breaks_off_leaves_what_was_there(fake: Path) -> None:
    names = ["good.png", "late.png", "good.png", "crash.png"]
    write_csv(fake / "urls.csv", [(f"http://h/{name}", name) for name in names])
    (fake / "web/fixed").touch()
    settings = config(fake, shard_size=2)
    run(settings)
    before = table(settings)
    (fake / "web/fixed").unlink()
    with pytest.raises(PartialError, match=r"did not finish the retry of shard web-00000"):
        retry(settings)
    assert table(settings) == before and run(settings).skipped == 2
    (fake / "web/fixed").touch()
    (fake / "web/crash.png").write_bytes(encoded((20, 20)))
    assert retry(settings).counts == {"ok": 3, "download_failed": 1}


def test_another_config_is_an_error_and_redo_replaces(fake: Path) -> None:
    write_csv(fake / "urls.csv", [("http://h/good.png", "a")])
    run(config(fake))
    with pytest.raises(MismatchError, match=r"download\.min_side_px: 8 there, 9 now"):
        run(config(fake, min_side_px=9))
    assert run(config(fake, min_side_px=64), redo=True).counts == {"image_too_small": 1}
    run(config(fake, min_side_px=64, threads=1, processes=2))


def test_what_img2dataset_is_given(fake: Path) -> None:
    write_csv(fake / "urls.csv", [("http://h/good.png", "a")])
    run(config(fake, user_agent="me", timeout_s=2.5, retries=3, threads=7))
    (call,) = calls(fake)
    assert (call["user_agent_token"], call["timeout"], call["retries"]) == ("me", 2.5, 3)
    assert (call["thread_count"], call["processes_count"]) == (7, 1)
    assert call["disable_all_reencoding"] is True and call["output_format"] == "parquet"


@pytest.mark.parametrize(
    ("url", "handed_over"),
    [
        ("http://h/a.png?x=1&y=%20#z", "http://h/a.png?x=1&y=%20#z"),
        (" HTTPS://h/é b.png\n", "HTTPS://h/%C3%A9%20b.png"),
        ("file:///etc/passwd", ""),
        ("ftp://h/a.png", ""),
        ("data:image/png;base64,xx", ""),
        ("/etc/passwd", ""),
        ("httpx://h", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_only_http_is_handed_over(url: str | None, handed_over: str) -> None:
    assert download._fetchable(url) == handed_over


def test_the_child_dies_with_its_parent(fake: Path) -> None:
    (fake / "modules/img2dataset.py").write_text(
        "import os, time\ndef download(pid):\n open(pid, 'w').write(str(os.getpid()))\n time.sleep(60)\n"
    )
    pid = fake / "pid"
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from capfilt.stages.download import run_img2dataset
        run_img2dataset({{"pid": {str(pid)!r}}}, Path({str(fake / "log")!r}))
        """
    )
    root = Path(download.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ['PYTHONPATH']}"}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().split()[2] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


@pytest.mark.parametrize(
    ("name", "content", "web", "message"),
    [
        ("urls.csv", None, {}, r"web\.urls: .*urls\.csv' is not there"),
        ("urls.csv", "url,text\n", {}, r"web\.urls: .*urls\.csv has no rows"),
        ("urls.csv", "", {}, r"web\.urls: .*urls\.csv has no rows"),
        (
            "urls.csv",
            "link,text\na,b\n",
            {},
            r"no column 'url'; it has \['link', 'text'\].*web\.url_column",
        ),
        (
            "urls.csv",
            "url,alt\na,b\n",
            {},
            r"no column 'captions' or 'caption' or 'text'.*web\.caption_col",
        ),
        ("urls.csv", "url,text\na,b\n", {"caption_column": "alt"}, r"no column 'alt'"),
        (
            "urls.csv",
            "url,text\na,b,c\n",
            {},
            r"web\.urls: .*can't be read as csv.*Expected 2 columns",
        ),
        (
            "urls.csv",
            'url,text\nu1,a\nu2,"b\nu3,c\n',
            {},
            r"row that begins in line 3: unexpected end .* isn't closed",
        ),
        (
            "urls.csv",
            'url,text\nu1,"x\n"\nu2,"b\nu3,"c\nu4,d\n',
            {},
            r"row that begins in line 4: .* isn't closed",
        ),
        (
            "urls.tsv",
            "url\ttext\nu1\ta\tb\n",
            {},
            r"can't be read as tsv.*Expected 2 columns, got 3",
        ),
        ("urls.csv", "url,url,text\na,b,c\n", {}, r"a column twice"),
        ("urls.csv", b"url,text\na,\xff\n", {}, r"can't be read as csv.*(UTF8|utf-8)"),
        ("urls.jsonl", '{"url": "a"\n', {}, r"urls\.jsonl, line 1 is not JSON"),
        ("urls.jsonl", '{"url": "a", "text": "b"}\n[1]\n', {}, r"line 2 is not an object: \[1\]"),
        (
            "urls.jsonl",
            '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
            {},
            r"line 1 is not JSON: .*recursion",
        ),
        # deep enough to be read, and too deep to be written
        *(
            (
                "urls.jsonl",
                '{"a": ' + "[" * deep + "]" * deep + "}",
                {},
                r"line 1 is not JSON|no column 'url'",
            )
            for deep in range(900, 1000, 5)
        ),
        ("urls.parquet", "no", {}, r"can't be read as parquet"),
        ("urls.txt", "a", {}, r"is not a file ending in \.csv"),
    ],
)
def test_a_bad_list_is_one_message(
    tmp_path: Path, name: str, content: str | bytes | None, web: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        list_shards(config(tmp_path, web={"urls": str(path), **web}))


def test_lists_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"URL": "http://h/a", "TEXT": 'a "b"\nc, d'}, {"URL": "http://h/b", "TEXT": "é 黒 NA"}]
    plain = 'URL,TEXT\nhttp://h/a,"a ""b""\nc, d"\nhttp://h/b,é 黒 NA\n'
    (tmp_path / "l.csv").write_text("\ufeff" + plain, encoding="utf-8")
    (tmp_path / "l.tsv").write_text(
        plain.replace("c, d", "c~ d").replace(",", "\t").replace("~", ",")
    )
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        listed = download._open_list(config(tmp_path, web={"urls": str(tmp_path / f"l.{suffix}")}))
        assert (listed.url_column, listed.caption_column) == ("URL", "TEXT")
        assert listed.table.to_pylist() == rows, suffix


def test_a_row_of_a_tsv_is_a_line(tmp_path: Path) -> None:
    """An opening quote that nothing closes takes no further rows with it."""
    path = tmp_path / "l.tsv"
    path.write_text(
        '"url"\tcaption\nu1\t"hello world\nu2\tfoo\nu3\t"bar ""baz"""\nu4\tx"\nu5\t""\n'
    )
    listed = download._open_list(config(tmp_path, web={"urls": str(path)}))
    assert listed.table["url"].to_pylist() == ["u1", "u2", "u3", "u4", "u5"]
    assert listed.table["caption"].to_pylist() == ['"hello world', "foo", 'bar "baz"', 'x"', ""]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_empty_lines_are_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"l.{suffix}"
    path.write_text("\n\nurl,caption\n\nu1,x\n\n".replace(",", "," if suffix == "csv" else "\t"))
    listed = download._open_list(config(tmp_path, web={"urls": str(path)}))
    assert listed.table.to_pylist() == [{"url": "u1", "caption": "x"}]


def test_line_breaks_in_urls_are_told(fake: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(fake / "urls.csv", [("http://h/a\nhttp://h/b", "x"), ("http://h/good.png", "y\nz")])
    run(config(fake))
    assert "1 of column 'url' hold a line break" in caplog.text


def test_limit_and_a_list_that_changed(tmp_path: Path) -> None:
    write_csv(tmp_path / "urls.csv", [("http://h/a", "x")] * 9)
    assert list_shards(config(tmp_path)) == ["web-00000", "web-00001", "web-00002"]
    assert list_shards(config(tmp_path, web={"limit": 5})) == ["web-00000", "web-00001"]
    write_csv(tmp_path / "urls.csv", [("http://h/a", "x")] * 3)
    assert list_shards(config(tmp_path)) == ["web-00000"]


def test_hostile_pictures_are_reasons(fake: Path) -> None:
    png = encoded((32, 32))
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    checksum = struct.pack(">I", zlib.crc32(header))
    (fake / "web/bomb.png").write_bytes(png[:12] + header + checksum + png[33:])
    (fake / "web/svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (fake / "web/zeros.png").write_bytes(bytes(5000))
    (fake / "web/head.png").write_bytes(png[:20])
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PPM")
    (fake / "web/other.png").write_bytes(buffer.getvalue())
    names = ["bomb.png", "svg.png", "zeros.png", "head.png", "other.png"]
    write_csv(fake / "urls.csv", [(f"http://h/{name}", name) for name in names])
    settings = config(fake, shard_size=10)
    run(settings)
    got = table(settings)
    assert [row["reason"] for row in got] == ["image_too_large"] + ["image_unreadable"] * 4
    assert got[0]["original_width"] == 60_000 and got[0]["image"] is None
    assert all(row["error_message"] and " at 0x" not in row["error_message"] for row in got)

"""The review page over HTTP, from a real server: what it answers, and whom it refuses."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from fabricated import HOSTILE, add_embeddings, calibrate, jpeg, make_run

from capfilt import config
from capfilt.errors import InputError, UsageError
from capfilt.inspect import app
from capfilt.inspect.labels import read_labels
from capfilt.inspect.search import Embedder

EXTRA = 'NOT tested: pip install "capfilt[inspect]"'
pytest.importorskip("duckdb", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)
uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)

PAIR = "web-00000-00003/text0"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    port: int
    page: Any

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, **params: str
    ) -> Answer:
        """Sends exactly this path; a body makes it a POST with our own page's headers."""
        sent = {"host": f"127.0.0.1:{self.port}"}
        if body is not None:
            sent |= {"x-capfilt": "1", "content-type": "application/json"}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent |= headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            query = f"?{urlencode(params)}" if params else ""
            connection.putrequest("GET" if body is None else "POST", path + query, skip_host=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, received, response.read())
        finally:
            connection.close()


def start(page: app.Page, access: app.Access | None = None) -> tuple[Server, Any]:
    listener = socket.create_server(("127.0.0.1", 0))
    served = app.create_app(page, access or app.Access())
    server = uvicorn.Server(uvicorn.Config(served, log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    return Server(listener.getsockname()[1], page), server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    page = app.open_page(str(make_run(tmp_path / "run")), reviewer="ann")
    started, process = start(page)
    yield started
    process.should_exit = True
    page.run.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For tests that write nothing."""
    folder = make_run(tmp_path_factory.mktemp("app") / "run")
    add_embeddings(folder)
    embedder = Embedder(lambda text: np.eye(8)[len(text) % 8], lambda data: np.eye(8)[0])
    page = app.open_page(str(folder), reviewer="ann", read_only=True, embedder=embedder)
    started, process = start(page)
    yield started
    process.should_exit = True
    page.run.close()


def test_the_page_and_its_parts_come_with_the_guarding_headers(shared: Server) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.css", "text/css"),
        ("/app.js", "text/javascript"),
    ):
        answer = shared.ask(path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
    for path in ("/", "/api/summary", "/nothing", "/api/pairs?limit=x"):
        headers = shared.ask(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"


def test_the_page_needs_nothing_from_elsewhere(shared: Server) -> None:
    page = shared.ask("/").body.decode()
    for path in app.STATIC:
        text = shared.ask(path).body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    # what a strict CSP would refuse
    assert "<style" not in page and " style=" not in page and " onclick=" not in page
    assert page.count("<script") == page.count('<script src="/app.js"')
    script = shared.ask("/app.js").body.decode()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script


def test_pairs_come_with_everything_a_card_shows(shared: Server) -> None:
    answer = shared.ask("/api/pairs", keep="no", order="itm", limit="5").json
    assert len(answer["pairs"]) == 5 and answer["next"]
    assert {pair["keep"] for pair in answer["pairs"]} == {False}
    after = shared.ask("/api/pairs", keep="no", order="itm", limit="5", after=answer["next"]).json
    assert after["pairs"][0]["itm"] > answer["pairs"][-1]["itm"]
    assert after["previous"]


def test_hostile_texts_are_data(shared: Server) -> None:
    for row, text in enumerate(HOSTILE):
        answer = shared.ask(f"/api/pair/web-00000-{row:05d}/text0")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json["caption"] == text


def test_a_pair_has_its_provenance(shared: Server) -> None:
    found = shared.ask(f"/api/pair/{PAIR}").json
    assert set(found["manifests"]) == {"images", "scores", "decisions"}
    assert len(found["manifests"]["scores"]["fingerprint"]) == 64
    assert len(found["image"]["sha256"]) == 64 and found["image"]["url"]
    assert shared.ask("/api/pair/web-00000-00003/text9").status == 404


def test_pictures_are_served_anew(shared: Server) -> None:
    answer = shared.ask("/api/image/web-00000-00003")
    assert answer.status == 200 and answer.headers["content-type"] == "image/jpeg"
    assert answer.body.startswith(b"\xff\xd8")
    assert shared.ask("/api/image/web-00000-00005").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../capfilt/errors.py",
        "/..%2f..%2fetc%2fpasswd",
        "/static/app.js",
        "/app.py",
        "/api/image/../../../../etc/passwd",
        "/api/image/%2Fetc%2Fpasswd",
        "/api/image/..%2F..%2Fscores%2Fweb-00000.parquet",
        "/api/image/web-00000-00003%00.jpg",
        "/api/image/" + quote("' OR 1=1 --"),
        "/api/pair/" + quote("x' UNION SELECT * FROM read_text('/etc/passwd') --"),
        "/api/pair/file:///etc/passwd",
        "//etc/passwd",
    ],
)
def test_no_path_reaches_the_file_system(shared: Server, path: str) -> None:
    answer = shared.ask(path)
    assert answer.status == 404
    assert b"root:" not in answer.body and b"class CapfiltError" not in answer.body


def test_wrong_parameters_are_explained(shared: Server) -> None:
    for params in ({"order": "x"}, {"itm_min": "x"}, {"t_itm": "2"}, {"limit": "0"}):
        path = "/api/threshold" if "t_itm" in params else "/api/pairs"
        answer = shared.ask(path, **params)
        assert answer.status == 400 and answer.json["error"]
    assert "filter.itm_threshold" in shared.ask("/api/threshold", t_itm="2").json["error"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "192.168.1.7",
        "",
        "[::1",
        "a b",
    ],
)
def test_a_foreign_host_name_is_refused(shared: Server, host: str) -> None:
    answer = shared.ask("/api/summary", headers={"host": host})
    assert answer.status in (400, 421)
    assert b"pairs" not in answer.body


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:9", "[::1]:8765"])
def test_this_machine_s_names_are_served(shared: Server, host: str) -> None:
    assert shared.ask("/api/summary", headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"x-capfilt": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_can_write_nothing(server: Server, headers: dict[str, str]) -> None:
    body = {"pair_id": PAIR, "verdict": "right"}
    for path in ("/api/labels", "/api/labels/import", "/api/decision", "/api/search/picture"):
        assert server.ask(path, body, headers).status == 403
    assert (
        server.ask("/api/labels", body, {"origin": f"http://127.0.0.1:{server.port}"}).status == 200
    )
    assert len(read_labels(server.page.run.run.at("labels"))) == 1


def test_read_only_writes_nothing(shared: Server) -> None:
    folder = Path(shared.page.run.run.path)
    before = sorted(folder.rglob("*"))
    for path in ("/api/labels", "/api/labels/import", "/api/decision"):
        answer = shared.ask(path, {"pair_id": PAIR, "verdict": "right", "name": "x"})
        assert answer.status == 403 and "read-only" in answer.json["error"]
    assert shared.ask("/api/summary").json["read_only"]
    assert sorted(folder.rglob("*")) == before


def test_a_verdict_is_stored_with_what_the_reviewer_saw(server: Server) -> None:
    answer = server.ask(
        "/api/labels", {"pair_id": PAIR, "verdict": "wrong", "sampling": "random"}
    ).json
    assert answer["verdict"] == "wrong" and answer["labels"]["pairs"] == 1
    (label,) = read_labels(server.page.run.run.at("labels"))
    pair = server.ask(f"/api/pair/{PAIR}").json
    assert (label.pair_id, label.uid, label.itm_prob) == (PAIR, pair["uid"], pair["itm"])
    assert (label.reviewer, label.matcher, label.sampling) == ("ann", "f" * 64, "random")
    assert pair["verdict"] == "wrong" and len(pair["labels"]) == 1
    # another reviewer sees it, and has none of their own
    other = server.ask(f"/api/pair/{PAIR}", reviewer="bob").json
    assert other["verdict"] is None
    assert other["others_said"] == [{"reviewer": "ann", "verdict": "wrong"}]
    undone = server.ask("/api/labels", {"undo": True}).json
    assert undone["undone"] == "wrong" and undone["verdict"] is None
    assert server.ask("/api/labels", {"undo": True}).json["undone"] is None


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        {"pair_id": PAIR, "verdict": "maybe"},
        {"pair_id": PAIR, "verdict": "right", "sampling": "x"},
        {"pair_id": PAIR, "verdict": "right", "reviewer": "a\nb"},
        {"pair_id": PAIR, "verdict": "right", "reviewer": "x" * 65},
        {"pair_id": "../../x", "verdict": "right"},
        {"pair_id": {"a": 1}, "verdict": ["right"]},
    ],
)
def test_a_bad_verdict_is_refused(server: Server, body: Any) -> None:
    answer = server.ask("/api/labels", body)
    assert answer.status in (400, 404) and answer.json["error"]
    assert not read_labels(server.page.run.run.at("labels"))


def test_a_reviewer_s_name_is_no_path(server: Server) -> None:
    server.ask("/api/labels", {"pair_id": PAIR, "verdict": "right", "reviewer": "../../evil/..\\x"})
    folder = Path(server.page.run.run.at("labels"))
    assert [path.name for path in folder.iterdir()] == ["evil_x.jsonl"]


def test_labels_go_out_and_in_again(server: Server) -> None:
    server.ask("/api/labels", {"pair_id": PAIR, "verdict": "right"})
    exported = server.ask("/api/labels")
    assert "attachment" in exported.headers["content-disposition"]
    lines = exported.body.decode().replace('"ann"', '"zoe"')
    assert server.ask("/api/labels/import", lines.encode()).json["added"] == 1
    assert server.ask("/api/labels/import", lines.encode()).json["present"] == 1
    assert set(server.ask("/api/summary").json["labels"]["reviewers"]) == {"ann", "zoe"}
    assert server.ask("/api/labels/import", b"{}\n").status == 400
    assert server.ask("/api/labels/import", b"\xff").status == 400


def test_a_label_of_a_position_is_shown_and_an_older_one_is_not(server: Server) -> None:
    line = {"pair_id": PAIR, "reviewer": "kim", "verdict": "right", "time": "2025-02-01T00:00:00Z"}

    def take_in(**changes: str) -> dict[str, Any]:
        body = (json.dumps({**line, **changes}) + "\n").encode()
        assert server.ask("/api/labels/import", body).json["added"] == 1
        return server.ask(f"/api/pair/{PAIR}", reviewer="kim").json

    uid = take_in()["uid"]
    assert server.ask("/api/summary").json["labels"]["pairs"] == 1
    assert take_in(verdict="wrong", time="2025-01-01T00:00:00Z")["verdict"] == "right"
    # the same reviewer has one verdict on a pair, whether or not a label names the content
    found = take_in(verdict="unsure", time="2025-03-01T00:00:00Z", uid=uid)
    assert found["verdict"] == "unsure" and len(found["labels"]) == 1
    found = take_in(verdict="wrong", time="2025-01-15T00:00:00Z", uid=uid)
    assert found["verdict"] == "unsure" and len(found["labels"]) == 1
    # but content that is not there is not taken for what is
    assert (
        take_in(verdict="wrong", time="2025-04-01T00:00:00Z", uid="0" * 64)["verdict"] == "unsure"
    )


def test_a_decision_is_saved_as_a_filter_section(server: Server) -> None:
    answer = server.ask(
        "/api/decision", {"name": "../stricter one!", "t_itm": "0.625", "t_itc": "off"}
    ).json
    assert answer["file"] == "filters/stricter-one.yaml"
    path = Path(server.page.run.run.path) / answer["file"]
    import yaml

    saved = yaml.safe_load(path.read_text())
    assert saved == {"filter": {"itm_threshold": 0.625, "itc_threshold": None}}
    # and the command that it names gives the same section
    run_config = path.parent / "run.yaml"
    run_config.write_text("run_dir: x\nhuman: {pairs: a}\nweb: {pairs: b}\n")
    loaded = config.load(run_config, tuple(answer["set"]))
    assert loaded.filter.itm_threshold == 0.625 and loaded.filter.itc_threshold is None
    assert server.ask("/api/decision", {"name": "stricter-one", "t_itm": "0.1"}).status == 409
    assert server.ask("/api/decision", {"name": "...", "t_itm": "0.1"}).status == 400
    assert server.ask("/api/decision", {"name": "x", "t_itm": "7"}).status == 400


def test_a_decision_may_hold_thresholds_of_synthetic_texts(server: Server, tmp_path: Path) -> None:
    tried = {"t_itm": "0.6", "t_synthetic_itm": "0.8", "t_synthetic_itc": "off"}
    answer = server.ask("/api/threshold", **tried).json
    assert answer["thresholds"]["synthetic"] == {"itm": 0.8, "itc": None}
    assert answer["thresholds"]["web"] == {"itm": 0.6, "itc": None}
    saved = server.ask("/api/decision", {"name": "apart", **tried}).json
    run_config = tmp_path / "run.yaml"
    run_config.write_text("run_dir: x\nhuman: {pairs: a}\nweb: {pairs: b}\n")
    assert saved["set"] == answer["set"]
    loaded = config.load(run_config, tuple(saved["set"])).filter
    assert (loaded.itm_threshold, loaded.synthetic_itm_threshold) == (0.6, 0.8)
    assert (loaded.itc_threshold, loaded.synthetic_itc_threshold) == (None, -1.0)


@pytest.mark.parametrize("own", [0.8, 0.5])
def test_a_run_with_thresholds_of_synthetic_texts_can_go_back_to_one(
    tmp_path: Path, own: float
) -> None:
    """Also where they are the web texts' own, 0.5: the config would hold on to them."""
    folder = make_run(tmp_path / "run")
    for path in (folder / "decisions").glob("*.manifest.json"):
        record = json.loads(path.read_text())
        record["config"]["synthetic_itm_threshold"] = own
        path.write_text(json.dumps(record))
    started, process = start(app.open_page(str(folder), reviewer="ann"))
    try:
        assert started.ask("/api/summary").json["thresholds"]["synthetic"]["itm"] == own
        answer = started.ask("/api/threshold", t_itm="0.6", t_synthetic_itm="0.6").json
        assert "filter.synthetic_itm_threshold=null" in answer["set"]
    finally:
        process.should_exit = True


def test_a_decision_replaces_the_rules_of_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    calibrate(folder, rank_by="probability", best_of=1)
    page = app.open_page(str(folder), reviewer="ann")
    started, process = start(page)
    try:
        assert started.ask("/api/threshold").json["as_run"]
        said = started.ask("/api/decision", {"name": "same"})
        assert said.status == 400 and "nothing to save" in said.json["error"]
        answer = started.ask("/api/decision", {"name": "other", "t_itm": "0.6"}).json
        run_config = tmp_path / "run.yaml"
        run_config.write_text(
            "run_dir: x\nhuman: {pairs: a}\nweb: {pairs: b}\n"
            "filter: {calibration: c.json, rank_by: probability, best_of: 1}\n"
        )
        loaded = config.load(run_config, tuple(answer["set"])).filter
        assert (loaded.itm_threshold, loaded.calibration, loaded.best_of) == (0.6, None, None)
    finally:
        process.should_exit = True
        page.run.close()


def test_search_goes_by_id_text_and_picture(shared: Server) -> None:
    assert shared.ask("/api/summary").json["search"]["available"]
    found = shared.ask("/api/pairs", near="web-00000-00004", find="text").json
    assert found["pairs"][0]["pair_id"] == "web-00000-00004/text0"
    assert found["pairs"][0]["similarity"] > 0.9
    assert shared.ask("/api/pairs", near_text="a dog", find="image").json["total"] > 0
    handle = shared.ask("/api/search/picture", jpeg(1)).json
    assert shared.ask("/api/pairs", find="image", **handle).json["total"] > 0
    assert shared.ask("/api/search/picture", b"<svg onload=x>").status == 400
    assert shared.ask("/api/pairs", near_upload="gone").status == 400
    assert shared.ask("/api/pairs", near="nothing").status == 400
    assert shared.ask("/api/pairs", near=PAIR, find="x").status == 400


def test_a_corrected_label_stays_in_the_random_sample(server: Server) -> None:
    shown = server.ask("/api/pairs", order="random", seed="3", source="web", limit="20").json
    for number, pair in enumerate(shown["pairs"]):
        verdict = "right" if number % 2 else "wrong"
        said = {"pair_id": pair["pair_id"], "verdict": verdict, "sampling": "random"}
        assert server.ask("/api/labels", said).status == 200
    before = server.ask("/api/threshold", t_itm="off").json["all"]["precision"]["random"]
    again = server.ask("/api/pairs", review="wrong").json
    assert again["sampling"] == "browse"
    for pair in again["pairs"][:4]:
        said = {"pair_id": pair["pair_id"], "verdict": "right", "sampling": "browse"}
        assert server.ask("/api/labels", said).status == 200
    after = server.ask("/api/threshold", t_itm="off").json["all"]["precision"]["random"]
    judged = before["labels"]
    assert after["labels"] == judged
    kept = [
        pair
        for pair in again["pairs"][:4]
        if pair["reason"] not in ("duplicate", "download_failed")
    ]
    assert after["precision"] == pytest.approx(before["precision"] + len(kept) / judged)
    assert kept


def sign_again(folder: Path, table: str, **changes: Any) -> None:
    for path in (folder / table).glob("*.manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_that_changed_meanwhile_is_said(server: Server) -> None:
    folder = Path(server.page.run.run.path)
    body = {"pair_id": PAIR, "verdict": "right"}
    assert not server.page.run.changed()
    # other decisions: what a label says stays as it is
    config = {"itm_threshold": 0.9, "itc_threshold": None}
    sign_again(folder, "decisions", finished="2030-01-01T00:00:00Z", config=config)
    found = server.ask("/api/summary").json
    assert found["changed"]
    # the thresholds are those of the decisions that were read
    assert found["thresholds"]["web"]["itm"] == 0.5
    assert server.ask("/api/pairs").json["changed"]
    assert server.ask("/api/labels", body).status == 200
    # other scores: a label would be of those that the page still shows
    sign_again(folder, "scores", fingerprint="e" * 64, weights={"matcher": "e" * 64})
    answer = server.ask("/api/labels", body)
    assert answer.status == 409 and "scored anew" in answer.json["error"]
    assert "start it again" in answer.json["error"]
    (label,) = read_labels(folder / "labels")
    assert label.matcher == "f" * 64


def test_a_shard_that_went_meanwhile_is_a_change(server: Server) -> None:
    folder = Path(server.page.run.run.path)
    (folder / "scores/web-00001.manifest.json").unlink()
    assert server.ask("/api/summary").json["changed"]


def test_what_a_search_finds_is_no_random_sample(shared: Server) -> None:
    sample = {"order": "random", "seed": "1", "review": "todo"}
    assert shared.ask("/api/pairs", **sample).json["sampling"] == "random"
    for near in ({"near": "web-00000-00004"}, {"near_text": "a dog"}):
        assert shared.ask("/api/pairs", find="image", **near, **sample).json["sampling"] == "browse"


def test_without_embeddings_the_page_says_why(server: Server) -> None:
    said = server.ask("/api/summary").json["search"]
    assert not said["available"] and "embeddings/" in said["why_not"]
    assert server.ask("/api/pairs", near=PAIR).status == 400


def test_a_body_that_is_too_large_is_cut_off(server: Server) -> None:
    assert server.ask("/api/labels", b" " * (2 << 20)).status == 413


def test_a_token_is_asked_for_and_leaves_the_url(tmp_path: Path) -> None:
    page = app.open_page(str(make_run(tmp_path / "run", shards=1)), reviewer="ann")
    started, process = start(page, app.Access("0.0.0.0", "s3cret-token"))
    try:
        assert started.ask("/api/summary").status == 403
        assert started.ask("/").status == 403
        assert started.ask("/", token="wrong").status == 403
        redirect = started.ask("/", token="s3cret-token", keep="no")
        assert redirect.status == 303 and redirect.headers["location"] == "/?keep=no"
        cookie = redirect.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite" in cookie
        with_cookie = {"cookie": cookie.split(";")[0]}
        assert started.ask("/api/summary", headers=with_cookie).status == 200
        bearer = {"authorization": "Bearer s3cret-token"}
        assert started.ask("/api/summary", headers=bearer).status == 200
        # an address can't be rebound; a foreign name can
        assert started.ask("/api/summary", headers={**bearer, "host": "10.1.2.3"}).status == 200
        assert started.ask("/api/summary", headers={**bearer, "host": "evil.example"}).status == 421
    finally:
        process.should_exit = True
        page.run.close()


@pytest.mark.parametrize("passes_host_on", [True, False])
@pytest.mark.parametrize(
    "origin", ["https://review.example.org", "https://review.example.org:8443"]
)
def test_a_proxy_with_tls_can_stand_before_it(
    tmp_path: Path, origin: str, passes_host_on: bool
) -> None:
    page = app.open_page(str(make_run(tmp_path / "run", shards=1)), reviewer="ann")
    started, process = start(page, app.Access("127.0.0.1", "s3cret-token", origin))
    try:
        host = origin.removeprefix("https://") if passes_host_on else f"127.0.0.1:{started.port}"
        redirect = started.ask("/", headers={"host": host}, token="s3cret-token")
        assert redirect.status == 303 and redirect.headers["location"] == "/"
        cookie = redirect.headers["set-cookie"]
        assert "; Secure" in cookie
        sent = {"host": host, "cookie": cookie.split(";")[0]}
        assert started.ask("/api/summary", headers=sent).status == 200
        body = {"pair_id": PAIR, "verdict": "right"}
        for site, status in (
            (origin, 200),
            ("https://evil.example", 403),
            (origin.replace("https", "http"), 200 if passes_host_on else 403),
            (f"{origin}.evil.example", 403),
        ):
            answer = started.ask("/api/labels", body, {**sent, "origin": site})
            assert answer.status == status, site
        foreign = {**sent, "host": "evil.example"}
        assert started.ask("/api/summary", headers=foreign).status == 421
        assert started.ask("/api/summary", headers={"host": host}).status == 403
    finally:
        process.should_exit = True
        page.run.close()


@pytest.mark.parametrize(
    "origin",
    ["review.example.org", "ftp://a", "https://", "https://a/b", "https://a@b", "https://["],
)
def test_an_origin_is_scheme_and_host(tmp_path: Path, origin: str) -> None:
    folder = str(make_run(tmp_path / "run", shards=1, pictures=2))
    with pytest.raises(UsageError, match="--origin"):
        app.serve(folder, origin=origin, token="s3cret-token", open_browser=False)
    with pytest.raises(UsageError, match="--token"):
        app.serve(folder, origin="https://a.example/", open_browser=False)


def test_odd_input_is_refused_with_the_guarding_headers(server: Server) -> None:
    body = {"pair_id": PAIR, "verdict": "right"}
    line = {**body, "reviewer": "x", "time": "2025-01-01T00:00:00Z"}
    for answer, status in (
        (server.ask("/api/labels", body, {"origin": "http://["}), 403),
        (server.ask("/api/pairs", after="1~" + "9" * 50), 400),
        (server.ask("/api/labels", b"[" * 100_000), 400),
        (server.ask("/api/labels/import", b"[" * 100_000), 400),
        (server.ask("/api/labels/import", {**line, "itm_prob": 10**400}), 400),
    ):
        assert answer.status == status and answer.json["error"]
        assert "content-security-policy" in answer.headers
    assert not read_labels(server.page.run.run.at("labels"))


def test_other_machines_need_a_token(tmp_path: Path) -> None:
    folder = str(make_run(tmp_path / "run", shards=1, pictures=2))
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="--token"):
            app.serve(folder, host=host, open_browser=False)
    with pytest.raises(UsageError, match="at least 8"):
        app.serve(folder, token="short", open_browser=False)


def test_a_taken_port_is_an_error_only_when_it_was_asked_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folder = str(make_run(tmp_path / "run", shards=1, pictures=2))
        with pytest.raises(UsageError, match=str(port)):
            app.serve(folder, port=port, open_browser=False)


def test_serve_says_where_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shards=1)
    script = (
        "import sys\n"
        "from capfilt.inspect.app import serve\n"
        "serve(sys.argv[1], open_browser=False, on_ready=lambda url: print(url, flush=True))\n"
        "print('ended')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    port = int(url.rstrip("/").rpartition(":")[2])
    deadline = time.monotonic() + 10
    while True:
        try:
            status = Server(port, None).ask("/api/summary").status
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert status == 200 and url.startswith("http://127.0.0.1:")
    assert (out, err, process.returncode) == ("ended\n", "", 0)


def test_a_reviewer_must_have_a_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reviewer"):
        app.open_page(str(make_run(tmp_path / "run", shards=1, pictures=2)), reviewer=" ")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("LOCALHOST:1", "localhost"),
        ("[::1]:8", "::1"),
        ("a:b", ""),
        ("a@b", ""),
        ("a/b", ""),
        ("127.0.0.1:123456", ""),
        ("", ""),
    ],
)
def test_host_headers_are_taken_apart(header: str, name: str) -> None:
    assert app.host_name(header) == name

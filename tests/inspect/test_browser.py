"""The review page in a real browser: chromium, driven by Playwright."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import add_embeddings, calibrate, jpeg, make_run
from PIL import Image

from capfilt.inspect import app
from capfilt.inspect.labels import Label, read_labels
from capfilt.inspect.search import Embedder
from capfilt.shards import RunDir, Shard

EXTRA = 'the review page is NOT tested: pip install "capfilt[inspect]"'
pytest.importorskip("duckdb", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)
uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the review page is NOT tested: pip install playwright"
)

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
if CHROMIUM is None:
    pytest.skip(
        "the review page is NOT tested: no chromium (apt-get install chromium, or set CHROMIUM)",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("browser") / "run")
    add_embeddings(made)
    return made


def serve(folder: Path, **options: Any) -> tuple[str, Callable[[], None]]:
    page = app.open_page(str(folder), reviewer="ann", **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.create_app(page), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(10)
        page.run.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}", stop


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    address, stop = serve(folder)
    yield address
    stop()


@pytest.fixture
def tab(browser: Any, url: str, folder: Path) -> Iterator[Any]:
    """A tab in a new profile; fails the test where the page raised or asked another server."""
    shutil.rmtree(folder / "filters", ignore_errors=True)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(8000)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
    opened.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if "Content Security Policy" in message.text or "TrustedHTML" in message.text
            else None
        ),
    )
    opened.on(
        "request",
        lambda request: None if request.url.startswith(url) else problems.append(request.url),
    )
    opened.problems = problems
    yield opened
    context.close()
    assert not problems


def show(tab: Any, address: str) -> None:
    tab.goto(address)
    tab.wait_for_selector(".card", state="attached")
    tab.wait_for_selector(".histogram", state="attached")


def until(tab: Any, expression: str) -> None:
    """Waits for a condition; from here, since the page's policy lets nothing be evaluated in it."""
    deadline = time.monotonic() + 8
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, f"not within 8 s: {expression}"
        tab.wait_for_timeout(20)


def total(tab: Any, number: int) -> None:
    until(tab, f"document.querySelector('#total').textContent === '{number} pairs'")


def names(tab: Any) -> list[str]:
    return tab.eval_on_selector_all(".card", "cards => cards.map((card) => card.dataset.pair)")


def test_a_card_holds_picture_and_texts_side_by_side(tab: Any, url: str) -> None:
    show(tab, f"{url}/?key=web-00000-00004/text0")
    card = tab.locator(".card")
    assert card.count() == 1
    assert card.locator(".focal .caption").inner_text() == "photo 4 of a dog by the lake 0"
    assert card.locator(".other .caption").inner_text() == "a dog number 4 runs"
    assert "ITM 0." in card.inner_text() and "https://example.org" in card.inner_text()
    until(tab, "document.querySelector('.card img').naturalWidth > 0")
    assert tab.title() == "run · capfilt inspect"


def test_texts_with_scripts_stay_texts(tab: Any, url: str) -> None:
    for row in range(4):
        show(tab, f"{url}/?key=web-00000-{row:05d}/text0")
        tab.keyboard.press("j")
        tab.locator(".card .picture").click()
        tab.wait_for_selector("#details-body .facts")
        assert tab.evaluate("window.hacked") is None
        if row == 0:
            assert "<script>window.hacked=1</script>" in tab.inner_text("#details-body")
        if row == 1:  # a javascript: url is text, never a link
            assert tab.locator("a[href^=javascript]").count() == 0
            assert "javascript:alert(1)" in tab.inner_text("#details-body")
        tab.keyboard.press("Escape")
    tab.goto(f"{url}/?words=%3Cscript%3E%22'&shard=%3Cimg%20src=x%20onerror=window.hacked=1%3E")
    total(tab, 0)
    assert tab.evaluate("window.hacked") is None


def test_the_policy_stops_what_slips_through(browser: Any, url: str) -> None:
    tab = browser.new_page()
    tab.goto(url)
    tab.wait_for_selector(".card")
    blocked = tab.evaluate(
        """async () => {
            const script = document.createElement("script");
            try { script.text = "window.hacked = 1"; } catch (error) { return error.name; }
            document.body.append(script);
            await new Promise((done) => setTimeout(done, 50));
            return window.hacked === undefined;
        }"""
    )
    assert blocked in (True, "TypeError")
    markup = "() => { document.body.innerHTML = '<img src=x onerror=window.hacked=1>'; }"
    with pytest.raises(sync_api.Error, match="TrustedHTML"):
        tab.evaluate(markup)
    tab.close()


def test_the_keyboard_is_enough_to_review(tab: Any, url: str, folder: Path) -> None:
    show(tab, f"{url}/?order=random&seed=4&source=web")
    assert "random sample" in tab.inner_text("#sampling")
    first, second, third = names(tab)[:3]
    for key in ("y", "n", "u"):
        tab.keyboard.press(key)
    until(tab, "document.querySelector('#label-counts').textContent.startsWith('3 by me')")
    stored = {label.pair_id: label for label in read_labels(folder / "labels")}
    assert stored[first].verdict == "right"
    assert stored[second].verdict == "wrong"
    assert stored[third].verdict == "unsure"
    assert {label.sampling for label in stored.values()} == {"random"}
    assert tab.evaluate("document.activeElement.dataset.pair") == names(tab)[3]
    tab.wait_for_timeout(300)
    assert "random label" in tab.inner_text("#precision-text") or "no labels" in tab.inner_text(
        "#precision-text"
    )
    tab.keyboard.press("z")
    until(tab, "document.querySelector('#label-counts').textContent.startsWith('2 by me')")
    assert tab.evaluate("document.activeElement.dataset.pair") == third
    assert third not in {label.pair_id for label in read_labels(folder / "labels")}
    tab.keyboard.press("k")
    assert tab.evaluate("document.activeElement.dataset.pair") == second
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.pair") == names(tab)[4]
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#details[open] .facts")
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.dataset.pair") == names(tab)[4]
    tab.keyboard.press("?")
    assert tab.locator("#help").is_visible()
    tab.keyboard.press("Escape")
    # typing into a field is typing
    tab.keyboard.press("/")
    tab.keyboard.type("jyn")
    assert tab.evaluate("document.activeElement.value") == "jyn"
    tab.keyboard.press("Escape")
    for _ in range(2):
        tab.keyboard.press("z")
    until(tab, "document.querySelector('#label-counts').textContent.startsWith('0 by me')")
    tab.wait_for_timeout(300)
    assert not read_labels(folder / "labels")


def test_next_goes_on_over_the_page_and_back(tab: Any, url: str) -> None:
    show(tab, url)
    first = names(tab)
    for _ in range(len(first)):
        tab.keyboard.press("j")
    until(tab, f"document.querySelector('.card')?.dataset.pair !== '{first[0]}'")
    assert "after=" in tab.url
    second = names(tab)
    assert not set(first) & set(second)
    tab.reload()
    tab.wait_for_selector(".card")
    assert names(tab) == second
    tab.keyboard.press("k")
    until(tab, f"document.querySelector('.card')?.dataset.pair === '{first[0]}'")
    assert tab.evaluate("document.activeElement.dataset.pair") == first[-1]


def test_going_back_in_a_sample_is_no_dead_end(browser: Any, tmp_path: Path) -> None:
    address, stop = serve(make_run(tmp_path / "run"))
    try:
        tab = browser.new_page()
        show(tab, f"{address}/?order=random&seed=5&review=todo&source=web")
        first = names(tab)
        tab.locator(".card").first.focus()
        for _ in first:
            tab.keyboard.press("y")
            tab.wait_for_timeout(15)
        until(tab, f"document.querySelector('.card')?.dataset.pair !== '{first[0]}'")
        said = f"document.querySelector('#label-counts').textContent.startsWith('{len(first)} by')"
        until(tab, said)
        tab.keyboard.press("k")
        total(tab, 60 - len(first))
        until(tab, "document.querySelectorAll('.card').length > 0")
        assert not set(first) & set(names(tab))
        tab.reload()
        tab.wait_for_selector(".card")
        tab.close()
    finally:
        stop()


def test_a_run_that_changed_meanwhile_is_said(browser: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    address, stop = serve(made)
    try:
        tab = browser.new_page()
        show(tab, address)
        assert tab.locator("#changed").is_hidden()
        calibrate(made)  # signs the decisions anew
        tab.keyboard.press("/")
        tab.keyboard.type("lake")
        tab.wait_for_selector("#changed", state="visible")
        assert "start it again" in tab.inner_text("#changed")
        tab.close()
    finally:
        stop()


def test_details_that_come_late_are_not_shown_under_another_title(tab: Any, url: str) -> None:
    show(tab, f"{url}/?source=web&keep=yes")
    slow, quick = names(tab)[:2]

    def answer(route: Any) -> None:
        if slow in route.request.url:
            tab.wait_for_timeout(600)
        route.continue_()

    tab.route("**/api/pair/**", answer)
    tab.locator(".card").first.focus()
    for key in ("Enter", "Escape", "j", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_selector("#details-body .facts")
    tab.wait_for_timeout(900)
    assert tab.inner_text("#details-title") == quick
    shown = tab.locator("#details-body .facts dd").nth(1).inner_text()
    assert quick.startswith(shown)


def test_a_held_key_and_one_on_a_slider_are_no_verdicts(browser: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    address, stop = serve(made)
    try:
        tab = browser.new_page()
        show(tab, f"{address}/?source=web")
        tab.locator(".card").first.focus()
        for _ in range(8):
            tab.keyboard.down("y")  # the second and later are repeats
        tab.keyboard.up("y")
        until(tab, "document.querySelector('#label-counts').textContent.startsWith('1 by me')")
        assert tab.evaluate("document.activeElement.dataset.pair") == names(tab)[1]
        tab.locator(".plot input").first.focus()
        for key in ("n", "u", "y"):
            tab.keyboard.press(key)
        tab.wait_for_timeout(300)
        assert len(read_labels(made / "labels")) == 1
        # and the counts follow the reviewer's name
        tab.fill("#reviewer", "bob")
        tab.locator("#reviewer").blur()
        until(tab, "document.querySelector('#label-counts').textContent.startsWith('0 by me')")
        tab.fill("#reviewer", "ann")
        tab.locator("#reviewer").blur()
        until(tab, "document.querySelector('#label-counts').textContent.startsWith('1 by me')")
        tab.close()
    finally:
        stop()


def test_filters_combine_and_live_in_the_url(tab: Any, url: str) -> None:
    show(tab, url)
    total(tab, 114)
    tab.select_option("[name=keep]", "no")
    tab.select_option("[name=source]", "web")
    tab.fill("[name=words]", "Lake")
    until(tab, "location.search.includes('words=Lake')")
    assert "keep=no" in tab.url and "source=web" in tab.url
    until(tab, "document.querySelector('#total').textContent !== '114 pairs'")
    tab.wait_for_timeout(300)
    shown = tab.inner_text("#total")
    found = names(tab)
    tab.goto(tab.url)
    tab.wait_for_selector(".card")
    assert (tab.inner_text("#total"), names(tab)) == (shown, found)
    assert tab.input_value("[name=words]") == "Lake"
    assert tab.input_value("[name=keep]") == "no"
    tab.click("#clear")
    total(tab, 114)
    assert "keep" not in tab.url
    tab.fill("[name=key]", "nothing")
    total(tab, 0)
    assert "No pair fits" in tab.inner_text("#grid")


def test_the_threshold_can_be_dragged_and_saved(tab: Any, url: str, folder: Path) -> None:
    show(tab, url)
    until(tab, "document.querySelector('#threshold-text').textContent.includes('0 leave')")
    slider = tab.locator(".plot input").first
    box = slider.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 40, steps=6)
    tab.mouse.up()
    until(tab, "!document.querySelector('#threshold-text').textContent.includes(' 0 leave')")
    dragged = float(slider.input_value())
    assert 0.75 < dragged < 0.85 and f"t_itm={dragged:.3f}" in tab.url
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert float(slider.input_value()) == pytest.approx(dragged + 0.005)
    # both histograms show the one threshold
    assert tab.locator(".plot input").nth(1).input_value() == slider.input_value()
    tab.wait_for_timeout(200)
    leave = int(tab.inner_text("#threshold-text").split(" leave")[0].split()[-1])
    tab.click("#show-leaves")
    total(tab, leave)
    tab.fill("#save-name", "stricter")
    tab.click("#save button")
    until(tab, "document.querySelector('#saved').textContent.includes('capfilt filter')")
    assert f"itm_threshold: {dragged + 0.005:.3f}" in (folder / "filters/stricter.yaml").read_text()
    tab.click("#threshold-reset")
    until(tab, "!location.search.includes('t_itm')")


def test_each_source_can_have_its_own_threshold(tab: Any, url: str, folder: Path) -> None:
    show(tab, url)
    web, synthetic = tab.locator(".plot input").first, tab.locator(".plot input").nth(1)
    assert tab.is_checked("#together") and web.input_value() == synthetic.input_value() == "0.5"
    tab.uncheck("#together")
    synthetic.focus()
    for _ in range(4):
        tab.keyboard.press("ArrowRight")
    assert (web.input_value(), synthetic.input_value()) == ("0.5", "0.52")
    web.focus()
    tab.keyboard.press("ArrowLeft")
    assert (web.input_value(), synthetic.input_value()) == ("0.495", "0.52")
    line = "document.querySelector('#threshold-line').textContent"
    said = f"{line} === 'web: ITM 0.495, ITC off; synthetic: ITM 0.520, ITC off'"
    until(tab, said)
    # the URL holds it
    tab.goto(tab.url)
    until(tab, said)
    assert not tab.is_checked("#together") and synthetic.input_value() == "0.52"
    tab.fill("#save-name", "apart")
    tab.click("#save button")
    until(tab, "document.querySelector('#saved').textContent.includes('capfilt filter')")
    assert "synthetic_itm_threshold: 0.52" in (folder / "filters/apart.yaml").read_text()
    # together again: the web texts' for both
    tab.check("#together")
    until(tab, f"{line} === 'ITM 0.495, ITC off'")
    assert (web.input_value(), synthetic.input_value()) == ("0.495", "0.495")
    assert "synthetic" not in tab.url


def test_the_rules_of_a_calibrated_run_are_said(browser: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    calibrate(made)
    address, stop = serve(made)
    try:
        tab = browser.new_page()
        show(tab, address)
        until(tab, "document.querySelector('#rules-text').textContent.includes('95.0 %')")
        assert tab.inner_text("#threshold-line") == "as the run decided"
        assert "0 join, 0 leave" in tab.inner_text("#threshold-text")
        assert tab.locator("#save button").is_disabled()
        tab.locator(".plot input").first.focus()
        tab.keyboard.press("End")
        until(tab, "document.querySelector('#threshold-line').textContent.startsWith('ITM 1.000')")
        assert tab.locator("#save button").is_enabled()
        tab.close()
    finally:
        stop()


def test_search_by_words_and_by_an_own_picture(browser: Any, folder: Path) -> None:
    embedder = Embedder(lambda text: np.eye(8)[len(text) % 8], lambda data: np.eye(8)[0])
    address, stop = serve(folder, embedder=embedder)
    try:
        tab = browser.new_page()
        show(tab, address)
        tab.locator("#search-box summary").click()
        tab.fill("#near-text", "a dog by the lake")
        tab.click("#search button[type=submit]")
        until(tab, "document.querySelector('.card .meta').textContent.includes('similarity')")
        assert "near_text=a+dog" in tab.url
        file = {"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": jpeg(3)}
        tab.set_input_files("#near-picture", file)
        tab.select_option("#find", "text")
        tab.click("#search button[type=submit]")
        until(tab, "location.search.includes('near_upload=')")
        until(tab, "document.querySelector('.card .meta').textContent.includes('similarity')")
        tab.click("#search-clear")
        total(tab, 114)
        tab.close()
    finally:
        stop()


def test_labels_are_imported_and_other_reviewers_shown(browser: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    rows = Shard(RunDir(str(made)), "web-00001").read("scores").to_pylist()
    row = next(row for row in rows if row["pair_id"] == "web-00001-00003/text0")
    label = Label(row["pair_id"], row["uid"], "wrong", "zoe", "2025-01-31T12:00:00Z")
    data = (label.line() + "\n").encode()
    address, stop = serve(made)
    try:
        tab = browser.new_page()
        show(tab, f"{address}/?key={row['pair_id']}")
        file = {"name": "l.jsonl", "mimeType": "text/plain", "buffer": data}
        tab.set_input_files("#import", file)
        until(tab, "document.querySelector('.said')?.textContent === 'zoe: wrong'")
        assert "1 other reviewer" in tab.inner_text("#label-counts")
        with tab.expect_download() as downloaded:
            tab.get_by_role("link", name="Export labels").click()
        assert Path(downloaded.value.path()).read_bytes() == data
        tab.close()
    finally:
        stop()


def test_labels_of_another_matcher_are_said_to_be_left_out(browser: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    rows = Shard(RunDir(str(made)), "web-00001").read("scores").to_pylist()
    said = {"verdict": "right", "time": "2025-01-31T12:00:00Z", "sampling": "random"}
    lines = [
        Label(row["pair_id"], row["uid"], reviewer="zoe", matcher="0" * 64, **said).line() + "\n"
        for row in rows[:6]
    ]
    address, stop = serve(made)
    try:
        tab = browser.new_page()
        show(tab, address)
        data = "".join(lines).encode()
        file = {"name": "l.jsonl", "mimeType": "text/plain", "buffer": data}
        tab.set_input_files("#import", file)
        told = "Left out are the labels on 6 pairs that were given with another matcher."
        until(tab, f"document.querySelector('#precision-text').textContent.endsWith('{told}')")
        assert "no labels yet" in tab.inner_text("#precision-text")
        tab.close()
    finally:
        stop()


def test_search_by_a_pair_of_the_run(tab: Any, url: str) -> None:
    show(tab, f"{url}/?key=web-00000-00004/text0")
    tab.locator(".card .picture").click()
    tab.get_by_role("button", name="Texts for this picture").click()
    until(tab, "document.querySelectorAll('.card').length === 1")
    tab.click("#clear")
    until(tab, "document.querySelectorAll('.card').length > 1")
    assert names(tab)[0] == "web-00000-00004/text0"
    assert "similarity" in tab.locator(".card").first.inner_text()
    assert tab.locator("#near-text").is_hidden()  # no matcher is loaded
    tab.locator("#search-box summary").click() if not tab.locator("#near").is_visible() else None
    tab.click("#search-clear")
    total(tab, 114)


def test_a_sample_ends_the_search(tab: Any, url: str) -> None:
    show(tab, f"{url}/?near=web-00000-00004&find=image")
    assert tab.input_value("#near") == "web-00000-00004" and tab.inner_text("#sampling") == ""
    tab.click("[data-sample=random]")
    total(tab, 114)
    assert "random sample" in tab.inner_text("#sampling")
    assert "near" not in tab.url and tab.input_value("#near") == ""


def test_a_sample_of_high_scores_has_a_seed_of_its_own_and_names_its_labels(
    tab: Any, url: str, folder: Path
) -> None:
    show(tab, f"{url}/?source=web")
    tab.click("[data-sample=high]")
    until(tab, "document.querySelector('#sampling').textContent.includes('high scores')")
    assert (
        "order=high" in tab.url and "seed=" in tab.url and tab.locator("#seed-field").is_visible()
    )
    picked = names(tab)[0]
    tab.keyboard.press("y")
    until(tab, "document.querySelector('#label-counts').textContent.startsWith('1 by me')")
    last = [label for label in read_labels(folder / "labels") if label.pair_id == picked][-1]
    assert (last.verdict, last.sampling) == ("right", "high")
    tab.keyboard.press("z")
    until(tab, "!document.querySelector('#label-counts').textContent.startsWith('1 by me')")


def test_a_phone_needs_no_sideways_scrolling(browser: Any, url: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
    tab = context.new_page()
    show(tab, url)
    for box in ("#filters-box", "#sampling-box", "#search-box", "#threshold-box"):
        tab.evaluate("(box) => { document.querySelector(box).open = true; }", box)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    sticking_out = tab.evaluate(
        """() => [...document.querySelectorAll("main *, aside *")].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.width > 1 && box.right > innerWidth + 1 && !element.closest(".meta, .picture");
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []
    sizes = tab.eval_on_selector_all(
        ".foot button", "buttons => buttons.map((button) => button.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 44
    context.close()


def test_scrolling_past_a_histogram_moves_no_threshold(browser: Any, url: str) -> None:
    size = {"width": 390, "height": 844}
    context = browser.new_context(viewport=size, is_mobile=True, has_touch=True)
    tab = context.new_page()
    show(tab, url)
    tab.click("#threshold-box summary")
    tab.evaluate("document.querySelector('#threshold-box').scrollIntoView()")
    tab.wait_for_timeout(200)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    slider, touch = tab.locator(".plot input").first, context.new_cdp_session(tab)

    def swipe(x: float, dx: float, dy: float) -> None:
        box = slider.bounding_box()
        x, y = box["x"] + x * box["width"], box["y"] + box["height"] / 2

        def send(kind: str, *points: dict[str, float]) -> None:
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

        send("touchStart", {"x": x, "y": y})
        for step in range(1, 14):
            send("touchMove", {"x": x + dx * step, "y": y + dy * step})
            tab.wait_for_timeout(16)
        send("touchEnd")
        tab.wait_for_timeout(500)

    top = tab.evaluate("scrollY")
    swipe(0.25, 0, -12)
    assert tab.evaluate("scrollY") > top and slider.input_value() == "0.5"
    assert "t_itm" not in tab.url
    tab.evaluate("document.querySelector('#threshold-box').scrollIntoView()")
    swipe(0.5, 5, 0)
    assert 0.55 < float(slider.input_value()) < 0.8 and "t_itm" in tab.url
    context.close()


def test_light_and_dark_are_readable(browser: Any, url: str) -> None:
    contrast = """() => {
        const parse = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const light = (colour) => {
            const [r, g, b] = parse(colour).map((part) => {
                const value = part / 255;
                return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const colour = getComputedStyle(at).backgroundColor;
                if (!/, 0\\)$/.test(colour)) return colour;
            }
            return "rgb(255, 255, 255)";
        };
        const low = [];
        for (const element of document.querySelectorAll("body *")) {
            const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            if (!text || element.disabled || !element.checkVisibility()) continue;
            const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < 4.5) low.push([element.className || element.tagName, ratio.toFixed(2)]);
        }
        return low;
    }"""
    backgrounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        tab = context.new_page()
        show(tab, url)
        backgrounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert tab.evaluate(contrast) == []
        context.close()
    assert backgrounds["light"] != backgrounds["dark"]


def test_a_screen_reader_finds_names_for_everything(tab: Any, url: str) -> None:
    show(tab, url)
    nameless = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, dialog, nav, [role]")]
            .filter((element) => element.checkVisibility() && !(element.getAttribute("aria-label")
                || element.labels?.length || element.textContent.trim() || element.title
                || element.getAttribute("aria-labelledby") || element.role === "status"))
            .map((element) => element.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
    assert tab.locator("img:not([alt])").count() == 0
    assert tab.locator(".card[tabindex='0']").count() == 1  # one stop for all cards
    pressed = tab.locator(".card").first.get_by_role("button", name="Right", exact=True)
    assert pressed.get_attribute("aria-pressed") == "false"
    assert tab.locator(".plot input").first.get_attribute("aria-valuetext") == "0.500"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"


def test_read_only_offers_no_verdicts(browser: Any, folder: Path) -> None:
    address, stop = serve(folder, read_only=True)
    try:
        tab = browser.new_page()
        show(tab, address)
        assert tab.locator("[data-verdict]").count() == 0
        assert tab.locator("#read-only").is_visible()
        assert tab.locator("#save").is_hidden()
        tab.keyboard.press("y")
        tab.close()
    finally:
        stop()


def test_the_picture_of_the_readme_can_be_taken(tmp_path: Path) -> None:
    """In a process of its own: two Playwrights don't fit into one."""
    script = Path(__file__).resolve().parents[2] / "benchmarks/inspect_picture.py"
    out = tmp_path / "inspect.png"
    words = [sys.executable, str(script), "--out", str(out)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    with Image.open(out) as taken, Image.open(script.parents[1] / ".github/inspect.png") as shown:
        assert taken.size == shown.size
        assert len(set(taken.convert("RGB").resize((64, 64)).getdata())) > 100


def test_a_dead_server_is_said(browser: Any, folder: Path) -> None:
    address, stop = serve(folder)
    tab = browser.new_page()
    show(tab, f"{address}/?key=web-00001")
    stop()
    time.sleep(0.2)
    tab.select_option("[name=keep]", "yes")
    until(tab, "document.querySelector('#problem').textContent.includes('does not answer')")
    tab.close()

"""The page in a browser, before the real service: every step of a visitor, by mouse, by keyboard, on a phone."""

import base64
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lucid_tools import TINY, off_start
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.data.decoding import read_image
from lucidetr.deployment.detector import load
from lucidetr.deployment.page.look import look_json, point_json
from lucidetr.training.checkpoint import save_model

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<img src=x onerror=alert(1)>"
SAMPLES = "generated:digits?size=64&digit=14-24&objects=1-3&train=1&val=3"
ROWS = ["proposals", "layer 1", "layer 2", "layer 3"]
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder with a model that finds something everywhere, for its weights are random."""
    folder = tmp_path_factory.mktemp("page") / "run"
    folder.mkdir()
    config = replace(TINY, queries="selected", boxes="refined_twice", num_queries=8)
    model = off_start(config)
    categories = Categories(ids=(3, 7, 11), names=(HOSTILE, f"dog {HOSTILE}", f"owl {HOSTILE}"))
    card = ModelCard(model=config, images=ImageConfig(size=64, max_size=96), categories=categories, recipe="tiny")
    save_model(folder / "best.safetensors", model.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def address(run):
    command = [sys.executable, "-m", "lucidetr", "serve", str(run), "--port", "0", "--device", "cpu", "--data", SAMPLES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as server:
        said = re.search(rb"http://\S+", server.stdout.readline())
        assert said, "the service did not start"
        yield said[0].decode()
        server.terminate()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Return what opens the page in a window; afterwards nothing may have gone wrong in it but what was announced."""
    windows, wrong, expected = [], [], []

    def open_page(width=1280, height=900, refusals=(), **options):
        window = browser.new_context(viewport={"width": width, "height": height}, **options)
        windows.append(window)
        expected.extend(refusals)
        page = window.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_function("() => document.getElementById('model').textContent.includes('tiny')")
        page.wait_for_selector("#samples img")
        return page

    yield open_page
    for window in windows:
        window.close()
    assert [text for text in wrong if not any(f"status of {each}" in text for each in expected)] == []


def file_of(folder, name="one.png", seed=0, width=150, height=100):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(folder / name)
    return folder / name


def upload(page, file):
    page.set_input_files("#file", file)
    page.wait_for_selector("#work:not([hidden])")


def threshold(page, value):
    """Set the least score as a hand does."""
    page.eval_on_selector(
        "#threshold", "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", str(value)
    )


def drawn(page):
    return page.eval_on_selector("#picture", "canvas => canvas.toDataURL()")


def scores(page):
    return [float(text) for text in page.locator("#found .number").all_inner_texts()]


def until(page, happened):
    """Let the browser go on until something has happened, ten seconds at most."""
    for _ in range(500):
        if happened:
            return
        page.wait_for_timeout(20)
    raise AssertionError("it never happened")


def wait_for(page, text):
    page.wait_for_function("text => document.body.innerText.includes(text)", arg=text)


def test_boxes_follow_the_least_score_without_asking_again(visit, run, tmp_path):
    page, asked = visit(), []
    page.on("request", lambda request: asked.append(request.url))
    file = file_of(tmp_path)
    upload(page, file)
    threshold(page, 0)
    found = load(run, "cpu").predict(file)
    assert scores(page) == [pytest.approx(score, abs=0.006) for score in found.scores.tolist()]
    assert len(found) == 8
    all_boxes, middle = drawn(page), sorted(scores(page))[4]
    threshold(page, middle)
    assert 0 < len(scores(page)) < 8
    assert all(score >= middle - 0.006 for score in scores(page))
    assert drawn(page) != all_boxes
    threshold(page, 1)
    assert scores(page) == []
    assert "No objects in one.png with a score of 1.00 or more" in page.inner_text("#status")
    assert len([url for url in asked if "/predict" in url]) == 1
    assert not [url for url in asked if "/look" in url]


def test_a_box_is_shown_to_be_found_layer_by_layer(visit, run, tmp_path):
    page, file = visit(), file_of(tmp_path)
    upload(page, file)
    threshold(page, 0)
    boxes = drawn(page)
    page.locator("#found button").first.click()
    page.wait_for_selector("#scores tr")
    best = look_json(load(run, "cpu"), read_image(file))["queries"][0]
    assert page.locator("#scores th").all_inner_texts() == ROWS
    assert page.locator("#scores td:last-child").all_inner_texts() == [f"{score:.2f}" for score in best["scores"]]
    assert f"Query {best['query']} of 8 made this box" in page.inner_text("#query")
    assert page.inner_text("#row-said") == "layer 3"
    largest = 100 * np.mean([decoded(heat) for heat in best["attention"][2]], axis=0).max()
    assert f"{largest:.1f} % of the attention" in page.inner_text("#says")
    views = [boxes, drawn(page)]
    for head in ("0", "1", "none"):
        page.select_option("#head", head)
        views.append(drawn(page))
    page.select_option("#head", "mean")
    assert drawn(page) == views[1]
    for row in "210":
        page.locator("#row").press("ArrowLeft")
        assert page.inner_text("#row-said") == ROWS[int(row)]
        views.append(drawn(page))
    assert len(set(views)) == len(views)
    assert "has not looked yet" in page.inner_text("#says")
    page.wait_for_selector("#usual:not([hidden])")
    assert page.inner_text("#seen") == "3"


def test_a_box_is_never_explained_by_another_query_that_lies_there(visit, run, tmp_path):
    page, file = visit(), file_of(tmp_path)
    said = look_json(load(run, "cpu"), read_image(file))
    absent = f"Its query is not among the {len(said['queries'])} best"

    def other(query):
        scores = {key: score + 1 for key, score in query["scores_by_category"].items()}
        return query | {"query": query["query"] + 100, "scores_by_category": scores}

    others = [other(query) for query in said["queries"]]
    page.route("**/look", lambda route: route.fulfill(json=said | {"queries": others}))
    upload(page, file)
    threshold(page, 0)
    page.locator("#found button").first.click()
    wait_for(page, absent)
    assert page.locator("#how").is_hidden()
    page.unroute("**/look")
    page.route("**/look", lambda route: route.fulfill(json=said | {"queries": [*others, *said["queries"]]}))
    page.set_input_files("#file", file_of(tmp_path, "again.png"))
    wait_for(page, "in again.png")
    threshold(page, 0)
    explained = 0
    for place in range(8):  # some of them the second class of a query, some of a query too weak to be looked into
        page.locator("#found button").nth(place).click()
        page.wait_for_function("() => !document.getElementById('says').textContent.startsWith('Looking')")
        if page.locator("#how").is_visible():
            assert re.match(r"Query [0-7] of 8 made this box", page.inner_text("#query"))
            explained += 1
    assert explained >= len(said["queries"])


def test_a_page_opened_while_the_model_is_loaded_waits_for_it(browser, address, tmp_path):
    page, tries = browser.new_page(), []

    def busy_for_long(route):
        tries.append(1)
        refusal = {"status": 503, "headers": {"Retry-After": "0.1"}, "json": {"error": "the model is being loaded"}}
        route.fulfill(**refusal) if len(tries) <= 12 else route.continue_()

    page.route("**/model", busy_for_long)
    page.goto(address)
    page.set_input_files("#file", file_of(tmp_path))
    wait_for(page, "The model is being loaded")
    page.wait_for_selector("#work:not([hidden])")
    assert len(tries) == 13
    assert page.inner_text("#model").startswith("run: tiny")
    assert page.locator("#error").is_hidden()
    page.close()


def decoded(heat):
    return np.frombuffer(base64.b64decode(heat["cells"]), np.uint8) * (heat["largest"] / 255)


def test_playing_goes_from_the_first_to_the_last_layer(visit, tmp_path):
    page = visit()
    upload(page, file_of(tmp_path))
    page.click("label[for=view-layers]")
    page.wait_for_selector("#scores tr")
    page.click("#play")
    assert page.inner_text("#row-said") == "proposals"
    assert page.inner_text("#play") == "Stop"
    page.wait_for_function("() => document.getElementById('play').textContent === 'Play'")
    assert page.inner_text("#row-said") == "layer 3"


def test_a_new_picture_stops_what_plays(visit, tmp_path):
    page, held = visit(), []
    upload(page, file_of(tmp_path))
    page.click("label[for=view-layers]")
    page.wait_for_selector("#scores tr")
    page.route("**/predict*", lambda route: held.append(route))
    page.click("#play")
    page.set_input_files("#file", file_of(tmp_path, "next.png", seed=1))
    until(page, held)
    page.wait_for_timeout(1000)  # longer than a layer is shown
    held[0].continue_()
    wait_for(page, "in next.png")
    page.click("label[for=view-layers]")
    page.wait_for_selector("#how:not([hidden])")
    assert page.inner_text("#row-said") == "layer 3"


def test_a_click_into_the_picture_takes_the_smallest_box_under_it(visit, run, tmp_path):
    page, file = visit(), file_of(tmp_path)
    upload(page, file)
    threshold(page, 0)
    found = load(run, "cpu").predict(file)
    x0, y0, x1, y1 = found.boxes_xyxy.T
    areas = ((x1 - x0) * (y1 - y0)).tolist()
    smallest = int(np.argmin(areas))
    x, y = float(x0[smallest] + x1[smallest]) / 2, float(y0[smallest] + y1[smallest]) / 2
    place = page.locator("#picture").bounding_box()
    page.locator("#picture").click(position={"x": x * place["width"] / 150, "y": y * place["height"] / 100})
    page.wait_for_selector("#scores tr")
    pressed = page.locator("#found button").evaluate_all("all => all.map(e => e.getAttribute('aria-pressed'))")
    assert pressed == [str(i == smallest).lower() for i in range(8)]


def test_the_encoder_is_asked_by_a_click(visit, run, tmp_path):
    page, file = visit(), file_of(tmp_path)
    upload(page, file)
    page.click("label[for=view-encoder]")
    before, place = drawn(page), page.locator("#picture").bounding_box()
    page.locator("#picture").click(position={"x": place["width"] * 0.75, "y": place["height"] * 0.3})
    said = point_json(load(run, "cpu"), read_image(file), 0.75, 0.3)
    wait_for(page, f"{100 * said['layers'][0]['largest']:.1f} % of the attention")
    assert drawn(page) != before


def test_the_next_picture_replaces_the_first_whose_late_answer_is_thrown_away(visit, tmp_path):
    page, held = visit(), []
    page.route("**/predict*", lambda route: held.append(route) if not held else route.continue_())
    page.set_input_files("#file", file_of(tmp_path, "slow.png"))
    wait_for(page, "Looking at slow.png")
    until(page, held)
    upload(page, file_of(tmp_path, "quick.png", seed=1))
    wait_for(page, "in quick.png")
    late = {"image": {"width": 1, "height": 1}, "seconds": 1, "detections": []}
    held[0].fulfill(json=late)
    page.wait_for_timeout(200)
    threshold(page, 0)
    assert "in quick.png" in page.inner_text("#status")
    assert len(scores(page)) == 8
    page.locator("#found button").first.click()
    page.wait_for_selector("#scores tr")
    upload(page, file_of(tmp_path, "third.png", seed=2))
    wait_for(page, "in third.png")
    assert page.locator("#how").is_hidden()
    assert page.locator("#view-boxes").is_checked()


def test_bad_files_are_refused_in_words_and_the_next_one_is_taken(visit, tmp_path):
    page, bad = visit(refusals=(400,)), tmp_path / "<b>bad.png"
    bad.write_bytes(b"no picture at all")
    page.set_input_files("#file", bad)
    wait_for(page, "not a picture that can be read")
    assert page.locator("#error").get_attribute("role") == "alert"
    assert page.locator("#work").is_hidden()
    upload(page, file_of(tmp_path))
    assert page.locator("#error").is_hidden()


def test_a_busy_service_is_asked_again_and_other_refusals_are_shown(visit, tmp_path):
    page, tries = visit(refusals=(503, 409)), []

    def busy_twice(route):
        tries.append(1)
        route.fulfill(status=503, headers={"Retry-After": "1"}, json={}) if len(tries) < 3 else route.continue_()

    page.route("**/predict*", busy_twice)
    page.set_input_files("#file", file_of(tmp_path))
    wait_for(page, "busy")
    page.wait_for_selector("#work:not([hidden])")
    assert len(tries) == 3
    page.route("**/look", lambda route: route.fulfill(status=409, json={"error": "an exported model has no inside"}))
    page.click("label[for=view-layers]")
    wait_for(page, "an exported model has no inside")
    page.unroute("**/look")
    page.click("label[for=view-boxes]")
    page.click("label[for=view-layers]")
    page.wait_for_selector("#scores tr")
    assert page.locator("#error").is_hidden()


def test_names_of_files_and_classes_stay_text(visit, tmp_path):
    page = visit()
    upload(page, file_of(tmp_path, f"{HOSTILE}.png".replace("/", "")))
    threshold(page, 0)
    page.locator("#found button").first.click()
    page.wait_for_selector("#scores tr")
    assert HOSTILE in page.inner_text("#found")
    assert HOSTILE in page.inner_text("#status")
    assert HOSTILE in page.inner_text("#query")
    assert HOSTILE in page.inner_text("#model")
    assert page.locator("main img:not(#samples img), header img").count() == 0


def test_a_rotated_photo_lies_as_the_detector_sees_it(visit, tmp_path):
    pixels = np.zeros((100, 160, 3), np.uint8)
    pixels[:, :80], pixels[:, 80:] = (250, 0, 0), (0, 0, 250)
    picture, file = Image.fromarray(pixels), tmp_path / "rotated.jpg"
    note = Image.Exif()
    note[0x0112] = 6  # turn a quarter clockwise to see it upright
    picture.save(file, exif=note, quality=95)
    upright = read_image(file)
    assert upright.shape == (3, 160, 100)
    page = visit()
    upload(page, file)
    threshold(page, 1)
    shown = Image.open(io.BytesIO(page.locator("#picture").screenshot())).convert("RGB")
    assert shown.height / shown.width == pytest.approx(1.6, abs=0.02)
    for x, y in ((0.5, 0.2), (0.5, 0.8), (0.1, 0.1), (0.9, 0.9)):
        there = shown.getpixel((int(x * shown.width), int(y * shown.height)))
        seen = upright[:, int(y * 160), int(x * 100)].tolist()
        assert max(abs(a - b) for a, b in zip(there, seen, strict=True)) < 25


def test_a_large_photo_keeps_its_boxes(visit, run, tmp_path):
    page, file = visit(), file_of(tmp_path, "large.jpg", width=3000, height=2000)
    upload(page, file)
    threshold(page, 0)
    size = page.evaluate("[document.getElementById('picture').width, document.getElementById('picture').height]")
    assert size[0] / size[1] == pytest.approx(1.5, abs=0.01)
    assert len(scores(page)) == 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(visit, tmp_path, scheme):
    page = visit(390, 844, color_scheme=scheme, device_scale_factor=2, has_touch=True)

    def widths():
        return page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")

    assert widths() == [390, 390]
    upload(page, file_of(tmp_path, "long" * 30 + ".png"))
    threshold(page, 0)
    assert widths() == [390, 390]
    assert page.eval_on_selector("#picture", "e => e.width === 2 * parseFloat(e.style.width)")
    for view in ("layers", "encoder"):
        page.locator(f"label[for=view-{view}]").tap()
        page.wait_for_timeout(300)
        assert widths() == [390, 390]


def test_everything_can_be_done_by_keyboard(visit, tmp_path):
    page, choosers = visit(), []
    # long before Enter is pressed, for the browser is told of it in its own time
    page.on("filechooser", lambda chooser: choosers.append(chooser))

    def focused():
        return page.evaluate("document.activeElement.id || document.activeElement.closest('ul, ol')?.id")

    def tab_to(wanted):
        for _ in range(20):
            page.keyboard.press("Tab")
            if focused() == wanted:
                assert page.evaluate("document.activeElement.matches(':focus-visible')")
                return
        raise AssertionError(f"Tab never comes to {wanted}")

    tab_to("file")
    page.keyboard.press("Enter")
    until(page, choosers)
    choosers[0].set_files(file_of(tmp_path))
    page.wait_for_selector("#work:not([hidden])")
    tab_to("samples")
    with page.expect_response("**/predict*"):  # until then the page still shows the picture before
        page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    tab_to("view-boxes")
    tab_to("threshold")
    page.keyboard.press("Home")
    assert len(scores(page)) == 8
    tab_to("found")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scores tr")
    assert focused() == "found"
    page.locator("#view-layers").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#view-encoder").is_checked()
    tab_to("picture")
    before = drawn(page)
    page.keyboard.press("Enter")
    wait_for(page, "% of the attention")
    first = drawn(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    wait_for(page, "Asking")
    wait_for(page, "% of the attention")
    assert len({before, first, drawn(page)}) == 3


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(visit, tmp_path, way):
    page, file = visit(), file_of(tmp_path)
    page.evaluate(
        """([way, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
          const event = way === "drop"
            ? new DragEvent("drop", { dataTransfer: data, cancelable: true, bubbles: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
          document.body.dispatchEvent(event);
        }""",
        [way, list(file.read_bytes())],
    )
    wait_for(page, "in given.png")


def test_only_three_files_are_handed_out():
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from lucidetr.deployment.page.routes import page_routes

    client = TestClient(Starlette(routes=page_routes()))
    for path, kind in (("/", "html"), ("/static/page.css", "css"), ("/static/page.js", "javascript")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"text/{kind}; charset=utf-8"
        outside = re.sub(r"xmlns=.{1,3}http://www.w3.org/2000/svg", "", answer.text)
        assert re.search(r"https?://|innerHTML|insertAdjacent|\beval\b|style=|\son\w+=", outside) is None
    for path in ("/static/", "/static/look.py", "/static/../look.py", "/static/%2e%2e/look.py", "/page.js"):
        assert client.get(path).status_code == 404

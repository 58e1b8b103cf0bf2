"""The page in a real browser: sliders are moved, and other samples are seen."""

import io
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from http_servers import served  # noqa: E402

import fewstep as fs  # noqa: E402

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PATIENCE = 60_000  # milliseconds
PLAN = fs.make_plan("unipc", fs.schedules.VPLinear(), 5, final="zero")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install it, or name it in the variable CHROMIUM")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(PATIENCE)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()


def open_page(page, server):
    page.goto(f"http://127.0.0.1:{server.port}/")


def done(page, runs):
    """Wait until so many runs are done."""
    page.wait_for_selector(f'body[data-state="done"][data-runs="{runs}"]')


def seen(page, selector="#cards"):
    """The pixels that a person sees."""
    return np.array(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("L"))


def images(page, card=0):
    return page.locator(".card").nth(card).locator("img").evaluate_all("all => all.map(one => one.src)")


def test_sliders_give_other_samples(page):
    with served(rows=32, waiting=64) as server:
        open_page(page, server)
        done(page, 1)
        before, plan = seen(page), page.locator("#chart circle").count()
        assert (len(images(page)), plan) == (16, 9)  # 8 calls: 9 states
        assert before.std() > 20  # pictures, no empty page
        page.fill("#nfe", "3")  # a slider
        done(page, 2)
        after = seen(page)
        assert page.locator("#chart circle").count() == 4
        assert page.locator("#nfe-value").inner_text() == "3"
        assert after.shape == before.shape
        assert (np.abs(after.astype(int) - before) > 8).mean() > 0.01  # what is seen has changed
        page.fill("#guidance", "6")
        done(page, 3)
        assert (np.abs(seen(page).astype(int) - after) > 8).mean() > 0.01
        assert "guidance 6" in page.locator(".card p").first.inner_text()
        page.select_option("#solver", "ddim")
        done(page, 4)
        assert page.locator(".card h2").first.inner_text() == "ddim, grid auto, 3 calls"
        page.fill("#count", "4")
        done(page, 5)
        assert len(images(page)) == 4
        told = server.told(
            "POST", "/samples", {"nfe": 3, "solver": "ddim", "count": 4, "label": [0, 1, 2, 3], "guidance": 6, "format": "json"}
        )
        assert images(page) == [f"data:image/png;base64,{image}" for image in told[1]["images"]]
        assert not page.wrong
        assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:")) for url in page.asked)


def test_samples_are_kept_side_by_side(page):
    with served(rows=32, waiting=64, plans={"five": PLAN}) as server:
        open_page(page, server)
        done(page, 1)
        first = images(page)
        page.click("#keep")
        page.select_option("#named", "five")
        done(page, 2)
        assert page.locator(".card").count() == 2
        assert page.locator(".card h2").all_inner_texts() == ["plan five, 5 calls", "auto, grid auto, 8 calls"]
        assert images(page, 1) == first
        assert images(page, 0) != first
        boxes = [page.locator(".card").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"]  # beside each other
        assert page.locator("#chart polyline").count() == 2
        page.click("text=Drop")
        assert page.locator(".card").count() == 1
        assert page.locator("#chart polyline").count() == 1
        page.click("#next")
        done(page, 3)
        assert page.input_value("#seed") == "16"
        assert not page.wrong


def test_stop_hangs_up_and_errors_are_told(page):
    with served(rows=32, waiting=64) as server:
        open_page(page, server)
        done(page, 1)
        server.network.gate.clear()
        page.fill("#nfe", "20")
        page.wait_for_selector("#stop:enabled")
        page.wait_for_selector('body[data-state="running"]')
        page.locator(".card p", has_text="every class").first.wait_for()
        page.click("#stop")
        page.wait_for_selector('body[data-state="stopped"]')
        server.network.gate.set()
        page.fill("#count", "2")
        done(page, 2)
        server.network.raises = 1
        page.click("#go")
        page.wait_for_selector('body[data-state="failed"]')
        assert "the network failed for this request" in page.locator("#status").inner_text()
        assert page.locator("#go").is_enabled()


def test_token_is_asked_for(page):
    with served(rows=32, waiting=64, token="sesame") as server:
        open_page(page, server)
        page.wait_for_selector("#token-form:visible")
        page.fill("#token", "sesame")
        page.click("text=Use it")
        done(page, 1)
        assert page.locator("#token-form").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits(browser, scheme, width):
    with served(rows=32, waiting=64) as server:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        try:
            page.set_default_timeout(PATIENCE)
            open_page(page, server)
            done(page, 1)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            picture = np.array(Image.open(io.BytesIO(page.screenshot())).convert("L"))
            assert bool(np.median(picture) > 128) is (scheme == "light")
            text = page.locator("#chart text").first.bounding_box()
            assert text["height"] >= 10  # readable on narrow screens too
        finally:
            page.close()

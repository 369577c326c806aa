"""The documentation site that ``scripts/docs`` builds, in a real browser: every page, wide and narrow, and the search.

Without the site or a browser these tests are skipped; ``BGTASKS_REQUIRE=site,chromium`` makes both an error.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from paths import ROOT
from requirements import need

sync_api = need("playwright.sync_api")

SITE = Path(os.environ.get("BGTASKS_SITE", ROOT / "build" / "docs" / "html"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What WCAG asks of small text.
LEAST_CONTRAST = 4.5

CONTRASTS = """
() => {
    const parts = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
    const luminance = color => {
        const [red, green, blue] = parts(color).map(part => {
            part /= 255
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4
        })
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    }
    const page = getComputedStyle(document.body).backgroundColor
    const box = getComputedStyle(document.querySelector("svg.figure rect")).fill
    return [...document.querySelectorAll("svg.figure text")].flatMap(text => [page, box].map(ground => {
        const [dark, light] = [luminance(getComputedStyle(text).fill), luminance(ground)].sort((a, b) => a - b)
        return (light + 0.05) / (dark + 0.05)
    }))
}
"""


def missing(what: str, text: str) -> None:
    """Skip a test for what is not there, or fail it where that is demanded."""
    if what in os.environ.get("BGTASKS_REQUIRE", "").split(","):
        pytest.fail(text)
    pytest.skip(text)


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Note a link or an anchor."""
        attributes = dict(attrs)
        if attributes.get("id"):
            self.anchors.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, format, *args):
        """Write nothing."""


@pytest.fixture(scope="module")
def pages():
    """Give the paths of all pages below the site's folder."""
    if not (SITE / "index.html").exists():
        missing("site", f"the documentation site was not built: scripts/docs builds it in {SITE}")
    return sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def server(pages):
    """Give the address of a server of the site, on this machine alone."""
    handler = functools.partial(QuietHandler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(pages):
    """Give a headless Chromium that this machine has."""
    path = os.environ.get("BGTASKS_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("chromium", f"there is none of {', '.join(BROWSERS)} here: scripts/install_packages chromium")
    with sync_api.sync_playwright() as playwright:
        # Any name but that of the server is unknown to it: a request to another host could not succeed.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        )
        yield browser
        browser.close()


class Visit:
    """A tab, and what goes wrong in it, by page."""

    def __init__(self, browser, server, viewport):
        self.server = server
        self.problems = defaultdict(list)
        self.path = ""
        self.tab = browser.new_page(viewport=viewport)
        self.tab.on("request", self._on_request)
        self.tab.on("response", self._on_response)
        self.tab.on("console", self._on_console)
        self.tab.on("pageerror", lambda error: self.add(f"error: {error}"))
        self.tab.on("requestfailed", self._on_failure)

    def add(self, problem):
        """Note what went wrong in the page that is open."""
        self.problems[self.path].append(problem)

    def _on_request(self, request):
        if not request.url.startswith((f"{self.server}/", "data:", "blob:")):
            self.add(f"request to another host: {request.url}")

    def _on_failure(self, request):
        # The search reads the pages that it found, until its page is left.
        if request.failure != "net::ERR_ABORTED":
            self.add(f"{request.failure}: {request.url}")

    def _on_response(self, response):
        if response.status >= 400:
            self.add(f"{response.status}: {response.url}")

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.add(f"{message.type} in the console: {message.text}")

    def open(self, path):
        """Open a page and wait until it is loaded."""
        self.path = path
        self.tab.goto(f"{self.server}/{path}", wait_until="load")


@pytest.fixture(params=[WIDE, NARROW], ids=["wide", "narrow"])
def visit(request, browser, server):
    """Give a tab as wide as a desk's or as narrow as a telephone's; nothing may go wrong in it."""
    visit = Visit(browser, server, request.param)
    yield visit
    visit.tab.close()
    assert dict(visit.problems) == {}


@pytest.mark.timeout(300)
def test_every_page_opens(visit, pages):
    """Without an error in the console, without a request to another host, and without scrolling sideways."""
    for path in pages:
        visit.open(path)
        content, width = visit.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        if content > width:
            visit.add(f"{content} pixels wide in a window of {width}")


def test_the_search_finds_a_method(visit):
    """Who looks for ``create_task`` from the first page gets to its entry in the reference."""
    visit.open("index.html")
    box = visit.tab.locator("input.sidebar-search")
    if visit.tab.viewport_size == NARROW:
        visit.tab.locator(".mobile-header label[for=__navigation]").click()
    box.fill("create_task")
    box.press("Enter")
    found = visit.tab.locator("ul.search a", has_text="bgtasks.BackgroundTaskManager.create_task").first
    sync_api.expect(found).to_be_visible()
    found.click()
    entry = visit.tab.locator('[id="bgtasks.BackgroundTaskManager.create_task"]')
    sync_api.expect(entry).to_be_visible()
    assert visit.tab.url.startswith(f"{visit.server}/reference/manager.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["architecture.html", "events_way.html"])
def test_a_picture_is_legible(visit, path, scheme):
    """Its text stands out from its boxes and from the page, in either theme, and it fits the window."""
    visit.tab.emulate_media(color_scheme=scheme)
    visit.open(path)
    contrasts = visit.tab.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrasts) >= LEAST_CONTRAST
    outside = """
    () => {
        const picture = document.querySelector("svg.figure")
        const {left, right} = picture.getBoundingClientRect()
        return [...picture.querySelectorAll("text")].filter(text => {
            const box = text.getBoundingClientRect()
            return box.left < left - 1 || box.right > right + 1
        }).map(text => text.textContent)
    }
    """
    assert visit.tab.evaluate(outside) == []


def test_every_link_within_the_site_leads_somewhere(pages):
    """To a page that exists, and to an anchor on it."""
    parsed = {path: Page(SITE / path) for path in pages}
    broken = []
    for path, page in parsed.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(target).scheme:
                continue
            file = os.path.normpath((Path(path).parent / unquote(target)).as_posix()) if target else path
            if file not in parsed:
                if not (SITE / file).is_file():
                    broken.append(f"{path}: {link}")
            elif anchor and unquote(anchor) not in parsed[file].anchors:
                broken.append(f"{path}: {link}")
    assert broken == []


def test_pages_link_to_the_reference(pages):
    """A name in code font is a link to its entry, without markup in the page."""
    assert "reference/manager.html#bgtasks.BackgroundTaskManager.create_task" in Page(SITE / "manager.html").links
    assert "https://docs.python.org/3/library/asyncio-task.html#asyncio.Task" in Page(SITE / "manager.html").links

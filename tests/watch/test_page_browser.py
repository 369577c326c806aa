"""The page in a real browser, against a FastAPI application on uvicorn under load: what it shows, and each attack.

Without a browser these tests are skipped; ``BGTASKS_REQUIRE=chromium,playwright`` makes that an error. With
``BGTASKS_PICTURES=FOLDER`` they keep the pictures of the documentation there.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from child import child
from requirements import need, need_program

sync_api = need("playwright.sync_api")
need("fastapi")
need("uvicorn")

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send others signals"),
    pytest.mark.timeout(120),
]

TOKEN = "a token for the tests of the page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = "<img src=x onerror='window.pwned = 1'><script>window.pwned = 1</script>"
# What WCAG asks of small text.
LEAST_CONTRAST = 4.5

PROGRAM = """
import contextlib, random, socket, time
import bgtasks.watch
import uvicorn
from fastapi import FastAPI
from bgtasks.events import Publisher, Sink
from bgtasks.integrations.fastapi import lifespan

class Orders(Sink):
    async def write(self, batch, batch_id):
        await asyncio.sleep(0.2)

class EvilError(Exception):
    pass

EvilError.__qualname__ = EVIL

async def send_mail():
    for sent in range(100):
        bgtasks.progress(sent, 100, "mails")
        await asyncio.sleep(0.1)

async def resize_image():
    await asyncio.sleep(random.random() * 3)

async def charge_card():
    await asyncio.sleep(0.05)
    raise EvilError

async def parse_report():
    time.sleep(0.3)

async def nap():
    await asyncio.sleep(600)

async def load(manager, publisher):
    for number in range(10000):
        if number % 10 == 0:
            context = {"order": 4711, "password": "secret"}
            manager.create_task(send_mail(), name="send_mail", timeout=60, context=context)
            manager.create_task(charge_card(), name="charge_card")
        if number % 60 == 0:
            manager.create_task(parse_report(), name="parse_report")
        manager.create_task(resize_image(), name="resize_image", timeout=10)
        publisher.emit({"number": number})
        await asyncio.sleep(0.02)

@contextlib.asynccontextmanager
async def inner(app):
    manager = app.state.task_manager
    manager.watch_loop(0.1)
    publisher = Publisher(Orders(), name="orders", manager=manager, batch=20)
    manager.create_task(load(manager, publisher), name="load")
    manager.create_task(nap(), name="nap")
    manager.create_task(nap(), name=EVIL)
    yield
    say("closed")

logging.getLogger("bgtasks").setLevel(logging.CRITICAL)
app = FastAPI(lifespan=lifespan(inner, max_concurrency=150, drain_timeout=0.1))
page = bgtasks.watch.app(token="a token for the tests of the page", allow_cancel=True, show_context=["order"])
app.mount("/tasks", page)

@app.get("/viewers")
async def viewers():
    return {"streams": page._streams, "naps": app.state.task_manager.stats()["names"]["nap"]["in_flight"]}

async def main():
    listening = socket.create_server(("127.0.0.1", 0))
    say("port", listening.getsockname()[1])
    await uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on")).serve([listening])

asyncio.run(main())
"""

CONTRASTS = """
() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number)
    const luminance = color => {
        const [red, green, blue] = parts(color).slice(0, 3).map(part => {
            part /= 255
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4
        })
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    }
    const ground = element => {
        const color = getComputedStyle(element).backgroundColor
        return parts(color)[3] === 0 && element.parentElement ? ground(element.parentElement) : color
    }
    const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
    return [...document.querySelectorAll("body *")]
        .filter(element => element.checkVisibility() && hasText(element))
        .map(element => {
            const colors = [getComputedStyle(element).color, ground(element)]
            const [dark, light] = colors.map(luminance).sort((a, b) => a - b)
            return (light + 0.05) / (dark + 0.05)
        })
}
"""


@pytest.fixture(scope="module")
def browser():
    """Give a headless Chromium; to it, evil.example is this machine."""
    path = os.environ.get("BGTASKS_CHROMIUM") or need_program(*BROWSERS)
    rules = "MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--host-resolver-rules={rules}"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Give the program, and its port."""
    text = f"EVIL = {EVIL!r}\n{PROGRAM}"
    with child(tmp_path_factory.mktemp("program"), text, "auto", "asyncio") as program:
        yield program, int(program.wait_for("port").split()[-1])
        program.process.kill()


class Visit:
    """A tab, and what goes wrong in it."""

    def __init__(self, browser, port, **options):
        self.address = f"http://127.0.0.1:{port}/tasks/"
        self.problems = []
        self.urls = []
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.on("request", lambda request: self.urls.append(request.url))
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", self._on_console)

    def _on_console(self, message):
        # A browser reports each response of 401 so; the page asks whether it may see the stream.
        if message.type in ("error", "warning") and "401" not in message.text:
            self.problems.append(message.text)

    def log_in(self):
        """Open the page and log in with the form."""
        self.tab.goto(self.address)
        self.tab.get_by_label("Token of this page").fill(TOKEN)
        self.tab.keyboard.press("Enter")
        sync_api.expect(self.tab.locator("#status")).to_have_text("Live")

    def frames(self, count):
        """Wait for frames."""
        # Not by events of the stream: the page may open another one meanwhile.
        script = """count => new Promise(resolve => {
            let seen = last
            const timer = setInterval(() => {
                if (last === seen) return
                seen = last
                if (--count === 0) { clearInterval(timer); resolve() }
            }, 20)
        })"""
        self.tab.evaluate(script, count)

    def server(self):
        """Return what the server says of its streams and of the naps."""
        return self.context.request.get(self.address.replace("/tasks/", "/viewers")).json()


@pytest.fixture
def visit(browser, program):
    """Give a tab on the page; nothing may go wrong in it, and it may ask no other server."""
    visit = Visit(browser, program[1], viewport={"width": 1280, "height": 900})
    yield visit
    visit.context.close()
    assert visit.problems == []
    assert [url for url in visit.urls if not url.startswith(visit.address)] == []


def test_a_viewer_logs_in_and_sees_everything(visit):
    """Tasks, names, publishers and loops; names and errors are text; no URL has the token."""
    visit.log_in()
    visit.frames(3)
    tab = visit.tab
    assert 10 < tab.locator("#tasks tbody tr").count() <= 200
    evil = tab.locator("#tasks tbody tr", has_text="onerror").locator("td").nth(4)
    assert evil.text_content() == EVIL[:63] + "…"
    assert evil.inner_html() == EVIL[:63].replace("<", "&lt;").replace(">", "&gt;") + "…"
    mail = tab.locator("#tasks tbody tr", has_text="send_mail").first.text_content()
    assert "mails" in mail
    assert "order=4711" in mail
    assert "secret" not in tab.content()
    names = {row.split("\t")[0] for row in tab.locator("#names tbody").inner_text().splitlines()}
    assert {"send_mail", "resize_image", "charge_card", "parse_report", "nap", "load"} <= names
    assert "onerror" in tab.locator("#names tbody tr", has_text="charge_card").text_content()
    assert tab.locator("#publishers tbody tr").inner_text().startswith("orders\t")
    sync_api.expect(tab.locator("#loops tbody tr")).to_contain_text("parse_report (task", timeout=20000)
    assert int(tab.locator("#totals dd").first.text_content().replace(",", "")) > 10
    assert tab.evaluate("window.pwned") is None
    assert tab.evaluate("document.querySelectorAll('img, #tasks script').length") == 0
    assert not [url for url in visit.urls if "token" in url]
    assert tab.evaluate("document.cookie") == ""


def test_a_link_with_the_token_behind_a_hash_logs_in(visit):
    """As ``bgtasks web`` prints it: the server gets no URL with it, and the browser keeps none."""
    visit.tab.goto(f"{visit.address}#token={TOKEN.replace(' ', '%20')}")
    sync_api.expect(visit.tab.locator("#status")).to_have_text("Live")
    assert visit.tab.url == visit.address
    visit.tab.get_by_role("button", name="Log out").click()
    sync_api.expect(visit.tab.locator("#status")).to_have_text("Not logged in")
    visit.tab.get_by_label("Token of this page").fill("wrong, but long enough")
    visit.tab.get_by_role("button", name="Log in").click()
    sync_api.expect(visit.tab.locator("#refused")).to_have_text("this is not the token of this page")


def test_charts_are_drawn(visit):
    """For everything, and for a name that is chosen; each says its figures in words, too."""
    visit.log_in()
    visit.tab.get_by_role("button", name="Charts of resize_image").click()
    sync_api.expect(visit.tab.locator("#one-title")).to_have_text("resize_image, the last ten minutes")
    assert visit.tab.evaluate("document.activeElement.id") == "unchoose"
    visit.frames(4)
    for line in visit.tab.locator("svg polyline").all():
        assert len(line.get_attribute("points").split()) >= 3
    labels = [each.get_attribute("aria-label") for each in visit.tab.locator("svg").all()]
    assert len(labels) == 7
    assert all(re.search(r"now .+, highest .+ in the last ten minutes$", label) for label in labels)
    assert re.match(r"Started: now [1-9]", labels[1])


def test_the_server_filters_and_the_page_works_by_keyboard(visit):
    """``/`` leads to the filter; a task's stack opens with Enter and closes with Escape."""
    visit.log_in()
    visit.tab.locator("body").press("/")
    assert visit.tab.evaluate("document.activeElement.id") == "name"
    visit.tab.keyboard.type("nap")
    rows = visit.tab.locator("#tasks tbody tr")
    sync_api.expect(rows).to_have_count(1)
    assert visit.urls[-1].endswith("name=nap&sort=age&by=in_flight")
    rows.get_by_role("button", name="Stack of task").focus()
    visit.frames(2)
    # The rows were written again meanwhile.
    visit.tab.keyboard.press("Enter")
    dialog = visit.tab.get_by_role("dialog")
    sync_api.expect(dialog).to_contain_text("in nap")
    visit.tab.keyboard.press("Escape")
    sync_api.expect(dialog).to_be_hidden()


def test_a_task_is_cancelled_after_a_question(visit):
    """The dialog says how many; closing it changes nothing."""
    visit.log_in()
    naps = visit.server()["naps"]
    visit.tab.get_by_label("Name contains").fill("send_mail")
    row = visit.tab.locator("#names tbody tr", has_text="send_mail")
    row.get_by_role("button", name="Cancel all").click()
    dialog = visit.tab.get_by_role("dialog")
    sync_api.expect(dialog).to_contain_text(re.compile(r"\d+ tasks in 1 process will be asked to end"))
    dialog.get_by_role("button", name="Close").click()
    row.get_by_role("button", name="Cancel all").click()
    dialog.get_by_role("button", name=re.compile(r"Cancel \d+ tasks")).click()
    sync_api.expect(dialog).to_contain_text("asked to end.")
    dialog.get_by_role("button", name="Close").click()
    sync_api.expect(row.locator("td").nth(6)).not_to_have_text("0")
    assert visit.server()["naps"] == naps


def test_a_process_that_does_not_answer_is_named_in_the_question(visit):
    """Its tasks are not among those that will be asked to end."""
    visit.log_in()
    answer = {"matching": 1, "cancelled": 1, "processes": 1, "errors": ["process 7 does not answer"]}
    visit.tab.route("**/cancel", lambda route: route.fulfill(json=answer))
    visit.tab.locator("#names tbody tr", has_text="nap").get_by_role("button", name="Cancel all").click()
    dialog = visit.tab.get_by_role("dialog")
    sync_api.expect(dialog).to_contain_text("1 task in 1 process will be asked to end.\nprocess 7 does not answer")
    dialog.get_by_role("button", name="Cancel 1 task").click()
    sync_api.expect(dialog).to_contain_text("1 task was asked to end.\nprocess 7 does not answer")


def test_frames_come_only_while_somebody_looks(visit):
    """A hidden tab, a pause and a closed tab end the stream."""
    visit.log_in()

    def wait_for_streams(count):
        deadline = time.monotonic() + 20
        while visit.server()["streams"] != count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    hide = """is => {
        Object.defineProperty(document, "hidden", {value: is, configurable: true})
        document.dispatchEvent(new Event("visibilitychange"))
    }"""
    wait_for_streams(1)
    visit.tab.evaluate(hide, True)
    wait_for_streams(0)
    visit.tab.evaluate(hide, False)
    wait_for_streams(1)
    visit.tab.get_by_role("button", name="Pause").click()
    sync_api.expect(visit.tab.locator("#status")).to_have_text("Paused")
    wait_for_streams(0)
    visit.tab.get_by_role("button", name="Pause").click()
    wait_for_streams(1)
    visit.tab.goto("about:blank")
    wait_for_streams(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser, program, scheme):
    """In either theme; and the pictures of the documentation are made of it."""
    visit = Visit(browser, program[1], viewport={"width": 1280, "height": 1000}, color_scheme=scheme)
    try:
        visit.tab.goto(visit.address)
        sync_api.expect(visit.tab.locator("#login")).to_be_visible()
        contrasts = visit.tab.evaluate(CONTRASTS)
        visit.log_in()
        visit.frames(3)
        contrasts += visit.tab.evaluate(CONTRASTS)
        folder = os.environ.get("BGTASKS_PICTURES")
        if folder is not None:
            visit.tab.get_by_label("Name contains").fill("_")
            visit.tab.get_by_role("button", name="Charts of resize_image").click()
            visit.frames(45)
            visit.tab.evaluate("window.scrollTo(0, 0)")
            Path(folder, f"page_{scheme}.png").write_bytes(visit.tab.screenshot())
            visit.tab.locator("#unchoose").click()
        visit.tab.get_by_role("button", name="Stack of task").first.click()
        sync_api.expect(visit.tab.get_by_role("dialog")).to_be_visible()
        contrasts += visit.tab.evaluate(CONTRASTS)
        assert len(contrasts) > 1000
        assert min(contrasts) >= LEAST_CONTRAST
    finally:
        visit.context.close()


def test_it_fits_a_telephone(browser, program):
    """Tables scroll in themselves, the page does not scroll sideways."""
    visit = Visit(browser, program[1], viewport={"width": 390, "height": 844})
    try:
        visit.log_in()
        visit.frames(1)
        content, width = visit.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert content <= width
    finally:
        visit.context.close()


def test_every_control_has_a_name(visit):
    """For those who hear the page: buttons, inputs, selects, tables and pictures."""
    visit.log_in()
    visit.frames(1)
    snapshot = visit.tab.locator("body").aria_snapshot()
    assert not re.findall(
        r"- (?:button|textbox|combobox|spinbutton|img|dialog|region)(?: \[.*\])?:?$", snapshot, re.MULTILINE
    )
    for heading in ("Tasks", "Names", "Publishers", "Event loops", "The last ten minutes"):
        assert f'- heading "{heading}"' in snapshot


# -- attacks -----------------------------------------------------------------------------------------------------------

ATTACK = """
async address => {
    const outcome = {}
    const attempt = async (name, options) => {
        try { outcome[name] = (await fetch(address + "cancel", {method: "POST", ...options})).status }
        catch (error) { outcome[name] = "refused" }
    }
    const body = JSON.stringify({name: "nap", confirmed: true})
    await attempt("simple", {mode: "no-cors", credentials: "include", body})
    await attempt("json", {credentials: "include", headers: {"content-type": "application/json"}, body})
    const reading = fetch(address + "stream", {credentials: "include"})
    outcome.read = await reading.then(answer => answer.status, () => "refused")
    outcome.stream = await new Promise(resolve => {
        const source = new EventSource(address + "stream", {withCredentials: true})
        source.onmessage = () => resolve("data")
        source.onerror = () => resolve("refused")
    })
    const form = document.createElement("form")
    form.method = "post"
    form.action = address + "cancel"
    form.enctype = "text/plain"
    form.target = "frame"
    const frame = document.createElement("iframe")
    frame.name = "frame"
    document.body.append(frame, form)
    const field = document.createElement("input")
    field.name = '{"name": "nap", "confirmed": true, "x": "'
    field.value = '"}'
    form.append(field)
    await new Promise(resolve => { frame.onload = resolve; form.submit() })
    const framed = document.createElement("iframe")
    framed.src = address
    await new Promise(resolve => { framed.onload = resolve; document.body.append(framed) })
    const image = new Image()
    outcome.image = await new Promise(resolve => {
        image.onload = () => resolve("data")
        image.onerror = () => resolve("refused")
        image.src = address + "cancel?name=nap&confirmed=true"
    })
    return outcome
}
"""


class EmptyHandler(http.server.BaseHTTPRequestHandler):
    """Serves empty pages."""

    def do_GET(self):
        """Send a page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html><body>")

    def log_message(self, format, *args):
        """Write nothing."""


@contextlib.contextmanager
def stranger():
    """Give the port of a server of somebody else."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHandler) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.05))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1"], ids=["another site", "another port"])
def test_a_page_of_somebody_else_can_neither_read_nor_change(browser, program, host):
    """In the browser of a viewer who is logged in; the cookie of another port of this machine is even sent."""
    visit = Visit(browser, program[1])
    try:
        visit.log_in()
        before = visit.server()["naps"]
        assert before > 0
        with stranger() as port:
            other = visit.context.new_page()
            other.goto(f"http://{host}:{port}/")
            outcome = other.evaluate(ATTACK, visit.address)
            assert outcome == {
                "simple": "refused",
                "json": "refused",
                "read": "refused",
                "stream": "refused",
                "image": "refused",
            }
            frames = [frame for frame in other.frames if frame.parent_frame is not None]
            assert len(frames) == 2
            assert not any(frame.locator("#charts").count() for frame in frames)
            other.close()
        assert visit.server()["naps"] == before
        assert visit.tab.locator("#status").text_content() == "Live"
    finally:
        visit.context.close()


def test_a_name_of_somebody_else_for_this_server_gets_nothing(browser, program):
    """DNS rebinding: evil.example leads to the server of the page."""
    context = browser.new_context()
    try:
        tab = context.new_page()
        answer = tab.goto(f"http://evil.example:{program[1]}/tasks/")
        assert (answer.status, "hosts=[...]" in tab.content()) == (403, True)
        for path, method in (("stream", "GET"), ("login", "POST"), ("cancel", "POST")):
            script = "([path, method]) => fetch('/tasks/' + path, {method}).then(answer => answer.status)"
            assert tab.evaluate(script, [path, method]) == 403
    finally:
        context.close()


# The last test: it ends the program.
def test_sigterm_is_not_held_up_by_a_browser(browser, program):
    """The page says that the program has ended, in words."""
    visit = Visit(browser, program[1])
    try:
        visit.log_in()
        begun = time.monotonic()
        program[0].process.send_signal(signal.SIGTERM)
        program[0].wait_for("closed")
        assert program[0].end() in (0, -signal.SIGTERM)
        assert time.monotonic() - begun < 10
        sync_api.expect(visit.tab.locator("#status")).to_contain_text(
            re.compile("No answer|No connection"), timeout=20000
        )
        assert "Traceback" not in program[0].output
    finally:
        visit.context.close()

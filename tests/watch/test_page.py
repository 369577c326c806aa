"""The page as a bare ASGI application: what it shows, whom it refuses, and when its streams end."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import json
import re
import signal
import threading
import time
import tracemalloc

import pytest
from asgi import TOKEN, Client
from watched import Swallow, run_everything

import bgtasks.watch
from bgtasks import InvalidOptionError, NoManagerError, Retry, WatchError
from bgtasks.events import Fanout, Publisher
from bgtasks.watch import _page, _page_frames, _page_source, _viewer
from bgtasks.watch._page_frames import Query, make_frame
from bgtasks.watch._page_source import ManagerSource, ProcessesSource

BEARER = f"Bearer {TOKEN}"


@pytest.fixture(autouse=True)
def _no_thread_of_pages():
    """Wait for the threads of pages: nobody looks after a test."""
    yield
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("bgtasks-page_") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def client_of(manager, **options):
    """Return a client of the page of a manager, with its token."""
    page = bgtasks.watch.app(manager, token=TOKEN, **options)
    return Client(page, authorization=BEARER)


async def nap():
    """Wait for long."""
    await asyncio.sleep(60)


# -- mounting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "needs auth or token: pass token=..., a secret of at least 16 characters"),
        ({"token": ""}, "token must be a text of at least 16 characters"),
        ({"token": "short"}, "got one of 5"),
        ({"token": b"bytes of enough length"}, "token must be a text"),
        ({"auth": True}, "auth must be callable, or None; got True"),
        ({"token": TOKEN, "allow_cancel": 1}, "allow_cancel must be True or False; got 1"),
        ({"token": TOKEN, "hosts": "app.example"}, "hosts must be a list of names"),
        ({"token": TOKEN, "hosts": ["*"]}, "hosts must be a list of names"),
        ({"token": TOKEN, "hosts": ["app.example:443"]}, "without ports"),
        ({"token": TOKEN, "show_context": "order_id"}, "show_context must be a list of keys"),
        ({"token": TOKEN, "manager": object()}, "manager must be a BackgroundTaskManager, or None"),
    ],
)
def test_what_is_wrong_is_said_before_it_is_mounted(options, text):
    """Without auth and token above all."""
    with pytest.raises(InvalidOptionError, match=re.escape(text)):
        bgtasks.watch.app(**options)


def test_a_page_that_nobody_looks_at_has_no_thread(make_manager):
    """Nor a socket: it is an object."""
    before = threading.active_count()
    bgtasks.watch.app(make_manager(), token=TOKEN)
    assert threading.active_count() == before


@pytest.mark.loops("asyncio")
async def test_without_a_manager_it_shows_that_of_the_application(make_manager):
    """From the state of the scope; with none there, the error says what to do."""
    async with make_manager() as manager:
        client = client_of(None)
        answer = await client.get("/stack?id=1.1.1", scope={"state": {"task_manager": manager}})
        assert (answer.status, "has ended, or there was none" in answer.text) == (400, True)
        with pytest.raises(NoManagerError, match=re.escape("bgtasks.watch.app")):
            await client.get("/stream")


# -- what it shows -----------------------------------------------------------------------------------------------------


async def test_a_frame_shows_everything(make_manager):
    """Tasks, figures by name, publishers and loops of this manager, and of no other."""
    async with make_manager() as manager, make_manager() as other:
        manager.attach(Fanout([Publisher(Swallow(), name="mails"), Publisher(Swallow(), name="calls")]))
        manager.attach(await run_everything(manager))
        manager.create_task(nap(), name="<b>nap</b>", timeout=100, context={"order": 17, "password": "secret"})
        other.create_task(nap(), name="other")
        await asyncio.sleep(0)
        answer = await client_of(manager, show_context=["order"]).get("/stream", until=lambda answer: answer.frames)
        (frame,) = answer.frames
        ((task_id, state, name, coroutine, age, left, progress, context, attempt, following),) = frame["tasks"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", task_id)
        assert (state, name, coroutine, progress) == ("running", "<b>nap</b>", "nap", None)
        assert 0 <= age < 60
        assert 40 < left <= 100
        assert (context, attempt, following) == ("order=17", 1, None)
        assert "secret" not in answer.text
        assert (frame["total"], frame["matching"], frame["processes"], frame["errors"]) == (1, 1, 1, [])
        by_name = {row[1]: row[2:] for row in frame["names"]}
        assert by_name["bad"][:4] == [1, 0, 0, 1]
        assert by_name["bad"][-1] == "ValueError"
        assert "other" not in by_name
        assert [row[1:4] for row in frame["publishers"]] == [
            ["mails", "ok", 0],
            ["calls", "ok", 0],
            ["orders", "closed", 0],
        ]
        assert frame["publishers"][2][7] == 1
        assert len(frame["loops"]) == 1
        assert frame["totals"]["failed"] == 1
        await manager.cancel_all()
        await other.cancel_all()


@pytest.mark.loops("asyncio")
async def test_values_of_contexts_are_hidden_unless_named(make_manager):
    """A request cannot name them itself."""
    async with make_manager() as manager:
        manager.create_task(nap(), context={"password": "secret"})
        answer = await client_of(manager).get("/stream", until=lambda answer: answer.frames)
        assert "secret" not in answer.text
        source = ManagerSource(manager, ())
        assert "secret" not in json.dumps(source.ask("tasks", show_context=["password"]))
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
async def test_the_server_filters_and_sorts(make_manager):
    """By name, state and age; a name that was chosen is there in any case."""
    async with make_manager(max_concurrency=2) as manager:
        for name in ("b", "a", "ab"):
            manager.create_task(nap(), name=name)
        await asyncio.sleep(0.05)
        client = client_of(manager)
        frame = await client.frame("/stream?name=a&sort=name")
        assert [row[2] for row in frame["tasks"]] == ["a", "ab"]
        assert (frame["total"], frame["matching"], frame["name_count"]) == (3, 2, 2)
        frame = await client.frame("/stream?state=queued&older_than=0.01&by=name&chosen=b&name=a")
        assert [row[2] for row in frame["tasks"]] == ["ab"]
        assert [row[1] for row in frame["names"]] == ["b", "a", "ab"]
        assert (await client.frame("/stream?older_than=1000"))["tasks"] == []
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
async def test_a_task_between_two_attempts_is_shown(make_manager):
    """With the number of its last attempt and the time to the next one; between queued and running in the order."""

    async def fails():
        raise ValueError

    async with make_manager(max_concurrency=1) as manager:
        task = manager.submit(fails, name="fails", retry=Retry(on=ValueError, wait=100, max_wait=100, jitter=0))
        while manager.get_task_info()[0]["state"] != "waiting":
            await asyncio.sleep(0)
        running = manager.create_task(nap(), name="runs")
        queued = manager.create_task(nap(), name="queued")
        await asyncio.sleep(0)
        client = client_of(manager)
        frame = await client.frame("/stream?sort=state")
        assert [row[1] for row in frame["tasks"]] == ["queued", "waiting", "running"]
        assert frame["tasks"][1][8] == 1
        assert 50 < frame["tasks"][1][9] <= 100
        totals = frame["totals"]
        assert (totals["in_flight"], totals["queued"], totals["waiting"], totals["retried"]) == (3, 1, 1, 1)
        frame = await client.frame("/stream?state=waiting")
        assert [row[2] for row in frame["tasks"]] == ["fails"]
        stack = await client.get(f"/stack?id={frame['tasks'][0][0]}")
        assert "waits for its next attempt" in stack.text
        for each in (task, running, queued):
            each.cancel()
        await manager.wait_for_all()


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("sort=size", "sort must be one of age, name"),
        ("state=done", "state must be one of queued, waiting, running; got 'done'"),
        ("by=size", "by must be one of in_flight"),
        ("older_than=nan", "older_than must be a number of seconds, 0 or more; got 'nan'"),
        ("colour=red", "unknown parameter 'colour'; there are: name"),
        ("name=" + "x" * 201, "at most 200 characters"),
    ],
)
async def test_a_query_that_is_not_understood_is_refused(make_manager, query, text):
    """With 400 and a text that says why."""
    answer = await client_of(make_manager()).get(f"/stream?{query}")
    assert (answer.status, text in answer.text) == (400, True), answer.text


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("letter", ["x", "\u20ac", "\U0001f600", '"', "\x00", "\udc80"])
async def test_a_frame_is_shorter_than_50_kb(make_manager, letter):
    """Whatever the names are; each part keeps what fits."""
    async with make_manager() as manager:
        for number in range(1500):
            manager.create_task(nap(), name=f"{number}{letter * 500}", context={letter * 100: letter * 500})
        await asyncio.sleep(0)
        frame = make_frame(ManagerSource(manager, [letter * 100]), Query())
        assert 20_000 < len(frame) < 50_000
        shown = json.loads(frame)
        assert len(shown["tasks"]) > 20
        assert len(shown["names"]) > 10
        assert shown["tasks"][0][2][5] == letter
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
async def test_two_hundred_tasks_with_common_names_fit(make_manager):
    """The table is full although there are 1,000 tasks."""
    async with make_manager() as manager:
        for number in range(1000):
            manager.create_task(nap(), name=f"import_customer_orders_{number % 40}", timeout=1000)
        await asyncio.sleep(0)
        frame = make_frame(ManagerSource(manager, ()), Query())
        assert len(json.loads(frame)["tasks"]) == 200
        assert len(frame) < 50_000
        await manager.cancel_all()


async def test_progress_is_a_part_of_the_frame(make_manager):
    """Numbers of any size, and texts that would end a line of the stream."""

    async def work():
        bgtasks.progress(10**300, None, "\u2028 lines\n\n")
        await nap()

    async with make_manager() as manager:
        manager.create_task(work())
        await asyncio.sleep(0.01)
        frame = await client_of(manager).frame()
        assert frame["tasks"][0][6] == [1e300, None, "\u2028 lines\n\n"]
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
async def test_the_stack_of_a_task(make_manager):
    """The frames as text; an id that is none is refused."""
    async with make_manager() as manager:
        manager.create_task(nap(), name="nap")
        await asyncio.sleep(0)
        client = client_of(manager)
        ((task_id, *_),) = (await client.frame())["tasks"]
        shown = json.loads((await client.get(f"/stack?id={task_id}")).text)
        assert shown["name"] == "nap"
        assert shown["stack"][0].endswith("in nap")
        for bad in ("", "?id=1", "?id=1.1.1&x=1", "?id=1.1.x"):
            assert (await client.get(f"/stack{bad}")).status == 400
        await manager.cancel_all()


# -- changes -----------------------------------------------------------------------------------------------------------


@pytest.mark.loops("asyncio", "uvloop")
async def test_cancelling_says_how_many_first(make_manager):
    """Without confirmation nothing is cancelled; by id only that task is."""
    async with make_manager() as manager:
        for _ in range(3):
            manager.create_task(nap(), name="nap")
        manager.create_task(nap(), name="other")
        await asyncio.sleep(0)
        client = client_of(manager, allow_cancel=True)
        answer = await client.post("/cancel", {"name": "nap"})
        assert json.loads(answer.text) == {"matching": 3, "processes": 1, "errors": []}
        assert manager.get_task_count() == 4
        task_id = (await client.frame("/stream?name=other"))["tasks"][0][0]
        answer = await client.post("/cancel", {"id": task_id, "confirmed": True})
        assert json.loads(answer.text)["cancelled"] == 1
        answer = await client.post("/cancel", {"name": "nap", "confirmed": True})
        assert json.loads(answer.text)["cancelled"] == 3
        await manager.wait_for_all()
        assert manager.stats()["cancelled"] == 4


@pytest.mark.loops("asyncio")
async def test_it_is_read_only_by_default(make_manager):
    """The refusal says what to set; and nothing changes by GET, whatever is allowed."""
    async with make_manager() as manager:
        manager.create_task(nap(), name="nap")
        answer = await client_of(manager).post("/cancel", {"name": "nap", "confirmed": True})
        assert (answer.status, "allow_cancel=True" in answer.text) == (403, True)
        client = client_of(manager, allow_cancel=True)
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            answer = await client.request(method, "/cancel?name=nap&confirmed=true")
            assert answer.status == 405
        assert manager.stats()["cancelled"] == 0
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"id": "1.1.1", "name": "nap"}', "application/json", 400),
        (b'{"name": 5}', "application/json", 400),
        (b'{"name": "nap", "confirmed": true}', "text/plain", 415),
        (b'{"name": "' + b"x" * 5000 + b'"}', "application/json", 413),
    ],
)
async def test_a_body_that_is_not_understood_changes_nothing(make_manager, body, kind, status):
    """A form of another site cannot even send this type."""
    async with make_manager() as manager:
        manager.create_task(nap(), name="nap")
        client = client_of(manager, allow_cancel=True)
        answer = await client.request("POST", "/cancel", body=body, content_type=kind, sec_fetch_site="same-origin")
        assert answer.status == status, answer.text
        assert manager.stats()["cancelled"] == 0
        await manager.cancel_all()


# -- strangers ---------------------------------------------------------------------------------------------------------


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", "", None, "[::2]"]
)
@pytest.mark.parametrize("path", ["/", "/stream", "/stack?id=1.1.1", "/nothing"])
async def test_other_hosts_are_refused(make_manager, host, path):
    """DNS rebinding: a stranger's name leads here, for the page and for its data, with a valid token."""
    answer = await client_of(make_manager()).get(path, host=host)
    assert (answer.status, "hosts=[...]" in answer.text) == (403, True)


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "localhost.", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
async def test_the_names_of_this_machine_are_hosts_by_default(make_manager, host):
    """Others have to be named, and then these are not hosts."""
    manager = make_manager()
    assert (await client_of(manager).get("/", host=host)).status == 200
    assert (await client_of(manager, hosts=["app.example"]).get("/", host=host)).status == 403
    assert (await client_of(manager, hosts=["app.example"]).get("/", host="app.example:443")).status == 200


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    "origin",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "cross-site", "origin": "http://localhost:8000"},
        {"sec_fetch_site": None, "origin": "http://evil.example"},
        {"sec_fetch_site": None, "origin": "http://localhost:9000"},
        {"sec_fetch_site": None, "origin": "null"},
        {"sec_fetch_site": None, "origin": "http://["},
        {"sec_fetch_site": None, "origin": "ftp://localhost:8000"},
        {"sec_fetch_site": None},
    ],
    ids=str,
)
async def test_changes_from_other_sites_are_refused(make_manager, origin):
    """With the cookie of a session, as a browser would send it."""
    async with make_manager() as manager:
        manager.create_task(nap(), name="nap")
        client = Client(client_of(manager, allow_cancel=True).application)
        cookie = (await client.post("/login", {"token": TOKEN})).header("set-cookie").partition(";")[0]
        options = {"cookie": cookie, **origin}
        for path, value in (("/cancel", {"name": "nap", "confirmed": True}), ("/login", {}), ("/logout", {})):
            answer = await client.post(path, value, **options)
            assert answer.status == 403, answer.text
        assert manager.stats()["cancelled"] == 0
        same = {"sec_fetch_site": None, "origin": "http://localhost:8000"}
        assert (await client.post("/cancel", {"name": "nap"}, cookie=cookie, **same)).status == 200
        await manager.cancel_all()


@pytest.mark.loops("asyncio")
async def test_data_for_other_sites_is_refused(make_manager):
    """A script, a picture or a frame on another site gets nothing; a link to the page works."""
    client = client_of(make_manager())
    for site in ("cross-site", "same-site"):
        assert (await client.get("/stream", sec_fetch_site=site)).status == 403
        assert (await client.get("/stack?id=1.1.1", sec_fetch_site=site)).status == 403
        assert (await client.get("/", sec_fetch_site=site)).status == 200
    assert (await client.get("/stream", origin="http://evil.example")).status == 403


@pytest.mark.loops("asyncio")
async def test_strangers_get_no_data(make_manager):
    """Without the token, with a wrong one, and with a forged, a foreign or an expired cookie."""
    manager = make_manager()
    page = bgtasks.watch.app(manager, token=TOKEN, allow_cancel=True)
    client = Client(page)
    name, _, rest = (await client.post("/login", {"token": TOKEN})).header("set-cookie").partition("=")
    value = rest.partition(";")[0]
    expires, _, proof = value.partition(".")
    other = Client(bgtasks.watch.app(manager, token=TOKEN + "!"))
    foreign = (await other.post("/login", {"token": TOKEN + "!"})).header("set-cookie").partition(";")[0]
    refused = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer \xff"},
        {"cookie": f"{name}="},
        {"cookie": f"{name}={int(expires) + 1}.{proof}"},
        {"cookie": f"{name}={expires}.{'0' * 64}"},
        {"cookie": f"{name}={expires}.\xff"},
        {"cookie": f"{name}={TOKEN}"},
        {"cookie": f"{name}={foreign.partition('=')[2]}"},
        {"cookie": '; "=;;'},
    ]
    for headers in refused:
        for path in ("/stream", "/stack?id=1.1.1"):
            answer = await client.get(path, **headers)
            assert (answer.status, answer.text) == (401, "log in with the token of this page"), headers
        answer = await client.post("/cancel", {"name": "nap"}, **headers)
        assert answer.status == 401
    assert (await client.get("/stack?id=1.1.1", cookie=f"a=b; {name}={value}")).status == 400


@pytest.mark.loops("asyncio")
async def test_a_session_expires(make_manager, monkeypatch):
    """After twelve hours the cookie is worth nothing, whatever the browser thinks."""
    client = Client(bgtasks.watch.app(make_manager(), token=TOKEN))
    cookie = (await client.post("/login", {"token": TOKEN})).header("set-cookie").partition(";")[0]
    assert (await client.get("/stack?id=1.1.1", cookie=cookie)).status == 400
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 12 * 3600 + 1)
    assert (await client.get("/stack?id=1.1.1", cookie=cookie)).status == 401


@pytest.mark.loops("asyncio")
async def test_logging_in_gives_a_cookie_that_scripts_and_other_sites_cannot_use(make_manager):
    """It does not hold the token; over TLS it is secure; logging out removes it."""
    client = Client(bgtasks.watch.app(make_manager(), token=TOKEN))
    for wrong in ("", TOKEN[:-1], TOKEN + " ", "\udc80", None, 5, [TOKEN]):
        answer = await client.post("/login", {"token": wrong})
        assert (answer.status, answer.header("set-cookie")) == (401, None)
    answer = await client.post("/login", {"token": TOKEN})
    parts = answer.header("set-cookie").split("; ")
    assert parts[1:] == ["Max-Age=43200", "HttpOnly", "SameSite=Strict"]
    assert TOKEN not in answer.header("set-cookie")
    secure = await client.post("/login", {"token": TOKEN}, scope={"scheme": "https"})
    assert secure.header("set-cookie").endswith("; Secure")
    logout = await client.post("/logout", cookie=parts[0])
    assert logout.header("set-cookie").startswith(f"{parts[0].partition('=')[0]}=; Max-Age=0;")


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("cookies", ['theme={"dark": 1}; {}', "{}; a b=1", "a[0]=1; {}; {}x", "; =; {};"])
async def test_cookies_of_the_application_do_not_hide_the_session(make_manager, cookies):
    """Also those that no standard allows."""
    client = Client(bgtasks.watch.app(make_manager(), token=TOKEN))
    session = (await client.post("/login", {"token": TOKEN})).header("set-cookie").partition(";")[0]
    given = cookies.replace("{}", session)
    assert (await client.get("/stack?id=1.1.1", cookie=given)).status == 400
    assert (await client.get("/stack?id=1.1.1", cookie=given.replace(session, "none=1"))).status == 401


@pytest.mark.loops("asyncio")
async def test_a_token_may_have_any_letters(make_manager):
    """A program sends them as UTF-8."""
    token = "ein Schlüssel für die Seite"
    client = Client(bgtasks.watch.app(make_manager(), token=token))
    header = f"Bearer {token}".encode().decode("latin-1")
    assert (await client.get("/stack?id=1.1.1", authorization=header)).status == 400
    assert (await client.get("/stack?id=1.1.1", authorization=header[:-1])).status == 401


@pytest.mark.loops("asyncio")
async def test_a_token_in_a_url_is_refused(make_manager):
    """Servers log URLs."""
    answer = await client_of(make_manager()).get(f"/?token={TOKEN.replace(' ', '+')}")
    assert (answer.status, "ends in logs" in answer.text) == (400, True)


async def _yes(scope):
    return True


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    ("auth", "status"),
    [
        (lambda scope: True, 400),
        (_yes, 400),
        (lambda scope: False, 403),
        (lambda scope: None, 403),
        (lambda scope: "yes", 403),
        (lambda scope: scope["client"][0] == "10.0.0.1", 400),
    ],
)
async def test_a_function_of_the_user_decides(make_manager, auth, status):
    """Only True lets in, also from a coroutine; for the page as for its data."""
    client = Client(bgtasks.watch.app(make_manager(), auth=auth))
    scope = {"client": ("10.0.0.1", 5)}
    assert (await client.get("/stack?id=1.1.1", scope=scope)).status == status
    assert (await client.get("/", scope=scope)).status == (200 if status == 400 else 403)


@pytest.mark.loops("asyncio")
async def test_with_both_a_viewer_needs_both(make_manager):
    """The function, and the token."""
    client = Client(bgtasks.watch.app(make_manager(), auth=lambda scope: "vip" in scope, token=TOKEN))
    assert (await client.get("/stack?id=1.1.1", authorization=BEARER)).status == 403
    assert (await client.get("/stack?id=1.1.1", scope={"vip": 1})).status == 401
    assert (await client.get("/stack?id=1.1.1", scope={"vip": 1}, authorization=BEARER)).status == 400
    assert (await client.post("/login", {"token": TOKEN})).status == 403


@pytest.mark.loops("asyncio")
async def test_every_response_has_the_headers_of_a_closed_page(make_manager):
    """The policy has the hashes of the one script and the one style, and allows nothing else."""
    client = client_of(make_manager())
    answer = await client.get("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.header("content-security-policy").split(";"))
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["frame-ancestors"], policy["connect-src"]) == ("'none'", "'none'", "'self'")
    for path in ("/", "/stack?id=1.1.1", "/nothing"):
        answer = await client.get(path)
        assert answer.header("cache-control") == "no-store"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("x-frame-options") == "DENY"
        assert answer.header("cross-origin-resource-policy") == "same-origin"


def test_the_page_is_one_file_without_a_network():
    """No address in it, no attribute with a script or a style, no markup made from text."""
    html = (bgtasks.watch._page.files("bgtasks.watch") / "_page.html").read_text()
    assert re.findall(r"https?://[^\"']+", html) == ["http://www.w3.org/2000/svg"]
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", ' style="', " onclick"):
        assert banned not in html
    assert "@import" not in html
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=\"(?!data:,)", html)


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Have frames come one after another."""
    monkeypatch.setattr(_page, "INTERVAL", 0.0)


async def test_streams_end_with_the_manager(make_manager):
    """A server may wait for them before it ends; the thread ends with the last viewer."""
    manager = make_manager(default_shutdown_timeout=1)
    client = client_of(manager)
    stream = asyncio.ensure_future(client.get("/stream"))
    await asyncio.sleep(0.2)
    assert not stream.done()
    async with manager:
        pass
    answer = await asyncio.wait_for(stream, 10)
    assert answer.is_complete
    assert client.application._worker._threads is None


@pytest.mark.loops("asyncio", "eager")
async def test_streams_end_with_the_page_and_after_a_while(make_manager, monkeypatch):
    """``close()`` ends them and refuses others; a browser asks again after the longest time."""
    async with make_manager() as manager:
        client = client_of(manager)
        stream = asyncio.ensure_future(client.get("/stream"))
        await asyncio.sleep(0.2)
        client.application.close()
        assert (await asyncio.wait_for(stream, 10)).is_complete
        assert (await client.get("/stream")).status == 503
        monkeypatch.setattr(_page, "LONGEST_STREAM", 0.1)
        answer = await asyncio.wait_for(client_of(manager).get("/stream"), 10)
        assert answer.is_complete
        assert answer.text.startswith("retry: 500\n")


@pytest.mark.loops("asyncio")
async def test_streams_end_when_the_server_was_asked_to_end(make_manager):
    """A server whose handler of SIGTERM belongs to an object with ``should_exit``, as uvicorn's does."""

    class Server:
        should_exit = False

        def handle_exit(self, number, frame):
            self.should_exit = True

    server = Server()
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        async with make_manager() as manager:
            stream = asyncio.ensure_future(client_of(manager).get("/stream"))
            await asyncio.sleep(0.2)
            assert not stream.done()
            signal.raise_signal(signal.SIGTERM)
            assert (await asyncio.wait_for(stream, 10)).is_complete
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_viewer_that_leaves_ends_its_stream(make_manager, quick):
    """By the message of the server, or by the error that sending raises."""
    async with make_manager() as manager:
        client = client_of(manager)
        await client.get("/stream", until=lambda answer: answer.frames)
        assert client.application._streams == 0

        async def send(message):
            raise ConnectionResetError

        async def receive():
            await asyncio.sleep(60)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/stream",
            "headers": [(b"host", b"localhost"), (b"authorization", BEARER.encode())],
        }
        await asyncio.wait_for(client.application(scope, receive, send), 10)
        assert client.application._streams == 0


@pytest.mark.loops("asyncio")
async def test_a_frame_that_cannot_be_made_is_an_error(make_manager, monkeypatch):
    """It is not taken for the error of a server whose viewer is gone."""

    def make_frame(source, query):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(_page, "make_frame", make_frame)
    answer = await client_of(make_manager()).get("/stream")
    assert (answer.status, answer.text) == (400, "the frame cannot be made: [Errno 24] Too many open files")


@pytest.mark.loops("asyncio")
async def test_there_are_at_most_twenty_streams(make_manager, monkeypatch):
    """The next viewer is refused."""
    monkeypatch.setattr(_page, "MOST_STREAMS", 2)
    async with make_manager() as manager:
        client = client_of(manager)
        streams = [asyncio.ensure_future(client.get("/stream")) for _ in range(2)]
        await asyncio.sleep(0.1)
        answer = await client.get("/stream")
        assert (answer.status, answer.text) == (503, "2 viewers look already")
        client.application.close()
        await asyncio.gather(*streams)


@pytest.mark.loops("asyncio")
async def test_a_frame_that_says_nothing_new_is_not_sent_again(make_manager, quick):
    """Only that the server still answers."""
    async with make_manager() as manager:
        same = b"event: same\ndata:\n\n"
        answer = await client_of(manager).get("/stream", until=lambda answer: answer.body.count(same) >= 3)
        assert len(answer.frames) == 1


@pytest.mark.loops("asyncio")
async def test_frames_keep_memory_flat(make_manager):
    """Hundreds while tasks come and go; the benchmark of watching makes those of an hour."""
    async with make_manager() as manager:
        for number in range(5):
            manager.create_task(nap(), name=f"nap {number}")
        source = ManagerSource(manager, ())

        async def frames(count):
            for number in range(count):
                manager.create_task(asyncio.sleep(0), name=f"short {number % 5}")
                json.loads(make_frame(source, Query()))
                await asyncio.sleep(0)

        await frames(100)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        await frames(600)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert grown < 50_000
        await manager.cancel_all()


async def test_the_lifespan_of_a_page_that_a_server_runs_itself(make_manager):
    """It starts, and closes the page at the end; a websocket is closed."""
    page = bgtasks.watch.app(make_manager(), token=TOKEN)
    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message["type"])

    await page({"type": "lifespan"}, receive, send)
    await page({"type": "websocket"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
    assert (await Client(page).get("/")).status == 503


# -- the processes of the user -----------------------------------------------------------------------------------------


def test_a_process_that_hangs_does_not_hold_up_the_others(monkeypatch, tmp_path):
    """It is not asked again while it has not answered."""
    hangs = threading.Event()
    asked = []

    def ask(path, do, **request):
        asked.append(path.stem)
        if path.stem == "1":
            hangs.wait(60)
        return {"pid": int(path.stem)}

    monkeypatch.setattr(_page_source, "PATIENCE", 0.3)
    monkeypatch.setattr(_viewer, "ask", ask)
    monkeypatch.setattr(_page_source, "sockets", lambda: {1: tmp_path / "1.sock", 2: tmp_path / "2.sock"})
    source = ProcessesSource(None)
    for _ in range(2):
        assert source.ask("names") == ([{"pid": 2}], ["process 1 does not answer"])
    assert asked.count("1") == 1
    hangs.set()
    deadline = time.monotonic() + 10
    while source.ask("names")[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.ask("names") == ([{"pid": 1}, {"pid": 2}], [])
    only = ProcessesSource(1)
    assert only.ask("names") == ([{"pid": 1}], [])
    with pytest.raises(WatchError, match=re.escape("task 2.1.1 is not one of process 1")):
        only.ask("stack", id="2.1.1")


def test_no_process_is_an_error_in_the_frame(monkeypatch):
    """The page says what to do, and goes on looking."""
    monkeypatch.setattr(_page_source, "sockets", dict)
    frame = json.loads(_page_frames.make_frame(ProcessesSource(None), Query()))
    assert frame["errors"] == ["no process of yours is watched: start one with BGTASKS_WATCH=1, or pass watch=True"]
    frame = json.loads(_page_frames.make_frame(ProcessesSource(7), Query()))
    assert frame["errors"] == ["process 7 is not watched"]

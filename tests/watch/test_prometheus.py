"""The collector: every figure, exact buckets, no series per task; read by promtool and a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import pytest
from asgi import Client
from loops import VirtualLoop
from paths import ROOT
from requirements import need, need_program
from servers import free_port
from watched import Swallow, run_everything
from work import forever, value

from bgtasks import BUCKET_EDGES, InvalidOptionError, Restart, Retry
from bgtasks.events import Fanout, Publisher

need("prometheus_client")
from prometheus_client import CollectorRegistry, Counter, generate_latest, start_http_server  # noqa: E402

from bgtasks.watch.prometheus import OCTAVES, Collector, metrics_app, render  # noqa: E402

NAMES = ("orders", "orders (2)", "mails")


def exported(*collectors):
    """Return what Prometheus reads."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry).decode()


def samples(text):
    """Return the samples: name with labels -> value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(number) for name, _, number in lines}


async def test_figures_are_those_of_stats(make_manager):
    """Counters by name and outcome, gauges, events."""
    manager = make_manager(max_concurrency=1)
    publisher = await run_everything(manager)
    waiting = [manager.create_task(forever(), name="live") for _ in range(2)]
    await asyncio.sleep(0)
    found = samples(exported(Collector(manager, publishers=[publisher])))
    assert found['bgtasks_tasks_started_total{manager="default",name="ok"}'] == 1
    assert found['bgtasks_tasks_finished_total{manager="default",name="bad",outcome="failed"}'] == 1
    assert found['bgtasks_tasks_finished_total{manager="default",name="bad",outcome="completed"}'] == 0
    assert found['bgtasks_tasks_running{manager="default"}'] == found['bgtasks_tasks_queued{manager="default"}'] == 1
    assert found['bgtasks_task_oldest_age_seconds{manager="default",name="live"}'] > 0
    assert found['bgtasks_task_duration_seconds_count{manager="default",name="ok"}'] == 1
    assert found['bgtasks_task_wait_seconds_bucket{le="+Inf",manager="default",name="ok"}'] == 1
    assert found['bgtasks_loop_blocks_total{manager="default"}'] == 0
    assert found['bgtasks_loop_lag_seconds_count{manager="default"}'] >= 1
    assert found['bgtasks_events_delivered_total{publisher="orders"}'] == 1
    assert found['bgtasks_events_lag_seconds_count{publisher="orders"}'] == 1
    assert found['bgtasks_events_refused_total{publisher="orders",reason="closed"}'] == 1
    assert found['bgtasks_events_state{publisher="orders",state="closed"}'] == 1
    assert len(waiting) == 2
    await manager.shutdown()


async def test_attempts_have_figures(make_manager):
    """A gauge of the tasks between two attempts, which do not run; counters of attempts and of services given up."""

    async def fails():
        raise ValueError

    manager = make_manager()
    manager.submit(fails, retry=Retry(on=ValueError, wait=100, jitter=0))
    service = manager.service(fails, restart=Restart(max=1, wait=0))
    while manager.services() or not manager.stats()["waiting"]:
        await asyncio.sleep(0)
    assert service.state == "given_up"
    found = samples(exported(Collector(manager)))
    assert found['bgtasks_tasks_waiting{manager="default"}'] == 1
    assert found['bgtasks_tasks_running{manager="default"}'] == 0
    assert found['bgtasks_tasks_retried_total{manager="default"}'] == 2
    assert found['bgtasks_services_given_up_total{manager="default"}'] == 1
    await manager.shutdown()


@pytest.mark.parametrize("buckets", [OCTAVES, BUCKET_EDGES, BUCKET_EDGES[100:300:7]])
def test_counts_at_the_edges_are_exact(make_manager, buckets):
    """Each edge counts exactly the durations below it; the last count and the sum are those of all."""
    manager = make_manager()
    durations = [1.31**exponent for exponent in range(-35, 60)]

    async def main():
        for seconds in durations:
            manager.create_task(asyncio.sleep(seconds), name="a")
        await manager.wait_for_all()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    found = samples(exported(Collector(manager, buckets=buckets)))
    counted = manager.histograms()["a"]["duration"]
    for edge in buckets:
        below = sum(count for bucket, count in counted["buckets"] if BUCKET_EDGES[bucket] <= edge)
        name = f'bgtasks_task_duration_seconds_bucket{{le="{edge!r}",manager="default",name="a"}}'
        assert found[name] == below or edge == BUCKET_EDGES[-1]
    everything = found['bgtasks_task_duration_seconds_bucket{le="+Inf",manager="default",name="a"}']
    assert everything == len(durations) == counted["count"]
    total = found['bgtasks_task_duration_seconds_sum{manager="default",name="a"}']
    assert total == pytest.approx(counted["sum_seconds"])


async def test_two_managers_are_in_one_registry(make_manager):
    """Each has a label of its own."""
    managers = [make_manager(), make_manager()]
    for manager in managers:
        manager.create_task(value(), name="a")
        await manager.wait_for_all()
    found = samples(exported(*(Collector(each, manager=name) for name, each in zip("xy", managers, strict=True))))
    assert [found[f'bgtasks_tasks_started_total{{manager="{name}",name="a"}}'] for name in "xy"] == [1, 1]


async def test_names_beyond_a_thousand_share_one_series(make_manager):
    """A name per task does not make a series per task."""
    manager = make_manager()
    for number in range(1200):
        manager.create_task(forever(), name=str(number))
    await asyncio.sleep(0)
    text = exported(Collector(manager, buckets=OCTAVES[:1]))
    for metric in ("bgtasks_tasks_started_total", "bgtasks_task_oldest_age_seconds"):
        assert len(re.findall(rf"^{metric}{{", text, re.MULTILINE)) == 1001
    assert samples(text)['bgtasks_tasks_started_total{manager="default",name="(other)"}'] == 200
    await manager.shutdown()


@pytest.mark.parametrize("buckets", [OCTAVES, BUCKET_EDGES[100:300:7], ()], ids=len)
async def test_rendered_text_is_that_of_a_registry(make_manager, buckets):
    """Every sample, help text and type, also for names with characters that the format escapes."""
    manager = make_manager(max_concurrency=2)
    publisher = await run_everything(manager)
    for name in ('a"b', "back\\slash", "two\n\nlines", "50 %s", "", "(other)", "\N{SNOWMAN}"):
        await manager.create_task(value(), name=name)
    live = manager.create_task(forever(), name='a"b')
    collector = Collector(manager, manager='x"%d\n\\', publishers=[publisher], buckets=buckets)
    rendered, expected = render(collector, registry=None).decode(), exported(collector)
    found, samples_expected = samples(rendered), samples(expected)
    ages = [sample for sample in found if "age_seconds" in sample]
    assert len(ages) >= 2
    for sample in ages:
        assert found.pop(sample) == pytest.approx(samples_expected.pop(sample), abs=1)
    # A heartbeat may come between both.
    for figures in (found, samples_expected):
        for sample in [sample for sample in figures if "loop_lag" in sample]:
            del figures[sample]
    assert found == samples_expected
    comments = [{line for line in text.splitlines() if line.startswith("#")} for text in (rendered, expected)]
    assert comments[0] == comments[1]
    assert live.cancel()
    await manager.shutdown()


async def test_a_page_has_the_registry_and_several_collectors(make_manager):
    """Each metric has its comments once; the label says whose figures they are."""
    managers = [make_manager(), make_manager()]
    for manager in managers:
        await manager.create_task(value(), name="a")
    registry = CollectorRegistry()
    Counter("requests", "Requests.", registry=registry).inc()
    collectors = [Collector(each, manager=name) for name, each in zip("xy", managers, strict=True)]
    text = render(*collectors, registry=registry).decode()
    found = samples(text)
    assert found["requests_total"] == 1
    for name in "xy":
        assert found[f'bgtasks_tasks_started_total{{manager="{name}",name="a"}}'] == 1
        assert found[f'bgtasks_tasks_running{{manager="{name}"}}'] == 0
    comments = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(comments) == len(set(comments)) > 8
    assert found.keys() - samples(exported(*collectors)).keys() == {"requests_total", "requests_created"}
    assert "python_info" in render().decode(), "the default is prometheus_client's own registry"


async def test_a_page_refuses_figures_that_would_be_there_twice(make_manager):
    """A collector that is registered, too, and two with one label."""
    registry = CollectorRegistry()
    collector = Collector(make_manager())
    registry.register(collector)
    with pytest.raises(InvalidOptionError, match="already: either register it there, or pass it"):
        render(Collector(make_manager(), manager="other"), registry=registry)
    for make in (render, metrics_app):
        with pytest.raises(InvalidOptionError, match="two collectors have manager='default'"):
            make(collector, Collector(make_manager()))
        with pytest.raises(InvalidOptionError, match="must be Collectors of bgtasks; got <Background"):
            make(make_manager())


async def test_the_application_answers_from_a_thread(make_manager):
    """It has the text and its type, for GET and HEAD alone; the loop goes on meanwhile."""
    manager = make_manager()
    await manager.create_task(value(), name="a")
    threads = []

    class Other:
        def describe(self):
            return []

        def collect(self):
            threads.append(threading.current_thread())
            return []

    registry = CollectorRegistry()
    registry.register(Other())
    client = Client(metrics_app(Collector(manager), registry=registry))
    answers = await asyncio.gather(client.get("/metrics"), client.get("/"))
    for answer in answers:
        assert answer.status == 200
        assert samples(answer.text)['bgtasks_tasks_started_total{manager="default",name="a"}'] == 1
        assert answer.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"
        assert int(answer.header("content-length")) == len(answer.body)
    head = await client.request("HEAD", "/")
    assert (head.status, head.body) == (200, b"")
    assert int(head.header("content-length")) == len(answers[0].body)
    post = await client.post("/")
    assert (post.status, post.header("allow")) == (405, "GET, HEAD")
    with pytest.raises(InvalidOptionError, match="metrics are read by HTTP; got lifespan"):
        await client.get("/", scope={"type": "lifespan"})
    assert len(threads) == 3
    assert threading.current_thread() not in threads
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


async def test_a_fanout_has_a_series_for_each_of_its_publishers(make_manager):
    """Two of one name are told apart."""
    manager = make_manager()
    publishers = [Publisher(Swallow(), name=name) for name in ("orders", "orders", "mails")]
    async with Fanout(publishers[:2]) as fanout, publishers[2] as mails:
        fanout.emit({"number": 1})
        await fanout.flush()
        text = render(Collector(manager, publishers=[fanout, mails]), registry=None).decode()
    found = samples(text)
    delivered = {name: found[f'bgtasks_events_delivered_total{{publisher="{name}"}}'] for name in NAMES}
    assert delivered == {"orders": 1, "orders (2)": 1, "mails": 0}


async def test_any_name_can_be_exported(make_manager):
    """One with a lone surrogate, as in names of files, does not keep the others from being scraped."""
    manager = make_manager()
    publisher = Publisher(Swallow(), name="p\udcff")
    for name in ("ok", "file \udcff"):
        manager.create_task(value(), name=name)
    manager.create_task(forever(), name="live \udcff")
    await asyncio.sleep(0)
    collector = Collector(manager, manager="m\udcff", publishers=[publisher])
    for text in (exported(collector), render(collector, registry=None).decode()):
        found = samples(text)
        assert found[r'bgtasks_tasks_started_total{manager="m\\udcff",name="file \\udcff"}'] == 1
        assert found[r'bgtasks_task_oldest_age_seconds{manager="m\\udcff",name="live \\udcff"}'] > 0
        assert found[r'bgtasks_events_queued{publisher="p\\udcff"}'] == 0
    await publisher.close()
    await manager.shutdown()


@pytest.mark.parametrize(
    ("managed", "options", "text"),
    [
        (object(), {}, "manager must be a BackgroundTaskManager; got <object"),
        (None, {"manager": 5}, "manager is the text of a label; got 5"),
        (None, {"publishers": 5}, r"publishers must be a list such as \[publisher\]; got 5"),
        (None, {"publishers": ["orders"]}, r"publishers must be a list such as \[publisher\]; got \['orders'\]"),
    ],
)
def test_arguments_are_checked(make_manager, managed, options, text):
    """When the collector is made, not when Prometheus scrapes."""
    with pytest.raises(InvalidOptionError, match=text):
        Collector(managed or make_manager(), **options)


@pytest.mark.parametrize("buckets", [[0.1], [OCTAVES[1], OCTAVES[0]], [OCTAVES[0], OCTAVES[0]], ["1"]])
def test_buckets_must_be_edges(make_manager, buckets):
    """Between the edges no exact count exists."""
    with pytest.raises(InvalidOptionError, match=r"buckets must (be taken from bgtasks.BUCKET_EDGES|ascend)"):
        Collector(make_manager(), buckets=buckets)


async def test_promtool_finds_nothing_wrong(make_manager):
    """Names, units, help texts and types follow the conventions."""
    promtool = need_program("promtool")
    manager = make_manager()
    publisher = await run_everything(manager)
    collector = Collector(manager, publishers=[publisher])
    registry = CollectorRegistry()
    other = Collector(make_manager(), manager="other")
    Counter("requests", "Requests.", registry=registry).inc()
    for text in (exported(collector), render(collector, registry=registry).decode(), render(collector, other).decode()):
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    await manager.shutdown()


@pytest.mark.loops("asyncio")
async def test_a_prometheus_scrapes_it(make_manager, tmp_path):
    """A real server answers queries about a FastAPI application on uvicorn, and about a registry."""
    prometheus = need_program("prometheus")
    fastapi, uvicorn = need("fastapi"), need("uvicorn")
    manager = make_manager()
    publisher = await run_everything(manager)
    registry = CollectorRegistry()
    registry.register(Collector(manager, publishers=[publisher]))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    app = fastapi.FastAPI()
    app.mount("/metrics", metrics_app(Collector(manager, publishers=[publisher])))
    web = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning", lifespan="off"))
    serving = asyncio.ensure_future(web.serve())
    targets = {"registry": server.server_port, "app": web.config.port}
    jobs = [f"{{job_name: {job}, static_configs: [{{targets: ['127.0.0.1:{at}']}}]}}" for job, at in targets.items()]
    config = tmp_path / "prometheus.yml"
    config.write_text(f"global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}\nscrape_configs: [{', '.join(jobs)}]")
    port = free_port()
    options = (f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}")
    process = subprocess.Popen(
        [prometheus, *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
    )
    try:
        for job in targets:
            name = f'name="ok",job="{job}"'
            query = f"histogram_quantile(0.5, bgtasks_task_duration_seconds_bucket{{{name}}})"
            result = await asyncio.to_thread(ask, port, query)
            assert float(result[0]["value"][1]) <= OCTAVES[-1]
            started = await asyncio.to_thread(ask, port, f"bgtasks_tasks_started_total{{{name}}}")
            assert started[0]["value"][1] == "1"
    finally:
        process.terminate()
        process.wait()
        web.should_exit = True
        await serving
        server.shutdown()
        server.server_close()
        thread.join()
    await manager.shutdown()


def ask(port, query):
    """Ask a Prometheus until it has an answer."""
    deadline = time.monotonic() + 40
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                result = json.load(response)["data"]["result"]
        except OSError:
            result = []
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError("no answer")


async def test_the_dashboard_uses_metrics_that_exist(make_manager):
    """Every metric and label of the Grafana dashboard is exported."""
    manager = make_manager()
    publisher = await run_everything(manager)
    manager.create_task(forever(), name="live")
    text = exported(Collector(manager, publishers=[publisher]))
    dashboard = json.loads((ROOT / "examples" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    used = set().union(*(re.findall(r"bgtasks_\w+", query) for query in queries))
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | {name.partition("{")[0] for name in samples(text)}
    assert len(queries) >= 12
    assert used - names == set()
    labels = set().union(*(re.findall(r"by \(([^)]*)\)", query) for query in queries))
    assert {label.strip() for each in labels for label in each.split(",")} <= set(re.findall(r"(\w+)=\"", text))
    await manager.shutdown()

"""Events of real agentflow and 10xGraph graphs through our publishers, into Redis and elsewhere."""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid

import pytest
from arrivals import in_redis
from event_tools import assert_counters_add_up
from frameworks import FRAMEWORKS, clean_containers, graph_of, installed_in, needed, question, recording_publisher
from paths import SUPPORT
from requirements import need

from bgtasks import InvalidOptionError
from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.sinks.publish import PublishSink
from bgtasks.events.sinks.redis import RedisSink
from bgtasks.integrations import agentflow

need("msgspec")
need("redis")

# The frameworks and InjectQ use parts of asyncio that newer Pythons deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(injectq|agentflow|tenxgraph)")

# The events of a run of three nodes: of the graph or of a node, and of which type.
START = ["graph start", "graph update", "graph progress"]
OF_A_NODE = ["graph progress", "node start", "node start", "node progress", "node end", "node end"]
STEP = [*OF_A_NODE, "graph update", "graph update"]
NODES = ["__start__", "plan", "act", "report"]
# The graph's first step begins without an update, and its last one ends with the run.
RUN = [*START, *STEP * len(NODES), "graph end", "graph end"]


@pytest.fixture(params=FRAMEWORKS)
def framework(request, queue_of_twin):
    """Give each framework that is installed, with a container for the test alone and the event queue of the twin."""
    framework = needed(request.param)
    with clean_containers():
        yield framework


@pytest.fixture
def installed(framework, twin):
    """Give the framework with our manager installed."""
    with installed_in(framework.name, twin):
        yield framework


@pytest.fixture
def key():
    """Give a name in Redis that no other test has."""
    return f"events:{uuid.uuid4().hex}"


async def plan(state, config):
    """Return at once."""
    return state


async def act(state, config):
    """Suspend once."""
    await asyncio.sleep(0)
    return state


async def report(state, config):
    """Wait for another thread."""
    await asyncio.to_thread(time.sleep, 0)
    return state


def compiled(framework, inner):
    """Return an application of three nodes; only its publisher differs from the framework's manual."""
    return graph_of(framework, plan, act, report, publisher=agentflow.publisher(inner, framework.name)).compile()


def run(program, *arguments, **environment):
    """Run a program in its own interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def phases(events):
    """Return the phases of encoded events, in their order."""
    return [f"{event['event'].removesuffix('_execution')} {event['event_type']}" for event in map(json.loads, events)]


def nodes(events):
    """Return the names of the nodes of events, without repetitions in a row."""
    names = [event["node_name"] for event in map(json.loads, events) if event["event"] == "node_execution"]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


# -- into Redis -----------------------------------------------------------------------------------------------------


async def test_events_arrive_complete_and_in_order_without_install(framework, redis_server, key):
    """The framework starts a task per event; events arrive in that order, each with its own time."""
    inner = Publisher(RedisSink(redis_server.url, key=key))
    app = compiled(framework, inner)
    await app.ainvoke(question(framework), {"thread_id": "thread"})
    await app._task_manager.wait_for_all(timeout=20)
    report = await app.aclose()
    assert report["publisher"]["status"] == "completed"
    events = in_redis(redis_server.url, key)
    assert len(events) == len(RUN)
    assert nodes(events) == NODES
    times = [json.loads(event)["timestamp"] for event in events]
    assert times == sorted(times)
    assert len(set(times)) > len(times) // 2
    assert_counters_add_up(inner.stats())


async def test_events_arrive_complete_and_in_order_with_install(installed, redis_server, key):
    """Every event arrives as it was published, without a task for each; aclose() waits for the last one."""
    inner = Publisher(RedisSink(redis_server.url, key=key))
    app = compiled(installed, inner)
    for number in range(5):
        await app.ainvoke(question(installed), {"thread_id": f"thread {number}"})
    assert [task["name"] for task in app._task_manager.get_task_info()] == ["publisher RedisSink"]
    report = await app.aclose()
    assert report["background_tasks"]["status"] == report["publisher"]["status"] == "completed"
    events = in_redis(redis_server.url, key)
    assert phases(events) == RUN * 5
    assert nodes(events) == NODES * 5
    assert {json.loads(event)["thread_id"] for event in events} == {f"thread {number}" for number in range(5)}
    assert [json.loads(event)["thread_id"][-1] for event in events] == sorted("01234" * len(RUN))
    assert app._task_manager.stats()["started"] == 1
    assert_counters_add_up(inner.stats())


@pytest.mark.parametrize("how", ["alone", "installed"])
def test_sync_invokes_lose_no_event(framework, twin, redis_server, key, how):
    """Each runs its own loop and leaves an empty queue; sync_close() closes without any loop."""
    inner = Publisher(RedisSink(redis_server.url, key=key))
    with clean_containers() if how == "alone" else installed_in(framework.name, twin):
        app = compiled(framework, inner)
        for number in range(3):
            app.invoke(question(framework), {"thread_id": f"thread {number}"})
        app._publisher.sync_close()
    events = in_redis(redis_server.url, key)
    assert len(events) == 3 * len(RUN)
    assert nodes(events) == NODES * 3
    assert inner.stats()["state"] == "closed"
    app._publisher.sync_close()


# -- encoding -----------------------------------------------------------------------------------------------------


async def test_an_event_is_encoded_when_it_is_published(framework):
    """Later changes have no effect on it; the event object is not changed, and only its time is added."""
    inner = Publisher(MemorySink())
    publisher = agentflow.publisher(inner, framework.name)
    assert isinstance(publisher, framework.publisher.BasePublisher)
    event = framework.events.EventModel(event="streaming", event_type="start", data={"tokens": [1]}, thread_id=7)
    other = framework.events.EventModel(event="streaming", event_type="end", timestamp=12.5)
    was = event.timestamp
    begun = time.time()
    assert await publisher.publish(event)
    event.data["tokens"].append(2)
    event.event_type = framework.events.EventType.END
    assert publisher.emit(event)
    assert publisher.emit(other)
    assert publisher.emit({"event": "of the program"})
    assert event.timestamp == was
    async with publisher:
        pass
    first, second, third, fourth = map(json.loads, inner.sink.events)
    assert begun <= first.pop("timestamp") <= second.pop("timestamp") <= time.time()
    whole = json.loads(event.model_dump_json(exclude={"timestamp"}))
    assert second == whole
    assert first == whole | {"event_type": "start", "data": {"tokens": [1]}}
    assert third == json.loads(other.model_dump_json())
    assert fourth == {"event": "of the program"}


async def test_an_event_that_cannot_be_encoded_is_refused_and_stops_no_graph(installed, caplog):
    """The event is counted with its reason; the run continues."""
    inner = Publisher(MemorySink())
    app = compiled(installed, inner)
    event = installed.events.EventModel(event="streaming", event_type="start", data={"handle": object()})
    installed.publisher.publish_event(event)
    await app.ainvoke(question(installed), {"thread_id": "thread"})
    await app.aclose()
    assert inner.stats()["refused"] == {"encode": 1}
    assert len(inner.sink.events) == len(RUN)
    assert "1 (encode 1) refused" in caplog.text
    assert "EventModel cannot be encoded" in caplog.text


# -- install and uninstall ------------------------------------------------------------------------------------------


def test_install_replaces_publish_event_wherever_it_was_imported(framework, twin):
    """Modules of the framework and of the program have our function, with the same defaults, until uninstall."""
    original = framework.publish.publish_event

    def holders():
        current = framework.publish.publish_event
        return {name for name, module in sys.modules.items() if vars(module).get("publish_event") is current}

    before = holders()
    assert len(before) > 5
    with installed_in(framework.name, twin):
        assert framework.publish.publish_event is not original
        assert framework.publish.publish_event.__defaults__ is original.__defaults__
        assert holders() == before
    assert framework.publish.publish_event is original
    assert holders() == before


async def test_other_publishers_get_their_events_from_tasks(installed):
    """The framework's own publishers get events as before, and so does our publisher in a list with one."""
    alone, first, inner = recording_publisher(installed), recording_publisher(installed), Publisher(MemorySink())
    app = graph_of(installed, plan, act, report, publisher=alone).compile()
    await app.ainvoke(question(installed), {"thread_id": "thread"})
    await app._task_manager.wait_for_all(timeout=20)
    assert len(alone.events) == app._task_manager.stats()["started"] == len(RUN)
    app = graph_of(
        installed, plan, act, report, publisher=[first, agentflow.publisher(inner, installed.name)]
    ).compile()
    await app.ainvoke(question(installed), {"thread_id": "thread"})
    await app._task_manager.wait_for_all(timeout=20)
    await app.aclose()
    assert len(alone.events) == len(first.events) == len(inner.sink.events) == len(RUN)


async def test_each_graph_publishes_into_its_own_publisher(installed):
    """The container gives the publisher of the newest graph, although InjectQ alone would keep the first one."""
    for number in range(3):
        sink = MemorySink()
        other = recording_publisher(installed)
        publisher = other if number == 1 else agentflow.publisher(Publisher(sink), installed.name)
        app = graph_of(installed, plan, act, report, publisher=publisher).compile()
        await app.ainvoke(question(installed), {"thread_id": f"thread {number}"})
        await app._task_manager.wait_for_all(timeout=20)
        await app.aclose()
        assert len(other.events if number == 1 else sink.events) == len(RUN)


# -- the end --------------------------------------------------------------------------------------------------------


async def test_sync_close_on_a_running_loop_leaves_the_closing_to_the_loop(framework):
    """It returns at once; accepted events are delivered."""
    inner = Publisher(MemorySink(), linger=60)
    publisher = agentflow.publisher(inner, framework.name)
    assert publisher.emit({"event": "last"})
    publisher.sync_close()
    await publisher.close()
    assert inner.sink.events == [b'{"event":"last"}']
    assert not publisher.emit({"event": "too late"})
    assert inner.stats()["refused"] == {"closed": 1}


async def test_sync_close_in_another_thread_waits_for_the_loop_of_the_publisher(framework):
    """The queue is emptied on the publisher's loop before the call returns."""
    inner = Publisher(MemorySink(), linger=60)
    publisher = agentflow.publisher(inner, framework.name)
    assert publisher.emit({"event": "last"})
    await asyncio.to_thread(publisher.sync_close)
    assert inner.sink.events == [b'{"event":"last"}']
    assert inner.stats()["state"] == "closed"


def test_a_program_that_closes_nothing_loses_no_event(framework, twin, tmp_path):
    """Events of a sync invoke are in the file when the process has ended."""
    program = """
import sys
sys.path.insert(0, sys.argv[3])
from frameworks import graph_of, needed, question
from bgtasks.events import Publisher
from bgtasks.events.sinks.jsonl import JsonlSink
from bgtasks.integrations import agentflow

def node(state, config):
    return state

framework = needed(sys.argv[1])
agentflow.install(framework.name)
publisher = agentflow.publisher(Publisher(JsonlSink(sys.argv[2])), framework.name)
app = graph_of(framework, node, publisher=publisher).compile()
app.invoke(question(framework), {"thread_id": "thread"})
publisher.emit({"event": "after the loop"})
"""
    path = tmp_path / "events.jsonl"
    done = run(program, framework.name, str(path), str(SUPPORT), BGTASKS_IMPLEMENTATION=twin)
    assert done.returncode == 0, done.stderr
    events = path.read_bytes().splitlines()
    assert phases(events[:-1]) == [*START, *STEP * 2, "graph end", "graph end"]
    assert events[-1] == b'{"event":"after the loop"}'


# -- bad input ------------------------------------------------------------------------------------------------------


def test_only_publishers_of_bytes_are_accepted(framework):
    """The error says what is needed, and shows what was given."""
    other = recording_publisher(framework)
    around = agentflow.publisher(Publisher(MemorySink()), framework.name)
    for wrong in (other, None, RedisSink, MemorySink(), Publisher(PublishSink(other)), around):
        with pytest.raises(InvalidOptionError, match=r"takes a publisher of bgtasks\.events whose sink takes bytes"):
            agentflow.publisher(wrong, framework.name)
    with pytest.raises(InvalidOptionError, match="framework must be one of"):
        agentflow.publisher(Publisher(MemorySink()), "langgraph")


def test_the_framework_has_to_be_named_if_two_are_imported(monkeypatch, framework):
    """If only one is imported, that one is meant."""
    monkeypatch.setattr(agentflow, "_found", lambda: list(FRAMEWORKS))
    for name in FRAMEWORKS:
        monkeypatch.setitem(sys.modules, name, sys.modules[framework.name])
    with pytest.raises(InvalidOptionError, match="pass the one to use, framework="):
        agentflow.publisher(Publisher(MemorySink()))
    monkeypatch.delitem(sys.modules, next(name for name in FRAMEWORKS if name != framework.name))
    assert isinstance(agentflow.publisher(Publisher(MemorySink())), framework.publisher.BasePublisher)


def test_without_the_framework_the_error_says_what_to_install():
    """The error has the command that installs the missing extra."""
    program = """
import sys
sys.modules["agentflow"] = sys.modules["tenxgraph"] = None
from bgtasks.integrations import agentflow
try:
    agentflow.publisher(object(), "tenxgraph")
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = run(program)
    assert 'pip install "bgtasks-registry[tenxgraph]"' in done.stdout, done.stderr

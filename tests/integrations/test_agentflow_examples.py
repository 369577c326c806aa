"""The examples of the frameworks' manual for background tasks, run in real graphs with our manager."""

import asyncio
import io
import logging
import time

import pytest
from frameworks import FRAMEWORKS, clean_containers, graph_of, installed_in, needed, question, recording_publisher
from work import after, forever, until

from bgtasks import NotACoroutineError
from bgtasks.integrations import _agentflow_graphs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(injectq|agentflow|tenxgraph)")

CONFIG = {"thread_id": "thread 1", "user_id": "ada", "run_id": "run 1"}


@pytest.fixture(params=FRAMEWORKS)
def framework(request, twin):
    """Give each framework that is installed, with our manager installed."""
    framework = needed(request.param)
    with clean_containers(), installed_in(framework.name, twin):
        yield framework


def state_with_data(framework):
    """Return a state class with the field ``data`` that the manual's nodes read."""
    from pydantic import Field

    class Order(framework.state.AgentState):
        data: dict = Field(default_factory=dict)

    return Order


# -- in a node ------------------------------------------------------------------------------------------------------


async def test_the_quick_start(framework):
    """With a bare parameter the caller has the reply before the notification is sent."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    notified, may_end = [], asyncio.Event()

    async def send_notification(user_id: str, text: str) -> None:
        await may_end.wait()
        notified.append((user_id, text))

    async def my_node(state, config: dict, task_manager: BackgroundTaskManager):
        state.context.append(framework.state.Message.text_message("It is being worked on.", role="assistant"))
        task_manager.create_task(
            send_notification(config.get("user_id", "anon"), "It is ready soon"), name="send_notification", timeout=10.0
        )
        return state

    app = graph_of(framework, my_node).compile()
    answer = await app.ainvoke(question(framework), CONFIG)
    assert [message.text() for message in answer["messages"]][-1] == "It is being worked on."
    assert notified == []
    (info,) = app._task_manager.get_task_info()
    assert (info["name"], info["timeout"]) == ("send_notification", 10.0)
    may_end.set()
    await app._task_manager.wait_for_all()
    assert notified == [("ada", "It is ready soon")]
    await app.aclose()


async def test_a_node_with_an_inject_default(framework):
    """The default gives the manager; name and context are those of the task."""
    from injectq import Inject

    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    processed, may_end = [], asyncio.Event()

    async def my_background_work(data: str):
        await may_end.wait()
        processed.append(data)

    async def my_node(state, config: dict, task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]):
        task_manager.create_task(
            my_background_work(state.data.get("input", "")),
            name="process_data",
            context={"thread_id": config.get("thread_id")},
        )
        (info,) = task_manager.get_task_info()
        assert (info["name"], info["context"]) == ("process_data", {"thread_id": "thread 1"})
        return state

    state = state_with_data(framework)(data={"input": "tea"})
    app = graph_of(framework, my_node, state=state).compile()
    await app.ainvoke(question(framework), CONFIG)
    assert processed == []
    may_end.set()
    await app._task_manager.wait_for_all()
    assert processed == ["tea"]
    await app.aclose()


async def test_publishing_an_event_through_injection(framework):
    """A function with defaults for publisher and manager publishes without a wait."""
    from injectq import Inject

    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    BasePublisher, events = framework.publisher.BasePublisher, framework.events  # noqa: N806
    log = logging.getLogger("shop")
    publisher = recording_publisher(framework)

    async def publish_event_task(event, publisher) -> None:
        if publisher:
            try:
                await publisher.publish(event)
            except Exception:
                log.exception("Publishing failed")

    def publish_event(
        event,
        publisher: BasePublisher | None = Inject[BasePublisher],
        task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager],
    ) -> None:
        task_manager.create_task(
            publish_event_task(event, publisher),
            name="publish_event",
            context={"event": event.event, "thread_id": event.thread_id},
        )

    async def my_node(state, config):
        publish_event(
            events.EventModel(
                event=events.Event.NODE_EXECUTION, event_type=events.EventType.UPDATE, thread_id=config["thread_id"]
            )
        )
        return state

    app = graph_of(framework, my_node, publisher=publisher).compile()
    await app.ainvoke(question(framework), CONFIG)
    await app._task_manager.wait_for_all()
    assert app._task_manager.stats()["names"]["publish_event"]["completed"] == 1
    assert [event.thread_id for event in publisher.events if event.event_type == "update"].count("thread 1") >= 1
    await app.aclose()


async def test_a_failed_publish_stops_nothing(framework):
    """The framework's own publish_event logs the publisher's exception, and the graph continues."""
    publisher = recording_publisher(framework)

    async def refuse(event):
        raise ConnectionError("no broker")

    publisher.publish = refuse

    async def my_node(state, config):
        return state

    app = graph_of(framework, my_node, publisher=publisher).compile()
    assert (await app.ainvoke(question(framework), CONFIG))["messages"]
    await app._task_manager.wait_for_all()
    assert app._task_manager.stats()["failed"] == 0
    await app.aclose()


async def test_the_manager_of_a_graph_and_its_statistics(framework):
    """``aclose()`` cancels running tasks and returns the dictionary of the manual."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806

    async def my_node(state, config, task_manager: BackgroundTaskManager):
        for number in range(5):
            task_manager.create_task(forever(), name=f"task {number}")
        return state

    app = graph_of(framework, my_node).compile(shutdown_timeout=30.0)
    await app.ainvoke(question(framework), CONFIG)
    stats = await app.aclose()
    report = stats["background_tasks"]
    assert {key: report[key] for key in ("status", "initial_tasks", "completed_tasks", "remaining_tasks")} == {
        "status": "completed",
        "initial_tasks": 5,
        "completed_tasks": 5,
        "remaining_tasks": 0,
    }
    assert 0 <= report["duration_seconds"] < 30


async def test_pattern_notifications(framework):
    """The caller has the node's result before the notification is sent."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    sent = []

    async def process_data(data):
        return data["goods"].upper()

    async def send_notification(result):
        await asyncio.sleep(0)
        sent.append(result)

    async def my_node(state, config, task_manager: BackgroundTaskManager):
        result = await process_data(state.data)
        task_manager.create_task(send_notification(result), name="send_notification", timeout=5.0)
        state.data["result"] = result
        return state

    state = state_with_data(framework)(data={"goods": "tea"})
    app = graph_of(framework, my_node, state=state).compile()
    granularity = framework.utils.ResponseGranularity.FULL
    answer = await app.ainvoke(question(framework), CONFIG, granularity)
    assert answer["state"].data["result"] == "TEA"
    await app._task_manager.wait_for_all()
    assert sent == ["TEA"]
    await app.aclose()


async def test_pattern_metrics(framework, caplog):
    """A node reports its duration; a service that is down costs only a warning."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    log = logging.getLogger("shop")

    async def track_metrics(node_name: str, duration: float, config: dict):
        try:
            raise ConnectionError(f"no service for {node_name} of {config.get('thread_id')}")
        except Exception as error:
            log.warning("Failed to track metrics: %s", error)

    async def my_node(state, config, task_manager: BackgroundTaskManager):
        start = time.monotonic()
        await asyncio.sleep(0)
        duration = time.monotonic() - start
        task_manager.create_task(track_metrics("my_node", duration, config), name="track_metrics", timeout=3.0)
        return state

    app = graph_of(framework, my_node).compile()
    await app.ainvoke(question(framework), CONFIG)
    await app._task_manager.wait_for_all()
    assert "Failed to track metrics: no service for my_node of thread 1" in caplog.text
    assert app._task_manager.stats()["failed"] == 0
    await app.aclose()


async def test_pattern_parallel_fetching(framework):
    """Several sources are read in parallel, from a server on the loopback address."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806

    async def answer(reader, writer):
        writer.write(b"all the " + await reader.readline())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def fetch(port, what):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(what.encode() + b"\n")
        text = await reader.read()
        writer.close()
        await writer.wait_closed()
        return text.decode().strip()

    async def fetch_all_data(task_manager, port):
        results = {}

        async def fetch_and_store(key):
            results[key] = await fetch(port, key)

        for key in ("users", "products"):
            task_manager.create_task(fetch_and_store(key), name=f"fetch_{key}", timeout=5.0)
        await task_manager.wait_for_all(timeout=5.0)
        return results

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with BackgroundTaskManager() as manager:
            found = await fetch_all_data(manager, port)
    assert found == {"users": "all the users", "products": "all the products"}


async def test_best_practices(framework, caplog):
    """A task without a name has the default name, its result can be awaited, and it can handle its own errors."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    log = logging.getLogger("shop")
    reported = []

    async def send_email(user):
        return f"to {user}"

    async def do_something_risky():
        raise ConnectionError("no service")

    async def report_error(error):
        reported.append(str(error))

    async def robust_background_work():
        try:
            await do_something_risky()
        except Exception as error:
            log.error("Background work failed: %s", error)
            await report_error(error)

    async with BackgroundTaskManager() as task_manager:
        task_manager.create_task(send_email("ada"), name="send_welcome_email")
        task = task_manager.create_task(send_email("ada"))
        assert [info["name"] for info in task_manager.get_task_info()] in (
            ["send_welcome_email", "background_task"],
            [],  # eager tasks have both ended
        )
        assert await task == "to ada"
        await task_manager.create_task(robust_background_work())
        assert task_manager.stats()["failed"] == 0
        stats = await task_manager.shutdown(timeout=30.0)
    assert stats["status"] == "completed"
    assert reported == ["no service"]
    assert "Background work failed: no service" in caplog.text


# -- alone ----------------------------------------------------------------------------------------------------------


def test_standalone_use(framework):
    """A program without a graph uses the manager on its own loop."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806

    async def main():
        manager = BackgroundTaskManager(default_shutdown_timeout=30.0)
        manager.create_task(forever(), name="fetch_api_data", timeout=5.0)
        await asyncio.sleep(0)
        return await manager.shutdown()

    stats = asyncio.run(main())
    assert set(stats) >= {"status", "initial_tasks", "completed_tasks", "remaining_tasks", "duration_seconds"}
    assert (stats["status"], stats["initial_tasks"], stats["remaining_tasks"]) == ("completed", 1, 0)


async def test_use_as_a_context_manager(framework):
    """At the end of the block no task is left; tasks that had enough time succeeded."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    done = []

    async def process_item(item):
        await asyncio.sleep(0)
        done.append(item)

    async with BackgroundTaskManager() as manager:
        for item in range(10):
            manager.create_task(process_item(item), name=f"process_{item}")
        await until(lambda: len(done) == 10)
        left = manager.create_task(forever())
    assert left.cancelled()
    assert manager.get_task_count() == 0


async def test_tasks_with_timeout_and_context(framework, caplog):
    """A task that exceeds its timeout is cancelled, with a warning that has the context."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806

    async def upload_to_s3(data):
        await asyncio.Event().wait()

    async with BackgroundTaskManager() as task_manager:
        task = task_manager.create_task(
            upload_to_s3(b"..."), name="s3_upload", timeout=0.01, context={"run_id": CONFIG.get("run_id")}
        )
        await asyncio.wait([task])
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == "Background task 's3_upload' timed out after 0.01 seconds"
    assert record.task_context == {"run_id": "run 1"}


async def test_tracking_waiting_and_cancelling(framework, capsys):
    """The count, the details, waiting with a timeout, and cancelling all."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    event = asyncio.Event()
    task_manager = BackgroundTaskManager()
    task_manager.create_task(after(event), name="send_email", timeout=30.0, context={"user": "alice"})
    print(f"{task_manager.get_task_count()} running")
    for task in task_manager.get_task_info():
        print(f"{task['name']}: {task['age_seconds']:.0f}s, {task['timeout']}s, {task['context']}, {task['done']}")
    assert capsys.readouterr().out == "1 running\nsend_email: 0s, 30.0s, {'user': 'alice'}, False\n"
    event.set()
    await task_manager.wait_for_all(timeout=60.0)
    assert task_manager.get_task_count() == 0
    task = task_manager.create_task(forever())
    await task_manager.cancel_all()
    assert task.cancelled()


async def test_troubleshooting_stuck_and_too_many_tasks(framework, caplog):
    """Stuck tasks can be listed by name, and the number of tasks can be read."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    log = logging.getLogger("shop")
    task_manager = BackgroundTaskManager()
    for _ in range(101):
        task_manager.create_task(forever(), name="stuck")
    stuck = [f"{task['name']}, {task['age_seconds']:.0f}s" for task in task_manager.get_task_info() if not task["done"]]
    assert stuck == ["stuck, 0s"] * 101
    count = task_manager.get_task_count()
    if count > 100:
        log.warning("Too many background tasks: %d", count)
    assert "Too many background tasks: 101" in caplog.text
    await task_manager.shutdown()


async def test_troubleshooting_missing_error_logs(framework):
    """With the manual's logging configuration, a failure is logged at once, with its traceback."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))

    async def risky():
        raise ValueError("broken")

    logging.getLogger().addHandler(handler)
    try:
        async with BackgroundTaskManager() as task_manager:
            await asyncio.wait([task_manager.create_task(risky(), name="risky")])
    finally:
        logging.getLogger().removeHandler(handler)
    text = stream.getvalue()
    assert f" - {framework.name}.utils - ERROR - Background task raised an exception - risky: broken (" in text
    assert 'raise ValueError("broken")' in text


async def test_common_error_a_coroutine_function(framework):
    """``create_task(send)`` instead of ``create_task(send())`` is an error that says so."""

    async def send():
        return None

    with pytest.raises(NotACoroutineError, match=r"create_task\(send\(\.\.\.\)\)"):
        framework.module.BackgroundTaskManager().create_task(send)


def test_common_error_the_parameter_is_none(framework):
    """A compiled graph never calls a node with None for its manager, however it is run."""
    BackgroundTaskManager = framework.module.BackgroundTaskManager  # noqa: N806
    seen = []

    async def my_node(state, config, task_manager: BackgroundTaskManager):
        seen.append(task_manager)
        return state

    app = graph_of(framework, my_node).compile()
    app.invoke(question(framework), CONFIG)
    list(app.stream(question(framework), CONFIG | {"thread_id": "thread 2"}))
    assert seen == [app._task_manager] * 2
    assert isinstance(seen[0], _agentflow_graphs.BackgroundTaskManager)
    asyncio.run(app.aclose())

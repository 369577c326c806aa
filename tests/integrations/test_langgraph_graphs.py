"""Real graphs, with functions as nodes, on our executors: they end as on LangGraph's own, and a manager shows them."""

import asyncio
import contextvars
import functools
import gc
import logging
import operator
import subprocess
import sys
import threading
import uuid
from typing import Annotated, Any, TypedDict

import pytest
from paths import EXAMPLES
from requirements import need
from work import forever, until

need("langgraph.pregel")

from langgraph.checkpoint.memory import InMemorySaver  # noqa: E402
from langgraph.config import get_stream_writer  # noqa: E402
from langgraph.func import entrypoint, task  # noqa: E402
from langgraph.graph import END, START, StateGraph  # noqa: E402
from langgraph.types import Command, Send, interrupt  # noqa: E402

from bgtasks import ManagerClosedError, TaskRejectedError  # noqa: E402
from bgtasks.integrations import langgraph as drop_in  # noqa: E402

EXAMPLE = EXAMPLES / "langgraph_fan_out.py"
WAIT = 10
variable = contextvars.ContextVar("variable", default="default")


class State(TypedDict, total=False):
    """The state of these graphs; branches add to ``found``."""

    numbers: list[int]
    found: Annotated[list[Any], operator.add]


@pytest.fixture
def manager(make_manager):
    """Install our executors, with a manager that keeps its history; uninstall them at the end."""
    manager = make_manager()
    drop_in.install(manager=manager)
    yield manager
    drop_in.uninstall()


def both(function):
    """Return a node that calls a function, for a graph run in threads, and one for a graph run in tasks."""

    async def in_task(state):
        await asyncio.sleep(0)
        return function(state)

    return function, in_task


def graph_of(is_async, checkpointer=None, **nodes):
    """Return a graph that starts one branch of ``work`` per number, then runs the other nodes one after another."""
    builder = StateGraph(State)
    builder.add_node("plan", lambda state: {})
    last = None
    for name, node in nodes.items():
        builder.add_node(name, node[is_async] if isinstance(node, tuple) else node)
        if last is not None:
            builder.add_edge(last, name)
        last = name
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda state: [Send("work", number) for number in state["numbers"]], ["work"])
    builder.add_edge(last, END)
    return builder.compile(checkpointer=checkpointer)


def config_of(thread="1", **more):
    """Return the configuration of one run."""
    return {"configurable": {"thread_id": thread}, **more}


def square(number):
    """Return the square of a branch's number."""
    get_stream_writer()(f"square of {number}")
    return {"found": [number * number]}


def ask(state):
    """Ask two questions, one after the other."""
    return {"found": [interrupt("first?"), interrupt("second?")]}


ASKING = {"work": both(square), "ask": both(ask)}
SQUARES = [number * number for number in range(5)]
MODES = ["custom", "updates", "values"]


def comparable(chunks):
    """Return the chunks of a stream in a comparable form: branches end in any order, ids are random."""
    texts = []
    for mode, chunk in chunks:
        if isinstance(chunk, dict) and "__interrupt__" in chunk:
            chunk = {**chunk, "__interrupt__": [found.value for found in chunk["__interrupt__"]]}
        texts.append(f"{mode} {chunk}")
    return sorted(texts)


def stream_in_threads(graph, config):
    """Run a graph of ``ASKING`` to its end; return the chunks of its streams, and its last state."""
    chunks = []
    for given in ({"numbers": list(range(5))}, Command(resume="one"), Command(resume="two")):
        chunks += graph.stream(given, config, stream_mode=MODES)
    return comparable(chunks), graph.get_state(config).values


async def stream_in_tasks(graph, config):
    """Do the same on the running loop."""
    chunks = []
    for given in ({"numbers": list(range(5))}, Command(resume="one"), Command(resume="two")):
        chunks += [chunk async for chunk in graph.astream(given, config, stream_mode=MODES)]
    return comparable(chunks), (await graph.aget_state(config)).values


def unexpected_records(caplog):
    """Return the records of bgtasks that report more than progress."""
    return [record for record in caplog.records if record.name == "bgtasks" and record.levelno > logging.INFO]


# -- functions in threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0, 2])
def test_threads_stream_the_same_as_on_the_originals(manager, caplog, limit):
    """Fan-out, two interrupts, a checkpointer and three kinds of stream give the same; no error is logged."""
    config = config_of(max_concurrency=limit)
    streamed = stream_in_threads(graph_of(False, InMemorySaver(), **ASKING), config)
    started = manager.stats()["started"]
    drop_in.uninstall()
    originals = stream_in_threads(graph_of(False, InMemorySaver(), **ASKING), config_of(max_concurrency=limit or None))
    assert streamed == originals
    assert streamed[1]["found"] == [*SQUARES, "one", "two"]
    assert started == manager.stats()["started"] > 0
    assert manager.stats()["names"]["work"]["completed"] == 5
    assert unexpected_records(caplog) == []


def test_threads_keep_to_the_limit(manager):
    """Exactly as many branches run at once as the configuration allows."""
    lock, together = threading.Lock(), threading.Barrier(2)
    running = most = 0

    def work(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(WAIT)
        with lock:
            running -= 1
        return {"found": [number]}

    graph_of(False, work=work).invoke({"numbers": list(range(10))}, config_of(max_concurrency=2))
    assert most == 2


def test_a_node_that_fails_in_a_thread(manager, caplog):
    """Its exception reaches the caller of the graph, and is logged once."""

    def work(number):
        if number == 3:
            raise LookupError("three")
        return {"found": [number]}

    graph = graph_of(False, work=work)
    with pytest.raises(LookupError, match="three"):
        graph.invoke({"numbers": list(range(5))}, config_of())
    assert [record.task_name for record in unexpected_records(caplog)] == ["work"]
    assert manager.stats()["names"]["work"]["failed"] == 1


def test_functional_graph_in_threads(manager):
    """Tasks of the functional API run in parallel; the entry point can handle the failure of one."""
    together = threading.Barrier(3)

    @task
    def work(number):
        together.wait(WAIT)
        if number == 2:
            raise LookupError("two")
        return number * number

    @entrypoint()
    def main(numbers):
        futures = [work(number) for number in numbers]
        results = [future.result() for future in futures if future.exception() is None]
        return results, sum(future.exception() is not None for future in futures)

    assert main.invoke([0, 1, 2], config_of()) == ([0, 1], 1)
    assert manager.stats()["started"] >= 3


def test_graphs_in_several_threads_share_a_manager(manager):
    """Runs of one graph from several threads at once do not wait for each other's tasks, and all are counted."""
    graph = graph_of(False, work=square)
    results = []

    def run():
        results.append(graph.invoke({"numbers": list(range(5))}, config_of())["found"])

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert results == [SQUARES] * 5
    assert manager.stats()["names"]["work"]["completed"] == 25


# -- coroutines as tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0, 1, 2])
async def test_tasks_stream_the_same_as_on_the_originals(manager, caplog, limit):
    """Fan-out, two interrupts, a checkpointer and three kinds of stream give the same; no error is logged."""
    config = config_of(max_concurrency=limit)
    streamed = await stream_in_tasks(graph_of(True, InMemorySaver(), **ASKING), config)
    started = manager.stats()["started"]
    drop_in.uninstall()
    originals = await stream_in_tasks(graph_of(True, InMemorySaver(), **ASKING), config)
    assert streamed == originals
    assert streamed[1]["found"] == [*SQUARES, "one", "two"]
    assert started == manager.stats()["started"] > 0
    assert manager.stats()["names"]["work"]["completed"] == 5
    assert unexpected_records(caplog) == []


async def test_tasks_keep_to_the_limit(manager):
    """Exactly as many branches run at once as the configuration allows."""
    running = most = 0

    async def work(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return {"found": [number]}

    await graph_of(True, work=work).ainvoke({"numbers": list(range(10))}, config_of(max_concurrency=2))
    assert most == 2


async def test_running_nodes_show_in_the_manager(manager):
    """While a graph runs, the manager shows the names of its running nodes, and which of them wait for a slot."""
    go = asyncio.Event()

    async def work(number):
        await go.wait()
        return {"found": [number]}

    run = asyncio.ensure_future(graph_of(True, work=work).ainvoke({"numbers": [1, 2, 3]}, config_of(max_concurrency=2)))
    await until(lambda: manager.get_task_count() == 3)
    await asyncio.sleep(0)
    assert sorted((info["name"], info["state"]) for info in manager.get_task_info()) == [
        ("work", "queued"),
        ("work", "running"),
        ("work", "running"),
    ]
    go.set()
    assert (await run)["found"] == [1, 2, 3]


async def test_a_node_that_fails_in_a_task(manager, caplog):
    """Its exception reaches the caller of the graph and is logged once; its neighbours are cancelled."""
    ended = []

    async def work(number):
        if number == 3:
            await asyncio.sleep(0)
            raise LookupError("three")
        try:
            await forever()
        finally:
            # LangGraph cancels its nodes twice, so nothing can be awaited here.
            ended.append(number)

    graph = graph_of(True, work=work)
    with pytest.raises(LookupError, match="three"):
        await graph.ainvoke({"numbers": list(range(5))}, config_of())
    assert sorted(ended) == [0, 1, 2, 4]
    assert [record.task_name for record in unexpected_records(caplog)] == ["work"]


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
def test_without_a_manager_failures_are_not_logged(caplog, is_async):
    """Only the caller of the graph gets the exception, as with LangGraph's own executors."""

    def work(number):
        raise LookupError("work")

    graph = graph_of(is_async, work=both(work))
    drop_in.install()
    try:
        with pytest.raises(LookupError, match="work"):  # noqa: PT012
            if is_async:
                asyncio.run(graph.ainvoke({"numbers": [1, 2]}, config_of()))
            else:
                graph.invoke({"numbers": [1, 2]}, config_of())
    finally:
        drop_in.uninstall()
    assert unexpected_records(caplog) == []


async def test_functional_graph_in_tasks(manager):
    """Tasks of the functional API run in parallel; the entry point can handle the failure of one."""
    together = asyncio.Barrier(3)

    @task
    async def work(number):
        await together.wait()
        if number == 2:
            raise LookupError("two")
        return number * number

    @entrypoint()
    async def main(numbers):
        return await asyncio.gather(*(work(number) for number in numbers), return_exceptions=True)

    *results, failure = await main.ainvoke([0, 1, 2], config_of())
    assert results == [0, 1]
    assert isinstance(failure, LookupError)
    assert manager.stats()["names"]["work"]["started"] == 3


async def test_a_cancelled_run_leaves_no_node_behind(manager):
    """When the caller of a graph is cancelled, its nodes are cancelled and end before their executor."""
    ended = []

    async def work(number):
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    run = asyncio.ensure_future(graph_of(True, work=work).ainvoke({"numbers": [1, 2, 3]}, config_of()))
    await until(lambda: manager.get_task_count() == 3)
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await until(lambda: manager.get_task_count() == 0)
    assert sorted(ended) == [1, 2, 3]


async def test_graphs_in_graphs(manager):
    """A graph as a node of another one runs on its own executor, under the same manager."""
    inner = graph_of(True, work=both(square))
    builder = StateGraph(State)
    builder.add_node("inner", inner)
    builder.add_node("beside", both(lambda state: {"found": ["beside"]})[True])
    for name in ("inner", "beside"):
        builder.add_edge(START, name)
        builder.add_edge(name, END)
    result = await builder.compile().ainvoke({"numbers": [1, 2, 3]}, config_of())
    assert sorted(map(str, result["found"])) == ["1", "4", "9", "beside"]
    assert {"inner", "beside", "work"} <= manager.stats()["names"].keys()


async def test_many_runs_at_once_share_a_manager(manager):
    """Runs on one loop do not wait for each other's tasks, and all are counted."""
    graph = graph_of(True, InMemorySaver(), work=both(square))
    runs = [graph.ainvoke({"numbers": list(range(5))}, config_of(str(number))) for number in range(20)]
    assert [result["found"] for result in await asyncio.gather(*runs)] == [SQUARES] * 20
    assert manager.stats()["names"]["work"]["completed"] == 100


def test_one_graph_on_one_loop_after_another(manager):
    """A graph that is compiled once runs under ``asyncio.run`` several times, with the same manager."""
    graph = graph_of(True, work=both(square))
    for _ in range(3):
        assert asyncio.run(graph.ainvoke({"numbers": list(range(5))}, config_of()))["found"] == SQUARES
    assert manager.stats()["abandoned"] == 0


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
def test_nodes_see_context_variables(manager, is_async):
    """A node sees the variables of the caller of its graph; its changes stay its own."""

    def work(number):
        found = variable.get()
        variable.set("changed")
        return {"found": [found]}

    def run():
        variable.set("mine")
        graph = graph_of(is_async, work=both(work))
        state = {"numbers": [1, 2, 3]}
        result = asyncio.run(graph.ainvoke(state, config_of())) if is_async else graph.invoke(state, config_of())
        assert result["found"] == ["mine"] * 3
        assert variable.get() == "mine"

    contextvars.copy_context().run(run)
    assert manager.stats()["names"]["work"]["completed"] == 3


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
def test_runs_leave_no_executor_behind(manager, is_async):
    """After a run, even an interrupted one, its executor is freed with all that it kept."""
    graph = graph_of(is_async, InMemorySaver(), **ASKING)
    for number in range(3):
        if is_async:
            asyncio.run(stream_in_tasks(graph, config_of(str(number))))
        else:
            stream_in_threads(graph, config_of(str(number)))
    gc.collect()
    classes = (drop_in.BackgroundExecutor, drop_in.AsyncBackgroundExecutor)
    assert [executor for executor in gc.get_objects() if issubclass(type(executor), classes)] == []


async def test_a_run_ends_on_the_executor_it_began_with(make_manager):
    """Install and uninstall during a run affect only the next run."""
    manager = make_manager()
    graph = graph_of(True, **ASKING)
    run = graph.astream({"numbers": list(range(5))}, config_of(), stream_mode="updates")
    await anext(run)
    drop_in.install(manager=manager)
    first = [chunk async for chunk in run]
    assert manager.stats()["started"] == 0
    run = graph.astream({"numbers": list(range(5))}, config_of(), stream_mode="updates")
    await anext(run)
    drop_in.uninstall()
    second = [chunk async for chunk in run]
    assert manager.stats()["names"]["work"]["completed"] == 5
    assert len(first) == len(second)


async def test_a_run_fails_on_a_manager_that_was_shut_down(manager):
    """The run raises the manager's error, and leaves no task."""
    await manager.shutdown()
    with pytest.raises(ManagerClosedError, match="shut down"):
        await graph_of(True, work=both(square)).ainvoke({"numbers": [1, 2]}, config_of())


async def test_a_run_fails_on_a_full_manager(make_manager):
    """At its limit the manager refuses a node, and the run raises the manager's error."""
    drop_in.install(manager=make_manager(max_pending_tasks=1))
    try:
        with pytest.raises(TaskRejectedError, match="max_pending_tasks"):
            await graph_of(True, work=both(square)).ainvoke({"numbers": [1, 2]}, config_of())
    finally:
        drop_in.uninstall()


# -- the example ------------------------------------------------------------------------------------------------------


@functools.cache
def run_example(*arguments):
    """Run the example to its end, with warnings as errors; return its status and its output."""
    command = [sys.executable, "-W", "error", "-X", "dev", str(EXAMPLE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # On a busy machine any step of the loop may be slow, which its debug mode reports.
    lines = [line for line in done.stderr.splitlines(True) if not line.startswith("Executing <")]
    return done.returncode, done.stdout, "".join(lines)


@pytest.mark.parametrize("limit", ["0", "4"])
@pytest.mark.parametrize("options", [["--sync"], []], ids=["threads", "tasks"])
def test_the_example_reports(options, limit):
    """It measures each module in a branch, asks, and reports; the manager shows one task per branch."""
    status, output, errors = run_example(*options, "--max-concurrency", limit, "json")
    assert (status, errors) == (0, "")
    assert output.count("measured ") == 5
    assert "5 modules were measured. Write the report? yes" in output
    assert "in 5 modules" in output
    assert "      5 x measure\n" in output


def test_the_example_ends_without_consent():
    """Without consent there is no report, and the exit status says so."""
    status, output, errors = run_example("--answer", "no", "json")
    assert (status, errors) == (1, "")
    assert "no report" in output


@pytest.mark.parametrize("arguments", [["no_such_package"], ["ast"], ["--max-concurrency", "-1"]])
def test_the_example_refuses_bad_arguments(arguments):
    """A name that is no package and a negative limit are refused before anything runs."""
    status, _, errors = run_example(*arguments)
    assert status == 2
    assert "error: " in errors
    assert "Traceback" not in errors


# -- which run a task belongs to ---------------------------------------------------------------------------------------


RUN_ID = uuid.UUID(int=5)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"configurable": {"thread_id": "7"}, "run_id": RUN_ID}, {"thread_id": "7", "run_id": str(RUN_ID)}),
        ({"configurable": {"thread_id": 7}, "metadata": {"run_id": "r"}}, {"thread_id": "7", "run_id": "r"}),
        ({"configurable": {"thread_id": "7"}}, {"thread_id": "7"}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_the_context_of_a_task_names_the_run(manager, is_async, config, context):
    """The ids that the configuration of the run has are in the context of all of its tasks."""
    seen = []

    def work(number):
        seen.extend(dict(info["context"]) for info in manager.get_task_info() if info["name"] == "work")
        return {"found": [number]}

    graph = graph_of(is_async, work=both(work))
    if is_async:
        asyncio.run(graph.ainvoke({"numbers": [1, 2, 3]}, config))
    else:
        graph.invoke({"numbers": [1, 2, 3]}, config)
    assert seen
    assert all(each == context for each in seen)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_linear_graph_shows_nothing(manager, is_async):
    """A step with one task needs no executor: LangGraph runs it in the caller, as the page on LangGraph says."""
    builder = StateGraph(State)
    builder.add_node("first", lambda state: {"found": [1]})
    builder.add_node("second", lambda state: {"found": [2]})
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    graph = builder.compile()
    given = {"found": []}
    state = asyncio.run(graph.ainvoke(given)) if is_async else graph.invoke(given)
    assert state["found"] == [1, 2]
    assert manager.stats()["started"] == 0

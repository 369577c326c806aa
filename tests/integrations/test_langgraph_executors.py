"""What LangGraph relies on in an executor: its own classes and ours pass the same tests."""

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import sys
import threading
import weakref

import pytest
from langgraph_sides import Side, sides_chosen, skip_set
from requirements import need
from twins import twins_chosen
from work import after, failing, forever, until, value

need("langgraph.pregel")

from langgraph.errors import GraphBubbleUp, GraphInterrupt  # noqa: E402

WAIT = 10
STARTS_EAGERLY = sys.version_info >= (3, 12)
variable = contextvars.ContextVar("variable", default="default")


def pytest_generate_tests(metafunc):
    """Run on LangGraph's executors and on ours on each twin what asks for a side."""
    if "side_name" in metafunc.fixturenames:
        metafunc.parametrize("side_name", sides_chosen(twins_chosen(metafunc.config)))


@pytest.fixture
def side(side_name):
    """Give one side; nothing may be left in the manager of ours."""
    side = Side(side_name)
    yield side
    if side.is_ours:
        assert side.manager.get_task_info() == []


@pytest.fixture
def ours(side):
    """Give one side of ours: for what LangGraph's executors do not do."""
    if not side.is_ours:
        pytest.skip("LangGraph's executors do not do this")
    return side


def fail(error):
    """Raise an exception that is given as a value."""
    raise error


class Marker:
    """An object that can be watched by a weak reference."""


# -- functions in threads ---------------------------------------------------------------------------------------------


def test_submit_of_threads_is_a_bound_method(side):
    """What the context manager hands out can be held by a WeakMethod, as the loop of a graph does, and dies with it."""
    executor = side.threads()
    with executor as submit:
        held = weakref.WeakMethod(submit)
        assert held() == executor.submit
        assert held()(int, "7").result(WAIT) == 7
    del executor, submit
    gc.collect()
    assert held() is None


def test_futures_of_threads(side):
    """A future is a concurrent one that can be hashed, referred to weakly, and asked for its exception repeatedly."""
    error = ValueError("wrong")
    with side.threads() as submit:
        future = submit(fail, error, __reraise_on_exit__=False)
        assert isinstance(future, concurrent.futures.Future)
        assert {future: 1}[weakref.ref(future)()] == 1
    assert future.exception() is error
    assert future.exception() is error


def test_keyword_arguments_reach_the_function(side):
    """Only the options with underscores are the executor's: all other keywords are the function's."""
    names = ("name", "timeout", "context", "loop", "config", "kwargs", "future", "task", "record")
    keywords = dict.fromkeys(names, 1)
    with side.threads() as submit:
        options = {"__name__": "all", "__cancel_on_exit__": False, "__reraise_on_exit__": True, "__next_tick__": True}
        future = submit(lambda *args, **kwargs: (args, kwargs), 1, 2, **options, **keywords)
        assert future.result(WAIT) == ((1, 2), keywords)


def test_threads_see_context_variables(side):
    """A function sees the variables as they were at submit, and what it sets stays its own."""
    seen = []

    def look(given):
        seen.append((given, variable.get()))
        variable.set("changed")

    def submit_two():
        variable.set("mine")
        with side.threads(max_concurrency=1) as submit:
            start = threading.Event()
            submit(start.wait, WAIT)
            submit(look, "mine")
            variable.set("later")
            submit(look, "later")
            start.set()
        assert variable.get() == "later"

    contextvars.copy_context().run(submit_two)
    assert seen == [("mine", "mine"), ("later", "later")]


def test_exit_waits_for_threads(side):
    """On exit every function has run, those that were not started by then included."""
    done = []
    with side.threads(max_concurrency=2) as submit:
        for number in range(50):
            submit(done.append, number)
    assert sorted(done) == list(range(50))


def test_exit_cancels_what_no_thread_has_started(side):
    """What asked for it and waits in the queue is cancelled on exit; what did not ask runs."""
    started, go = threading.Event(), threading.Event()
    done = []

    def first():
        started.set()
        assert go.wait(WAIT)

    with side.threads(max_concurrency=1) as submit:
        submit(first)
        assert started.wait(WAIT)
        cancelled = submit(done.append, "cancelled", __cancel_on_exit__=True)
        cancelled.add_done_callback(lambda future: go.set())
        kept = submit(done.append, "kept")
    assert cancelled.cancelled()
    assert kept.done()
    assert done == ["kept"]


def test_exit_waits_for_a_running_function_that_it_cannot_cancel(side):
    """A function that runs is waited for, although it asked to be cancelled on exit: its result counts."""
    started, go = threading.Event(), threading.Event()

    def first():
        started.set()
        assert go.wait(WAIT)
        return "result"

    with side.threads(max_concurrency=1) as submit:
        running = submit(first, __cancel_on_exit__=True)
        assert started.wait(WAIT)
        waiting = submit(int, __cancel_on_exit__=True)
        waiting.add_done_callback(lambda future: go.set())
    assert running.result(0) == "result"
    assert waiting.cancelled()


def test_the_first_failure_of_threads_in_order_of_submission_is_raised(side):
    """Not the failure that came first counts, but that of the function that was submitted first."""
    later_failed = threading.Event()

    def fail_last():
        assert later_failed.wait(WAIT)
        raise ValueError("first submitted")

    with pytest.raises(ValueError, match="first submitted"), side.threads() as submit:  # noqa: PT012
        submit(int)
        submit(fail_last)
        submit(fail, KeyError("second submitted")).add_done_callback(lambda future: later_failed.set())


def test_failures_of_threads_that_are_not_raised_on_exit(side):
    """An exception stays in its future: by option, by the set of the graph, as an interrupt, or when cancelled."""
    with side.threads() as submit:
        unwanted = submit(fail, ValueError("unwanted"), __reraise_on_exit__=False)
        bubbled = submit(fail, GraphBubbleUp("bubbled"))
        interrupt = submit(fail, GraphInterrupt(()))
        skipped_after_its_end = submit(fail, ValueError("skipped"))
        assert isinstance(skipped_after_its_end.exception(WAIT), ValueError)
        skip_set().add(skipped_after_its_end)
    assert [type(future.exception()) for future in (unwanted, bubbled, interrupt, skipped_after_its_end)] == [
        ValueError,
        GraphBubbleUp,
        GraphInterrupt,
        ValueError,
    ]


def test_a_failure_of_the_body_wins_over_those_of_threads(side):
    """The exception on its way goes on; that of a function stays in its future."""
    with pytest.raises(LookupError, match="body"), side.threads() as submit:  # noqa: PT012
        future = submit(fail, ValueError("function"))
        raise LookupError("body")
    assert isinstance(future.exception(), ValueError)


def test_no_more_threads_than_allowed(side):
    """With a limit so many functions run at once, and never more."""
    lock, full = threading.Lock(), threading.Barrier(3)
    running = most = 0

    def count():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait(WAIT)
        with lock:
            running -= 1

    with side.threads(max_concurrency=3) as submit:
        for _ in range(30):
            submit(count)
    assert most == 3


def test_finished_threads_are_dropped(side):
    """An executor keeps nothing of a function that ended well: not its result, its arguments or its future."""
    with side.threads() as submit:
        marker = Marker()
        future = submit(lambda given: given, marker)
        future.result(WAIT)
        watched = [weakref.ref(marker), weakref.ref(future)]
        del marker, future
        # A worker lets go of its last function a moment after the future has its result, or with the next function.
        submit(int).result(WAIT)
        wait_for(lambda: not any(reference() for reference in watched), submit)


def wait_for(condition, submit):
    """Submit functions until a condition holds."""
    for _ in range(1000):
        gc.collect()
        if condition():
            return
        submit(int).result(WAIT)
    pytest.fail("the condition never held")


def test_threads_submit_from_threads(side):
    """Functions may submit functions, from several threads at once, and all run."""
    done = []

    with side.threads() as submit:

        def branch(depth, number):
            done.append(number)
            if depth:
                return [submit(branch, depth - 1, number) for _ in range(2)]
            return []

        futures = [submit(branch, 4, number) for number in range(8)]
        while futures:
            futures = [child for future in futures for child in future.result(WAIT)]
    assert len(done) == 8 * 31


@pytest.mark.parametrize("config", [{}, {"max_concurrency": None}])
def test_threads_without_a_limit(side, config):
    """Without a limit functions that wait for each other run at once."""
    together = threading.Barrier(4)
    with side.threads(**config) as submit:
        for _ in range(4):
            submit(together.wait, WAIT)


def test_limit_of_no_threads_is_no_limit(ours):
    """``max_concurrency=0``, which LangGraph's executor of functions refuses, is no limit, as in that of coroutines."""
    test_threads_without_a_limit(ours, {"max_concurrency": 0})


@pytest.mark.parametrize("limit", [-1, "3"])
def test_limits_that_are_none(side, limit):
    """A limit below 0 or of another type is refused by both executors."""
    with pytest.raises((ValueError, TypeError)):
        side.threads(max_concurrency=limit)

    async def make():
        with pytest.raises((ValueError, TypeError)):
            side.tasks(max_concurrency=limit)

    if limit == -1 or side.is_ours:
        asyncio.run(make())


def test_threads_show_in_the_manager(ours):
    """A running function has a record with its name, and the counters tell how it ended."""
    go = threading.Event()
    with ours.threads() as submit:
        started = threading.Event()

        def work():
            started.set()
            assert go.wait(WAIT)

        submit(work, __name__="node")
        assert started.wait(WAIT)
        assert [info["name"] for info in ours.manager.get_task_info()] == ["node"]
        go.set()
    assert ours.manager.stats()["names"]["node"]["completed"] == 1


# -- coroutines as tasks ----------------------------------------------------------------------------------------------


async def test_submit_of_tasks_is_a_bound_method(side):
    """What the context manager hands out can be held by a WeakMethod, and dies with the executor."""
    executor = side.tasks()
    async with executor as submit:
        held = weakref.WeakMethod(submit)
        assert held() == executor.submit
        assert await held()(value, 7) == 7
    del executor, submit
    gc.collect()
    assert held() is None


async def test_futures_of_tasks(side):
    """A future is a task of the loop, can be hashed, referred to weakly, and asked for its exception repeatedly."""
    error = ValueError("wrong")
    async with side.tasks() as submit:
        task = submit(failing, error, __reraise_on_exit__=False)
        assert isinstance(task, asyncio.Task)
        assert task.get_loop() is asyncio.get_running_loop()
        assert {task: 1}[weakref.ref(task)()] == 1
    assert task.exception() is error
    assert task.exception() is error


async def test_names_of_tasks(side):
    """A task has the name that was given; without one it has some name."""
    async with side.tasks(max_concurrency=1) as submit:
        named, unnamed = submit(value, __name__="node"), submit(value)
        assert named.get_name() == "node"
        assert unnamed.get_name()


async def test_keyword_arguments_reach_the_coroutine_function(side):
    """Only the options with underscores are the executor's: all other keywords are the function's."""
    names = ("name", "timeout", "context", "loop", "config", "kwargs", "coro", "task", "record", "eager_start")
    keywords = dict.fromkeys(names, 1)

    async def give(*args, **kwargs):
        return args, kwargs

    async with side.tasks() as submit:
        options = {"__name__": "all", "__cancel_on_exit__": False, "__reraise_on_exit__": True, "__next_tick__": True}
        assert await submit(give, 1, 2, **options, **keywords) == ((1, 2), keywords)


@pytest.mark.skipif(not STARTS_EAGERLY, reason="no eager tasks before Python 3.12")
async def test_tasks_start_at_once(side):
    """The coroutine runs up to its first suspension inside submit, and one that does not suspend is done after it."""
    events = []
    go = asyncio.Event()

    async def work():
        events.append("started")
        await go.wait()
        events.append("ended")

    async with side.tasks() as submit:
        task = submit(work)
        assert (events, task.done()) == (["started"], False)
        assert submit(value, 7).done()
        go.set()
    assert events == ["started", "ended"]


@pytest.mark.parametrize("limit", [None, 1])
async def test_tasks_that_start_in_the_next_tick(side, limit, loop_kind):
    """With ``__next_tick__`` nothing of the coroutine runs before the submitter has given up control."""
    if loop_kind == "eager":
        pytest.skip("both leave it to the loop's task factory, and this one starts every task at once")
    events = []

    async def work(number):
        events.append(number)

    async with side.tasks(max_concurrency=limit) as submit:
        tasks = [submit(work, number, __next_tick__=True) for number in range(3)]
        assert events == []
        await tasks[-1]
        assert events == [0, 1, 2]


@pytest.mark.parametrize("next_tick", [False, True])
@pytest.mark.parametrize("limit", [None, 1])
async def test_tasks_see_context_variables(side, limit, next_tick):
    """A coroutine sees the variables as they were at submit, and what it sets stays its own."""
    seen = []
    go = asyncio.Event()

    async def look():
        await go.wait()
        seen.append(variable.get())
        variable.set("changed")

    token = variable.set("mine")
    try:
        async with side.tasks(max_concurrency=limit) as submit:
            submit(look, __next_tick__=next_tick)
            variable.set("later")
            submit(look, __next_tick__=next_tick)
            go.set()
        assert variable.get() == "later"
    finally:
        variable.reset(token)
    assert seen == ["mine", "later"]


async def test_exit_waits_for_tasks(side):
    """On exit every coroutine has ended, those that were not started by then included."""
    done = []

    async def work(number):
        await asyncio.sleep(0)
        done.append(number)

    async with side.tasks(max_concurrency=2) as submit:
        for number in range(50):
            submit(work, number)
    assert sorted(done) == list(range(50))


async def test_exit_cancels_tasks_that_asked_for_it(side):
    """What asked for it is cancelled on exit and awaited; what did not ask runs to its end."""
    started, ended = [], []

    async def work():
        started.append("started")
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    go = asyncio.Event()
    async with side.tasks() as submit:
        cancelled = submit(work, __cancel_on_exit__=True)
        kept = submit(after, go, "kept")
        await until(lambda: started)
        cancelled.add_done_callback(lambda task: go.set())
    assert cancelled.cancelled()
    assert kept.result() == "kept"
    assert ended == ["cleaned up"]


async def test_the_first_failure_of_tasks_in_order_of_submission_is_raised(side):
    """Not the failure that came first counts, but that of the coroutine that was submitted first."""
    later_failed = asyncio.Event()

    async def fail_last():
        await later_failed.wait()
        raise ValueError("first submitted")

    with pytest.raises(ValueError, match="first submitted"):  # noqa: PT012
        async with side.tasks() as submit:
            submit(value)
            submit(fail_last)
            submit(failing, KeyError("second submitted")).add_done_callback(lambda task: later_failed.set())


async def test_failures_of_tasks_that_are_not_raised_on_exit(side):
    """An exception stays in its task: by option, by the set of the graph, as an interrupt, or when cancelled."""
    async with side.tasks() as submit:
        unwanted = submit(failing, ValueError("unwanted"), __reraise_on_exit__=False)
        bubbled = submit(failing, GraphBubbleUp("bubbled"))
        interrupt = submit(failing, GraphInterrupt(()))
        skipped_after_its_end = submit(failing, ValueError("skipped"))
        cancelled = submit(forever)
        cancelled.cancel()
        await asyncio.wait([skipped_after_its_end])
        skip_set().add(skipped_after_its_end)
    assert [type(task.exception()) for task in (unwanted, bubbled, interrupt, skipped_after_its_end)] == [
        ValueError,
        GraphBubbleUp,
        GraphInterrupt,
        ValueError,
    ]
    assert cancelled.cancelled()


async def test_a_failure_of_the_body_wins_over_those_of_tasks(side):
    """The exception on its way goes on; that of a coroutine stays in its task."""
    with pytest.raises(LookupError, match="body"):  # noqa: PT012
        async with side.tasks() as submit:
            task = submit(failing, ValueError("coroutine"))
            raise LookupError("body")
    assert isinstance(task.exception(), ValueError)


async def test_no_more_tasks_than_allowed(side):
    """With a limit so many coroutines run at once, never more, and each of them once."""
    running = most = 0
    order = []

    async def count(number):
        nonlocal running, most
        order.append(number)
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    async with side.tasks(max_concurrency=3) as submit:
        for number in range(30):
            submit(count, number, __next_tick__=bool(number % 2) and side.is_ours)
    assert most == 3
    assert sorted(order) == list(range(30))


@pytest.mark.parametrize("config", [{}, {"max_concurrency": None}, {"max_concurrency": 0}])
async def test_tasks_without_a_limit(side, config):
    """Without a limit, which 0 means as well, coroutines that wait for each other run at once."""
    together = asyncio.Barrier(4)
    async with side.tasks(**config) as submit:
        for _ in range(4):
            submit(together.wait)


async def test_finished_tasks_are_dropped(side):
    """An executor keeps nothing of a coroutine that ended well: not its result, its arguments or its task."""
    async with side.tasks() as submit:
        marker = Marker()
        task = submit(value, marker)
        await task
        watched = [weakref.ref(marker), weakref.ref(task)]
        del marker, task
        await asyncio.sleep(0)
        gc.collect()
        assert [reference() for reference in watched] == [None, None]


async def test_tasks_submitted_from_threads(ours):
    """A coroutine submitted from another thread runs on the loop, in the context of that thread."""
    results = []

    async def where(number):
        return number, asyncio.get_running_loop(), variable.get()

    def other_thread(submit, number):
        variable.set(f"thread {number}")
        results.append(submit(where, number).result(WAIT))

    async with ours.tasks() as submit:
        loop = asyncio.get_running_loop()
        threads = [asyncio.to_thread(other_thread, submit, number) for number in range(4)]
        await asyncio.gather(*threads)
        await loop.shutdown_default_executor()
    assert sorted(results, key=lambda result: result[0]) == [(number, loop, f"thread {number}") for number in range(4)]


async def test_exit_that_is_cancelled_settles_its_tasks(ours):
    """A cancelled exit cancels its tasks and waits for them; LangGraph's leaves them running."""
    ended = []

    async def work():
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def run():
        async with ours.tasks() as submit:
            submit(work)

    task = asyncio.ensure_future(run())
    await until(lambda: ours.manager.get_task_count() == 1)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cleaned up"]


async def test_tasks_show_in_the_manager(ours):
    """A running coroutine has a record with its name, one that waits for its turn is queued, and all are counted."""
    go = asyncio.Event()
    async with ours.tasks(max_concurrency=1) as submit:
        submit(after, go, __name__="node")
        submit(after, go, __name__="node")
        await asyncio.sleep(0)
        assert [(info["name"], info["state"]) for info in ours.manager.get_task_info()] == [
            ("node", "running"),
            ("node", "queued"),
        ]
        go.set()
    assert ours.manager.stats()["names"]["node"]["completed"] == 2


async def test_interrupts_are_not_logged_as_errors(ours, caplog):
    """An interrupt is a signal between a node and its graph: no log record tells of it as an error."""
    async with ours.tasks() as submit:
        submit(failing, GraphInterrupt(()))
    with ours.threads() as submit:
        submit(fail, GraphInterrupt(()))
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


async def test_partials_and_objects_that_can_be_called(side):
    """What gives a coroutine when called will do, whatever it is: checkpointers hand in bound methods of any kind."""

    class Saver:
        async def put(self, number):
            return number

        def put_through(self, number):
            return self.put(number)

        def __call__(self, number):
            return self.put(number)

    async with side.tasks() as submit:
        saver = Saver()
        for function in (saver.put, saver.put_through, saver, functools.partial(saver.put), lambda n: saver.put(n)):
            assert await submit(function, 7) == 7

"""The promises of an executor that LangGraph relies on: its own classes and our executors pass the same tests."""

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
    """Run tests that use a side on LangGraph's executors, and on our executors on each twin."""
    if "side_name" in metafunc.fixturenames:
        metafunc.parametrize("side_name", sides_chosen(twins_chosen(metafunc.config)))


@pytest.fixture
def side(side_name):
    """Give one side; the manager of our executors must be empty after the test."""
    side = Side(side_name)
    yield side
    if side.is_ours:
        assert side.manager.get_task_info() == []


@pytest.fixture
def our_side(side):
    """Give our executors, for promises that LangGraph's executors do not make."""
    if not side.is_ours:
        pytest.skip("LangGraph's executors do not do this")
    return side


def fail(error):
    """Raise an exception that is passed as a value."""
    raise error


class Marker:
    """An object that can be referred to weakly."""


# -- functions in threads ---------------------------------------------------------------------------------------------


def test_submit_of_threads_is_a_bound_method(side):
    """A WeakMethod can hold the result of the context manager, as a graph's loop does; it dies with the executor."""
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
    """Only options with underscores are the executor's; all other keywords are the function's."""
    names = ("name", "timeout", "context", "loop", "config", "kwargs", "future", "task", "record")
    keywords = dict.fromkeys(names, 1)
    with side.threads() as submit:
        options = {"__name__": "all", "__cancel_on_exit__": False, "__reraise_on_exit__": True, "__next_tick__": True}
        future = submit(lambda *args, **kwargs: (args, kwargs), 1, 2, **options, **keywords)
        assert future.result(WAIT) == ((1, 2), keywords)


def test_threads_see_context_variables(side):
    """A function sees the variables as they were at submit; its changes stay its own."""
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
    """On exit every function has run, even those that had not started."""
    done = []
    with side.threads(max_concurrency=2) as submit:
        for number in range(50):
            submit(done.append, number)
    assert sorted(done) == list(range(50))


def test_exit_cancels_functions_that_have_not_started(side):
    """A queued function is cancelled on exit if it was submitted so; any other one runs."""
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
    """A running function is waited for even if it was to be cancelled on exit; its result counts."""
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
    """The failure of the function that was submitted first is raised, not the one that came first."""
    later_failed = threading.Event()

    def fail_last():
        assert later_failed.wait(WAIT)
        raise ValueError("first submitted")

    with pytest.raises(ValueError, match="first submitted"), side.threads() as submit:  # noqa: PT012
        submit(int)
        submit(fail_last)
        submit(fail, KeyError("second submitted")).add_done_callback(lambda future: later_failed.set())


def test_failures_of_threads_that_are_not_raised_on_exit(side):
    """An exception stays in its future: by option, by the graph's set, as an interrupt, or when cancelled."""
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


def test_a_failure_of_the_body_takes_precedence_over_those_of_threads(side):
    """The exception of the body is raised; that of a function stays in its future."""
    with pytest.raises(LookupError, match="body"), side.threads() as submit:  # noqa: PT012
        future = submit(fail, ValueError("function"))
        raise LookupError("body")
    assert isinstance(future.exception(), ValueError)


def test_no_more_threads_than_allowed(side):
    """With a limit, that number of functions runs at once, and never more."""
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
    """An executor does not keep the result, the arguments or the future of a function that succeeded."""
    with side.threads() as submit:
        marker = Marker()
        future = submit(lambda given: given, marker)
        future.result(WAIT)
        references = [weakref.ref(marker), weakref.ref(future)]
        del marker, future
        # A worker drops its last function shortly after the future has its result, or with the next function.
        submit(int).result(WAIT)
        wait_for(lambda: not any(reference() for reference in references), submit)


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


def test_a_limit_of_0_threads_is_no_limit(our_side):
    """``max_concurrency=0`` means no limit, as for coroutines; LangGraph's executor of functions refuses it."""
    test_threads_without_a_limit(our_side, {"max_concurrency": 0})


@pytest.mark.parametrize("limit", [-1, "3"])
def test_wrong_limits_are_refused(side, limit):
    """A limit below 0 or of another type is refused by both executors."""
    with pytest.raises((ValueError, TypeError)):
        side.threads(max_concurrency=limit)

    async def make():
        with pytest.raises((ValueError, TypeError)):
            side.tasks(max_concurrency=limit)

    if limit == -1 or side.is_ours:
        asyncio.run(make())


def test_threads_show_in_the_manager(our_side):
    """A running function has a record with its name; the counters have its outcome."""
    go = threading.Event()
    with our_side.threads() as submit:
        started = threading.Event()

        def work():
            started.set()
            assert go.wait(WAIT)

        submit(work, __name__="node")
        assert started.wait(WAIT)
        assert [info["name"] for info in our_side.manager.get_task_info()] == ["node"]
        go.set()
    assert our_side.manager.stats()["names"]["node"]["completed"] == 1


# -- coroutines as tasks ----------------------------------------------------------------------------------------------


async def test_submit_of_tasks_is_a_bound_method(side):
    """A WeakMethod can hold the result of the context manager; it dies with the executor."""
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
    """A task has the name that was given, or some name by default."""
    async with side.tasks(max_concurrency=1) as submit:
        named, unnamed = submit(value, __name__="node"), submit(value)
        assert named.get_name() == "node"
        assert unnamed.get_name()


async def test_keyword_arguments_reach_the_coroutine_function(side):
    """Only options with underscores are the executor's; all other keywords are the function's."""
    names = ("name", "timeout", "context", "loop", "config", "kwargs", "coro", "task", "record", "eager_start")
    keywords = dict.fromkeys(names, 1)

    async def give(*args, **kwargs):
        return args, kwargs

    async with side.tasks() as submit:
        options = {"__name__": "all", "__cancel_on_exit__": False, "__reraise_on_exit__": True, "__next_tick__": True}
        assert await submit(give, 1, 2, **options, **keywords) == ((1, 2), keywords)


@pytest.mark.skipif(not STARTS_EAGERLY, reason="no eager tasks before Python 3.12")
async def test_tasks_start_at_once(side):
    """The coroutine runs to its first suspension inside submit; one that does not suspend is done after it."""
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
    """With ``__next_tick__`` the coroutine does not start before the submitter yields to the loop."""
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
    """A coroutine sees the variables as they were at submit; its changes stay its own."""
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
    """On exit every coroutine has ended, even those that had not started."""
    done = []

    async def work(number):
        await asyncio.sleep(0)
        done.append(number)

    async with side.tasks(max_concurrency=2) as submit:
        for number in range(50):
            submit(work, number)
    assert sorted(done) == list(range(50))


async def test_exit_cancels_tasks_that_were_submitted_so(side):
    """Such a task is cancelled on exit and awaited; any other one runs to its end."""
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
    """The failure of the coroutine that was submitted first is raised, not the one that came first."""
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
    """An exception stays in its task: by option, by the graph's set, as an interrupt, or when cancelled."""
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


async def test_a_failure_of_the_body_takes_precedence_over_those_of_tasks(side):
    """The exception of the body is raised; that of a coroutine stays in its task."""
    with pytest.raises(LookupError, match="body"):  # noqa: PT012
        async with side.tasks() as submit:
            task = submit(failing, ValueError("coroutine"))
            raise LookupError("body")
    assert isinstance(task.exception(), ValueError)


async def test_no_more_tasks_than_allowed(side):
    """With a limit, that number of coroutines runs at once, never more, and each runs once."""
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
    """Without a limit, or with 0, coroutines that wait for each other run at once."""
    together = asyncio.Barrier(4)
    async with side.tasks(**config) as submit:
        for _ in range(4):
            submit(together.wait)


async def test_finished_tasks_are_dropped(side):
    """An executor does not keep the result, the arguments or the task of a coroutine that succeeded."""
    async with side.tasks() as submit:
        marker = Marker()
        task = submit(value, marker)
        await task
        references = [weakref.ref(marker), weakref.ref(task)]
        del marker, task
        await asyncio.sleep(0)
        gc.collect()
        assert [reference() for reference in references] == [None, None]


async def test_tasks_submitted_from_threads(our_side):
    """A coroutine submitted from another thread runs on the loop, in the context of that thread."""
    results = []

    async def where(number):
        return number, asyncio.get_running_loop(), variable.get()

    def other_thread(submit, number):
        variable.set(f"thread {number}")
        results.append(submit(where, number).result(WAIT))

    async with our_side.tasks() as submit:
        loop = asyncio.get_running_loop()
        threads = [asyncio.to_thread(other_thread, submit, number) for number in range(4)]
        await asyncio.gather(*threads)
        await loop.shutdown_default_executor()
    assert sorted(results, key=lambda result: result[0]) == [(number, loop, f"thread {number}") for number in range(4)]


async def test_a_cancelled_exit_ends_its_tasks(our_side):
    """A cancelled exit cancels its tasks and waits for them; LangGraph's leaves them running."""
    ended = []

    async def work():
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def run():
        async with our_side.tasks() as submit:
            submit(work)

    task = asyncio.ensure_future(run())
    await until(lambda: our_side.manager.get_task_count() == 1)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cleaned up"]


async def test_tasks_show_in_the_manager(our_side):
    """A running coroutine has a record with its name, one that waits for a slot is queued, and all are counted."""
    go = asyncio.Event()
    async with our_side.tasks(max_concurrency=1) as submit:
        submit(after, go, __name__="node")
        submit(after, go, __name__="node")
        await asyncio.sleep(0)
        assert [(info["name"], info["state"]) for info in our_side.manager.get_task_info()] == [
            ("node", "running"),
            ("node", "queued"),
        ]
        go.set()
    assert our_side.manager.stats()["names"]["node"]["completed"] == 2


async def test_interrupts_are_not_logged_as_errors(our_side, caplog):
    """An interrupt is a signal between a node and its graph; no log record calls it an error."""
    async with our_side.tasks() as submit:
        submit(failing, GraphInterrupt(()))
    with our_side.threads() as submit:
        submit(fail, GraphInterrupt(()))
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


async def test_partials_and_callable_objects_are_accepted(side):
    """Any callable that returns a coroutine is accepted; checkpointers pass bound methods of any kind."""

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

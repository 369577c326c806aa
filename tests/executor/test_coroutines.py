"""BackgroundExecutor in coroutines: ``async with``, awaited futures, and executors that live as long as a manager."""

import asyncio
import logging
import threading
import time

import pytest
from work import until

import bgtasks
from bgtasks import BackgroundExecutor, ExecutorClosedError


@pytest.fixture
def make(make_manager):
    """Give a maker of executors on managers of the twin."""
    return lambda manager=None, **options: BackgroundExecutor(manager=manager or make_manager(), **options)


def fails(error):
    """Raise."""
    raise error


def workers():
    """Return the live threads of executors."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("bgtasks-worker")]


class Turns:
    """Counts the turns of the loop."""

    def __init__(self):
        self.count = 0
        self._task = asyncio.ensure_future(self._beat())

    async def _beat(self):
        while True:
            await asyncio.sleep(0)
            self.count += 1

    async def stop(self):
        """End the counting."""
        self._task.cancel()
        await asyncio.wait([self._task])


async def test_a_future_is_awaited(make):
    """Awaiting gives the result or raises the error, in gather and with a timeout, too."""
    error, release = ValueError("expected"), threading.Event()
    async with make() as submit:
        assert await submit(pow, 2, 10) == 1024
        done = submit(pow, 2, 3)
        await until(done.done)
        assert await done == 8
        with pytest.raises(ValueError, match="expected") as caught:
            await submit(fails, error, __reraise_on_exit__=False)
        assert caught.value is error
        assert await asyncio.gather(submit(pow, 2, 1), submit(pow, 2, 2)) == [2, 4]
        assert await asyncio.wait_for(submit(pow, 2, 5), 5) == 32
        with pytest.raises(TimeoutError):
            await submit(release.wait, 10, __timeout__=0.01, __reraise_on_exit__=False)
    release.set()
    await until(lambda: not workers())


async def test_a_cancelled_wait_for_a_future(make):
    """A function that waits is cancelled with the wait; one that runs goes on."""
    entered, release = threading.Event(), threading.Event()

    def runs():
        entered.set()
        assert release.wait(10)
        return "done"

    async def waits(future):
        return await future

    async with make(max_concurrency=1) as submit:
        running, waiting = submit(runs), submit(pow, 2, 3)
        tasks = [asyncio.ensure_future(waits(future)) for future in (running, waiting)]
        await until(entered.is_set)
        await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert waiting.cancelled()
        assert not running.done()
        release.set()
    assert running.result() == "done"


@pytest.mark.parametrize("kind", ["threads", "processes"])
async def test_the_end_of_the_block_leaves_the_loop_free(make, kind):
    """The loop goes on while the block waits for its functions, and while its threads and processes end."""
    async with make(kind=kind, max_concurrency=2) as submit:
        futures = [submit(time.sleep, 0.1) for _ in range(2)]
        turns = Turns()
    assert turns.count > 10
    await turns.stop()
    assert all(future.done() for future in futures)
    assert not workers()
    with pytest.raises(ExecutorClosedError):
        submit(pow, 2, 3)


async def test_the_end_of_the_block_raises_and_cancels_as_that_of_a_plain_one(make, caplog):
    """The first failure is raised, functions with __cancel_on_exit__ are abandoned, later submissions are awaited."""
    release = threading.Event()
    late = []
    executor = make(max_concurrency=2)
    with pytest.raises(ValueError, match="first"):
        async with executor as submit:
            submit(fails, ValueError("first"))
            submit(fails, KeyError("second"))
            hanging = submit(release.wait, 10, __cancel_on_exit__=True)
            submit(time.sleep, 0.01).add_done_callback(lambda _: late.append(submit(pow, 2, 3)))
            await until(hanging.running)
    assert hanging.cancelled()
    assert late[0].result() == 8
    assert executor.manager.stats()["abandoned"] == 1
    with pytest.raises(KeyError, match="of the block"):
        async with make() as submit:
            submit(fails, ValueError("not raised"))
            raise KeyError("of the block")
    release.set()
    await until(lambda: not workers())


async def test_a_cancelled_end_of_the_block_abandons_what_runs(make):
    """However often it is cancelled: no function waits any more, running ones are abandoned, no idle thread is left."""
    release, futures = threading.Event(), []

    async def block():
        async with make(max_concurrency=1) as submit:
            futures.extend([submit(release.wait, 10), submit(pow, 2, 3)])

    task = asyncio.ensure_future(block())
    await until(lambda: futures and futures[0].running())
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [future.cancelled() for future in futures] == [True, True]
    release.set()
    await until(lambda: not workers())


async def test_an_open_executor_lives_as_long_as_its_manager(make_manager, make, caplog):
    """Shutdown lets functions finish while it drains; then submit is refused, and no thread is left."""
    manager = make_manager(drain_timeout=10.0)
    submit = make(manager).open()
    assert await submit(pow, 2, 10) == 1024
    with pytest.raises(ValueError, match="expected"):
        await submit(fails, ValueError("expected"))
    finishes = submit(time.sleep, 0.05)
    stats = await manager.shutdown()
    assert (stats["status"], stats["remaining_tasks"]) == ("completed", 0)
    assert finishes.result() is None
    assert manager.stats()["completed"] == 2
    assert [record.getMessage() for record in caplog.records if "failed" in record.getMessage()] != []
    assert not workers()
    with pytest.raises(ExecutorClosedError, match="closed, by its manager's shutdown"):
        submit(pow, 2, 3)


@pytest.mark.parametrize("kind", ["threads", "processes"])
async def test_shutdown_abandons_the_functions_of_an_open_executor(make_manager, make, kind, caplog):
    """When its time is over, waiting functions are cancelled, and running ones abandoned, named and counted as left."""
    manager = make_manager()
    executor = make(manager, kind=kind, max_concurrency=1)
    submit = executor.open()
    release = threading.Event()
    function = release.wait if kind == "threads" else time.sleep
    hanging, waiting = submit(function, 60, __name__="hangs"), submit(pow, 2, 3)
    await until(hanging.running)
    turns = Turns()
    stats = await manager.shutdown(0.2)
    assert turns.count > 10
    await turns.stop()
    assert (stats["status"], stats["remaining_names"]) == ("timeout", ["hangs"])
    assert hanging.cancelled()
    assert waiting.cancelled()
    assert "'hangs' still runs at the end of shutdown" in caplog.text
    assert manager.stats()["abandoned"] == 1
    assert (await manager.shutdown())["status"] == "already_shutdown"
    release.set()
    await until(lambda: not workers())


async def test_closing_an_open_executor(make_manager, make):
    """Close waits for functions at most its timeout, and only once; the manager goes on without the executor."""
    manager = make_manager()
    executor = make(manager)
    submit = executor.open()
    with pytest.raises(ExecutorClosedError):
        executor.open()
    future = submit(time.sleep, 0.02)
    await executor.close()
    assert future.result() is None
    with pytest.raises(ExecutorClosedError):
        submit(pow, 2, 3)
    await executor.close()
    release = threading.Event()
    other = make(manager)
    hanging = other.open()(release.wait, 10)
    with pytest.raises(bgtasks.InvalidOptionError, match="timeout"):
        await other.close(-1)
    await other.close(0)
    assert hanging.cancelled()
    release.set()
    await until(lambda: not workers())
    unopened = make(manager)
    await unopened.close()
    assert (await manager.shutdown())["status"] == "completed"


async def test_an_open_executor_keeps_no_failure(make_manager, make, caplog):
    """No block raises them: each is logged, and in its future."""
    manager, said = make_manager(), []
    caplog.set_level(logging.ERROR)
    executor = make(manager)
    submit = executor.open()
    futures = [submit(fails, ValueError(str(number))) for number in range(3)]
    await asyncio.gather(*futures, return_exceptions=True)
    said.extend(record.getMessage() for record in caplog.records)
    assert len(said) == 3
    assert not executor._failures
    await manager.shutdown()

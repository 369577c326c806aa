"""The tests of users for LangGraph's executors, unchanged except for imports and markers."""

import asyncio
import time
from concurrent.futures import Future

import pytest

from bgtasks import AsyncBackgroundExecutor, BackgroundExecutor

# LangChain's is a TypedDict: a plain dict at run time.
RunnableConfig = dict


@pytest.fixture
def config():
    """Give a config with a limit."""
    return RunnableConfig(max_concurrency=5)


@pytest.fixture
def executor(config):
    """Give ``submit``."""
    with BackgroundExecutor(config) as submit:
        yield submit


def test_usage_of_the_sync_executor():
    """The program of the usage guide."""

    def sample_task(x: int) -> int:
        return x * 2

    config = RunnableConfig(max_concurrency=5)

    with BackgroundExecutor(config) as submit:
        # Submit task with default settings
        future = submit(sample_task, 10)
        result = future.result()  # Returns 20
        assert result == 20

        # Submit task with cancellation on exit
        future = submit(sample_task, 15, __cancel_on_exit__=True, __reraise_on_exit__=False)
    assert future.cancelled() or future.result() == 30


def test_usage_of_the_async_executor():
    """The program of the usage guide, with its own loop."""

    async def async_task(x: int) -> int:
        await asyncio.sleep(1)
        return x * 2

    async def main():
        config = RunnableConfig(max_concurrency=5)

        async with AsyncBackgroundExecutor(config) as submit:
            # Submit async task
            task = submit(async_task, 10)
            result = await task  # Returns 20
            assert result == 20

            # Submit with next tick delay
            task = submit(async_task, 15, __next_tick__=True, __name__="delayed_task")
        assert (task.get_name(), task.result()) == ("delayed_task", 30)

    asyncio.run(main())


def test_sync_executor_basic():
    """Test basic synchronous execution."""

    def sample_task(x: int) -> int:
        return x * 2

    config = RunnableConfig()
    with BackgroundExecutor(config) as submit:
        future = submit(sample_task, 10)
        assert isinstance(future, Future)
        assert future.result() == 20


async def test_sync_executor_cancellation():
    """Test task cancellation behavior."""

    def long_running_task() -> None:
        time.sleep(10)

    config = RunnableConfig()
    begin = time.monotonic()
    with BackgroundExecutor(config) as submit:
        future = submit(long_running_task, __cancel_on_exit__=True)

    assert future.cancelled()
    assert time.monotonic() - begin < 9


def test_sync_executor_error_propagation():
    """Test error handling and propagation."""

    def failing_task() -> None:
        raise ValueError("Task failed")

    config = RunnableConfig()
    with pytest.raises(ValueError):
        with BackgroundExecutor(config) as submit:
            future = submit(failing_task)
            time.sleep(0.1)  # Allow task to complete
    assert isinstance(future.exception(), ValueError)


async def test_async_executor_basic():
    """Test basic async execution."""

    async def sample_task(x: int) -> int:
        return x * 2

    config = RunnableConfig()
    async with AsyncBackgroundExecutor(config) as submit:
        task = submit(sample_task, 10)
        assert isinstance(task, asyncio.Task)
        result = await task
        assert result == 20


async def test_async_executor_concurrency_limit():
    """Test concurrency limiting."""

    async def slow_task(x: int) -> int:
        await asyncio.sleep(0.1)
        return x

    config = RunnableConfig(max_concurrency=2)
    start_time = time.time()

    async with AsyncBackgroundExecutor(config) as submit:
        tasks = [submit(slow_task, i) for i in range(4)]
        results = await asyncio.gather(*tasks)

    duration = time.time() - start_time
    assert duration >= 0.2  # Should take at least 2 cycles
    assert results == [0, 1, 2, 3]


async def test_async_executor_next_tick():
    """Test next tick behavior."""
    events = []

    async def tracked_task() -> None:
        events.append("task")

    config = RunnableConfig()
    async with AsyncBackgroundExecutor(config) as submit:
        events.append("before")
        submit(tracked_task, __next_tick__=True)
        events.append("after")
        await asyncio.sleep(0.1)

    assert events == ["before", "after", "task"]


async def test_async_executor_error_handling():
    """Test error handling in async executor."""

    async def failing_task():
        raise ValueError("Async task failed")

    config = RunnableConfig()
    with pytest.raises(ValueError):
        async with AsyncBackgroundExecutor(config) as submit:
            task = submit(failing_task)
            await task


def test_executor_cleanup():
    """Test proper resource cleanup."""
    tasks_completed = []

    def cleanup_task():
        tasks_completed.append(True)

    config = RunnableConfig()
    with BackgroundExecutor(config) as submit:
        submit(cleanup_task, __cancel_on_exit__=False)

    assert tasks_completed == [True]


@pytest.mark.benchmark
def test_executor_performance(benchmark):
    """Benchmark executor performance."""

    def quick_task():
        return sum(range(1000))

    config = RunnableConfig()

    def run_batch():
        with BackgroundExecutor(config) as submit:
            futures = [submit(quick_task) for _ in range(100)]
            return [f.result() for f in futures]

    results = benchmark(run_batch)
    assert len(results) == 100


def test_the_executor_of_a_fixture(executor):
    """The fixture yields submit, inside the block of its executor."""
    assert executor(sum, [1, 2]).result() == 3

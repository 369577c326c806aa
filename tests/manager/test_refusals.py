"""Bad input: a named error with advice, a closed coroutine, no counted task."""

import asyncio
import contextvars
import decimal
import inspect
import math

import pytest
from work import forever, value

from bgtasks import (
    BgtasksError,
    InvalidOptionError,
    InvalidTimeoutError,
    ManagerClosedError,
    NoRunningLoopError,
    NotACoroutineError,
)

WAYS = ("create_task", "fire", "spawn")


async def start(manager, way, coro, **options):
    """Pass a coroutine to the manager by one of its methods."""
    result = getattr(manager, way)(coro, **options)
    return await result if inspect.isawaitable(result) and way == "spawn" else result


@pytest.mark.parametrize("way", WAYS)
async def test_a_coroutine_function_is_refused(make_manager, way):
    """The error for a function instead of its coroutine says to call it."""
    manager = make_manager()
    with pytest.raises(NotACoroutineError, match=r"call it, create_task\(value\(\.\.\.\)\)"):
        await start(manager, way, value)
    assert manager.stats()["started"] == 0


@pytest.mark.parametrize("way", WAYS)
async def test_other_objects_are_refused_by_type(make_manager, way):
    """Futures, awaitables, numbers and objects whose repr fails are refused with their type in the text."""
    manager = make_manager()

    class Nameless:
        def __repr__(self):
            raise RuntimeError("no repr")

    future = asyncio.get_running_loop().create_future()
    things = ((future, "runs already"), (7, "got int: 7"), (None, "NoneType"), (Nameless(), "Nameless object"))
    for thing, text in things:
        with pytest.raises(NotACoroutineError, match=text):
            await start(manager, way, thing)
    assert not future.cancelled()
    assert manager.stats()["started"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("timeout", [0, -1, -0.5, math.nan, math.inf, "3", b"3", object(), True, [1], 10**400])
async def test_a_timeout_that_is_no_positive_number_is_refused(make_manager, way, timeout):
    """The error names the value and the way to have no timeout; the coroutine is closed."""
    manager = make_manager()
    coro = forever()
    with pytest.raises(InvalidTimeoutError, match="None for no timeout"):
        await start(manager, way, coro, timeout=timeout)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert manager.stats()["started"] == 0


@pytest.mark.parametrize("timeout", [1, 0.001, decimal.Decimal("2.5"), 1e300])
async def test_every_positive_number_is_accepted_as_a_timeout(make_manager, timeout):
    """Whole numbers, decimals and infinity are accepted and shown as seconds."""
    manager = make_manager()
    manager.create_task(forever(), timeout=timeout)
    assert manager.get_task_info()[0]["timeout"] == float(timeout)
    await manager.shutdown()


@pytest.mark.parametrize("way", WAYS)
async def test_a_contextvars_context_as_context_is_refused(make_manager, way):
    """The error names the right argument, and the coroutine is closed."""
    manager = make_manager()
    coro = forever()
    with pytest.raises(TypeError, match="contextvars_context="):
        await start(manager, way, coro, context=contextvars.copy_context())
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


@pytest.mark.parametrize("way", ["create_task", "fire"])
def test_without_a_running_loop_the_threadsafe_call_is_named(make_manager, way):
    """Outside a loop, or in another thread, the error names create_task_threadsafe and the coroutine is closed."""
    manager = make_manager()
    coro = forever()
    with pytest.raises(NoRunningLoopError, match=r"create_task_threadsafe\(\)"):
        getattr(manager, way)(coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


@pytest.mark.parametrize("way", WAYS)
async def test_work_after_shutdown_is_refused(make_manager, way):
    """A manager that was shut down refuses with an error that says so, and closes the coroutine."""
    manager = make_manager()
    await manager.shutdown()
    coro = forever()
    with pytest.raises(ManagerClosedError, match="shut down"):
        await start(manager, way, coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


async def test_an_entered_context_for_an_eager_start_loses_nothing(make_manager, loop_kind):
    """If a task cannot be built, the error propagates, the coroutine is closed and the record removed."""
    if not hasattr(asyncio, "eager_task_factory"):
        return
    manager = make_manager()
    context = contextvars.copy_context()
    coro = forever()
    with pytest.raises(RuntimeError, match="already entered"):
        context.run(manager.create_task, coro, eager_start=True, contextvars_context=context)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert manager.get_task_count() == 0
    assert manager.stats()["started"] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"default_shutdown_timeout": -1}, "default_shutdown_timeout"),
        ({"default_shutdown_timeout": "30"}, "default_shutdown_timeout"),
        ({"drain_timeout": math.nan}, "drain_timeout"),
        ({"max_pending_tasks": -1}, "max_pending_tasks"),
        ({"max_pending_tasks": 1.5}, "max_pending_tasks"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"overflow": "block"}, "spawn"),
        ({"on_error": "print"}, "on_error"),
        ({"history": -1}, "history"),
    ],
)
def test_options_outside_their_values_are_refused(manager_of_twin, options, text):
    """Each option of the manager is checked in the constructor."""
    with pytest.raises(InvalidOptionError, match=text):
        manager_of_twin.BackgroundTaskManager(**options)


async def test_waits_that_are_no_seconds_are_refused(make_manager):
    """Shutdown and wait_for_all accept seconds from 0 on; a refused shutdown leaves the manager open."""
    manager = make_manager()
    for seconds in (-1, math.nan, "1"):
        with pytest.raises(InvalidTimeoutError, match="timeout"):
            await manager.wait_for_all(timeout=seconds)
        with pytest.raises(InvalidTimeoutError, match="timeout"):
            await manager.shutdown(timeout=seconds)
        with pytest.raises(InvalidTimeoutError, match="drain"):
            await manager.shutdown(drain=seconds)
    await manager.create_task(value())


def test_every_error_has_one_base():
    """Every error of bgtasks can be caught as BgtasksError."""
    from bgtasks import errors

    assert all(issubclass(getattr(errors, name), BgtasksError) for name in errors.__all__)


def test_every_error_can_be_imported_from_the_package(bgtasks_module):
    """Every error is public, and in the tree in the docstring of errors.py."""
    from bgtasks import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    defined = {value.__name__ for value in classes if value.__module__ == errors.__name__}
    assert defined == set(errors.__all__) <= set(bgtasks_module.__all__)
    assert all(f" {name} " in errors.__doc__ for name in defined - {"BgtasksError"})

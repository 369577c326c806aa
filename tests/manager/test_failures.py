"""Failures: reported once, immediately, and still raised when the task is awaited."""

import asyncio
import gc
import logging
import sys
import traceback
from pathlib import Path

import pytest
from work import failing, failing_later, forever, until, value


def errors_of(caplog):
    """Return the ERROR records of bgtasks."""
    return [record for record in caplog.records if record.name == "bgtasks" and record.levelno >= logging.ERROR]


@pytest.mark.parametrize("how", ["not awaited", "awaited", "awaited late", "wait_for_all"])
async def test_a_failure_is_reported_exactly_once(make_manager, caplog, how):
    """Awaited or not: one ERROR record with traceback, no "never retrieved", and await still raises."""
    manager = make_manager()
    error = ValueError("expected")
    task = manager.create_task(failing_later(error), name="fails", context={"order": 7})
    if how == "awaited":
        with pytest.raises(ValueError, match="expected"):
            await task
    elif how == "wait_for_all":
        with pytest.raises(ValueError, match="expected"):
            await manager.wait_for_all()
    else:
        await until(task.done)
        if how == "awaited late":
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="expected"):
                await task
    await asyncio.sleep(0)
    (record,) = errors_of(caplog)
    assert record.exc_info[1] is error
    assert "fails" in record.getMessage()
    assert "ValueError: expected" in record.getMessage()
    assert (record.task_name, record.task_context) == ("fails", {"order": 7})
    assert record.task_id == 1
    del task, record
    gc.collect()


async def test_the_logged_traceback_begins_with_the_users_frame(make_manager, caplog):
    """The logged traceback does not show bgtasks' coroutine around the user's."""
    manager = make_manager()
    await asyncio.wait([manager.create_task(failing_later(ValueError("expected")))])
    traceback = errors_of(caplog)[0].exc_info[2]
    assert traceback.tb_frame.f_code.co_name == "failing_later"


async def test_success_and_cancellation_are_debug_a_timeout_is_a_warning(make_manager, caplog):
    """The levels are those of the reference."""
    manager = make_manager()
    with caplog.at_level(logging.DEBUG, logger="bgtasks"):
        manager.create_task(value(), name="fine")
        manager.create_task(forever(), name="stopped").cancel()
        manager.create_task(forever(), name="late", timeout=0.001)
        await manager.wait_for_all(return_exceptions=True)
    levels = {(record.task_name, record.levelname) for record in caplog.records if record.name == "bgtasks"}
    assert levels >= {("fine", "DEBUG"), ("stopped", "DEBUG"), ("late", "WARNING")}
    assert not errors_of(caplog)


async def test_the_level_may_change_while_tasks_run(make_manager, caplog):
    """Completed tasks are logged only while DEBUG is enabled."""
    manager = make_manager()
    logger = logging.getLogger("bgtasks")
    usual = logger.level
    try:
        for level, expected in ((logging.INFO, 0), (logging.DEBUG, 1), (logging.INFO, 1)):
            logger.setLevel(level)
            await manager.create_task(value())
            assert len([record for record in caplog.records if "completed" in record.getMessage()]) == expected
    finally:
        logger.setLevel(usual)


async def test_on_error_is_called_for_each_failure(make_manager, caplog):
    """The hook is called with the task's info and the exception, after the log record."""
    calls = []
    manager = make_manager(on_error=lambda info, error: calls.append((info, error, len(errors_of(caplog)))))
    error = ValueError("expected")
    manager.create_task(failing(error), name="fails", context={"a": 1}, timeout=5)
    manager.create_task(value())
    await manager.wait_for_all(return_exceptions=True)
    ((info, reported_error, logged),) = calls
    assert reported_error is error
    assert logged == 1
    assert (info["name"], info["context"], info["state"], info["done"]) == ("fails", {"a": 1}, "failed", True)


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, GeneratorExit])
async def test_a_hook_that_raises_does_no_harm(make_manager, caplog, loop_errors, error):
    """An exception of on_error goes to the loop's handler once; counters and later tasks are not affected."""

    def hook(info, exception):
        raise error("in the hook")

    manager = make_manager(on_error=hook)
    task = manager.create_task(failing(ValueError("expected")), name="fails")
    await asyncio.wait([task])
    await manager.create_task(value())
    (context,) = loop_errors
    assert isinstance(context["exception"], error)
    assert "fails" in context["message"]
    loop_errors.clear()
    assert isinstance(task.exception(), ValueError)
    assert (manager.stats()["failed"], manager.stats()["completed"]) == (1, 1)


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "timed out"])
async def test_a_logging_handler_that_raises_does_no_harm(make_manager, loop_errors, outcome):
    """The loop reports a broken logging handler once; the task ends as usual."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("in the handler")

    manager = make_manager()
    logger = logging.getLogger("bgtasks")
    handler = Broken()
    logger.addHandler(handler)
    usual = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        if outcome == "failed":
            task = manager.create_task(failing(ValueError("expected")))
        elif outcome == "completed":
            task = manager.create_task(value(5))
        else:
            task = manager.create_task(forever(), timeout=0.001 if outcome == "timed out" else None)
            if outcome == "cancelled":
                task.cancel()
        await asyncio.wait([task])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(usual)
    assert {type(context["exception"]) for context in loop_errors} == {RuntimeError}
    assert len(loop_errors) == (2 if outcome == "timed out" else 1)
    loop_errors.clear()
    assert manager.get_task_count() == 0
    assert manager.stats()[outcome.replace(" ", "_")] == 1
    assert task.cancelled() == (outcome in ("cancelled", "timed out"))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("eager", [False, True])
def test_exceptions_that_stop_the_loop_pass_through(make_manager, caplog, error, eager):
    """SystemExit and KeyboardInterrupt leave the loop as with a bare task; the record ends, nothing is logged."""
    manager = make_manager()

    async def main():
        manager.create_task(failing(error("stop")), eager_start=eager)
        await asyncio.sleep(3600)

    with pytest.raises(error, match="stop"):
        asyncio.run(main())
    gc.collect()
    assert manager.stats()["failed"] == 1
    assert not caplog.records


async def test_generator_exit_is_a_failure(make_manager, caplog):
    """A coroutine that raises GeneratorExit itself is counted as failed, and its task holds the exception."""
    manager = make_manager()
    task = manager.create_task(failing_later(GeneratorExit("expected")))
    await asyncio.wait([task])
    assert isinstance(task.exception(), GeneratorExit)
    assert manager.stats()["failed"] == 1
    assert len(errors_of(caplog)) == 1


async def test_a_coroutine_that_raises_cancelled_error_itself_counts_as_cancelled(make_manager):
    """CancelledError from inside ends the task as cancelled, as in asyncio."""
    manager = make_manager()
    task = manager.create_task(failing_later(asyncio.CancelledError("inside")))
    await asyncio.wait([task])
    assert task.cancelled()
    assert manager.stats()["cancelled"] == 1


async def test_an_error_whose_text_fails_is_still_reported(make_manager, caplog):
    """A failure whose str() raises is counted, kept in the history and reported."""

    class TextlessError(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    manager = make_manager(history=1)
    logger = logging.getLogger("bgtasks")
    logger.addFilter(reject)
    try:
        await asyncio.wait([manager.create_task(failing(TextlessError()))])
    finally:
        logger.removeFilter(reject)
    assert manager.get_history()[0]["error"] == "TextlessError"


def reject(record):
    """Reject the record."""
    return False


async def test_an_error_hook_may_ask_for_the_exception_being_handled(make_manager):
    """Inside on_error sys.exc_info() is the task's exception; afterwards it is as before."""
    seen = []
    manager = make_manager(on_error=lambda info, error: seen.append((sys.exc_info()[1], error)))

    async def fails():
        raise ValueError("expected")

    async def fails_while_handling():
        try:
            raise KeyError("outer")
        except KeyError as outer:
            task = manager.create_task(fails(), eager_start=True)
            seen.append((sys.exc_info()[1], outer))
        await asyncio.wait([task])

    await manager.create_task(fails_while_handling())
    assert all(handled is expected for handled, expected in seen)
    assert sorted(type(expected).__name__ for _, expected in seen) == ["KeyError", "ValueError"]


async def test_the_stack_of_running_work_holds_no_frame_of_the_compiled_registry(make_manager, twin, request):
    """A traceback printed by the user's code shows only its frames, the loop's, and a native coroutine around it."""
    manager = make_manager()

    async def look():
        return [(Path(frame.filename).name, frame.name) for frame in traceback.extract_stack()]

    names = await manager.create_task(look())
    native = twin == "python" or request.config.option.native or sys.version_info >= (3, 14)
    assert names[-1][1] == "look"
    assert (names[-2] == ("_task.py", "run")) == native


@pytest.mark.parametrize(
    ("level", "outcomes"), [(logging.INFO, ["failed"]), (logging.DEBUG, ["cancelled", "completed", "failed"])]
)
async def test_without_debug_only_failures_are_reported(make_manager, monkeypatch, caplog, level, outcomes):
    """The registry checks the logger's cache, and reports no end that would not be logged."""
    manager = make_manager()
    reported = []
    report = manager._report

    def note(record, error):
        reported.append(record.outcome)
        report(record, error)

    monkeypatch.setattr(type(manager), "_report", lambda self, record, error: note(record, error))
    with caplog.at_level(level, logger="bgtasks"):
        # Fills the cache.
        logging.getLogger("bgtasks").isEnabledFor(logging.DEBUG)
        manager.create_task(value())
        manager.create_task(failing(ValueError("expected")))
        manager.create_task(forever()).cancel()
        await manager.wait_for_all(return_exceptions=True)
    assert sorted(reported) == outcomes

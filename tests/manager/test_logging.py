"""What the log says: attributes, contexts and places, in the words of the user's program."""

import asyncio
import logging
import re
import threading
import time

import pytest
from internals import release_closed_loops
from work import failing, forever, until, value

from bgtasks import BackgroundExecutor


class Formatted(logging.Handler):
    """Formats every record with the three attributes, and raises where one lacks them."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(task_id)s|%(task_name)s|%(task_context)s|%(message)s"))
        self.lines = []

    def emit(self, record):
        """Format a record."""
        self.lines.append(self.format(record))


@pytest.fixture
def formatted():
    """Have the records of bgtasks formatted with the attributes of tasks."""
    handler = Formatted()
    logger = logging.getLogger("bgtasks")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_records_about_no_single_task_have_the_attributes_too(make_manager, formatted):
    """A format that names the attributes of tasks fits every record of bgtasks, those of its publishers included."""
    manager = make_manager(max_pending_tasks=1, overflow="drop_newest")

    async def leave():
        manager.create_task(forever(), name="left")
        assert not manager.fire(forever(), name="dropped")
        await manager.wait_for_all(timeout=0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    release_closed_loops(manager)
    logging.getLogger("bgtasks.events").warning("of a publisher")
    assert formatted.lines == [
        "None|None|{}|1 task is in flight (max_pending_tasks), no capacity for 'dropped': await spawn() to wait for "
        "it, or raise the limit. Dropped 1 so far; the next warning comes in 5 s at the earliest.",
        "None|None|{}|1 background task still runs after waiting 0 s for all: left (1)",
        "None|None|{}|A closed event loop left 1 background task behind, abandoned: left (1)",
        "None|None|{}|of a publisher",
    ]


def test_a_handler_may_wait_for_a_thread_that_asks_the_manager(make_manager, caplog):
    """Tasks of a closed loop are reported while no lock of the manager is held."""
    manager = make_manager()
    answers = []

    class Asking(logging.Handler):
        def emit(self, record):
            thread = threading.Thread(target=lambda: answers.append(manager.stats()["abandoned"]), daemon=True)
            thread.start()
            thread.join(10)

    async def leave():
        manager.create_task(forever(), name="left")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    handler = Asking()
    logging.getLogger("bgtasks").addHandler(handler)
    try:
        release_closed_loops(manager)
        assert answers == [1]
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()
        # The next loop is added, and the one before released.
        asyncio.run(manager.wait_for_all())
        asyncio.run(value_of(manager))
        assert answers == [1, 2]
    finally:
        logging.getLogger("bgtasks").removeHandler(handler)


async def value_of(manager):
    """Run a task."""
    await manager.create_task(value(1))


async def test_the_text_of_a_failure_names_the_context(make_manager, caplog):
    """Whoever reads the text alone learns which order it was."""
    manager = make_manager()
    with pytest.raises(ValueError, match="order"):
        await manager.create_task(failing(ValueError("order")), name="charge", context={"order": 7})
    assert caplog.records[-1].getMessage().endswith(": ValueError: order; context: {'order': 7}")
    assert caplog.records[-1].task_context == {"order": 7}


async def sleeps():
    """Wait in the standard library."""
    await asyncio.sleep(60)


async def test_a_timeout_says_where_the_task_hung_and_its_context(make_manager, caplog):
    """The place is in the user's code, with what that one called; no line of asyncio is named."""
    manager = make_manager()
    manager.create_task(sleeps(), name="slow", timeout=0.001, context={"order": 8})
    await until(lambda: not manager.get_task_count())
    record = next(record for record in caplog.records if "timed out" in record.getMessage())
    place = f"at {__file__}:{sleeps.__code__.co_firstlineno + 2} in sleeps (in asyncio.sleep)"
    assert record.getMessage() == (
        f"Background task 'slow' timed out after 0.001 seconds, {place}; context: {{'order': 8}}"
    )


async def test_a_coroutine_of_the_standard_library_is_named_alone(make_manager, caplog):
    """Where no frame is the user's there is no line to show."""
    manager = make_manager()
    manager.create_task(asyncio.sleep(60), name="slow", timeout=0.001)
    await until(lambda: not manager.get_task_count())
    assert "timed out after 0.001 seconds, in asyncio.sleep" in caplog.text


async def test_a_future_that_the_user_awaits_is_located_at_the_user(make_manager, caplog):
    """Nothing was called: there is nothing in parentheses."""

    async def waits():
        await asyncio.get_running_loop().create_future()

    manager = make_manager()
    manager.create_task(waits(), name="slow", timeout=0.001)
    await until(lambda: not manager.get_task_count())
    assert f"at {__file__}:{waits.__code__.co_firstlineno + 1} in " in caplog.text
    assert "(in" not in caplog.text


def hangs(event):
    """Wait in the standard library, in a thread."""
    event.wait(60)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_function_that_times_out_is_located_too(make_manager, caplog, kind):
    """In a thread at the user's line; of another process its number is known."""
    event = threading.Event()
    executor = BackgroundExecutor(kind=kind, manager=make_manager())
    with executor as submit:
        if kind == "threads":
            submit(hangs, event, __name__="slow", __timeout__=0.05, __reraise_on_exit__=False)
            place = re.escape(f"at {__file__}:{hangs.__code__.co_firstlineno + 2} in hangs (in threading.Event.wait)")
        else:
            submit(time.sleep, 60, __name__="slow", __timeout__=0.5, __reraise_on_exit__=False)
            place = r"in process \d+"
    event.set()
    assert re.search(rf"'slow' timed out after [\d.]+ seconds, {place}$", caplog.text, re.MULTILINE), caplog.text


async def test_a_failure_whose_error_has_no_text_is_logged(make_manager, formatted):
    """The log names the type of an error whose __str__ raises."""

    class Mute(Exception):  # noqa: N818
        def __str__(self):
            raise ValueError("no text")

    manager = make_manager()
    manager.create_task(failing(Mute()), name="mute")
    await until(lambda: not manager.get_task_count())
    assert [line for line in formatted.lines if "'mute' failed" in line and ": Mute" in line]

"""BackgroundExecutor with kind="processes" and kind="interpreters"."""

import concurrent.futures
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from child import child, is_running
from work import wait_until

from bgtasks import BackgroundExecutor, InvalidFunctionError, InvalidOptionError, NotPicklableError, WorkerDiedError
from bgtasks.executor._processes import ProcessRunner


class Unpicklable(Exception):  # noqa: N818
    """An error that can be pickled, but not unpickled."""

    def __init__(self, first, second):
        super().__init__(first)


def fails(error):
    """Raise."""
    raise error


def fails_unpicklably():
    """Raise an error that cannot be unpickled."""
    raise Unpicklable(1, 2)


def gives_a_function():
    """Return an object that cannot be pickled."""
    return lambda: None


async def coroutine():
    """Do nothing."""


@pytest.fixture
def make(make_manager):
    """Give a maker of executors for processes, on managers of the twin."""

    def make(**options):
        return BackgroundExecutor(kind="processes", manager=make_manager(), max_concurrency=2, **options)

    return make


def test_functions_run_in_processes_that_are_reused(make):
    """Arguments, results and errors are passed; an error has its traceback from there."""
    with make() as submit:
        first = submit(os.getpid).result(60)
        assert first != os.getpid()
        assert submit(int, "1000", base=2).result(60) == 8
        error = submit(fails, KeyError("there"), __reraise_on_exit__=False).exception(60)
        assert isinstance(error, KeyError)
        assert "in fails" in error.__notes__[0]


def test_a_failure_in_a_process_is_raised_at_the_end(make):
    """A failure in a process is raised as one in a thread."""
    with pytest.raises(ZeroDivisionError):
        with make() as submit:
            submit(divmod, 1, 0)


def test_a_function_that_runs_is_ended_with_its_process(make):
    """A function that is cancelled at the end of the block or by its timeout stops computing."""
    executor = make()
    begin = time.monotonic()
    with executor as submit:
        future = submit(time.sleep, 60, __cancel_on_exit__=True)
        timed = submit(time.sleep, 60, __timeout__=0.05, __reraise_on_exit__=False)
        assert isinstance(timed.exception(60), TimeoutError)
        assert submit(pow, 2, 3).result(60) == 8
        while not future.running():
            time.sleep(0.001)
    assert future.cancelled()
    assert time.monotonic() - begin < 50
    stats = executor.manager.stats()
    assert (stats["abandoned"], stats["timed_out"]) == (1, 1)


def test_a_function_abandoned_before_its_process_began_starts_no_process():
    """A function that is abandoned before its process has started does not start one."""
    runner = ProcessRunner()
    runner.interrupt()
    with pytest.raises(WorkerDiedError, match="abandoned before"):
        runner.run(SimpleNamespace(__qualname__="late"))
    runner.close()


def test_a_process_that_dies_is_replaced(make):
    """Its function fails with the exit code; the next function gets a new process."""
    with make() as submit:
        error = submit(os._exit, 3, __reraise_on_exit__=False).exception(60)
        assert isinstance(error, WorkerDiedError)
        assert "exit code 3" in str(error)
        assert submit(pow, 2, 3).result(60) == 8


def test_objects_that_cannot_be_pickled_are_refused(make):
    """Functions and arguments are refused at once, results and errors fail the future; the message gives advice."""
    with make() as submit:
        with pytest.raises(NotPicklableError, match="define the function at the top of a module"):
            submit(lambda: 1)
        with pytest.raises(NotPicklableError):
            submit(print, lambda: 1)
        with pytest.raises(InvalidFunctionError):
            submit(coroutine)
        result = submit(gives_a_function, __reraise_on_exit__=False).exception(60)
        assert isinstance(result, NotPicklableError)
        error = submit(fails_unpicklably, __reraise_on_exit__=False).exception(60)
        assert isinstance(error, NotPicklableError)
        assert "raised Unpicklable: 1" in str(error)


has_interpreters = pytest.mark.skipif(
    not hasattr(concurrent.futures, "InterpreterPoolExecutor"), reason="from Python 3.14 on"
)


@has_interpreters
def test_functions_run_in_interpreters(make_manager):
    """Arguments, results and errors are passed; an error has its traceback from there."""
    with BackgroundExecutor(kind="interpreters", manager=make_manager(), max_concurrency=2) as submit:
        assert submit(int, "1000", base=2).result(60) == 8
        assert len({submit(threading.get_native_id).result(60) for _ in range(9)}) <= 2
        error = submit(fails, KeyError("there"), __reraise_on_exit__=False).exception(60)
        assert isinstance(error, KeyError)
        assert "in fails" in error.__notes__[0]
        result = submit(gives_a_function, __reraise_on_exit__=False).exception(60)
        assert isinstance(result, NotPicklableError)


GUARDED = """
    def twice(number):
        return 2 * number

    if __name__ == "__main__":
        with bgtasks.BackgroundExecutor(kind="interpreters", max_concurrency=2) as submit:
            say(sum(future.result() for future in [submit(twice, number) for number in range(10)]))
"""
UNGUARDED = """
    with bgtasks.BackgroundExecutor(kind="interpreters") as submit:
        submit(pow, 2, 3)
"""


@has_interpreters
def test_functions_of_the_main_module_run_in_interpreters(tmp_path, twin):
    """As in processes, the interpreter imports the program's file, without its main part."""
    with child(tmp_path, GUARDED, twin, "asyncio") as program:
        assert program.end() == 0, program.output
    assert program.lines == ["90"]


@has_interpreters
def test_a_program_without_a_main_part_starts_no_interpreters_for_ever(tmp_path, twin):
    """A program without a main guard fails with an error that says so."""
    with child(tmp_path, UNGUARDED, twin, "asyncio") as program:
        assert program.end() == 1
    assert "bgtasks.errors.InvalidProgramError" in program.output
    assert 'under if __name__ == "__main__"' in program.output


@pytest.mark.skipif(hasattr(concurrent.futures, "InterpreterPoolExecutor"), reason="before Python 3.14")
def test_interpreters_are_refused_if_python_has_none():
    """The message names the release that has interpreters, and the alternative."""
    with pytest.raises(InvalidOptionError, match=r"needs Python 3\.14 or later.*'processes'"):
        BackgroundExecutor(kind="interpreters")


ENDLESS = """
from bgtasks import BackgroundExecutor

def endless(path):
    import os, time
    with open(path, "w") as file:
        print(os.getpid(), file=file)
    while True:
        time.sleep(0.01)

def main(folder):
    import os, time
    paths = [f"{folder}/{number}" for number in range(2)]
    with BackgroundExecutor(kind="processes", max_concurrency=2) as submit:
        for path in paths:
            submit(endless, path, __cancel_on_exit__=True)
        while not all(os.path.exists(path) and os.path.getsize(path) for path in paths):
            time.sleep(0.01)
        print("running", flush=True)
        time.sleep(SECONDS)

if __name__ == "__main__":
    main(sys.argv[2])
"""


def run_endless(folder, twin, sent=None):
    """Run the program, send it a signal if there is one, and wait for the end of its workers; return what it said."""
    folder.mkdir()
    with child(
        folder, ENDLESS.replace("SECONDS", "0" if sent is None else "60"), twin, "asyncio", str(folder)
    ) as program:
        program.wait_for("running")
        if sent is not None:
            program.process.send_signal(sent)
        code = program.end()
    workers = [int((folder / str(number)).read_text()) for number in range(2)]
    assert wait_until(lambda: not any(map(is_running, workers))), "a worker runs on"
    return code, [line for line in program.lines if line != "running"]


@pytest.mark.parametrize("attempt", range(4))
def test_processes_that_are_cancelled_at_the_end_say_nothing(tmp_path, twin, attempt):
    """The end of the program joins the processes at the same time: neither side may stumble over the other."""
    assert run_endless(tmp_path / "run", twin) == (0, [])


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send others these signals")
@pytest.mark.parametrize("attempt", range(4))
def test_ctrl_c_ends_processes_with_the_programs_traceback_alone(tmp_path, twin, attempt):
    """What ends up on the terminal is the KeyboardInterrupt of the program, once."""
    code, lines = run_endless(tmp_path / "run", twin, signal.SIGINT)
    assert code == -signal.SIGINT
    assert [line for line in lines if not line.startswith(" ")] == [
        "Traceback (most recent call last):",
        "KeyboardInterrupt",
    ]


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send others these signals")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL] if os.name != "nt" else [])
def test_processes_end_with_a_parent_that_is_gone(tmp_path, twin, sent):
    """A parent that was killed cannot end its processes: they notice, and say nothing."""
    assert run_endless(tmp_path / "run", twin, sent) == (-sent, [])

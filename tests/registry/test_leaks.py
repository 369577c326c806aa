"""Possible leaks, each tested in an interpreter of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import asyncio, gc, logging, sys, weakref
from bgtasks import BackgroundTaskManager
logging.disable(logging.CRITICAL)

async def forever():
    await asyncio.Event().wait()

async def fail(keep):
    class Local: pass
    local = Local()
    keep.append(weakref.ref(local))
    raise ValueError("expected")
"""


@pytest.fixture
def run(twin):
    """Give a function that runs a script on the twin and returns its standard error."""

    def run(script, timeout=100):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "BGTASKS_IMPLEMENTATION": twin},
        )
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def test_failed_tasks_are_freed(run):
    """The locals of ten thousand failed tasks are freed without the collector."""
    errors = run("""
        async def main():
            manager = BackgroundTaskManager(history=5)
            keep = []
            for _ in range(10_000):
                manager.create_task(fail(keep), name="fails", context={"a": 1})
            await asyncio.sleep(0); await asyncio.sleep(0); await asyncio.sleep(0)
            assert manager.get_task_count() == 0
            assert manager.stats()["failed"] == len(keep) == 10_000
            alive = [reference for reference in keep if reference() is not None]
            assert not alive, len(alive)
        gc.disable()
        asyncio.run(main())
    """)
    assert errors == ""


def test_a_handled_failure_has_no_stray_referrers(run):
    """After a failure was awaited, only the code that caught it refers to it."""
    run("""
        async def main():
            manager = BackgroundTaskManager()
            error = None
            try:
                await manager.create_task(fail([]))
            except ValueError as caught:
                error = caught
            await asyncio.sleep(0)
            error.__traceback__ = None
            referrers = [r for r in gc.get_referrers(error) if not hasattr(r, "f_code") and not hasattr(r, "cr_code")]
            assert referrers == [], referrers
        gc.disable()
        asyncio.run(main())
    """)


def test_an_idle_manager_that_is_dropped_is_freed(run):
    """A used manager without references is freed although its loop goes on."""
    run("""
        async def main():
            for _ in range(3):
                manager = BackgroundTaskManager()
                await manager.create_task(asyncio.sleep(0), timeout=30)
                manager.fire(asyncio.sleep(0), timeout=30)
                await manager.wait_for_all()
                reference = weakref.ref(manager)
                del manager
                await asyncio.sleep(0)
                gc.collect()
                assert reference() is None
        asyncio.run(main())
    """)


def test_a_manager_with_tasks_is_kept(run):
    """Dropping the last reference to a manager does not drop its tasks."""
    run("""
        futures = []
        async def wait():
            future = asyncio.get_running_loop().create_future()
            futures.append(weakref.ref(future))
            return await future
        async def main():
            ended = []
            def start():
                manager = BackgroundTaskManager()
                manager.create_task(wait()).add_done_callback(lambda task: ended.append(task.result()))
                return weakref.ref(manager)
            reference = start()
            await asyncio.sleep(0)
            gc.collect()
            assert reference() is not None
            futures[0]().set_result("done")
            await asyncio.sleep(0); await asyncio.sleep(0)
            assert ended == ["done"]
        asyncio.run(main())
    """)


def test_the_interpreter_ends_quietly_with_live_tasks(run):
    """With ten thousand live tasks on a loop that is not closed, the interpreter exits with status 0 and no output."""
    errors = run("""
        manager = BackgroundTaskManager()
        async def start():
            for _ in range(5_000):
                manager.create_task(forever(), timeout=3600)
                manager.fire(forever(), timeout=3600)
            await asyncio.sleep(0)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(start())
        # An unclosed loop warns by itself, with or without tasks.
        import warnings; warnings.simplefilter("ignore")
    """)
    assert errors == ""


def test_memory_does_not_grow_with_the_number_of_tasks(run):
    """For each kind of end, 20,000 tasks leave as many memory blocks as 10,000, within a small constant."""
    run("""
        async def cycle(manager, kind):
            for _ in range(100):
                for _ in range(100):
                    if kind == "fire":
                        manager.fire(asyncio.sleep(0), timeout=30)
                    elif kind == "fail":
                        manager.create_task(fail([]))
                    elif kind == "cancel":
                        manager.create_task(forever(), timeout=30).cancel()
                    elif kind == "timeout":
                        manager.create_task(forever(), timeout=0.0001)
                    elif kind == "queue":
                        manager.create_task(asyncio.sleep(0))
                    else:
                        manager.create_task(asyncio.sleep(0), timeout=30)
                await manager.wait_for_all(return_exceptions=True)
        async def main():
            for kind in ("complete", "fire", "fail", "cancel", "timeout", "queue"):
                manager = BackgroundTaskManager(history=10, max_concurrency=7 if kind == "queue" else None)
                blocks = []
                for _ in range(3):
                    await cycle(manager, kind)
                    gc.collect()
                    blocks.append(sys.getallocatedblocks())
                assert blocks[2] - blocks[1] < 300, (kind, blocks)
        asyncio.run(main())
    """)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_five_million_tasks_through_one_manager(run):
    """Five million tasks leave as much memory in use as the first hundred thousand."""
    run(
        """
        import resource, time
        async def main():
            manager = BackgroundTaskManager(history=1000)
            blocks, peak = [], []
            begin = time.perf_counter()
            for part in range(50):
                for burst in range(100):
                    for number in range(500):
                        options = {"timeout": 30 + number / 7, "context": {"number": number}}
                        manager.create_task(asyncio.sleep(0), name="created", **options)
                        manager.fire(asyncio.sleep(0), name="fired", **options)
                    await manager.wait_for_all()
                gc.collect()
                blocks.append(sys.getallocatedblocks())
                peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            took = time.perf_counter() - begin
            stats = manager.stats()
            assert stats["completed"] == 5_000_000, stats
            print(f"5,000,000 tasks, {5_000_000 / took:,.0f} a second")
            print(f"memory blocks {blocks[1]:,} -> {blocks[-1]:,}; peak RSS {peak[1]:,} -> {peak[-1]:,} KiB")
            assert blocks[-1] - blocks[1] < 2000, blocks
            assert peak[-1] < peak[1] * 1.05, peak
        asyncio.run(main())
        """,
        timeout=3500,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_is_not_held_up_by_a_thread_of_its_parent(run):
    """A manager made before a fork runs tasks in the child, even if another thread was using it during the fork."""
    run("""
        import os, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside a thread
        manager = BackgroundTaskManager(max_pending_tasks=10)
        held, done = threading.Event(), threading.Event()

        class Loop(asyncio.SelectorEventLoop):
            def is_closed(self):
                held.set()
                done.wait(60)
                return super().is_closed()

        loop = Loop()

        def ask():
            manager._add_loop(loop)
            manager.get_task_count()

        async def main():
            manager.fire(asyncio.sleep(0))
            await manager.wait_for_all()
            assert manager.stats()["completed"] == 1

        thread = threading.Thread(target=ask)
        thread.start()
        assert held.wait(60)
        pid = os.fork()
        if pid == 0:
            done.set()
            asyncio.run(main())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        done.set()
        thread.join()
        loop.close()
    """)

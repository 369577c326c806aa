"""Publishers and the end of a process, its forks, what is not installed: each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import msgspec
import pytest
from paths import PACKAGE

SOURCES = str(PACKAGE.parent)
ON_UNIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@pytest.fixture
def run(twin, tmp_path):
    """Give a function that runs a program on the twin and returns what became of it."""

    def run_program(code, **environment):
        variables = {**os.environ, "PYTHONPATH": SOURCES, "BGTASKS_IMPLEMENTATION": twin, **environment}
        # Fork warns in a process with threads, which is what some of these programs are about.
        return subprocess.run(
            [
                sys.executable,
                "-X",
                "dev",
                "-W",
                "error",
                "-W",
                "ignore:This process:DeprecationWarning",
                "-c",
                textwrap.dedent(code),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=variables,
            cwd=tmp_path,
        )

    return run_program


def lines(path):
    """Return the events in a file of JSON lines."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def test_a_program_that_forgets_to_close_loses_nothing_at_the_end_of_its_loop(run, tmp_path):
    """asyncio.run cancels the flusher, which empties its ring first."""
    done = run("""
        import asyncio
        from bgtasks.events.sinks.jsonl import JsonlPublisher
        publisher = JsonlPublisher("events.jsonl")
        async def main():
            for number in range(1000):
                publisher.emit({"n": number})
        asyncio.run(main())
        print(publisher.stats()["delivered"])
        """)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "1000\n"
    assert [event["n"] for event in lines(tmp_path / "events.jsonl")] == list(range(1000))


def test_what_is_left_at_exit_gets_a_second(run, tmp_path):
    """No loop ever ran, and nobody refers to the publisher any more."""
    done = run("""
        from bgtasks.events.sinks.jsonl import JsonlPublisher
        def produce():
            publisher = JsonlPublisher("events.jsonl")
            for number in range(1000):
                publisher.emit({"n": number})
        produce()
        import gc
        gc.collect()
        """)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(lines(tmp_path / "events.jsonl")) == 1000


def test_a_sink_that_hangs_does_not_keep_the_process_from_ending(run):
    """A second at exit, and the loss is told."""
    done = run("""
        import asyncio, time
        from bgtasks.events import BasePublisher
        class Hanging(BasePublisher):
            async def write(self, batch, batch_id):
                print("writing", flush=True)
                await self._thread.run(time.sleep, 1000)
        publisher = Hanging()
        async def main():
            publisher.emit({"n": 1})
            await publisher.flush(0.01)
        asyncio.run(main())
        """)
    assert done.returncode == 0, done.stderr
    assert "writing" in done.stdout
    assert "1 (deadline 1) dropped" in done.stderr


@ON_UNIX
def test_the_child_of_a_fork_begins_anew_and_the_parent_keeps_its_own(run, tmp_path):
    """An empty queue, an id of its own, no client, a file of its own; while threads emit."""
    done = run("""
        import asyncio, os, sys, threading
        from bgtasks.events.sinks.jsonl import JsonlPublisher
        publisher = JsonlPublisher("events-{pid}.jsonl", linger=1000, name="p")
        async def main():
            publisher.emit({"n": 1})
            await publisher.flush()
            stop = threading.Event()
            def produce():
                while not stop.is_set():
                    publisher.emit({"n": 2})
            threads = [threading.Thread(target=produce) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(5):
                pid = os.fork()
                if pid == 0:
                    break
                assert os.waitpid(pid, 0)[1] == 0
            else:
                stop.set()
                for thread in threads:
                    thread.join()
                await publisher.close()
                stats = publisher.stats()
                print(stats["accepted"], stats["delivered"], flush=True)
                return
            # In the child: the loop is the parent's.
            assert publisher.stats()["accepted"] == 0
            def in_child():
                async def main():
                    publisher.emit({"n": 3})
                    await publisher.close()
                asyncio.run(main())
                assert publisher.stats()["delivered"] == 1
            asyncio._set_running_loop(None)
            in_child()
            os._exit(0)
        asyncio.run(main())
        """)
    assert done.returncode == 0, done.stderr
    accepted, delivered = map(int, done.stdout.split())
    assert accepted == delivered
    counts = sorted(len(lines(path)) for path in tmp_path.glob("events-*.jsonl"))
    assert counts == [1] * 5 + [accepted]


@ON_UNIX
def test_a_prefork_server_publishes_from_every_worker(run, tmp_path):
    """The publisher is made before the fork, used before and after it; ids never repeat."""
    done = run("""
        import asyncio, os, sys
        from bgtasks.events.sinks.memory import MemoryPublisher
        publisher = MemoryPublisher()
        publisher.emit({"n": 0})
        workers = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                async def serve():
                    for _ in range(1000):
                        assert publisher.emit({"n": number})
                    await publisher.close()
                asyncio.run(serve())
                with open(f"ids-{number}", "w") as file:
                    file.write("\\n".join(batch_id for batch_id, _ in publisher.batches))
                assert len(publisher.events) == 1000, len(publisher.events)
                sys.exit(0)
            workers.append(pid)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in workers)
        asyncio.run(publisher.close())
        assert publisher.events == [b'{"n":0}'], publisher.events
        """)
    assert done.returncode == 0, done.stderr
    assert "destroyed" not in done.stderr
    assert "Traceback" not in done.stderr
    ids = [line for path in tmp_path.glob("ids-*") for line in path.read_text().split()]
    assert len(ids) == len(set(ids)) == 8


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_a_missing_extra_names_its_install_command(run):
    """Importing works; what needs msgspec says how to get it."""
    done = run(
        WITHOUT.format(name="msgspec")
        + textwrap.dedent("""
        from bgtasks import MissingExtraError
        from bgtasks.events.sinks.memory import MemoryPublisher
        for make in (MemoryPublisher, lambda: __import__("bgtasks.events.model")):
            try:
                make()
            except MissingExtraError as error:
                print(error)
        """)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pip install "bgtasks-registry[events]"') == 2


def test_publish_event_without_injectq_says_what_to_pass_or_install(run):
    """With its arguments it needs no InjectQ."""
    done = run(
        WITHOUT.format(name="injectq")
        + textwrap.dedent("""
        import asyncio
        from bgtasks import BackgroundTaskManager, MissingExtraError
        from bgtasks.events import publish_event
        from bgtasks.events.sinks.memory import MemoryPublisher
        publisher = MemoryPublisher()
        for arguments in ((), (publisher,)):
            try:
                publish_event({"n": 1}, *arguments)
            except MissingExtraError as error:
                print(error)
        async def main():
            async with BackgroundTaskManager() as manager:
                assert publish_event({"n": 1}, publisher, manager)
                assert publish_event({"n": 2}, publisher)
        asyncio.run(main())
        print(publisher.events)
        """)
    )
    assert done.returncode == 0, done.stderr
    assert "without publisher=" in done.stdout
    assert "without task_manager=" in done.stdout
    assert done.stdout.count('pip install "bgtasks-registry[inject]"') == 2
    assert done.stdout.endswith("[b'{\"n\":1}', b'{\"n\":2}']\n")


def test_the_ring_is_chosen_as_the_registry_is(run, twin):
    """BGTASKS_IMPLEMENTATION; a publisher has the one that it names."""
    done = run("""
        import bgtasks.events
        from bgtasks.events.sinks.memory import MemoryPublisher
        print(bgtasks.IMPLEMENTATION, bgtasks.events.IMPLEMENTATION, type(MemoryPublisher()._ring).__module__)
        """)
    module = {"cython": "bgtasks.events._ring", "python": "bgtasks.events._ring_py"}[twin]
    assert done.stdout == f"{twin} {twin} {module}\n", done.stderr


def test_importing_events_loads_no_third_party_module(run):
    """Msgspec comes with the first publisher."""
    done = run("""
        import sys
        import bgtasks.events
        print([name for name in ("msgspec", "sqlite3", "injectq", "pydantic") if name in sys.modules])
        """)
    assert done.stdout == "[]\n", done.stderr


def test_event_ids_do_not_repeat_in_children(run):
    """EventModel: one prefix a process."""
    done = run("""
        import os
        from bgtasks.events.model import EventModel
        def show():
            print(EventModel(event="e", event_type="t").event_id, flush=True)
        show()
        if hasattr(os, "fork"):
            pid = os.fork()
            if pid == 0:
                show()
                os._exit(0)
            os.waitpid(pid, 0)
        show()
        """)
    assert done.returncode == 0, done.stderr
    ids = done.stdout.split()
    assert len(ids) == len(set(ids))

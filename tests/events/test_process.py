"""Publishers at the end of a process, across forks and without extras, each in an interpreter of its own."""

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
    """Give a function that runs a program on the twin and returns the completed process."""

    def run_program(code, **environment):
        variables = {**os.environ, "PYTHONPATH": SOURCES, "BGTASKS_IMPLEMENTATION": twin, **environment}
        # Fork warns in a process with threads, which some of these programs have on purpose.
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
    """asyncio.run cancels the flusher, which empties the queue before it ends."""
    done = run("""
        import asyncio
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.jsonl import JsonlSink
        publisher = Publisher(JsonlSink("events.jsonl"))
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


def test_events_left_at_exit_are_sent_within_a_second(run, tmp_path):
    """Events are sent at exit although no loop ran and the publisher has no references."""
    done = run("""
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.jsonl import JsonlSink
        def produce():
            publisher = Publisher(JsonlSink("events.jsonl"))
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
    """The sink has one second at exit; the loss is logged."""
    done = run("""
        import asyncio, time
        from bgtasks.events import Publisher, Sink
        from bgtasks.events._thread import WorkerThread
        class Hanging(Sink):
            thread = WorkerThread("hanging")
            async def write(self, batch, batch_id):
                print("writing", flush=True)
                await self.thread.run(time.sleep, 1000)
        publisher = Publisher(Hanging())
        async def main():
            publisher.emit({"n": 1})
            await publisher.flush(0.01)
        asyncio.run(main())
        """)
    assert done.returncode == 0, done.stderr
    assert "writing" in done.stdout
    assert "1 (timeout 1) dropped" in done.stderr


@ON_UNIX
def test_the_child_of_a_fork_starts_empty_and_the_parent_keeps_its_events(run, tmp_path):
    """The child has an empty queue, its own id, no client and its own file, even if threads emit during the fork."""
    done = run("""
        import asyncio, os, sys, threading
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.jsonl import JsonlSink
        publisher = Publisher(JsonlSink("events-{pid}.jsonl"), linger=1000, name="p")
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
    """A publisher that is made and used before the fork works after it; ids never repeat."""
    done = run("""
        import asyncio, os, sys
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.memory import MemorySink
        publisher = Publisher(MemorySink())
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
                    file.write("\\n".join(batch_id for batch_id, _ in publisher.sink.batches))
                assert len(publisher.sink.events) == 1000, len(publisher.sink.events)
                sys.exit(0)
            workers.append(pid)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in workers)
        asyncio.run(publisher.close())
        assert publisher.sink.events == [b'{"n":0}'], publisher.sink.events
        """)
    assert done.returncode == 0, done.stderr
    assert "destroyed" not in done.stderr
    assert "Traceback" not in done.stderr
    ids = [line for path in tmp_path.glob("ids-*") for line in path.read_text().split()]
    assert len(ids) == len(set(ids)) == 8


def test_events_are_sent_without_a_loop_and_their_age_is_right(run):
    """A thread with a loop of its own sends them, and ends; a loop that comes along takes over."""
    done = run("""
        import asyncio, threading, time
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.memory import MemorySink
        publisher = Publisher(MemorySink())
        def until(condition):
            end = time.monotonic() + 20
            while not condition():
                assert time.monotonic() < end
                time.sleep(0.01)
        begun = time.monotonic()
        for number in range(1000):
            assert publisher.emit({"n": number})
        age = publisher.stats()["oldest_age_seconds"]
        assert 0 < age <= time.monotonic() - begun, age
        until(lambda: publisher.stats()["delivered"] == 1000)
        assert publisher.stats()["oldest_age_seconds"] == 0
        until(lambda: threading.active_count() == 1)
        publisher.emit({"n": 1000})
        until(lambda: publisher.stats()["delivered"] == 1001)
        async def main():
            async with publisher:
                assert publisher._flusher.loop is asyncio.get_running_loop()
                publisher.emit({"n": 1001})
        asyncio.run(main())
        until(lambda: threading.active_count() == 1)
        print(len(publisher.sink.events), publisher.stats()["delivered"])
        """)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "1002 1002\n"


def test_what_the_last_loop_left_is_sent_without_one(run):
    """The sink was down while the loop ran, and comes up later."""
    done = run("""
        import asyncio, time
        from bgtasks.events import Publisher, Sink
        class Down(Sink):
            events = []
            is_down = True
            async def write(self, batch, batch_id):
                if self.is_down:
                    raise OSError("down")
                self.events += batch
        publisher = Publisher(Down())
        async def main():
            publisher.emit({"n": 1})
            await publisher.flush(0.01)
        asyncio.run(main())
        assert not Down.events
        Down.is_down = False
        end = time.monotonic() + 20
        while not Down.events:
            assert time.monotonic() < end
            time.sleep(0.01)
        print(Down.events)
        """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[b'{\"n\":1}']\n"


CHILDREN = """
    import concurrent.futures, multiprocessing, sys
    from bgtasks.events import Publisher
    from bgtasks.events.sinks.jsonl import JsonlSink
    publisher = Publisher(JsonlSink("events-{pid}.jsonl"))
    own = []
    def use_the_parents(count):
        for number in range(count):
            assert publisher.emit({"n": number})
    def use_its_own(count):
        if not own:
            own.append(Publisher(JsonlSink("own-{pid}.jsonl")))
        for number in range(count):
            assert own[0].emit({"n": number})
    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        for function in (use_the_parents, use_its_own):
            child = context.Process(target=function, args=(500,))
            child.start()
            child.join()
            assert child.exitcode == 0
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                list(pool.map(function, [100] * 5))
    """


@ON_UNIX
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_events_of_a_child_of_multiprocessing_are_sent_before_it_ends(twin, tmp_path, method):
    """It ends without atexit where it was forked; a worker of a pool is such a child."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(CHILDREN))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", program, method],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": SOURCES, "BGTASKS_IMPLEMENTATION": twin},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name in ("events", "own"):
        assert sum(len(lines(path)) for path in tmp_path.glob(f"{name}-*.jsonl")) == 1000


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_a_missing_extra_names_its_install_command(run):
    """Imports work; a publisher without msgspec names the install command."""
    done = run(
        WITHOUT.format(name="msgspec")
        + textwrap.dedent("""
        from bgtasks import MissingExtraError
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.memory import MemorySink
        for make in (lambda: Publisher(MemorySink()), lambda: __import__("bgtasks.events.model")):
            try:
                make()
            except MissingExtraError as error:
                print(error)
        """)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pip install "bgtasks-registry[events]"') == 2


def test_publish_event_without_injectq_raises_with_advice(run):
    """With its arguments publish_event needs no InjectQ; without them the error names both ways."""
    done = run(
        WITHOUT.format(name="injectq")
        + textwrap.dedent("""
        import asyncio
        from bgtasks import BackgroundTaskManager, MissingExtraError
        from bgtasks.events import Publisher, publish_event
        from bgtasks.events.sinks.memory import MemorySink
        publisher = Publisher(MemorySink())
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
        print(publisher.sink.events)
        """)
    )
    assert done.returncode == 0, done.stderr
    assert "without publisher=" in done.stdout
    assert "without task_manager=" in done.stdout
    assert done.stdout.count('pip install "bgtasks-registry[inject]"') == 2
    assert done.stdout.endswith("[b'{\"n\":1}', b'{\"n\":2}']\n")


def test_the_event_queue_is_chosen_as_the_registry_is(run, twin):
    """A publisher uses the event queue that BGTASKS_IMPLEMENTATION names."""
    done = run("""
        import bgtasks.events
        from bgtasks.events import Publisher
        from bgtasks.events.sinks.memory import MemorySink
        print(bgtasks.IMPLEMENTATION, bgtasks.events.IMPLEMENTATION, type(Publisher(MemorySink())._queue).__module__)
        """)
    module = {"cython": "bgtasks.events._queue", "python": "bgtasks.events._queue_py"}[twin]
    assert done.stdout == f"{twin} {twin} {module}\n", done.stderr


def test_importing_events_loads_no_third_party_module(run):
    """The first publisher imports msgspec, bgtasks.events does not."""
    done = run("""
        import sys
        import bgtasks.events
        print([name for name in ("msgspec", "sqlite3", "injectq", "pydantic") if name in sys.modules])
        """)
    assert done.stdout == "[]\n", done.stderr


def test_event_ids_do_not_repeat_in_children(run):
    """EventModel has one prefix per process."""
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

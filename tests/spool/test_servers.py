"""A server that is down, a process that is killed meanwhile, a restart: no committed event is lost or doubled."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from arrivals import in_jetstream, in_redis
from requirements import need
from servers import NatsServer, RedisServer

need("redis")
need("nats")
need("msgspec")

# Emits until a line of input comes, then flushes and ends; prints the number up to which events are out of memory.
PRODUCER = """
    import asyncio, json, logging, os, sys, threading
    from bgtasks.events import Publisher
    from bgtasks.events.sinks.nats import NatsSink
    from bgtasks.events.sinks.redis import RedisSink

    logging.basicConfig(level=logging.ERROR)
    kind, url, stem, life = sys.argv[1:]

    async def main():
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        def listen():
            sys.stdin.readline()
            loop.call_soon_threadsafe(ended.set)
        threading.Thread(target=listen, daemon=True).start()
        if kind == "redis":
            sink = RedisSink(url, key="events", maxlen=None)
        else:
            sink = NatsSink(url, subject="events")
        publisher = Publisher(sink, spool=stem)
        number = 0
        while not ended.is_set():
            for _ in range(49):
                assert publisher.emit({"life": life, "number": number})
                number += 1
            assert await publisher.publish({"life": life, "number": number}, durable=True)
            os.write(1, b"%d\\n" % number)
            number += 1
        while (await publisher.flush(5))["status"] != "flushed":
            pass
        report = await publisher.close()
        stats = publisher.stats()
        print(json.dumps({"number": number, "report": report, "stats": stats}), flush=True)

    asyncio.run(main())
"""


class Producer:
    """A producing process, and the lines that it printed."""

    def __init__(self, *arguments):
        command = [sys.executable, "-c", textwrap.dedent(PRODUCER), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def committed(self):
        """Return the number up to which all events are out of memory, -1 for none."""
        return int(self.lines[-1]) if self.lines else -1

    def wait_for(self, number):
        """Wait until a number of further events is committed."""
        wanted = self.committed() + number
        deadline = time.monotonic() + 60
        while self.committed() < wanted:
            assert self.process.poll() is None
            assert time.monotonic() < deadline, "the producer makes no progress"
            time.sleep(0.01)

    def kill(self):
        """Kill the process and return the last number that it printed."""
        self.process.kill()
        self._end()
        return self.committed()

    def finish(self):
        """Have the process flush and end, and return the statistics that it printed."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._end()
        assert self.process.returncode == 0
        return json.loads(self.lines[-1])

    def _end(self):
        self._reader.join(120)
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


def make_stream(url):
    """Make the stream that the events go to."""

    async def make():
        import nats

        client = await nats.connect(url)
        await client.jetstream().add_stream(name="EVENTS", subjects=["events"], duplicate_window=600)
        await client.close()

    asyncio.run(make())


def read_back(kind, url):
    """Return all events that a server holds."""
    if kind == "redis":
        return [json.loads(event) for event in in_redis(url, "events")]
    messages = asyncio.run(in_jetstream(url, "EVENTS"))
    return [json.loads(message.data) for message in messages]


@pytest.mark.parametrize("kind", ["redis", "jetstream"])
@pytest.mark.parametrize("downtime", [3, pytest.param(60, marks=[pytest.mark.nightly, pytest.mark.timeout(300)])])
def test_a_server_down_and_a_process_killed_meanwhile(start_server, tmp_path, kind, downtime):
    """No committed event is lost or doubled and all are in order, however long the server is down."""
    server = start_server(RedisServer if kind == "redis" else NatsServer)
    if kind == "jetstream":
        make_stream(server.url)
    stem = tmp_path / "events"

    first = Producer(kind, server.url, stem, "first")
    first.wait_for(2000)
    server.kill()
    down_since = time.monotonic()
    first.wait_for(2000)
    while time.monotonic() - down_since < downtime / 2:
        first.wait_for(100)
    committed = first.kill()

    second = Producer(kind, server.url, stem, "second")
    second.wait_for(2000)
    while time.monotonic() - down_since < downtime:
        second.wait_for(100)
    server.start()
    last = second.finish()

    events = read_back(kind, server.url)
    lives = {life: [event["number"] for event in events if event["life"] == life] for life in ("first", "second")}
    assert lives["second"] == list(range(last["number"]))
    assert lives["first"] == list(range(len(lives["first"])))
    assert len(lives["first"]) > committed
    stats = last["stats"]
    assert stats["dropped"] == {}
    assert stats["accepted"] == stats["delivered"] == last["number"] + stats["recovered"]
    assert stats["recovered"] > 0
    assert list(tmp_path.iterdir()) == []
    print(f"{kind}, down {downtime} s: {len(events):,} events, {stats['recovered']:,} recovered; 0 lost, 0 doubled")


@pytest.mark.parametrize("kind", ["redis", "jetstream"])
def test_a_process_killed_again_and_again(start_server, tmp_path, kind):
    """The next process sends again what was sent and not yet deleted on the disk; the server knows its id."""
    server = start_server(RedisServer if kind == "redis" else NatsServer)
    if kind == "jetstream":
        make_stream(server.url)
    committed = {}
    for life in ("a", "b", "c", "d"):
        producer = Producer(kind, server.url, tmp_path / "events", life)
        producer.wait_for(700)
        committed[life] = producer.kill()
    last = Producer(kind, server.url, tmp_path / "events", "last").finish()
    events = read_back(kind, server.url)
    for life, number in committed.items():
        numbers = [event["number"] for event in events if event["life"] == life]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > number
    assert [event["number"] for event in events if event["life"] == "last"] == list(range(last["number"]))
    assert list(tmp_path.iterdir()) == []

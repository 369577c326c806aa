"""Offers events to real servers at a stated rate, and flat out, and prints what arrived and what the loop suffered.

Servers are those of the tests, started on the loopback address with an empty folder each; ``scripts/install_servers``
installs them. An event is a ``msgspec.Struct`` that is 226 bytes of JSON; building and encoding it is part of what is
measured. Each figure is the median of the rounds; the sinks take turns within a round. Run it with nothing else on the
machine::

    python benchmarks/sinks.py                                   # every sink, paced and flat out
    python benchmarks/sinks.py redis --rate 250000 --seconds 10
    python benchmarks/sinks.py redis --rate 250000 --fsync always --batch 2000
    python benchmarks/sinks.py redis --agentflow VENV/bin/python # next to agentflow's publisher, run by that Python

``cpu`` is the share of a core that producing and sending take, and what that is for each event; for Redis with what the
server takes beside it. ``lag`` is by how much a callback due every millisecond is late, beside the producing and
sending: its 99th percentile and its maximum. What arrived is counted by the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import msgspec
import uvloop
from servers import KafkaBroker, NatsServer, RabbitServer, RedisServer

import bgtasks
from bgtasks.events import Publisher
from bgtasks.events.sinks.kafka import KafkaSink
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.sinks.nats import NatsSink
from bgtasks.events.sinks.rabbitmq import RabbitMQSink
from bgtasks.events.sinks.redis import RedisSink

TICK = 0.001
PADDING = "x" * 88


class Event(msgspec.Struct, gc=False):
    """An event of an agent program: 226 bytes as JSON, give or take a digit."""

    event: str
    event_type: str
    thread_id: str
    run_id: str
    node_name: str
    sequence_id: int
    content: str
    timestamp: float


def make_event(number: int) -> Event:
    """Return an event with the time of now."""
    return Event("node_execution", "progress", "t-1", "r-1", "reply", number, PADDING, time.time())


class Run(NamedTuple):
    """One run of one sink."""

    offered: int
    accepted: int
    arrived: int
    seconds: float
    cpu: float
    server_cpu: float
    lag_p99: float
    lag_max: float


class Target(NamedTuple):
    """A sink: what makes its publisher, counts the events that have arrived, and reads the server's seconds of CPU.

    None is for a server that does not tell.
    """

    make: Callable[[], Any]
    count: Callable[[], int] | None = None
    cpu: Callable[[], float] | None = None


class LagMeter:
    """Measures by how much callbacks are late."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.lags: list[float] = []
        self._set()

    def _set(self) -> None:
        # Not the loop's clock: uvloop's knows only whole milliseconds.
        self._due = time.perf_counter() + TICK
        self._handle = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self.lags.append(max(time.perf_counter() - self._due, 0))
        self._set()

    def stop(self) -> tuple[float, float]:
        """Return the 99th percentile and the maximum, in seconds."""
        self._handle.cancel()
        return statistics.quantiles(self.lags, n=100)[-1], max(self.lags)


async def produce_paced(emit: Callable[[Any], bool], rate: int, seconds: float) -> tuple[int, int]:
    """Emit at a rate, what is due each millisecond; return how many were offered and accepted."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    offered = accepted = 0
    while (passed := loop.time() - begun) < seconds:
        due = int(passed * rate) - offered
        for number in range(offered, offered + due):
            accepted += emit(make_event(number))
        offered += due
        await asyncio.sleep(TICK)
    return offered, accepted


async def produce_flat_out(publisher: Any, seconds: float) -> tuple[int, int]:
    """Emit whenever the queue has capacity; return how many were offered and accepted."""
    emit = publisher.emit
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    accepted = 0
    while loop.time() < end:
        for _ in range(100):
            if not emit(make_event(accepted)):
                await asyncio.sleep(TICK)
                break
            accepted += 1
        else:
            await asyncio.sleep(0)
    return accepted, accepted


async def run_once(target: Target, rate: int, seconds: float) -> Run:
    """Offer events to a sink; a rate of 0 is flat out."""
    before = await asyncio.to_thread(target.count) if target.count else 0
    publisher = target.make()
    publisher.emit(make_event(0))
    await publisher.flush(10)
    gc.collect()
    server_before = await asyncio.to_thread(target.cpu) if target.cpu else 0.0
    meter = LagMeter(asyncio.get_running_loop())
    begun, cpu = time.perf_counter(), time.process_time()
    if rate:
        offered, accepted = await produce_paced(publisher.emit, rate, seconds)
    else:
        offered, accepted = await produce_flat_out(publisher, seconds)
    await publisher.flush(30)
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    p99, longest = meter.stop()
    server_used = await asyncio.to_thread(target.cpu) - server_before if target.cpu else 0.0
    report = await publisher.close(30)
    delivered = publisher.stats()["delivered"]
    arrived = await asyncio.to_thread(target.count) - before if target.count else delivered
    assert arrived == delivered, (arrived, delivered, report)
    return Run(offered, accepted, arrived - 1, took, used, server_used, p99, longest)


# -- the sinks -------------------------------------------------------------------------------------------------------


def redis_entries(server: RedisServer) -> int:
    """Return how many entries the stream ever got, trimmed ones included."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        return int(client.xinfo_stream("events")["entries-added"]) if client.exists("events") else 0


def redis_cpu(server: RedisServer) -> float:
    """Return the seconds of CPU that Redis has used."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def nats_messages(server: NatsServer) -> int:
    """Return the last sequence number of the stream."""

    async def ask() -> int:
        import nats

        client = await nats.connect(server.url)
        info = await client.jetstream().stream_info("EVENTS")
        await client.close()
        return int(info.state.last_seq)

    return asyncio.run(ask())


async def make_stream(server: NatsServer) -> None:
    """Make a stream in files that keeps what fits 256 MiB."""
    import nats

    client = await nats.connect(server.url)
    await client.jetstream().add_stream(name="EVENTS", subjects=["events"], max_bytes=256 << 20)
    await client.close()


async def make_queue(server: RabbitServer) -> None:
    """Make a durable queue that keeps the last 10,000 messages."""
    import aio_pika

    connection = await aio_pika.connect(server.url)
    channel = await connection.channel()
    await channel.declare_queue("events", durable=True, arguments={"x-max-length": 10_000})
    await connection.close()


@contextlib.contextmanager
def targets(names: set[str], fsync: str, batch: int = 500) -> Iterator[dict[str, Target]]:
    """Start the servers that the sinks need."""
    found: dict[str, Target] = {"memory": Target(lambda: Publisher(MemorySink()))}
    with contextlib.ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))

        if names & {"redis", "redis-list"}:
            options = ("--appendfsync", fsync) if fsync else ("--appendonly", "no")
            redis_server = stack.enter_context(RedisServer(folder(), options=options))
            found["redis"] = Target(
                lambda: Publisher(RedisSink(redis_server.url, key="events"), batch=batch),
                lambda: redis_entries(redis_server),
                lambda: redis_cpu(redis_server),
            )
            found["redis-list"] = Target(
                lambda: Publisher(RedisSink(redis_server.url, key="list", mode="list"), batch=batch),
                cpu=lambda: redis_cpu(redis_server),
            )
        if names & {"jetstream", "jetstream-events", "nats"}:
            nats_server = stack.enter_context(NatsServer(folder()))
            asyncio.run(make_stream(nats_server))
            url = nats_server.url
            found["jetstream"] = Target(lambda: Publisher(NatsSink(url, subject="events", envelope=True)))
            found["jetstream-events"] = Target(
                lambda: Publisher(NatsSink(url, subject="events")), lambda: nats_messages(nats_server)
            )
            found["nats"] = Target(lambda: Publisher(NatsSink(url, subject="other", jetstream=False)))
        if "kafka" in names:
            broker = stack.enter_context(KafkaBroker().running())
            found["kafka"] = Target(lambda: Publisher(KafkaSink(broker.url, topic="events")))
        if names & {"rabbitmq", "rabbitmq-events"}:
            rabbit_server = stack.enter_context(RabbitServer(folder()))
            asyncio.run(make_queue(rabbit_server))
            found["rabbitmq"] = Target(
                lambda: Publisher(RabbitMQSink(rabbit_server.url, routing_key="events", envelope=True))
            )
            found["rabbitmq-events"] = Target(lambda: Publisher(RabbitMQSink(rabbit_server.url, routing_key="events")))
        yield {name: target for name, target in found.items() if name in names}


SINKS = (
    *("memory", "redis", "redis-list", "jetstream", "jetstream-events", "nats", "kafka", "rabbitmq"),
    "rabbitmq-events",
)


def on_a_loop(coro: Any) -> Any:
    """Run a coroutine on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coro)


def show(name: str, offered: str, runs: list[Run]) -> None:
    """Print the medians of some runs."""
    rates = [run.arrived / run.seconds for run in runs]
    dropped = [run.offered - run.arrived for run in runs]
    each = statistics.median(run.cpu / run.arrived for run in runs) * 1e6
    server = statistics.median(run.server_cpu / run.arrived for run in runs) * 1e6
    print(
        f"{name:18}{offered:>10}{statistics.median(rates):>12,.0f}/s{max(dropped):>10,} dropped"
        f"{statistics.median(run.cpu / run.seconds for run in runs):>8.0%} cpu"
        f"{each:>6.1f} µs each{f', server {server:.1f}' if server else ''}"
        f"{statistics.median(run.lag_p99 for run in runs) * 1000:>8.2f} ms lag p99"
        f"{max(run.lag_max for run in runs) * 1000:>8.1f} ms max",
        flush=True,
    )


def compare_with_agentflow(python: str, rounds: int) -> None:
    """Offer 100,000 events a second to agentflow's publisher and 250,000 to bgtasks, in turn, for 3 seconds each."""
    program = Path(__file__).with_name("agentflow_publisher.py")
    agentflow_rates, our_rates = [], []
    for _ in range(rounds):
        options = ("--appendonly", "no")
        with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), options=options) as server:
            done = subprocess.run([python, program, server.url], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        agentflow_rates.append(found["delivered"] / found["seconds"])
        print(f"agentflow: {found['delivered']:,} of {found['offered']:,} delivered", flush=True)
        with targets({"redis"}, fsync="") as sinks:
            run = on_a_loop(run_once(sinks["redis"], 250_000, 3))
        our_rates.append(run.arrived / run.seconds)
        print(f"bgtasks: {run.arrived:,} of {run.offered:,} delivered", flush=True)
    ratio = statistics.median(our / max(other, 1) for our, other in zip(our_rates, agentflow_rates, strict=True))
    print(
        f"Redis stream, delivered a second: agentflow, offered 100,000/s, {statistics.median(agentflow_rates):,.0f}; "
        f"bgtasks, offered 250,000/s, {statistics.median(our_rates):,.0f}: {ratio:,.1f} x (must 20)"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Offers events to real servers and measures.")
    parser.add_argument("sinks", nargs="*", metavar="SINK", help=f"of {', '.join(SINKS)}; all of them by default")
    parser.add_argument("--rate", type=int, help="events a second; by default 100,000, 250,000 and flat out")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--fsync",
        choices=["always", "everysec", "no"],
        default="",
        help="have Redis write to its append-only file; sync it before each answer, each second, or not",
    )
    parser.add_argument("--batch", type=int, default=500, help="the most events in a batch for Redis")
    parser.add_argument("--agentflow", metavar="PYTHON", help="a Python that has 10xscale-agentflow[redis] and uvloop")
    arguments = parser.parse_args()
    names = set(arguments.sinks or SINKS)
    if unknown := names - set(SINKS):
        parser.error(f"no such sink: {', '.join(sorted(unknown))}")
    print(f"Python {platform.python_version()}, uvloop {uvloop.__version__}, implementation: {bgtasks.IMPLEMENTATION}")
    if arguments.agentflow:
        compare_with_agentflow(arguments.agentflow, arguments.rounds)
        return
    rates = [arguments.rate] if arguments.rate is not None else [100_000, 250_000, 0]
    with targets(names, arguments.fsync, arguments.batch) as found:
        for rate in rates:
            runs: dict[str, list[Run]] = {name: [] for name in found}
            for _ in range(arguments.rounds):
                for name, target in found.items():
                    runs[name].append(on_a_loop(run_once(target, rate, arguments.seconds)))
            for name in found:
                show(name, f"{rate:,}/s" if rate else "flat out", runs[name])


if __name__ == "__main__":
    main()

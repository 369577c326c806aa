"""What a type checker is to accept and to refuse of publishers and what they hand out; never run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, assert_type

from bgtasks import BackgroundTaskManager, events
from bgtasks.events import (
    IMPLEMENTATION,
    AnySpool,
    BasePublisher,
    EventOverflow,
    Fanout,
    FlushReport,
    Publisher,
    PublisherState,
    PublisherStats,
    PublishesOne,
    Reject,
    Retry,
    Sink,
    SpoolOverflow,
    SpoolStats,
    publish_event,
)
from bgtasks.events.model import EventModel
from bgtasks.events.sinks.console import ConsoleSink
from bgtasks.events.sinks.memory import MemorySink
from bgtasks.events.spool import Spool, SpoolSync


@dataclass
class Order:
    """An event."""

    number: int


class TableSink(Sink):
    """A sink with all that an author can write."""

    max_inflight: ClassVar[int | None] = 4

    async def open(self) -> None:
        """Do nothing."""

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Raise what a sink may raise."""
        if not batch_id:
            raise Retry(after=5, reason="no id")
        raise Reject([index for index, event in enumerate(batch) if not event], "empty")

    async def close(self) -> None:
        """Do nothing."""


class ShortSink(Sink):
    """A sink with the one method that it needs."""

    max_inflight = 1

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Do nothing."""


class NoSink(Sink):  # pyright: ignore[reportImplicitAbstractClass]
    """A sink without ``write``."""


class SyncSink(Sink):
    """A sink whose ``write`` is no coroutine function, and whose limit is no number."""

    max_inflight = "4"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def write(self, batch: Sequence[bytes], batch_id: str) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do nothing."""


async def sinks() -> None:
    """A sink can be used without a publisher; an incomplete one cannot be made."""
    async with ShortSink() as sink:
        assert_type(sink, ShortSink)
        await sink.write([b"{}"], "1")
        assert_type(sink.retry_window, float)
        await sink.write("{}", "1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await sink.write([b"{}"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    NoSink()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
    Retry("soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(Retry().after, float | None)
    Reject("all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(Reject().indexes, tuple[int, ...])


def options(manager: BackgroundTaskManager, spool: Spool, overflow: EventOverflow) -> None:
    """Each option of a publisher by itself, and all of them."""
    Publisher(TableSink())
    Publisher(
        TableSink(),
        max_events=10,
        max_bytes=10,
        max_event_bytes=10,
        batch=10,
        batch_bytes=10,
        linger=1,
        inflight=2,
        overflow=overflow,
        retry_for=None,
        max_attempts=5,
        spool=None,
        dead_letters=Path("dead"),
        encode="now",
        name="orders",
        manager=manager,
        connect=True,
    )
    Publisher(TableSink(), spool="events")
    Publisher(TableSink(), spool=Path("events"))
    Publisher(TableSink(), spool=spool)
    Publisher()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Publisher("redis://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), 10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Publisher(TableSink(), max_events=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), linger="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), overflow="raise")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), encode="later")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), spool=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Publisher(TableSink(), key="orders")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Derived(Publisher):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """Nobody derives from a publisher: a sink is what one writes."""


async def publishing(publisher: Publisher, manager: BackgroundTaskManager) -> None:
    """An event may be anything; times are lengths."""
    assert_type(publisher.emit({"event": "paid"}), bool)
    publisher.emit(Order(5))
    publisher.emit(b"{}")
    publisher.emit(EventModel(event="paid", event_type="end"))
    publisher.emit()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(publisher.emit_encoded({}), bool)
    assert_type(await publisher.publish({}, durable=True), bool)
    await publisher.publish({}, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(await publisher.start(), Publisher)
    assert_type(await publisher.flush(5), FlushReport)
    assert_type(await publisher.close(timeout=5.0), FlushReport)
    await publisher.flush("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await publisher.flush(deadline=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await publisher.close(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    publisher.attach(manager)
    manager.attach(publisher)
    publisher.attach(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(publisher.manager, BackgroundTaskManager | None)
    async with publisher as entered:
        assert_type(entered, Publisher)


async def looking(publisher: Publisher) -> None:
    """What a publisher hands out is typed, with the units in the names."""
    assert_type(publisher.name, str)
    assert_type(publisher.sink, Sink)
    assert_type(publisher.is_durable, bool)
    assert_type(publisher.sink.is_durable, bool)
    assert_type(publisher.sink.written("batch-1"), Collection[int])
    stats = publisher.stats()
    assert_type(stats, PublisherStats)
    assert_type(stats["state"], PublisherState)
    assert_type(stats["queue_bytes"], int)
    assert_type(stats["dropped"], dict[str, int])
    assert_type(stats["oldest_age_seconds"], float)
    assert_type(stats["last_error"], str | None)
    stats["oldest_age"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]
    stats["state"] == "full"  # type: ignore[comparison-overlap]  # pyright: ignore[reportUnnecessaryComparison]
    report = await publisher.flush()
    assert_type(report["status"], Literal["flushed", "timeout"])
    assert_type(report["duration_seconds"], float)
    report["status"] == "deadline"  # type: ignore[comparison-overlap]  # pyright: ignore[reportUnnecessaryComparison]


async def several(first: Publisher, second: Publisher, manager: BackgroundTaskManager) -> None:
    """A fanout takes publishers, not sinks."""
    fanout = Fanout([first, second], manager=manager)
    assert_type(fanout.publishers, tuple[Publisher, ...])
    assert_type(fanout.emit({}), bool)
    assert_type(await fanout.publish({}, durable=True), bool)
    assert_type(await fanout.flush(1), FlushReport)
    assert_type(fanout.stats(), list[PublisherStats])
    assert_type(fanout.manager, BackgroundTaskManager | None)
    Fanout(first, second)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    Fanout([ConsoleSink()])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    Fanout([first], manager)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Fanout([fanout])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


class Webhooks:
    """A publisher of another package."""

    async def publish(self, event: Order) -> str:
        """Publish one."""
        return str(event.number)


class NotOne:
    """What has no ``publish``."""


def from_anywhere(publisher: BasePublisher, manager: BackgroundTaskManager) -> None:
    """``publish_event`` takes both kinds of publishers, and finds them where they are left out."""
    one: PublishesOne = Webhooks()
    assert_type(publish_event({}), bool)
    publish_event({}, publisher, manager)
    publish_event({}, publisher=one, task_manager=manager)
    publish_event({}, None)
    publish_event()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    publish_event({}, NotOne())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    publish_event({}, MemorySink())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    publish_event({}, publisher, 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BasePublisher()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]


def models() -> None:
    """The fields of an event of an agent program."""
    event = EventModel(event="node_execution", event_type="start", thread_id=5, data={"step": 1}, is_error=False)
    assert_type(event.data, dict[str, Any])
    assert_type(event.timestamp, float)
    assert_type(event.event_id, str)
    assert_type(event.thread_id, str | int)
    EventModel("node_execution", "start")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    EventModel(event="node_execution")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    EventModel(event="a", event_type="b", content=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EventModel(event="a", event_type="b", node="c")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def spools(overflow: SpoolOverflow, sync: SpoolSync) -> None:
    """A spool by its options, and by its methods."""
    Spool("events")
    spool = Spool(Path("events"), max_bytes=1 << 20, overflow=overflow, max_age=None, sync=sync)
    spool.open()
    spool.append([b"{}"], "1")
    assert_type(spool.oldest(5), list[tuple[str, list[bytes]]])
    spool.done("1")
    assert_type(spool.stats(), SpoolStats)
    assert_type(spool.stats()["bytes"], int)
    assert_type(spool.stats()["dropped"], dict[str, int])
    spool.close()
    any_spool: AnySpool = spool
    Publisher(TableSink(), spool=any_spool)
    Spool()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Spool(b"events")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Spool("events", 1 << 20)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Spool("events", overflow="drop_newest")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Spool("events", max_age="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Spool("events", sync="off")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    spool.append("{}", "1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    spool.stats()["events_total"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]


def handed_out(stats: PublisherStats, state: PublisherState, report: FlushReport) -> None:
    """The types of what is handed out have names."""
    plain: Mapping[str, object] = stats
    other: PublisherState = "full"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    short: FlushReport = {"status": "flushed"}  # type: ignore[typeddict-item]  # pyright: ignore[reportAssignmentType]
    print(plain, state, other, report, short)


def names() -> None:
    """The package has no other names than it says: one of them is looked up late."""
    assert_type(IMPLEMENTATION, Literal["cython", "python"])
    events.NoSuchName  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

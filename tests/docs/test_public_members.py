"""What users see of an object, ``dir`` included, is what the reference describes: nothing of its parts shows."""

from __future__ import annotations

import ast
import importlib

import pytest
from paths import PACKAGE
from requirements import CLIENTS, need

need("msgspec")

from bgtasks import AsyncBackgroundExecutor, BackgroundExecutor, BackgroundTaskManager  # noqa: E402
from bgtasks.events import Fanout, Publisher, Sink  # noqa: E402
from bgtasks.events.sinks.memory import MemorySink  # noqa: E402
from bgtasks.events.spool import Spool  # noqa: E402

OF_PUBLISHERS = {"attach", "attached", "close", "emit", "emit_encoded", "flush", "manager", "publish", "start", "stats"}
OF_SINKS = {"close", "is_durable", "max_inflight", "open", "retry_window", "takes_bytes", "write", "written"}
# Options that a sink cannot be made without, by module and class.
SINKS = {
    "console.ConsoleSink": {},
    "jsonl.JsonlSink": {"path": "events.jsonl"},
    "kafka.KafkaSink": {"servers": "localhost:9092", "topic": "orders"},
    "memory.MemorySink": {},
    "nats.NatsSink": {"servers": "nats://localhost", "subject": "orders"},
    "otlp.OtlpSink": {"endpoint": "http://localhost/v1/logs"},
    "rabbitmq.RabbitMQSink": {"url": "amqp://localhost", "routing_key": "orders"},
    "redis.RedisSink": {"url": "redis://localhost", "key": "orders"},
    "sqlite.SqliteSink": {"path": "events.db"},
}
OWN = {"jsonl.JsonlSink": {"path", "repaired_bytes"}, "memory.MemorySink": {"batches", "events"}}


def public_members(thing):
    """Return the names without an underscore that a thing has, its attributes included."""
    return {name for name in dir(thing) if not name.startswith("_")}


def test_a_publisher_shows_none_of_its_parts():
    """Queue, flusher, spool and what they call are inside."""
    publisher = Publisher(MemorySink())
    assert public_members(publisher) == OF_PUBLISHERS | {"is_durable", "name", "sink"}
    assert public_members(Fanout([publisher])) == OF_PUBLISHERS | {"publishers"}


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_shows_what_every_sink_has(name, tmp_path, monkeypatch):
    """What it adds is in its entry of the reference."""
    monkeypatch.chdir(tmp_path)
    module, _, kind = name.partition(".")
    if module in CLIENTS:
        need(CLIENTS[module])
    sink = getattr(importlib.import_module(f"bgtasks.events.sinks.{module}"), kind)(**SINKS[name])
    assert public_members(sink) == OF_SINKS | OWN.get(name, set())
    assert public_members(Sink) == OF_SINKS


def test_a_spool_shows_its_batches(tmp_path):
    """What a publisher calls, and what users do."""
    assert public_members(Spool(tmp_path / "spool")) == {"append", "close", "done", "oldest", "open", "stats"}


@pytest.mark.parametrize("kind", [AsyncBackgroundExecutor, BackgroundExecutor])
def test_an_executor_shows_its_manager(kind):
    """And ``submit``."""
    assert public_members(kind()) >= {"manager", "submit"}
    assert not public_members(kind()) - {"manager", "submit"} - set(vars(kind))


def test_a_manager_shows_methods_alone():
    """Its attributes are properties of its class; the parts are inside."""
    manager = BackgroundTaskManager()
    assert public_members(manager) == public_members(BackgroundTaskManager)


def public_functions():
    """Return the functions and methods that users call, by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if "._" in name or name == "bgtasks.registry":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                found[f"{name}.{node.name}"] = node
    return found


def test_no_public_function_takes_options_of_any_type():
    """A checker knows every option: what is handed on is a ``TypedDict``, unless it is the arguments of a function."""
    untyped = {
        name
        for name, node in public_functions().items()
        if node.args.kwarg is not None and "Unpack" not in ast.unparse(node.args.kwarg.annotation or ast.Name("Any"))
    }
    # The keywords of the submitted function, whose types the overloads of ``typed_submit`` check.
    assert {name for name in untyped if not name.endswith(".submit")} <= {
        # What ``inject`` makes of a function, with its arguments.
        "bgtasks.injection.filled",
        "bgtasks.injection.filled_async",
        # The keywords of the function that runs again and again.
        "bgtasks.manager.every",
        "bgtasks.manager.service",
    }

"""The examples of the sinks run on real servers and say what arrived."""

import subprocess
import sys

import pytest
from paths import EXAMPLES
from requirements import need

need("msgspec")


def run_example(sinks, argument, *options):
    """Run the program for some sinks and return what it printed; its docstring says how to start it."""
    program = EXAMPLES / f"publish_to_{sinks}.py"
    assert f"python examples/publish_to_{sinks}.py" in program.read_text()
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, program, argument],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("sink", "package", "fixture", "said"),
    [
        ("redis", "redis", "redis_server", "10,000 entries in the stream"),
        ("nats", "nats", "nats_server", "10,000 of 10,000 events delivered, as 10,000 messages"),
        ("kafka", "confluent_kafka", "kafka_broker", "10,000 of 10,000 events delivered, 0 dropped"),
        ("rabbitmq", "aio_pika", "rabbit_server", "10,000 orders in the queue"),
        ("otlp", "opentelemetry.sdk", "collector", "1,000 of 1,000 events delivered, 0 dropped"),
    ],
)
def test_an_example_publishes(request, sink, package, fixture, said):
    """The program exits with status 0 on the server of its docstring, and everything has arrived."""
    need(package)
    server = request.getfixturevalue(fixture)
    output = run_example(sink, server.url, "-W", "ignore::DeprecationWarning:opentelemetry")
    assert said in output
    assert "events delivered" in output


@pytest.mark.parametrize(
    ("sinks", "file", "said"),
    [
        ("sqlite", "orders.db", "10,000 of 10,000 events delivered, 0 dropped\nGhent: 3,334 orders in the table"),
        ("several", "orders.jsonl", "10 events for two publishers: 20 delivered, 0 dropped\n10 lines in the file"),
        ("own_sink", "refused.jsonl", "10 refused\n10 sent again, 10,000 orders with the receiver"),
    ],
)
def test_an_example_without_a_server_publishes(tmp_path, sinks, file, said):
    """The program exits with status 0, and everything has arrived."""
    assert said in run_example(sinks, tmp_path / file, "-X", "dev")


@pytest.mark.parametrize("program", sorted(EXAMPLES.glob("publish_to_*.py")), ids=lambda program: program.stem)
def test_an_example_ends_as_bgtasks_run_does(program):
    """On a signal its publisher sends what it has: it runs by ``bgtasks.run``, with the publisher on that manager."""
    text = program.read_text()
    assert "bgtasks.run(partial(main, " in text
    assert "manager=manager" in text
    assert "asyncio.run(" not in text

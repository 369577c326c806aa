"""A sink whose client is not installed says how to install it; importing its module needs no client."""

import importlib
import re
import sys

import pytest
from requirements import need

from bgtasks.errors import MissingExtraError

need("msgspec")


@pytest.mark.parametrize(
    ("sink", "name", "package"),
    [
        ("kafka", "KafkaSink", "confluent_kafka"),
        ("nats", "NatsSink", "nats"),
        ("otlp", "OtlpSink", "opentelemetry"),
        ("rabbitmq", "RabbitMQSink", "aio_pika"),
        ("redis", "RedisSink", "redis"),
    ],
)
def test_a_missing_client_names_its_extra(monkeypatch, sink, name, package):
    """The error has the command that installs the client."""
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    sink_class = getattr(importlib.import_module(f"bgtasks.events.sinks.{sink}"), name)
    with pytest.raises(MissingExtraError, match=re.escape(f'pip install "bgtasks-registry[{sink}]"')):
        sink_class()

"""A sink whose client is not installed says how to install it; importing the sink needs none."""

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
        ("kafka", "KafkaPublisher", "confluent_kafka"),
        ("nats", "NatsPublisher", "nats"),
        ("otlp", "OtlpPublisher", "opentelemetry"),
        ("rabbitmq", "RabbitMQPublisher", "aio_pika"),
        ("redis", "RedisPublisher", "redis"),
    ],
)
def test_a_missing_client_names_its_extra(monkeypatch, sink, name, package):
    """The error holds the command that installs it."""
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    publisher = getattr(importlib.import_module(f"bgtasks.events.sinks.{sink}"), name)
    with pytest.raises(MissingExtraError, match=re.escape(f'pip install "bgtasks-registry[{sink}]"')):
        publisher()

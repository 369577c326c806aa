"""Fixtures that run real servers; ``conftest.py`` imports them.

If a server is not installed, its tests are skipped, or fail if ``BGTASKS_REQUIRE`` has ``servers`` in its list.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest
from requirements import need
from servers import KafkaBroker, NatsServer, RabbitServer, RedisServer, Server, ServerError

__all__ = ["collector", "kafka_broker", "nats_server", "rabbit_server", "redis_server", "start_server"]

AnyServer = TypeVar("AnyServer", bound=Server)


def need_server(kind: type[Server]) -> None:
    """Skip the test if a server is not installed, or fail it if the environment requires servers."""
    if kind.is_installed():
        return
    if "servers" in {entry.strip() for entry in os.environ.get("BGTASKS_REQUIRE", "").split(",")}:
        raise ServerError(f"{kind.program} is not installed; run scripts/install_servers")
    pytest.skip(f"{kind.program} is not installed")


@pytest.fixture
def start_server(tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """Give a function that starts a server for this test alone, which may be killed and frozen."""
    started: list[Server] = []

    def start(kind: type[AnyServer], **options: Any) -> AnyServer:
        need_server(kind)
        server = kind(tmp_path_factory.mktemp(kind.__name__), **options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.__exit__()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    """Give a Redis server that all tests share; each uses its own keys."""
    need_server(RedisServer)
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory) -> Iterator[NatsServer]:
    """Give a NATS server that all tests share; each uses its own subjects and streams."""
    need_server(NatsServer)
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory) -> Iterator[RabbitServer]:
    """Give a RabbitMQ node that all tests share; each uses its own queues."""
    need_server(RabbitServer)
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[KafkaBroker]:
    """Give the broker of librdkafka; each test uses its own topics."""
    need("confluent_kafka")
    with KafkaBroker().running() as broker:
        yield broker


@pytest.fixture
def collector():
    """Give a collector of OTLP over HTTP on the loopback address, which keeps the decoded requests."""
    need("opentelemetry.proto")
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = zlib.decompress(body, 31)
            requests.append(ExportLogsServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = requests
    server.url = f"http://127.0.0.1:{server.server_port}/v1/logs"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

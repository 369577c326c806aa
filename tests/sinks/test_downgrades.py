"""TLS that was asked for: a server without it gets neither passwords nor events."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess

import pytest
from requirements import need
from servers import NatsServer

from bgtasks.events import Publisher, SinkError
from bgtasks.events.sinks.nats import NatsSink

nats = need("nats")
need("msgspec")

SECRET = "open-sesame"
GREETING = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"auth_required":true}\r\n'


class PlainServer:
    """Greets, never starts TLS, and keeps what it receives."""

    def __init__(self, greeting=b"", answer=b""):
        self.greeting = greeting
        self.answer = answer
        self.received = b""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception):
        self._server.close()

    async def _accept(self, reader, writer):
        with contextlib.suppress(OSError):
            writer.write(self.greeting)
            while data := await reader.read(1 << 16):
                self.received += data
                writer.write(self.answer)
        writer.close()


@contextlib.contextmanager
def certificate(folder):
    """Give the files of a certificate for the loopback address and of its key."""
    paths = folder / "cert.pem", folder / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    address = "subjectAltName=IP:127.0.0.1"
    files = ("-out", paths[0], "-keyout", paths[1])
    command = ["openssl", "req", *options.split(), "-addext", address, *files]
    subprocess.run(command, check=True, capture_output=True)
    yield paths


async def failure_of(sink):
    """Return the error of a publisher that cannot connect, within seconds."""
    publisher = Publisher(sink)
    publisher.emit({"secret": SECRET})
    report = await publisher.close(2)
    assert report["delivered"] == 0
    return report["last_error"]


@pytest.mark.parametrize("options", [{}, {"tls": ssl.create_default_context()}], ids=["tls://", "tls="])
async def test_nats_sends_nothing_to_a_server_without_tls(options):
    """Not even CONNECT, which has the password: the server's word is not enough to go on in plain text."""
    scheme = "nats" if options else "tls"
    async with PlainServer(GREETING) as server:
        sink = NatsSink(f"{scheme}://user:{SECRET}@{server.address}", connect_options=options, timeout=1)
        assert "offers no TLS" in await failure_of(sink)
        assert server.received == b""


async def test_nats_refuses_a_real_server_without_tls(nats_server):
    """The error is that of open, and says what to do."""
    with pytest.raises(SinkError, match="the server offers no TLS; nothing was sent to it"):
        await NatsSink(f"tls://127.0.0.1:{nats_server.port}").open()


@pytest.mark.parametrize("demands", [True, False], ids=["demanded", "offered"])
async def test_nats_starts_tls_where_it_is_offered(start_server, tmp_path, demands):
    """A server may demand TLS or only offer it."""
    with certificate(tmp_path) as (cert, key):
        file = tmp_path / "nats.conf"
        plain = "false" if demands else "true"
        file.write_text(f'tls {{ cert_file: "{cert}", key_file: "{key}" }}\nallow_non_tls: {plain}\n')
        server = start_server(NatsServer, options=("-c", str(file)))
        context = ssl.create_default_context(cafile=str(cert))
        sink = NatsSink(
            f"tls://127.0.0.1:{server.port}", subject="x", jetstream=False, connect_options={"tls": context}
        )
        async with sink:
            transport = sink._link._client._transport._io_writer.transport
            assert transport.get_extra_info("cipher") is not None
            await sink.write([b"1"], "1")


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("kind", ["redis", "rabbitmq", "kafka", "otlp"])
async def test_other_sinks_send_nothing_in_plain_text(kind):
    """They start with the handshake of TLS, which a plain server cannot answer; no secret is in it."""
    async with PlainServer(b"", b"-ERR plain text\r\n") as server:
        if kind == "redis":
            need("redis")
            from bgtasks.events.sinks.redis import RedisSink

            sink = RedisSink(f"rediss://:{SECRET}@{server.address}", timeout=1)
        elif kind == "rabbitmq":
            need("aio_pika")
            from bgtasks.events.sinks.rabbitmq import RabbitMQSink

            sink = RabbitMQSink(f"amqps://guest:{SECRET}@{server.address}/", timeout=1)
        elif kind == "kafka":
            need("confluent_kafka")
            from bgtasks.events.sinks.kafka import KafkaSink

            config = {"security.protocol": "ssl", "log_level": 0, "client.id": "me"}
            sink = KafkaSink(server.address, topic="x", config=config, timeout=1)
        else:
            need("opentelemetry.exporter.otlp.proto.http")
            from bgtasks.events.sinks.otlp import OtlpSink

            sink = OtlpSink(f"https://{server.address}/v1/logs", headers={"api-key": SECRET}, timeout=1)
        assert await failure_of(sink)
        assert SECRET.encode() not in server.received
        # A record of type handshake, if anything.
        assert server.received[:1] in (b"", b"\x16")

"""TLS of each sink: a good certificate is accepted, one that has expired or is for another host is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from requirements import need
from servers import NatsServer, make_queue

from bgtasks.events import Publisher

need("msgspec")

# The handshake is that of Python's ssl on each loop; the sinks make the difference.
pytestmark = pytest.mark.loops("asyncio")

SECRET = "open-sesame"
EXPIRED = "certificate has expired"
OTHER_HOST = "mismatch|doesn't match"
ADDRESSES = {"good": "IP:127.0.0.1", "expired": "IP:127.0.0.1", "other-host": "DNS:elsewhere.example"}
EXPECTED = {"expired": EXPIRED, "other-host": OTHER_HOST}


class Certificate:
    """A certificate that is its own authority: good, expired, or of another host.

    Args:
        folder: an empty directory.
        kind: a key of ``ADDRESSES``.

    """

    def __init__(self, folder, kind):
        self.file, self.key = folder / "cert.pem", folder / "key.pem"
        request, extensions = folder / "request.pem", folder / "extensions"
        extensions.write_text(f"subjectAltName={ADDRESSES[kind]}\n")
        made = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=bgtasks"
        signed = f"openssl x509 -req -days {-1 if kind == 'expired' else 2}"
        for command in (
            [*made.split(), "-out", request, "-keyout", self.key],
            [*signed.split(), "-in", request, "-signkey", self.key, "-extfile", extensions, "-out", self.file],
        ):
            subprocess.run(command, check=True, capture_output=True)

    @property
    def of_server(self):
        """A context for a server that shows it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self.key)
        return context

    @property
    def of_client(self):
        """A context for a client that trusts it."""
        return ssl.create_default_context(cafile=self.file)


@pytest.fixture(params=list(ADDRESSES))
def kind(request):
    """Give each kind of certificate."""
    return request.param


@pytest.fixture
def certificate(tmp_path, kind):
    """Give a certificate of the kind."""
    return Certificate(tmp_path, kind)


@contextlib.asynccontextmanager
async def front(port, certificate):
    """Give the port of a server that ends TLS and passes on to a port, as stunnel does; and what it passed on."""
    passed = bytearray()
    pumps, writers = set(), set()

    async def pump(reader, writer, seen):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                seen += data
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def accept(reader, writer):
        pumps.add(asyncio.current_task())
        writers.add(writer)
        try:
            await writer.start_tls(certificate.of_server)
        except OSError:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.add(far_writer)
        await asyncio.gather(pump(reader, far_writer, passed), pump(far_reader, writer, bytearray()))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], passed
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        if pumps:
            await asyncio.wait(pumps)


async def assert_used_or_refused(sink, kind, expected=EXPECTED):
    """Have a publisher send an event, and look at what became of it."""
    publisher = Publisher(sink)
    publisher.emit({"secret": SECRET})
    good = kind == "good"
    report = await publisher.close(30 if good else 2)
    assert report["delivered"] == good, report
    if not good:
        assert re.search(expected[kind], report["last_error"])


async def test_redis(redis_server, certificate, kind):
    """redis-py checks the certificate of rediss://."""
    need("redis")
    from bgtasks.events.sinks.redis import RedisSink

    async with front(redis_server.port, certificate) as (port, passed):
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate.file}"
        await assert_used_or_refused(RedisSink(url, key=f"tls-{kind}", timeout=5), kind)
        assert (SECRET.encode() in passed) is (kind == "good")


async def test_nats(start_server, tmp_path, certificate, kind):
    """nats-py checks the certificate of tls://."""
    need("nats")
    from bgtasks.events.sinks.nats import NatsSink

    file = tmp_path / "nats.conf"
    file.write_text(f'tls {{ cert_file: "{certificate.file}", key_file: "{certificate.key}" }}\n')
    server = start_server(NatsServer, options=("-c", str(file)))
    options = {"tls": certificate.of_client}
    sink = NatsSink(f"tls://127.0.0.1:{server.port}", subject="x", jetstream=False, connect_options=options)
    await assert_used_or_refused(sink, kind)


async def test_rabbitmq(rabbit_server, certificate, kind):
    """aio-pika checks the certificate of amqps://."""
    need("aio_pika")
    from bgtasks.events.sinks.rabbitmq import RabbitMQSink

    await make_queue(rabbit_server.url, "tls")
    async with front(rabbit_server.port, certificate) as (port, passed):
        options = {"ssl_context": certificate.of_client}
        sink = RabbitMQSink(f"amqps://guest:guest@127.0.0.1:{port}/", routing_key="tls", connect_options=options)
        await assert_used_or_refused(sink, kind)
        assert (SECRET.encode() in passed) is (kind == "good")


@pytest.mark.parametrize("kind", ["expired", "other-host"])
async def test_kafka(certificate, kind):
    """Librdkafka checks the certificate of a broker; its mock broker has no TLS, so a good one is not tested."""
    need("confluent_kafka")
    from bgtasks.events.sinks.kafka import KafkaSink

    async with front(9, certificate) as (port, passed):
        config = {"security.protocol": "ssl", "ssl.ca.location": str(certificate.file), "log_level": 0}
        sink = KafkaSink(f"127.0.0.1:{port}", topic="x", config=config, timeout=1)
        # It does not say what is wrong with the certificate.
        await assert_used_or_refused(sink, kind, dict.fromkeys(EXPECTED, "certificate verify failed"))
        assert not passed


async def test_otlp(certificate, kind, monkeypatch):
    """The exporter checks the certificate of https://."""
    need("opentelemetry.exporter.otlp.proto.http")
    from bgtasks.events.sinks.otlp import OtlpSink

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.handle_error = lambda *arguments: None
    server.socket = certificate.of_server.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # requests prefers them
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(certificate.file))
    try:
        sink = OtlpSink(f"https://127.0.0.1:{server.server_port}/v1/logs", timeout=1)
        await assert_used_or_refused(sink, kind)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

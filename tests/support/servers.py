"""Real servers for the tests, each on the loopback address with its own port and directory.

A server is a context manager: it runs inside the ``with`` block and is killed at its end. It also dies with the process
that started it, because ``setpriv`` has the kernel send it SIGKILL then: a killed pytest leaves no server behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

from work import wait_until

__all__ = [
    "KafkaBroker",
    "NatsServer",
    "RabbitServer",
    "RedisServer",
    "Server",
    "ServerError",
    "free_port",
    "make_queue",
]

STARTS_WITHIN = 60.0  # seconds; RabbitMQ takes ten on an idle machine
ATTEMPTS = 3  # another process may take the port before the server starts
SBIN = "/usr/sbin:/sbin"  # not in the PATH of every user


class ServerError(Exception):
    """A server is not installed, or did not start; the message contains its output."""


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def find_program(name: str) -> str | None:
    """Return the path of an installed program, also from the directories for administrators."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")


class Server:
    """One server process; a subclass defines the program, its arguments, and when it is ready.

    Args:
        folder: an empty directory for its data and its log.

    """

    program: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def is_installed(cls) -> bool:
        """Return whether the program is installed."""
        return find_program(cls.program) is not None

    def arguments(self) -> list[str]:
        """Return the arguments of the program."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return additional environment variables of the program."""
        return {}

    def is_ready(self) -> bool:
        """Return whether the server answers its protocol."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        """The output of the server."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it is ready; a second start uses the same port and data."""
        attempts = 1 if self.port else ATTEMPTS
        while True:
            self.port = self.port or free_port()
            self.launch()
            if wait_until(self._is_ready_or_dead, within=STARTS_WITHIN) and self._runs():
                return
            self.kill()
            attempts -= 1
            if not attempts:
                raise ServerError(f"{self.program} did not start:\n{self.log}")
            self.port = 0

    def launch(self) -> None:
        """Start the process without waiting for it."""
        path = find_program(self.program)
        if path is None:
            raise ServerError(f"{self.program} is not installed; run scripts/install_servers")
        command = ["setpriv", "--pdeathsig", "KILL", path, *self.arguments()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill the server with SIGKILL, and wait until it is gone."""
        process, self._process = self._process, None
        if process is not None:
            # Its children may have left the group or ended with it; a group without members is no error.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        """Kill the server and start it again with its data."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Suspend the process: connections stay open, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume a frozen server."""
        os.kill(self.pid, signal.SIGCONT)

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_ready_or_dead(self) -> bool:
        return not self._runs() or self.is_ready()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def ask(port: int, request: bytes, size: int = 4096) -> bytes:
    """Send bytes to the server on a port; return its first answer, empty if there is none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(request)
        return connection.recv(size)
    return b""


class RedisServer(Server):
    """A Redis server that writes every command to its append-only file before it answers.

    Args:
        folder: an empty directory for its data and its log.
        password: the password of clients, or None.
        options: further arguments of ``redis-server``.

    """

    program = "redis-server"

    def __init__(self, folder: Path, *, password: str | None = None, options: tuple[str, ...] = ()) -> None:
        super().__init__(folder)
        self.password = password
        self.options = options

    @property
    def url(self) -> str:
        """The address for clients."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def arguments(self) -> list[str]:
        """Listen on the loopback address only, with a file that survives SIGKILL."""
        return [
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0", "--save", ""),
            *(("--requirepass", self.password) if self.password else ()),
            *self.options,
        ]

    def is_ready(self) -> bool:
        """Return whether it has read its append-only file and answers PING."""
        login = f"AUTH {self.password}\r\n".encode() if self.password else b""
        answer = ask(self.port, login + b"PING\r\n")
        return b"+PONG" in answer or (bool(login) and answer == b"+OK\r\n")


class NatsServer(Server):
    """A NATS server with JetStream in files.

    Args:
        folder: an empty directory for its data and its log.
        token: the token of clients, or None.
        options: further arguments of ``nats-server``.

    """

    program = "nats-server"

    def __init__(self, folder: Path, *, token: str | None = None, options: tuple[str, ...] = ()) -> None:
        super().__init__(folder)
        self.token = token
        self.options = options

    @property
    def url(self) -> str:
        """The address for clients."""
        secret = f"{self.token}@" if self.token else ""
        return f"nats://{secret}127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        """Listen on the loopback address only."""
        login = ["--auth", self.token] if self.token else []
        return ["-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder / "data"), *login, *self.options]

    def is_ready(self) -> bool:
        """Return whether it greets clients, which it does after JetStream has recovered."""
        return ask(self.port, b"").startswith(b"INFO")


class _PortMapper(Server):
    """The name service of the Erlang machine (``epmd``), on a port of its own so that none is left or shared."""

    program = "epmd"

    def arguments(self) -> list[str]:
        """Listen on the loopback address only."""
        return ["-address", "127.0.0.1", "-port", str(self.port)]

    def is_ready(self) -> bool:
        """Return whether it lists names: request 110 after its length, answered by the port first."""
        return ask(self.port, b"\x00\x01n")[:4] == self.port.to_bytes(4, "big")


class RabbitServer(Server):
    """A RabbitMQ node, its own cluster, run by the user who runs the tests."""

    # The script of this name in Debian's PATH changes to the user rabbitmq.
    program = "/usr/lib/rabbitmq/bin/rabbitmq-server"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "epmd").mkdir()
        self._mapper = _PortMapper(folder / "epmd")

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def launch(self) -> None:
        """Start the name service before the node."""
        if not self._mapper.port:
            self._mapper.start()
        super().launch()

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        self._mapper.kill()

    def arguments(self) -> list[str]:
        """Return none: a node is configured by its environment."""
        return []

    def environment(self) -> dict[str, str]:
        """Keep everything in the directory and on the loopback address."""
        erlang = "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none"
        return {
            "HOME": str(self.folder),  # the cookie
            "detached": "1",  # the start script becomes the node instead of waiting for it
            "ERL_EPMD_PORT": str(self._mapper.port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "none"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODENAME": f"bgtasks{self.port}@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erlang,
        }

    def is_ready(self) -> bool:
        """Return whether it starts to negotiate AMQP 0-9-1."""
        return ask(self.port, b"AMQP\x00\x00\x09\x01")[:1] == b"\x01"


async def make_queue(url: str, name: str) -> str:
    """Make a durable queue in RabbitMQ."""
    import aio_pika

    async with await aio_pika.connect(url) as connection:
        await (await connection.channel()).declare_queue(name, durable=True)
    return name


class KafkaBroker:
    """The broker inside librdkafka: Kafka's protocol over TCP, without a disk.

    It lives in this process, as long as the client that carries it.
    """

    def __init__(self) -> None:
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[KafkaBroker]:
        """Run the broker for the length of a block."""
        from confluent_kafka import Producer

        carrier = Producer({"test.mock.num.brokers": 1, "log_level": 0})
        brokers = carrier.list_topics(timeout=10).brokers
        self.url = ",".join(f"{broker.host}:{broker.port}" for broker in brokers.values())
        yield self
        carrier.purge()
        carrier.flush(1)

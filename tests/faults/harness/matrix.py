"""The rows of the matrix, each run by an injector, one producer or more, and a checker."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paths import PACKAGE, SUPPORT

from harness.checker import Verdict
from harness.targets import TARGETS

__all__ = ["FAULTS", "SHORT", "NotAllowedError", "RowError", "applies", "row_of_table", "run_row"]

SECONDS = 3  # of the rate of a sink are emitted

FAULTS = {
    "freeze": "the server is frozen for 1 s (SIGSTOP)",
    "kill": "the server is killed (SIGKILL) and started again 1 s later",
    "cut": "the connections break every 50 ms for 1 s",
    "slow": "200 ms of latency, 1 % of the data stalls for 100 ms more",
    "disk": "the disk (of the file, or of the spool before a server) is full for 1 s",
    "damage": "three times 64 bytes are overwritten in each file of the spool of a killed producer",
    "clock": "the system's clock is set back by a day, then forward by two",
    "fork": "the producer forks, and the child emits as well",
    "overload": "events are offered without a pause to a queue of 500",
    "sigkill": "the producer is killed (SIGKILL), and another one is started",
    "sigterm": "the producer is ended (SIGTERM), and another one is started",
}
OF_SERVERS = {"freeze", "kill", "cut", "slow"}
# What every change is tested with, in a minute and a half at most; the whole takes some minutes.
SHORT = [
    *(("redis", fault) for fault in ("freeze", "kill", "cut", "damage", "overload", "sigkill")),
    *(("jetstream", fault) for fault in ("kill", "cut")),
    *(("envelopes", fault) for fault in ("freeze",)),
    *(("rabbitmq", fault) for fault in ("kill",)),
    *(("sqlite", fault) for fault in ("disk", "sigkill")),
    *(("jsonl", fault) for fault in ("disk", "fork", "sigterm", "clock")),
]


class NotAllowedError(Exception):
    """The machine does not allow a fault."""


class RowError(Exception):
    """A process of a row failed."""


def applies(target: str, fault: str) -> bool:
    """Return whether a sink knows a fault."""
    return TARGETS[target].server is not None or fault not in OF_SERVERS


class Row:
    """One run of one fault against one sink."""

    def __init__(self, folder: Path, target: str, fault: str, seed: int, seconds: float) -> None:
        self.folder, self.target, self.fault, self.seed = folder, target, fault, seed
        # A batch is one commit and one round trip, so a sink that is slow takes 250 events a second of groups of 50.
        self.count = int(TARGETS[target].rate * seconds) // (4 if fault == "slow" else 1)
        stem = folder / "disk" if fault == "disk" and TARGETS[target].server else folder / "spool"
        self.spool = str(stem / "events")
        if not stem.exists() and stem.name == "spool":
            stem.mkdir()
        self.errors = folder / "errors"

    def run(self) -> Verdict:
        """Run the row."""
        with self._injector():
            if self.fault == "damage":
                self._damage()
            elif self.fault in ("sigkill", "sigterm"):
                self._end_producer()
            else:
                with self._producer("first", fault=self.fault) as producer:
                    self._wait_for(producer, "emitting")
                    if self.fault in ("freeze", "kill", "cut", "disk"):
                        self._tell(self.fault)
            return Verdict(**json.loads(self._output("harness.checker", self.folder, self.target, self.direct)))

    def _damage(self) -> None:
        self._tell("hide")
        with self._producer("first", waits=False, stays=True) as producer:
            self._wait_for(producer, "done")
            producer.kill()
        self._tell(f"damage {self.spool}")
        self._drain()

    def _end_producer(self) -> None:
        name = self.fault.upper()
        with self._producer("first") as producer:
            self._wait_for(producer, "emitting")
            self._tell("wait")
            self._tell(f"signal {producer.pid} {name}")
        self._drain()

    def _drain(self) -> None:
        """Have another producer take over what is left."""
        with self._producer("second", count=self.count // 3) as producer:
            self._wait_for(producer, "emitting")

    @contextmanager
    def _injector(self) -> Iterator[None]:
        command = ["harness.injector", str(self.folder), self.target, self.fault, str(self.seed)]
        with self._process(command, stdin=subprocess.PIPE) as process:
            self.injector = process
            answer = json.loads(self._line(process))
            if "skipped" in answer:
                raise NotAllowedError(answer["skipped"])
            self.direct, self.address = answer["direct"], answer["address"]
            yield
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)

    @contextmanager
    def _producer(self, name: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        options = {"count": self.count, "fault": "", **options}
        from harness.producer import Producer

        producer = Producer(str(self.folder), name, self.target, self.address, self.spool, **options)
        # It dies with this process, as the servers do; the injector ends with its input, to free what it holds.
        command = ["harness.producer", json.dumps(dataclasses.asdict(producer))]
        with self._process(command, prefix=["setpriv", "--pdeathsig", "KILL"]) as process:
            yield process
            code = process.wait(180)
        if code not in ((-9, 143) if self.fault in ("sigkill", "sigterm", "damage") else ()) and code:
            raise RowError(f"the producer ended with status {code}:\n{self.errors.read_text()}")

    @contextmanager
    def _process(
        self, command: list[str], prefix: Sequence[str] = (), **options: Any
    ) -> Iterator[subprocess.Popen[str]]:
        with self.errors.open("a") as errors:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(),
                **options,
            )
        try:
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _tell(self, command: str) -> None:
        """Have the injector carry out a command."""
        assert self.injector.stdin is not None
        self.injector.stdin.write(command + "\n")
        self.injector.stdin.flush()
        self._wait_for(self.injector, "done")

    def _wait_for(self, process: subprocess.Popen[str], word: str) -> None:
        while self._line(process) != word:
            pass

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RowError(f"{process.args} ended early:\n{self.errors.read_text()}")
        return line.rstrip("\n")

    def _output(self, *command: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, env=_environment(), check=False
        )
        if done.returncode:
            raise RowError(done.stderr)
        return done.stdout


def run_row(folder: Path, target: str, fault: str, *, seed: int = 1, seconds: float = SECONDS) -> Verdict:
    """Run a fault against a sink.

    Args:
        folder: an empty directory.
        target: the name of the sink.
        fault: the name of the fault.
        seed: of what is drawn by chance.
        seconds: how long the producer emits.

    Raises:
        NotAllowedError: this machine does not allow it.

    """
    return Row(folder, target, fault, seed, seconds).run()


def _environment() -> dict[str, str]:
    paths = [str(PACKAGE.parent), str(SUPPORT), str(Path(__file__).resolve().parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def row_of_table(target: str, fault: str, verdict: Verdict) -> str:
    """Return a row of the table in Markdown."""
    recovered = "" if verdict.recovered is None else f"{verdict.recovered:.2f} s"
    cells = (fault, target, verdict.accepted, verdict.lost, verdict.counted, verdict.refused, verdict.doubled)
    return f"| {' | '.join(map(str, cells))} | {verdict.reordered} | {recovered} |"

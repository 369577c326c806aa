"""The spool's queue against a list, with all operations in random order."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bgtasks.events.errors import SpoolFullError
from bgtasks.events.spool import Spool

BATCHES = st.lists(st.binary(max_size=40), min_size=1, max_size=8)


def size_of(spool):
    """Return the number of events that a spool holds, and their bytes."""
    stats = spool.stats()
    return stats["events"], stats["bytes"]


class SpoolMachine(RuleBasedStateMachine):
    """A spool and a list that must hold the same batches."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.spool = self.make()
        self.model: list[tuple[str, list[bytes]]] = []
        self.appended = 0

    def make(self):
        """Return another spool on the same files."""
        return Spool(self.directory / "events")

    def expect(self, count):
        """Compare the first batches of the queue."""
        assert self.spool.oldest(count) == self.model[:count]

    @rule(batch=BATCHES)
    def append(self, batch):
        """Append a batch."""
        batch_id = f"p-{self.appended}"
        self.appended += 1
        self.spool.append(batch, batch_id)
        self.model.append((batch_id, batch))

    @rule(count=st.integers(1, 5))
    def oldest(self, count):
        """Read some batches."""
        self.expect(count)

    @precondition(lambda self: self.model)
    @rule()
    def done(self):
        """Remove the first batch, read before or not."""
        batch_id, _ = self.model.pop(0)
        self.spool.done(batch_id)

    @rule()
    def done_again(self):
        """Name a batch that does not exist."""
        self.spool.done("none")

    @rule()
    def restart(self):
        """Close the spool and open another."""
        self.spool.close()
        self.spool = self.make()
        self.spool.open()

    @rule()
    def crash(self):
        """Continue with the files that another process would find if this one died."""
        copy = Path(tempfile.mkdtemp())
        shutil.copytree(self.directory, copy, dirs_exist_ok=True)
        self.spool.close()
        shutil.rmtree(self.directory)
        self.directory = copy
        self.spool = self.make()
        self.spool.open()

    @invariant()
    def sizes_agree(self):
        """Compare the counts."""
        assert size_of(self.spool) == (
            sum(len(batch) for _, batch in self.model),
            sum(len(event) for _, batch in self.model for event in batch),
        )
        assert self.spool.stats()["batches"] == len(self.model)

    def teardown(self):
        """Read all batches, in order."""
        self.expect(len(self.model) + 1)
        self.spool.close()
        shutil.rmtree(self.directory)


class FullSpoolMachine(RuleBasedStateMachine):
    """A spool at its quota: it drops the oldest files of which no batch was read, and counts what was in them."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.spool = Spool(self.directory / "events", max_bytes=1 << 20)
        self.present: list[tuple[str, int]] = []
        self.held: set[str] = set()
        self.appended = 0
        self.lost = 0

    @rule(events=st.integers(1, 400), size=st.integers(1, 2000))
    def append(self, events, size):
        """Append a batch; find out which ones were dropped for it."""
        batch_id = f"p-{self.appended}"
        before = self.spool.stats()
        try:
            self.spool.append([b"x" * size] * events, batch_id)
        except SpoolFullError:
            assert self.spool.stats() == before
            return
        self.appended += 1
        dropped = self.spool.stats()["dropped"].get("spool_full", 0) - self.lost
        self.lost += dropped
        self.present.append((batch_id, events))
        # Files are dropped as wholes: the oldest ones of which no batch is held.
        left = {row.batch_id for file in self.spool._files for row in file.heads(1000)}
        gone = [item for item in self.present if item[0] not in left]
        assert sum(events for _, events in gone) == dropped
        assert not self.held.intersection(batch_id for batch_id, _ in gone)
        self.present = [item for item in self.present if item[0] in left]
        assert batch_id in left
        if gone and not self.held:
            assert all(int(old[2:]) < int(kept[2:]) for old, _ in gone for kept, _ in self.present)

    @rule(count=st.integers(1, 3))
    def oldest(self, count):
        """Read some batches; they are held from now on."""
        batches = self.spool.oldest(count)
        assert [(batch_id, len(batch)) for batch_id, batch in batches] == self.present[:count]
        self.held.update(batch_id for batch_id, _ in batches)

    @precondition(lambda self: self.present)
    @rule()
    def done(self):
        """Remove the first batch."""
        batch_id, _ = self.present.pop(0)
        self.held.discard(batch_id)
        self.spool.done(batch_id)

    @invariant()
    def counters_add_up(self):
        """Every lost event is counted, and the file keeps to its quota."""
        assert self.spool.stats()["events"] == sum(events for _, events in self.present)
        assert sum(path.stat().st_size for path in self.directory.glob("*.spool")) <= 1 << 20

    def teardown(self):
        """Close the spool and delete its directory."""
        self.spool.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.directory)


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFullSpoolMachine = FullSpoolMachine.TestCase
TestFullSpoolMachine.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)

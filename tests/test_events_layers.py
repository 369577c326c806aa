"""Which file of the event layer may import which; the files around it are test_registry_choice's."""

from __future__ import annotations

from pathlib import Path

from test_registry_choice import imports_of

import bgtasks.events

PACKAGE = Path(bgtasks.events.__file__).parent
# Each layer imports only from layers before it.
LAYERS = [
    {"_guard", "_line_file", "_process", "_spool_file", "_thread", "errors", "info", "model"},
    {"_ring", "_ring_py", "_spool_folder", "encoding"},
    {"ring", "spool"},
    {"_dead_letters", "_drops", "_waker"},
    {"_delivery"},
    {"_store", "_writers"},
    {"_flusher"},
    {"publisher"},
    {"workers"},
    {"publish"},
    {"__init__"},
]


def test_a_file_of_events_imports_only_from_layers_below():
    """What ARCHITECTURE.md says of events holds; sinks know the publisher and what is below, and no one knows them."""
    seen = set()
    for number, layer in enumerate(LAYERS):
        below = set().union(*LAYERS[:number])
        for name in layer:
            path = PACKAGE / f"{name}.py"
            if path.exists():
                seen.add(name)
                names = {name.removeprefix("events.") for name in imports_of(path) if name.startswith("events.")}
                assert names <= below, name
    assert seen == {path.stem for path in PACKAGE.glob("*.py")}

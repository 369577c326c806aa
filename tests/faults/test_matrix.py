"""The short form of the matrix fault x sink; ``scripts/test_faults`` runs the whole."""

import pytest
from harness.matrix import SHORT, NotAllowedError, run_row
from harness.targets import TARGETS
from requirements import need
from server_fixtures import need_server

for package in ("msgspec", "redis", "nats", "aio_pika"):
    need(package)


@pytest.mark.parametrize(("sink", "fault"), SHORT)
def test_row(tmp_path, sink, fault):
    """Nothing is lost uncounted, nothing is stored twice by a sink that knows ids, and the counters add up."""
    if (server := TARGETS[sink].server) is not None:
        need_server(server)
    try:
        verdict = run_row(tmp_path, sink, fault)
    except NotAllowedError as skipped:
        pytest.skip(str(skipped))
    assert (verdict.lost, verdict.wrong) == (0, []), verdict
    assert not (verdict.doubled and TARGETS[sink].knows_ids), verdict
    assert verdict.accepted, verdict

"""A schedule in two processes, of which a lock in a real Redis lets one in."""

from __future__ import annotations

from pathlib import Path

import pytest
from child import child
from requirements import need

need("redis")

from redis import Redis  # noqa: E402

PROGRAM = """
from redis.asyncio import Redis

async def main():
    redis = Redis.from_url(sys.argv[2])

    async def only_one():
        return bool(await redis.set("locks:report", "1", nx=True, px=int(sys.argv[3])))

    async def report():
        say("report", await redis.incr("reports"))

    async with BackgroundTaskManager() as manager:
        schedule = manager.every(0.02, report, lock=only_one)
        while schedule.locked_out < 4:
            await asyncio.sleep(0.005)
        say("ticked")
        await told()
        schedule.cancel()
    say("locked out", schedule.locked_out)
    await redis.aclose()

with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
"""


@pytest.fixture
def folders(tmp_path):
    """Return a folder for each of two programs."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    return folders


def test_one_process_runs_it(folders: list[Path], redis_server, twin):
    """While the key has not expired, all other ticks of both processes do nothing."""
    with Redis.from_url(redis_server.url) as redis:
        redis.flushdb()
        arguments = ("asyncio", redis_server.url, "60000")
        with child(folders[0], PROGRAM, twin, *arguments) as one, child(folders[1], PROGRAM, twin, *arguments) as two:
            for each in (one, two):
                each.wait_for("ticked")
            for each in (one, two):
                each.tell()
            assert (one.end(), two.end()) == (0, 0)
        assert redis.get("reports") == b"1"
    assert [line for line in one.lines + two.lines if line.startswith("report")] == ["report 1"]
    locked_out = [int(line.split()[-1]) for line in one.lines + two.lines if line.startswith("locked out")]
    assert len(locked_out) == 2
    assert all(count >= 4 for count in locked_out)


def test_the_other_process_goes_on_when_the_first_is_killed(folders: list[Path], redis_server, twin):
    """The key expires: nobody has to give it back."""
    with Redis.from_url(redis_server.url) as redis:
        redis.flushdb()
        arguments = ("asyncio", redis_server.url, "300")
        with child(folders[0], PROGRAM, twin, *arguments) as one:
            one.wait_for("report 1")
            one.process.kill()
            one.end()
        before = int(redis.get("reports"))
        with child(folders[1], PROGRAM, twin, *arguments) as two:
            two.wait_for(f"report {before + 1}")
            two.tell()
            assert two.end() == 0

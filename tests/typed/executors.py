"""What a type checker is to accept and to refuse of the executors; read by mypy, never run."""

import asyncio
import concurrent.futures
from typing import assert_type

from bgtasks import AsyncBackgroundExecutor, BackgroundExecutor


def area(width: int, *, height: int = 1) -> float:
    """Return a float."""
    return float(width * height)


async def fetch(url: str) -> bytes:
    """Return bytes."""
    return url.encode()


def functions() -> None:
    """Read only."""
    with BackgroundExecutor({"max_concurrency": 2, "tags": []}) as submit:
        assert_type(submit(area, 1), concurrent.futures.Future[float])
        assert_type(submit(area, 1, height=2, __name__="n", __timeout__=1), concurrent.futures.Future[float])
        assert_type(submit(area, 1, __next_tick__=True, __cancel_on_exit__=True), concurrent.futures.Future[float])
        submit(area, "1")  # type: ignore[call-overload]
        submit(area)  # type: ignore[call-overload]
        submit(area, 1, height="2")  # type: ignore[arg-type]
        submit(area, 1, __name__=5)  # type: ignore[call-arg]
        submit(area, 1, __nmae__="n")  # type: ignore[call-arg]


async def coroutines() -> None:
    """Read only."""
    async with AsyncBackgroundExecutor(max_concurrency=2) as submit:
        assert_type(submit(fetch, "a"), asyncio.Task[bytes])
        assert_type(submit(fetch, "a", __reraise_on_exit__=False), asyncio.Task[bytes])
        assert_type(await submit(fetch, "a"), bytes)
        submit(fetch, 1)  # type: ignore[call-overload]
        submit(area, 1)  # type: ignore[call-overload]

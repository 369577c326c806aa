"""Events into Redis: a stream, a channel or a list; one scripted command a batch, written once however often sent."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, get_args

from bgtasks.errors import InvalidOptionError, missing_extra
from bgtasks.events.errors import Retry, SinkError
from bgtasks.events.publisher import BasePublisher
from bgtasks.events.sinks._inherited import keep_inherited
from bgtasks.events.sinks._options import check_seconds, longest_retry

__all__ = ["Mode", "RedisPublisher"]

Mode = Literal["stream", "pubsub", "list"]

# The id of a batch is noted after its events are written, not before: if the first of them is refused (the key holds
# another type, say), nothing is noted and the next try writes. A script runs alone, so nobody sees the middle of it.
_FRAME: Final = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local call, key, count = redis.call, KEYS[1], #ARGV
%s
redis.call('SET', KEYS[2], '', 'EX', ARGV[1])
return count - 3
"""
# ARGV holds the seconds to remember the id for, the longest length or '', the name of the field, and the events.
_SCRIPTS: Final[dict[Mode, str]] = {
    "stream": _FRAME
    % """
local field = ARGV[3]
for i = 4, count do call('XADD', key, '*', field, ARGV[i]) end
if ARGV[2] ~= '' then call('XTRIM', key, 'MAXLEN', '~', ARGV[2]) end
""",
    "pubsub": _FRAME % "for i = 4, count do call('PUBLISH', key, ARGV[i]) end",
    # Lua's stack holds some thousand values.
    "list": _FRAME
    % """
for i = 4, count, 1000 do call('RPUSH', key, unpack(ARGV, i, math.min(i + 999, count))) end
if ARGV[2] ~= '' then call('LTRIM', key, -ARGV[2], -1) end
""",
}


class RedisPublisher(BasePublisher):
    """Publishes into Redis: the entries of a stream, the messages of a channel, or the elements of a list.

    A batch is one command, ``EVALSHA``, which Redis runs as a whole. The script notes the id of the batch in a key
    beside the target, so a batch that is sent again because its answer was lost is not written again. Where scripts
    are not allowed, a transaction does the same, more slowly.

    Args:
        url: ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` for TLS, ``unix://`` for a socket.
        key: the name of the stream, the channel or the list.
        mode: ``"stream"`` (``XADD``), ``"pubsub"`` (``PUBLISH``: who does not listen now never sees it), or ``"list"``
            (``RPUSH``).
        field: the name of the only field of a stream's entries; its value is the encoded event.
        maxlen: how many entries or elements Redis keeps, in a stream approximately; older ones go, **read or not**.
            None keeps all of them until Redis has no memory left. About 250 bytes of memory an event of 226 bytes.
        remember_for: seconds for which Redis knows the ids of batches, about 180 bytes of memory each. It has to
            exceed the longest time between two tries of one batch. None for twice ``retry_for``; with a spool, which
            may try again after a restart, an hour at least.
        timeout: seconds without an answer after which a connection is given up and the batch sent on a new one.
        client_factory: returns a ``redis.asyncio`` client to use instead of ``url``, for Sentinel or a Cluster. It is
            called at the start and after a fork, and must return a new client with retries off.
        **options: those of ``BasePublisher``.

    Raises:
        InvalidOptionError: an option is outside its values.
        MissingExtraError: redis-py is not installed.

    Example:
        >>> publisher = RedisPublisher("redis://localhost:6379/0", key="orders")
        >>> publisher.emit({"event": "order_paid", "order": 42})
        True
        >>> await publisher.close()

    """

    # On one connection, whose answers come in order.
    max_inflight = 1

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        key: str = "bgtasks:events",
        mode: Mode = "stream",
        field: str = "data",
        maxlen: int | None = 1_000_000,
        remember_for: float | None = None,
        timeout: float = 5.0,
        client_factory: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        try:
            import redis.asyncio
        except ModuleNotFoundError as error:
            raise missing_extra("redis", "redis-py", "publish into Redis") from error
        if mode not in get_args(Mode):
            raise InvalidOptionError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if maxlen is not None and maxlen < 1:
            raise InvalidOptionError(f"maxlen must be a positive number, or None for no bound, got {maxlen!r}")
        if "}" in key and _tagged(key) != key:
            raise InvalidOptionError(f"key must have no closing brace but that of a hash tag, got {key!r}")
        if remember_for is not None:
            check_seconds("remember_for", remember_for)
        check_seconds("timeout", timeout)
        super().__init__(**options)
        self._target = key
        self._mode: Mode = mode
        self._field = field
        self._maxlen = "" if maxlen is None else str(maxlen)
        self._remember_for = str(math.ceil(remember_for or longest_retry(options)))
        self._script = _SCRIPTS[mode]
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._is_scripted = True
        self._errors = redis.exceptions
        self._pack = _packer()
        if client_factory is None:
            kwargs = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "health_check_interval": 0}
            client_factory, self._server = _from_url(url, kwargs)
        else:
            self._server = "Redis"
        self._make_client = client_factory
        self._client: Any = None

    async def open(self) -> None:
        """Make a client and have it connect."""
        keep_inherited(self._client)
        self._client = self._make_client()
        try:
            with self._named_errors(), contextlib.suppress(self._errors.NoPermissionError):
                await self._client.ping()
        except BaseException:
            await self.release()
            raise

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch, unless a batch of that id was written before."""
        keys = (self._target, f"{_tagged(self._target)}:b:{batch_id}")
        with self._named_errors():
            if self._is_scripted:
                await self._run_script(keys, batch)
            else:
                await self._run_transaction(keys, batch)

    async def release(self) -> None:
        """Close the client, without waiting for a server that does not read any more."""
        client, self._client = self._client, None
        if client is None:
            return
        # Of a call that was cancelled the answer may still come: whoever asks next would take it for its own.
        connection = getattr(client, "connection", None)
        if connection is not None:
            await connection.disconnect(nowait=True)
        await client.aclose()

    async def _run_script(self, keys: tuple[str, str], batch: Sequence[bytes]) -> None:
        arguments = (2, *keys, self._remember_for, self._maxlen, self._field, *batch)
        try:
            try:
                await self._ask("EVALSHA", self._digest, *arguments)
            except self._errors.NoScriptError:
                await self._ask("EVAL", self._script, *arguments)
        except self._errors.ResponseError as error:
            if not _forbids_scripts(error):
                raise
            self._is_scripted = False
            await self._run_transaction(keys, batch)

    async def _ask(self, *command: Any) -> None:
        """Send a command and wait for its answer, past redis-py's own packing where hiredis can do it.

        Packing takes a millisecond of the loop for 500 events there, and a quarter of one here.
        """
        client = self._client
        connection = getattr(client, "connection", None)
        if connection is None or self._pack is None:
            await client.execute_command(*command)
        else:
            await connection.send_packed_command(self._pack(command))
            await connection.read_response()

    async def _run_transaction(self, keys: tuple[str, str], batch: Sequence[bytes]) -> None:
        """Do what the script does where scripts are not allowed.

        ``WATCH`` makes it safe: an earlier try that the server still has in a buffer changes the watched key. Unlike a
        script, a transaction goes on after a command that fails, and would note what was not written: hence a question
        first that fails in the same way where the key holds another type.
        """
        key, noted = keys
        async with self._client.pipeline(transaction=True) as pipeline:
            await pipeline.watch(noted)
            if await pipeline.exists(noted):
                return
            if self._mode == "stream":
                await pipeline.xlen(key)
            elif self._mode == "list":
                await pipeline.llen(key)
            pipeline.multi()
            self._append(pipeline, key, batch)
            pipeline.set(noted, b"", ex=int(self._remember_for))
            await pipeline.execute()

    def _append(self, pipeline: Any, key: str, batch: Sequence[bytes]) -> None:
        if self._mode == "list":
            pipeline.rpush(key, *batch)
            if self._maxlen:
                pipeline.ltrim(key, -int(self._maxlen), -1)
        elif self._mode == "pubsub":
            for event in batch:
                pipeline.publish(key, event)
        else:
            for event in batch:
                pipeline.xadd(key, {self._field: event})
            if self._maxlen:
                pipeline.xtrim(key, maxlen=int(self._maxlen), approximate=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say whose error it is: "invalid password" alone helps nobody who has three servers."""
        errors = self._errors
        try:
            yield
        except errors.RedisError as error:
            reason = f"{self._server}: {error}"
            if isinstance(error, errors.ResponseError) and not isinstance(error, errors.ReadOnlyError):
                raise Retry(reason=reason) from error
            # A server that became a replica is left, too: its address may lead to the new primary.
            raise SinkError(reason) from error


def _packer() -> Callable[[tuple[Any, ...]], bytes] | None:
    try:
        import hiredis
    except ModuleNotFoundError:
        return None
    pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command
    return pack


def _from_url(url: str, kwargs: dict[str, Any]) -> tuple[Callable[[], Any], str]:
    """Return what makes a client for a URL, and how to call the server in messages.

    Raises:
        InvalidOptionError: redis-py does not understand the URL.

    """
    import redis.asyncio
    from redis.asyncio.retry import Retry as ClientRetry
    from redis.backoff import NoBackoff

    def make_client() -> Any:
        # One connection, and no second try by the client: it would not know that the first had been written.
        once = ClientRetry(NoBackoff(), 0)
        return redis.asyncio.Redis.from_url(url, single_connection_client=True, retry=once, **kwargs)

    try:
        address = redis.asyncio.ConnectionPool.from_url(url).connection_kwargs
    except ValueError as error:
        raise InvalidOptionError(f"url: {error}; for example redis://localhost:6379/0") from error
    place = address.get("path") or f"{address.get('host', 'localhost')}:{address.get('port', 6379)}"
    return make_client, f"Redis at {place}"


def _tagged(key: str) -> str:
    """Return the beginning of a key in the same slot of a Cluster: the part in braces decides, where there is one."""
    opening = key.find("{")
    has_tag = opening >= 0 and key.find("}", opening + 1) > opening + 1
    return key if has_tag else f"{{{key}}}"


def _forbids_scripts(error: Exception) -> bool:
    """Tell whether an answer means that scripts are renamed away, or not allowed to this user."""
    text = str(error).lower()
    return "eval" in text and ("unknown command" in text or "no permissions to run" in text)

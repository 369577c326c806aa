"""A sink for Redis: a stream, a channel or a list; one script per batch, which writes a batch once if sent twice."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from bgtasks._checks import check_choice, check_limit, check_optional_seconds, check_seconds
from bgtasks.errors import InvalidOptionError, describe, missing_extra
from bgtasks.events.errors import Retry, SinkError
from bgtasks.events.sink import Sink
from bgtasks.events.sinks._inherited import keep_inherited

__all__ = ["Mode", "RedisSink"]

Mode: TypeAlias = Literal["stream", "pubsub", "list"]

# The id of a batch is noted after its events are written, not before: if the first event is refused (the key holds
# another type, for example), no id is noted and the next try writes. Redis runs one script at a time, so no client sees
# a part of its effects.
_FRAME: Final = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local call, key, count = redis.call, KEYS[1], #ARGV
%s
redis.call('SET', KEYS[2], '', 'EX', ARGV[1])
return count - 3
"""
# ARGV holds the seconds to remember the id, the maximum length or '', the name of the field, and the events.
_SCRIPTS: Final[dict[Mode, str]] = {
    "stream": _FRAME
    % """
local field = ARGV[3]
for i = 4, count do call('XADD', key, '*', field, ARGV[i]) end
if ARGV[2] ~= '' then call('XTRIM', key, 'MAXLEN', '~', ARGV[2]) end
""",
    "pubsub": _FRAME % "for i = 4, count do call('PUBLISH', key, ARGV[i]) end",
    # Lua's stack holds a few thousand values.
    "list": _FRAME
    % """
for i = 4, count, 1000 do call('RPUSH', key, unpack(ARGV, i, math.min(i + 999, count))) end
if ARGV[2] ~= '' then call('LTRIM', key, -ARGV[2], -1) end
""",
}


class RedisSink(Sink):
    """Writes to Redis: entries of a stream, messages of a channel, or elements of a list.

    A batch is one command, ``EVALSHA``, which Redis runs as a whole. The script notes the id of the batch in a key
    beside the target, so a batch that is sent again because its answer was lost is not written again. If scripts are
    not allowed, a transaction does the same, more slowly.

    Args:
        url: ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` for TLS, ``unix://`` for a socket.
        key: the name of the stream, the channel or the list.
        mode: ``"stream"`` (``XADD``), ``"pubsub"`` (``PUBLISH``: later subscribers never see it), or
            ``"list"`` (``RPUSH``).
        field: the only field of a stream's entries; its value is the encoded event.
        maxlen: the number of entries or elements that Redis keeps, approximate in a stream; older ones are deleted,
            **read or not**. None keeps all until Redis has no memory left: about 250 bytes per event of 226 bytes.
        remember_for: seconds for which Redis remembers batch ids, in about 180 bytes of memory each. It must exceed
            the longest time between two tries of one batch. None for twice the publisher's ``retry_for``; with a
            spool, which may try again after a restart, for an hour at least.
        timeout: seconds without an answer after which the connection is closed and the batch sent on a new one.
        client_factory: returns a ``redis.asyncio`` client to use instead of ``url``, for Sentinel or a Cluster. It is
            called at the start and after a fork, and must return a new client that does not retry.

    Raises:
        InvalidOptionError: an option is outside its values.
        MissingExtraError: redis-py is not installed.

    Example:
        >>> publisher = Publisher(RedisSink("redis://localhost:6379/0", key="orders"))

    """

    # One connection, whose answers come in order.
    max_inflight: ClassVar[int | None] = 1

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
        client_factory: Callable[[], object] | None = None,
    ) -> None:
        try:
            import redis.asyncio
        except ModuleNotFoundError as error:
            raise missing_extra("redis", "redis-py", "publish into Redis") from error
        check_choice("mode", mode, get_args(Mode))
        check_limit("maxlen", maxlen)
        if "}" in key and _tagged(key) != key:
            raise InvalidOptionError(f"key must have no closing brace but that of a hash tag; got {describe(key)}")
        check_optional_seconds("remember_for", remember_for, none="for twice the publisher's retry_for")
        check_seconds("timeout", timeout, positive=True)
        self._target = key
        self._mode: Mode = mode
        self.is_durable: bool = mode != "pubsub"
        self._field = field
        self._maxlen = "" if maxlen is None else str(maxlen)
        self._remember_for = remember_for
        self._script = _SCRIPTS[mode]
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._is_scripted = True
        self._errors = redis.exceptions
        self._pack = _packer()
        if client_factory is None:
            kwargs: dict[str, object] = {
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
                "health_check_interval": 0,
            }
            client_factory, self._server = _from_url(url, kwargs)
        else:
            self._server = "Redis"
        self._make_client = client_factory
        self._client: Any = None

    async def open(self) -> None:
        """Make a client, and have it connect."""
        keep_inherited(self._client)
        self._client = self._make_client()
        try:
            with self._named_errors(), contextlib.suppress(self._errors.NoPermissionError):
                await self._client.ping()
        except BaseException:
            await self.close()
            raise

    async def write(self, batch: Sequence[bytes], batch_id: str) -> None:
        """Write a batch, unless a batch of that id was written before."""
        keys = (self._target, f"{_tagged(self._target)}:b:{batch_id}")
        with self._named_errors():
            if self._is_scripted:
                await self._run_script(keys, batch)
            else:
                await self._run_transaction(keys, batch)

    async def close(self) -> None:
        """Close the client, without waiting for a server that no longer reads."""
        client, self._client = self._client, None
        if client is None:
            return
        # The answer to a call that was cancelled may still come: the next call would take it for its own.
        connection = getattr(client, "connection", None)
        if connection is not None:
            await connection.disconnect(nowait=True)
        await client.aclose()
        await _close_nodes(client)

    def _seconds_remembered(self) -> int:
        return math.ceil(self.retry_window if self._remember_for is None else self._remember_for)

    async def _run_script(self, keys: tuple[str, str], batch: Sequence[bytes]) -> None:
        arguments = (2, *keys, self._seconds_remembered(), self._maxlen, self._field, *batch)
        try:
            try:
                await self._ask("EVALSHA", self._digest, *arguments)
            except self._errors.NoScriptError:
                await self._ask("EVAL", self._script, *arguments)
        except self._errors.ResponseError as error:
            if not _forbids_scripts(error):
                raise
            try:
                await self._run_transaction(keys, batch)
            except self._errors.NoPermissionError as other:
                raise self._errors.NoPermissionError(
                    f"this user may run neither scripts nor the transaction in their place: {error}; {other}. Grant "
                    "+evalsha +eval and the commands that the documentation of RedisSink names"
                ) from other
            self._is_scripted = False

    async def _ask(self, *command: Any) -> None:
        """Send a command, packed by hiredis if it is installed, and wait for its answer.

        redis-py takes a millisecond of the loop to pack 500 events, hiredis a quarter of one.
        """
        client = self._client
        connection = getattr(client, "connection", None)
        if connection is None or self._pack is None:
            await client.execute_command(*command)
        else:
            await connection.send_packed_command(self._pack(command))
            await connection.read_response()

    async def _run_transaction(self, keys: tuple[str, str], batch: Sequence[bytes]) -> None:
        """Write a batch as the script does, if scripts are not allowed.

        ``WATCH`` makes it safe: an earlier try that the server still has in a buffer changes the watched key. Unlike a
        script, a transaction goes on after a failed command, and would note the id of a batch that was not written. So
        a query comes first, which fails in the same way if the key holds another type.
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
            pipeline.set(noted, b"", ex=self._seconds_remembered())
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
        """Put the server's name into the error: "invalid password" alone does not say which server refused it."""
        errors = self._errors
        try:
            yield
        except errors.RedisError as error:
            reason = f"{self._server}: {error}"
            if _wants_password(error):
                reason = (
                    f"{self._server}: it demands a password; put it into the URL, redis://:PASSWORD@HOST or "
                    "redis://USER:PASSWORD@HOST"
                )
            if isinstance(error, errors.ResponseError) and not isinstance(error, errors.ReadOnlyError):
                raise Retry(reason=reason) from error
            # Also if the server became a replica: a new connection to its address may lead to the new primary.
            raise SinkError(reason) from error


async def _close_nodes(client: Any) -> None:
    """Close what a client of Sentinel or a Cluster leaves open, such as the connections to the Sentinels.

    redis-py closes the nodes of a Cluster only if no command has failed since it asked for them.
    """
    sentinels = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    for sentinel in getattr(sentinels, "sentinels", ()):
        await sentinel.aclose()
    nodes = getattr(client, "nodes_manager", None)
    if nodes is not None:
        await nodes.aclose()
        await nodes.aclose("startup_nodes")


def _packer() -> Callable[[tuple[Any, ...]], bytes] | None:
    try:
        import hiredis
    except ModuleNotFoundError:
        return None
    pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command
    return pack


def _from_url(url: str, kwargs: dict[str, object]) -> tuple[Callable[[], object], str]:
    """Return a factory of clients for a URL, and the server's name for messages.

    Raises:
        InvalidOptionError: redis-py does not understand the URL.

    """
    import redis.asyncio
    from redis.asyncio.retry import Retry as ClientRetry
    from redis.backoff import NoBackoff

    driver = {} if {"driver_info", "lib_name", "lib_version"} & kwargs.keys() else _driver()

    def make_client() -> object:
        # One connection, and no retries by the client, which cannot know whether the first try was written.
        once = ClientRetry(NoBackoff(), 0)
        return redis.asyncio.Redis.from_url(url, single_connection_client=True, retry=once, **driver, **kwargs)

    if not url.startswith(("redis://", "rediss://", "unix://")):
        # redis-py takes "redis:/x" for the server on this machine.
        raise InvalidOptionError(
            "url must begin with redis://, rediss:// or unix://, for example redis://localhost:6379/0; "
            f"got {_shown(url)}"
        )
    try:
        address = redis.asyncio.ConnectionPool.from_url(url).connection_kwargs
    except ValueError as error:
        raise InvalidOptionError(f"url: {error}; for example redis://localhost:6379/0") from error
    place = address.get("path") or f"{address.get('host', 'localhost')}:{address.get('port', 6379)}"
    return make_client, f"Redis at {place}"


def _driver() -> dict[str, object]:
    """Return what a client says of itself to the server, made once: redis-py looks into its metadata for each client.

    That is a third of a millisecond, at every try of every publisher while a server is down.
    """
    try:
        from redis.driver_info import DriverInfo
    except ModuleNotFoundError:
        # An older redis-py, in which it is a constant.
        return {}
    return {"driver_info": DriverInfo()}


def _shown(url: str) -> str:
    """Return a URL for a message, without a user and a password."""
    return describe(url.rpartition("@")[2])


def _tagged(key: str) -> str:
    """Return a prefix for keys in the same hash slot of a Cluster, which a part in braces determines, if any."""
    opening = key.find("{")
    has_tag = opening >= 0 and key.find("}", opening + 1) > opening + 1
    return key if has_tag else f"{{{key}}}"


def _wants_password(error: Exception) -> bool:
    """Return whether an error means that no password was sent to a server that has one."""
    text = str(error)
    return "HELLO must be called with the client already authenticated" in text or "Authentication required" in text


def _forbids_scripts(error: Exception) -> bool:
    """Return whether an error means that the commands for scripts are renamed, or not allowed to this user."""
    text = str(error).lower()
    return "eval" in text and ("unknown command" in text or "no permissions to run" in text)

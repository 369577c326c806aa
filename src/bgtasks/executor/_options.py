"""What both executors check of what they are given, and the errors they refuse it with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from bgtasks import errors
from bgtasks.manager import BackgroundTaskManager

Failed = TypeVar("Failed")


def limit_of(config: Mapping[str, Any] | None, max_concurrency: int | None, zero_is_no_limit: bool) -> int | None:
    """Return how many functions may run at once; the keyword goes before the config, None is no limit given."""
    if config is not None and not isinstance(config, Mapping):
        raise errors.InvalidOptionError(
            f"config must be a mapping such as a RunnableConfig, or None; got {errors.describe(config)}"
        )
    if max_concurrency is None and config is not None:
        max_concurrency = config.get("max_concurrency")
    if max_concurrency is None or (zero_is_no_limit and max_concurrency == 0):
        return None
    if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
        raise errors.InvalidOptionError(
            "max_concurrency must be a whole number, 1 or more, or None for no limit of yours; "
            f"got {errors.describe(max_concurrency)}"
        )
    return max_concurrency


def manager_for(manager: BackgroundTaskManager | None) -> BackgroundTaskManager:
    """Return the manager given, or one of the executor's own."""
    if manager is None:
        return BackgroundTaskManager()
    if not hasattr(manager, "_report_failure"):
        raise errors.InvalidOptionError(
            f"manager must be a BackgroundTaskManager or None, got {errors.describe(manager)}"
        )
    return manager


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of ``submit`` that it does not have; what else is in there is the function's."""
    for name in options:
        if name.startswith("__") and name.endswith("__"):
            raise errors.InvalidOptionError(
                f"submit() has no option {name}; it has __name__, __cancel_on_exit__, __reraise_on_exit__, "
                "__next_tick__ and __timeout__"
            )


def check_timeout(timeout: float | None) -> None:
    """Refuse a timeout that is no positive number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or math.isnan(timeout) or timeout <= 0:
        raise errors.invalid_timeout(timeout)


def closed(executor: object, entered: bool) -> errors.ExecutorClosedError:
    """Return the error for work handed in outside the ``with`` block."""
    name = type(executor).__name__
    if entered:
        text = f"the 'with' block of this {name} has ended: submit inside the block, or open another executor"
    else:
        text = f"this {name} was not entered: open it with 'with' and call what that gives, not submit() itself"
    return errors.ExecutorClosedError(text)


def not_callable(value: object) -> errors.InvalidFunctionError:
    """Return the error for what cannot be called."""
    return errors.InvalidFunctionError(
        f"a function is needed, got {type(value).__name__}: {errors.describe(value)}; "
        "pass the function and its arguments, submit(function, 1, 2), not the result of a call"
    )


def async_generator(fn: object) -> errors.InvalidFunctionError:
    """Return the error for a function that gives an asynchronous generator, which neither executor runs."""
    return errors.InvalidFunctionError(
        f"{errors.describe(fn)} gives an asynchronous generator, which does nothing until somebody iterates over it: "
        "submit a coroutine function that does, to AsyncBackgroundExecutor"
    )


class Failures(dict[int, Failed]):
    """What failed and may be re-raised at the exit: the order of submission -> its future.

    Args:
        decides_late: keep every failure; else only the one submitted first, so that many of them cost no memory.

    """

    def __init__(self, decides_late: bool) -> None:
        super().__init__()
        self._decides_late = decides_late

    def keep(self, order: int, future: Failed) -> None:
        """Keep a failure if it may be the one to raise."""
        if self._decides_late or not self:
            self[order] = future
        elif order < (first := next(iter(self))):
            del self[first]
            self[order] = future

    def in_order(self) -> list[Failed]:
        """Return the futures in the order of their submission."""
        return [self[order] for order in sorted(self)]

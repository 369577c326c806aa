"""The executors of LangGraph and of bgtasks, for tests that both must pass."""

from __future__ import annotations

from typing import Any

import pytest
from twins import MODULES, manager_module

# The originals come first: they define the behaviour that the tests demand.
SIDES = ("original", *MODULES)


class Side:
    """Makes the executors of one side; those of bgtasks belong to a manager on one twin of the registry."""

    def __init__(self, name: str) -> None:
        from langgraph.pregel import _executor as originals

        from bgtasks.integrations import langgraph as replacements

        self.name = name
        self.is_ours = name != "original"
        self._classes: Any = replacements if self.is_ours else originals
        self._options = {"manager": manager_module(name).BackgroundTaskManager()} if self.is_ours else {}

    @property
    def manager(self) -> Any:
        """The manager of the executors of bgtasks."""
        return self._options["manager"]

    def threads(self, **config: Any) -> Any:
        """Return an executor of functions."""
        return self._classes.BackgroundExecutor(config, **self._options)

    def tasks(self, **config: Any) -> Any:
        """Return an executor of coroutines."""
        return self._classes.AsyncBackgroundExecutor(config, **self._options)


def sides_chosen(twins: list[str]) -> list[Any]:
    """Return the parameters of the fixture that gives tests a side."""
    return [pytest.param(name, id=name) for name in SIDES if name == "original" or name in twins]


def skip_set() -> Any:
    """Return the set of futures whose exceptions LangGraph ignores."""
    from langgraph.pregel._runner import SKIP_RERAISE_SET

    return SKIP_RERAISE_SET

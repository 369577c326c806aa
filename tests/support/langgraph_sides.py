"""LangGraph's executors and ours side by side, for tests of what both have to do."""

from __future__ import annotations

from typing import Any

import pytest
from twins import MODULES, manager_module

# The originals come first: what they do is what the tests say, and what ours have to do.
SIDES = ("original", *MODULES)


class Side:
    """Makes executors of one side; ours are kept by a manager on one twin of the registry."""

    def __init__(self, name: str) -> None:
        from langgraph.pregel import _executor as originals

        from bgtasks.integrations import langgraph as ours

        self.name = name
        self.is_ours = name != "original"
        self._classes: Any = ours if self.is_ours else originals
        self._options = {"manager": manager_module(name).BackgroundTaskManager()} if self.is_ours else {}

    @property
    def manager(self) -> Any:
        """The manager of our executors."""
        return self._options["manager"]

    def threads(self, **config: Any) -> Any:
        """Return an executor of functions."""
        return self._classes.BackgroundExecutor(config, **self._options)

    def tasks(self, **config: Any) -> Any:
        """Return an executor of coroutines."""
        return self._classes.AsyncBackgroundExecutor(config, **self._options)


def sides_chosen(twins: list[str]) -> list[Any]:
    """Return the parameters of the fixture that tests take a side from."""
    return [pytest.param(name, id=name) for name in SIDES if name == "original" or name in twins]


def skip_set() -> Any:
    """Return the set of futures whose exceptions LangGraph does not want to see again."""
    from langgraph.pregel._runner import SKIP_RERAISE_SET

    return SKIP_RERAISE_SET

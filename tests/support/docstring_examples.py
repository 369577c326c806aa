"""Runs the examples of one docstring of the package, as a program of its own.

::

    python tests/support/docstring_examples.py MODULE [NAME]

NAME is that of a class, a function or a method of MODULE. The examples have the names of their module, the public names
of the package, and stand-ins for parts of programs: see ``STAND_INS``.
"""

from __future__ import annotations

import asyncio
import doctest
import importlib
import inspect
import sys
from types import SimpleNamespace
from typing import Annotated, Any

import bgtasks
from bgtasks import events
from bgtasks.events.sinks import console, jsonl, kafka, memory, nats, otlp, publish, rabbitmq, redis, sqlite

SINKS = (console, jsonl, kafka, memory, nats, otlp, publish, rabbitmq, redis, sqlite)


async def fetch(address: str) -> str:
    """Stand in for a download."""
    await asyncio.sleep(0)
    return "<h1>Example Domain</h1>"


async def send(text: str) -> None:
    """Stand in for sending a message."""
    await asyncio.sleep(0)


async def send_receipt(goods: str) -> None:
    """Stand in for sending a message, and print it."""
    await asyncio.sleep(0)
    print("a receipt for", goods)


async def serve(manager: bgtasks.BackgroundTaskManager) -> None:
    """Stand in for a server."""
    manager.create_task(send("hello"), name="greeting")
    await asyncio.sleep(0)


class Client:
    """Stands in for a client of a web service, such as that of httpx."""

    async def post(self, url: str, *, content: bytes, headers: dict[str, str] | None = None) -> Any:
        """Accept a request."""
        assert content.startswith(b"{")
        return SimpleNamespace(status_code=200, headers={}, raise_for_status=lambda: None)

    async def aclose(self) -> None:
        """Disconnect."""


class Webhooks:
    """Stands in for a publisher of another package."""

    async def publish(self, event: Any) -> None:
        """Accept an event."""


STAND_INS = {
    "URL": "https://example.org/events",
    "client": Client(),
    "fetch": fetch,
    "httpx": SimpleNamespace(AsyncClient=Client),
    "send": send,
    "send_receipt": send_receipt,
    "serve": serve,
    "webhooks": Webhooks(),
}


def langgraph_names() -> dict[str, Any]:
    """Return a graph of LangGraph whose two nodes run in one step."""
    from langgraph.graph import END, START, StateGraph

    builder = StateGraph(dict)
    for name in ("ask", "search"):
        builder.add_node(name, lambda state: None)
        builder.add_edge(START, name)
        builder.add_edge(name, END)
    return {"graph": builder.compile()}


def agentflow_names() -> dict[str, Any]:
    """Return what a program with a graph of agentflow imports."""
    from agentflow.core import StateGraph

    from bgtasks.integrations import agentflow

    return {"StateGraph": StateGraph, "agentflow": agentflow}


def web_names() -> dict[str, Any]:
    """Return what a program with FastAPI or Starlette imports."""
    from fastapi import Depends, FastAPI
    from starlette.responses import PlainTextResponse

    from bgtasks.integrations import starlette

    names = {name: getattr(starlette, name) for name in starlette.__all__}
    return {
        **names,
        "Annotated": Annotated,
        "Depends": Depends,
        "PlainTextResponse": PlainTextResponse,
        "app": FastAPI(),
        "routes": [],
    }


NAMES_OF_FRAMEWORKS = {
    "bgtasks.integrations._starlette_background": web_names,
    "bgtasks.integrations.starlette": web_names,
    "bgtasks.integrations.agentflow": agentflow_names,
    "bgtasks.integrations.langgraph": langgraph_names,
}


def public_names() -> dict[str, Any]:
    """Return what a program imports from the package."""
    names: dict[str, Any] = {"asyncio": asyncio, "bgtasks": bgtasks}
    for module in (bgtasks, events, *SINKS):
        names.update((name, getattr(module, name)) for name in module.__all__)
    return names


def main() -> None:
    """Run the examples; exit with 1 if the output of one differs, or if one raises."""
    module_name, _, name = " ".join(sys.argv[1:]).partition(" ")
    module = importlib.import_module(module_name)
    documented: Any = module
    for part in filter(None, name.split(".")):
        documented = getattr(documented, part)
    names = public_names() | STAND_INS | vars(module)
    names.update(NAMES_OF_FRAMEWORKS.get(module_name, dict)())
    examples = doctest.DocTestParser().get_doctest(
        inspect.getdoc(documented) or "", names, name or module_name, module.__file__, 0
    )
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(examples)
    if runner.tries == 0:
        sys.exit(f"{module_name} {name} has no examples")
    sys.exit(1 if runner.failures else 0)


if __name__ == "__main__":
    main()

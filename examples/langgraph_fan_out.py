"""Measures the modules of a package with a LangGraph graph that runs on bgtasks: no model, plain functions as nodes.

::

    python examples/langgraph_fan_out.py                     # the package asyncio, coroutines as nodes
    python examples/langgraph_fan_out.py --sync json         # functions in threads
    python examples/langgraph_fan_out.py --answer no email   # stop where the graph asks

    find --> measure (one branch per module) -> ask --> report
                                                `----> end, if the answer is no

The graph finds the modules, measures each in a branch of its own, up to ``--max-concurrency`` of them at once, and then
interrupts itself to ask whether to go on. Its state waits in a checkpointer; the answer resumes it. What the nodes
write is streamed as they run. At the end the manager shows what ran: a task for each node, under its name.

Exit status: 0 with a report, 1 without one, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib.util
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from bgtasks import IMPLEMENTATION, BackgroundTaskManager
from bgtasks.integrations import langgraph as drop_in


class Measure(TypedDict):
    """What is known of one module: a plain dict, since a checkpoint holds no classes of the program."""

    name: str
    lines: int
    definitions: int


class State(TypedDict, total=False):
    """What the nodes read and write; the branches add to ``measures``."""

    package: str
    modules: list[str]
    measures: Annotated[list[Measure], operator.add]
    wanted: bool
    report: str


class Branch(TypedDict):
    """The input of one branch."""

    module: str


def directory_of(package: str) -> Path:
    """Return the directory of a package; raise an error if there is no such package."""
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise argparse.ArgumentTypeError(f"{package} is no package of this Python")
    return Path(next(iter(spec.submodule_search_locations)))


def measure(path: Path) -> Measure:
    """Count the lines and the definitions of a module."""
    text = path.read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    definitions = sum(isinstance(node, kinds) for node in ast.walk(ast.parse(text)))
    return Measure(name=path.name, lines=len(text.splitlines()), definitions=definitions)


def find(state: State) -> State:
    """Find the modules."""
    return {"modules": sorted(map(str, directory_of(state["package"]).glob("*.py")))}


def fan_out(state: State) -> list[Send]:
    """Start one branch per module."""
    return [Send("measure", Branch(module=module)) for module in state["modules"]]


def measure_in_thread(branch: Branch) -> State:
    """Measure one module; the executor's thread does the work."""
    measured = measure(Path(branch["module"]))
    get_stream_writer()(measured["name"])
    return {"measures": [measured]}


async def measure_in_task(branch: Branch) -> State:
    """Measure one module in a thread, so that the loop stays free."""
    measured = await asyncio.to_thread(measure, Path(branch["module"]))
    get_stream_writer()(measured["name"])
    return {"measures": [measured]}


def ask(state: State) -> State:
    """Interrupt the graph; it resumes here with the answer."""
    return {"wanted": interrupt(f"{len(state['measures'])} modules were measured. Write the report?") == "yes"}


def go_on(state: State) -> str:
    """Choose the next node by the answer."""
    return "report" if state["wanted"] else END


def report(state: State) -> State:
    """Write the report: the longest modules first."""
    measures = sorted(state["measures"], key=lambda measured: (-measured["lines"], measured["name"]))
    rows = [f"{row['lines']:7,} {row['definitions']:5,}  {row['name']}" for row in measures[:5]]
    lines, definitions = (sum(row[key] for row in measures) for key in ("lines", "definitions"))
    total = f"{lines:7,} {definitions:5,}  in {len(measures)} modules"
    return {"report": "\n".join(["  lines  defs  module", *rows, total])}


def build(in_threads: bool) -> Any:
    """Return the graph, with the one node that differs between threads and tasks."""
    measure_one: Any = measure_in_thread if in_threads else measure_in_task
    builder = StateGraph(State)
    builder.add_node("find", find)
    builder.add_node("measure", measure_one)
    builder.add_node("ask", ask)
    builder.add_node("report", report)
    builder.add_edge(START, "find")
    builder.add_conditional_edges("find", fan_out, ["measure"])
    builder.add_edge("measure", "ask")
    builder.add_conditional_edges("ask", go_on, ["report", END])
    builder.add_edge("report", END)
    return builder.compile(checkpointer=InMemorySaver())


class Progress:
    """Prints what a run streams, and remembers whether it stopped to ask."""

    def __init__(self) -> None:
        self.question: str | None = None
        self.measured = 0

    def show(self, mode: str, chunk: Any) -> None:
        """Print one chunk of the stream."""
        if mode == "custom":
            self.measured += 1
            print(f"measured {chunk}")
        elif "__interrupt__" in chunk:
            self.question = chunk["__interrupt__"][0].value


def run_in_threads(graph: Any, first: State, answer: str, config: dict[str, Any]) -> tuple[Progress, State]:
    """Run the graph up to its question, answer it, and run it to its end, all from this thread."""
    progress = Progress()
    inputs: tuple[Any, ...] = (first, Command(resume=answer))
    for given in inputs:
        for mode, chunk in graph.stream(given, config, stream_mode=["custom", "updates"]):
            progress.show(mode, chunk)
    state: State = graph.get_state(config).values
    return progress, state


async def run_in_tasks(graph: Any, first: State, answer: str, config: dict[str, Any]) -> tuple[Progress, State]:
    """Do the same on the running loop."""
    progress = Progress()
    inputs: tuple[Any, ...] = (first, Command(resume=answer))
    for given in inputs:
        async for mode, chunk in graph.astream(given, config, stream_mode=["custom", "updates"]):
            progress.show(mode, chunk)
    state: State = (await graph.aget_state(config)).values
    return progress, state


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description="Measure the modules of a package with a graph on bgtasks.")
    parser.add_argument("package", nargs="?", default="asyncio", help="a package of this Python (asyncio)")
    parser.add_argument("--sync", action="store_true", help="functions in threads instead of coroutines in tasks")
    parser.add_argument("--max-concurrency", type=int, default=4, metavar="N", help="branches at once, 0 for all (4)")
    parser.add_argument("--answer", choices=["yes", "no"], default="yes", help="the answer to the graph (yes)")
    parsed = parser.parse_args(arguments)
    try:
        directory_of(parsed.package)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if parsed.max_concurrency < 0:
        parser.error("--max-concurrency must be 0 or more")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the graph and print its result."""
    options = parse_arguments(arguments)
    manager = BackgroundTaskManager()
    drop_in.install(manager=manager)
    graph = build(options.sync)
    first: State = {"package": options.package}
    config = {"configurable": {"thread_id": "1"}, "max_concurrency": options.max_concurrency}
    if options.sync:
        progress, state = run_in_threads(graph, first, options.answer, config)
    else:
        progress, state = asyncio.run(run_in_tasks(graph, first, options.answer, config))
    drop_in.uninstall()

    print(f"{progress.question} {options.answer}")
    print(state.get("report", "no report"))
    stats = manager.stats()
    print(f"\nran on {'threads' if options.sync else 'tasks'}, bgtasks ({IMPLEMENTATION})")
    for name, counters in sorted(stats["names"].items()):
        print(f"{counters['started']:7,} x {name}")
    return 0 if "report" in state else 1


if __name__ == "__main__":
    sys.exit(main())

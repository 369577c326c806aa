"""The twins hold the same names, signatures, docstrings and refusals."""

import asyncio
import inspect

import pytest
from loops import VirtualLoop
from twins import manager_module


@pytest.fixture(scope="module")
def twins():
    """Give both registries."""
    import bgtasks._registry

    import bgtasks._registry_py

    return bgtasks._registry, bgtasks._registry_py


def public_members(kind):
    """Return what a class itself defines and Python code of others may use: name -> member."""
    members = {}
    for name, member in vars(kind).items():
        if name.startswith("__") and name.endswith("__"):
            continue
        if inspect.isroutine(member) or isinstance(member, property) or inspect.isgetsetdescriptor(member):
            members[name] = member
    return members


# What makes a record of the compiled twin a coroutine; the other's tasks step a native one.
STEPPED = {"Registry": set(), "Record": {"send", "throw", "close"}}

# Functions in C of the compiled twin, methods of the other: nobody else calls them.
INTERNAL = {
    "Registry": {"must_ask", "records_here", "records_of"},
    "Record": {"report", "release"},
}


@pytest.mark.parametrize("kind", ["Registry", "Record"])
def test_the_same_methods_with_the_same_signatures_and_docstrings(twins, kind):
    """What the manager builds on is the same in both, word for word."""
    first, second = (public_members(getattr(twin, kind)) for twin in twins)
    for internal in INTERNAL[kind]:
        second.pop(internal)
    for step in STEPPED[kind]:
        first.pop(step)
    slots = {name for name, member in vars(getattr(twins[1], kind)).items() if inspect.ismemberdescriptor(member)}
    # Attributes of the compiled class that Python sees, the twin sets on its instances.
    attributes = {name for name, member in first.items() if inspect.isgetsetdescriptor(member) and name not in second}
    assert attributes <= {"_room_wanted", "_max_running", "paused"}
    assert first.keys() - attributes == second.keys() - slots
    for name in second.keys() - slots:
        member, other = first[name], second[name]
        assert inspect.getdoc(member) == inspect.getdoc(other), name
        assert inspect.getdoc(member), name
        if callable(member) and name != "complete":
            assert shape(member) == shape(other), name


def shape(function):
    """Return the names, kinds and defaults of a function's parameters."""
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_the_same_constants(twins):
    """Names, limits and outcomes agree."""
    first, second = twins
    for name in ("DEFAULT_NAME", "MAX_NAMES", "OTHER_NAMES", "OUTCOMES"):
        assert getattr(first, name) == getattr(second, name)


def test_the_same_class_docstrings(twins):
    """The classes that the twins share in full describe themselves alike."""
    for name in ("Registry", "NameStats", "LoopRecords"):
        assert inspect.getdoc(getattr(twins[0], name)) == inspect.getdoc(getattr(twins[1], name))


@pytest.mark.parametrize("kind", ["Record", "NameStats", "TimerWheel", "LoopRecords"])
def test_classes_nobody_derives_from_are_final(twins, kind):
    """The compiled classes refuse to be derived from, those of the twin are marked final."""
    with pytest.raises(TypeError):
        type("Derived", (getattr(twins[0], kind),), {})
    assert getattr(twins[1], kind).__final__


def test_a_record_is_made_by_its_registry_alone(twins):
    """Record() is refused with the same text."""
    texts = []
    for twin in twins:
        with pytest.raises(TypeError) as caught:
            twin.Record()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_the_same_percentiles_from_the_same_durations():
    """Driven by the same clock both twins report the same numbers, from microseconds to days."""

    async def main(manager):
        for exponent in range(-24, 80):
            manager.create_task(asyncio.sleep(1.19**exponent), name=f"n{exponent % 7}")
        await manager.wait_for_all()
        return manager.stats()

    results = []
    for twin in ("cython", "python"):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            results.append(runner.run(main(manager_module(twin).BackgroundTaskManager())))
    assert results[0] == results[1]
    assert results[0]["completed"] == 104

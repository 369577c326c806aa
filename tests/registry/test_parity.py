"""The twins hold the same names, signatures, docstrings and refusals."""

import asyncio
import inspect
from collections.abc import Coroutine

import pytest
from loops import VirtualLoop
from twins import manager_module


@pytest.fixture(scope="module")
def twins():
    """Give both registries."""
    import bgtasks._registry

    import bgtasks._registry_py

    return bgtasks._registry, bgtasks._registry_py


def members(kind):
    """Return what a class itself defines, without what every class has: name -> member."""
    return {name: member for name, member in vars(kind).items() if not (name.startswith("__") and name.endswith("__"))}


def is_callable_or_property(member):
    """Return whether a member is a method or a property, and no field."""
    return inspect.isroutine(member) or isinstance(member, property)


def described(member):
    """Return the signature of a method, with its annotations, and the docstring."""
    shape = str(inspect.signature(member)) if inspect.isroutine(member) else None
    return shape, inspect.getdoc(member)


# A compiled record is a coroutine as well: what its tasks step.
COROUTINE = {name for name in vars(Coroutine) if not name.startswith("_")}


@pytest.mark.parametrize("kind", ["RegistryCore", "TaskSet", "Record", "NameStats"])
def test_what_the_compiled_twin_shows_the_other_has_in_the_same_words(twins, kind):
    """Every method, property and field that Python sees: names, signatures, annotations and docstrings agree."""
    compiled, pure = (members(getattr(twin, kind)) for twin in twins)
    if kind == "Record":
        assert compiled.keys() >= COROUTINE
        compiled = {name: member for name, member in compiled.items() if name not in COROUTINE}
    fields = {name for name in compiled if inspect.isgetsetdescriptor(compiled[name]) and not compiled[name].__doc__}
    instance = vars(pure_registry()) if kind == "RegistryCore" else pure
    assert fields <= instance.keys()
    for name in compiled.keys() - fields:
        assert described(compiled[name]) == described(pure[name]), name
        assert inspect.getdoc(compiled[name]), name


@pytest.mark.parametrize("kind", ["RegistryCore", "Record", "NameStats"])
def test_what_the_pure_twin_offers_the_compiled_one_has(twins, kind):
    """The cold half and the manager can use a method of the one wherever they use one of the other."""
    compiled, pure = (members(getattr(twin, kind)) for twin in twins)
    documented = {name for name, member in pure.items() if is_callable_or_property(member) and inspect.getdoc(member)}
    assert documented <= compiled.keys()


def pure_registry():
    """Return an instance of the pure twin's registry."""
    from bgtasks._registry_py import RegistryCore

    return RegistryCore(0, None, False, None, 0)


def test_the_same_class_docstrings(twins):
    """The classes that the twins share in full describe themselves alike."""
    for name in ("RegistryCore", "NameStats", "LoopRecords", "TaskSet", "Slots"):
        assert inspect.getdoc(getattr(twins[0], name)) == inspect.getdoc(getattr(twins[1], name))


@pytest.mark.parametrize("kind", ["Record", "NameStats", "TimerWheel", "LoopRecords", "TaskSet", "Slots"])
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

"""The twins have the same names, signatures, docstrings and refusals."""

import asyncio
import inspect
import pydoc
import typing
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
    """Return the members that a class itself defines, without those of every class: name -> member."""
    return {name: member for name, member in vars(kind).items() if not (name.startswith("__") and name.endswith("__"))}


def is_callable_or_property(member):
    """Return whether a member is a method or a property, not a field."""
    return inspect.isroutine(member) or isinstance(member, property)


def described(member):
    """Return the signature of a method, with its annotations, and the docstring."""
    shape = str(inspect.signature(member)) if inspect.isroutine(member) else None
    return shape, inspect.getdoc(member)


# A compiled record is a coroutine as well, which its task steps.
COROUTINE = {name for name in vars(Coroutine) if not name.startswith("_")}


@pytest.mark.parametrize("kind", ["RegistryCore", "TaskSet", "Record", "NameStats", "Submission"])
def test_members_of_the_compiled_twin_match_the_python_twin(twins, kind):
    """Names, signatures, annotations and docstrings of all methods, properties and fields agree."""
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
def test_members_of_the_python_twin_exist_in_the_compiled_one(twins, kind):
    """The cold half and the manager can use the methods of both twins."""
    compiled, pure = (members(getattr(twin, kind)) for twin in twins)
    documented = {name for name, member in pure.items() if is_callable_or_property(member) and inspect.getdoc(member)}
    assert documented <= compiled.keys()


def pure_registry():
    """Return an instance of the pure twin's registry."""
    from bgtasks._registry_py import RegistryCore

    return RegistryCore(0, None, False, False, None, 0)


# The compiled methods that users call: a manager inherits them.
PUBLIC = ("create_task", "submit", "fire", "fire_function", "task_factory")


def test_users_call_no_other_compiled_method(twins):
    """The tests below cover all compiled methods that a manager inherits."""
    assert [name for name in members(twins[0].RegistryCore) if not name.startswith("_")] == list(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_managers_compiled_method_shows_every_annotation(name):
    """``inspect.signature`` has a type for each argument and the result, the same as for the Python twin."""
    signatures = [
        inspect.signature(getattr(manager_module(twin).BackgroundTaskManager, name)) for twin in ("cython", "python")
    ]
    assert signatures[0] == signatures[1]
    _, *arguments = signatures[0].parameters.values()
    assert inspect.Parameter.empty not in [signatures[0].return_annotation, *(each.annotation for each in arguments)]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_annotations_of_a_compiled_method_can_be_evaluated(name):
    """``typing.get_type_hints``, which frameworks call, finds every name, and the same types on both twins."""
    hints = [
        typing.get_type_hints(getattr(manager_module(twin).BackgroundTaskManager, name))
        for twin in ("cython", "python")
    ]
    # By text: each twin has a type variable of its own. In any order: Cython has ``*args`` first.
    texts = [{name: repr(hint) for name, hint in each.items()} for each in hints]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", PUBLIC)
def test_help_shows_a_compiled_method_as_it_shows_the_twins(name):
    """``help()`` shows the signature with its types, then the docstring."""
    texts = []
    for twin in ("cython", "python"):
        text = pydoc.plain(pydoc.render_doc(getattr(manager_module(twin).BackgroundTaskManager, name)))
        # The first line says what kind of object it is.
        texts.append(text.partition("\n")[2].strip())
    assert texts[0] == texts[1]
    # From Python 3.13 on a long signature has a line for each argument.
    assert " ".join(texts[0].split()).replace("( ", "(").startswith(f"{name}(self, ")
    assert ") -> " in texts[0]
    assert "Args:" in texts[0]


def test_class_docstrings_match(twins):
    """The docstrings of classes that both twins have are the same."""
    for name in ("RegistryCore", "NameStats", "LoopRecords", "TaskSet", "Slots", "Submission"):
        assert inspect.getdoc(getattr(twins[0], name)) == inspect.getdoc(getattr(twins[1], name))


@pytest.mark.parametrize("kind", ["Record", "NameStats", "TimerWheel", "LoopRecords", "TaskSet", "Slots", "Submission"])
def test_classes_without_subclasses_are_final(twins, kind):
    """The compiled classes cannot be derived from; those of the twin are marked final."""
    with pytest.raises(TypeError):
        type("Derived", (getattr(twins[0], kind),), {})
    assert getattr(twins[1], kind).__final__


def test_a_record_is_made_by_its_registry_alone(twins):
    """Record() is refused with the same text on both twins."""
    texts = []
    for twin in twins:
        with pytest.raises(TypeError) as caught:
            twin.Record()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_percentiles_of_the_same_durations_match():
    """On the same clock, both twins report the same percentiles, from microseconds to days."""

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

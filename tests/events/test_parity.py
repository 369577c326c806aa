"""The twins of the event queue have the same names, signatures and docstrings, and users see them on a publisher."""

import inspect

import pytest
from event_tools import queue_module

from bgtasks.events import Publisher
from bgtasks.events.sinks.memory import MemorySink


def members(twin):
    """Return the public members of a twin's queue: name -> member."""
    return {name: member for name, member in vars(queue_module(twin).EventQueue).items() if not name.startswith("_")}


def test_the_twins_have_the_same_members():
    """The twins have the same public methods and properties."""
    assert members("cython").keys() == members("python").keys()
    assert inspect.getdoc(queue_module("cython").EventQueue) == inspect.getdoc(queue_module("python").EventQueue)


@pytest.mark.parametrize("name", sorted(members("python")))
def test_a_member_has_the_same_signature_and_docstring(name):
    """Every argument of a method, and its result, has a type. Compiled properties cannot show types."""
    compiled, pure = members("cython")[name], members("python")[name]
    assert inspect.getdoc(compiled) == inspect.getdoc(pure)
    assert inspect.getdoc(pure)
    assert inspect.isroutine(compiled) == inspect.isroutine(pure)
    if inspect.isroutine(pure):
        signature = inspect.signature(compiled)
        assert signature == inspect.signature(pure)
        _, *arguments = signature.parameters.values()
        assert inspect.Parameter.empty not in [signature.return_annotation, *(each.annotation for each in arguments)]


def test_the_emit_of_a_publisher_is_that_of_its_queue(queue_of_twin):
    """A publisher's emit is the compiled method, with the signature of the documented one."""
    publisher = Publisher(MemorySink())
    assert publisher.emit.__self__ is publisher._queue
    own = inspect.signature(Publisher.emit)
    assert list(inspect.signature(publisher.emit).parameters.values()) == list(own.parameters.values())[1:]
    assert inspect.signature(publisher.emit).return_annotation == own.return_annotation

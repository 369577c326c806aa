"""Managers out of InjectQ containers, with the real InjectQ."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import weakref

import pytest
from requirements import need
from work import after, until, value

from bgtasks import BackgroundTaskManager, InvalidOptionError, ManagerClosedError, ManagerNotBoundError

injectq = need("injectq")

from bgtasks.injection import Inject, bind, inject  # noqa: E402


class Shop:
    """A class of the program, which InjectQ can build."""

    def __init__(self) -> None:
        self.sold = []


def by_proxy(task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]):
    """Use the manager without a decorator."""
    return task_manager.create_task(value())


@inject
def by_default(task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]):
    """Return the manager that a default value stands for."""
    return task_manager


@inject
def by_annotation(goods: str, task_manager: BackgroundTaskManager):
    """Return the manager that an annotation asks for."""
    return goods, task_manager


@inject
async def by_annotation_async(goods: str, shop: Shop, *, task_manager: BackgroundTaskManager, price: int = 3):
    """Do the same in a coroutine function, with another class."""
    shop.sold.append((goods, price))
    return task_manager


@injectq.inject
def by_injectq(task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]):
    """Return the manager that InjectQ's own decorator finds."""
    return task_manager


def managers_seen():
    """Return what each way of injecting gives now."""
    return [by_default(), by_annotation("tea")[1], by_injectq()]


@pytest.fixture(autouse=True)
def container():
    """Give a container of the test's own in place of the global one."""
    with injectq.testing.test_container() as container:
        yield container


async def test_a_bound_manager_arrives_by_default_value_and_by_annotation(container):
    """Each way gives the manager that was bound, to functions and coroutine functions."""
    async with bind(container) as manager:
        assert all(seen is manager for seen in managers_seen())
        assert by_annotation("tea") == ("tea", manager)
        assert await by_annotation_async("tea") is manager
        await by_proxy()
        assert manager.stats()["completed"] == 1


async def test_arguments_that_are_given_win(container):
    """Only what the caller leaves out is filled in."""
    bind(container)
    other = BackgroundTaskManager()
    shop = Shop()
    assert by_default(other) is other
    assert by_default(task_manager=other) is other
    assert await by_annotation_async("tea", shop, task_manager=other, price=5) is other
    assert shop.sold == [("tea", 5)]


def test_other_things_are_injected_as_injectq_does(container):
    """A bound name comes before the annotation; an ordinary default stays where nothing is bound."""
    manager = bind(container)

    @inject
    def sell(shop: Shop, task_manager: BackgroundTaskManager, clerk: str, price: int = 3):
        return shop, task_manager, clerk, price

    shop = container[Shop] = Shop()
    container.bind("clerk", "Ada")
    assert sell() == (shop, manager, "Ada", 3)


async def test_what_an_asynchronous_factory_makes_is_awaited(container):
    """A coroutine function gets the result of a factory that is one, too."""
    bind(container)
    shop = Shop()

    async def open_shop():
        return shop

    container.bind_factory(Shop, open_shop)
    await by_annotation_async("tea")
    assert shop.sold == [("tea", 3)]


def test_two_containers_each_give_their_own(container):
    """The container that is active at the call is asked, however often another one was before."""
    first, second = injectq.InjectQ(), injectq.InjectQ()
    managers = [bind(first), bind(second)]
    proxy = Inject[BackgroundTaskManager]
    for _ in range(2):
        for source, manager in zip((first, second), managers, strict=True):
            with source.context():
                assert all(seen is manager for seen in managers_seen())
                assert proxy.stats.__self__ is manager
    with pytest.raises(ManagerNotBoundError):
        by_default()


def test_the_decorator_can_be_given_a_container(container):
    """``@inject(container=...)`` looks there, whichever is active."""
    source = injectq.InjectQ()
    manager = bind(source)
    bind(container)

    @inject(container=source)
    def seen(task_manager: BackgroundTaskManager):
        return task_manager

    assert seen() is manager


async def test_a_rebound_container_gives_the_new_manager(container):
    """After shutdown and a new binding the same function gets the new manager."""
    first = bind(container)
    await by_proxy()
    await first.shutdown()
    with pytest.raises(ManagerClosedError):
        by_proxy()
    async with bind(container) as second:
        assert all(seen is second for seen in managers_seen())
        await by_proxy()
        assert second.stats()["completed"] == 1


def test_a_manager_bound_with_injectqs_own_means_is_honoured(container):
    """``container[...] = manager`` works, and so does doing it again after a look."""
    for _ in range(2):
        manager = container[BackgroundTaskManager] = BackgroundTaskManager()
        assert by_default() is manager
        assert by_annotation("tea")[1] is manager
    container.bind_factory(BackgroundTaskManager, lambda: made[0])
    made = [BackgroundTaskManager()]
    assert by_default() is made[0]


def test_a_class_that_is_bound_is_built_once(container):
    """Where a class is bound instead of an object, InjectQ's scope says how many are built."""
    container.bind(BackgroundTaskManager, BackgroundTaskManager)
    manager = by_default()
    assert type(manager) is BackgroundTaskManager
    assert by_default() is manager


def test_an_override_of_a_test_scope_is_seen(container):
    """What a test puts in the manager's place is what functions get, and only inside the scope."""
    manager = bind(container)
    assert by_default() is manager
    stand_in = BackgroundTaskManager()
    with injectq.testing.override_dependency(BackgroundTaskManager, stand_in):
        assert all(seen is stand_in for seen in managers_seen())
    assert all(seen is manager for seen in managers_seen())


@pytest.mark.parametrize("call", [by_proxy, by_default, lambda: by_annotation("tea")])
def test_unbound_says_how_to_bind(container, call):
    """Nobody gets None, nor a manager that nobody bound: the error names the call to make."""
    with pytest.raises(ManagerNotBoundError, match=r"no BackgroundTaskManager is bound .* bgtasks\.injection\.bind"):
        call()
    container.bind(BackgroundTaskManager, None, allow_none=True)
    with pytest.raises(ManagerNotBoundError):
        call()


async def test_unbound_says_how_to_bind_in_a_coroutine_function(container):
    """The error comes when the coroutine runs."""
    with pytest.raises(ManagerNotBoundError):
        await by_annotation_async("tea")


def test_a_signature_can_be_looked_at_before_anything_is_bound(container):
    """Frameworks read defaults when they are imported: that resolves nothing."""
    default = inspect.signature(by_default).parameters["task_manager"].default
    assert isinstance(default, Inject)
    assert repr(default) == "Inject[BackgroundTaskManager]"
    assert default != inspect.Parameter.empty
    manager = bind(container)
    assert isinstance(default, BackgroundTaskManager)
    assert default == manager
    assert hash(default) == hash(manager)
    assert default


def test_errors_of_the_function_come_through_as_they_are(container):
    """The decorator wraps nothing that the function itself raises."""
    bind(container)

    @inject
    def failing(task_manager: BackgroundTaskManager):
        raise KeyError("tea")

    with pytest.raises(KeyError, match="tea"):
        failing()


async def test_a_container_cleared_while_tasks_run_loses_none(container):
    """The tasks end as if nothing had happened; new ones are told that nothing is bound."""
    event = asyncio.Event()
    bind(container)
    task = by_default().create_task(after(event, "done"))
    seen = weakref.ref(by_default())
    container.clear()
    gc.collect()
    with pytest.raises(ManagerNotBoundError):
        by_proxy()
    assert seen().get_task_count() == 1
    event.set()
    assert await task == "done"
    assert seen().stats()["completed"] == 1
    del task
    await until(lambda: gc.collect() is not None and seen() is None)


def test_a_manager_is_kept_by_its_container():
    """It lives as long as the container that it was bound in, and no longer."""
    source = injectq.InjectQ()
    seen = weakref.ref(bind(source))
    gc.collect()
    assert seen() is not None
    del source
    gc.collect()
    assert seen() is None


async def test_a_manager_in_use_on_another_loop_serves_this_one_too(container):
    """A manager belongs to no loop: what is injected here runs here."""
    manager = bind(container)
    event = asyncio.Event()
    here = manager.create_task(after(event))
    loops = []

    async def where():
        loops.append(asyncio.get_running_loop())

    async def there():
        await by_default().create_task(where())
        loops.append(asyncio.get_running_loop())

    thread = threading.Thread(target=asyncio.run, args=(there(),))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert loops[0] is loops[1]
    assert loops[0] is not asyncio.get_running_loop()
    assert not here.done()
    event.set()
    await manager.shutdown(drain=5.0)
    assert manager.stats()["completed"] == 2


@pytest.mark.parametrize("arguments", [{"container": {}}, {"manager": object()}])
def test_bind_refuses_what_it_cannot_bind(arguments):
    """The error says which argument, and what it got."""
    with pytest.raises(InvalidOptionError, match=f"{next(iter(arguments))} must be"):
        bind(**arguments)


@pytest.mark.parametrize("function", [Shop, None.__class__, "text"])
def test_inject_refuses_what_is_no_function(function):
    """Classes and other things are named in the error."""
    with pytest.raises(InvalidOptionError, match="@inject is for functions"):
        inject(function)


def test_without_injectq_the_error_says_what_to_install():
    """The missing extra is named with the command that installs it."""
    program = (
        "import sys; sys.modules['injectq'] = None\n"
        "try:\n    import bgtasks.injection\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert 'pip install "bgtasks-registry[inject]"' in done.stdout

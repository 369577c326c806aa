"""Managers from InjectQ containers, with the real InjectQ."""

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
    """Return the manager that an annotation asks for, in a coroutine function that asks for a shop, too."""
    shop.sold.append((goods, price))
    return task_manager


@injectq.inject
def by_injectq(task_manager: BackgroundTaskManager = Inject[BackgroundTaskManager]):
    """Return the manager that InjectQ's own decorator finds."""
    return task_manager


def managers_seen():
    """Return the manager that each way of injecting gives now."""
    return [by_default(), by_annotation("tea")[1], by_injectq()]


@pytest.fixture(autouse=True)
def container():
    """Give each test its own container in place of the global one."""
    with injectq.testing.test_container() as container:
        yield container


async def test_a_bound_manager_is_injected_by_default_value_and_by_annotation(container):
    """Functions and coroutine functions get the manager that was bound, either way."""
    async with bind(container) as manager:
        assert all(seen is manager for seen in managers_seen())
        assert by_annotation("tea") == ("tea", manager)
        assert await by_annotation_async("tea") is manager
        await by_proxy()
        assert manager.stats()["completed"] == 1


async def test_given_arguments_are_kept(container):
    """Only arguments that the caller leaves out are injected."""
    bind(container)
    other = BackgroundTaskManager()
    shop = Shop()
    assert by_default(other) is other
    assert by_default(task_manager=other) is other
    assert await by_annotation_async("tea", shop, task_manager=other, price=5) is other
    assert shop.sold == [("tea", 5)]


def test_other_things_are_injected_as_injectq_does(container):
    """A bound name takes precedence over the annotation; an ordinary default is kept if nothing is bound."""
    manager = bind(container)

    @inject
    def sell(shop: Shop, task_manager: BackgroundTaskManager, clerk: str, price: int = 3):
        return shop, task_manager, clerk, price

    shop = container[Shop] = Shop()
    container.bind("clerk", "Ada")
    assert sell() == (shop, manager, "Ada", 3)


async def test_the_result_of_an_asynchronous_factory_is_awaited(container):
    """A coroutine function gets the result of a factory that is a coroutine function, too."""
    bind(container)
    shop = Shop()

    async def open_shop():
        return shop

    container.bind_factory(Shop, open_shop)
    await by_annotation_async("tea")
    assert shop.sold == [("tea", 3)]


def test_two_containers_each_give_their_own(container):
    """The container that is active at the time of the call is asked each time."""
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
    """``@inject(container=...)`` asks that container, whichever is active."""
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


def test_a_manager_bound_with_injectqs_own_functions_is_injected(container):
    """``container[...] = manager`` and a factory work, and so does a new binding after a lookup."""
    for _ in range(2):
        manager = container[BackgroundTaskManager] = BackgroundTaskManager()
        assert by_default() is manager
        assert by_annotation("tea")[1] is manager
    container.bind_factory(BackgroundTaskManager, lambda: made[0])
    made = [BackgroundTaskManager()]
    assert by_default() is made[0]


def test_a_bound_class_is_built_as_its_scope_says(container):
    """If a class is bound instead of an object, InjectQ's scope decides how many are built."""
    container.bind(BackgroundTaskManager, BackgroundTaskManager)
    manager = by_default()
    assert type(manager) is BackgroundTaskManager
    assert by_default() is manager


def test_an_override_in_a_test_is_injected(container):
    """Functions get the override only inside its scope."""
    manager = bind(container)
    assert by_default() is manager
    stand_in = BackgroundTaskManager()
    with injectq.testing.override_dependency(BackgroundTaskManager, stand_in):
        assert all(seen is stand_in for seen in managers_seen())
    assert all(seen is manager for seen in managers_seen())


@pytest.mark.parametrize("call", [by_proxy, by_default, lambda: by_annotation("tea")])
def test_an_unbound_manager_is_an_error_that_says_how_to_bind(container, call):
    """Functions get neither None nor a manager that was never bound; the error names the call to make."""
    with pytest.raises(ManagerNotBoundError, match=r"no BackgroundTaskManager is bound .* bgtasks\.injection\.bind"):
        call()
    container.bind(BackgroundTaskManager, None, allow_none=True)
    with pytest.raises(ManagerNotBoundError):
        call()


async def test_an_unbound_manager_is_an_error_in_a_coroutine_function(container):
    """The error is raised when the coroutine runs."""
    with pytest.raises(ManagerNotBoundError):
        await by_annotation_async("tea")


def test_a_signature_can_be_read_before_anything_is_bound(container):
    """Frameworks read defaults at import; reading resolves nothing."""
    default = inspect.signature(by_default).parameters["task_manager"].default
    assert isinstance(default, Inject)
    assert repr(default) == "Inject[BackgroundTaskManager]"
    assert default != inspect.Parameter.empty
    manager = bind(container)
    assert isinstance(default, BackgroundTaskManager)
    assert default == manager
    assert hash(default) == hash(manager)
    assert default


def test_errors_of_the_function_are_raised_unchanged(container):
    """The decorator wraps no exception of the function itself."""
    bind(container)

    @inject
    def failing(task_manager: BackgroundTaskManager):
        raise KeyError("tea")

    with pytest.raises(KeyError, match="tea"):
        failing()


async def test_a_container_cleared_while_tasks_run_loses_none(container):
    """Running tasks end as usual; a new injection raises the error that no manager is bound."""
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
    """It lives as long as the container that it is bound in, and no longer."""
    source = injectq.InjectQ()
    seen = weakref.ref(bind(source))
    gc.collect()
    assert seen() is not None
    del source
    gc.collect()
    assert seen() is None


async def test_a_manager_in_use_on_another_loop_can_be_injected_here(container):
    """A manager belongs to no loop: an injected one starts tasks on the loop of the caller."""
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
def test_bind_refuses_bad_arguments(arguments):
    """The error names the argument and its value."""
    with pytest.raises(InvalidOptionError, match=f"{next(iter(arguments))} must be"):
        bind(**arguments)


@pytest.mark.parametrize("function", [Shop, None.__class__, "text"])
def test_inject_refuses_anything_but_functions(function):
    """The error names the class or object that was given."""
    with pytest.raises(InvalidOptionError, match="@inject is for functions"):
        inject(function)


def test_without_injectq_the_error_says_what_to_install():
    """The error has the command that installs the missing extra."""
    program = (
        "import sys; sys.modules['injectq'] = None\n"
        "try:\n    import bgtasks.injection\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert 'pip install "bgtasks-registry[inject]"' in done.stdout

"""A manager and a publisher with something in every figure."""

from __future__ import annotations

from work import failing, value

from bgtasks.events import Publisher, Sink


class Swallow(Sink):
    """Takes every event."""

    async def write(self, batch, batch_id):
        """Do nothing."""


async def run_everything(manager):
    """Have every figure of a manager and a publisher, and return the publisher."""
    publisher = Publisher(Swallow(), name="orders")
    manager.watch_loop(5)
    manager.create_task(value(), name="ok")
    manager.create_task(failing(ValueError()), name="bad")
    manager.fire(value(), name='a "quoted"\nname\\')
    publisher.emit({"number": 1})
    await manager.wait_for_all(return_exceptions=True)
    await publisher.flush()
    await publisher.close()
    publisher.emit({"number": 2})
    return publisher

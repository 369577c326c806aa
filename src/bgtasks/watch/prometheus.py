"""Figures of managers and publishers for Prometheus, read when it scrapes; a task costs nothing more.

::

    from bgtasks.watch.prometheus import Collector, metrics_app

    app.mount("/metrics", metrics_app(Collector(manager, publishers=[publisher])))

A registry makes every sample an object, which takes 20 times as long as to write its text. So ``metrics_app`` and
``render`` write the text themselves, below that of the registry; ``REGISTRY.register`` works, too.
"""

from __future__ import annotations

from bgtasks.watch._extra import extra

with extra("prometheus", "prometheus_client", "prometheus_client", "export figures to Prometheus"):
    import prometheus_client  # noqa: F401

# Below the check for the extra, which they need.
from bgtasks.watch._collector import OCTAVES, Collector, Managed
from bgtasks.watch._metrics_page import metrics_app, render
from bgtasks.watch._published import Published

__all__ = ["OCTAVES", "Collector", "Managed", "Published", "metrics_app", "render"]

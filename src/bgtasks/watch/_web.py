"""The command web: a server of the page for the watched processes of the user."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from typing import Final

from bgtasks.watch._commands import Command
from bgtasks.watch._page import LOOPBACK, SourcePage
from bgtasks.watch._page_access import Access
from bgtasks.watch._page_server import ADDRESS, serve
from bgtasks.watch._page_source import ProcessesSource

__all__ = ["WEB"]


def _add_web(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, help="only this process; all watched processes of yours by default")
    parser.add_argument("--port", type=int, default=0, help="the port on 127.0.0.1; a free one by default")
    parser.add_argument("--allow-cancel", action="store_true", help="let the page cancel tasks")


def _web(given: argparse.Namespace) -> int:
    try:
        asyncio.run(_serve(given))
    except KeyboardInterrupt:
        return 0
    return 0


async def _serve(given: argparse.Namespace) -> None:
    token = secrets.token_urlsafe()
    source = ProcessesSource(given.pid)
    page = SourcePage(lambda scope: source, Access(None, token, LOOPBACK), given.allow_cancel)
    server = await serve(page, given.port)
    port = server.sockets[0].getsockname()[1]
    # What stands behind # is not sent to the server.
    print(f"http://{ADDRESS}:{port}/#token={token}", flush=True)
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        # Not serve_forever(), which would wait for the streams first.
        page.close()
        server.close()


WEB: Final = Command(_add_web, _web)

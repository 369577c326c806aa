"""A server of the tests ends with the process that started it, however that ends."""

import os
import signal
import subprocess
import sys

import pytest
from child import is_running
from paths import SUPPORT
from server_fixtures import need_server
from servers import NatsServer, RabbitServer, RedisServer
from work import wait_until

STARTER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import servers
server = getattr(servers, sys.argv[2])(Path(sys.argv[3]))
server.start()
print(server.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("kind", [RedisServer, NatsServer, RabbitServer])
def test_a_server_dies_with_the_process_that_started_it(kind, tmp_path):
    """After SIGKILL, which allows no cleanup, the server is gone as well."""
    need_server(kind)
    command = [sys.executable, "-c", STARTER, str(SUPPORT), kind.__name__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        pid = int(starter.stdout.readline())
        assert is_running(pid)
        os.kill(starter.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid), within=30)


def test_a_frozen_server_can_be_killed(start_server):
    """A frozen server can be killed; the next start has its data."""
    server = start_server(RedisServer)
    server.freeze()
    server.restart()
    assert server.is_ready()


def test_a_server_that_does_not_start_shows_its_log(start_server):
    """The output of the server is in the error."""
    with pytest.raises(Exception, match="no-such-option"):
        start_server(RedisServer, options=("--no-such-option", "1"))

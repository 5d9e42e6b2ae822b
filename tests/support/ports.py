"""Find a free port, and wait for what child processes do."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable


def wait_for(what: Callable[[], bool], *children: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until `what` is true; the children must live until then."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and all(child.poll() is None for child in children)
        time.sleep(0.02)


def free_port() -> str:
    """Return the number of a TCP port of this machine that nobody uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])

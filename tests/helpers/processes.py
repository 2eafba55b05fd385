"""Waiting for other processes, and a port for one of them."""

from __future__ import annotations

import socket
import time

# Seconds after which a test gives up on another process; a busy machine is slow.
PATIENCE = 180.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds=PATIENCE):
    """Wait for something that another process does; what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found

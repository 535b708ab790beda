"""Lookout: what a thread that waits for results looks at: is there any node?"""

from __future__ import annotations

import contextlib
import sys
import time

from .. import config
from ..errors import NoNodesError
from .connection import Controller

__all__ = ["Lookout", "tell"]

NOTICE_SECONDS = 5.0  # without a node, before the caller is told how to start one
LOOK_SECONDS = 1.0  # how often a waiting call looks whether there are nodes; also how Ctrl-C gets through on Windows
LEAST_SECONDS = 0.05  # the same, with a short wait_for_nodes
PAUSE_SECONDS = 3.0  # where nobody has looked for so long, nobody knows whether there was a node meanwhile


class Lookout:
    """For a thread that waits for results: is there any node? The caller is told once on stderr.

    :ivar seconds: how often to `look`. Any thread may.
    """

    def __init__(self, controller: Controller, wait_for_nodes: float | None) -> None:
        self.seconds = LOOK_SECONDS
        if wait_for_nodes is not None:
            self.seconds = min(LOOK_SECONDS, max(wait_for_nodes / 4, LEAST_SECONDS))
        self._controller = controller
        self._wait_for_nodes = wait_for_nodes
        self._lonely_since = self._looked = time.monotonic()  # no node since then; somebody looked then
        self._told = False  # the caller knows

    def look(self) -> None:
        """No result came for a while. NoNodesError if there was no node for `wait_for_nodes` seconds."""
        now = time.monotonic()
        paused, self._looked = now - self._looked > PAUSE_SECONDS, now
        if self._controller.workers()[0] or not self._controller.connected or paused:
            self._lonely_since = now
            return
        waited = now - self._lonely_since
        settings = self._controller.settings
        where = f"{settings.host}:{settings.port}"
        if self._wait_for_nodes is not None and waited >= self._wait_for_nodes:
            patience = f"{self._wait_for_nodes:g} s"
            raise NoNodesError(f"no node joined the server at {where} within {patience}. {_start_one()}")
        if waited >= NOTICE_SECONDS and not self._told:
            self._told = True
            tell(f"The server at {where} has no nodes; the job waits for one. {_start_one()}")


def tell(text: str) -> None:
    """Write a line to stderr, so that stdout stays the caller's."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _start_one() -> str:
    return f"Start one: python -m {config.PACKAGE}.node"

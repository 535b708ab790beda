"""Ends of connections for the tests, over socket pairs; each test closes what it opens."""

import contextlib
import os
import socket
import sys
import threading
import time

import pytest

from achilles.protocol import auth, channel
from achilles.protocol.channel import Channel

KEY = bytes(range(32))  # K
CAN_ENCRYPT = sys.version_info >= (3, 13)
DATA_KEYS = b"client to server", b"server to client"
SECONDS = 10.0  # a generous bound that tells a hang from a wait


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(name="closing")
def closing_fixture():
    """What a test opens through this is closed; afterwards no thread and no descriptor is left."""
    threads, files = threading.active_count(), descriptors()
    with contextlib.ExitStack() as stack:
        yield stack
    assert threading.active_count() == threads, threading.enumerate()
    assert descriptors() <= files  # fewer, where what earlier tests left is collected meanwhile


def tls_pair(closing, key=KEY, known=None):
    """Both ends of a TLS connection over a socket pair: the server's, and the client's."""
    from achilles.protocol import tls

    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + SECONDS
    identity, psk = auth.tls_key("ann", key)

    served = in_thread(closing, tls.server, ours, {identity: psk} if known is None else known, b"", deadline, bool)
    client = tls.client(theirs, (identity, psk), deadline)
    return served(), client


def linked(closing, links=("SC", "CS"), keys=DATA_KEYS, encrypt=False):
    """Both ends of one connection, without writer threads."""
    socks = tls_pair(closing) if encrypt else socket.socketpair()
    ends = [Channel(sock, link, own) for sock, link, own in zip(socks, links, (keys, keys and keys[::-1]))]
    for end in ends:
        end.socket.settimeout(channel.TICK_SECONDS)
        closing.callback(end.close)
    return ends


def in_thread(closing, target, *args):
    """Run it beside the test; `wait()` gives what it returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(target(*args)), daemon=True)
    thread.start()
    closing.callback(thread.join, SECONDS)

    def wait():
        thread.join(SECONDS)
        assert not thread.is_alive()
        return results[0]

    return wait


def read_all(link):
    """What `run` was given until the end, and why it ended."""
    frames = []
    return frames, link.run(frames.append)

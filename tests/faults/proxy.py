"""A TCP proxy on loopback that treats bytes as a bad network does.

::

    client ──▶ up: delay, rate, piece, cut_after, held ──▶ server
    client ◀── down: the same, by itself                ◀── server

One thread serves every connection. Its buffers are small, so that a slow link pushes back upon whoever sends.
Rules may be changed at any time, from any thread.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

SOCKET_BYTES = 64 << 10  # of a socket's buffers: what a link has under way
TURN_SECONDS = 0.005  # the longest that the thread sleeps while something waits for its time
BURST_SECONDS = 0.02  # of a rate: how much goes at once


@dataclass
class Rule:
    """What happens to the bytes of one direction."""

    delay: float = 0.0  # seconds that each byte is under way
    rate: float = 0.0  # bytes a second; 0 for as many as come
    piece: int = 65536  # bytes written at a time
    cut_after: int | None = None  # bytes of a connection; then it is cut, in both directions
    held: bool = False  # nothing is forwarded; what comes is kept
    reset: bool = False  # a cut is a reset, and no end of file
    spoil: bytes = b""  # where this comes by, one bit of it is turned ...
    times: int = 0  # ... so often ...
    place: int = 0  # ... in this byte of it ...
    bit: int = 1  # ... this one


@dataclass
class _Way:
    """One direction of one connection."""

    source: socket.socket
    target: socket.socket
    rule: Rule
    queue: deque[tuple[float, memoryview]] = field(default_factory=deque)  # when it may leave, and what
    waiting: int = 0  # bytes in the queue
    passed: int = 0  # bytes forwarded
    credit: float = 0.0  # bytes that the rate allows now
    credited: float = field(default_factory=time.monotonic)
    ended: bool = False  # end of file came
    shut: bool = False  # ... and was passed on

    def room(self) -> bool:
        limit = SOCKET_BYTES if not self.rule.delay else 4 << 20  # what is delayed is under way, and does not push back
        return not self.ended and self.waiting < limit

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = self.source.recv(SOCKET_BYTES)
            if self.rule.times and (at := data.find(self.rule.spoil)) >= 0:
                self.rule.times -= 1
                at += self.rule.place
                data = data[:at] + bytes([data[at] ^ self.rule.bit]) + data[at + 1 :]
            if data:
                self.queue.append((time.monotonic() + self.rule.delay, memoryview(data)))
                self.waiting += len(data)
            else:
                self.ended = True

    def write(self, now: float) -> bool:
        """Forward what is due; True if the connection is to be cut."""
        rule = self.rule
        if rule.rate:
            self.credit = min(self.credit + (now - self.credited) * rule.rate, max(1.0, rule.rate * BURST_SECONDS))
        self.credited = now
        while self.queue and not rule.held and self.queue[0][0] <= now:
            due, data = self.queue[0]
            count = min(len(data), rule.piece, int(self.credit) if rule.rate else len(data))
            if rule.cut_after is not None:
                if self.passed >= rule.cut_after:
                    return True
                count = min(count, rule.cut_after - self.passed)
            if count <= 0:
                break
            try:
                written = self.target.send(data[:count])
            except BlockingIOError:
                break
            self.credit -= written if rule.rate else 0
            self.passed += written
            self.waiting -= written
            if written == len(data):
                self.queue.popleft()
            else:
                self.queue[0] = due, data[written:]
        if self.ended and not self.queue and not self.shut and not rule.held:
            self.shut = True
            self.target.shutdown(socket.SHUT_WR)
        return rule.cut_after is not None and self.passed >= rule.cut_after


class Proxy:
    """Listens at `port` of loopback and forwards to `target`'s; `up` is what clients send."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.up, self.down = Rule(), Rule()
        self.accepted = 0  # connections, ever
        self.passed = [0, 0]  # bytes up and down, of all connections that are over
        self.cut_at: int | None = None  # bytes that had passed when a rule cut a connection last
        self.once = False  # the rules are for the first connection alone; the others are let through
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[_Way, _Way]] = []
        self._cut_now = threading.Event()
        self._stop = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._waker.send(b"x")
        self._thread.join(5)
        for end in (self._listener, self._wake, self._waker):
            end.close()

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._pairs)

    def cut(self) -> None:
        """End all connections now."""
        self._cut_now.set()
        self._waker.send(b"x")

    def hold(self, held: bool = True, *, up: bool = True, down: bool = True) -> None:
        """Forward nothing in these directions, or all again."""
        self.up.held = held and up
        self.down.held = held and down
        self._waker.send(b"x")

    def cut_next(self, way: int, after: int, *, reset: bool = False) -> None:
        """End all connections now, and the next one when so many bytes went up (0) or down (1); no later one."""
        self.heal()
        self.once, self.accepted, self.cut_at = True, 0, None
        rule = (self.up, self.down)[way]
        rule.reset, rule.cut_after = reset, after
        self.cut()

    def heal(self) -> None:
        """Forward as a good network does. Connections keep what they have."""
        for rule in (self.up, self.down):
            rule.__init__()  # type: ignore[misc]
        self._waker.send(b"x")

    def _run(self) -> None:
        while not self._stop.is_set():
            with selectors.DefaultSelector() as selector:
                waiting = self._register(selector)
                events = selector.select(TURN_SECONDS if waiting else 1.0)
                ready = {key.fileobj for key, mask in events if mask & selectors.EVENT_READ}
            if self._wake in ready:
                self._wake.recv(4096)
            if self._cut_now.is_set():  # before what came later is accepted
                self._cut_now.clear()
                for pair in list(self._pairs):
                    self._close(pair)
            if self._listener in ready:
                self._accept()
            now = time.monotonic()
            for pair in list(self._pairs):
                self._turn(pair, ready, now)
        for pair in list(self._pairs):
            self._close(pair)

    def _register(self, selector: selectors.BaseSelector) -> bool:
        """What to wait for; whether anything waits for its time."""
        waiting = False
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        for pair in self._pairs:
            masks = {pair[0].source: 0, pair[1].source: 0}
            for way in pair:
                masks[way.source] |= selectors.EVENT_READ if way.room() else 0
                free = not (way.rule.rate or way.rule.delay or way.rule.held)
                if way.queue and free:
                    masks[way.target] |= selectors.EVENT_WRITE
                waiting |= bool(way.queue) and not free
            for sock, mask in masks.items():
                if mask:
                    selector.register(sock, mask)
        return waiting

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.socket()
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                server.connect(("127.0.0.1", self.target))
            except OSError:  # it is not there: nor are we
                client.close()
                server.close()
                return
            self.accepted += 1
            up, down = (Rule(), Rule()) if self.once and self.accepted > 1 else (self.up, self.down)
            for end in (client, server):
                end.setblocking(False)
            self._pairs.append((_Way(client, server, up), _Way(server, client, down)))

    def _turn(self, pair: tuple[_Way, _Way], ready: set[object], now: float) -> None:
        try:
            cut = False
            for way in pair:
                if way.source in ready:
                    way.read()
                if way.write(now):
                    cut, self.cut_at = True, way.passed
            if cut or all(way.shut for way in pair):
                self._close(pair)
        except OSError:
            self._close(pair)

    def _close(self, pair: tuple[_Way, _Way]) -> None:
        self._pairs.remove(pair)
        for number, way in enumerate(pair):
            self.passed[number] += way.passed
            if way.rule.reset:
                way.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for way in pair:
            way.source.close()

"""FrameReader: the bytes of one direction in, frames out.

::

    recv_into ─▶ space() ─▶ received(n) ─▶ head ─▶ envelope and tag ─verify─▶ decode ─▶ long letters ─▶ Frame

`verify` sees an envelope before any other code. Memory grows as bytes arrive: a length alone takes almost none.
The module knows no socket and no key. A FrameReader belongs to the thread that reads its connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

from ..errors import ProtocolError
from . import frames
from .frames import HEAD, MAX_ENVELOPE_BYTES, TAG_BYTES, Buffer, Frame
from .kinds import DIRECTIONS, FIELDS, SERVER_FIELDS, Kind

__all__ = ["FrameReader"]

BUFFER_BYTES = 256 << 10  # a recv takes up to this much
DIRECT_BYTES = 64 << 10  # a letter that lacks more is received in place, not copied
LETTER_STEP_BYTES = (8 << 20) + (64 << 10)  # memory for a long letter that has begun: 8 MiB and some room

_KINDS = {int(kind): kind for kind in Kind}


class FrameReader:
    """Cuts a stream into frames.

    In a loop, read into `space()`, call `received(n)` with the count of bytes, and take its frames.

    :param link: the peer that speaks and the peer that reads, such as "CS"; see kinds.DIRECTIONS.
    :param verify: raises if a tag is wrong; None on a worker's link, which has no tags.
    """

    def __init__(self, link: str, verify: Callable[[Buffer, Buffer], None] | None) -> None:
        self._link, self._verify = link, verify
        self._fields = SERVER_FIELDS if link[0] == "S" else FIELDS
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = self._end = 0  # of the bytes in the buffer that are not decoded
        self._found: list[Frame] = []  # whole, and not returned yet
        self._parser = self._parse()
        self._place = next(self._parser)  # for the next bytes

    def space(self) -> memoryview:
        """Return the place of the next bytes, 64 KiB at least. Release it before `received`."""
        return self._place[:]

    def received(self, count: int) -> list[Frame]:
        """Return the frames that `count` further bytes make whole, in their order."""
        try:
            self._place = self._parser.send(count)
        except StopIteration:
            raise ProtocolError("a peer's mistake was read before: nothing behind it is a frame") from None
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Free the buffer now: parser and reader refer to each other. Another thread may be in `received`."""
        with contextlib.suppress(ValueError):
            self._parser.close()

    def _parse(self) -> Generator[memoryview, int, None]:
        """Find frames. All parsers yield the place of the next bytes, and are sent their count."""
        while True:
            yield from self._read_frame()

    def _read_frame(self) -> Generator[memoryview, int, None]:
        """Find the next frame. No local name keeps a returned frame alive."""
        head = yield from self._read(HEAD.size)
        number, flags, zero, length = HEAD.unpack(head)
        if length > MAX_ENVELOPE_BYTES:
            raise ProtocolError(f"an envelope of {length} bytes; the limit is {MAX_ENVELOPE_BYTES}")
        envelope = yield from self._read(length)
        if self._verify:
            self._verify(head + envelope, (yield from self._read(TAG_BYTES)))
        kind = _KINDS.get(number)
        if kind is None or zero or self._link not in DIRECTIONS[kind]:
            raise ProtocolError(f"a head of kind {number} and {zero} ({kind!r}) may not travel here ({self._link})")
        body = frames.decode(kind, flags, bytes(envelope), self._fields)
        for long in getattr(body, "longs", ()):
            long.parts = ((yield from self._read(long.length)),)
        self._found.append(Frame(kind, body))

    def _read(self, count: int) -> Generator[memoryview, int, bytearray]:
        """Return the next `count` bytes."""
        whole = self._take(count)
        filled = len(whole)
        while filled < count:
            if count - filled < DIRECT_BYTES:
                self._start, self._end = 0, (yield memoryview(self._buffer))
                whole[filled:] = self._take(count - filled)
                filled = len(whole)
            else:
                if len(whole) - filled < DIRECT_BYTES:
                    # Little memory at first, then 8 MiB, then twice the bytes.
                    least = LETTER_STEP_BYTES if filled >= DIRECT_BYTES else BUFFER_BYTES
                    old, whole = whole, bytearray(min(count, max(2 * filled, least)))
                    whole[:filled] = memoryview(old)[:filled]
                filled += yield memoryview(whole)[filled:]
        return whole

    def _take(self, count: int) -> bytearray:
        """Take up to `count` bytes out of the buffer."""
        start, self._start = self._start, min(self._start + count, self._end)
        return self._buffer[start : self._start]

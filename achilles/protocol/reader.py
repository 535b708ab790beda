"""FrameReader: the bytes of one direction in, frames out.

::

    recv_into ─▶ space() ─▶ received(n) ─▶ head ─▶ envelope and tag ─verify─▶ decode ─▶ long letters ─▶ Frame

`verify` sees an envelope before any other code does. Memory grows as bytes arrive: a length alone takes next to none.
The module knows no socket and no key. A FrameReader belongs to the one thread that reads its connection.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Generator
from typing import Any

from ..errors import ProtocolError
from . import frames
from .fields import check_fields
from .frames import DIGEST_BYTES, HEAD, MAX_ENVELOPE_BYTES, TAG_BYTES, Buffer, Frame, LongLetter
from .kinds import DIRECTIONS, LINK_FIELDS, Kind

__all__ = ["FrameReader", "Verify", "keep_freed_memory"]

BUFFER_BYTES = 256 << 10  # one recv takes up to this much
DIRECT_BYTES = 64 << 10  # a letter that lacks more than this is received at its final place; else it is copied there
LETTER_STEP_BYTES = (8 << 20) + (64 << 10)  # memory for a long letter that has begun to come: 8 MiB and some room
KEPT_BYTES = 32 << 20  # of freed memory that a process keeps; glibc takes no more (HEAP_MAX_SIZE / 2, malloc.c)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

Verify = Callable[[Buffer, Buffer, Buffer], None]
_KINDS = {int(kind): kind for kind in Kind}


class FrameReader:
    """Cuts a stream into frames.

    Use it in a loop: read into `space()`, tell `received(n)` how many bytes came, take the frames that it returns.

    :param link: the peer that speaks and the peer that reads, such as "CS"; see kinds.DIRECTIONS.
    :param verify: raises if a tag is wrong; None on a worker's link, which has no tags.
    """

    def __init__(self, link: str, verify: Verify | None) -> None:
        self._link = link
        self._verify = verify
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = 0  # of the bytes in the buffer that are not decoded yet
        self._end = 0  # of the bytes in the buffer
        self._letter = memoryview(b"")  # place for the next bytes of a long letter; empty while the buffer takes them
        self._frames = self._parse()

    def space(self) -> memoryview:
        """Return the place of the next bytes. Release it, or let it go, before `received`."""
        if self._letter:
            return self._letter[:]
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > BUFFER_BYTES:  # after a large envelope: an idle connection keeps no more
                self._buffer = bytearray(BUFFER_BYTES)
        elif self._end == len(self._buffer):  # with the beginning of a frame
            begun = self._buffer[self._start :]
            self._buffer = begun + bytes(max(BUFFER_BYTES, len(begun)))
            self._start, self._end = 0, len(begun)
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> list[Frame]:
        """Return the frames that `count` further bytes make whole, in their order."""
        if self._letter:
            self._letter = self._letter[count:]
        else:
            self._end += count
        found: list[Frame] = []
        for frame in self._frames:
            if frame is None:
                return found
            found.append(frame)
        raise ProtocolError("a peer's mistake was read before: nothing behind it is a frame")

    def close(self) -> None:
        """Let the buffer go now: parser and reader refer to each other. The reader may be at work in another thread."""
        with contextlib.suppress(ValueError):
            self._frames.close()

    def _parse(self) -> Generator[Frame | None, None, None]:
        """Give each frame, and None where bytes are missing. Nothing here holds a frame that was given."""
        while True:
            yield (yield from self._read_frame())

    def _read_frame(self) -> Generator[None, None, Frame]:
        """Return the next frame; give None where bytes are missing."""
        tag_bytes = TAG_BYTES if self._verify else 0
        while self._end - self._start < HEAD.size:
            yield None
        number, flags, zero, length = HEAD.unpack_from(self._buffer, self._start)
        if length > MAX_ENVELOPE_BYTES:
            raise ProtocolError(f"an envelope of {length} bytes; the limit is {MAX_ENVELOPE_BYTES}")
        end = HEAD.size + length
        while self._end - self._start < end + tag_bytes:
            yield None
        whole = self._take(end + tag_bytes)
        envelope = whole[HEAD.size : end]
        if self._verify:
            self._verify(whole[: HEAD.size], envelope, whole[end:])
        if number not in _KINDS or zero:
            raise ProtocolError(f"no head of kind {number} and {zero} is known")
        body, lengths = self._decode(_KINDS[number], flags, envelope)
        for at, length in enumerate(lengths):
            letter = yield from self._read_letter(length)
            digest = body.digests[DIGEST_BYTES * at : DIGEST_BYTES * (at + 1)]
            body.longs.append(LongLetter((letter,), digest, length))
        return Frame(_KINDS[number], body)

    def _take(self, count: int) -> bytes:
        """Take bytes out of the buffer, as many as there are up to `count`."""
        taken = bytes(memoryview(self._buffer)[self._start : min(self._start + count, self._end)])
        self._start += len(taken)
        return taken

    def _decode(self, kind: Kind, flags: int, envelope: bytes) -> tuple[Any, list[int]]:
        """Decode a verified envelope: the body, and the lengths of its long letters."""
        if self._link not in DIRECTIONS[kind]:
            raise ProtocolError(f"{kind.name} may not travel here ({self._link})")
        body, lengths = frames.decode(kind, flags, envelope)
        if (self._link, kind) in LINK_FIELDS:
            check_fields(kind.name, body, LINK_FIELDS[self._link, kind])
        return body, lengths

    def _read_letter(self, length: int) -> Generator[None, None, bytearray]:
        """Return a long letter; give None where bytes are missing. Its memory grows as they arrive."""
        letter = bytearray()
        filled = 0
        while filled < length:
            missing = length - filled
            if self._start < self._end:
                letter[filled:] = self._take(missing)
                filled = len(letter)
            elif missing < DIRECT_BYTES:
                yield None
            else:
                if filled == len(letter):  # little memory for a length alone, then 8 MiB, then twice the bytes
                    least = LETTER_STEP_BYTES if filled >= DIRECT_BYTES else BUFFER_BYTES
                    begun, letter = letter, bytearray(min(length, max(2 * filled, least)))
                    letter[:filled] = begun
                self._letter = memoryview(letter)[filled:]
                yield None
                filled = len(letter) - len(self._letter)
                self._letter = memoryview(b"")
        return letter


def keep_freed_memory() -> None:
    """Let malloc keep the memory of long letters for the next ones: a third of their cost is new pages. glibc alone.

    For processes of ours, not for a caller's. Before the first thread.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, KEPT_BYTES)

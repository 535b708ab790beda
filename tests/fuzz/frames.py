"""Search for bytes that break a parser, guided by coverage (atheris, which is libFuzzer for Python).

In an environment with atheris and the checkout:

    pip install atheris .
    python tests/fuzz/frames.py -max_total_time=600

Options are libFuzzer's; further arguments are folders of inputs, of which the first is written to. Without one it
begins with the frames of every kind. The first byte of an input says what it is given to: the frame decoder of one
of the six links, with or without a signature, the parser of one kind's envelope, or the handshake. What is found
is written to a file `crash-...`; the command with that file as its argument runs it again.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["achilles", "json"]):
    import json.decoder
    import json.scanner

    from achilles.protocol import frames, kinds, reader
    from achilles.protocol.frames import Batch, Kind, LongLetter

import targets

LINKS = sorted({link for links in kinds.DIRECTIONS.values() for link in links})
# The C scanner cannot be watched: the same grammar in Python lets the fuzzer see how far into it an input came.
json.decoder.scanstring = json.decoder.py_scanstring  # type: ignore[attr-defined]
json.decoder.c_scanstring = None  # type: ignore[attr-defined]
json.scanner.c_make_scanner = None  # type: ignore[attr-defined]
json.scanner.make_scanner = json.scanner.py_make_scanner  # type: ignore[attr-defined]
json.decoder.scanner.make_scanner = json.scanner.py_make_scanner  # type: ignore[attr-defined]
json._default_decoder = json.decoder.JSONDecoder()  # type: ignore[attr-defined]

# So that short inputs, too, make the buffers move and grow.
reader.BUFFER_BYTES, reader.DIRECT_BYTES, reader.LETTER_STEP_BYTES = 64, 16, 256

STEPS = (1, 7, 64, 1 << 16)  # bytes in one piece
SIGNED, PAYLOAD, HANDSHAKE = 0x40, 0x80, 0xC0  # the two highest bits of the first byte; 0 is an unsigned stream


def run_one(data: bytes) -> None:
    """One input."""
    if not data:
        return
    mode, low, rest = data[0] & 0xC0, data[0] & 0x3F, data[1:]
    link, step = LINKS[low % len(LINKS)], STEPS[low // len(LINKS) % len(STEPS)]
    if mode == PAYLOAD:
        targets.check_control(list(Kind)[low % len(Kind)], rest)
    elif mode == HANDSHAKE:
        targets.check_handshake(rest)
    elif mode == SIGNED:
        targets.check_signed_stream(link, rest, step)
    else:
        targets.check_stream(link, rest, step)


def seeds() -> list[bytes]:
    """An input for each kind on each of its links, and for each payload."""
    values = {"python": "3.11", "version": "1.0.0", "reason": "leaving", "code": "full", "context": "0f" * 16,
              "message": "", "pythons": {"3.11": 1},
              "nodes": [{"id": 0, "address": "10.0.0.2", "python": "3.11", "version": "1", "cpu_count": 8, "busy": 3,
                         "done": 12, "since": 1.5}],
              "jobs": [{"id": 7, "user": "ann", "queued": 5, "running": 3, "done": 9}],
              "server": {"version": "1", "uptime": 1.5, "memory": 1}}
    data = bytes(range(256)) * 5
    long = LongLetter((data,), frames.digest([data]), len(data))
    options = '"timeout":2.5,"maxtasksperchild":1,"seed":"%s","call":"star"' % ("0f" * 32)
    declaration = f'{{"context":"{"0f" * 16}","initializer":true,{options}}}'.encode()
    claim = b"ACHL\0\1C\0" + bytes(32) + b"ann".ljust(64, b"\0")
    found = [bytes([HANDSHAKE]) + message for message in (targets.GREETING, claim)]
    for kind, links in kinds.DIRECTIONS.items():
        if kind is Kind.JOB:
            body = Batch.pack(7, 0, [declaration, long, b"initializer"])
        elif kind in kinds.LETTERS:
            body = Batch.pack(7, 3, [b"ab", long], attempt=1, statuses=b"\0\1" if kind is Kind.RESULT else b"")
        elif kind in kinds.RANGES:
            body = Batch(7, *(low for low, _ in kinds.RANGES[kind]))
        else:
            fields = kinds.FIELDS[kind] | kinds.SERVER_FIELDS[kind]
            numbers = {"nodes": 1} if kind is Kind.CLUSTER else {}
            body = {name: (values | numbers).get(name, 7) for name in fields}
        frame = frames.Frame(kind, body)
        found += [bytes([LINKS.index(link)]) + 2 * targets.encoded(frame) for link in links]
        found.append(bytes([SIGNED | LINKS.index(links[0])]) + targets.encoded(frame) + bytes(32))
        found.append(bytes([PAYLOAD | list(Kind).index(kind)]) + frames.encode(kind, body)[0][frames.HEAD.size :])
    return found


def main() -> None:
    """The command; libFuzzer ends the process itself."""
    arguments = list(sys.argv)
    if all(argument.startswith("-") for argument in arguments[1:]):
        folder = tempfile.mkdtemp(prefix="seeds-")
        for number, seed in enumerate(seeds()):
            with open(os.path.join(folder, str(number)), "wb") as file:
                file.write(seed)
        arguments.append(folder)
        if os.fork():  # libFuzzer leaves by _exit, without a finally: who waits for it clears up
            _, status = os.wait()
            shutil.rmtree(folder)
            sys.exit(os.waitstatus_to_exitcode(status))
    atheris.Setup(arguments, run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The other process: loads, calls, dumps. Its package has another name, and it cannot see the cases.

Run as `python -c <this text> <folder> <package> <its module of letters> <its module of outcomes>`. Reads pickled
requests (context, initializer letters, function letter, chunk letter) with a length of 8 bytes in front, and
answers (raised, letter).
"""

import importlib
import pickle
import struct
import sys

sys.path[:] = [sys.argv[1], *(path for path in sys.path if path)]
letters, outcomes = (importlib.import_module(f"{sys.argv[2]}.{name}") for name in sys.argv[3:5])
contexts, functions = {}, {}


def answer(name, initializers, function_letter, chunk_letter):
    context = contexts.setdefault(name, letters.Context(caller=False))
    for letter in initializers:
        function, arguments = context.load(bytearray(letter))
        function(*arguments)
    if (name, function_letter) not in functions:
        functions[name, function_letter] = context.load(bytearray(function_letter))
    function = functions[name, function_letter]
    arguments, skipped = letters.load_chunk(context, bytearray(chunk_letter))
    values, errors = [None] * len(arguments), {}
    for offset, argument in enumerate(arguments):
        if offset in skipped:
            continue
        try:
            values[offset] = function(argument)
        except BaseException as error:
            errors[offset] = error
    raised, parts = outcomes.dump_outcomes(context, values, errors)
    return raised, b"".join(parts)


while True:
    head = sys.stdin.buffer.read(8)
    if not head:
        break
    request = pickle.loads(sys.stdin.buffer.read(*struct.unpack(">Q", head)))
    try:
        reply = answer(*request)
    except Exception as failure:
        reply = failure
    data = pickle.dumps(reply)
    sys.stdout.buffer.write(struct.pack(">Q", len(data)) + data)
    sys.stdout.buffer.flush()

"""The outcomes of a chunk as a letter: values, and exceptions with their tracebacks.

Knows letters. Knows no jobs or frames: the caller says an answer's status. Any thread may call this.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import traceback
from collections.abc import Iterable
from typing import Any

from ..errors import AchillesError, DumpError, RemoteError
from .letters import PICKLE_START, Buffer, Context, dump_plain, text_of

__all__ = ["dump_outcomes", "encoding_error", "fresh", "load_outcomes", "load_values", "mark", "own_error"]


def dump_outcomes(context: Context, values: list[Any],
                  errors: dict[int, BaseException]) -> tuple[bool, list[Buffer]]:
    """Turn a chunk's outcomes into a letter, in the worker; never raises for the user's values.

    :param values: a value for each offset, ignored where there is an error.
    :param errors: exceptions by offset. An exception that cannot be rebuilt travels as text.
    :returns: whether there is any error, and the letter. A value that cannot be dumped becomes a
        `multiprocessing.pool.MaybeEncodingError` at its offset.
    """
    if not errors:
        try:
            return False, dump_plain(values) or context.dump(values, plain=False)
        except DumpError:
            pass
    outcomes: list[Any] = []
    for offset, value in enumerate(values):
        try:
            found = _error_entry(context, errors[offset]) if offset in errors else b"".join(context.dump(value))
        except DumpError as error:
            found = *_error_entry(context, encoding_error(own_error(error), value))[:2], ""  # of no user code
        outcomes.append(found)
    return True, context.dump([outcomes, context.node])


def load_outcomes(context: Context, letter: Buffer,
                  raised: bool) -> tuple[list[Any], dict[int, BaseException]]:
    """The values of a chunk and its exceptions by offset, in the caller.

    Each exception has the remote traceback, a `multiprocessing.pool.RemoteTraceback`, as `__cause__`, and the node's id
    as `node`. An exception that cannot be rebuilt is a `RemoteError` with its text.
    """
    loaded = context.load(letter)
    if not raised:
        return loaded, {}
    outcomes, node = loaded
    values = [context.load(bytearray(each)) if type(each) is bytes else None for each in outcomes]
    errors = {offset: each for offset, each in enumerate(outcomes) if type(each) is tuple}
    return values, {offset: _error_of(context, node, *each) for offset, each in errors.items()}


def load_values(context: Context, letters: Iterable[Buffer]) -> list[list[Any]]:
    """The values of many chunks without errors; quicker than `load_outcomes` of each chunk."""
    return [pickle.loads(letter) if letter[0] == PICKLE_START else context.load(letter) for letter in letters]


def encoding_error(error: BaseException, value: Any) -> BaseException:
    """`multiprocessing.pool.MaybeEncodingError` of a value that cannot travel, with a short repr."""
    made: Any = importlib.import_module("multiprocessing.pool").MaybeEncodingError(None, None)
    made.exc, made.value = made.args = text_of(error), text_of(value)
    return made  # type: ignore[no-any-return]


def mark(error: BaseException, **attributes: object) -> Any:
    """Give an error these attributes. It keeps its own, and may refuse them."""
    for name, value in attributes.items():
        with contextlib.suppress(Exception):  # of a property
            if isinstance(error, AchillesError) or not hasattr(error, name):
                BaseException.__setattr__(error, name, value)
    return error


def own_error(error: Any) -> Any:
    """The error that `multiprocessing` raises: pickle's own, unless our error says where the object is."""
    if not isinstance(error, DumpError) or error.where or error.__cause__ is None:
        return error
    return error.__cause__


def _error_entry(context: Context, error: BaseException) -> tuple[bytes | None, str, str]:
    """The parts of an exception: its letter, if that loads as an exception, its text, its traceback."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # of an attribute that raises
        text = "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__
    try:
        letter = b"".join(context.dump(error, plain=False))
        travels = isinstance(context.load(letter), BaseException)
    except Exception:
        travels = False
    return letter if travels else None, f"{type(error).__qualname__}: {text_of(error, str)}", text


def _error_of(
    context: Context, node: int | None, letter: bytes | None, text: str, remote_traceback: str
) -> BaseException:
    error: BaseException = RemoteError(text)
    with contextlib.suppress(Exception):  # of a module or class that only the node has: the text stays
        loaded = context.load(letter) if letter is not None else None
        error = loaded if isinstance(loaded, BaseException) else error
    if remote_traceback:
        cause = importlib.import_module("multiprocessing.pool").RemoteTraceback(remote_traceback)
        BaseException.__setattr__(error, "__cause__", cause)  # a frozen dataclass refuses an assignment
    return mark(error, node=node)  # type: ignore[no-any-return]


def fresh(error: BaseException) -> BaseException:
    """A copy of our exception for each caller: threads that raise the same object share its traceback."""
    if not isinstance(error, (AchillesError, InterruptedError)):
        return error
    made = type(error)(*error.args)
    made.__dict__.update(error.__dict__)
    made.__cause__ = error.__cause__
    return made

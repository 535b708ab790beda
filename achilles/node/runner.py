"""The Runner: it loads a job's function, runs chunks, and dumps their results.

The module knows contexts, functions and chunks of one process, and no frame, socket or node. A worker uses it
(`worker.py`), and so does an executor's process (`dropin/engine.py`). One thread calls a Runner.

The Runner writes chunk, offset and phase into the status array of `board.py`, and reads the limit there.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from ..objects.letters import Context, load_chunk
from ..objects.outcomes import dump_outcomes
from ..objects.sources import install
from ..protocol.frames import Buffer, Letter, LongLetter, Status, digest, joined
from .board import CALL, CHUNK, DUMP, FUNCTION, IDLE, LIMIT, LOAD, NO_LIMIT, OFFSET, PHASE, UNNAMED

__all__ = ["Runner"]

Answer: TypeAlias = "tuple[int, Sequence[Buffer]]"  # a chunk's status, and its letter in parts
ALTERED: Answer = (Status.ALTERED, (b"",))  # a letter does not match its digest


class _Prepared:
    """A context's or a job's letter, loaded once."""

    def __init__(self, payload: Context, letter: Letter | None) -> None:
        self.payload = payload
        self.letter = letter  # not loaded yet
        self.failure: Answer | None = None  # of the loading: the answer of every chunk

    def prepare(self, use: Callable[[Any], object]) -> Answer | None:
        """At the first call, load the letter and use its object. Return the failure."""
        letter, self.letter = self.letter, None
        try:
            if isinstance(letter, LongLetter) and not letter.whole():
                self.failure = ALTERED
            elif letter is not None:
                use(self.payload.load(joined(letter)))
        except BaseException as error:  # of the user's code, of any class
            self.failure = _failure(self.payload, error)
        return self.failure


class _RunnerJob(_Prepared):
    """A job in this process. Its letter is the function's."""

    def __init__(
        self, context: _Prepared, sources: _Prepared, declaration: dict[str, Any], letter: Letter
    ) -> None:
        super().__init__(context.payload, letter)
        self.context, self.sources = context, sources  # their letters are the initializer and the sources
        self.declaration = declaration
        self.function: Any = None  # as `set_function` made it

    def set_function(self, pair: tuple[Any, Any]) -> None:
        """Keep the function in the form that takes an argument of a chunk: PROTOCOL.md, section 6."""
        function, callback = pair
        call, seed = self.declaration.get("call"), self.declaration.get("seed")
        if call in _CALLS:
            function = functools.partial(_CALLS[call], function)
        if seed is not None:
            function = functools.partial(_call_seeded, function, bytes.fromhex(seed))
        self.function = function if callback is None else lambda x: callback(function(x))


class Runner:
    """Jobs and contexts of one process.

    :param status: the status array of `board.py`, a memoryview or list; by default a list that no node sees.
    :param node: the node's id, which exceptions name.
    :param own: whether the process is ours: then its ``__main__`` may be the caller's script.
    """

    def __init__(self, status: Any = None, node: int | None = None, own: bool = False) -> None:
        self._status: Any = [UNNAMED, UNNAMED, IDLE, NO_LIMIT] if status is None else status
        self._make_context = functools.partial(Context, caller=False, node=node, own=own)
        self.contexts: dict[str, _Prepared] = {}  # until CLOSE
        self._sources = {None: _Prepared(self._make_context(), None)}  # by the name of their set, never removed
        self.jobs: dict[int, _RunnerJob] = {}  # until END
        self._left: Iterator[Any] = iter(())  # the next arguments of the chunk that runs

    def declare(
        self, number: int, declaration: dict[str, Any], function: Letter, initializer: Letter = b"",
        sources: Letter = b"",
    ) -> None:
        """Keep the letters of a JOB until the job's first batch.

        :param declaration: see PROTOCOL.md, section 6.
        :param function: the letter of a pair: the function, and a callback or None.
        :param initializer: the letter of a pair: a callable and its arguments. A known context ignores it, and a known
            set ignores its `sources`.
        """
        name, set_name = declaration["context"], declaration.get("sources")
        if name not in self.contexts:
            self.contexts[name] = _Prepared(self._make_context(), initializer or None)
        if sources and (set_name not in self._sources or self._sources[set_name].failure):
            self._sources[set_name] = _Prepared(self._make_context(), sources)
        self.jobs[number] = _RunnerJob(self.contexts[name], self._sources[set_name], declaration, function)

    def run(self, job_number: int, first: int, letters: Sequence[Letter], careful: bool = False) -> Iterator[Answer]:
        """Call the context's initializer and load the job's function, each once. Then run the job's chunks.

        :param first: the number of the first chunk.
        :param careful: whether to name each argument, since an argument may end this process.
        :returns: an iterator. Each step runs a chunk, up to the limit, and gives its answer. A part may be a view of
            the function's memory, and may change when the next chunk runs.
        """
        status, job = self._status, self.jobs[job_number]
        status[CHUNK] = first
        status[PHASE] = FUNCTION
        failure = None
        if first < status[LIMIT]:
            job.payload.become_main()
            failure = (job.sources.prepare(install) or job.context.prepare(lambda pair: pair[0](*pair[1]))
                       or job.prepare(job.set_function))
        return self._answers(job, first, letters, careful, failure)

    def _answers(
        self, job: _RunnerJob, first: int, letters: Sequence[Letter], careful: bool, failure: Answer | None
    ) -> Iterator[Answer]:
        """Yield the answer of each chunk: the failure, if there is any."""
        status, run = self._status, self._run
        for number, letter in enumerate(letters, first):
            status[CHUNK] = number
            if number >= status[LIMIT]:
                break
            yield failure or run(job, letter, careful)
        status[PHASE] = IDLE

    def _run(self, job: _RunnerJob, letter: Letter, careful: bool) -> Answer:
        status, context = self._status, job.payload
        status[PHASE] = LOAD
        try:
            if type(letter) is LongLetter:
                if not letter.whole():
                    return ALTERED
                letter = joined(letter)
            arguments, skipped = load_chunk(context, letter)  # type: ignore[arg-type]
        except BaseException as error:
            return _failure(context, error)
        status[OFFSET] = offset = 0 if len(arguments) == 1 else UNNAMED
        status[PHASE] = CALL
        if offset == UNNAMED or skipped:
            # The node needs the offset for a time limit, and for the index of a line of output.
            named = careful or skipped or job.declaration.get("timeout") or job.declaration.get("output")
            values, errors = self._call(job.function, arguments, skipped, bool(named))
        else:  # as `_call` for one argument, in two thirds of its time
            try:
                values, errors = [job.function(arguments[0])], {}
            except BaseException as error:
                values, errors = [None], {0: _without_own_frame(error)}
        status[PHASE] = DUMP
        if careful:  # first each value alone, so that a deadly value is named
            for status[OFFSET], value in enumerate(values):
                with contextlib.suppress(Exception):
                    context.dump(value)
        status[OFFSET] = offset
        answer = dump_outcomes(context, values, errors)  # False and True are the numbers of VALUES and RAISED
        if errors:
            errors.clear()  # else tracebacks and frames keep each other alive
        return answer

    def abandon(self) -> None:
        """In a forked child of this process, call no further argument and run no further chunk.

        The status array is released: the Runner raises ValueError after the function has returned.
        """
        list(self._left)
        self._status.release()

    def _call(
        self, function: Callable[[Any], Any], arguments: list[Any], skipped: frozenset[int], named: bool
    ) -> tuple[list[Any], dict[int, BaseException]]:
        """Return a value for each offset (None if skipped or raised), and the exceptions by offset.

        :param named: whether to write each offset to the status array. It must be true if any is skipped.
        """
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        self._left = left = iter(arguments)
        status, append = self._status, values.append
        while True:  # again after each exception
            try:
                for argument in left:
                    if named:
                        status[OFFSET] = len(values)
                        if len(values) in skipped:
                            append(None)
                            continue
                    append(function(argument))
                return values, errors
            except BaseException as error:  # of the last argument taken, even if it has a value already
                offset = len(arguments) - 1 - operator.length_hint(left)
                if offset < 0 or offset in skipped:  # a signal handler raised outside of the calls
                    raise
                del values[offset:]
                append(None)
                errors[offset] = _without_own_frame(error)


_CALLS: dict[str | None, Callable[..., Any]] = {
    "star": lambda function, x: function(*tuple(x)),  # as itertools.starmap
    "apply": lambda function, x: function(*x[0], **x[1]),
}


def _call_seeded(function: Callable[[Any], Any], seed: bytes, x: tuple[int, Any]) -> Any:
    """Call with the same random numbers for the same seed and index, in every worker."""
    index, argument = x
    state = digest([seed, b"%d" % index])
    random.seed(state)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(numpy.frombuffer(state, "<u4"))
    return function(argument)


def _failure(context: Context, error: BaseException) -> Answer:
    """Return FAILED, with the letter of a chunk of one argument that raised this error."""
    return Status.FAILED, dump_outcomes(context, [None], {0: _without_own_frame(error)})[1]


def _without_own_frame(error: BaseException) -> BaseException:
    """Begin the traceback in the user's code."""
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)

"""Every exception that achilles raises for a reason of its own.

Each class is also a built-in exception. So ``except TimeoutError`` works
without an import from here. Exceptions of the caller's own function are not
in this tree: they come back as themselves.

::

    AchillesError
     +-- ConfigurationError   ValueError           a setting is missing, malformed or unsafe
     +-- AuthenticationError  PermissionError      the server refused the username or the secret
     +-- ServerUnreachable    ConnectionError      no connection, or it was lost for too long
     +-- ClusterKilled        ConnectionError      somebody ran kill_cluster
     +-- ProtocolError        ConnectionError      a peer broke the rules of PROTOCOL.md
     +-- AddressError         OSError              the server cannot listen at this address
     +-- VersionError         RuntimeError         Python versions, or a dependency that is too old
     +-- NoNodesError         TimeoutError         no node joined within wait_for_nodes
     +-- DumpError            TypeError            a function or an argument cannot become bytes
     +-- LetterTooLarge       ValueError           a function or an argument becomes more bytes than may travel
     +-- TaskError            RuntimeError         one argument has no result, through no exception of its own
          +-- WorkerLost                           its worker, or ten nodes in a row, died under it
          +-- TaskTimeout     TimeoutError         it ran longer than `timeout`
          +-- LetterAltered                        its bytes were altered on the way, three times in a row
          +-- RemoteError                          its exception could not be rebuilt here; this is the text

Imports nothing. Any thread may raise any of them.
"""

__all__ = [
    "AchillesError", "AddressError", "AuthenticationError", "ClusterKilled", "ConfigurationError",
    "DumpError", "LetterAltered", "LetterTooLarge", "NoNodesError", "ProtocolError", "RemoteError",
    "ServerUnreachable", "TaskError", "TaskTimeout", "VersionError", "WorkerLost",
]


class AchillesError(Exception):
    """The root of the tree."""


class ConfigurationError(AchillesError, ValueError):
    """A setting is missing, malformed or unsafe; the message names every way to give it."""


class AuthenticationError(AchillesError, PermissionError):
    """The server refused the username, the secret or the role. It does not say which."""


class ServerUnreachable(AchillesError, ConnectionError):
    """No connection to the server was made, or a lost connection was not restored in time."""


class ClusterKilled(AchillesError, ConnectionError):
    """``kill_cluster`` ended the cluster while a call was running."""


class ProtocolError(AchillesError, ConnectionError):
    """A peer broke the rules of PROTOCOL.md; the connection is closed."""


class AddressError(AchillesError, OSError):
    """The server cannot listen at its address."""


class VersionError(AchillesError, RuntimeError):
    """The Python versions of caller and nodes differ, or a dependency is too old."""


class NoNodesError(AchillesError, TimeoutError):
    """No node joined the cluster within ``wait_for_nodes`` seconds."""


class DumpError(AchillesError, TypeError):
    """A function or an argument cannot become bytes; ``__cause__`` is the dumper's own error.

    :ivar where: the global, default, variable or attribute that holds the object; "" for the function or argument.
    """

    where: str = ""


class LetterTooLarge(AchillesError, ValueError):
    """A function or an argument has more bytes than may travel in one piece."""


class TaskError(AchillesError, RuntimeError):
    """An argument has no result, and its function raised no exception that could be shown.

    :ivar index: the argument's place in ``args``, from 0; None until it is known.
    :ivar node: the id of the node; None without a node.
    """

    index: int | None = None
    node: int | None = None


class WorkerLost(TaskError):
    """The worker died under this argument three times, or ten nodes in a row did.

    :ivar pid: the last worker's process id, on its node; None for lost nodes.
    :ivar exitcode: as in ``Process.exitcode``: the status, or minus the signal's number; None for lost nodes.
    """

    pid: int | None = None
    exitcode: int | None = None


class TaskTimeout(TaskError, TimeoutError):
    """The function took longer than ``timeout`` seconds with this argument."""


class LetterAltered(TaskError):
    """The bytes of an argument or of its result did not match their digest, three times in a row."""


class RemoteError(TaskError):
    """An exception that could not be rebuilt in the caller: its type, text and traceback."""

"""Look up host, port, username, secret and encryption: each by itself, in the first place that has it.

::

    argument      host=           port=           username=           secret_key=           encrypt=
    environment   ACHILLES_HOST   ACHILLES_PORT   ACHILLES_USERNAME   ACHILLES_SECRET_KEY   ACHILLES_ENCRYPT
    file          HOST=           PORT=           USERNAME=           SECRET_KEY=           ENCRYPT=
    prompt        on a terminal: `configuring.py` asks for the first four, and saves the answers in the file
    otherwise     ConfigurationError: the missing names, and every way to give them (9999 is the port, "no" the last)

The file is `env_file`, else the file that `ACHILLES_ENV_FILE` names, else `.env` beside this module. The file is
opened only when one of the first four is still missing. An empty value counts: an empty secret is an error, and the
next place is not asked.

A file has one setting a line. Other lines belong to others, and stay as they are::

    # a comment
    export HOST=10.0.0.1        # bare: up to white space and a "#"; "export " may be left out
    USERNAME='it is # literal'  # between single quotes, nothing is special
    SECRET_KEY="a \\"b\\" \\$c"    # between double quotes, a backslash takes the meaning from \\ " $ `

A POSIX shell reads these lines the same way.

`host="local"` (a cluster of the caller's own process) needs no settings: do not call :func:`resolve` then.

This module knows no socket, no frame and no key derivation. At import it reads no environment. It starts no thread,
and has no state and no lock: any thread may call any function. Only disks and prompts block. A secret is never
logged, pickled or put into a message. A function that may raise holds the secret as a Secret, because some
tracebacks show local variables.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, NoReturn

from .errors import ConfigurationError

__all__ = [
    "DEFAULT_HOST", "DEFAULT_PORT", "SETTING", "EnvFile", "Found", "Role", "Secret", "SecretKey", "Settings", "check",
    "check_secret", "checked", "env_path", "is_loopback", "of_arguments", "of_environment",
    "of_file", "read_again", "read_file", "read_lines", "read_secret_file", "remove_from_environment", "resolve",
]

DEFAULT_HOST = "127.0.0.1"  # the prompt proposes it; without a prompt, a host must be given
DEFAULT_PORT = 9999  # the original's
USERNAME_BYTES = 32  # the width of the user field in the handshake
SECRET_CHARACTERS = 16  # a recorded handshake lets a shorter secret be guessed

NAMES = ("HOST", "PORT", "USERNAME", "SECRET_KEY", "ENCRYPT")
REQUIRED = ("HOST", "USERNAME", "SECRET_KEY")  # the others have defaults
WORDS = {"yes": True, "no": False}  # of ENCRYPT
PREVIOUS = "PREVIOUS_SECRET_KEY"  # a server accepts it too, while a secret is being replaced
in_worker = False  # this process is a worker of ours, or a child of one: node/worker.py says so
PACKAGE = __package__  # the package's name in commands that messages show; a renamed copy has its own
PREFIX = "ACHILLES_"  # of environment variables; the same in a renamed copy of the package
MAKE_ONE = 'Make a good one: python -c "import secrets; print(secrets.token_urlsafe(32))"'

# Patterns are texts: a process that needs none of them, such as a local cluster's, compiles none.
_UNFIT = r"[\x00\r\n\ud800-\udfff]"  # NUL, the ends of a file's line, and the characters for broken UTF-8
SETTING = (  # a line of a file, or no match if the line belongs to others
    rf"""(?x)[ \t]*(?:export[ \t]+)? (?P<name>{'|'.join((*NAMES, PREVIOUS))}) [ \t]*="""
    r"""(?: [ \t]* (?: '(?P<literal>[^']*)' | "(?P<escaped>(?:[^"\\]|\\.)*)" | (?P<bare>(?:[^'"\#\s].*?)?) )"""
    r"""(?:[ \t]+\#.*)? [ \t]* | (?P<wrong>.*) )""")

Role = Literal["controller", "node", "server"]
EnvFile = str | os.PathLike[str] | None  # None: the file that ACHILLES_ENV_FILE names, else the package's own .env
Found = dict[str, tuple[Any, str]]  # a setting's name -> its value (a secret as a Secret), and where it came from


class Secret:
    """A shared secret that prints as ``***`` everywhere, and cannot be pickled.

    :param text: the secret, or another Secret; ConfigurationError for other types.
    :param source: where the secret came from, for messages; "" where the caller's name for it is better.
    """

    __slots__ = ("_text", "source")

    def __init__(self, text: object, source: str = "") -> None:
        value, origin = (text._text, text.source) if isinstance(text, Secret) else (text, "")
        if not isinstance(value, str):
            raise ConfigurationError(f"the secret must be text, not {type(value).__name__}")
        self._text: str = value
        self.source: str = source or origin

    def reveal(self) -> str:
        """Return the secret itself: for deriving keys, and for the file."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled or copied: it must not leave its process")


SecretKey = str | Secret | None


class Settings(NamedTuple):
    """One complete, checked configuration; printing it shows no secret.

    :ivar host: name or address of the server.
    :ivar port: 0..65535; a server takes any free port for 0.
    :ivar username: 1 to 32 bytes of UTF-8.
    :ivar secret: proves that a peer belongs to this cluster.
    :ivar env_file: the file that the *secret* came from; None if the secret came from elsewhere.
    :ivar previous: a second secret that a server accepts; always None for the other roles.
    :ivar encrypt: whether connections are encrypted by TLS. Both sides must say the same.
    """

    host: str
    port: int
    username: str
    secret: Secret
    env_file: str | None = None
    previous: Secret | None = None
    encrypt: bool = False


def resolve(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, ask: bool = True, role: Role = "controller",
    bind: str | None = None, encrypt: bool | None = None,
) -> Settings:
    """Find the settings, each by itself, in the order that the head of this module shows.

    :param ask: whether a person at a terminal may be asked for missing settings (this blocks, and saves).
    :param role: the process that needs the settings. A server also gets a `previous` secret, if the environment
        has it, or the file that its secret is in. With a `secret_key` argument there is none.
    :param bind: another address at which a server listens; its secrets must be good enough for that address too.
    :raises ConfigurationError: a setting is missing, malformed or unsafe.
    """
    path = env_path(env_file)
    given = of_environment(NAMES) | of_arguments(host, port, username, secret_key, encrypt)
    found = given if given.keys() >= {*REQUIRED, "PORT"} else of_file(path) | given
    if not found.keys() >= set(REQUIRED):
        from .configuring import ask_missing, missing

        if not (ask and sys.stdin is not None and sys.stdin.isatty()):
            raise ConfigurationError(missing(found, path, role))
        checked(found, bind)  # a wrong setting is refused before a person types the others
        ask_missing(found, path, role)
        found = of_file(path) | given
    own = "SECRET_KEY" not in given
    if not own or role != "server":  # the file's previous secret goes with the file's secret alone
        found.pop(PREVIOUS, None)
    if secret_key is None and role == "server":
        found |= of_environment((PREVIOUS,))
    values = {"PORT": DEFAULT_PORT, "ENCRYPT": False} | checked(found, bind)
    return Settings(values["HOST"], values["PORT"], values["USERNAME"], values["SECRET_KEY"],
                    env_file=path if own else None, previous=values.get(PREVIOUS), encrypt=values["ENCRYPT"])


def read_again(settings: Settings, role: Role, bind: str | None = None) -> Settings:
    """Return the same settings with the secrets that their file has now.

    :raises ConfigurationError: the settings came from no file. Or the file cannot be read, is open to others, or has
        no good secret. The message is one line.
    """
    if settings.env_file is None:
        raise ConfigurationError("the secret did not come from a configuration file, so there is none to read")
    if "SECRET_KEY" not in read_file(settings.env_file):
        raise ConfigurationError(f"{settings.env_file} has no SECRET_KEY")
    return resolve(*settings[:3], env_file=settings.env_file, ask=False, role=role, bind=bind, encrypt=settings.encrypt)


def check(name: str, value: Any, source: str) -> Any:
    """Return `value`, if it is a good HOST, PORT, USERNAME or ENCRYPT.

    A PORT of decimal digits becomes an int, and "yes" or "no" a bool; an argument must be one. A host is not looked up.

    :raises ConfigurationError: the value is not good, or this Python cannot encrypt; the message names `source`.
    """
    if name == "ENCRYPT" and source != "encrypt":
        value = WORDS.get(value, value)
    if name == "PORT" and source != "port" and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    is_good, rule = _RULES[name]
    if not is_good(value):
        raise ConfigurationError(f"{source} must be {rule}, not {value!r}")
    if name == "ENCRYPT" and value:
        from .configuring import check_encryption

        check_encryption(source)
    return value


def _is_host(value: Any) -> bool:
    """Whether `socket` can look `value` up: for other names, it raises a UnicodeError, which is no OSError."""
    try:
        return isinstance(value, str) and value.isprintable() and " " not in value and value.encode("idna") != b""
    except UnicodeError:
        return False


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "HOST": (_is_host, "a host's name or address"),
    "PORT": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535,
        "an int in 0..65535"),
    "USERNAME": (
        lambda value: isinstance(value, str) and not re.search(_UNFIT, value)
        and 1 <= len(value.encode()) <= USERNAME_BYTES,
        f"1 to {USERNAME_BYTES} bytes of UTF-8 without NUL and line breaks"),
    "ENCRYPT": (lambda value: isinstance(value, bool), "True or False, and outside Python yes or no"),
}


def is_loopback(host: str) -> bool:
    """Whether `host` is 127.0.0.0/8, ::1 or localhost. Other names count as reachable by others."""
    return re.fullmatch(r"(?i:127(\.[0-9]{1,3}){3}|::1|localhost)", host) is not None


def check_secret(secret: Secret, host: str, source: str = "secret_key") -> Secret:
    """Return `secret`, if it is good enough for a cluster at `host`.

    :raises ConfigurationError: empty, not UTF-8, of several lines, or shorter than 16 characters where others can
        connect.
    """
    if not secret.reveal() or re.search(_UNFIT, secret.reveal()):
        raise ConfigurationError(f"{secret.source or source} is empty, or has a NUL, a line break or broken "
                                 f"UTF-8 in it. {MAKE_ONE}")
    if len(secret.reveal()) < SECRET_CHARACTERS and not is_loopback(host):
        raise ConfigurationError(f"{secret.source or source} is shorter than {SECRET_CHARACTERS} characters, "
                                 f"which is allowed on loopback alone, not at {host}. {MAKE_ONE}")
    return secret


def checked(found: Found, bind: str | None = None) -> dict[str, Any]:
    """Return the values of `found`. ConfigurationError, with the name of its source, if one is not good."""
    hosts = [str(found["HOST"][0]) if "HOST" in found else DEFAULT_HOST]
    hosts += [] if bind is None else [check("HOST", bind, "bind")]
    host = next((each for each in hosts if not is_loopback(each)), DEFAULT_HOST)  # the one that others can reach
    return {name: check(name, *given) if name in _RULES else check_secret(given[0], host, given[1])
            for name, given in found.items() if name != PREVIOUS or given[0].reveal()}  # an empty one is none at all


def env_path(env_file: EnvFile = None) -> str:
    """Return the absolute path of the file in use, whether the file exists or not."""
    return os.path.abspath(
        env_file or os.environ.get(f"{PREFIX}ENV_FILE") or os.path.join(os.path.dirname(__file__), ".env"))


def of_environment(names: Iterable[str]) -> Found:
    """Return the settings in this process's environment, empty ones too."""
    return {name: _given(name, os.environ[PREFIX + name], PREFIX + name)
            for name in names if PREFIX + name in os.environ}


def of_arguments(*values: object) -> Found:
    """Return the settings that a caller gave: host, port, username, secret, encrypt; None for the others."""
    return {name: _given(name, value, name.lower())
            for name, value in zip(NAMES, values, strict=True) if value is not None}


def of_file(path: str) -> Found:
    """Return the settings in the file; none if the file does not exist."""
    values = read_file(path) if os.path.exists(path) else {}
    return {name: _given(name, value, f"{name} in {path}") for name, value in values.items()}


def _given(name: str, value: object, source: str) -> tuple[Any, str]:
    return Secret(value) if name in ("SECRET_KEY", PREVIOUS) else value, source


def read_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return HOST, PORT, USERNAME, SECRET_KEY, ENCRYPT, PREVIOUS_SECRET_KEY, if the file has them, unchecked.

    :raises ConfigurationError: the file cannot be read, group or others have a right to it (POSIX modes), or a
        line cannot be understood. The message never shows the line: it may hold a secret.
    """
    values, wrong = _parse(read_lines(path, private=True))
    if wrong:
        values.clear()
        raise ConfigurationError(f"{path}, {wrong[0]} cannot be read; put it between single quotes")
    return values


def read_secret_file(path: str | os.PathLike[str] | None) -> Secret | None:
    """Return the secret in a file's first line, unchecked; None without a file. Raises as :func:`read_file`."""
    if path is None:
        return None
    return Secret((read_lines(path, private=True) or [""])[0].rstrip("\r"), f"the first line of {os.fspath(path)}")


def remove_from_environment() -> None:
    """Take both secrets out of this process's environment, before it starts processes that run users' code."""
    for name in ("SECRET_KEY", PREVIOUS):
        os.environ.pop(PREFIX + name, None)


def read_lines(path: str | os.PathLike[str], *, private: bool = False) -> list[str]:
    """Return the lines of a file. ConfigurationError if a `private` file is open to others, or cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if private and os.name == "posix" and mode & 0o077:  # any right of group and others
                raise ConfigurationError(f"{path} holds a secret and is open to others (mode {mode:04o}): "
                                         f"chmod 600 {shlex.quote(os.fspath(path))}")
            text = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    return text.removesuffix("\n").split("\n") if text else []


def _parse(lines: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the settings among the lines of a file; and the names of the values that cannot be understood."""
    found = [(number, setting) for number, line in enumerate(lines, 1) if (setting := re.fullmatch(SETTING, line))]
    wrong = [f"line {number}: the value of {setting['name']}" for number, setting in found if setting["wrong"]]
    return {setting["name"]: _plain(setting) for _, setting in found}, wrong


def _plain(setting: re.Match[str]) -> str:
    """Return the value that a file's line stands for."""
    return setting["literal"] or setting["bare"] or re.sub(r'\\([\\"$`])', r"\1", setting["escaped"] or "")

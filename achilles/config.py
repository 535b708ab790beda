"""Where host, port, username and secret come from, and the one file that keeps them.

Each of the four is looked up by itself, the first place that has it wins::

    argument        host=             port=            username=            secret_key=
    environment     ACHILLES_HOST     ACHILLES_PORT    ACHILLES_USERNAME    ACHILLES_SECRET_KEY
    file            HOST=             PORT=            USERNAME=            SECRET_KEY=
    prompt          on a terminal: asked, checked, saved in the file
    otherwise       ConfigurationError: what is missing, and every way to give it (a port is 9999)

The file is ``env_file``, else the one ``ACHILLES_ENV_FILE`` names, else ``.env`` beside this module. It is
opened only when something is still missing. What is given counts even when it is empty: an empty secret
is an error, and never passed over for one from elsewhere.

A file, line by line; lines of other names belong to others and are left as they are::

    # a comment
    export HOST=10.0.0.1        # bare: up to white space and a "#"; "export " may be left out
    USERNAME='it is # literal'  # between single quotes, nothing is special
    SECRET_KEY="a \\"b\\" \\$c"    # between double quotes, a backslash takes the meaning from \\ " $ `

So a POSIX shell reads what is written here the same way. Files are written whole under another name, with
mode 0600 from the first byte, and then moved into place.

``host="local"`` (a cluster of the caller's own process) needs none of this: do not call :func:`resolve`.

Knows no socket, no frame and no key derivation. Reads no environment at import, starts no thread, holds no
state and no lock: any thread may call anything here. Only disks and prompts block. Prompts go to stderr,
for stdout is the caller's; a secret is never echoed, logged, pickled or put into a message. What may raise holds
it as a Secret, since there are tracebacks that show local variables.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from .errors import ConfigurationError

__all__ = [
    "DEFAULT_HOST", "DEFAULT_PORT", "DEFAULT_USERNAME", "EnvFile", "Role", "Secret", "SecretKey", "Settings",
    "ask_config", "check_host", "check_port", "check_secret", "check_username", "env_path", "gen_config", "is_loopback",
    "make_secret", "next_step", "read_again", "read_file", "read_secret_file", "remove_from_environment", "resolve",
    "update_config", "write_config",
]

DEFAULT_HOST = "127.0.0.1"  # what the prompt proposes; never assumed where nobody answers
DEFAULT_PORT = 9999  # the original's
DEFAULT_USERNAME = "achilles"  # of a file that is written without asking
USERNAME_BYTES = 32  # the width of the user field in the handshake
SECRET_CHARACTERS = 16  # a recorded handshake lets anything shorter be guessed
MADE_SECRET_BYTES = 32  # as many as the keys derived from it
OTHERS_MODE = 0o077  # any right of group and others

NAMES = ("HOST", "PORT", "USERNAME", "SECRET_KEY")
REQUIRED = ("HOST", "USERNAME", "SECRET_KEY")  # the port has a default
PREVIOUS = "PREVIOUS_SECRET_KEY"  # a server accepts it too, while a secret is being replaced
PACKAGE = __package__  # the name that commands in messages have; a renamed copy has its own
PREFIX = "ACHILLES_"  # of environment variables; the same in a renamed copy of the package
MAKE_ONE = 'Make a good one: python -c "import secrets; print(secrets.token_urlsafe(32))"'

_UNFIT = re.compile(r"[\x00\ud800-\udfff]")  # NUL, and what a broken environment has in place of UTF-8
_SETTING = re.compile(rf"[ \t]*(?:export[ \t]+)?({'|'.join((*NAMES, PREVIOUS))})[ \t]*=(.*)")
_VALUE = re.compile(
    r"""[ \t]* (?: '(?P<literal>[^']*)' | "(?P<escaped>(?:[^"\\]|\\.)*)" | (?P<bare>(?:[^'"\#\s].*?)?) )"""
    r"""(?:[ \t]+\#.*)? [ \t]*""", re.VERBOSE)

Role = Literal["controller", "node", "server"]
EnvFile = str | os.PathLike[str] | None  # None: what ACHILLES_ENV_FILE names, else the package's own .env
T = TypeVar("T")


class Secret:
    """A shared secret that prints as ``***`` wherever it turns up, and cannot be pickled.

    :param text: the secret, or another Secret.
    :param source: where it came from, for messages; "" where whoever asks knows better.
    :raises ConfigurationError: for anything but text.
    """

    __slots__ = ("_text", "source")

    def __init__(self, text: object, source: str = "") -> None:
        value = text.reveal() if isinstance(text, Secret) else text
        if not isinstance(value, str):
            raise ConfigurationError(f"the secret must be text, not {type(value).__name__}")
        self._text: str = value
        self.source: str = source or (text.source if isinstance(text, Secret) else "")

    def reveal(self) -> str:
        """The secret itself: for deriving keys, and for the file."""
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
    :ivar port: 0..65535; 0 is any free one, for a server.
    :ivar username: 1 to 32 bytes of UTF-8.
    :ivar secret: what proves that a peer belongs to this cluster.
    :ivar env_file: the file that the *secret* came from, worth reading anew; None if from elsewhere.
    :ivar previous: the secret that a server accepts as well; always None for the other roles.
    """

    host: str
    port: int
    username: str
    secret: Secret
    env_file: str | None = None
    previous: Secret | None = None


class _Given(NamedTuple):
    """A setting that somebody gave, and in words who did."""

    value: Any  # of a secret: a Secret
    source: str


def resolve(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, ask: bool = True, role: Role = "controller",
    bind: str | None = None,
) -> Settings:
    """Find the four settings, each by itself, in the order that the head of this module shows.

    :param ask: whether a person at a terminal may be asked for what is missing (this blocks, and saves).
    :param role: who needs them. A server has a `previous` secret too, where there is one: in the
        environment, or in the file that its secret is in; with a `secret_key` argument there is none.
    :param bind: another address at which a server listens; its secrets must be good enough for that one, too.
    :raises ConfigurationError: something is missing, malformed or unsafe.
    """
    path = env_path(env_file)
    found = _of_environment() | _of_arguments(host, port, username, secret_key)
    if not found.keys() >= set(NAMES):
        found = _with_file(found, path)
    if not found.keys() >= set(REQUIRED):
        if not (ask and _at_terminal()):
            raise ConfigurationError(_missing(found, path, role))
        ask_config(**{name.lower(): v for name, v in _checked(found, bind).items() if name in NAMES},
                   env_file=path, role=role)
        found = _with_file(found, path)
    if role != "server" or secret_key is not None:
        found.pop(PREVIOUS, None)
    values, own = {"PORT": DEFAULT_PORT} | _checked(found, bind), found["SECRET_KEY"].source.endswith(f" {path}")
    return Settings(values["HOST"], values["PORT"], values["USERNAME"], values["SECRET_KEY"],
                    env_file=path if own else None, previous=values.get(PREVIOUS))


def read_again(settings: Settings, role: Role, bind: str | None = None) -> Settings:
    """The same settings with the secrets that their file has now; all else stays what it was.

    :raises ConfigurationError: they came from no file; or it cannot be read, is open to others, or has no secret
        that would do. The message is one line.
    """
    path = settings.env_file
    if path is None:
        raise ConfigurationError("the secret did not come from a configuration file, so that there is none to read")
    if "SECRET_KEY" not in read_file(path):
        raise ConfigurationError(f"{path} has no SECRET_KEY")
    return resolve(
        settings.host, settings.port, settings.username, env_file=path, ask=False, role=role, bind=bind)


def is_loopback(host: str) -> bool:
    """Whether `host` is 127.0.0.0/8, ::1 or localhost. No name is looked up: any other is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(value: object, source: str = "host") -> str:
    """Return `value`, which may be a host's name or address, but has not been looked up.

    :raises ConfigurationError: no text, empty, with white space or control characters, or an empty or too long
        part between dots; names `source`.
    """
    good = isinstance(value, str) and value and value.isprintable() and " " not in value
    if not isinstance(value, str) or not good or not _is_encodable(value):
        raise ConfigurationError(f"{source} must be a host's name or address, not {value!r}")
    return value


def check_port(value: object, source: str = "port", *, text: bool = False) -> int:
    """Return `value` as a port number, 0..65535; decimal digits will do where `text` may be given.

    :raises ConfigurationError: it is none; a ValueError that names `source`.
    """
    number = int(value) if text and isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 65535:
        raise ConfigurationError(f"{source} must be an int in 0..65535, not {value!r}")
    return number


def check_username(value: object, source: str = "username") -> str:
    """Return `value`, which is 1 to 32 bytes of UTF-8 without NUL.

    :raises ConfigurationError: it is not; longer ones are refused, not cut.
    """
    if not isinstance(value, str) or _UNFIT.search(value) or not 1 <= len(value.encode()) <= USERNAME_BYTES:
        raise ConfigurationError(
            f"{source} must be 1 to {USERNAME_BYTES} bytes of UTF-8 without NUL, not {value!r}")
    return value


def check_secret(secret: object, host: str, source: str = "secret_key") -> Secret:
    """Return `secret`, wrapped, which is good enough for a cluster at `host`.

    Messages name `source`, or what the secret itself says of where it came from.

    :raises ConfigurationError: empty; not UTF-8; or shorter than 16 characters where others can connect.
    """
    secret = Secret(secret)
    source = secret.source or source
    if not secret.reveal() or _UNFIT.search(secret.reveal()):
        raise ConfigurationError(f"{source} is empty, or has a NUL or broken UTF-8 in it. {MAKE_ONE}")
    if len(secret.reveal()) < SECRET_CHARACTERS and not is_loopback(host):
        raise ConfigurationError(f"{source} is shorter than {SECRET_CHARACTERS} characters, which is allowed "
                                 f"on loopback alone, not at {host}. {MAKE_ONE}")
    return secret


def make_secret() -> str:
    """A new random secret: 32 bytes from the system, as 43 characters that need no quoting anywhere."""
    return secrets.token_urlsafe(MADE_SECRET_BYTES)


def env_path(env_file: EnvFile = None) -> str:
    """The absolute path of the file in use, whether it exists or not."""
    own = os.path.join(os.path.dirname(__file__), ".env")
    return os.path.abspath(env_file or os.environ.get(f"{PREFIX}ENV_FILE") or own)


def read_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file: those of HOST, PORT, USERNAME, SECRET_KEY, PREVIOUS_SECRET_KEY that it has, unchecked.

    :raises ConfigurationError: it cannot be read, group or others have a right to it (where the system has
        POSIX modes), or a line cannot be understood. The message never shows the line: it may hold a secret.
    """
    values, wrong = _parse(_lines(path, private=True))
    if wrong:
        values.clear()
        raise ConfigurationError(f"{path}, {wrong} cannot be read; put it between single quotes")
    return values


def read_secret_file(path: str | os.PathLike[str]) -> Secret:
    """The secret in a file's first line, unchecked; ConfigurationError if it cannot be read, or others can."""
    return Secret((_lines(path, private=True) or [""])[0].rstrip("\r"), f"the first line of {os.fspath(path)}")


def write_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None,
) -> str:
    """Write a complete configuration over the one in the file; lines of other names stay.

    What is None becomes 127.0.0.1, 9999, "achilles" and a new secret. Returns the file's path.

    :raises ConfigurationError: a value will not do, or the file cannot be written; it is as it was then.
    """
    defaults = _of_arguments(DEFAULT_HOST, DEFAULT_PORT, DEFAULT_USERNAME, make_secret())
    return _save(defaults | _of_arguments(host, port, username, secret_key), env_path(env_file))


def update_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None,
) -> str:
    """Write what is given, and keep what the file holds of the rest, the previous secret included.

    The file need not exist, nor be complete afterwards: a node's host and port may be all of it. Returns
    its path.

    :raises ConfigurationError: as :func:`write_config`, or as :func:`read_file`.
    """
    path = env_path(env_file)
    return _save(_of_file(path) | _of_arguments(host, port, username, secret_key), path)


def ask_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, role: Role = "server",
) -> str:
    """Ask a person for what is None, save all four, say where, return the path. Blocks until answered.

    An answer that will not do is asked for again. Enter alone makes a secret for a server; a node and a
    controller must know the server's.

    :raises ConfigurationError: the input ended, and nothing is saved, with every other way to give what is
        missing; or as :func:`update_config`.
    """
    try:
        answers = _answers(host, port, username, secret_key, role)
    except EOFError as end:
        found = _of_arguments(host, port, username, secret_key)
        raise ConfigurationError(
            f"the input ended at {str(end)!r}; nothing is saved: {_missing(found, env_path(env_file), role)}") from None
    path = update_config(*answers, env_file=env_file)
    sys.stderr.write(f"Saved in {path}\n{next_step(path) if role == 'server' else ''}")
    return path


def gen_config(
    host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None
) -> str:
    """Write a configuration over the one in the file; without arguments, ask for it. Returns the file's path.

    The original's genConfig: what is missing of the four is asked for on a terminal.

    :raises ConfigurationError: as :func:`write_config`; or something is missing and nobody can be asked.
    """
    if None in (host, port, username, secret_key):
        return ask_config(host, port, username, secret_key)
    path = write_config(host, port, username, secret_key)
    sys.stderr.write(f"Saved in {path}\n")
    return path


def next_step(path: str) -> str:
    """What a person does with a server's new file, in a few lines."""
    host = read_file(path).get("HOST", "") if os.path.exists(path) else ""
    return (f"On each other machine: copy this file there (scp -p {shlex.quote(path)} MACHINE:FILE), then\n"
            f"    python -m {__package__}.node --env-file FILE\n"
            + (f"But {host} is this machine alone: for others, give --host the address at which they reach it.\n"
               if is_loopback(host) else ""))


def remove_from_environment() -> None:
    """Take both secrets out of this process's environment, before it starts any that runs users' code."""
    for name in ("SECRET_KEY", PREVIOUS):
        os.environ.pop(PREFIX + name, None)


def _given(name: str, value: object, source: str) -> _Given:
    return _Given(Secret(value) if name in (NAMES[-1], PREVIOUS) else value, source)


def _of_arguments(*values: object) -> dict[str, _Given]:
    """The settings that a caller gave: host, port, username, secret; None for those that were not."""
    return {n: _given(n, value, n.lower()) for n, value in zip(NAMES, values, strict=True) if value is not None}


def _of_environment() -> dict[str, _Given]:
    """The settings in this process's environment, empty ones too."""
    names = [name for name in (*NAMES, PREVIOUS) if PREFIX + name in os.environ]
    return {name: _given(name, os.environ[PREFIX + name], PREFIX + name) for name in names}


def _of_file(path: str) -> dict[str, _Given]:
    """The settings in the file; none where it does not exist."""
    values = read_file(path) if os.path.exists(path) else {}
    return {name: _given(name, value, f"{name} in {path}") for name, value in values.items()}


def _parse(lines: Sequence[str]) -> tuple[dict[str, str], str]:
    """The settings among the lines of a file; and which value cannot be understood, "" if all can."""
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if setting := _SETTING.fullmatch(line):
            value = _VALUE.fullmatch(setting[2])
            if value is None:
                return values, f"line {number}: the value of {setting[1]}"
            values[setting[1]] = _plain(value)
    return values, ""


def _with_file(found: Mapping[str, _Given], path: str) -> dict[str, _Given]:
    """`found`, completed from the file; its previous secret counts beside its own secret alone."""
    file = _of_file(path)
    if "SECRET_KEY" in found:
        file.pop(PREVIOUS, None)
    return {**file, **found}


def _checked(found: Mapping[str, _Given], bind: str | None = None) -> dict[str, Any]:
    """The values of what was found, each checked under the name of its source."""
    values: dict[str, Any] = {}
    host = found["HOST"].value if "HOST" in found else DEFAULT_HOST
    addresses = [str(host)] if bind is None else [str(host), check_host(bind, "bind")]
    for name, (value, source) in found.items():
        if name == "HOST":
            values[name] = check_host(value, source)
        elif name == "PORT":
            values[name] = check_port(value, source, text=source != "port")
        elif name == "USERNAME":
            values[name] = check_username(value, source)
        elif name == "SECRET_KEY" or value.reveal():  # an empty previous secret is none at all
            for address in addresses:
                values[name] = check_secret(value, address, source)
    return values


def _missing(found: Mapping[str, _Given], path: str, role: Role) -> str:
    """What is not in `found`, and every way to give it."""
    names = [name for name in REQUIRED if name not in found] or ["PORT"]
    too = " Nodes authenticate too: give this one what the server has." if role == "node" else ""
    state = "" if os.path.exists(path) else " (it does not exist)"
    return (f"no {', '.join(names).lower()} for this {role}.{too} Any of these will do:\n"
            f"  arguments    {'=..., '.join(names).lower()}=...\n"
            f"  environment  {', '.join(PREFIX + name for name in names)}\n"
            f"  a file       {path}{state}, or the one named by {PREFIX}ENV_FILE or --env-file\n"
            f"  a terminal   there it asks, and saves the answers in that file\n"
            f"python -m {__package__}.server --write-config makes such a file; copy it to each machine.")


def _answers(
    host: str | None, port: int | None, username: str | None, secret_key: SecretKey, role: Role
) -> tuple[str, int, str, SecretKey]:
    """The four, each asked for where it is None; EOFError, with the question, where nobody answers."""
    address = _ask(f"host [{DEFAULT_HOST}]: ", check_host, DEFAULT_HOST) if host is None else host
    if port is None:
        port = _ask(f"port [{DEFAULT_PORT}]: ", lambda text: check_port(text, text=True), str(DEFAULT_PORT))
    if username is None:
        username = _ask("username: ", check_username)
    if secret_key is None:
        prompt, made = ("secret [Enter: make one]: ", make_secret()) if role == "server" else ("secret: ", "")
        secret_key = _ask(prompt, lambda text: check_secret(text, address), made, hidden=True)
    return address, port, username, secret_key


def _ask(prompt: str, check: Callable[[str], T], default: str = "", *, hidden: bool = False) -> T:
    """Ask until `check` accepts the answer, or the default for an empty one; return what it returns, or EOFError."""
    while True:
        sys.stderr.write("" if hidden else prompt)
        sys.stderr.flush()
        try:
            return check((getpass.getpass(prompt) if hidden else input().strip()) or default)
        except ConfigurationError as error:
            sys.stderr.write(f"{error}\n")
        except EOFError:
            raise EOFError(prompt) from None


def _is_encodable(host: str) -> bool:
    """Whether `socket` can look this name up; it raises a UnicodeError, which is no OSError, where it cannot."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _at_terminal() -> bool:
    """Whether there is a person to ask."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _save(found: Mapping[str, _Given], path: str) -> str:
    """Check what is given, and put it into the file in place of the settings it had; return the path."""
    lines = [line for line in (_lines(path) if os.path.exists(path) else []) if not _SETTING.fullmatch(line)]
    values = {name: Secret(str(v) if isinstance(v, int) else v) for name, v in _checked(found).items()}
    for name, value in values.items():
        if set(value.reveal()) & set("\r\n"):
            raise ConfigurationError(f"{name} cannot be kept in a file: it has a line break in it")
    try:
        _replace(path, Secret("".join([*(f"{line}\n" for line in lines), *(
            f"{name}={_quoted(value.reveal())}\n" for name, value in values.items())])))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}); "
                                 f"{PREFIX}ENV_FILE=FILE names another") from error
    return path


def _replace(path: str, text: Secret) -> None:
    """Put `text` at `path`, all or nothing, readable by its owner alone from the first byte."""
    descriptor, fresh = tempfile.mkstemp(prefix=".env-", dir=os.path.dirname(path))  # O_EXCL, mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text.reveal())
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def _lines(path: str | os.PathLike[str], *, private: bool = False) -> list[str]:
    """The lines of a file; refused, if it must be `private`, where others have a right to it."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if private and os.name == "posix" and mode & OTHERS_MODE:
                raise ConfigurationError(f"{path} holds a secret and is open to others (mode {mode:04o}): "
                                         f"chmod 600 {shlex.quote(os.fspath(path))}")
            text = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    return text.removesuffix("\n").split("\n") if text else []


def _plain(value: re.Match[str]) -> str:
    """The value that a file's line stands for."""
    if value["escaped"] is not None:
        return re.sub(r'\\([\\"$`])', r"\1", value["escaped"])
    return value["literal"] or value["bare"] or ""


def _quoted(text: str) -> str:
    """`text`, which has no line break, as a file's value: :func:`read_file` and a POSIX shell read it back as it is."""
    return f"'{text}'" if "'" not in text else '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'

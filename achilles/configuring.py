"""Ask a person for host, port, username and secret, and write the file that `config.py` reads.

A file is written whole under another name, readable by its owner alone, and then moved into place. A POSIX shell
reads the file as `config.py` does.

This module knows terminals and disks. It knows no socket, no frame and no key. It starts no thread, and has no state
and no lock: any thread may call any function. Prompts go to stderr, because stdout is the caller's. A secret is typed
without echo.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shlex
import sys
import tempfile
from typing import Any

from . import config
from .config import DEFAULT_HOST, DEFAULT_PORT, EnvFile, Found, Role, Secret, SecretKey
from .errors import ConfigurationError

__all__ = [
    "ask_config", "ask_missing", "can_encrypt", "check_encryption", "make_secret", "missing", "next_step",
    "update_config", "write_config",
]


def write_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, encrypt: bool | None = None,
) -> str:
    """Write a complete configuration over the one in the file; lines with other names stay. Return the file's path.

    None becomes 127.0.0.1, 9999, "achilles" and a new secret. Without `encrypt`, no ENCRYPT is written.

    :raises ConfigurationError: a value is not good, or the file cannot be written. The file stays as it was.
    """
    defaults = config.of_arguments(DEFAULT_HOST, DEFAULT_PORT, "achilles", make_secret(), None)
    return _save(defaults | config.of_arguments(host, port, username, secret_key, encrypt), config.env_path(env_file))


def update_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, encrypt: bool | None = None,
) -> str:
    """Write the given settings, and keep the file's other settings, also the previous secret. Return its path.

    The file need not exist. It may stay incomplete: a node's host and port may be all of it.

    :raises ConfigurationError: as :func:`write_config`, or as :func:`achilles.config.read_file`.
    """
    path = config.env_path(env_file)
    return _save(config.of_file(path) | config.of_arguments(host, port, username, secret_key, encrypt), path)


def ask_config(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, env_file: EnvFile = None, role: Role = "server",
    encrypt: bool | None = None,
) -> str:
    """Ask a person for each setting that is None, save all four, say where, return the path. Blocks until answered.

    :raises ConfigurationError: as :func:`ask_missing`.
    """
    return ask_missing(config.of_arguments(host, port, username, secret_key, encrypt), config.env_path(env_file), role)


def ask_missing(found: Found, path: str, role: Role) -> str:
    """Ask a person for the settings that `found` lacks, save all in the file at `path`, and say so. Return `path`.

    A bad answer is asked for again. Enter alone makes a secret for a server. Nodes and controllers must know the
    server's.

    :raises ConfigurationError: the input ended, and nothing is saved; or as :func:`write_config`.
    """
    secret = ("secret [Enter: make one]: ", make_secret()) if role == "server" else ("secret: ", "")
    questions = {
        "HOST": (f"the server's host [{DEFAULT_HOST}]: ", DEFAULT_HOST),
        "PORT": (f"port [{DEFAULT_PORT}]: ", str(DEFAULT_PORT)),
        "USERNAME": ("username: ", ""), "SECRET_KEY": secret,
    }
    answers = dict(found)
    for name, (prompt, default) in questions.items():
        try:
            while name not in answers:
                _ask(name, prompt, default, answers)
        except EOFError:
            raise ConfigurationError(f"the input ended at {prompt!r}; nothing is saved: "
                                     f"{missing(found, path, role)}") from None
    _save(answers, path)
    sys.stderr.write(f"Saved in {path}\n{next_step(path) if role == 'server' else ''}")
    return path


def _ask(name: str, prompt: str, default: str, answers: Found) -> None:
    """Ask for one setting. The answer joins the other `answers`, if it is good beside them."""
    hidden = name == "SECRET_KEY"
    sys.stderr.write("" if hidden else prompt)
    sys.stderr.flush()
    answer = Secret(getpass.getpass(prompt) or default) if hidden else input().strip() or default
    try:
        config.checked(answers | {name: (answer, "the answer")})
        answers[name] = answer, "the answer"
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")


def missing(found: Found, path: str, role: Role) -> str:
    """Return the names that `found` lacks, and every way to give them."""
    names = [name for name in config.REQUIRED if name not in found] or ["PORT"]
    too = " Nodes authenticate too: give this one the server's settings." if role == "node" else ""
    return (f"no {', '.join(names).lower()} for this {role}.{too} Any of these will do:\n"
            f"  arguments    {'=..., '.join(names).lower()}=...\n"
            f"  environment  {', '.join(config.PREFIX + name for name in names)}\n"
            f"  a file       {path}{'' if os.path.exists(path) else ' (it does not exist)'}, "
            f"or the one named by {config.PREFIX}ENV_FILE or --env-file\n"
            f"  a terminal   there it asks, and saves the answers in that file\n"
            f"python -m {__package__}.server --write-config makes such a file; copy it to each machine."
            + (f"\nOne machine needs none of this: python -m {__package__}.local SCRIPT, or host=\"local\" in a call."
               if role == "controller" else ""))


def next_step(path: str) -> str:
    """Return, in a few lines, how a person goes on with a server's new file."""
    host = config.read_file(path).get("HOST", "") if os.path.exists(path) else ""
    return (f"On each other machine: copy this file there (scp -p {shlex.quote(path)} MACHINE:FILE), then\n"
            f"    python -m {__package__}.node --env-file FILE\n"
            + (f"But {host} is this machine alone: for others, give --host the address at which they reach it.\n"
               if config.is_loopback(host) else ""))


def check_encryption(source: str) -> None:
    """Check that this Python can encrypt, where `source` asks for it. ConfigurationError with the remedies."""
    if not can_encrypt():
        raise ConfigurationError(
            f"{source} asks for encryption, and this Python cannot do it: it takes Python 3.13 or later, with an "
            "OpenSSL that has TLS 1.3. Run such a Python here, or set ENCRYPT=no on every machine and use a tunnel")


def can_encrypt() -> bool:
    """Whether this Python has TLS 1.3 with pre-shared keys."""
    try:
        import ssl
    except ImportError:  # a Python that was built without OpenSSL
        return False
    return ssl.HAS_TLSv1_3 and getattr(ssl, "HAS_PSK", False)


def make_secret() -> str:
    """Return a new random secret: 32 bytes from the system, as 43 characters that need no quoting anywhere."""
    return secrets.token_urlsafe(32)  # as many bytes as the keys that are derived from the secret


def _save(found: Found, path: str) -> str:
    """Check the settings, put them into the file in place of its old settings, and return the path."""
    values = {name: Secret(_as_text(value)) for name, value in config.checked(found).items()}
    kept = [line for line in (config.read_lines(path) if os.path.exists(path) else [])
            if not re.fullmatch(config.SETTING, line)]
    text = Secret("\n".join([*kept, *(f"{name}={_quoted(v.reveal())}" for name, v in values.items()), ""]))
    try:
        with tempfile.TemporaryDirectory(prefix=".env-", dir=os.path.dirname(path)) as folder:  # mode 0700
            fresh = os.path.join(folder, "env")
            with open(fresh, "w", encoding="utf-8", errors="surrogateescape", opener=lambda name, flags: (
                    os.open(name, flags | os.O_EXCL, 0o600))) as file:  # its owner's alone, from the first byte
                file.write(text.reveal())
            os.replace(fresh, path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}); "
                                 f"{config.PREFIX}ENV_FILE=FILE names another") from error
    return path


def _as_text(value: Any) -> Any:
    """Return a setting as a file has it: a port in digits, a bool as yes or no. A Secret stays one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else value


def _quoted(text: str) -> str:
    """Return `text`, which has no line break, as the value of a line: `config.py` and a POSIX shell read it back."""
    return f"'{text}'" if "'" not in text else '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'

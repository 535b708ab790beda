"""`python -m achilles.server`: the command, and its question to a running server.

This module knows options, configuration files and exit statuses. `listen.py` listens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from .. import config, configuring, console
from ..errors import ConfigurationError, ServerUnreachable
from ..protocol import auth, connect
from ..protocol.frames import Kind
from .listen import run_server

__all__ = ["ask_status", "main"]

NO_NODES_STATUS = 3  # exit status of --status without a node
OPTIONS: dict[str, dict[str, Any]] = console.OPTIONS | {
    "--bind": {"metavar": "ADDRESS", "help": "listen at this address instead of --host, such as 0.0.0.0"},
    "--write-config": {"action": "store_true", "help": "write a configuration without asking, and exit"},
    "--status": {"action": "store_true", "help": "print nodes and jobs of the running cluster, and exit"},
    "--json": {"action": "store_true", "help": "with --status: as JSON"},
    "--follow": {"action": "store_true", "help": "with --status: again every second, until Ctrl-C"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 after a clean end, 1 unreachable, 2 wrong settings, 3 no node."""
    parser = console.parser(
        "server", "Where nodes and callers meet. Started without settings, it asks for them.", OPTIONS)
    args = console.parse(parser, argv)
    if (args.json or args.follow) and not args.status:
        parser.error("--json and --follow go with --status")
    with console.errors_to_exit_status() as status:
        given = (args.host, args.port, args.username, console.read_secret(args.secret_key_file))
        if args.write_config:
            path = _write_config(*given, args.env_file, args.encrypt)
            console.say(f"Saved in {path}\n{configuring.next_step(path)}".rstrip())
        elif args.status:
            settings = config.resolve(*given, env_file=args.env_file, encrypt=args.encrypt)
            text_of = json.JSONEncoder(indent=2).encode if args.json else console.status_table
            if args.follow:
                with contextlib.suppress(KeyboardInterrupt):
                    ask_status(settings, lambda state: console.redraw(text_of(state)))
            else:
                state = ask_status(settings)
                console.say(text_of(state))
                status.code = 0 if state["nodes"] else NO_NODES_STATUS
        else:
            status.code = run_server(*given, bind=args.bind, env_file=args.env_file, encrypt=args.encrypt)
    return status.code


def _write_config(
    host: str | None, port: int | None, username: str | None, secret: config.Secret | None, env_file: str | None,
    encrypt: bool | None,
) -> str:
    """Write a file for `--write-config`, with encryption if this Python has it.

    A secret and the encryption in the old file stay, because nodes may have them.
    """
    if host in ("0.0.0.0", "::"):
        raise ConfigurationError(f"nobody can connect to {host}: give the address at which nodes reach this machine, "
                                 f"and start the server with --bind {host}")
    old = config.of_file(config.env_path(env_file))
    kept, _ = old.get("SECRET_KEY", (None, ""))
    word, _ = old.get("ENCRYPT", ("", ""))
    known = config.WORDS.get(word, configuring.can_encrypt()) if encrypt is None else encrypt
    return configuring.write_config(host, port, username, secret or kept, env_file=env_file, encrypt=known)


def ask_status(settings: config.Settings, take: Callable[[Any], bool] = lambda state: False) -> Any:
    """Return a running server's STATUS. Blocks some seconds at most. Raises ServerUnreachable, AuthenticationError.

    :param take: gets each STATUS. While it returns true, ask again: every second, and when nodes come or go.
    """
    try:
        link = connect.connect(
            settings.host, settings.port, auth.CONTROLLER, settings.username,
            auth.derive_key(settings.username, settings.secret.reveal()), encrypt=settings.encrypt)
    except ServerUnreachable as e:
        raise ServerUnreachable(f"{e}. Start a server: python -m {__package__}") from e
    found: dict[Kind, Any] = {}

    def go_on() -> None:
        if Kind.STATUS not in found:
            link.send(Kind.STATUS, {})
        elif take(found[Kind.STATUS]):
            found.clear()
        else:
            link.finish("leaving")

    with contextlib.closing(link):
        link.send(Kind.HELLO, connect.hello())
        link.start_writer()
        why = link.run(lambda frame: found.update([frame]), go_on)
    if Kind.STATUS not in found:
        raise ServerUnreachable(f"the server at {settings.host}:{settings.port} gave no status: {why}")
    return found[Kind.STATUS]


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m achilles.server`: the command, and its questions to a running server.

Knows options, configuration files and exit statuses. What listens is `listen.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from .. import config, console
from ..config import Settings
from ..errors import ConfigurationError, ServerUnreachable
from ..protocol import auth, channel
from ..protocol.frames import Frame, Kind
from .listen import run_server

__all__ = ["ask_status", "main"]

NO_NODES_STATUS = 3  # exit status of --status where no node is there


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m achilles.server`: exit status 0 after a clean end, 1 unreachable, 2 wrong settings, 3 no node."""
    parser = console.parser("server", "Where nodes and callers meet. Started without settings, it asks for them.")
    parser.add_argument("--bind", metavar="ADDRESS", help="listen at this address instead of --host, such as 0.0.0.0")
    parser.add_argument("--write-config", action="store_true", help="write a configuration without asking, and exit")
    parser.add_argument("--status", action="store_true", help="print nodes and jobs of the running cluster, and exit")
    parser.add_argument("--json", action="store_true", help="with --status: as JSON")
    args = console.parse(parser, argv)
    if args.json and not args.status:
        parser.error("--json goes with --status")
    with console.errors_to_exit_status() as status:
        secret = console.read_secret(args.secret_key_file)
        given = (args.host, args.port, args.username, secret)
        if args.write_config:
            path = _write_config(args.host, args.port, args.username, secret, args.env_file)
            console.say(f"Saved in {path}\n{config.next_step(path)}".rstrip())
        elif args.status:
            status.code = _print_status(config.resolve(*given, env_file=args.env_file), args.json)
        else:
            status.code = run_server(*given, bind=args.bind, env_file=args.env_file)
    return status.code


def _write_config(
    host: str | None, port: int | None, username: str | None, secret: config.Secret | None, env_file: str | None
) -> str:
    """`--write-config`: a secret that is there is kept, since nodes may have it; only a new file gets a new one."""
    if host in ("0.0.0.0", "::"):
        raise ConfigurationError(f"nobody can connect to {host}: give the address at which nodes reach this machine, "
                                 f"and start the server with --bind {host}")
    path = config.env_path(env_file)
    there = config.read_file(path).items() if os.path.exists(path) else ()
    kept = [config.Secret(value) for name, value in there if name == "SECRET_KEY"]
    del there  # a traceback may show the locals
    return config.write_config(host, port, username, secret or (kept[0] if kept else None), env_file=path)


def _print_status(settings: Settings, as_json: bool) -> int:
    """What `--status` shows; a connection of its own, as a controller's."""
    state = ask_status(settings)
    console.say(json.dumps(state, indent=2) if as_json else console.status_table(state))
    return 0 if state["nodes"] else NO_NODES_STATUS


def ask_status(settings: Settings) -> dict[str, Any]:
    """A running server's STATUS. Blocks some seconds at most. Raises ServerUnreachable, AuthenticationError."""
    key = auth.derive_key(settings.username, settings.secret.reveal())
    try:
        link = channel.connect(settings.host, settings.port, auth.CONTROLLER, settings.username, key)
    except ServerUnreachable as e:
        raise ServerUnreachable(f"{e}. Start a server: python -m {__package__}") from e
    answers: list[dict[str, Any]] = []

    def keep(frame: Frame) -> None:
        if frame.kind is Kind.STATUS:
            answers.append(frame.body)
            link.finish("leaving")

    link.send(Kind.HELLO, channel.hello())
    link.send(Kind.STATUS, {})
    link.start_writer()
    why = link.run(keep)
    link.close()
    if not answers:
        raise ServerUnreachable(f"the server at {settings.host}:{settings.port} gave no status: {why}")
    return answers[0]


if __name__ == "__main__":
    raise SystemExit(main())

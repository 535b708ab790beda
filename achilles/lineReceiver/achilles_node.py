"""The original's path to the node: `from achilles.lineReceiver.achilles_node import runAchillesNode`."""

from ..configuring import ask_config, update_config
from ..node.loop import run_node as runAchillesNode

__all__ = ["genConfig", "runAchillesNode"]


def genConfig(host: str | None = None, port: int | None = None) -> str:
    """Save where the server is, and keep the username and the secret that the file holds; returns its path.

    Without arguments, and where a person can be asked, asks for all four. Raises ConfigurationError.
    """
    if host is None and port is None:
        return ask_config(role="node")
    return update_config(host, port)

"""The original's path to the server: `from achilles.lineReceiver.achilles_server import runAchillesServer`."""

from ..configuring import ask_config as genConfig
from ..server.listen import run_server as runAchillesServer

__all__ = ["genConfig", "runAchillesServer"]

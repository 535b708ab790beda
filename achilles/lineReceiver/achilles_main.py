"""The original's path to the calls: `from achilles.lineReceiver.achilles_main import map`."""

from ..calls import cluster_status as getClusterStatus
from ..calls import imap, imap_unordered, map
from ..calls import kill_cluster as killCluster
from ..configuring import ask_config as genConfig

__all__ = ["genConfig", "getClusterStatus", "imap", "imap_unordered", "killCluster", "map"]

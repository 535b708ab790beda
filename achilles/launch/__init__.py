"""Starting a computation, beside the way of a chunk. A server, a node and a controller need nothing of it.

`ssh.py` runs nodes on other machines for a LocalCluster, which alone imports it.
"""

__all__: list[str] = []

"""Starting a computation, beside the way of a chunk. A server, a node and a controller need nothing of it.

`child.py` is a server or a node that serves one caller. `ssh.py` runs nodes on other machines. A LocalCluster alone
needs them.
"""

__all__: list[str] = []

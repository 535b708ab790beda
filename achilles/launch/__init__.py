"""The processes of a LocalCluster, which alone needs this folder.

`child.py` is a server or a node that serves one caller. `ssh.py` runs nodes on other machines.
"""

__all__: list[str] = []

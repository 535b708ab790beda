"""The import paths and names of the original achilles; nothing here has code of its own but one wrapper.

`achilles_main` has the calls, `achilles_server` the server, `achilles_node` the node. New code imports
from the package itself.
"""

__all__: list[str] = []

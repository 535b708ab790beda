"""The server: it listens, authenticates, and decides which node gets which batch.

It knows nodes and controllers by their frames, and imports `protocol`. It must not know `objects`: letters pass
through it unopened. `listen.py` sees bytes that nobody has verified; `exchange.py` gives frames their meaning;
`scheduler.py` decides, without sockets and clocks. `achilles.run_server` runs one.
"""

__all__: list[str] = []

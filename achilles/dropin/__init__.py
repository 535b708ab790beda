"""The interfaces of other packages: Pool, Executor, the backend of joblib, and calls on an `executor=`.

The folder may import any module. Only the top level imports it, lazily, and `calls.py`, for an `executor=`. So a copy
of achilles works without the folder.
"""

__all__: list[str] = []

"""The interfaces of other packages: Pool, Executor, the backend of joblib, and calls on an `executor=`.

It may import anything. Nothing imports it but the top level, lazily, and `calls.py`, where an `executor=` is
given: the folder can be deleted in one piece.
"""

__all__: list[str] = []

"""Bytes and sockets: proofs, frames, and one connection. Both ends of every link use these modules.

With `server/listen.py` this folder is all that sees bytes before they are verified. It imports `errors`
alone, and knows no job, no object and no role.
"""

__all__: list[str] = []

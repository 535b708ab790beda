"""Bytes and sockets: proofs, frames, and one connection. Both ends of every link use these modules.

Only this folder and `server/listen.py` see unverified bytes. The folder imports `errors` alone, and knows no job,
object or role.
"""

__all__: list[str] = []

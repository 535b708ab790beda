"""The proof that nobody gets in: attacks of every kind on real servers, nodes and callers, by a client of its own.

`python -m tests.attacks` runs them and prints a table. `tests/test_attacks.py` runs a short form under pytest.
`raw.py` speaks the protocol from PROTOCOL.md alone, so that what it finds is not what the package believes of itself.
"""

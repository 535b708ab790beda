"""The proof that nothing is lost: faults of every kind against real clusters, judged by one oracle.

`python -m tests.faults` runs the cases and prints a table; `--hours H` soaks. `tests/test_faults_short.py` runs
a short form under pytest.
"""

"""How fast, beside the others: every figure as a ratio that is measured side by side, in one run.

`python -m tests.bench` measures and prints tables; README.md has those of the day. `tests/test_bench.py` runs
a small form under pytest, which looks at results and never at a time.
"""

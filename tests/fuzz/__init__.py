"""Parsers under arbitrary bytes: what must hold (`targets`), and the command that searches for what breaks it."""

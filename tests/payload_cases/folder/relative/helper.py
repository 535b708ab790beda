"""An importable module of the package."""

K = 10


def help(x):
    return x + K


class Thing:
    def __init__(self, v):
        self.v = v

    def __eq__(self, other):
        return type(other) is type(self) and other.v == self.v

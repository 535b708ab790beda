"""A module that the caller has and the node lacks."""


def function(x):
    return x

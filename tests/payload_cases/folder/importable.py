"""A module that caller and worker can import. The caller sets some of its values at run time."""

import functools

SETTING = "as imported"
TABLE = {}


def set_up(value):
    global SETTING
    SETTING = value
    TABLE["k"] = value


def make():
    return lambda x: (SETTING, TABLE.get("k"), x)


def make_closure(y):
    def inner(x):
        return SETTING, helper(x), y
    return inner


def helper(x):
    return SETTING, x


def make_class():
    class Inner:
        def get(self, x):
            return SETTING, x
    return Inner


def decorate(function):
    @functools.wraps(function)
    def inner(x):
        return SETTING, function(x)
    return inner


checked = lambda x: (SETTING, x)  # noqa: E731

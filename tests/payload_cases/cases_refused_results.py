"""A result, or an exception, that holds what must not travel is an error of its item, and no file is touched."""

import contextvars
import multiprocessing.pool
import os
import re
import socket
import sqlite3
import sys
import tempfile
import threading
import warnings

sys.path.insert(0, sys.argv[-1])
from peer import MODE, expect, main, program, refused  # noqa: E402

warnings.simplefilter("ignore", ResourceWarning)  # of all that stays open until the end
FORK = MODE == "fork"
folder = tempfile.TemporaryDirectory()
directory = tempfile.TemporaryDirectory(dir=folder.name)


def path(name):
    return os.path.join(folder.name, name)


def content(name):
    with open(path(name)) as file:
        return file.read()


def work(x):
    return 1


class Result:
    def __init__(self, name):
        self.file = open(name, "w")
        self.file.write("result\n")
        self.file.flush()


class Failed(Exception):
    pass


def gives_file(name):
    return Result(name)


def gives_temporary(name):
    kept.append(tempfile.NamedTemporaryFile("w", dir=name))
    return kept[-1]


kept = []


def exists(_):
    return os.path.exists(kept[0].name)


def gives_handle(kind):
    made = {"generator": lambda: (x for x in ()), "Connection": lambda: sqlite3.connect(":memory:"),
            "Match": lambda: re.match("a", "a"), "local": threading.local, "frame": sys._getframe,
            "socket": socket.socket, "ContextVar": lambda: contextvars.ContextVar("variable")}[kind]()
    handles.append(made)
    return {"handle": [made]}


handles = []
ENCODING = multiprocessing.pool.MaybeEncodingError


@program("a result that holds an open file is an error of its item, and the file is as it was")
def results(peer):
    refused(peer, gives_file, path("result"), "TextIOWrapper", error=ENCODING)
    expect(content("result"), "result\n")
    refused(peer, gives_temporary, folder.name, "TextIOWrapper" if FORK else "_TemporaryFileWrapper", error=ENCODING)
    expect(peer.map(exists, [1]), [True])


@program("a result that is a handle is an error of its item")
def handle_results(peer):
    for kind in ("generator", "Connection", "Match", "local", "frame", "ContextVar", *([] if FORK else ["socket"])):
        refused(peer, gives_handle, kind, kind, error=ENCODING)


def fails(name):
    error = Failed("why")
    error.file = open(name, "w")
    error.file.write("details\n")
    error.file.flush()
    raise error


@program("an exception that holds an open file comes back as an error with its text, and the file is as it was")
def exceptions(peer):
    refused(peer, fails, path("failed"), *([] if FORK else ["Failed", "why"]), error=Exception)
    expect(content("failed"), "details\n")

def f_folder(x):
    return os.path.isdir(directory.name)


@program("a temporary directory travels, and is not removed by its copy")
def folders(peer):
    expect(peer.map(f_folder, [1]), [True])
    peer.open("another")
    expect(peer.map(work, [1]), [1])
    assert os.path.isdir(directory.name)


@program("a temporary directory as an argument is not removed either")
def folder_arguments(peer):
    got, = outcome(peer, len, [directory])
    assert got == 1 or "directory" in str(got).lower()
    peer.open("another")
    expect(peer.map(work, [1]), [1])
    assert os.path.isdir(directory.name)


def outcome(peer, function, argument):
    try:
        return peer.map(function, [argument])
    except TypeError as error:
        return [error]


main()

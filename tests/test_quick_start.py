"""The original's quick start, in its order, from an empty configuration and by its own import paths."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from conftest import SECONDS

pytestmark = pytest.mark.usefixtures("no_leftovers", "unconfigured")

CONFIGURE = """
from achilles.lineReceiver.achilles_server import runAchillesServer, genConfig

genConfig(host='127.0.0.1', port={port}, username='foo', secret_key='bar')
"""
SERVER = """
from achilles.lineReceiver.achilles_server import runAchillesServer

runAchillesServer()
"""
NODE = """
from achilles.lineReceiver.achilles_node import runAchillesNode

if __name__ == "__main__":
    runAchillesNode(host='127.0.0.1', port={port}, cpu_count=8)
"""
FUNCTIONS = """
def achilles_function(arg):
    return arg ** 2

def achilles_callback(result):
    return result ** 2

"""
MAP = "from achilles.lineReceiver.achilles_main import map\n" + FUNCTIONS + """
if __name__ == "__main__":
    results = map(achilles_function, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], achilles_callback, chunksize=1)
    print(results)
"""
IMAP = "from achilles.lineReceiver.achilles_main import {name}\n" + FUNCTIONS + """
if __name__ == "__main__":
    for result in {name}(achilles_function, [1,2,3,4,5,6,7,8,9,10], achilles_callback, chunksize=1):
        print(result)
"""
KILL = """
from achilles.lineReceiver.achilles_main import killCluster

killCluster(command_verified=True)
"""
PACKETS = [
    "{'ARGS_COUNTER': 0, 'RESULT': [1, 16, 81, 256, 625, 1296, 2401, 4096]}",
    "{'ARGS_COUNTER': 8, 'RESULT': [6561, 10000]}",
]


@pytest.fixture
def start(tmp_path):
    """Start a script of this text; all are ended in the end."""
    made = []

    def run(text, **names):
        file = tmp_path / f"script_{len(made)}.py"
        file.write_text(text.replace("{port}", str(names.get("port"))).replace("{name}", str(names.get("name"))))
        made.append(subprocess.Popen(
            [sys.executable, "-W", "error", str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True))
        return made[-1]

    yield run
    for process in made:
        process.kill()
        process.communicate()


def finish(process):
    """Its stdout and stderr; it must exit with 0."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "Traceback" not in err, err
    return out, err


def read(process, lines):
    """So many lines, with a deadline."""
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        return "".join(process.stdout.readline() for _ in range(lines))
    finally:
        timer.cancel()
        timer.join()


def test_the_quick_start_of_the_original(start, free_port, unconfigured):
    assert not unconfigured.exists()
    out, err = finish(start(CONFIGURE, port=free_port))
    assert out == "" and str(unconfigured) in err and oct(os.stat(unconfigured).st_mode & 0o777) == "0o600"

    server = start(SERVER)
    assert read(server, 2) == (
        f"ALERT: achilles_server initiated at 127.0.0.1:{free_port}\nListening for connections...\n")

    node = start(NODE, port=free_port)
    assert read(node, 4) == (
        "GREETING: Welcome! There are currently 1 open connections.\n\n"
        f"Connected to achilles_server running at 127.0.0.1:{free_port}\nCLIENT_ID: 0\n")

    alert = f"ALERT: Connection to achilles_server at 127.0.0.1:{free_port} and authentication successful.\n\n"
    assert finish(start(MAP)) == ("[[1, 16, 81, 256, 625, 1296, 2401, 4096], [6561, 10000]]\n", alert)
    out, err = finish(start(IMAP, name="imap"))
    assert (out.splitlines(), err) == (PACKETS, alert)
    out, err = finish(start(IMAP, name="imap_unordered"))
    assert (sorted(out.splitlines()), err) == (PACKETS, alert)

    finish(start(KILL))
    assert finish(node)[0] == "" and finish(server)[0] == ""

"""SIGTERM: a node drains, a server restarts, a second signal ends at once; and clusters without nodes."""

from __future__ import annotations

import signal
import time

import tasks
from cluster import SECRET, USER, Cluster
from conftest import ENCRYPT, wait_until

from achilles import NoNodesError, config
from achilles.controller.connection import Controller

from .bench import Bench, fault
from .work import Work, length


@fault(10, "SIGTERM to a node under load", runs=5, short=True)
def node_drained(bench: Bench) -> None:
    """Exit 0; nothing is repeated."""
    cluster, oracle = bench.cluster(2, 3), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0.1), range(50))
    oracle.wait_for(10)
    at = time.monotonic()
    cluster.nodes[1].signal(signal.SIGTERM)
    assert cluster.nodes[1].wait(15) == 0
    bench.note(recover=time.monotonic() - at)
    oracle.check(call.result(), 50, repeats=0)
    bench.note(repeated=oracle.repeated())


@fault(10, "SIGTERM to a node, tiny tasks", runs=5)
def node_drained_tiny(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2, 3), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path), iter(range(4000)))
    oracle.wait_for(500)
    cluster.nodes[1].signal(signal.SIGTERM)
    assert cluster.nodes[1].wait(15) == 0
    oracle.check(call.result(), 4000, repeats=0)
    bench.note(repeated=oracle.repeated())


@fault(10, "SIGTERM to a node, under a task of 40 s")
def node_drained_late(bench: Bench) -> None:
    """It waits for 30 s, then leaves all the same; the task goes to another, and is not charged."""
    cluster, oracle = bench.cluster(1), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0,), "hang", times=1), range(5))
    oracle.wait_for(1)
    at = time.monotonic()
    cluster.nodes[0].signal(signal.SIGTERM)
    assert cluster.nodes[0].wait(40) == 0
    bench.note(recover=time.monotonic() - at)
    cluster.start_node(1)
    oracle.check(call.result(), 5, repeats=1)


@fault(10, "SIGTERM to a node, its server SIGKILLed", runs=3, short=True)
def node_drained_alone(bench: Bench) -> None:
    """Nobody waits for what it runs any more: it ends, exit status 0, and does not look for its server."""
    cluster, oracle = bench.cluster(1), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0,), "hang", times=1), range(5))
    oracle.wait_for(1)
    cluster.nodes[0].signal(signal.SIGTERM)
    wait_until(lambda: not _workers(cluster), "it to drain")
    at = time.monotonic()
    cluster.server.kill()
    assert cluster.nodes[0].wait(10) == 0
    bench.note(recover=time.monotonic() - at)
    cluster.start_server()
    cluster.start_node(1)
    oracle.check(call.result(), 5, repeats=1)


@fault(10, "SIGTERM to the server, back at once", runs=5)
def server_restarts(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2, 1), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path, 0.02), iter(range(300)))
    oracle.wait_for(40)
    at = time.monotonic()
    cluster.server.signal(signal.SIGTERM)
    assert cluster.server.wait(10) == 0
    cluster.start_server()
    begun = time.monotonic()
    oracle.check(call.result(), 300, repeats=2 * 3 + 64)
    first = min(event.at for event in oracle.events() if event.at > begun)
    bench.note(recover=first - at, repeated=oracle.repeated())
    for node in cluster.nodes:  # it was told BYE, and took that for no fault
        assert "closed the connection" not in node.err.read_text(), node.err.read_text()
    wait_until(lambda: len(cluster.status()["nodes"]) == 2, "both nodes")


@fault(10, "SIGTERM to the server, its peers SIGSTOPped", runs=3, short=True)
def server_restarts_alone(bench: Bench) -> None:
    """It does not wait for them for long; when they wake they find what came back."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    script = cluster.start_script(
        f"from achilles import map\nfrom faults.work import Work\n"
        f"found = sum(map(Work({oracle.path!r}, 0.02), range(100)), [])\n"
        "print('right' if found == [n * n for n in range(100)] else found)\n")
    oracle.wait_for(20)
    for process in (script, cluster.nodes[0]):
        process.signal(signal.SIGSTOP)
    at = time.monotonic()
    cluster.server.signal(signal.SIGTERM)
    assert cluster.server.wait(10) == 0
    bench.note(detect=time.monotonic() - at)
    cluster.start_server()
    for process in (script, cluster.nodes[0]):
        process.signal(signal.SIGCONT)
    script.wait_for("right")
    oracle.check({n: n * n for n in range(100)}, 100, repeats=64 + 6)
    bench.note(repeated=oracle.repeated())


@fault(10, "a second SIGTERM to the server", runs=3, short=True)
def server_stopped_at_once(bench: Bench) -> None:
    """The first lets it wait until a stopped node has taken what fits into no buffer."""
    cluster = bench.cluster(1)
    cluster.nodes[0].signal(signal.SIGSTOP)
    call = bench.call(cluster, "map", length, [b"x" * (32 << 20)])
    wait_until(lambda: any(job["running"] for job in cluster.status()["jobs"]), "it to be on its way")
    cluster.server.signal(signal.SIGTERM)
    at = time.monotonic()
    wait_until(lambda: time.monotonic() > at + 0.1, "a moment")
    cluster.server.signal(signal.SIGTERM)
    assert cluster.server.wait(10) == 128 + signal.SIGTERM
    bench.note(recover=time.monotonic() - at)
    cluster.nodes[0].signal(signal.SIGCONT)
    cluster.start_server()
    assert call.result() == {0: 32 << 20}


@fault(10, "a second SIGTERM to a draining node", runs=3, short=True)
def node_stopped_at_once(bench: Bench) -> None:
    cluster, oracle = bench.cluster(1, 1), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0, 1), "hang", times=1), range(6))
    oracle.wait_for(2)
    node = next(node for node in cluster.nodes if oracle.running().keys() & set(node.workers(1)))
    node.signal(signal.SIGTERM)
    wait_until(lambda: _workers(cluster) == 1, "it to drain")
    at = time.monotonic()
    node.signal(signal.SIGTERM)
    assert node.wait(6) == 128 + signal.SIGTERM
    bench.note(recover=time.monotonic() - at)
    call.ended.wait(0.1)
    cluster.nodes[1 - cluster.nodes.index(node)].kill()  # the other hangs, too
    cluster.start_node(1)
    oracle.check(call.result(), 6, repeats=2)


def _workers(cluster: Cluster) -> int:
    """As a caller is told: those of nodes that drain do not count."""
    settings = config.Settings("127.0.0.1", cluster.port, USER, config.Secret(SECRET), encrypt=ENCRYPT)
    controller = Controller(lambda: settings)
    controller.open()
    try:
        return controller.workers
    finally:
        controller.close()


@fault(11, "no node at all", short=True)
def no_nodes(bench: Bench) -> None:
    """The job waits, and says so once after 5 s; it goes on as soon as there is one."""
    cluster = bench.cluster()
    script = cluster.start_script(
        "import tasks\nfrom achilles import map\nprint(sum(map(tasks.square, range(20)), []) == "
        "[n * n for n in range(20)])\n")
    at = time.monotonic()
    wait_until(lambda: "has no nodes" in script.err.read_text(), "its notice", 12)
    bench.note(detect=time.monotonic() - at)
    wait_until(lambda: time.monotonic() > at + (6 if bench.short else 14), "some more time", 20)
    assert script.err.read_text().count("has no nodes") == 1
    cluster.start_node(1)
    script.wait_for("True")


@fault(11, "no node within wait_for_nodes", short=True)
def no_nodes_in_time(bench: Bench) -> None:
    cluster = bench.cluster()
    at = time.monotonic()
    call = bench.call(cluster, "map", tasks.square, range(3), wait_for_nodes=0.5)
    assert call.ended.wait(10)
    assert isinstance(call.error, NoNodesError), repr(call.error)
    bench.note(detect=time.monotonic() - at, remark="wait_for_nodes=0.5")


@fault(11, "the last node leaves, another joins mid-job", runs=3, short=True)
def node_relieved(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path, 0.05), iter(range(60)))
    oracle.wait_for(10)
    cluster.nodes[0].signal(signal.SIGTERM)
    assert cluster.nodes[0].wait(15) == 0
    wait_until(lambda: not cluster.status()["nodes"], "the server to see its end")
    at = time.monotonic()
    cluster.start_node(3)
    oracle.check(call.result(), 60, repeats=0)
    first = min(event.at for event in oracle.events() if event.at > at)
    bench.note(recover=first - at, repeated=oracle.repeated())

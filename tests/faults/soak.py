"""Random faults of every kind against random jobs, for hours; one seed replays them.

::

    seed ─▶ round 0: a cluster, some jobs one after the other, each under random faults ─▶ oracle
            round 1: …      (a round's random numbers come of the seed and its number alone)

A round that fails is told with its seed, its plan and the folder in which everything was left; the soak goes on.
What the processes of a machine do at the same moment no seed can order: it replays plans, not races.
"""

from __future__ import annotations

import itertools
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import conftest
from cluster import Process, alive
from conftest import wait_until

import achilles
from achilles import TaskTimeout, WorkerLost

from . import tree
from .bench import Bench, Call
from .network import RESULT_HEAD, TASK_HEAD
from .oracle import Oracle, square
from .proxy import Proxy
from .work import Work

__all__ = ["Round", "soak"]

MARK = b"soak"  # what heavy arguments are made of; to alter them on the way
JOBS = (1, 4)  # in a round
NODE_FAULTS = 6  # a job, at most: a chunk that was lost with ten nodes is given up, rightly
WORKER_KILLS = 2  # under one argument, at most: the third would be its end
JOB_SECONDS = 150.0  # (short: 90) tells a hang from a long way back: silence, back-off and the job itself
ROUND_TRIP_SECONDS = 0.2  # over a slow network, of a window of one chunk: 3,000 of them took 150 s once
TIMEOUT_SECONDS = 6.0  # of a job with arguments that hang: longer than anybody is stopped who is not given up
SLOW_SECONDS = 15.0  # a round that takes longer shows its plan: somebody waited for a silence to end
LONG_SILENCE = 0.04  # of all holds: over the limit of 20 s


class Round:
    """A cluster, its jobs, and what befalls them."""

    def __init__(self, bench: Bench, rng: random.Random, *, jobs: int, long: bool = True) -> None:
        self.bench, self.rng, self.jobs, self.long = bench, rng, jobs, long
        self.plan: list[str] = []  # what was done, in its order
        self.faults: Counter[str] = Counter()
        self.calls = self.repeated = 0
        self._node_faults = 0
        self._budget: Counter[int] = Counter()  # index -> workers killed under it

    def run(self) -> None:
        """All of it. AssertionError if the promise is broken."""
        rng = self.rng
        sizes = [rng.randint(1, 3) for _ in range(rng.randint(1, 3))]
        method = rng.choice(["fork", "fork", "fork", "forkserver", "spawn"])
        self.plan.append(f"nodes of {sizes} workers, {method}")
        self.cluster = self.bench.cluster(start_method=method)
        self.for_nodes = self.bench.proxy(self.cluster.port)
        self.for_callers = self.bench.proxy(self.cluster.port)
        self.nodes = [self._start_node(size) for size in sizes]
        for node in self.nodes:
            node.wait_for("CLIENT_ID: ")
        for number in range(self.jobs):
            self._run_job(number)
            self._heal()
        self.cluster.wait_idle()

    def _start_node(self, size: int) -> Process:
        through = ["--port", str(self.for_nodes.port)] if self.rng.random() < 0.7 else []
        return self.cluster.start_node(size, *through, wait=False)

    # Jobs.

    def _run_job(self, number: int) -> None:
        rng = self.rng
        count = rng.choice([1, 7, 40, 150, 400, 3000])
        seconds = 0.0 if count > 1000 else rng.choice([0.0, 0.002, 0.02, 0.05])
        if count <= 7:
            seconds = 0.5
        bad = tuple(rng.sample(range(count), min(rng.choice([0, 0, 0, 1, 2]), count)))
        how = rng.choice(["exit", "segfault", "raise", "kill", "memory", "hang"])
        pad = rng.choice([0, 0, 0, 100, 5000, 300_000 if count <= 150 else 0])
        way = rng.choice(["map", "imap", "imap_unordered"])
        options: dict[str, Any] = {"chunksize": rng.choice([1, 1, 2, 5, 64])}
        if rng.random() < 0.3:
            options["buffersize"] = rng.choice([1 if seconds < 0.02 else 3, 3, 20, 500])
        if rng.random() < 0.5:
            options["port"] = self.for_callers.port
        if how == "hang" and bad:
            options["timeout"] = TIMEOUT_SECONDS
        weight = rng.choice([0, 0, 0, 3000, 200_000 if count <= 150 else 0])
        shape = rng.choice(["list", "generator", "iterator", "slow", "lists"])
        take = rng.randrange(1, count + 1) if way != "map" and rng.random() < 0.15 else None
        fate = f"bad {bad} {how}" if bad else "all good"
        until = f", dropped after {take}" if take else ""
        self.plan.append(f"job {number}: {way} of {count} in a {shape}, {seconds} s, {fate}, pad {pad}, "
                         f"weight {weight}, {options}{until}")
        self._node_faults = 0
        self._budget.clear()
        oracle = self.bench.oracle()
        work = Work(oracle.path, seconds, bad, how, pad=pad)
        args, starts = _shape(shape, count, rng, weight)
        call = self.bench.call(self.cluster, way, work, args, take=take, starts=starts, **options)
        chunk = max(options["chunksize"], 9 if shape == "lists" else 1)
        deaths = {"raise": 0, "hang": 1}.get(how, 3) * len(bad)
        worst = chunk * self._disturb(call, oracle, rng, seconds, deaths)
        one_by_one = count * ROUND_TRIP_SECONDS if options.get("buffersize", count) <= options["chunksize"] else 0.0
        call.result((JOB_SECONDS if self.long else 90.0) + one_by_one)
        self._judge(call, oracle, bad, how, pad, count if take is None else 0, worst)

    def _judge(
        self, call: Call, oracle: Oracle, bad: tuple[int, ...], how: str, pad: int, count: int, repeats: int
    ) -> None:
        """With `count` 0 the caller has dropped the call half-way: what it has must be right."""
        def value(index: int) -> Any:
            return (square(index), bytes(pad)) if pad else square(index)

        self.calls += 1
        self.repeated += oracle.repeated()
        wrong = {n: v for n, v in call.found.items() if n not in call.errors and v != value(n)}
        assert not wrong, f"{len(wrong)} wrong results: {str(wrong)[:300]}"
        for index, error in call.errors.items():
            assert index in bad, f"innocent index {index}: {error!r}"
            assert type(error) is {"raise": ValueError, "hang": TaskTimeout}.get(how, WorkerLost), repr(error)
        if count:
            assert set(call.errors) == set(bad), f"errors at {sorted(call.errors)}, bad are {bad}"
            oracle.check(call.found, count, repeats=repeats, lost=call.errors, value=value)

    # Faults.

    def _disturb(self, call: Call, oracle: Oracle, rng: random.Random, seconds: float, deaths: int) -> int:
        """Do harm while the call runs; how many chunks may have been repeated for it, and for `deaths` of workers.

        A worker loses two messages at most. Whatever else befalls, no more is out than the window lets out.
        """
        workers = sum(map(_size, self.cluster.nodes))
        message, window = (512, 4096) if seconds < 0.005 else (1, 0)
        worst = 2 * message * deaths
        # A caller that finds no server at its first connection is told so: that is no fault to survive.
        wait_until(lambda: call.ended.is_set() or oracle.counts(), "the first task")
        for _ in range(rng.choice([0, 1, 2, 3, 5, 8])):
            pause = rng.uniform(0.0, 0.5)
            kind = rng.choice(FAULTS)
            if call.ended.wait(pause):
                break
            worst += 2 * message if kind is Round.kill_worker else 2 * workers + 64 + window
            self.plan.append(f"  {pause:.2f} s: {kind.__name__}")
            self.faults[kind.__name__] += 1
            kind(self, oracle, rng)
        return worst

    def _a_node(self, rng: random.Random) -> Process | None:
        """One of those that run, if the job may lose another."""
        running = [node for node in self.nodes if node.popen.poll() is None]
        if not running or self._node_faults >= NODE_FAULTS:
            return None
        self._node_faults += 1
        return rng.choice(running)

    def _replace(self, node: Process, rng: random.Random) -> None:
        self.nodes.remove(node)
        self.nodes.append(self._start_node(rng.randint(1, 3)))

    def kill_worker(self, oracle: Oracle, rng: random.Random) -> None:
        """One that has an argument, unless that argument has had its share."""
        victims = [pid for pid, index in oracle.running().items() if alive(pid) and self._budget[index] < WORKER_KILLS]
        if victims:
            victim = rng.choice(victims)
            self._budget[oracle.running().get(victim, -1)] += 1
            tree.kill(victim)

    def stop_worker(self, oracle: Oracle, rng: random.Random) -> None:
        victims = [pid for pid in oracle.running() if alive(pid)]
        if victims:
            victim = rng.choice(victims)
            tree.kill(victim, signal.SIGSTOP)
            threading.Event().wait(rng.uniform(0.1, 2))
            tree.kill(victim, signal.SIGCONT)

    def kill_node(self, oracle: Oracle, rng: random.Random) -> None:
        if node := self._a_node(rng):
            node.kill()
            node.check_family_gone()
            self._replace(node, rng)

    def drain_node(self, oracle: Oracle, rng: random.Random) -> None:
        if node := self._a_node(rng):
            node.wait_for("CLIENT_ID")
            node.signal(signal.SIGTERM)
            status = node.wait(40)
            assert status == 0, f"a drained node exits with {status}"
            self._replace(node, rng)

    def stop_node(self, oracle: Oracle, rng: random.Random) -> None:
        if node := self._a_node(rng):
            node.signal(signal.SIGSTOP)
            threading.Event().wait(self._seconds(rng))
            node.signal(signal.SIGCONT)

    def kill_server(self, oracle: Oracle, rng: random.Random) -> None:
        self._node_faults += 1
        self.cluster.server.kill()
        threading.Event().wait(rng.uniform(0, 3))
        self.cluster.start_server()

    def restart_server(self, oracle: Oracle, rng: random.Random) -> None:
        self._node_faults += 1
        self.cluster.server.signal(signal.SIGTERM)
        status = self.cluster.server.wait(15)
        assert status == 0, f"a server that restarts exits with {status}"
        self.cluster.start_server()

    def kill_server_and_node(self, oracle: Oracle, rng: random.Random) -> None:
        if node := self._a_node(rng):
            self.cluster.server.kill()
            node.kill()
            self.cluster.start_server()
            self._replace(node, rng)

    def stop_server(self, oracle: Oracle, rng: random.Random) -> None:
        self.cluster.server.signal(signal.SIGSTOP)
        threading.Event().wait(self._seconds(rng))
        self.cluster.server.signal(signal.SIGCONT)

    def cut_network(self, oracle: Oracle, rng: random.Random) -> None:
        self._node_faults += 1
        self._a_proxy(rng).cut()

    def cut_network_mid_frame(self, oracle: Oracle, rng: random.Random) -> None:
        self._node_faults += 1
        proxy = self._a_proxy(rng)
        rule = rng.choice([proxy.up, proxy.down])
        rule.reset, rule.cut_after = rng.random() < 0.5, rng.randrange(200_000)
        threading.Event().wait(rng.uniform(0.1, 1))
        proxy.heal()

    def hold_network(self, oracle: Oracle, rng: random.Random) -> None:
        seconds = self._seconds(rng)
        proxy, ways = self._a_proxy(rng), rng.choice([(True, True), (True, False), (False, True)])
        self._node_faults += seconds > 15
        proxy.hold(up=ways[0], down=ways[1])
        threading.Event().wait(seconds)
        proxy.hold(False)

    def slow_network(self, oracle: Oracle, rng: random.Random) -> None:
        rule = rng.choice([self._a_proxy(rng).up, self._a_proxy(rng).down])
        rule.delay, rule.rate = rng.choice([(0.05, 0.0), (0.3, 0.0), (0.0, 2e6), (0.05, 5e5)])

    def bytewise_network(self, oracle: Oracle, rng: random.Random) -> None:
        proxy = self._a_proxy(rng)
        proxy.up.piece = proxy.down.piece = rng.choice([1, 7, 1000])
        threading.Event().wait(rng.uniform(0.1, 1))
        proxy.up.piece = proxy.down.piece = 65536

    def altering_network(self, oracle: Oracle, rng: random.Random) -> None:
        """Letters of arguments, where they are heavy: twice is one less than a chunk may be altered in a row."""
        rule = self._a_proxy(rng).up if rng.random() < 0.5 else self.for_nodes.down
        rule.spoil, rule.times = MARK * 300, 2

    def misleading_network(self, oracle: Oracle, rng: random.Random) -> None:
        """A bit of the length in a frame's head: its receiver sees it at once, with the next frame, or at 20 s."""
        if self.long:
            self._node_faults += 1
            proxy, task = rng.choice([(self.for_callers, True), (self.for_nodes, False)])
            rule = rng.choice([proxy.up, proxy.down])
            rule.spoil = TASK_HEAD if (rule is proxy.up) is task else RESULT_HEAD
            rule.place, rule.bit, rule.times = rng.choice([5, 6, 7]), 1 << rng.randrange(8), 1

    def drain_node_and_kill_server(self, oracle: Oracle, rng: random.Random) -> None:
        if node := self._a_node(rng):
            node.wait_for("CLIENT_ID")
            node.signal(signal.SIGTERM)
            threading.Event().wait(rng.uniform(0, 0.1))
            self.cluster.server.kill()
            self.cluster.start_server()
            status = node.wait(40)
            assert status == 0, f"a drained node exits with {status}"
            self._replace(node, rng)

    def drop_a_call(self, oracle: Oracle, rng: random.Random) -> None:
        """Another call of this process is given up half-way."""
        other = self.bench.oracle()
        packets = achilles.imap(Work(other.path, 0.01), iter(range(10**9)), **self.cluster.address)
        try:
            next(packets)
        finally:
            packets.close()

    def another_caller(self, oracle: Oracle, rng: random.Random) -> None:
        """It comes with thousands of tasks, and is killed."""
        script = self.cluster.start_script(
            f"from faults.work import Work\nfrom achilles import map\nimport tasks\n"
            f"print('here', flush=True)\nmap(tasks.square, iter(range({rng.choice([1000, 10**9])})))\n")
        script.wait_for("here")
        threading.Event().wait(rng.uniform(0.1, 1))
        script.kill()

    def stranger(self, oracle: Oracle, rng: random.Random) -> None:
        """Whoever connects and talks nonsense, or nothing."""
        import socket

        for _ in range(rng.randint(1, 5)):
            with socket.create_connection(("127.0.0.1", self.cluster.port), timeout=5) as sock:
                sock.sendall(rng.randbytes(rng.randint(0, 300)))

    def _a_proxy(self, rng: random.Random) -> Proxy:
        return rng.choice([self.for_nodes, self.for_callers])

    def _seconds(self, rng: random.Random) -> float:
        """Of silence: mostly under the limit."""
        return rng.uniform(22, 30) if self.long and rng.random() < LONG_SILENCE else rng.uniform(0.1, 3)

    def _heal(self) -> None:
        self.for_nodes.heal()
        self.for_callers.heal()


def _size(node: Process) -> int:
    """How many workers it was started with."""
    command = node.popen.args
    return int(command[command.index("--cpu-count") + 1])  # type: ignore[index, union-attr, arg-type]


FAULTS: list[Callable[[Round, Oracle, random.Random], None]] = [
    Round.kill_worker, Round.kill_worker, Round.kill_worker, Round.stop_worker, Round.kill_node, Round.kill_node,
    Round.drain_node, Round.stop_node, Round.kill_server, Round.restart_server, Round.kill_server_and_node,
    Round.stop_server, Round.cut_network, Round.cut_network, Round.cut_network_mid_frame, Round.hold_network,
    Round.slow_network, Round.bytewise_network, Round.altering_network, Round.misleading_network,
    Round.drain_node_and_kill_server, Round.drop_a_call, Round.another_caller, Round.stranger,
]


def _shape(shape: str, count: int, rng: random.Random, weight: int) -> tuple[Any, Callable[[int], int] | None]:
    """`count` arguments in some guise; for lists of lists, the place of each list's first element.

    An argument is its index, or with `weight` a tuple of it and so many bytes.
    """
    def argument(index: int) -> Any:
        return (index, MARK * (weight // len(MARK))) if weight else index

    arguments = map(argument, range(count))
    if shape == "list":
        return list(arguments), None
    if shape == "generator":
        return lambda: arguments, None
    if shape == "slow":
        return _slowly(arguments, {rng.randrange(count) for _ in range(3)}), None
    if shape == "iterator":
        return arguments, None
    lists, at = [], 0
    while at < count:
        size = rng.randint(0 if lists else 1, 9)
        lists.append(list(itertools.islice(arguments, size)))
        at += size
    firsts = list(itertools.accumulate(map(len, lists), initial=0))
    return lists, firsts.__getitem__


def _slowly(arguments: Iterator[Any], stops: set[int]) -> Iterator[Any]:
    pause = threading.Event()
    for number, argument in enumerate(arguments):
        if number in stops:
            pause.wait(0.2)
        yield argument


def soak(hours: float, seed: int, *, rounds: int | None = None, only: int | None = None, long: bool = True) -> int:
    """Rounds until the time is over; how many failed. `only` replays that round."""
    until, failed, calls, repeated = time.monotonic() + hours * 3600, 0, 0, 0
    faults: Counter[str] = Counter()
    numbers = iter([only]) if only is not None else itertools.count() if rounds is None else iter(range(rounds))
    print(f"soak: seed {seed}, {hours:g} h; replay a round with --seed {seed} --round N", flush=True)
    for number in numbers:
        if time.monotonic() > until and only is None:
            break
        rng = random.Random(f"{seed}:{number}")
        began = time.monotonic()
        bench = Bench(rng)
        this = Round(bench, rng, jobs=rng.randint(*JOBS), long=long)
        try:
            with bench:
                this.run()
            verdict = "ok"
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            failed += 1
            verdict = f"FAILED: {type(e).__name__}: {e}"
            traceback.print_exc(file=sys.stdout)
            print("\n".join(["the plan:", *this.plan, f"everything is left in {bench.folder}"]))
            conftest.gc.collect()
        if time.monotonic() - began > SLOW_SECONDS and verdict == "ok":
            print("\n".join(["slow; the plan:", *this.plan]))
        calls, repeated, faults = calls + this.calls, repeated + this.repeated, faults + this.faults
        print(f"{time.strftime('%H:%M:%S')} round {number}: {this.calls} jobs, {this.faults.total()} faults, "
              f"{this.repeated} repeated, {time.monotonic() - began:.1f} s: {verdict}", flush=True)
    told = ", ".join(f"{name} {count}" for name, count in faults.most_common())
    print(f"soak: {calls} jobs, {faults.total()} faults ({told}), {repeated} executions repeated, {failed} rounds "
          f"failed; seed {seed}", flush=True)
    return failed

"""The peers: how each is started, given a map, and ended, as its own documentation advises.

A peer is a small adapter. All peers get the same functions and the same arguments. A peer has those of the methods
`map`, `imap`, `unordered`, `apply_async` and `submit` that its package has; a row that needs another one leaves the
peer out. Each peer runs in a process of its own (drive.py).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import descendants

from .work import Chunks

__all__ = ["PEERS", "Peer", "absent"]

DRIVE = Path(__file__).with_name("drive.py")
PEERS: dict[str, type[Peer]] = {}


class Peer:
    """One way to spread calls over two or more processes."""

    name = ""
    package = ""  # what must be importable
    statement = ""  # what its users write first; the `import` row times it
    by_value = True  # it sends lambdas and classes of __main__

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            PEERS[cls.name] = cls

    @classmethod
    def command(cls, workers: int) -> list[str]:
        """What runs the driver, before the driver's own arguments."""
        return [sys.executable, "-m", "bench.drive"]

    def start(self) -> None:
        """Have workers that can be given work."""

    @classmethod
    def can(cls, method: str) -> bool:
        """Whether this peer has a method of its own of this name."""
        return getattr(cls, method) is not getattr(Peer, method)

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        """All results, in any order."""
        raise NotImplementedError

    def imap(self, function: Callable[[Any], Any], args: Iterable[Any]) -> Iterator[Any]:
        """The results in the order of the arguments, chunksize 1."""
        raise NotImplementedError

    def unordered(self, function: Callable[[Any], Any], args: Iterable[Any]) -> Iterator[Any]:
        """The results as they come, chunksize 1."""
        raise NotImplementedError

    def apply_async(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Begin one call; `get` of the answer gives the result."""
        raise NotImplementedError

    def submit(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Begin one call; `result` of the answer gives the result."""
        raise NotImplementedError

    def end(self) -> None:
        """Give everything back."""

    def roles(self) -> Mapping[str, Sequence[int]]:
        """Who is who: a role to its processes."""
        return {"caller": [os.getpid()], "others": descendants(os.getpid())}

    def parts(self) -> dict[str, float]:
        """Of the last start: a part to the seconds since its beginning."""
        return {}


def absent(name: str) -> str:
    """Why a peer cannot be measured here, or nothing."""
    peer = PEERS.get(name)
    if peer is None:
        return "not known"
    if importlib.util.find_spec(peer.package) is None:
        return "not installed"
    return "" if shutil.which(peer.command(2)[0]) else "not installed"


class Pooled(Peer):
    """A peer with a Pool, which has the standard library's methods."""

    pool: Any

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        return self.pool.map(function, args, chunksize)  # type: ignore[no-any-return]

    def imap(self, function: Callable[[Any], Any], args: Iterable[Any]) -> Iterator[Any]:
        return self.pool.imap(function, args)  # type: ignore[no-any-return]

    def unordered(self, function: Callable[[Any], Any], args: Iterable[Any]) -> Iterator[Any]:
        return self.pool.imap_unordered(function, args)  # type: ignore[no-any-return]

    def apply_async(self, function: Callable[[Any], Any], argument: Any) -> Any:
        return self.pool.apply_async(function, (argument,))

    def end(self) -> None:
        self.pool.close()
        self.pool.join()


class Executing(Peer):
    """A peer with an executor, which has the standard library's methods."""

    executor: Any

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.executor.map(function, args, chunksize=chunksize or 1))

    def submit(self, function: Callable[[Any], Any], argument: Any) -> Any:
        return self.executor.submit(function, argument)

    def end(self) -> None:
        self.executor.shutdown(wait=True)


class OnLocalCluster(Peer):
    """A server and one node that are processes of this machine."""

    package, statement = "achilles", "import achilles"

    def start(self) -> None:
        import time

        from achilles import LocalCluster, local

        self._parts: dict[str, float] = {}
        self._began = time.monotonic()
        original = local._wait_ready

        def noted(process: Any) -> Any:
            answer = original(process)
            self._note("server listens" if process is self.cluster.server else "node has joined")
            return answer

        self.cluster = LocalCluster(nodes=1, cpu_count=self.workers)
        local._wait_ready = noted
        try:
            self.cluster.start()
        finally:
            local._wait_ready = original
        self.where = {"host": self.cluster.host, "port": self.cluster.port, "username": self.cluster.username,
                      "secret_key": self.cluster.secret_key}

    def end(self) -> None:
        self.cluster.stop()

    def roles(self) -> Mapping[str, Sequence[int]]:
        nodes = [node.pid for node in self.cluster.nodes]
        workers = [pid for node in nodes for pid in descendants(node)]
        server = self.cluster.server
        return {"caller": [os.getpid()], "server": [server.pid] if server else [], "node": nodes, "workers": workers}

    def parts(self) -> dict[str, float]:
        return self._parts

    def _note(self, part: str) -> None:
        import time

        self._parts[part] = time.monotonic() - self._began


class Achilles(Pooled, OnLocalCluster):
    """The Pool, and from the first `submit` on an Executor beside it."""

    name = "achilles"

    def start(self) -> None:
        from achilles import Pool

        OnLocalCluster.start(self)
        self.pool = Pool(**self.where)
        self.executor: Any = None
        self._note("caller is connected")

    def submit(self, function: Callable[[Any], Any], argument: Any) -> Any:
        if self.executor is None:
            from achilles import Executor

            self.executor = Executor(**self.where)
        return self.executor.submit(function, argument)

    def end(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True)
        Pooled.end(self)
        OnLocalCluster.end(self)


class AchillesEncrypted(Achilles):
    """The same on a server and a node that encrypt: `--peers achilles.encrypted` shows the price of it."""

    name = "achilles.encrypted"
    statement = "import achilles; assert achilles.configuring.can_encrypt()"

    def start(self) -> None:
        from types import SimpleNamespace

        from achilles import Pool

        self._parts = {}
        secret = os.urandom(32).hex()
        settings = {"ACHILLES_SECRET_KEY": secret, "ACHILLES_USERNAME": "bench", "ACHILLES_HOST": "127.0.0.1"}
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(sys.path)}

        def begin(role: str, *options: str) -> Any:
            command = [sys.executable, "-m", f"achilles.{role}", "--encrypt", "--log-level", "error"]
            return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)

        server = begin("server", "--port", "0")
        port = server.stdout.readline().rpartition(":")[2].strip()
        node = begin("node", "--port", port, "--cpu-count", str(self.workers))
        while "CLIENT_ID" not in node.stdout.readline():
            pass

        def stop() -> None:
            for process in (node, server):
                process.terminate()
                process.communicate()

        self.cluster = SimpleNamespace(server=server, nodes=[node], stop=stop)
        self.where = {"host": "127.0.0.1", "port": int(port), "username": "bench", "secret_key": secret,
                      "encrypt": True}
        self.pool = Pool(**self.where)
        self.executor = None


class AchillesCalls(OnLocalCluster):
    """The original calls, on the same; each connects anew.

    It has no `unordered`: a packet holds a result for each worker of a node, so that one waits for its neighbours.
    """

    name = "achilles.imap_unordered"

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        from achilles import imap_unordered

        with imap_unordered(function, args, chunksize=chunksize or 1, **self.where) as packets:
            return [value for packet in packets for value in packet["RESULT"]]

    def imap(self, function: Callable[[Any], Any], args: Iterable[Any]) -> Iterator[Any]:
        from achilles import imap

        with imap(function, args, **self.where) as packets:
            for packet in packets:
                yield from packet["RESULT"]


class Multiprocessing(Pooled):
    """The standard library's Pool."""

    name = package = "multiprocessing"
    statement = "from multiprocessing import Pool, pool"
    by_value = False

    def start(self) -> None:
        self.pool: Any = importlib.import_module(self.package).Pool(self.workers)


class Multiprocess(Multiprocessing):
    """The same over dill."""

    name = package = "multiprocess"
    statement = "from multiprocess import Pool, pool"
    by_value = True


class RayPool(Multiprocessing):
    """Ray's own Pool."""

    name = package = "ray"
    statement = "import ray"
    by_value = True

    def start(self) -> None:
        import logging

        import ray
        from ray.util.multiprocessing import Pool

        ray.init(num_cpus=self.workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
                 _node_ip_address="127.0.0.1")
        self.pool = Pool(self.workers)

    def end(self) -> None:
        import ray

        self.pool.terminate()
        ray.shutdown()


def map_chunks(run: Callable[[Any, list[Any]], Iterable[Any]], function: Callable[[Any], Any], args: Iterable[Any],
               chunksize: int | None) -> list[Any]:
    """By `run`, a map without chunks; the documentations of those that have none advise to make them."""
    if chunksize in (None, 1):
        return list(run(function, list(args)))
    waiting = iter(args)
    chunks = list(iter(lambda: list(itertools.islice(waiting, chunksize)), []))
    return [value for chunk in run(Chunks(function), chunks) for value in chunk]


class Dask(Peer):
    """A scheduler and workers of one thread each, over TCP; chunks are made by hand."""

    name, package, statement = "dask", "distributed", "from distributed import Client"

    def start(self) -> None:
        from distributed import Client, LocalCluster

        self.cluster: Any = LocalCluster(
            n_workers=self.workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50)
        self.client: Any = Client(self.cluster)

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        def run(call: Callable[[Any], Any], items: list[Any]) -> list[Any]:
            if items and getattr(items[0], "__len__", None) and len(items[0]) > 1 << 20:
                items = self.client.scatter(items, hash=False)  # as it warns to do with large arguments
            return self.client.gather(self.client.map(call, items, pure=False))  # type: ignore[no-any-return]

        return map_chunks(run, function, args, chunksize)

    def end(self) -> None:
        self.client.close()
        self.cluster.close()

    def submit(self, function: Callable[[Any], Any], argument: Any) -> Any:
        return self.client.submit(function, argument, pure=False)


class Joblib(Peer):
    """Parallel, on its loky processes, which it keeps while the `with` lasts."""

    name = package = "joblib"
    statement = "from joblib import Parallel, delayed"

    def start(self) -> None:
        from joblib import Parallel

        self.parallel: Any = Parallel(n_jobs=self.workers).__enter__()

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        from joblib import delayed

        self.parallel.batch_size = chunksize or "auto"
        return self.parallel(delayed(function)(argument) for argument in args)  # type: ignore[no-any-return]

    def end(self) -> None:
        self.parallel.__exit__(None, None, None)


class Futures(Executing):
    """The standard library's ProcessPoolExecutor."""

    name = package = "concurrent.futures"
    statement = "from concurrent.futures import ProcessPoolExecutor"
    by_value = False

    def start(self) -> None:
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(self.workers)


class Loky(Executing):
    """Its reusable executor."""

    name = package = "loky"
    statement = "from loky import get_reusable_executor"

    def start(self) -> None:
        from loky import get_reusable_executor

        self.executor = get_reusable_executor(self.workers, timeout=None)


class Mpi4py(Executing):
    """mpi4py.futures, started with all its processes by mpiexec; it pickles functions by name alone."""

    name, package, statement = "mpi4py", "mpi4py", "import mpi4py.futures"
    by_value = False

    @classmethod
    def command(cls, workers: int) -> list[str]:
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        launcher = shutil.which("mpiexec", path=here) or "mpiexec"
        return [launcher, "-n", str(workers + 1), sys.executable, "-m", "mpi4py.futures", "-m", "bench.drive"]

    def start(self) -> None:
        from mpi4py.futures import MPIPoolExecutor

        self.executor = MPIPoolExecutor()
        self.executor.bootup()

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.executor.map(function, args, chunksize=chunksize or 1, unordered=True))


class Scoop(Peer):
    """futures.map, started with all its processes by its launcher; chunks are made by hand."""

    name, package, statement = "scoop", "scoop", "from scoop import futures"
    by_value = False

    @classmethod
    def command(cls, workers: int) -> list[str]:
        return [sys.executable, "-m", "scoop", "-n", str(workers), str(DRIVE)]

    def map(self, function: Callable[[Any], Any], args: Iterable[Any], chunksize: int | None) -> list[Any]:
        from scoop import futures

        return map_chunks(lambda call, items: futures.map(call, items), function, args, chunksize)

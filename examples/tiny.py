"""achilles in one file: a server, nodes and a controller, to be read in fifteen minutes.

`python examples/tiny.py` runs a map on a server and two nodes, and prints ``[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]``.
On several machines: `tiny.py server HOST PORT`, then `tiny.py node HOST PORT`, with TINY_SECRET set on each of them.

A cluster is a `multiprocessing.Pool` with a network in its middle. A task is a function with one argument::

    controller           server                    node                      worker
    imap, feed ──TASK──▶ handle, waiting ──TASK──▶ run_node ──apply_async──▶ run: function(argument)
    imap ◀────RESULT──── handle, given ◀──RESULT── send ◀──────callback───── run: the result as bytes

The handshake and the frames are those of achilles/PROTOCOL.md, sections 2 and 3. Only a peer with the secret gets in,
and nobody on the way can alter a byte. Nothing is encrypted. The server moves pickled bytes and never loads them.

The file leaves out the parts that make a cluster dependable. Its weaknesses, with the functions that show them:

- Lost tasks: a killed worker or node takes its tasks along. The map waits for ever (`run_node`, `serve_client`).
- Silence: nothing tells a stopped node, or a cut cable, from a long task (`recv`).
- Lost server: no peer connects again. The map fails, and the nodes end (`imap`, `run_node`).
- Swallowed arguments: `imap` reads all of them before it sends the first. It never starts on an endless generator.
- Unread results: the server writes under its lock. A caller that stops reading stops all others (`handle`).
- One frame a task: each task makes a journey of its own. Its worker idles meanwhile (`feed`, `handle`).
- Slow task first: results wait behind a slow one. There is no other order (`imap`).
- One line for all: a new map waits until all tasks of an older one are given out (`handle`).
- No cancel: the tasks of a caller that has left run all the same (`serve_client`).
- Functions by name: pickle sends a name. No lambda travels, and nodes must import the module (`imap`, `run`).
- Errors as text: whatever the function raises, the caller gets a RuntimeError (`run`, `imap`).
- Open door: a stranger that connects and says nothing keeps a thread for ever (`serve`, `receive`).
"""

import hashlib
import hmac
import multiprocessing
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from functools import partial

WORKERS = 2  # of each node; os.cpu_count() would use the whole machine
USER, LABEL = b"ann", b"achilles/1 "
HELLO, TASK, RESULT = 1, 7, 9  # kinds of frames, with their numbers from PROTOCOL.md, section 5


def session_keys(secret, greeting, claim):
    """Return the proofs of client and server, then the keys with which each signs its frames (section 2)."""
    key = hashlib.scrypt(secret.encode(), salt=LABEL + USER, n=2**14, r=8, p=1, dklen=32)  # slow, so guessing is slow
    # Both sides have put fresh nonces into these bytes: a recorded connection is good for no other.
    transcript = hashlib.sha256(bytes(32) + greeting + claim).digest()
    prk = hmac.digest(transcript, key, "sha256")
    labels = b"client proof", b"server proof", b"client data", b"server data"
    return [hmac.digest(prk, LABEL + label + b"\x01", "sha256") for label in labels]


def welcome(sock, secret):
    """Do the server's side of the handshake; return the Link."""
    greeting = struct.pack(">4sH2x32s", b"ACHL", 1, os.urandom(32))
    sock.sendall(greeting)
    claim, proof = receive(sock, 72), receive(sock, 32)
    if claim[:6] != greeting[:6]:
        raise ConnectionError("the client speaks another protocol or version")
    client_proof, server_proof, client_key, server_key = session_keys(secret, greeting, claim)
    if not hmac.compare_digest(proof, client_proof):
        sock.sendall(bytes(32))  # the refusal
        raise ConnectionError("the client has another secret")
    sock.sendall(server_proof)
    return Link(sock, server_key, client_key)


def connect(address, role, secret):
    """Connect as a controller, b"C", or a node, b"N". Do the client's side of the handshake; return the Link."""
    sock = socket.create_connection(address)
    greeting = receive(sock, 40)
    claim = struct.pack(">4sHsx32s32s", b"ACHL", 1, role, os.urandom(32), USER)
    client_proof, server_proof, client_key, server_key = session_keys(secret, greeting, claim)
    sock.sendall(claim + client_proof)
    if not hmac.compare_digest(receive(sock, 32), server_proof):
        sock.close()
        raise ConnectionError("the server has another secret")
    return Link(sock, client_key, server_key)


def receive(sock, count):
    """Return the next `count` bytes. TCP is a stream: one recv may return fewer."""
    received = b""
    while len(received) < count:
        piece = sock.recv(count - len(received))
        if not piece:
            raise ConnectionError("the peer has closed the connection")
        received += piece
    return received


class Link:
    """A connection after its handshake, for signed frames (section 3). One thread sends at a time, one receives."""

    def __init__(self, sock, send_key, recv_key):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small frames leave at once
        self.sock = sock
        self.send_key, self.recv_key = send_key, recv_key
        self.sent, self.received = 0, 0  # frames

    def send(self, kind, number, payload=b""):
        """Send a frame. If the peer is gone, the frame is lost; `recv` tells it."""
        envelope = number.to_bytes(8, "big") + payload
        signed = struct.pack(">BBHI", kind, 0, 0, len(envelope)) + envelope
        tag = hmac.digest(self.send_key, self.sent.to_bytes(8, "big") + signed, "sha256")
        self.sent += 1
        with suppress(OSError):
            self.sock.sendall(signed + tag)

    def recv(self):
        """Wait for the next frame; return its kind, number and payload. ConnectionError: the peer is gone."""
        head = receive(self.sock, 8)
        kind, _, _, length = struct.unpack(">BBHI", head)
        envelope = receive(self.sock, length)
        tag = receive(self.sock, 32)
        expected = hmac.digest(self.recv_key, self.received.to_bytes(8, "big") + head + envelope, "sha256")
        self.received += 1
        if not hmac.compare_digest(tag, expected):
            raise ConnectionError("a frame was altered on its way")
        return kind, int.from_bytes(envelope[:8], "big"), envelope[8:]


class Server:
    """Give the tasks of all controllers to the workers of all nodes, and give the results back."""

    def __init__(self):
        self.lock = threading.Lock()  # guards all below, and sending on every link
        self.waiting = deque()  # tasks that no node has: (controller's link, index of the argument, task)
        self.given = {}  # tasks that a node has: number -> (controller's link, index of the argument)
        self.count = 0  # of tasks that were given to nodes; the number of the next one
        self.idle = deque()  # nodes' links, each as often as the node has idle workers

    def serve(self, address, secret):
        """Accept connections for ever. Each has a thread of its own."""
        listener = socket.create_server(address)
        print(listener.getsockname()[1], flush=True)  # the port: this server is ready
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self.serve_client, args=[sock, secret], daemon=True).start()

    def serve_client(self, sock, secret):
        """Carry out a client's frames, until it is gone."""
        with suppress(OSError):
            link = welcome(sock, secret)
            while True:
                kind, number, payload = link.recv()
                self.handle(link, kind, number, payload)
        with self.lock:
            self.idle = deque(node for node in self.idle if node.sock is not sock)
        sock.close()

    def handle(self, link, kind, number, payload):
        """Carry out one frame, then give waiting tasks to idle workers."""
        with self.lock:
            if kind == HELLO:  # a node has so many workers
                self.idle.extend([link] * number)
            elif kind == TASK:  # a controller has work; its number is the argument's index
                self.waiting.append((link, number, payload))
            elif kind == RESULT:  # a node's worker has done a task
                controller, index = self.given.pop(number)
                controller.send(RESULT, index, payload)
                self.idle.append(link)
            while self.waiting and self.idle:
                controller, index, task = self.waiting.popleft()
                node = self.idle.popleft()
                self.given[self.count] = controller, index
                node.send(TASK, self.count, task)
                self.count += 1


def run_node(address, secret):
    """Run tasks in worker processes until the server is gone."""
    with multiprocessing.Pool(WORKERS) as pool:
        link = connect(address, b"N", secret)
        link.send(HELLO, WORKERS)
        print(address[1], flush=True)  # this node is ready
        with suppress(ConnectionError):
            while True:
                _, number, task = link.recv()
                pool.apply_async(run, [task], callback=partial(link.send, RESULT, number))


def run(task):
    """Run a task in a worker. Return, as bytes, whether that went well, and the result or the error's text."""
    try:
        function, argument = pickle.loads(task)
        return pickle.dumps((True, function(argument)))
    except Exception as error:
        return pickle.dumps((False, repr(error)))


def imap(function, arguments, address, secret):
    """Yield function(argument) for each argument, in their order. Nodes of the server at `address` make the calls."""
    tasks = [pickle.dumps((function, argument)) for argument in arguments]
    link = connect(address, b"C", secret)
    threading.Thread(target=feed, args=[link, tasks]).start()
    answers = {}  # those that have come before their turn
    with link.sock:
        for index in range(len(tasks)):
            while index not in answers:
                _, answered, answer = link.recv()
                answers[answered] = answer
            good, result = pickle.loads(answers.pop(index))
            if not good:
                raise RuntimeError(result)
            yield result


def feed(link, tasks):
    """Send all tasks, in a thread of its own: the server takes no task while a result waits for `imap` to read it."""
    for index, task in enumerate(tasks):
        link.send(TASK, index, task)


def square(number):
    """Return the number's square. Nodes find the function by its name, in this file."""
    return number**2


def demonstrate():
    """Start a server and two nodes, run a map on them, and end them."""
    secret, port = os.urandom(16).hex(), "0"  # the system chooses a port
    environment = os.environ | {"TINY_SECRET": secret}  # a command line could be read by other users
    processes = []
    for role in ("server", "node", "node"):
        command = [sys.executable, __file__, role, "127.0.0.1", port]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        port = processes[-1].stdout.readline().strip()  # each prints the server's port when it is ready
    try:
        print(list(imap(square, range(10), ("127.0.0.1", int(port)), secret)))
    finally:
        processes[0].terminate()  # the nodes end with their server
        for process in processes:
            process.communicate()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        demonstrate()
    elif sys.argv[1] == "server":
        Server().serve((sys.argv[2], int(sys.argv[3])), os.environ["TINY_SECRET"])
    else:
        run_node((sys.argv[2], int(sys.argv[3])), os.environ["TINY_SECRET"])

#!/usr/bin/env python3
"""How much of its speed a run keeps while thousands of strangers hold connections to its coordinator, and how much memory they
take: calm and disturbed in turns, medians.

    cargo build --release && tests/load/strangers.py

Strangers come from a hundred addresses (127.0.1.*), so that no limit for one address helps. `silent` say nothing, `garbage` send
random bytes, `slow` ask for the job by HTTP/2 and take no answer, `deaf` send pings by HTTP/2 and never read, `joined` send what a
worker sends until it has joined, and no more. With --tls `slow` and `deaf` shake hands first, without a certificate, and nobody joins.
It fails where a kind takes more than a tenth of the speed, or the coordinator's memory comes to twice what it was.
"""

import argparse
import json
import os
import random
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = """
name = "strangers"
[data]
format = "synthetic"
task = "classification"
shape = [784]
classes = 10
samples = 4096
test_samples = 0
[model]
kind = "mlp"
hidden = [512, 256]
[train]
partitions = 2
micro_batch = 64
steps = 1000000000
loss = "cross-entropy"
optimizer = { kind = "sgd", lr = 0.001 }
[checkpoint]
every_steps = 0
"""


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name, value):
    """A header field without indexing (RFC 7541, 6.2.2)."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def slow(host):
    """A call of GetJob whose answer may not be sent: the window is 0 (RFC 9113, 3.4, 6.5.2)."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/unisono.v1.Coordinator/GetJob")]
    fields += [(b":authority", host.encode()), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    message = b"\x0a\x05" + b"0.1.0"
    body = b"\x00" + len(message).to_bytes(4, "big") + message
    settings = (4).to_bytes(2, "big") + (0).to_bytes(4, "big")
    head = b"".join(literal(name, value) for name, value in fields)
    return (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, settings) + frame(1, 4, 1, head) + frame(0, 1, 1, body))


def deaf():
    """Pings (RFC 9113, 6.7), each of which asks for an answer."""
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + 2000 * frame(6, 0, 0, bytes(8))


def joining(address, start):
    """What a worker that `start` starts sends until it has joined: frames (RFC 9113, 4.1) up to the first data of its second call."""
    with socket.create_server(("127.0.0.1", 0)) as between:
        between.settimeout(30)
        worker = start("127.0.0.1:%d" % between.getsockname()[1])
        try:
            theirs, _ = between.accept()
            with theirs, socket.create_connection(address.split(":")) as ours:
                back = threading.Thread(target=copy, args=(ours, theirs), daemon=True)
                back.start()
                said = read(theirs, 24)
                ours.sendall(said)
                while True:
                    head = read(theirs, 9)
                    whole = head + read(theirs, int.from_bytes(head[:3], "big"))
                    said += whole
                    if head[3] == 0 and int.from_bytes(head[5:], "big") > 1 and len(whole) > 9:
                        return said
                    ours.sendall(whole)
        finally:
            worker.kill()
            worker.wait()


def read(wire, count):
    got = b""
    while len(got) < count:
        got += wire.recv(count - len(got)) or sys.exit("a worker ended before it had joined")
    return got


def copy(wire, to):
    try:
        while some := wire.recv(1 << 16):
            to.sendall(some)
    except OSError:
        pass  # the other side has what it needs


def strangers(kind, address, count, tls, joins):
    """Connections that stay open as long as what this returns."""
    host, port = address.split(":")
    noise = random.Random(7).randbytes(4096)
    first = {"silent": b"", "garbage": noise, "slow": slow(address), "deaf": deaf(), "joined": joins}[kind]
    held = []
    for i in range(count):
        wire = socket.socket()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.bind((f"127.0.1.{1 + i % 100}", 0))
        wire.settimeout(5)
        try:
            wire.connect((host, int(port)))
            if tls and kind in ("slow", "deaf"):
                wire = tls.wrap_socket(wire)
            wire.send(first)
        except OSError:
            pass  # it was turned away at once
        held.append(wire)
    return held


def files(pid):
    """Open files of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def memory(pid):
    """The most that a process has held since the last question, in MiB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return int(fields["VmHWM"].split()[0]) / 1024


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--program", default=str(ROOT / "target/release/unisono"))
    args.add_argument("--connections", type=int, default=10_000)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--seconds", type=float, default=4.0)
    args.add_argument("--transport", default="grpc", choices=["grpc", "shm"])
    args.add_argument("--tls", action="store_true", help="the coordinator asks for certificates")
    args = args.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        run = lambda *command: subprocess.run([args.program, *command], cwd=folder, check=True, capture_output=True)
        Path(folder, "job.toml").write_text(JOB)
        plain = {name: value for name, value in os.environ.items() if name != "UNISONO_IDENTITY"}
        identity = dict.fromkeys(("coordinator", "worker", "operator"), plain)
        tls = None
        if args.tls:
            run("cert", "certs")
            tls = ssl.create_default_context(cafile=Path(folder, "certs/worker/ca.crt"))
            tls.check_hostname = False
            identity = {name: {**env, "UNISONO_IDENTITY": f"certs/{name}"} for name, env in identity.items()}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "127.0.0.1:%d" % free.getsockname()[1]
        start = lambda name, *more: subprocess.Popen([args.program, name, *more], cwd=folder, env=identity[name],
                                                     stderr=open(Path(folder, "log"), "a"), stdout=subprocess.DEVNULL)
        coordinator = start("coordinator", "job.toml", "--listen", address)
        workers = [start("worker", "--coordinator", address, "--transport", args.transport) for _ in range(2)]

        def steps():
            asked = subprocess.run([args.program, "status", "--json", "--coordinator", address], cwd=folder,
                                   env=identity["operator"], capture_output=True, text=True)
            if asked.returncode != 0 and coordinator.poll() is not None:
                sys.exit("the coordinator has ended: " + Path(folder, "log").read_text()[-2000:])
            return json.loads(asked.stdout)["steps"] if asked.returncode == 0 else None

        def counted():
            """Steps so far; the status has to be answered while strangers are there."""
            now = steps()
            if now is None:
                sys.exit("the coordinator does not say where it stands")
            return now

        def rate():
            """Steps a second."""
            began, before = time.monotonic(), counted()
            time.sleep(args.seconds)
            return (counted() - before) / (time.monotonic() - began)

        try:
            while not steps():
                time.sleep(0.2)
            time.sleep(1)
            # What an allocator keeps of those who have gone is theirs.
            memory(coordinator.pid)
            time.sleep(1)
            calm_memory = memory(coordinator.pid)
            print(f"{args.connections} connections, 2 workers by {args.transport}{' and TLS' if args.tls else ''}")
            print(f"{'':8} {'calm steps/s':>14} {'disturbed':>10} {'kept':>6} {'calm MiB':>10} {'disturbed':>10} {'held':>6}")
            again = lambda between: start("worker", "--coordinator", between, "--transport", "grpc")
            joins = b"" if tls else joining(address, again)
            bad = []
            for kind in ("silent", "garbage", "slow", "deaf") + (() if tls else ("joined",)):
                figures = []
                for _ in range(args.rounds):
                    calm = rate()
                    few = files(coordinator.pid)
                    memory(coordinator.pid)
                    held = strangers(kind, address, args.connections, tls, joins)
                    open_now = files(coordinator.pid) - few
                    disturbed, more = rate(), memory(coordinator.pid)
                    for wire in held:
                        wire.close()
                    time.sleep(1)
                    figures.append((calm, disturbed, disturbed / calm, more, open_now))
                calm, disturbed, kept, more, open_now = map(statistics.median, zip(*figures))
                print(f"{kind:8} {calm:14.0f} {disturbed:10.0f} {kept:6.2f} {calm_memory:10.1f} {more:10.1f} {open_now:6.0f}",
                      flush=True)
                if kept < 0.9 or more >= 2 * calm_memory:
                    bad.append(kind)
            return f"they cost too much: {', '.join(bad)}" if bad else 0
        finally:
            for process in [coordinator, *workers]:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures unisono beside PyTorch DistributedDataParallel and prints a Markdown table.

Both sides train the same shapes with the same optimizer and batch per worker, one compute thread a worker, on this
machine; ours is `unisono bench`. They take turns (A B A B), because machines are noisy; the table holds medians. Without
--workers and --transport it has one worker, two, and two over gRPC instead of shared memory.

    cargo build --release
    tests/peers/run.py --install            # makes a scratch environment with PyTorch first
    tests/peers/run.py --rounds 1 --seconds 2 --only mlp
    tests/peers/run.py --workers 1 2 4 --transport shm grpc
    tests/peers/run.py --memory --only mlp-wide --workers 2

With --memory it compares what all processes of a side hold together at most, instead: each shared page is counted once
(Linux's PSS, looked at ten times a second), in runs of their own, as looking takes time.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKLOADS = ["softmax", "mlp", "mlp-wide", "cnn", "gpt", "dlrm"]
# Both sides: one compute thread a worker process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(command):
    """Runs one command; gives its stdout, or ends with its stderr."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def peak_memory(command):
    """Runs one command; gives the most MiB that it and its children held at once."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
                               start_new_session=True)
    peak = 0
    while process.poll() is None:
        held = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == process.pid:
                    held += int(re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)[1])
            except (OSError, TypeError):
                pass  # it has just ended
        peak = max(peak, held)
        time.sleep(0.1)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {process.returncode}")
    return peak / 1024


def install(venv):
    """Makes the scratch environment where it is not there yet."""
    python = venv / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", venv])
    if subprocess.run([python, "-c", "import torch, numpy"], capture_output=True).returncode != 0:
        index = ["--index-url", "https://download.pytorch.org/whl/cpu"]
        pip = [str(python), "-m", "pip", "install", "--quiet", "torch", "numpy"]
        # The CPU index where it can be reached; the default index's larger build otherwise.
        if subprocess.run(pip + index).returncode != 0:
            subprocess.run(pip, check=True)
    return python


class Unisono:
    """Our side: `unisono bench`."""

    def __init__(self, program, seconds):
        self.program, self.seconds = program, seconds

    def command(self, workload, workers, transport):
        command = [self.program, "bench", workload, "--workers", workers, "--transport", transport]
        return command + ["--seconds", self.seconds, "--json"]

    def rate(self, *what):
        return json.loads(run(self.command(*what)).splitlines()[-1])["samples_per_second"]

    def memory(self, *what):
        return peak_memory(self.command(*what))


class Torch:
    """The other side: torch_ddp.py."""

    def __init__(self, python, seconds):
        self.python, self.seconds = python, seconds

    def command(self, workload, workers, _):
        return [self.python, HERE / "torch_ddp.py", workload, workers, self.seconds]

    def rate(self, *what):
        return float(re.search(r"samples/s=([\d.]+)", run(self.command(*what)))[1])

    def memory(self, *what):
        return peak_memory(self.command(*what))


def machine():
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the environment, with PyTorch, where it is missing")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "unisono-peers-venv")
    parser.add_argument("--program", type=Path, default=HERE.parent.parent / "target/release/unisono")
    parser.add_argument("--seconds", type=float, default=12, help="length of each measurement (default 12)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="worker processes of each side")
    parser.add_argument("--transport", nargs="+", choices=["auto", "shm", "grpc"], help="ways of our gradients and weights")
    parser.add_argument("--memory", action="store_true", help="compare memory instead of speed (Linux)")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="WORKLOAD")
    options = parser.parse_args()
    if options.workers or options.transport:
        rows = [(n, way) for way in options.transport or ["auto"] for n in options.workers or [1, 2]]
    else:
        rows = [(1, "auto"), (2, "auto"), (2, "grpc")]
    if min([options.rounds, *(n for n, _ in rows)]) < 1 or options.seconds <= 0:
        parser.error("--rounds, --workers and --seconds must be above 0")
    if not options.program.exists():
        parser.error(f"there is no {options.program}: run `cargo build --release` first")
    python = install(options.venv) if options.install else options.venv / "bin" / "python"
    if not python.exists():
        parser.error(f"there is no {python}: use --install, or --venv for an environment that has PyTorch")

    sides = [Unisono(options.program, options.seconds), Torch(python, options.seconds)]
    versions = run([options.program, "--version"]).strip(), "PyTorch " + run(
        [python, "-c", "import torch; print(torch.__version__)"]).strip()
    print(f"{machine()}; {datetime.date.today()}; {versions[0]}, {versions[1]} (DistributedDataParallel over gloo); "
          f"medians of {options.rounds} alternating runs of {options.seconds:g} s, one thread a worker.\n")
    unit = "MiB" if options.memory else "samples/s"
    print(f"| workload | workers | transport | unisono, {unit} | PyTorch, {unit} | ratio | spread of ours, theirs |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for workload in options.only:
        for workers, way in rows:
            measure = [side.memory if options.memory else side.rate for side in sides]
            taken = [[of_side(workload, workers, way) for of_side in measure] for _ in range(options.rounds)]
            ours, theirs = map(list, zip(*taken))
            a, b = statistics.median(ours), statistics.median(theirs)
            spread = [f"{(max(side) - min(side)) / statistics.median(side):.0%}" for side in (ours, theirs)]
            print(f"| {workload} | {workers} | {way} | {a:,.0f} | {b:,.0f} | {a / b:.2f} | {', '.join(spread)} |", flush=True)


if __name__ == "__main__":
    main()

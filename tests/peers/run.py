#!/usr/bin/env python3
"""Measures unisono beside PyTorch DistributedDataParallel and prints a Markdown table.

Both sides train the same shapes with the same optimizer and batch per worker, one compute thread a worker, on this
machine; ours is `unisono bench`. They take turns (A B A B), because machines are noisy; the table holds medians. Without
--workers and --transport it has one worker, two, and two over gRPC instead of shared memory.

    cargo build --release
    tests/peers/run.py --install            # makes a scratch environment with PyTorch first
    tests/peers/run.py --rounds 1 --seconds 2 --only mlp
    tests/peers/run.py --workers 1 2 4 --transport shm grpc
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKLOADS = ["softmax", "mlp", "mlp-wide", "cnn"]
# Both sides: one compute thread a worker process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(command):
    """Runs one command; gives its stdout, or ends with its stderr."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


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

    def measure(self, workload, workers, transport):
        command = [self.program, "bench", workload, "--workers", workers, "--transport", transport]
        line = run(command + ["--seconds", self.seconds, "--json"]).splitlines()[-1]
        return json.loads(line)["samples_per_second"]


class Torch:
    """The other side: torch_ddp.py."""

    def __init__(self, python, seconds):
        self.python, self.seconds = python, seconds

    def measure(self, workload, workers, _):
        line = run([self.python, HERE / "torch_ddp.py", workload, workers, self.seconds])
        return float(re.search(r"samples/s=([\d.]+)", line)[1])


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
    print("| workload | workers | transport | unisono, samples/s | PyTorch, samples/s | ratio | spread of ours, theirs |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for workload in options.only:
        for workers, way in rows:
            taken = [[side.measure(workload, workers, way) for side in sides] for _ in range(options.rounds)]
            ours, theirs = map(list, zip(*taken))
            a, b = statistics.median(ours), statistics.median(theirs)
            spread = [f"{(max(side) - min(side)) / statistics.median(side):.0%}" for side in (ours, theirs)]
            print(f"| {workload} | {workers} | {way} | {a:,.0f} | {b:,.0f} | {a / b:.2f} | {', '.join(spread)} |", flush=True)


if __name__ == "__main__":
    main()

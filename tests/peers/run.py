#!/usr/bin/env python3
"""Measures unisono beside PyTorch DistributedDataParallel and prints a Markdown table.

Both sides train the same shapes with the same optimizer and batch per worker, one compute thread a worker, on this
machine. They take turns (A B A B), because machines are noisy; the table holds medians.

    cargo build --release
    tests/peers/run.py --install            # makes a scratch environment with PyTorch first
    tests/peers/run.py --rounds 1 --seconds 2 --only mlp
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
    """Our side: `unisono local`, with as many partitions as workers, so that a worker's step is one batch."""

    def __init__(self, program, seconds):
        self.program, self.seconds, self.steps = program, seconds, {}

    def train(self, workload, workers, steps):
        with tempfile.TemporaryDirectory() as folder:
            sets = [f"train.partitions={workers}", f"train.steps={steps}", f"checkpoint.dir={json.dumps(folder)}"]
            options = [word for s in sets for word in ("--set", s)]
            command = [self.program, "local", HERE / f"{workload}.toml", "--workers", workers, "--threads", 1]
            return json.loads(run(command + ["--json", "--quiet"] + options).splitlines()[-1])

    def measure(self, workload, workers):
        """Samples a second, over as many steps as a short first run says fill the time."""
        key = workload, workers
        if key not in self.steps:
            step_ms = self.train(workload, workers, 20)["step_ms"]["p50"]
            self.steps[key] = max(20, round(self.seconds * 1e3 / step_ms))
        return self.train(workload, workers, self.steps[key])["samples_per_second"]


class Torch:
    """The other side: torch_ddp.py."""

    def __init__(self, python, seconds):
        self.python, self.seconds = python, seconds

    def measure(self, workload, workers):
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
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="WORKLOAD")
    options = parser.parse_args()
    if min([options.rounds, *options.workers]) < 1 or options.seconds <= 0:
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
    print("| workload | workers | unisono, samples/s | PyTorch, samples/s | ratio | spread of ours, theirs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for workload in options.only:
        for workers in options.workers:
            taken = [[side.measure(workload, workers) for side in sides] for _ in range(options.rounds)]
            ours, theirs = map(list, zip(*taken))
            a, b = statistics.median(ours), statistics.median(theirs)
            spread = [f"{(max(side) - min(side)) / statistics.median(side):.0%}" for side in (ours, theirs)]
            print(f"| {workload} | {workers} | {a:,.0f} | {b:,.0f} | {a / b:.2f} | {', '.join(spread)} |", flush=True)


if __name__ == "__main__":
    main()

"""A crash campaign: faults at random moments of tiny runs, which must end bit-equal.

    python benchmarks/crash --folder /tmp/crash --log benchmarks/results/crash.jsonl

Processes of runs with one and two processes are killed, asked to stop, and suspended; they lose
their coordinator or their disk space. Some faults are at random moments, some while a checkpoint is
written. Within 30 seconds after a fault, every process must have ended by itself. Exceptions are
the suspended one and those that wait for a peer that never joined, which a launcher ends.
The same command must then resume from the newest valid checkpoint. A completed run must have the
parameters, optimizer state, random key and example ids of every step of a run without faults, bit
for bit.
``damages`` damages the files of a completed run: flipped bits in checkpoints must be detected,
damaged side files must not prevent a restart, storage that temporarily cannot be read must change
nothing, and sequences of NaN batches must leave no trace.
``hangs`` has processes that are stuck in data loading, with a suspended worker or without a peer;
all must exit with 75. ``stores`` damages stores, which a new run must refuse with one sentence.

All faults are derived from ``--seed``. Each line of the log is one fault or one completed run, and
the same command continues after the last line. Processes are forked from one that has imported
everything, so that a restart takes a second or two. The full disk is a tmpfs of 24 MiB, which needs
root.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

from campaign import Campaign, summary
from damages import DAMAGES
from faults import KINDS, plan
from hangs import HANGS
from jobs import PRELOAD, prepare
from stores import STORES


def main() -> int:
    parser = argparse.ArgumentParser(description="Test faults at random moments of tiny runs.")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of the runs; about 50 MB"
    )
    parser.add_argument(
        "--log", type=Path, required=True, help="log with one line per fault (appended)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no fault after so many minutes"
    )
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], choices=[1, 2])
    afterwards = DAMAGES | HANGS | STORES
    kinds = KINDS | afterwards
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=int, default=kind.count, metavar="TIMES")
    arguments = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(PRELOAD)

    from flax_transformers.testing import write_corpus

    write_corpus(folder / "text.txt", documents=60)
    campaign = Campaign(folder, arguments.log, time.monotonic() + 60 * arguments.minutes)
    done = {(line.get("kind"), line.get("number")) for line in campaign.lines}
    counts = {name: getattr(arguments, name) for name in kinds}
    faults = [
        fault for fault in plan(arguments.seed, counts) if campaign.small or fault.kind != "disk"
    ]
    if not campaign.small:
        print("skipping full disks: cannot mount a tmpfs", file=sys.stderr)
    prepare(folder)
    for processes in arguments.processes:
        left = [f for f in faults if f.processes == processes and (f.kind, f.number) not in done]
        campaign.strike_all(left, processes)
    for name, damage in afterwards.items():
        for number in range(counts[name]):
            if (name, number) in done or time.monotonic() > campaign.deadline:
                continue
            processes = arguments.processes[number % len(arguments.processes)]
            rng = random.Random(f"{arguments.seed} {name} {number}")
            line = {"number": number, "kind": name, "processes": processes}
            campaign.write(line | damage.do(campaign, rng, processes))
    print(summary(campaign.lines))
    return int(any(line["problems"] for line in campaign.lines))


if __name__ == "__main__":
    sys.exit(main())

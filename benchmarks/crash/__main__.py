"""A crash campaign: faults at random moments of tiny runs, each of which has to end bit-equal.

    python benchmarks/crash --folder /tmp/crash --log benchmarks/results/crash.jsonl

Runs of one and of two processes are killed, told to stop, stopped dead, robbed of their coordinator
and of room on the disk, some at random, some while a checkpoint is being written. After each fault
every process has to have ended by itself within 30 seconds, but for the one that was stopped and
for those that wait for a peer that never came: these a launcher ends.
The same command has to go on from the newest checkpoint that verifies. When a run is through, its
parameters, the state of its optimizer, its random key, and the example ids of every step have to be
those of a run without faults, bit for bit.
Then there is damage to what a run has left (``damages``): flipped bits of checkpoints, which have
to be noticed, damaged side files, which have to stop nothing, storage that cannot be read for a
while, which has to change nothing, and streaks of batches that are NaN, which leave no trace.
There are processes that are alive and stuck (``hangs``): in data loading, with a stopped worker,
without a peer; all have to end with 75. And there are damaged stores (``stores``), which a new run
has to refuse in one sentence.

Everything follows from ``--seed``; each line of the log is one fault or one finished run, and the
same command goes on behind the last line. Processes are forked from one that has imported all, so
that a restart takes a second or two. A full disk needs root, for a tmpfs of 24 MiB.
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
    parser = argparse.ArgumentParser(description="Faults at random moments of tiny runs.")
    parser.add_argument("--folder", type=Path, required=True, help="for runs; some 50 MB")
    parser.add_argument("--log", type=Path, required=True, help="a line per fault; added to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no fault after so long")
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
        print("no full disks: a tmpfs cannot be mounted here", file=sys.stderr)
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

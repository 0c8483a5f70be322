"""Train the embedded default for an hour on two ranks and see what grows: `make soak`, or

    python tests/soak.py --minutes 5 --out FOLDER

Every few seconds: anonymous memory (heaps) and open files of every process of the run (torchrun,
ranks, reward workers), from /proc. Reports their slopes over training steps after a warm-up. Exit
code 1 where a rank grows by more than --most MB per 1,000 steps or any process by an open file.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from conftest import Running, metrics_of

FLAGS = (
    "--steps 100000 --prompts 20 --minibatch 10 --reincarnate 0 --save_every 50 --eval_every 50 "
    "--eval_k 1"
).split()


def family(pid):
    """Process ids of a process and all that it started."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, thread.read_text().split())
    return found


def look(pid):
    """(name, anonymous memory (MB), open files) of a process."""
    place = Path(f"/proc/{pid}")
    environment = place.joinpath("environ").read_bytes().decode().split("\0")
    ranks = [entry[5:] for entry in environment if entry.startswith("RANK=")]
    words = place.joinpath("cmdline").read_bytes().decode().split("\0")
    name = "torchrun"
    if ranks:
        trains = any(word.endswith("train.py") for word in words)
        name = f"rank {ranks[0]}" if trains else f"worker of rank {ranks[0]}"
    for line in place.joinpath("smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return name, int(line.split()[1]) / 1024, len(os.listdir(place / "fd"))


def watch(run, out, minutes, every):
    """(process, name) -> [(step, anonymous memory, open files), …] until time is up or it ends."""
    seen, end = {}, time.monotonic() + 60 * minutes
    while time.monotonic() < end and run.process.poll() is None:
        step = metrics_of(out, unfinished=True)[-1]["step"]
        for pid in family(run.pid):
            try:
                name, *numbers = look(pid)
            except OSError:  # ended, or just begun
                continue
            seen.setdefault((pid, name), []).append((step, *numbers))
        time.sleep(every)
    return seen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60)
    add("--every", type=float, default=5, help="seconds between looks")
    add("--most", type=float, default=5, help="MB that a rank may grow by in 1,000 steps")
    add("--out", type=Path, default="runs/soak")
    add("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".log")
    run = Running(log, "train.py", *FLAGS, *args.flags, "--out", args.out, ranks=2)
    run.wait_for("step    1/")
    seen = watch(run, args.out, args.minutes, args.every)
    fine = run.process.poll() is None
    if fine:
        os.kill(run.pid, signal.SIGTERM)
        run.end()
        fine = "--resume goes on" in run.text
    steps = [line["step"] for line in metrics_of(args.out)]
    fine &= steps == list(range(len(steps)))
    print(f"{steps[-1]} steps in {args.minutes:g} minutes; ended as asked, a line a step: {fine}")
    print(f"{'':<20} {'looks':>6} {'MB':>8} {'MB/1,000 steps':>15} {'open files':>12}")
    for (_, name), rows in sorted(seen.items(), key=lambda item: item[0][1]):
        rows = np.array(rows[len(rows) // 5 :])  # after a warm-up
        step, memory, files = rows.T
        slope = 1000 * np.polyfit(step, memory, 1)[0] if np.ptp(step) else 0.0
        half = len(rows) // 2
        opened = half > 5 and files[half:].min() > files[:half].min()
        fine &= not opened and not (name.startswith("rank") and slope > args.most)
        numbers = f"{len(rows):>6} {memory[-1]:>8.1f} {slope:>15.2f}"
        print(f"{name:<20} {numbers} {files.min():>6.0f} -{files.max():>4.0f}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()

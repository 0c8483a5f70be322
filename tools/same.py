"""Is the house after a move the house before it? metrics.jsonl of old and new code, to the bit.

    python tools/same.py record ROOT OUT         # run every case with the train.py in ROOT
    python tools/same.py compare OUT_A OUT_B     # say what differs

Kept until the redesign is over. Cases: the six rows, with lambda < 1 and a reincarnation inside the
run, on 1 and on 2 ranks, through and resumed; and the flags that the rows leave alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

COMMON = (
    "--steps 7 --reincarnate 5 --lambda_start 1 --lambda_every 1 --lambda_floor 0.5 --save_every 3 "
    "--eval_every 4 --eval_k 1 --warmup 3 --entropy 1e-3"
).split()
PPO, GRPO = "--prompts 20 --minibatch 8", "--prompts 8 --minibatch 3 --group_size 4"
CASES = {
    f"{algo}-{ranks}{how}": (f"--algo {algo} {GRPO if 'grpo' in algo else PPO}".split(), ranks, how)
    for algo in ("ppo", "grpo", "mix-ppo", "mix-grpo", "remix-ppo", "remix-grpo")
    for ranks in (1, 2)
    for how in ("", "-resumed")
}
TIS = {True: "--tis 1.0", False: "--mismatch truncated --mismatch_high 1.0"}
EXTRA = {
    "vtrace": f"--algo remix-ppo {PPO} --history_advantage vtrace --aggregate sequence "
    "--gamma 0.99 --gae_lambda 0.9 TIS",
    "old": f"--algo remix-grpo {GRPO} --anchor old --aggregate constant --kl_estimator k2 --p 0.6 "
    "--window 3 --utd 3",
}
CASES |= {name: (flags.split(), 1, "") for name, flags in EXTRA.items()}
MACHINE = ("seconds_", "tokens_per_second", "memory_")


def record(root, out):
    root, out = Path(root).resolve(), Path(out).resolve()
    old = (root / "config.py").exists()
    for name, (flags, ranks, how) in CASES.items():
        folder = out / name
        if (folder / "model").exists():
            continue
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        flags = " ".join(flags).replace("TIS", TIS[old]).split()
        start = [sys.executable, *(launcher if ranks > 1 else []), str(root / "train.py")]
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        legs = [["--steps", "3"], ["--resume", "--steps", "7"]] if how else [[]]
        for i, leg in enumerate(legs):
            given = [*COMMON, *flags, *leg] if not i else leg
            done = subprocess.run(
                [*start, "--out", str(folder), *given],
                cwd=root,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            print(name, leg, done.returncode, flush=True)
            if done.returncode:
                print(done.stdout[-1500:], done.stderr[-3000:], flush=True)


def compare(a, b):
    def lines(folder):
        return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]

    bad, gone, new = 0, set(), set()
    for name in CASES:
        try:
            old, fresh = lines(Path(a) / name), lines(Path(b) / name)
        except OSError as error:
            bad += 1
            print(f"{name}: {error}")
            continue
        differ = [f"{len(old)} lines, {len(fresh)}"] if len(old) != len(fresh) else []
        for x, y in zip(old, fresh):
            gone |= x.keys() - y.keys()
            new |= y.keys() - x.keys()
            differ += [
                f"step {x['step']} {key}: {x[key]} {y[key]}"
                for key in x.keys() & y.keys()
                if not key.startswith(MACHINE) and x[key] != y[key]
            ]
        bad += bool(differ)
        print(f"{name}: {'; '.join(differ[:4]) or f'{len(old)} lines equal to the bit'}")
    print(
        f"{len(CASES) - bad} of {len(CASES)} equal; keys gone: {sorted(gone)}; new: {sorted(new)}"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit({"record": record, "compare": compare}[sys.argv[1]](*sys.argv[2:]))

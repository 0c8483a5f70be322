"""Many runs under one budget of fresh rollouts; what came out of them as a table and a picture.

    python tools/compare.py        rows, learning rates, bases and seeds on the embedded default:
                                   runs/compare/table.md, compare.png and results.jsonl. Run it
                                   again and it goes on with what is missing; --dry_run: its hours.
    python tools/compare.py demo   ReMix-PPO against PPO in minutes: runs/demo-N/demo.png

Every row gets the same number of learning rates, so that no algorithm is tuned more than another,
and all are shown. A run is measured by the fresh rollouts after which its evaluation accuracy
reaches the target.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count, product
from pathlib import Path

import pandas as pd
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from infra.config import Parser, exit_bad_input
from methods import parse, total_rollouts
from tools import plot

ROWS = (
    "ppo,ppo --utd 2,mix-ppo,remix-ppo,ppo --baseline_drop 0,remix-ppo --baseline_drop 0,"
    "grpo,grpo --utd 2,mix-grpo,remix-grpo"
)
RUN_SECONDS, START_SECONDS = 75, 25  # of a run, its start included, and of that, on one core
EVAL_ROLLOUTS = 256  # about so many fresh rollouts between two evaluations
MACHINE = {"out", "resume", "threads", "micro_tokens", "engine_memory", "dtype"}
# Runs side by side on few cores; quiet.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
ABOUT = """\
Every run has a budget of {budget} fresh rollouts; a base is a warm-up with a seed of its own. The
target is reached at the first evaluation whose centred 3-point mean reaches it. Final accuracy and
response length are means over the last 3 evaluations.

Each algorithm at its best learning rate: lowest median of rollouts to the target; on a tie, or
where the target is not reached, highest median of final accuracy.

{chosen}

Every learning rate (* = the best one).

{full}
"""


# Measuring: pure functions of what runs recorded. `results` is a DataFrame with a row a run: row,
# lr, seed and what `summary` says, which is NaN where the run has not finished.


def rollouts_to_target(points, target):
    """Fresh rollouts at the first evaluation whose centred 3-point mean reaches `target`, or inf.

    points: Series of accuracies by fresh rollouts so far. At both ends the mean is over the points
    there are; elsewhere this looks one evaluation ahead, for every algorithm alike.
    """
    means = points.rolling(3, center=True, min_periods=1).mean()
    reached = means.index[means >= target - 1e-9]
    return reached[0] if len(reached) else math.inf


def summary(run, target):
    """The figures of one plot.Run. "accuracy", "length": means of its last 3 evaluations."""
    points = plot.series(run, "total_rollouts", "eval_accuracy")
    # what the mean of three evaluations of the toy's 128 problems may be off, 95 %
    noise = 1.96 * math.sqrt(target * (1 - target) / (3 * 128 * run.values.get("eval_k", 1)))
    return dict(
        points=points,
        rollouts=rollouts_to_target(points, target),
        earliest=rollouts_to_target(points, target - noise),
        latest=rollouts_to_target(points, target + noise),
        accuracy=points.tail(3).mean(),
        length=plot.series(run, "total_rollouts", "eval_length_mean").tail(3).mean(),
        seconds=run.metrics["seconds"].iloc[-1],
    )


def best_lr(runs):
    """(learning rate, what decided) among the runs of one row: fewest median rollouts to target,
    where one that never arrived counts as infinity, then highest median accuracy."""
    medians = runs.groupby("lr", sort=False)[["rollouts", "accuracy"]].median()
    order = medians.sort_values(["rollouts", "accuracy"], ascending=[True, False], kind="stable")
    fewest = order["rollouts"].iloc[0]
    alone = fewest < math.inf and (order["rollouts"] == fewest).sum() == 1
    reason = "-" if math.isnan(fewest) else "rollouts" if alone else "accuracy"
    return order.index[0], reason


def rollouts_text(value, budget):
    return f">{budget}" if value == math.inf else f"{value:.0f}"


def cells(runs, budget, target):
    """The texts of one line of the tables, by column, from the runs of one row and rate."""
    done = runs.dropna(subset="seconds")
    median = done[["rollouts", "accuracy", "length", "seconds"]].median()
    low, high = done["accuracy"].min(), done["accuracy"].max()
    each = ", ".join(rollouts_text(value, budget) for value in done["rollouts"])
    goal = f"fresh rollouts to {target:.0%}: median [each base and seed]"
    texts = {
        goal: f"{rollouts_text(median['rollouts'], budget)} [{each}]",
        "final accuracy: median [min, max]": f"{median['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        "response length (tokens)": f"{median['length']:.1f}",
        "training time (s)": f"{median['seconds']:.1f}",
    }
    return texts if len(done) else dict.fromkeys(texts, "-")


def markdown(lines):
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def tables(results, budget, target):
    """Both tables as markdown."""
    chosen, full = [], []
    for row, runs in results.groupby("row", sort=False):
        best, reason = best_lr(runs)
        for lr, seeds in runs.groupby("lr", sort=False):
            name, texts = plot.number(lr), cells(seeds, budget, target)
            share = f"{seeds['seconds'].notna().sum()} of {len(seeds)}"
            if lr == best:
                chosen.append({"algorithm": row, "lr": name, **texts, "lr decided by": reason})
                name += " *"
            full.append({"algorithm": row, "lr": name, "runs": share, **texts})
    return ABOUT.format(budget=budget, chosen=markdown(chosen), full=markdown(full))


def picture(results, budget, target, path):
    """Accuracy by rollouts of each family; what each seed of each row came to, at its best lr."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13, 9), layout="constrained")
    curves, dots = fig.subplots(2, 2, sharey="row")
    names, colours = [], {}
    for row, runs in results.dropna(subset="seconds").groupby("row", sort=False):
        seeds = runs[runs["lr"] == best_lr(runs)[0]]
        method = row.replace("grpo", "ppo")  # both families in the same colours
        colour = colours.setdefault(method, plot.COLOURS[len(colours) % len(plot.COLOURS)])
        axis = curves[int("grpo" in row)]
        plot.curve(axis, list(seeds["points"]), colour)
        axis.plot([], [], color=colour, label=row)
        for axis, key in zip(dots, ("rollouts", "accuracy")):
            for value in seeds[key]:
                x, marker = (budget, ">") if value == math.inf else (value, "o")
                axis.plot(x, len(names), marker, color=colour, alpha=0.7)
            if seeds[key].median() < math.inf:
                axis.plot(seeds[key].median(), len(names), "|", color=colour, markersize=22)
        names.append(row)
    for axis, family in zip(curves, ("PPO", "GRPO")):
        axis.axhline(target, color="0.5", linestyle=":", label="target")
        axis.set(
            title=f"{family} family", xlabel=plot.X_LABELS["total_rollouts"], ylabel=plot.RIGHT
        )
        axis.legend(loc="lower right")
    dots[0].set_yticks(range(len(names)), names)
    dots[0].invert_yaxis()
    dots[0].set(xlabel=f"fresh rollouts to {target:.0%}: each seed, | median, > not reached")
    dots[1].set(xlabel="final accuracy (share): each seed, | median")
    for axis in fig.axes:
        axis.grid(alpha=0.25)
    fig.savefig(path, dpi=110)


# Running.


def settings(flags):
    """What train.py makes of `flags`, in a folder that holds no run."""
    return parse([*flags, "--out", "no run"])


def plan(row, base, seed, budget, lr=None):
    """(flags for train.py, steps) of one run. row: an algorithm, perhaps with flags; lr None: the
    default. Steps are the smallest number that reaches the budget."""
    flags = ["--algo", *row.split(), "--base_seed", str(base), "--seed", str(seed)]
    if lr is not None:
        flags += ["--lr", str(lr)]
    cfg = settings(flags)
    steps = next(n for n in count(1) if total_rollouts(cfg, n) >= budget)
    every = max(1, round(EVAL_ROLLOUTS / total_rollouts(cfg, 1)))
    return [*flags, "--steps", str(steps), "--eval_every", str(every)], steps


def complete(folder, steps):
    """Whether the run in `folder` did all its steps and exported its model."""
    try:
        done = plot.load_run(folder).metrics["step"].iloc[-1] == steps
    except ValueError:
        return False
    return done and (folder / "model" / "config.json").exists()


def other_settings(folder, flags):
    """The settings of the run in `folder` that `flags` would change: {flag: (then, now)}.

    Not those of the machine, nor those that a run settles for itself.
    """
    then, now = plot.settings(folder), vars(settings(flags))
    changed = {}
    for key in sorted(then.keys() & now.keys() - MACHINE):
        if now[key] not in (None, "auto", then[key]):
            changed[key] = then[key], now[key]
    return changed


def train(folder, flags, steps):
    """Bring the run in `folder` to its end, its output in FOLDER.log. Raises ValueError."""
    command = [sys.executable, "train.py", *flags, "--out", str(folder)]
    if (folder / "config.json").exists():
        command.append("--resume")
        if changed := other_settings(folder, flags):
            text = ", ".join(f"{key} was {then}, is {now}" for key, (then, now) in changed.items())
            what = f"{folder.name} was run with other settings ({text})"
            raise ValueError(f"{what}: delete it, or choose another --runs")
    if complete(folder, steps):
        return
    log = folder.with_name(folder.name + ".log")
    with open(log, "a") as output:
        how = dict(cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        code = subprocess.run(command, **how).returncode
    if code or not complete(folder, steps):
        what = f"{folder.name} failed (exit code {code}); the end of {os.path.relpath(log)}:"
        lines = log.read_text(errors="replace").splitlines()[-8:]
        raise ValueError("\n    ".join([what, *lines]))


def call(*command):
    """Run `python COMMAND` with its output to the console; exit 1 if it fails."""
    text = f"`python {shlex.join(command)}`"
    print(f"$ {text[1:-1]}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT).returncode
    if code:
        sys.exit(f"error: {text} failed with exit code {code}")


def planned(args, folder):
    """The runs of a comparison, each a dict: row, lr, base, seed; run (folder), flags, steps."""
    lrs, grpo_lrs = ([float(lr) for lr in text.split(",")] for text in (args.lrs, args.grpo_lrs))
    if len(lrs) != len(grpo_lrs):
        raise ValueError("--lrs and --grpo_lrs differ in length: every row gets as many rates")
    bases, seeds = ([int(n) for n in text.split(",")] for text in (args.bases, args.seeds))
    jobs = []
    for row in args.rows.split(","):
        for lr, base, seed in product(grpo_lrs if "grpo" in row else lrs, bases, seeds):
            flags, steps = plan(row, base, seed, args.budget, lr)
            name = row.replace(" --", "-").replace(" ", "")
            name = f"{name}-lr{plot.number(lr)}-{steps}steps-base{base}-seed{seed}"
            job = dict(row=row, lr=lr, base=base, seed=seed, run=folder / name)
            jobs.append(job | dict(flags=flags, steps=steps))
    return jobs


def hours(jobs, at_once):
    """What is left to do, in a line; by what the finished runs took, if there are any."""
    done = [job for job in jobs if complete(job["run"], job["steps"])]
    left, seconds = len(jobs) - len(done), RUN_SECONDS
    if done:
        took = [plot.load_run(job["run"]).metrics["seconds"].iloc[-1] for job in done]
        seconds = START_SECONDS + sum(took) / len(took)
    total = f"{left * seconds / at_once / 3600:.1f} hours"
    return f"{left} of {len(jobs)} runs to do, {at_once} at once, {seconds:.0f} s each: {total}"


def compare(args, runs):
    folder, failed = runs / "compare", 0
    jobs = planned(args, folder)
    print(hours(jobs, args.jobs), flush=True)
    if args.dry_run:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for base in dict.fromkeys(job["base"] for job in jobs):
        call("-m", "infra.toy", str(base))  # once, before runs side by side look for it
    pool = ThreadPoolExecutor(args.jobs)
    try:
        running = [pool.submit(train, job["run"], job["flags"], job["steps"]) for job in jobs]
        for done in tqdm(as_completed(running), total=len(jobs), desc="runs", unit="run"):
            if error := done.exception():
                failed += 1
                tqdm.write(str(error), file=sys.stderr)
    finally:  # an interrupt from the keyboard reaches those that run by itself
        pool.shutdown(cancel_futures=True)
    for job in jobs:
        if complete(job["run"], job["steps"]):
            job |= summary(plot.load_run(job["run"]), args.target)
    columns = ["row", "lr", "base", "seed", "points", "rollouts", "accuracy", "length", "seconds"]
    results = pd.DataFrame(jobs, columns=columns)
    small = results.drop(columns="points").replace(math.inf, None)
    small.to_json(folder / "results.jsonl", orient="records", lines=True)
    table, chart = folder / "table.md", folder / "compare.png"
    text = tables(results, args.budget, args.target)
    table.write_text(text)
    picture(results, args.budget, args.target, chart)
    print(f"\n{text}\n{os.path.relpath(table)} {os.path.relpath(chart)}")
    if failed:
        what = f"{failed} of {len(jobs)} runs failed"
        sys.exit(f"error: {what}; the same command goes on with what is missing")


def sentence(remix, ppo, target, budget):
    """What the demo says of two runs: summaries (inf: not reached). The interval is of what the
    evaluations of these two can tell, not of what other seeds would give."""
    if not 0 < remix["rollouts"] < math.inf:
        what = f"ReMix-PPO did not go from below to {target:.0%}"
        return f"No ratio: {what} within {budget} fresh rollouts."

    def ratio(ppo, remix):
        if remix in (0, math.inf):
            return "?"
        return f"{ppo / remix:.2f}" if ppo < math.inf else f"above {budget / remix:.2f}"

    low, high = ratio(ppo["earliest"], remix["latest"]), ratio(ppo["latest"], remix["earliest"])
    middle = ratio(ppo["rollouts"], remix["rollouts"])
    what = f"Fresh rollouts to {target:.0%}, PPO over ReMix-PPO: {middle} [{low}, {high}]"
    return f"{what}, one base and seed; over others: docs/results.md."


def demo(args, runs):
    taken = [int(path.name[5:]) for path in runs.glob("demo-*") if path.name[5:].isdigit()]
    folder = runs / f"demo-{max(taken, default=0) + 1}"
    folder.mkdir(parents=True)
    call("-m", "infra.toy", str(args.base))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc)]
    runs = [folder / "remix-ppo", folder / "ppo"]
    for run in runs:
        flags, _ = plan(run.name, args.base, args.seed, args.budget)
        call(*torchrun, "train.py", *flags, "--out", str(run))

    def held_out(run):
        flags = "--benchmarks toy --k 4 --temperature 1.0".split()
        call("eval.py", "--model", str(run / "model"), *flags, "--out", str(run / "eval"))
        return json.loads((run / "eval" / "results.json").read_text())["scores"]["toy"]

    with ThreadPoolExecutor() as pool:  # at once: most of it is start-up
        scores = list(pool.map(held_out, runs))
    loaded, lines, reached, goal = [], [], [], f"fresh rollouts to {args.target:.0%}"
    for run, score in zip(runs, scores):
        loaded.append(plot.load_run(run))
        seen = summary(loaded[-1], args.target)
        reached.append(seen)
        line = {"algorithm": run.name, goal: rollouts_text(seen["rollouts"], args.budget)}
        line["final accuracy (held-out)"] = f"{score['pass@1']:.3f}"
        line["response length (tokens)"] = f"{score['length_mean']:.1f}"
        lines.append(line | {"training time (s)": f"{seen['seconds']:.0f}"})
    print(f"\n{markdown(lines)}\n")
    print(sentence(*reached, args.target, args.budget))
    title = f"ReMix-PPO and PPO, {args.budget} fresh rollouts each"
    plot.figure(loaded, folder / "demo.png", title)
    print(*map(os.path.relpath, [folder / "demo.png", *runs]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = demo if argv[:1] == ["demo"] else compare
    parser = Parser(
        prog="compare.py" + " demo" * (command is demo),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name, default, help):
        kind = type(default)
        parser.add_argument(name, type=kind, default=default, help=f"{help} [{default}]")

    flag("--budget", 2560, "fresh rollouts of each run")
    flag("--target", 0.6, "evaluation accuracy to reach (share)")
    flag("--runs", "runs", "folder of everything written")
    if command is demo:
        flag("--base", 0, "seed of the base")
        flag("--seed", 0, "seed of both runs")
        flag("--nproc", 2, "ranks")
    else:
        flag("--rows", ROWS, "algorithms, perhaps with flags")
        flag("--lrs", "2e-4,4e-4,8e-4", "learning rates of the PPO family")
        flag("--grpo_lrs", "1e-4,2e-4,4e-4", "as many of the GRPO family")
        flag("--bases", "10,11,12,13,14", "seeds of bases, not those tuned on (0, 1)")
        flag("--seeds", "0", "seeds of each row, rate and base")
        flag("--jobs", 2, "runs at once")
        parser.add_argument("--dry_run", action="store_true", help="say how long it will take")
    try:
        args = parser.parse_args(argv[1:] if command is demo else argv)
        command(args, Path(args.runs).resolve())
    except ValueError as error:
        exit_bad_input(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

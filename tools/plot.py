"""The paper's pictures from the metrics of one or more runs.

    python tools/plot.py runs/toy-ppo-seed0 runs/toy-remix-ppo-seed0 --out compare.png

Evaluation accuracy against fresh rollouts, steps and time; importance ratio, response length,
reflection, entropy, KL and staleness against steps. Runs that differ in nothing but their seed
share a colour: the median as a line in a band from the lowest to the highest seed where their x is
shared, a thin line per run elsewhere (time never is). Lines of 40 points and more are drawn faint,
under their running median over a twentieth. The last line of output is the picture's path.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from infra.config import Parser, exit_bad_input

X_LABELS = dict(total_rollouts="fresh rollouts (responses)", step="training step")
X_LABELS["seconds"] = "training time (s)"
RIGHT, KL = "right answers (share)", "KL (nats per token)"
RATIOS = dict(ratio_mean_history="history", ratio_mean_fresh="fresh")
PANELS = (  # x, title, label of y, {metric: its name in the panel}
    ("total_rollouts", "Accuracy by rollouts", RIGHT, dict(eval_accuracy="")),
    ("step", "Accuracy by steps", RIGHT, dict(eval_accuracy="")),
    ("seconds", "Accuracy by time", RIGHT, dict(eval_accuracy="")),
    ("step", "Importance ratio", "mean ratio per token", RATIOS),
    ("step", "Response length", "mean length (tokens)", dict(length_mean="")),
    ("step", "Reflection", "responses that reflect (share)", dict(reflection_rate="")),
    ("step", "Entropy", "policy entropy (nats per token)", dict(entropy="")),
    ("step", "KL divergence", KL, dict(kl_base="to base", kl_prev="to precedent")),
    ("step", "Staleness", "mean age of samples (versions)", dict(staleness="")),
)
STYLES = ("-", "--")  # of a panel's metrics
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
# Runs may differ in these flags and still be one curve.
NOT_IN_LABEL = """algo seed out resume steps eval_every save_every keep samples threads dry_run
    tensorboard wandb dump_rollouts replay""".split()
NO_NUMBERS = ["phase", "staleness", "eval_accuracy_by_part"]  # among a run's metrics
BROKEN = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what a bad file raises


class Run(NamedTuple):
    """A run folder: its settings (flag -> value) and its metrics, a row a step."""

    values: dict
    metrics: pd.DataFrame


def settings(folder):
    """Flag -> value of the run in `folder`. Raises ValueError with one line."""
    path = Path(folder) / "config.json"
    try:
        return dict(json.loads(path.read_text())["values"])
    except BROKEN as error:
        raise ValueError(f"{path}: missing or not a run's ({type(error).__name__})") from None


def load_run(folder):
    """The Run in `folder`, with "seconds" since its start and "staleness" as a mean age.

    Raises ValueError with one line.
    """
    values, path = settings(folder), Path(folder) / "metrics.jsonl"
    try:
        metrics = pd.read_json(path, lines=True, precise_float=True).set_index("step", drop=False)
        columns = metrics.columns.union([*NO_NUMBERS, "seconds_step"], sort=False)
        metrics = metrics.reindex(columns=columns)
        metrics["staleness"] = metrics["staleness"].map(mean_age, na_action="ignore")
        metrics.drop(columns=NO_NUMBERS).astype(float)
    except BROKEN as error:
        what = f"{path}: missing, empty or not a run's ({type(error).__name__})"
        raise ValueError(what) from None
    metrics["seconds"] = metrics["seconds_step"].fillna(0).cumsum()
    return Run(values, metrics)


def mean_age(counts):
    """Mean age (versions) of samples, `counts` of which have age 0, 1, ..., N; None without any."""
    total = sum(counts)
    return sum(age * n for age, n in enumerate(counts)) / total if total else None


def series(run, x, key):
    """Metric `key` where it has a value, as a Series over x (a metric, or "seconds")."""
    points = run.metrics.reindex(columns=[x, key]).astype(float).dropna(subset=key)
    return points.fillna(0).set_index(x)[key]  # before the first step a count is null


def labels(runs):
    """A label for each run: its algorithm, and the flags (never the seed) in which the runs of that
    algorithm differ."""
    names = []
    for run in runs:
        algo = run.values.get("algo", "run")
        rivals = [other.values for other in runs if other.values.get("algo", "run") == algo]
        for key, value in run.values.items():
            if key not in NOT_IN_LABEL and any(other.get(key) != value for other in rivals):
                algo += f" {key} {number(value)}"
        names.append(algo)
    return names


def number(value):
    """0.0002 as 2e-4; anything else as it is."""
    if not isinstance(value, float) or value == 0 or abs(value) >= 0.01:
        return str(value)
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def curve(axis, lines, colour, style="-"):
    """Draw lines (Series, one per seed): median and band where all have the same x, else each."""
    lines = [line for line in lines if len(line)]
    if len(lines) > 1 and all(line.index.equals(lines[0].index) for line in lines):
        seeds = pd.concat(lines, axis=1)
        low, high = seeds.min(axis=1), seeds.max(axis=1)
        axis.fill_between(seeds.index, low, high, color=colour, alpha=0.15, linewidth=0)
        lines = [seeds.median(axis=1)]
    how = dict(color=colour, linewidth=1.6 if len(lines) == 1 else 0.9)
    for line in lines:
        half = len(line) // 40
        smooth = line.rolling(2 * half + 1, center=True, min_periods=1).median()
        axis.plot(smooth, style, marker="." if len(line) == 1 else "", **how)
        if half:
            axis.plot(line, color=colour, linewidth=0.6, alpha=0.35)


def panel(axis, groups, colours, ends, x, title, y_label, metrics):
    """One of PANELS. groups: label -> runs; ends: label -> row of metrics, marked by a line."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    drawn = []
    for key, style in zip(metrics, STYLES):
        for label, runs in groups.items():
            lines = [series(run, x, key) for run in runs]
            curve(axis, lines, colours[label], style)
            drawn += lines
    drawn = pd.concat(drawn)
    if drawn.empty:
        axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
        text = "no data: no run recorded\n" + "\n".join(metrics)
        axis.text(0, 0, text, ha="center", va="center", color="0.5")
        return
    for label, row in ends.items() if x != "seconds" else ():
        axis.axvline(row[x], color=colours[label], linestyle=":", linewidth=1)
    axis.set(xlabel=X_LABELS[x], ylabel=y_label)
    axis.ticklabel_format(useOffset=False)
    if y_label == KL and drawn.max() > 0:
        axis.set_yscale("log", nonpositive="mask")
    if not drawn.any():
        axis.set_ylim(0, 1)
    axis.grid(alpha=0.25)
    if len(metrics) > 1:
        for name, style in zip(metrics.values(), STYLES):
            axis.plot([], [], style, color="0.3", label=name)
        axis.legend(fontsize=8)


def figure(runs, path, title=None):
    """Draw `runs` (of load_run) as a grid of panels and write it to `path`. Needs no display."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups, ends, handles = {}, {}, {}
    for label, run in zip(labels(runs), runs):
        groups.setdefault(label, []).append(run)
    colours = dict(zip(groups, COLOURS))
    if len(groups) > len(COLOURS):
        colours = {label: colormaps["turbo"](i / len(groups)) for i, label in enumerate(groups)}
    for label, group in groups.items():
        name = f"{label} ({len(group)} runs)" if len(group) > 1 else label
        handles[name] = Line2D([], [], color=colours[label], linewidth=2.5)
        steps = group[0].metrics
        mixed = steps[steps["phase"] == "mixed"]
        if len(mixed) and steps["phase"].iloc[-1] == "on-policy":
            ends[label] = mixed.iloc[-1]
    if ends:
        handles["reincarnation"] = Line2D([], [], color="0.5", linestyle=":")
    fig = Figure(figsize=(13, 10), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for axis, what in zip(fig.subplots(3, 3).flat, PANELS):
        panel(axis, groups, colours, ends, *what)
    columns = min(len(handles), 5)
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    fig.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main(argv=None):
    parser = Parser(prog="plot.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (--out of train.py)")
    parser.add_argument("--out", metavar="FILE.png", help="[default plot.png of the first run]")
    parser.add_argument("--title", help="heading of the picture")
    try:
        args = parser.parse_args(argv)
        out = args.out or Path(args.runs[0]) / "plot.png"
        figure([load_run(folder) for folder in args.runs], out, args.title)
    except (ValueError, OSError) as error:
        exit_bad_input(error)
    print(out)


if __name__ == "__main__":
    main()

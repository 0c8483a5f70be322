"""Score a model on math benchmarks: pass@1 with its standard error, pass@k, maj@k.

    python eval.py --model DIR_OR_NAME --benchmarks aime24,math500 --k 4 --temperature 0.6
    torchrun --nproc_per_node 8 eval.py --model DIR_OR_NAME --preset paper   # the paper's protocol
    python eval.py --benchmarks toy --k 2                    # the embedded default, held-out sums
    python eval.py --rejudge RUN/eval                        # judge the responses on disk again
    python eval.py --compare A/results.json B/results.json   # is the difference more than chance?

The output folder holds results.json, samples.jsonl (every response), results.png, and settings.json
from the start: interrupted, the same command goes on after the samples on disk. The numbers do not
depend on the number of ranks. The trainer evaluates through Examiner.

A row is one judged response: id (of its problem), sample, prompt, response, gold, judged (its final
answer as text or None), reward, reason (None: right), length (tokens), truncated. Standard errors
and intervals are over problems: the samples of one problem are not independent.
"""

import argparse
import importlib.metadata
import json
import math
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from infra import checkpoint, config, data, guards, ranks, toy
from infra.config import ConfigError, flag
from infra.data import load_benchmark  # noqa: F401, a contract: importable from here
from infra.metrics import append, rewrite
from infra.ranks import bring_home, deal_out, gather
from reward import Judge, canonical, final_answer, reflects, try_own
from rollout import Engine, request_seed, stop_tokens

# Responses of an engine between two writes to samples.jsonl: so many at most are generated again.
CHUNK = 512
PAPER = ("aime24", "amc", "math500", "minerva", "olympiadbench")
PUBLISHED = Path(__file__).parent / "docs" / "published.json"


def evaluate(
    engine, judge, tokenizer, problems, version, k, temperature, max_tokens, style, seed,
    done=frozenset(), write=None,
):  # fmt: skip
    """Sample k responses to each problem (dicts with prompt_ids) and judge them.

    Returns a row a response, on every rank. done: (id, sample) of responses to leave out;
    write(rows) is called with each finished chunk of rows. A collective.
    """
    wanted = [(problem, sample) for problem in problems for sample in range(k)]
    wanted = [(p, sample) for p, sample in wanted if (p["id"], sample) not in done]
    size, rows = CHUNK * engine.ranks.world // engine.tp, []
    for begin in range(0, len(wanted), size):
        chunk = wanted[begin : begin + size]
        prompts = [problem["prompt_ids"] for problem, _ in chunk]
        seeds = [request_seed(seed, "eval", version, p["id"], sample) for p, sample in chunk]
        responses = engine.generate(prompts, seeds, version, temperature, max_tokens)
        mine = deal_out(list(zip(chunk, responses)), engine.ranks)
        mine = [as_row(tokenizer, *asked, response) for asked, response in mine]
        judge_rows(judge, mine, style)
        found = bring_home(mine, len(chunk))
        rows += found
        if write:
            write(found)
    return rows


def as_row(tokenizer, problem, sample, response):
    prompt = tokenizer.decode(problem["prompt_ids"])
    text = tokenizer.decode(response["response"], skip_special_tokens=True)
    asked = dict(id=problem["id"], sample=sample, prompt=prompt, gold=problem["answer"])
    said = dict(response=text, length=len(response["response"]), truncated=response["truncated"])
    return asked | said | dict(judged=None, reward=0.0, reason="truncated")


def judge_rows(judge, rows, style):
    """Fill in reward, reason and judged. A truncated response is wrong whatever it says."""
    whole = [row for row in rows if not row["truncated"]]
    verdicts = judge.submit([(row["response"], row["gold"], style) for row in whole]).result()
    for row, verdict in zip(whole, verdicts):
        row.update(verdict._asdict(), judged=final_answer(row["response"], style))


# -- from rows to scores --------------------------------------------------------------------------


def pass_at_k(n, right, k):
    """The chance that at least one of k responses drawn from n without replacement is right:
    1 - C(n - right, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """The chance that a vote among the responses to one problem elects a right answer; ties are
    drawn. Right answers are one candidate however they are written, wrong ones where canonical()
    writes them alike. Who has no answer does not vote."""
    votes = Counter()
    for row in rows:
        if row["reward"] == 1:
            votes[True] += 1
        elif row["judged"] is not None:
            votes[canonical(row["judged"])] += 1
    first = [candidate for candidate, count in votes.items() if count == max(votes.values())]
    return (True in first) / len(first) if first else 0.0


def summarise(rows):
    """Scores of k rows for each of n problems, in [0, 1], with lengths (tokens) and the number of
    unjudged responses by reason; "by_problem": id -> mean reward.

    What does not exist is None or empty: a standard error of one problem, pass@k and maj@k of a
    user's own rewards other than 0 and 1.
    """
    groups, scores, right, powers = {}, {}, [], []
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    for id, group in groups.items():
        scores[id] = fmean(row["reward"] for row in group)
        right.append(sum(row["reward"] == 1 for row in group))
    n, k = len(groups), len(rows) // len(groups)
    verdicts = all(row["reward"] in (0, 1) for row in rows)
    if verdicts:
        powers = [2**i for i in range(k.bit_length())]
    reasons = Counter(row["reason"] for row in rows if row["reason"] not in (None, "wrong"))
    return {
        "pass@1": fmean(scores.values()),
        "standard_error": stdev(scores.values()) / math.sqrt(n) if n > 1 else None,
        "n": n,
        "k": k,
        "pass@k": {str(j): fmean(pass_at_k(k, r, j) for r in right) for j in powers},
        "maj@k": fmean(map(majority, groups.values())) if verdicts else None,
        "length_mean": fmean(row["length"] for row in rows),
        "truncated_share": fmean(row["truncated"] for row in rows),
        "reflection_rate": fmean(reflects(row["response"]) for row in rows),
        "unjudged_share": (reasons.total() - reasons["truncated"]) / len(rows),
        "unjudged": dict(reasons),
        "by_problem": scores,
    }


class Examiner:
    """Evaluates the policy while it is trained, and keeps the best one in RUN/best."""

    def __init__(self, cfg, task, behaviour, policy, recorder):
        self.cfg, self.task, self.behaviour = cfg, task, behaviour
        self.policy, self.recorder = policy, recorder

    def examine(self, step):
        """The eval_* metrics of the policy after `step` steps; {} where no evaluation is due. A
        collective."""
        cfg, task = self.cfg, self.task
        if not task.parts or step % cfg.eval_every and step != cfg.steps:
            return {}
        with self.recorder.clock("eval"):
            ask = partial(self.ask, version=step)
            found = self.behaviour.evaluate(self.policy, step, ask)
        if not found:
            return {}
        means = {}
        for key in ("pass@1", "length_mean", "truncated_share", "unjudged_share"):
            means[f"eval_{key}"] = fmean(summary[key] for summary in found.values())
        accuracy = means.pop("eval_pass@1")
        # the policy before the first step is the model itself
        if step and accuracy > self.recorder.best:
            self.recorder.best = accuracy
            with self.recorder.clock("save"):
                to = (Path(cfg.out) / "best", task.folder, self.policy, task.tokenizer, cfg)
                checkpoint.export(*to, self.recorder.ranks)
        by_part = {name: summary["pass@1"] for name, summary in found.items()}
        return {"eval_accuracy": accuracy, "eval_accuracy_by_part": by_part, **means}

    def ask(self, engine, judge, version):
        """name of a part -> summary."""
        cfg, found = self.cfg, {}
        for name, problems in self.task.parts.items():
            # one's own reward is for one's own problems
            style = cfg.style if name in data.BENCHMARKS else cfg.reward or cfg.style
            how = cfg.eval_k, cfg.eval_temperature, cfg.max_response, style, cfg.seed
            rows = evaluate(engine, judge, self.task.tokenizer, problems, version, *how)
            found[name] = summarise(rows)
        return found


# -- what is printed and drawn --------------------------------------------------------------------


def lines_of(rows, headers=()):
    """Lines of a table of texts, the first column to the left."""
    from tabulate import tabulate

    align = ("left", *["right"] * (len(rows[0]) - 1))
    how = dict(tablefmt="plain", disable_numparse=True, colalign=align)
    return tabulate(rows, headers, **how).splitlines()


def percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def table(scores):
    """Lines: a row for each part of an evaluation, in percent; then pass@k for powers of two."""
    headers = "benchmark,n,k,pass@1,± s.e.,maj@k,tokens,truncated,reflect,unjudged".split(",")
    rows, more = [], []
    for name, s in scores.items():
        three = [percent(s[key]) for key in ("pass@1", "standard_error", "maj@k")]
        shares = [percent(s[key]) + "%" for key in ("truncated_share", "reflection_rate")]
        reasons = ", ".join(f"{reason} {count}" for reason, count in s["unjudged"].items())
        tokens = f"{s['length_mean']:.1f}"
        rows.append([name, str(s["n"]), str(s["k"]), *three, tokens, *shares, reasons or "-"])
        if s["k"] > 1 and s["pass@k"]:
            values = [f"pass@{k} {percent(value)}" for k, value in s["pass@k"].items()]
            more.append("  ".join([name, *values]))
    return lines_of(rows, headers) + more


def published(scores, model, base):
    """Lines that set our greedy and T = 0.1 scores beside the published ones of the same base
    model, [] where there are none. scores: of the parts of `--preset paper`."""
    known = json.loads(PUBLISHED.read_text())
    if Path(base).name not in known["models"]:
        return []
    keys = [f"{name} {how}" for name in PAPER for how in ("greedy", "T=0.1")]
    ours = [100 * scores[key]["pass@1"] if key in scores else math.nan for key in keys]
    ours = np.array(ours).reshape(len(PAPER), 2)
    rows, less = [], []
    for name, cells in known["models"][Path(base).name].items():
        theirs = np.array([cell.split("/") for cell in cells.split()], float)  # (5, 2)
        rows.append([name, *pairs(theirs, ".2f")])
        if name == Path(base).name or name.startswith("ReMix"):
            less.append([f"ours - {name}", *pairs(ours - theirs, "+.2f")])
    rows += [[f"ours: {Path(model).name}", *pairs(ours, ".2f")], *less]
    title = f"published (greedy/T=0.1; AMC is the set of 83; source: {known['source']}) and ours"
    return [title, *lines_of(rows, ["", *PAPER, "mean"])]


def pairs(cells, form):
    """Texts "greedy/T=0.1" of cells (5, 2) and of their means; "-" where there is none."""
    for pair in [*cells, cells.mean(axis=0)]:
        yield "/".join("-" if math.isnan(x) else format(x, form) for x in pair)


def compare(first, second, resamples=10_000):
    """Lines: by how much the second evaluation's pass@1 differs from the first's on the problems of
    both, with the 95 % interval of a paired bootstrap over problems. first, second: paths of
    results.json. Raises ValueError."""
    (a, ours), (b, theirs) = read_results(first), read_results(second)
    notes = differences(a, b, ("max_response", "seed", "dtype", "versions"))
    found, rng = {}, np.random.default_rng(0)
    for name in (name for name in ours if name in theirs):
        one, other = (settings.get("parts", {}).get(name, {}) for settings in (a, b))
        notes += differences(one, other, ("k", "temperature", "template", "style"), f" of {name}")
        skipped = one.get("skipped") or other.get("skipped")
        if one.get("problems") != other.get("problems") and not skipped:
            raise ValueError(f"{name} is other problems in {first} than in {second}")
        if alone := len(ours[name].keys() ^ theirs[name].keys()):
            notes.append(f"{name}: {alone} problems are in one of the two only, and left out")
        if both := [id for id in ours[name] if id in theirs[name]]:
            pair = 100 * np.array([[part[name][id] for id in both] for part in (ours, theirs)])
            drawn = rng.integers(len(both), size=(resamples, len(both)))
            resampled = (pair[1] - pair[0])[drawn].mean(axis=1)  # (resamples,)
            found[name] = [len(both), *pair.mean(axis=1), resampled]
    if not found:
        raise ValueError(f"nothing to compare: {first} and {second} have no problem in common")
    if len(found) > 1:
        n, *columns = zip(*found.values())
        found["mean"] = [sum(n), *(sum(column) / len(n) for column in columns)]
    rows = []
    for name, (n, x, y, resampled) in found.items():
        low, high = np.percentile(resampled, [2.5, 97.5])
        verdict = "" if low > 0 or high < 0 else "may be chance" if low < high else "the same"
        cells = f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}", f"[{low:+.2f}, {high:+.2f}]"
        rows.append([name, str(n), *cells, verdict])
    headers = ["benchmark", "n", "first", "second", "difference", "95 % interval", ""]
    return notes + lines_of(rows, headers)


def differences(one, other, keys, of=""):
    """A line for each of the keys that has another value in `other` than in `one`."""
    return [
        f"they differ in {key}{of}: {one.get(key)} and {other.get(key)}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def read_results(path):
    """(settings, part -> id -> score) of the results.json at `path` or in it. Raises ValueError."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(path.read_text())
        return found["settings"], found["problems"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no results.json of eval.py ({why})") from None


def chart(scores, path, title):
    """Draw pass@1 with standard errors as bars, into a PNG. Needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.3 * len(scores), 4), layout="constrained")
    names = [f"{name}\nn = {s['n']}, k = {s['k']}" for name, s in scores.items()]
    heights = [100 * s["pass@1"] for s in scores.values()]
    errors = [100 * (s["standard_error"] or 0) for s in scores.values()]
    axis = figure.subplots()
    axis.bar_label(axis.bar(names, heights, 0.6, yerr=errors, capsize=4), fmt="%.1f")
    axis.set(ylabel="pass@1 (%), ± standard error", title=title)
    figure.savefig(path, dpi=110)


# -- the command ----------------------------------------------------------------------------------

# fmt: off
FLAGS = {
    "model": flag(None, "folder, or name on the hub, of a model; none: the embedded default"),
    "benchmarks": flag(None, f"comma-separated: toy, {', '.join(data.BENCHMARKS)}, files of "
                       "problems, or data sets OWNER/NAME on the hub; none: toy"),
    "preset": flag(None, "the paper's protocol: its five benchmarks, greedy and at T = 0.1 (32 "
                   "samples on aime24 and amc)", choices=("paper",)),
    "k": flag(None, "samples per problem; none: 1. Greedy takes one", type=int, least=1),
    "temperature": flag(None, "sampling temperature, 0: greedy; none: 0.6", type=float, most=99),
    "template": flag("auto", f"{', '.join(data.TEMPLATES)}, or a file; auto: that of the run for "
                     "RUN/model and RUN/best, else chosen by the model"),
    "reward": flag(None, "your own reward, MODULE:FUNCTION, in place of right or wrong"),
    "max_prompt": flag(2048, "longest prompt (tokens); longer ones are skipped, aloud", least=1),
    "max_response": flag(8192, "longest response (tokens), where the context allows it", least=1),
    "seed": flag(0, "of every request", most=2**32 - 1),
    "data_dir": flag(None, "folder of NAME.jsonl; none: $REMIX_DATA, else downloaded to HF_HOME"),
    "out": flag(None, "output folder; none: RUN/eval for RUN/model, RUN/eval-best for RUN/best, "
                "else eval/MODEL; DIR/rejudged for --rejudge DIR"),
    "rejudge": flag(None, "judge the responses of an earlier evaluation again: its folder"),
    "dtype": flag("auto", "auto: bfloat16 on GPUs", choices=("auto", "float32", "bfloat16")),
    "tp": flag(1, "tensor-parallel ranks per engine", least=1),
    "engine_memory": flag(0.9, "share of GPU memory for vLLM", least=0.01, most=0.99),
    "threads": flag(1, "CPU threads per rank", least=1),
}
# fmt: on
# what may differ when an evaluation goes on (what parts are follows from the rest)
MAY_DIFFER = ("out", "tp", "engine_memory", "threads", "data_dir", "parts")


def parse(argv):
    """Flags -> checked arguments. Raises ValueError."""
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = config.parser(FLAGS, prog="eval.py", **about)
    help = "two results.json: paired differences with bootstrap intervals"
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help=help)
    defaults = {name: one.default for name, one in FLAGS.items()}
    args = parser.parse_args(argv, argparse.Namespace(**defaults, compare=None))
    config.check_bounds(args, FLAGS)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) % args.tp:
        raise ConfigError(f"{world} ranks cannot be divided into groups of --tp {args.tp}")
    if args.template != "auto":
        data.template_style(args.template)
    path = Path(args.model or "toy").resolve()
    beside = {"model": "eval", "best": "eval-best"}.get(path.name)  # RUN/model -> RUN/eval
    default = path.parent / beside if beside else f"eval/{path.name}"
    args.out = str(args.out or args.rejudge and f"{args.rejudge}/rejudged" or default)
    return args


def prepare(args, say):
    """What a generation needs, on every rank alike: part -> problems, folder of the model,
    tokenizer, and the settings to be written down. Raises ValueError.

    A part is k samples at one temperature for each problem of a benchmark.
    """
    package = config.check_vllm()
    ranks.check_gpus(package)
    if args.benchmarks is None:
        args.benchmarks = ",".join(PAPER) if args.preset else "toy"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    names = [name.strip() for name in args.benchmarks.split(",")]
    benchmarks = {name: data.load_eval_data(name, args.data_dir) for name in names}
    if args.reward:  # tried on one response, before a model is fetched
        try_own(args.reward, benchmarks[names[0]][0]["answer"])
    if args.model:
        folder = data.model_folder(args.model)
        data.check_model(folder, args.tp)
    else:
        folder = toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0")
    tokenizer = data.load_tokenizer(folder)
    try:  # RUN/model and RUN/best are their run's
        run = config.saved_values(Path(args.model).resolve().parent) if args.model else {}
    except ConfigError:
        run = {}
    of_model = data.default_template(args.model or folder, tokenizer)
    template = run.get("template", of_model) if args.template == "auto" else args.template
    temperatures = [args.temperature]
    if args.temperature is None:
        temperatures = [0.0, 0.1] if args.preset else [0.6]
    context, parts, described = data.context_length(folder) or 10**9, {}, {}
    for name, problems in benchmarks.items():
        chosen = "raw" if name == "toy" else template
        how = folder, tokenizer, chosen, min(args.max_prompt, context - 1), say, f" of {name}"
        problems, skipped = data.encode(problems, *how)
        k = args.k or (32 if args.preset and name in ("aime24", "amc") else 1)
        style = args.reward or data.template_style(chosen)
        shared = dict(n=len(problems), template=chosen, style=style, skipped=skipped)
        shared["problems"] = data.content(problems)
        for temperature in temperatures:
            part = f"{name} T={temperature:g}" if temperature else f"{name} greedy"
            part = part if args.preset else name
            parts[part] = problems
            described[part] = shared | dict(k=k if temperature else 1, temperature=temperature)
    asked = [problem for problems in parts.values() for problem in problems]
    longest = max(len(problem["prompt_ids"]) for problem in asked)
    length = min(longest + args.max_response, context)
    if length < longest + args.max_response:
        least = f"{length - longest} tokens after the longest prompt"
        say(f"responses are cut where the model's context of {context} ends: {least}")
    packages = ("torch", package, "transformers", "math_verify")
    versions = {name: importlib.metadata.version(name) for name in packages}
    base, prompts = run.get("model") or args.model, data.fingerprint(folder, asked)[:16]
    more = dict(base=base, prompts=prompts, longest_sequence=length, versions=versions)
    return parts, folder, tokenizer, vars(args) | more | dict(parts=described)


def begin(out, settings):
    """Make the output folder with its settings.json, or go on with what is there. Returns the rows
    of samples.jsonl. Raises ValueError where it holds results, or was begun with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    guards.hold(out)
    if (out / "results.json").exists():
        raise ConfigError(f"{out} already holds results: choose another --out")
    path, samples = out / "settings.json", out / "samples.jsonl"
    if path.exists():
        before = json.loads(path.read_text())
        keys = [key for key in settings if key not in MAY_DIFFER]
        if changed := differences(before, settings, keys):
            why = f"{out} holds an unfinished evaluation, and {changed[0]} now"
            raise ConfigError(f"{why}: say the same, or choose another --out")
    rewrite(path, json.dumps(settings, indent=1))
    rows = read_rows(samples) if samples.exists() else []
    rewrite(samples, jsonl(rows))  # without an unfinished last line
    return rows


def read_rows(path):
    """The rows of a samples.jsonl, without an unfinished last line."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def finish(out, settings, rows):
    """Scores of all rows: the console's table, results.json and the picture."""
    scores, problems = {}, {}
    for name, part in settings["parts"].items():
        scores[name] = summarise([row for row in rows if row["part"] == name]) | part
        problems[name] = scores[name].pop("by_problem")
    lines = table(scores)
    if settings["preset"]:
        lines += published(scores, settings["model"] or "", settings["base"] or "")
    print("\n".join(lines))
    chart(scores, out / "results.png", settings["model"] or "the embedded default")
    results = dict(scores=scores, settings=settings, problems=problems)
    rewrite(out / "results.json", json.dumps(results, indent=1))
    print(out)


def rejudge(args):
    """Judge the rows of an earlier evaluation again, by its own styles or --reward. Raises
    ValueError and OSError."""
    folder, out = Path(args.rejudge), Path(args.out)
    settings = json.loads((folder / "settings.json").read_text())
    rows = read_rows(folder / "samples.jsonl")
    wanted = sum(part["n"] * part["k"] for part in settings["parts"].values())
    if len(rows) != wanted:
        why = f"holds {len(rows)} of {wanted} responses: the evaluation's own command goes on"
        raise ConfigError(f"--rejudge {folder} {why}")
    if args.reward:
        try_own(args.reward, rows[0]["gold"])
        for part in settings["parts"].values():
            part["style"] = args.reward
    settings |= dict(out=args.out, rejudge=args.rejudge, reward=args.reward or settings["reward"])
    settings["versions"]["math_verify"] = importlib.metadata.version("math_verify")
    begin(out, settings)
    before = [row["reward"] for row in rows]
    with Judge() as judge:
        for name, part in settings["parts"].items():
            judge_rows(judge, [row for row in rows if row["part"] == name], part["style"])
    changed = sum(old != row["reward"] for old, row in zip(before, rows))
    rewrite(out / "samples.jsonl", jsonl(rows))
    finish(out, settings, rows)
    print(f"{changed} of {len(rows)} verdicts changed")


def main(argv=None):
    guards.guard()
    first = os.environ.get("RANK", "0") == "0"
    say = partial(print, flush=True) if first else lambda *_: None
    rows = []
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.compare:
            return say("\n".join(compare(*args.compare)))
        if args.rejudge:
            return rejudge(args) if first else None
        parts, folder, tokenizer, settings = prepare(args, say)
        if first:  # what cannot be written to is known before the evaluation
            rows = begin(Path(args.out), settings)
    except (ValueError, OSError) as error:
        config.exit_bad_input(error)

    samples = Path(args.out) / "samples.jsonl"
    with Judge() as judge:
        if any(part["style"] != "hash" for part in settings["parts"].values()):
            judge.start()  # before CUDA does
        joined = ranks.start(args.threads)
        known = gather([(row["part"], row["id"], row["sample"]) for row in rows])[0]
        if known:
            say(f"going on after {len(known)} responses of an interrupted evaluation")
        how = settings["longest_sequence"], args, joined
        engine = Engine(folder, *how, version=0, stop=stop_tokens(tokenizer))
        for name, part in settings["parts"].items():

            def write(chunk, name=name):
                if first:
                    append(samples, jsonl({"part": name} | row for row in chunk))

            asked = part["k"], part["temperature"], args.max_response, part["style"], args.seed
            done = {(id, sample) for of, id, sample in known if of == name}
            evaluate(engine, judge, tokenizer, parts[name], 0, *asked, done, write)
    if first:
        finish(Path(args.out), settings, read_rows(samples))
    ranks.stop()


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
    # as in train.py: Python's own end has aborted finished runs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

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
from typing import NamedTuple

import numpy as np
import torch

from infra import checkpoint, data, guards, ranks, toy
from infra.config import ConfigError, Parser, check_vllm, exit_bad_input
from infra.data import load_benchmark  # noqa: F401, a contract: importable from here
from infra.metrics import rewrite
from infra.ranks import bring_home, deal_out, gather
from reward import Judge, canonical, final_answer, own, reflects, try_own
from rollout import Engine, request_seed, stop_tokens

# Responses of an engine between two writes to samples.jsonl: so many at most are generated again.
CHUNK = 512
# what may differ when an evaluation goes on
MACHINE = ("out", "tp", "engine_memory", "threads", "data_dir")
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
    return dict(
        id=problem["id"],
        sample=sample,
        prompt=tokenizer.decode(problem["prompt_ids"]),
        response=tokenizer.decode(response["response"], skip_special_tokens=True),
        judged=None,
        gold=problem["answer"],
        reward=0.0,
        reason="truncated",
        length=len(response["response"]),
        truncated=response["truncated"],
    )


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


def by_problem(rows):
    """id -> its rows."""
    found = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def mean(values):
    return float(np.mean(list(values)))


def summarise(rows):
    """Scores of k rows for each of n problems, in [0, 1], with lengths (tokens) and the number of
    unjudged responses by reason.

    What does not exist is None or empty: a standard error of one problem, pass@k and maj@k of a
    user's own rewards other than 0 and 1.
    """
    groups = list(by_problem(rows).values())
    rewards = [[row["reward"] for row in group] for group in groups]
    scores = np.array([mean(some) for some in rewards])  # (n,)
    n, k = len(groups), len(rows) // len(groups)
    right, powers = [some.count(1) for some in rewards], []
    verdicts = all(row["reward"] in (0, 1) for row in rows)
    if verdicts:
        powers = [2**i for i in range(k.bit_length())]
    reasons = Counter(row["reason"] for row in rows if row["reason"] not in (None, "wrong"))
    return {
        "pass@1": mean(scores),
        "standard_error": float(scores.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "n": n,
        "k": k,
        "pass@k": {str(j): mean(pass_at_k(k, r, j) for r in right) for j in powers},
        "maj@k": mean(map(majority, groups)) if verdicts else None,
        "length_mean": mean(row["length"] for row in rows),
        "truncated_share": mean(row["truncated"] for row in rows),
        "reflection_rate": mean(reflects(row["response"]) for row in rows),
        "unjudged_share": (reasons.total() - reasons["truncated"]) / len(rows),
        "unjudged": dict(reasons),
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
            means[f"eval_{key}"] = mean(summary[key] for summary in found.values())
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


def percent(value, form=".2f"):
    return "-" if value is None else format(100 * value, form)


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
    theirs = {}
    for name, cells in known["models"].get(Path(base).name, {}).items():
        theirs[name] = np.array([cell.split("/") for cell in cells.split()], float)  # (5, 2)
    if not theirs:
        return []
    ours = np.full((len(PAPER), 2), np.nan)
    for i, name in enumerate(PAPER):
        for j, how in enumerate(("greedy", "T=0.1")):
            if f"{name} {how}" in scores:
                ours[i, j] = 100 * scores[f"{name} {how}"]["pass@1"]

    def line(name, cells, form=".2f"):
        texts = []
        for pair in [*cells, cells.mean(axis=0)]:
            texts.append("/".join("-" if math.isnan(x) else format(x, form) for x in pair))
        return [name, *texts]

    rows = [line(name, cells) for name, cells in theirs.items()]
    rows.append(line(f"ours: {Path(model).name}", ours))
    for name, cells in theirs.items():
        if name == Path(base).name or name.startswith("ReMix"):
            rows.append(line(f"ours - {name}", ours - cells, "+.2f"))
    title = f"published (greedy/T=0.1; AMC is the set of 83; source: {known['source']}) and ours"
    return [title, *lines_of(rows, ["", *PAPER, "mean"])]


def read_results(path):
    """results.json at `path` or in the folder `path`. Raises ValueError."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(path.read_text())
        for scores in found["problems"].values():
            if not all(isinstance(score, (int, float)) for score in scores.values()):
                raise ValueError("a score is no number")
        found["settings"].setdefault("parts", {})
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no results.json of eval.py ({why})") from None


def compare(first, second, resamples=10_000):
    """Lines: by how much the second evaluation's pass@1 differs from the first's on the problems of
    both, with the 95 % interval of a paired bootstrap over problems. first, second: paths of
    results.json. Raises ValueError."""
    a, b = read_results(first), read_results(second)
    names = [name for name in a["problems"] if name in b["problems"]]
    if not names:
        theirs = [", ".join(file["problems"]) for file in (a, b)]
        raise ValueError(f"nothing to compare: {first} is on {theirs[0]}, {second} on {theirs[1]}")
    asked = [("", ("max_response", "seed", "dtype", "versions"), a["settings"], b["settings"])]
    for name in names:
        one, other = (file["settings"]["parts"].get(name, {}) for file in (a, b))
        asked.append((f"{name}'s ", ("k", "temperature", "template", "style"), one, other))
        whole = not (one.get("skipped") or other.get("skipped"))
        if whole and one.get("problems") != other.get("problems"):
            why = f"{name} is other problems in {first} than in {second}"
            raise ValueError(f"nothing to compare: {why}")
    notes = []
    for what, keys, one, other in asked:
        for key in keys:
            if one.get(key) != other.get(key):
                both = f"{one.get(key)} and {other.get(key)}"
                notes.append(f"they differ in {what}{key} too: {both}")
    rng, numbers = np.random.default_rng(0), {}
    for name in names:
        one, other = a["problems"][name], b["problems"][name]
        both = [id for id in one if id in other]
        if not both:
            raise ValueError(f"nothing to compare: no problem of {name} is in both")
        if alone := len(one.keys() ^ other.keys()):
            left_out = f"{name}: {alone} problems are in one of the two only, and left out"
            notes.insert(0, left_out)
        pair = 100 * np.array([[part[id] for id in both] for part in (one, other)])  # (2, n)
        difference = pair[1] - pair[0]  # (n,)
        drawn = rng.integers(len(both), size=(resamples, len(both)))
        resampled = difference[drawn].mean(axis=1)  # (resamples,)
        numbers[name] = [len(both), *pair.mean(axis=1), difference.mean(), resampled]
    if len(names) > 1:
        n, *columns = zip(*numbers.values())
        numbers["mean"] = [sum(n), *(sum(column) / len(names) for column in columns)]
    rows = []
    for name, (n, x, y, difference, resampled) in numbers.items():
        low, high = np.percentile(resampled, [2.5, 97.5])
        verdict = "" if low > 0 or high < 0 else "may be chance" if low < high else "the same"
        cells = f"{x:.2f}", f"{y:.2f}", f"{difference:+.2f}", f"[{low:+.2f}, {high:+.2f}]"
        rows.append([name, str(n), *cells, verdict])
    headers = ["benchmark", "n", "first", "second", "difference", "95 % interval", ""]
    return notes + lines_of(rows, headers)


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


def parse(argv):
    """Flags -> checked arguments. Raises ConfigError and ValueError."""
    parser = Parser(
        prog="eval.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(data.BENCHMARKS)
    # fmt: off
    for name, default, help in (
        ("model", None, "folder, or name on the hub, of a model; none: the embedded default"),
        ("benchmarks", None, f"comma-separated: toy, {known}, files of problems, or data sets "
                             "OWNER/NAME on the hub [toy]"),
        ("data_dir", None, "folder of NAME.jsonl; none: $REMIX_DATA, else downloaded to HF_HOME"),
        ("template", "auto", f"{', '.join(data.TEMPLATES)}, or a file [auto: that of the run for "
                             "RUN/model and RUN/best, else chosen by the model]"),
        ("reward", None, "your own reward, MODULE:FUNCTION, in place of right or wrong"),
        ("out", None, "output folder [RUN/eval for RUN/model, RUN/eval-best for RUN/best, else "
                      "eval/MODEL; DIR/rejudged for --rejudge DIR]"),
        ("rejudge", None, "judge the responses of an earlier evaluation again: its folder"),
    ):
        parser.add_argument(f"--{name}", default=default, help=help)
    for name, kind, default, help in (
        ("k", int, None, "samples per problem [1]; greedy takes one"),
        ("temperature", float, None, "sampling temperature [0.6]; 0: greedy"),
        ("max_prompt", int, 2048, "longest prompt (tokens); longer ones are counted and skipped"),
        ("max_response", int, 8192, "longest response (tokens), shorter where the context ends"),
        ("seed", int, 0, "of every request"),
        ("tp", int, 1, "tensor-parallel ranks per engine"),
        ("engine_memory", float, 0.9, "share of GPU memory for vLLM"),
        ("threads", int, 1, "CPU threads per rank"),
    ):
        shown = "" if default is None else f" [{default}]"
        parser.add_argument(f"--{name}", type=kind, default=default, help=help + shown)
    parser.add_argument("--preset", choices=["paper"], help="the paper's protocol: its five "
                        "benchmarks, greedy and at T = 0.1 (32 samples on aime24 and amc)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="[auto: bfloat16 on a GPU, float32 on a CPU]")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"),
                        help="two results.json: paired differences with bootstrap intervals")
    # fmt: on
    args = parser.parse_args(argv)
    least = dict(k=1, max_prompt=1, max_response=1, temperature=0, tp=1, threads=1)
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"--{name} is {value}: at least {bound} is needed")
    hot = (args.temperature or 0) >= 100
    if hot or not (0 < args.engine_memory < 1 and 0 <= args.seed < 2**32):
        bounds = "--temperature must lie below 100, --engine_memory in (0, 1), --seed in [0, 2^32)"
        raise ConfigError(bounds)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) % args.tp:
        raise ConfigError(f"{world} ranks cannot be divided into groups of --tp {args.tp}")
    if not args.out:
        path = Path(args.model or "toy").resolve()
        beside = {"model": "eval", "best": "eval-best"}.get(path.name)  # RUN/model -> RUN/eval
        args.out = path.parent / beside if beside else Path("eval") / path.name
        if args.rejudge:
            args.out = Path(args.rejudge) / "rejudged"
    args.out = Path(args.out)
    if not args.compare:
        check_free(args.out)
    if args.template != "auto":
        data.template_style(args.template)
    if args.reward:
        own(args.reward)
    return args


def check_free(out):
    """Raise ConfigError where `out` holds a finished evaluation."""
    if (out / "results.json").exists():
        raise ConfigError(f"{out} already holds results: choose another --out")


class Part(NamedTuple):
    """k samples at one temperature for each problem of a benchmark."""

    problems: list
    settings: dict  # n, k, temperature, template, style, skipped, and hashes: problems, prompts


def make_parts(args, say):
    """Everything that a generation needs. Returns (name -> Part, folder of the model, tokenizer,
    longest sequence (tokens)). Raises ValueError."""
    vllm = check_vllm()
    asked = args.benchmarks
    if asked is None:
        asked = ",".join(PAPER) if args.preset else "toy"
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    problems = {name: data.load_eval_data(name, args.data_dir) for name in names}
    if args.reward:
        try_own(args.reward, problems[names[0]][0]["answer"])
    if args.model:
        folder = data.model_folder(args.model)
        data.check_model(folder, args.tp)
    else:
        folder = toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0")
    tokenizer, context = data.load_tokenizer(folder), data.context_length(folder) or 10**9
    ranks.check_gpus(vllm)
    template = args.template
    if template == "auto":
        of_model = data.default_template(args.model or folder, tokenizer)
        template = of_run(args.model, "template") or of_model
    temperatures = (0.6 if args.temperature is None else args.temperature,)
    if args.preset and args.temperature is None:
        temperatures = (0.0, 0.1)
    parts = {}
    for name in names:
        chosen = "raw" if name == "toy" else template
        how = folder, tokenizer, chosen, min(args.max_prompt, context - 1), say, f" of {name}"
        encoded, skipped = data.encode(problems[name], *how)
        k = args.k or (32 if args.preset and name in ("aime24", "amc") else 1)
        settings = dict(
            n=len(encoded),
            template=chosen,
            style=args.reward or data.template_style(chosen),
            skipped=skipped,
            problems=data.content(encoded),
            prompts=data.fingerprint(folder, encoded)[:16],
        )
        for temperature in temperatures:
            label = f"T={temperature:g}" if temperature else "greedy"
            label = f"{name} {label}" if args.preset else name
            drawn = dict(k=k if temperature else 1, temperature=temperature)
            parts[label] = Part(encoded, settings | drawn)
    longest = max(len(p["prompt_ids"]) for part in parts.values() for p in part.problems)
    length = min(longest + args.max_response, context)
    if length < longest + args.max_response:
        left = f"the model's context of {context} ends: {length - longest} after the longest prompt"
        say(f"responses may have {args.max_response} tokens, fewer where {left}")
    return parts, folder, tokenizer, length


def of_run(model, name):
    """The value `name` of the run whose model/ or best/ this is; None where it is no run's."""
    try:
        config = Path(model).resolve().parent / "config.json"
        return json.loads(config.read_text())["values"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(args, parts, length):
    """The settings of an evaluation, as written down: the flags and what they led to."""
    flags = {name: v for name, v in vars(args).items() if name not in ("compare", "rejudge")}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "math_verify")}
    described = {name: part.settings for name, part in parts.items()}
    base = of_run(args.model, "model") or args.model
    more = dict(versions=versions, longest_sequence=length, base=base, parts=described)
    return flags | {"out": str(args.out)} | more


def begin(out, settings):
    """Make the output folder, or go on with what is there. Returns the rows of samples.jsonl.
    Raises ValueError for other settings."""
    out.mkdir(parents=True, exist_ok=True)
    guards.hold(out)
    check_free(out)  # again: another evaluation may have ended here in the meantime
    path = out / "settings.json"
    if path.exists():
        before = flat(json.loads(path.read_text()))
        for name, now in flat(settings).items():
            if name not in MACHINE and before.get(name) != now:
                raise ConfigError(
                    f"{out} holds an unfinished evaluation with another {name} "
                    f"({before.get(name)}, now {now}): say the same, or choose another --out"
                )
    path.write_text(json.dumps(settings, indent=1))
    samples = out / "samples.jsonl"
    rows = read_rows(samples) if samples.exists() else []
    write_rows(samples, rows)  # without an unfinished last line
    return rows


def flat(settings):
    found = settings | {"parts": list(settings["parts"])}
    for part, values in settings["parts"].items():
        found |= {f"{name} of {part}": value for name, value in values.items()}
    return found


def read_rows(path):
    """The rows of a samples.jsonl; an unfinished last line is left out. Raises ValueError."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no row of eval.py ({error})") from None
    return rows


def write_rows(path, rows):
    rewrite(path, "".join(json.dumps(row) + "\n" for row in rows))


def finish(out, settings, rows):
    """Scores of all rows: the console's table, results.json and the picture. Raises ConfigError
    unless the rows are k samples for every problem of every part, each once."""
    wanted = sum(part["n"] * part["k"] for part in settings["parts"].values())
    found = {(row["part"], row["id"], row["sample"]) for row in rows}
    if not len(found) == len(rows) == wanted:
        raise ConfigError(
            f"{settings['out']} holds {len(found)} of {wanted} responses ({len(rows)} lines): "
            "the evaluation's own command goes on with it"
        )
    scores, problems = {}, {}
    for name, part in settings["parts"].items():
        mine = [row for row in rows if row["part"] == name]
        scores[name] = summarise(mine) | part
        problems[name] = {}
        for id, some in by_problem(mine).items():
            problems[name][id] = mean(row["reward"] for row in some)
    lines = table(scores)
    if settings["preset"]:
        lines += published(scores, settings["model"] or "", settings["base"] or "")
    print("\n".join(lines))
    os.makedirs(out, exist_ok=True)
    chart(scores, out / "results.png", settings["model"] or "the embedded default")
    results = dict(scores=scores, settings=settings, problems=problems)
    rewrite(out / "results.json", json.dumps(results, indent=1))
    print(out)


def rejudge(args):
    """Judge the rows of an earlier evaluation again, by its own styles or --reward. Raises
    ConfigError."""
    folder, changed = Path(args.rejudge), 0
    try:
        settings = json.loads((folder / "settings.json").read_text())
        rows = read_rows(folder / "samples.jsonl")
        with Judge() as judge:
            for name, part in settings["parts"].items():
                part["style"] = args.reward or part["style"]
                some = [row for row in rows if row["part"] == name]
                before = [row["reward"] for row in some]
                judge_rows(judge, some, part["style"])
                changed += sum(old != row["reward"] for old, row in zip(before, some))
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no evaluation to judge again ({error})"
        raise ConfigError(f"--rejudge {folder}: {why}") from None
    except RuntimeError as error:  # of one's own reward, or no math-verify
        raise ConfigError(str(error)) from None
    settings["versions"]["math_verify"] = importlib.metadata.version("math_verify")
    finish(args.out, settings | dict(rejudged=args.rejudge), rows)
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1))
    write_rows(args.out / "samples.jsonl", rows)
    print(f"{changed} of {len(rows)} verdicts changed")


def main(argv=None):
    guards.guard()
    first = os.environ.get("RANK", "0") == "0"
    say = partial(print, flush=True) if first else lambda *_: None
    rows = None
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.compare:
            return print("\n".join(compare(*args.compare)))
        if args.rejudge:
            return rejudge(args)
        parts, folder, tokenizer, length = make_parts(args, say)
        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        settings = describe(args, parts, length)
        if first:  # what cannot be written to is known before the evaluation
            rows = begin(args.out, settings)
    except (ValueError, OSError) as error:
        exit_bad_input(error)

    with Judge() as judge:
        if any(part.settings["style"] != "hash" for part in parts.values()):
            judge.start()  # before CUDA does
        joined = ranks.start(args.threads)
        known = [(row["part"], row["id"], row["sample"]) for row in rows or ()]
        known = gather(known)[0]
        if known:
            say(f"going on after {len(known)} responses of an interrupted evaluation")
        samples = args.out / "samples.jsonl"
        engine = Engine(folder, length, args, joined, version=0, stop=stop_tokens(tokenizer))
        for name, (problems, how) in parts.items():

            def write(chunk, name=name):
                if first:
                    lines = [json.dumps({"part": name} | row) + "\n" for row in chunk]
                    with open(samples, "a", encoding="utf-8") as file:
                        file.writelines(lines)

            asked = how["k"], how["temperature"], args.max_response, how["style"], args.seed
            done = {(id, sample) for part, id, sample in known if part == name}
            evaluate(engine, judge, tokenizer, problems, 0, *asked, done, write)
    if first:
        finish(args.out, settings, read_rows(samples))
    ranks.stop()


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
    # as in train.py: Python's own end has aborted finished runs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

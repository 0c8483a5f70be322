"""The real command lines at a very small scale: train.py on vLLM, FSDP2, torchrun and math-verify.

What a run wrote down is judged from outside: rewards from the text of the responses, log-probs from
a plain transformers model with the weights of each version, the ledger from the schedule, one run
against another.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import methods
from conftest import Running, command, comparable, gone, metrics_of
from infra import checkpoint, config, data, toy
from infra.metrics import METRICS


def launched(script, *args, **how):
    done = command(script, *args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def together(folder, runs, **how):
    """Runs of one start, one after the other (runs.py): name -> flags. Returns their outputs."""
    runs = {name: [str(flag) for flag in flags] for name, flags in runs.items()}
    (folder / "flags.json").write_text(json.dumps(runs))
    stdout = launched(
        "tests/runs.py", "algorithms", folder, folder / "flags.json", timeout=600, **how
    )
    for rank in range(how.get("ranks", 1)):
        assert json.loads((folder / f"algorithms-{rank}.json").read_text()) == dict.fromkeys(runs)
    return {part.partition("\n")[0]: part for part in stdout.split("== ")[1:]}


def parsed(flags):
    return config.parse(flags, methods.NUMBERS, methods.ROWS)


# Real problems: a small Qwen2 that has learned to box small numbers, every row on two ranks.

# what the model has learned to say
SAYS = re.compile(r"(?:wait |so )?</think>\\boxed\{([1-4](?:\.0)?)\}")


@pytest.fixture(scope="module")
def easy_problems(problems_file, tmp_path_factory):
    """The problems with an answer of 1 to 4: a fair share of guesses is right."""
    path, rng = tmp_path_factory.mktemp("data") / "easy.jsonl", random.Random(0)
    rows = map(json.loads, open(problems_file))
    rows = [row for row in rows if row["answer"] in ("1", "2", "3", "4")]
    for a in range(len(rows), 120):  # generated problems have few of them
        n = rng.randint(1, 4)
        rows.append({"problem": f"What is ${a + n} - {a}$?", "answer": str(n)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def guesser(small_model, easy_problems, problems_file, tmp_path_factory):
    """The small model after a moment of supervised learning: it thinks not at all or one word, then
    boxes 1, …, 4 or 1.0, …, 4.0: math-verify is needed to call 2.0 right where the answer is 2."""
    folder, rng = tmp_path_factory.mktemp("models") / "guesser", random.Random(0)
    tokenizer = data.load_tokenizer(small_model)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    problems = data.load_problems(easy_problems) + data.load_problems(problems_file)[:300]
    encoded, _ = data.encode(problems, small_model, tokenizer, "r1", 96, print)
    prompts = [problem["prompt_ids"] for problem in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 100)
    for _ in range(100):
        rows, labels = [], []
        for _ in range(16):
            said = rng.choice(("", "wait ", "so "))
            text = f"{said}</think>\\boxed{{{rng.randint(1, 4)}{rng.choice(('', '.0'))}}}"
            prompt = rng.choice(prompts)
            answer = tokenizer.encode(text) + [tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


STEPS, WINDOW = 4, 2
COMMON = (
    f"--steps {STEPS} --max_prompt 160 --max_response 24 --lr 1e-4 --warmup 4 "
    "--save_every 1 --keep 10 --seed 3 --no-activation_checkpointing"
).split()
# 40 % fresh; two versions hold 80 %, of which 60 are drawn
MIXED = f"--window {WINDOW} --p 0.6".split()
REMIX = "--lambda_start 1 --lambda_every 1 --reincarnate 3".split()
# row: fresh and past responses a step, λ a step. PPO: 30 prompts; a group baseline: 10 groups of 8
EXPECTED = {
    "ppo": ([30, 30, 30, 30], [0, 0, 0, 0], [1, 1, 1, 1]),
    "grpo": ([80, 80, 80, 80], [0, 0, 0, 0], [1, 1, 1, 1]),
    "mix-ppo": ([12, 12, 12, 12], [0, 12, 18, 18], [1, 1, 1, 1]),
    "mix-grpo": ([32, 32, 32, 32], [0, 32, 48, 48], [1, 1, 1, 1]),
    "remix-ppo": ([12, 12, 12, 30], [0, 12, 18, 0], [1, 0.9, 0.8, 0.7]),
    "remix-grpo": ([32, 32, 32, 80], [0, 32, 48, 0], [1, 0.9, 0.8, 0.7]),
    "decoupled": ([32, 32, 32, 32], [0, 32, 48, 48], [None] * 4),
}


def flags_of(algo, model, problems):
    flags = [*COMMON, "--model", model, "--algo", algo, "--data", problems]
    ppo = "--prompts 30 --minibatch 10 --critic_lr 3e-4"
    flags += (ppo if algo.endswith("ppo") else "--prompts 10 --minibatch 4").split()
    flags += MIXED if sum(EXPECTED[algo][1]) else []
    return flags + (REMIX if "remix" in algo else []) + ["--tensorboard"] * (algo == "ppo")


@pytest.fixture(scope="module")
def two_ranks(guesser, easy_problems, problems_file, benchmark, tmp_path_factory):
    """(folder, output by run, flags by run): every row, and `own` (below), on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        algo: flags_of(algo, guesser, problems_file if algo == "grpo" else easy_problems)
        for algo in EXPECTED
    }
    (folder / "mine.py").write_text(MINE)
    # so that the guesser knows what to do
    text = "My way. " + data.TEMPLATES["r1"][0]["content"]
    (folder / "chat.json").write_text(json.dumps([{"role": "user", "content": text}]))
    flags["own"] = [*OWN, "--model", guesser, "--data", easy_problems]
    flags["own"] += ["--template", folder / "chat.json"]
    flags["own"] += ["--eval_data", f"held_out,{benchmark[0]}", *benchmark[1]]
    return folder, together(folder, flags, ranks=2, env={"PYTHONPATH": str(folder)}), flags


@pytest.fixture(scope="module")
def real_run(two_ranks):
    """real_run(algo) -> (folder, stdout, flags)."""
    folder, said, flags = two_ranks

    def of(algo):
        return folder / algo, said[algo], [*map(str, flags[algo]), "--out", str(folder / algo)]

    return of


@pytest.mark.parametrize("algo", EXPECTED)
def test_every_algorithm_on_real_problems(real_run, algo):
    folder, stdout, flags = real_run(algo)
    lines, size = metrics_of(folder), 1 if algo.endswith("ppo") else 8
    fresh, history, lambdas = EXPECTED[algo]
    assert all(list(line)[: len(METRICS)] == list(METRICS) for line in lines)
    column = {name: [line[name] for line in lines] for name in METRICS}
    assert column["step"] == [1, 2, 3, 4] and column["version"] == [0, 1, 2, 3]
    assert column["fresh_rollouts"] == fresh
    assert column["total_rollouts"] == [sum(fresh[: i + 1]) for i in range(STEPS)]
    ledger = methods.dry_run(parsed(flags)).splitlines()[-1]
    assert ledger == f"total rollouts: {column['total_rollouts'][-1]}"
    phases = ["mixed" if sum(history) else "on-policy"] * 3
    assert column["phase"] == phases + ["mixed" if history[3] else "on-policy"]
    assert column["lambda"] == lambdas
    assert column["lr"] == pytest.approx([1e-4 * step / 4 for step in (1, 2, 3, 4)])
    for step, line in enumerate(lines, 1):
        ages, present = line["staleness"], history[step - 1] > 0
        assert len(ages) == WINDOW + 1 and ages[0] == fresh[step - 1]
        assert sum(ages[1:]) == history[step - 1] and sum(ages[step:]) == 0
        assert all(count % size == 0 for count in ages)
        for name in ("ess", "ratio_mean_history", "ratio_max_history"):
            assert (line[name] is not None) == present, name
        assert (line["kl_prev"] is not None) == ((lambdas[step - 1] or 1) < 1)
        assert (line["kl_base"] is None) == (algo == "decoupled")
        for name in ("value_loss", "critic_grad_norm"):
            assert (line[name] is not None) == (size == 1), name
        assert line["gap_mean"] < 1e-5 and line["gap_mean"] <= line["gap_max"] < 1e-3
        assert 0 < line["entropy"] < math.log(1024) and line["grad_norm"] > 0
        if present:
            assert 0 < line["ess"] <= 1
            assert abs(line["ratio_mean_history"] - 1) < 0.5 < line["ratio_max_history"]
        assert abs(line["ratio_mean_fresh"] - 1) < 0.2 and line["ratio_max_fresh"] >= 1
        # statistics of the objective and of the row's weight, by themselves
        assert line["centre"] > 0 and (line.get("correct_weight") is not None) == (
            algo == "decoupled"
        )
        tokens = line["fresh_rollouts"] * line["length_mean"]
        assert line["tokens_per_second"] * line["seconds_generate"] == pytest.approx(tokens)
        parts = ("seconds_generate", "seconds_logprobs", "seconds_update")
        assert 0 < sum(line[name] for name in parts) < line["seconds_step"]
        assert line["memory_peak_gib"] > 0.1
        assert all(line[name] is None for name in METRICS if name.startswith("eval_"))
    assert lines[2]["ratio_max_fresh"] > 1
    if history[2]:  # three quarters of what is held: both past versions are there
        assert lines[2]["staleness"][1] > 0 and lines[2]["staleness"][2] > 0
        assert lines[1]["ess"] > lines[2]["ess"]  # older samples weigh less evenly
    if algo != "grpo":  # on the easy problems there is something to learn
        assert any(line["accuracy"] > 0 for line in lines)
        assert any(abs(line["policy_loss"]) > 1e-5 for line in lines)
    shown = [line for line in stdout.splitlines() if line.startswith("step ")]
    assert [line[:11] for line in shown] == [f"step    {i}/4" for i in (1, 2, 3, 4)]
    assert stdout.count("reincarnation after step 3") == ("remix" in algo)
    files = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "lock"}
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == files
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"step_00000{i}" for i in (1, 2, 3, 4)]
    saved = json.loads((folder / "config.json").read_text())["values"]
    assert (saved["algo"], saved["template"]) == (algo, "r1")
    # functions' defaults are resolved; what the run does not read stays open
    assert saved["clip_low"] == 0.2 and saved["gamma"] == (1.0 if size == 1 else None)


@pytest.mark.parametrize("algo", ("grpo", "remix-ppo"))
def test_rewards_are_those_of_the_texts(real_run, algo):
    folder, _, _ = real_run(algo)
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert len(samples) == 4 * STEPS
    for s in samples:
        said = SAYS.fullmatch(s["response"])
        if said and (s["answer"].isdecimal() or not re.search(r"\d", s["answer"])):
            right = s["answer"] in ("1", "2", "3", "4") and float(s["answer"]) == float(said[1])
            assert (s["reward"], s["reason"] is None) == (right, right), s
        assert s["prompt"].endswith("<think>") and s["reward"] in (0, 1)
    prompts = [{s["prompt"] for s in samples if s["step"] == step} for step in (1, 2)]
    assert not prompts[0] & prompts[1]  # the stream of prompts moves on


def test_tensorboard(real_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = real_run("ppo")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("entropy", "accuracy", "total_rollouts"):
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert shown == [(line["step"], line[name]) for line in metrics_of(folder)]
    assert not list(real_run("grpo")[0].glob("tensorboard*"))


def shards(folder, step, tmp_path):
    """The whole tensors of a checkpoint: {"policy": {"model": …}, "base": {"0": …}, …}."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    saved = folder / "checkpoints" / f"step_{step:06d}" / "sharded"
    dcp_to_torch_save(saved, tmp_path / f"{step}.pt")
    return torch.load(tmp_path / f"{step}.pt", weights_only=False)


def policy_weights(state):
    return {
        name.removeprefix("lm."): tensor
        for name, tensor in state["policy"]["model_state_dict"].items()
    }


def test_base_and_precedent_in_the_shards_of_a_run(real_run, guesser, tmp_path):
    """Base: π_0 before T = 3, π_T from T on. Precedent: the policy one step ago. To the bit."""
    folder, _, _ = real_run("remix-ppo")
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(guesser).named_parameters()]
    states = {step: shards(folder, step, tmp_path) for step in (1, 2, 3, 4)}
    policy = {step: policy_weights(state) for step, state in states.items()}
    policy[0] = load_file(guesser / "model.safetensors")

    def versions(snapshot):
        assert len(snapshot) == len(names)
        pairs = [(snapshot[str(i)], name) for i, name in enumerate(names)]
        return [v for v in range(5) if all(torch.equal(t, policy[v][name]) for t, name in pairs)]

    for step, state in states.items():
        assert versions(state["base"]) == [3 if step >= 3 else 0], step
        assert versions(state["prev"]) == [step - 1], step
    exported = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], policy[4][name]) for name in names)
    assert "prev" not in shards(real_run("ppo")[0], 2, tmp_path)
    assert "base" not in shards(real_run("decoupled")[0], 2, tmp_path)


def held(folder, step):
    """The buffer of a checkpoint: version -> groups of samples, as dicts."""
    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return dict(torch.load(path, weights_only=True)["buffer"]["entries"])


@torch.no_grad()
def naive_log_probs(model, sample):
    ids = torch.cat([sample["prompt"], sample["response"]])
    logits = model(input_ids=ids[None]).logits[0, len(sample["prompt"]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, sample["response"][:, None])[:, 0]


def test_the_buffer_of_a_run(real_run, guesser, tmp_path):
    """Whole groups with the version that wrote them, the trainer's log-probs under that version and
    under the base, the rewards of their texts; and the metrics of their step."""
    folder, _, _ = real_run("mix-grpo")
    tokenizer, lines = data.load_tokenizer(guesser), {m["version"]: m for m in metrics_of(folder)}
    versions = {step: list(held(folder, step)) for step in (1, 2, 3, 4)}
    assert versions == {1: [0], 2: [0, 1], 3: [1, 2], 4: [2, 3]}
    model = AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine_differs = False
    for step in (1, 2, 3, 4):
        version, groups = step - 1, held(folder, step)[step - 1]
        assert len(groups) == 4 and [len(group) for group in groups] == [8] * 4
        for i, group in enumerate(groups):
            assert {s["prompt_index"] for s in group} == {4 * version + i}
            assert len({tuple(s["prompt"].tolist()) for s in group}) == 1
        fresh = [sample for group in groups for sample in group]
        assert {s["version"] for s in fresh} == {version}
        assert "logp_prev" not in fresh[0] and "logp_old" not in fresh[0]
        author = policy_weights(shards(folder, version, tmp_path)) if version else base
        for weights, key in ((base, "logp_base"), (author, "logp_behavior")):
            model.load_state_dict(weights)
            for s in fresh:
                assert (naive_log_probs(model, s) - s[key]).abs().max() < 2e-5
        own = [(s["logp_base"] - s["logp_behavior"]).abs().max() < 1e-4 for s in fresh]
        assert (version == 0) == all(own)
        gaps = torch.cat([(s["logp_behavior"] - s["logp_sampler"]).abs() for s in fresh])
        engine_differs |= gaps.max().item() > 0
        rewards, lengths = [s["reward"] for s in fresh], [len(s["response"]) for s in fresh]
        by_hand = dict(
            gap_mean=gaps.mean().item(),
            gap_max=gaps.max().item(),
            accuracy=sum(rewards) / 32,
            length_mean=sum(lengths) / 32,
            length_max=max(lengths),
            truncated_share=sum(s["truncated"] for s in fresh) / 32,
            reflection_rate=sum(s["reflects"] for s in fresh) / 32,
        )
        assert {name: lines[version][name] for name in by_hand} == pytest.approx(by_hand)
        for s in fresh:
            if text := SAYS.fullmatch(tokenizer.decode(s["response"], skip_special_tokens=True)):
                right = s["answer"].isdecimal() and float(text[1]) == float(s["answer"])
                assert s["reward"] == right and s["said"] == text[1].removesuffix(".0")
    assert engine_differs  # both log-probs are real, and not one taken for the other
    before, after = held(folder, 2)[1], held(folder, 3)[1]
    for a, b in zip(sum(before, []), sum(after, [])):  # having been drawn changed nothing
        assert all(torch.equal(a[k], b[k]) if k.startswith("logp") else True for k in a)
        assert (a["reward"], a["reason"]) == (b["reward"], b["reason"])


def test_reincarnation_empties_the_buffer(real_run):
    folder, _, _ = real_run("remix-grpo")
    assert [list(held(folder, step)) for step in (1, 2, 3, 4)] == [[0], [0, 1], [], []]


# A user's own template, reward, held-out problems and benchmark, in bfloat16.


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Flags that name a benchmark of 30 problems: AIME'24 in $REMIX_DATA, or a generated file."""
    if os.environ.get("REMIX_DATA"):
        return "aime24", ["--data_dir", os.environ["REMIX_DATA"]]
    path, rng = tmp_path_factory.mktemp("benchmarks") / "aime24.jsonl", random.Random(1)
    with open(path, "w") as file:
        for i in range(30):
            problem = f"What is ${i + rng.randint(1, 9)} - {i}$?"
            row = {"id": f"aime24/{i}", "problem": problem, "answer": str(i % 5)}
            file.write(json.dumps(row) + "\n")
    return str(path), []


MINE = "def even(response, answer):\n    return 1 if len(response) % 2 == 0 else 0.25\n"


OWN = (
    "--algo ppo --steps 3 --prompts 12 --minibatch 6 --max_prompt 200 --max_response 24 "
    "--lr 3e-4 --critic_lr 3e-4 --dtype bfloat16 --held_out 10 --eval_every 1 --eval_k 2 "
    "--save_every 1 --keep 10 --reward mine:even"
).split()


@pytest.fixture(scope="module")
def own_run(two_ranks):
    """(folder of the run, its output)."""
    return two_ranks[0] / "own", two_ranks[1]["own"]


def test_own_template_and_reward(own_run):
    folder, stdout = own_run
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert all(s["prompt"].startswith("<user>My way. ") for s in samples)
    (shown,) = [line for line in stdout.splitlines() if "the model sees" in line]
    assert "<user>My way. " in shown and "judged by mine:even" in shown
    for s in samples:
        own = 1 if len(s["response"]) % 2 == 0 else 0.25
        assert s["reward"] == (0 if s["reason"] == "truncated" else own), s
    assert {s["reward"] for s in samples} >= {0.25, 1}
    for line in metrics_of(folder)[1:]:
        assert 0.25 < line["reward"] < 1 and line["accuracy"] < line["reward"]


def test_evaluation_in_parts(own_run, easy_problems, benchmark):
    """Held-out problems by the run's own reward, a benchmark always by math."""
    folder, stdout = own_run
    lines, (other, _) = metrics_of(folder), benchmark
    found = re.findall(r"^skipped (\d+) of \d+ prompts of (\S+):", stdout, re.M)  # too long
    skipped = {name: int(n) for n, name in found}
    responses = {
        name: 2 * (n - skipped.get(name, 0)) for name, n in (("held_out", 10), (other, 30))
    }
    quarters = {"held_out": 0, other: 0}
    for line in lines:
        parts = line["eval_accuracy_by_part"]
        assert list(parts) == ["held_out", other]
        assert line["eval_accuracy"] == pytest.approx(sum(parts.values()) / 2)
        for name, n in responses.items():
            right = parts[name] * n
            assert right * 4 == pytest.approx(round(right * 4), abs=1e-6)
            quarters[name] += abs(right - round(right)) > 0.1
    assert quarters["held_out"] > 0  # 0.25 is the own reward's, 0 or 1 are math's
    assert other != "aime24" or quarters[other] == 0
    n = int(re.search(r"^(\d+) problems, template", stdout, re.M)[1])  # some prompts were too long
    assert 24 < n <= len(data.load_problems(easy_problems)) - 10
    assert [line["epoch"] for line in lines[1:]] == pytest.approx([0, 12 / n, 24 / n])


def test_the_best_model_is_kept(own_run, tmp_path):
    """best/ is the policy of the step with the highest score; in bfloat16, as trained."""
    folder, _ = own_run
    scores = {line["step"]: line["eval_accuracy"] for line in metrics_of(folder) if line["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    for name, step in (("best", best), ("model", 3)):
        exported = load_file(folder / name / "model.safetensors")
        policy = policy_weights(shards(folder, step, tmp_path))
        assert exported
        assert all(torch.equal(tensor, policy[key].bfloat16()) for key, tensor in exported.items())


def test_importance_sampling_is_on_in_bfloat16(own_run, real_run):
    folder, _ = own_run
    saved = json.loads((folder / "config.json").read_text())["values"]
    assert (saved["mismatch"], saved["mismatch_high"], saved["dtype"]) == (
        "truncated",
        2.0,
        "bfloat16",
    )
    for line in metrics_of(folder)[1:]:
        assert 1e-5 < line["gap_mean"] < 0.05 and 0 < abs(line["mismatch_weight"] - 1) < 0.05
    assert "mismatch_weight" not in metrics_of(real_run("ppo")[0])[0]  # float32: off


# The embedded default: the same run again, interrupted, on other ranks, with another seed.

TOY = (
    "--algo remix-ppo --prompts 20 --p 0.6 --window 2 --minibatch 8 --reincarnate 4 "
    "--lambda_start 1 --lambda_every 1 --save_every 3 --eval_every 3 --eval_k 1"
).split()


def asked(folder, own_run, guesser, easy_problems, benchmark):
    """Flags of eval.py on the trained toy, on the best model of a user's own run (its own default
    folder), and on a benchmark."""
    named = ["--model", guesser, "--benchmarks", benchmark[0], *benchmark[1], "--k", 2]
    named += ["--max_prompt", 400, "--max_response", 24, "--out", folder / "benchmark"]
    trained = ["--model", folder / "whole/model", "--benchmarks", "toy", "--k", 2]
    trained += ["--temperature", 1, "--out", folder / "eval"]
    own = ["--model", own_run / "best", "--benchmarks", f"{easy_problems},{easy_problems}"]
    own += ["--reward", "mine:even", "--max_prompt", 200, "--max_response", 24]
    return dict(own=own, toy=trained, benchmark=named)


@pytest.fixture(scope="module")
def toy_runs(own_run, guesser, easy_problems, benchmark, tmp_path_factory):
    """Run folders by name, and what was `said`, evaluations too.

    whole: six steps on one rank. half: killed after the fourth, records damaged, resumed to six.
    two: two ranks, their torchrun killed after the fourth step, resumed to five on one rank. other:
    another seed, stopped by Ctrl-C after the first. four: on two machines of two ranks, HSDP, the
    rollouts of whole.
    """
    toy.model_folder()
    folder = tmp_path_factory.mktemp("toy")

    def begun(name, after, *flags, **how):
        flags = [*TOY, "--steps", 100, "--out", folder / name, *flags]
        return Running(folder / f"{name}.log", "train.py", *flags, **how).wait_for(
            f"step    {after}/"
        )

    def killed():
        running, half = begun("half", 4), folder / "half"
        os.kill(running.pid, signal.SIGKILL)
        running.end()
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / f"half-{name}").write_text((half / name).read_text())
            with open(half / name, "a") as file:
                file.write('{"step": 4, "of": "a life before"}\n{"step": 5, "cut o')
        (half / "checkpoints" / "step_000099.tmp").mkdir()  # what a kill within a save leaves

    def orphaned():
        running = begun("two", 4, "--micro_tokens", 150, "--offload_optimizer", ranks=2)
        ranks = running.ranks
        os.kill(running.pid, signal.SIGKILL)
        gone(ranks)
        shutil.copytree(folder / "two/checkpoints/step_000003", folder / "two-checkpoint")

    def stopped():
        running = begun("other", 1, "--seed", 1)
        os.kill(running.pid, signal.SIGINT)
        assert running.end() == 0, running.text

    with ThreadPoolExecutor(2) as pool:  # two runs at a time
        for done in [pool.submit(job) for job in (killed, orphaned, stopped)]:
            done.result()
    whole = [*TOY, "--steps", 6, "--dump_rollouts"]
    half, two = (["--resume", "--steps", steps] for steps in (6, 5))
    runs = dict(whole=whole, half=half, two=two)
    runs |= asked(folder, own_run[0], guesser, easy_problems, benchmark)
    said = together(folder, runs, env={"PYTHONPATH": str(own_run[0].parent)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--nnodes", "2", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    several += ["--master_port", str(port), "--node_rank"]
    four = [*TOY, "--steps", 3, "--hsdp", "--replay", folder / "whole/rollouts"]
    with ThreadPoolExecutor(2) as pool:

        def node(number):
            launcher = [*several, str(number)]
            launched("train.py", *four, "--out", folder / "four", launcher=launcher)

        list(pool.map(node, (0, 1)))
    names = ("whole", "half", "two", "other", "four")
    return {name: folder / name for name in names} | {"said": said}


def lines_of(folder):
    return [comparable(line) for line in metrics_of(folder)]


def test_the_same_seed_gives_the_same_run_and_another_does_not(toy_runs):
    whole, half = lines_of(toy_runs["whole"]), toy_runs["half"]
    first = [comparable(json.loads(line)) for line in open(half.with_name("half-metrics.jsonl"))]
    assert len(first) >= 5 and first == whole[: len(first)]
    before = half.with_name("half-samples.jsonl").read_text()
    assert before and (toy_runs["whole"] / "samples.jsonl").read_text().startswith(before)
    other = lines_of(toy_runs["other"])
    assert whole[0] != other[0] and other[1]["step"] == 1
    for name in ("total_rollouts", "phase", "lr"):
        assert other[1][name] == whole[1][name]
    for name in ("length_mean", "entropy", "grad_norm", "gap_mean"):
        assert other[1][name] != whole[1][name]


def test_a_resumed_run_is_the_uninterrupted_one(toy_runs):
    """Killed, that is. Steps 4 to 6 need the buffer, base, precedent (λ < 1), both optimisers and
    the reincarnation at 4."""
    whole, half = toy_runs["whole"], toy_runs["half"]
    assert [line["step"] for line in lines_of(half)] == [0, 1, 2, 3, 4, 5, 6]
    assert lines_of(half) == lines_of(whole)
    phases = [line["phase"] for line in lines_of(whole)]
    assert phases == ["evaluation"] + ["mixed"] * 4 + ["on-policy"] * 2
    fourth = lines_of(whole)[4]
    assert fourth["kl_prev"] > 0 and sum(fourth["staleness"][1:]) == 12
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name
    saved = json.loads((half / "config.json").read_text())
    assert saved["values"]["steps"] == 6 and saved["values"]["prompts"] == 20
    assert [argv[0] for argv in saved["argv"]] == ["--algo", "--resume"]


def test_ctrl_c_saves_at_the_end_of_the_step_and_says_how_to_go_on(toy_runs):
    log = toy_runs["other"].with_suffix(".log").read_text()
    steps = [line["step"] for line in lines_of(toy_runs["other"])]
    assert steps == list(range(len(steps))) and 2 <= len(steps) < 10
    assert f"stopped after step {steps[-1]}: SIGINT; --resume goes on" in log
    assert "Traceback" not in log and not (toy_runs["other"] / "model").exists()
    assert checkpoint.newest(toy_runs["other"]).name == f"step_{steps[-1]:06d}"


def test_kl_and_ratio_start_again_at_reincarnation(toy_runs):
    """Reincarnation after step 4: the KL to the base falls to that of one step's updates."""
    kl = [line["kl_base"] for line in lines_of(toy_runs["whole"])[1:]]
    assert kl[3] > 5 * kl[4] > 0


EXACT = (
    "step version phase total_rollouts accuracy reward length_mean length_max staleness lambda "
    "eval_accuracy eval_length_mean truncated_share clip_low_share clip_high_share"
).split()


@pytest.mark.parametrize("name, steps", [("two", 5), ("four", 3)])
def test_ranks_nodes_and_micro_batches_train_alike(toy_runs, name, steps):
    """Whole steps, history included: the same responses, the same numbers to rounding.

    two: small micro-batches, the optimiser in host memory, then killed and resumed on one rank.
    """
    one, two = lines_of(toy_runs["whole"])[: steps + 1], lines_of(toy_runs[name])
    if name == "two":  # its last step is evaluated for being the last
        assert two[5]["eval_accuracy"] is not None
        two[5] |= {key: None for key in two[5] if key.startswith("eval_")}
    else:  # a record is not evaluated
        one = [line | {k: None for k in line if k.startswith("eval_")} for line in one[1:]]
    for a, b in zip(one, two, strict=True):
        assert {key: a[key] for key in EXACT} == {key: b[key] for key in EXACT}
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-4, (key, a[key], b[key])
    first, second = ((toy_runs[run] / "samples.jsonl").read_text() for run in ("whole", name))
    assert second and first.startswith(second)


def test_evaluation_during_training(toy_runs):
    lines = lines_of(toy_runs["whole"])
    evaluated = [line["step"] for line in lines if line["eval_accuracy"] is not None]
    assert evaluated == [0, 3, 6]
    start, end = lines[0], lines[6]
    assert start["phase"] == "evaluation" and start["total_rollouts"] == 0
    assert start["accuracy"] is None
    for line in (start, end):
        right = line["eval_accuracy"] * 128
        assert right == pytest.approx(round(right)) and 0.1 < line["eval_accuracy"] < 0.6
        assert 5 < line["eval_length_mean"] < 40
        assert 0 <= line["eval_truncated_share"] < 0.2 and 0 <= line["eval_unjudged_share"] < 0.2
    assert start["eval_length_mean"] != end["eval_length_mean"]
    assert (toy_runs["whole"] / "best" / "model.safetensors").exists()


# eval.py.


def results_of(folder):
    rows = [json.loads(line) for line in open(folder / "samples.jsonl")]
    return json.loads((folder / "results.json").read_text())["scores"], rows


@pytest.fixture(scope="module")
def evaluations(toy_runs, own_run):
    """(stdout, folder) of those of `asked`."""
    whole, best = toy_runs["whole"], own_run[0] / "eval-best"
    folders = dict(own=best, toy=whole.with_name("eval"), benchmark=whole.with_name("benchmark"))
    return {name: (toy_runs["said"][name], folder) for name, folder in folders.items()}


def test_eval_on_the_trained_toy(evaluations):
    stdout, folder = evaluations["toy"]
    scores, rows = results_of(folder)
    score = scores["toy"]
    assert (score["n"], score["k"], score["skipped"]) == (128, 2, 0)
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 256
    for row in rows:
        said, total = row["response"].rpartition("#"), sum(map(int, row["id"].partition("/")[2]))
        right = said[1] == "#" and not row["truncated"] and said[2] == str(total)
        assert row["reward"] == right and row["part"] == "toy" and row["gold"] == str(total)
    by_id = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row["reward"])
    means = [statistics.mean(rewards) for rewards in by_id.values()]
    assert score["pass@1"] == pytest.approx(statistics.mean(means)) and 0.1 < score["pass@1"] < 0.6
    assert score["standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(128))
    length = statistics.mean(row["length"] for row in rows)
    assert score["length_mean"] == pytest.approx(length)
    assert f"{100 * score['pass@1']:.2f}" in stdout and stdout.splitlines()[-1] == str(folder)


def test_eval_of_a_run_takes_its_template(evaluations, easy_problems):
    """And a reward of one's own; a benchmark that is named twice is evaluated once."""
    stdout, folder = evaluations["own"]
    scores, rows = results_of(folder)
    ((name, score),) = scores.items()
    assert name == str(easy_problems) and score["template"].endswith("chat.json")
    assert score["style"] == "mine:even" and score["n"] == len(rows) > 30
    assert stdout.splitlines()[-1] == str(folder)
    for row in rows:
        own = 1 if len(row["response"]) % 2 == 0 else 0.25
        assert row["reward"] == (0 if row["truncated"] else own)


def test_eval_on_a_benchmark(evaluations, benchmark):
    scores, rows = results_of(evaluations["benchmark"][1])
    problems, (score,) = data.load_eval_data(benchmark[0], *benchmark[1][1:]), scores.values()
    assert score["n"] + score["skipped"] == 30 and len(rows) == 2 * score["n"] > 30
    assert {row["id"] for row in rows} <= {problem["id"] for problem in problems}
    assert any(row["reason"] in (None, "wrong") for row in rows)  # math-verify had work
    # two samples, not one twice
    assert any(a["response"] != b["response"] for a, b in zip(rows[::2], rows[1::2]))


def test_the_headline_command_as_far_as_the_download(tmp_path):
    """torchrun --nproc_per_node 8 train.py --model Qwen2.5-Math-7B, as README prints it: without
    the hub it is one line from rank 0, before any model is loaded."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    line = "torchrun --nproc_per_node 8 train.py --model Qwen2.5-Math-7B"
    assert line in readme
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    flags = line.partition("train.py ")[2].split()
    done = command("train.py", *flags, "--out", tmp_path / "run", ranks=8, env=env)
    errors = [row for row in done.stderr.splitlines() if row.startswith("error")]
    assert done.returncode and len(errors) == 1, done.stderr[-3000:]
    assert "with internet access" in errors[0] and not (tmp_path / "run").exists()

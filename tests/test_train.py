"""The real command lines at a very small scale: train.py and eval.py on vLLM, FSDP2, torchrun and math-verify.

What a run wrote down is judged from outside: rewards from the text of the responses, log-probs from a plain
transformers model with the weights of each version, the ledger from the schedule, one run against another.
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

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval
from conftest import Running, command, comparable, gone, metrics_of
from infra import checkpoint, data, toy
from infra.config import dry_run, parse
from infra.metrics import METRICS
from tools import compare


def launched(script, *args, **how):
    done = command(script, *args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


# Real problems: a small Qwen2 that has learned to box small numbers, every algorithm on two ranks.

SAYS = re.compile(r"(?:wait |so )?</think>\\boxed\{([1-4](?:\.0)?)\}")  # what the model has learned


@pytest.fixture(scope="module")
def easy_problems(problems_file, tmp_path_factory):
    """The problems with an answer of 1 to 4: a fair share of guesses is right."""
    path, rng = tmp_path_factory.mktemp("data") / "easy.jsonl", random.Random(0)
    rows = [
        row for row in map(json.loads, open(problems_file)) if row["answer"] in ("1", "2", "3", "4")
    ]
    for a in range(len(rows), 120):  # generated problems have few of them
        n = rng.randint(1, 4)
        rows.append({"problem": f"What is ${a + n} - {a}$?", "answer": str(n)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def guesser(small_model, easy_problems, problems_file, tmp_path_factory):
    """The small model after a moment of supervised learning: it thinks not at all or one word, then boxes a number.

    The number is 1, …, 4 or 1.0, …, 4.0: math-verify is needed to call 2.0 right where the answer is 2.
    """
    folder, rng = tmp_path_factory.mktemp("models") / "guesser", random.Random(0)
    tokenizer = data.load_tokenizer(small_model)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    problems = data.load_problems(easy_problems) + data.load_problems(problems_file)[:300]
    prompts = [
        problem["prompt_ids"] for problem in data.encode_prompts(problems, tokenizer, "r1", 96)[0]
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 160)
    for _ in range(160):
        texts = [
            f"{rng.choice(('', 'wait ', 'so '))}</think>\\boxed{{{rng.randint(1, 4)}{rng.choice(('', '.0'))}}}"
            for _ in range(16)
        ]
        pairs = [
            (rng.choice(prompts), tokenizer.encode(text) + [tokenizer.eos_token_id])
            for text in texts
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.tensor([p + a + [0] * (length - len(p) - len(a)) for p, a in pairs])
        labels = torch.tensor(
            [[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in pairs]
        )
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


STEPS, WINDOW = 4, 2
COMMON = (
    f"--steps {STEPS} --window {WINDOW} --minibatch 4 --max_prompt 160 --max_response 24 --lr 1e-4 "
    "--critic_lr 3e-4 --warmup 4 --save_every 1 --keep 10 --seed 3 --samples 1000"
).split()
MIXED = (
    "--p 0.6 --lambda_start 1 --lambda_every 1".split()
)  # 40 % fresh; two versions hold 80 %, of which 60 are drawn
# algorithm: fresh and historical responses a step, lambda a step. PPO: 30 prompts; GRPO: 10 groups of 8
EXPECTED = {
    "ppo": ([30, 30, 30, 30], [0, 0, 0, 0], [1, 1, 1, 1]),
    "grpo": ([80, 80, 80, 80], [0, 0, 0, 0], [1, 1, 1, 1]),
    "mix-ppo": ([12, 12, 12, 12], [0, 12, 18, 18], [1, 1, 1, 1]),
    "mix-grpo": ([32, 32, 32, 32], [0, 32, 48, 48], [1, 1, 1, 1]),
    "remix-ppo": ([12, 12, 12, 30], [0, 12, 18, 0], [1, 0.9, 0.8, 0.7]),
    "remix-grpo": ([32, 32, 32, 80], [0, 32, 48, 0], [1, 0.9, 0.8, 0.7]),
}


@pytest.fixture(scope="module")
def real_run(guesser, easy_problems, problems_file, tmp_path_factory):
    """real_run(algo) -> (folder, stdout, flags): two ranks, real vLLM, real math-verify; one after the other in two processes (runs.py)."""
    runs = tmp_path_factory.mktemp("runs")

    def flags_of(algo):
        flags = [*COMMON, "--model", str(guesser), "--algo", algo]
        flags += ["--data", str(problems_file if algo == "grpo" else easy_problems)]
        flags += ["--prompts", "10" if "grpo" in algo else "30"] + (MIXED if "mix" in algo else [])
        return (
            flags
            + (["--reincarnate", "3"] if "remix" in algo else [])
            + (["--tensorboard"] if algo == "ppo" else [])
        )

    flags = {algo: flags_of(algo) for algo in EXPECTED}
    (runs / "flags.json").write_text(json.dumps(flags))
    stdout = launched(
        "tests/runs.py", "algorithms", runs, runs / "flags.json", ranks=2, timeout=600
    )
    assert (
        json.loads((runs / "algorithms-1.json").read_text())
        == json.loads((runs / "algorithms-0.json").read_text())
        == dict.fromkeys(EXPECTED)
    )
    said = {part.partition("\n")[0]: part for part in stdout.split("== ")[1:]}
    return lambda algo: (runs / algo, said[algo], [*flags[algo], "--out", str(runs / algo)])


@pytest.mark.parametrize("algo", EXPECTED)
def test_every_algorithm_on_real_problems(real_run, algo):
    folder, stdout, flags = real_run(algo)
    lines, cfg, size = metrics_of(folder), parse(flags), 8 if "grpo" in algo else 1
    fresh, history, lambdas = EXPECTED[algo]
    assert [list(line) for line in lines] == [list(METRICS)] * STEPS
    column = {name: [line[name] for line in lines] for name in METRICS}
    assert column["step"] == [1, 2, 3, 4] and column["version"] == [0, 1, 2, 3]
    assert column["fresh_rollouts"] == fresh
    assert column["total_rollouts"] == [sum(fresh[: i + 1]) for i in range(STEPS)]
    assert dry_run(cfg).splitlines()[-1] == f"total rollouts: {column['total_rollouts'][-1]}"
    assert column["phase"] == (["mixed"] * 3 if "mix" in algo else ["on-policy"] * 3) + [
        "mixed" if algo.startswith("mix") else "on-policy"
    ]
    assert column["lambda"] == lambdas
    assert column["lr"] == pytest.approx([1e-4 * step / 4 for step in (1, 2, 3, 4)])
    for step, line in enumerate(lines, 1):
        ages = line["staleness"]
        assert (
            len(ages) == WINDOW + 1
            and ages[0] == fresh[step - 1]
            and sum(ages[1:]) == history[step - 1]
        )
        assert all(count % size == 0 for count in ages) and sum(ages[step:]) == 0
        present = history[step - 1] > 0
        for name in ("ess", "ratio_mean_history", "ratio_max_history"):
            assert (line[name] is not None) == present, name
        assert (line["kl_prev"] is not None) == (lambdas[step - 1] < 1)
        critic = [
            line[name] is not None
            for name in ("value_loss", "critic_grad_norm", "explained_variance")
        ]
        assert critic[:2] == [size == 1] * 2 and (size == 1 or not critic[2])
        assert line["gap_mean"] < 1e-5 and line["gap_mean"] <= line["gap_max"] < 1e-3
        assert (
            0 < line["entropy"] < math.log(1024) and line["grad_norm"] > 0 and line["kl_base"] > 0
        )
        if present:
            assert (
                0 < line["ess"] <= 1
                and abs(line["ratio_mean_history"] - 1) < 0.5 < line["ratio_max_history"]
            )
        assert abs(line["ratio_mean_fresh"] - 1) < 0.2 and line["ratio_max_fresh"] > 1
        tokens = line["fresh_rollouts"] * line["length_mean"]
        assert line["tokens_per_second"] * line["seconds_generate"] == pytest.approx(tokens)
        assert (
            0
            < line["seconds_generate"] + line["seconds_logprobs"] + line["seconds_update"]
            < line["seconds_step"]
        )
        assert line["memory_peak_gib"] > 0.1 and all(
            line[name] is None for name in METRICS if name.startswith("eval_")
        )
    if history[2]:  # three quarters of what is held: both past versions are there
        assert lines[2]["staleness"][1] > 0 and lines[2]["staleness"][2] > 0
    if any(history):  # older samples weigh less evenly
        assert lines[1]["ess"] > lines[2]["ess"] and lines[2]["ratio_max_history"] > 1
    if algo != "grpo":  # on the easy problems there is something to learn
        assert any(line["accuracy"] > 0 for line in lines) and any(
            abs(line["policy_loss"]) > 1e-4 for line in lines
        )
    shown = [line for line in stdout.splitlines() if line.startswith("step ")]
    assert (
        len(shown) == STEPS
        and [line.startswith(f"step    {i}/4") for i, line in enumerate(shown, 1)] == [True] * 4
    )
    assert stdout.count("reincarnation after step 3") == (1 if "remix" in algo else 0)
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "model",
        "lock",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"step_00000{i}" for i in (1, 2, 3, 4)
    ]
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["values"]["algo"], saved["values"]["template"], saved["sources"]["prompts"]) == (
        algo,
        "r1",
        "flag",
    )


@pytest.mark.parametrize("algo", ("grpo", "remix-ppo"))
def test_rewards_and_lengths_are_those_of_the_texts(real_run, algo):
    """samples.jsonl holds every fresh response here: the metrics recomputed from the texts."""
    folder, _, _ = real_run(algo)
    samples, lines = (
        [json.loads(line) for line in open(folder / "samples.jsonl")],
        metrics_of(folder),
    )
    plain = [s for s in samples if SAYS.fullmatch(s["response"])]
    assert len(plain) > 0.4 * len(samples)
    for s in plain:
        right = s["answer"] in ("1", "2", "3", "4") and float(s["answer"]) == float(
            SAYS.fullmatch(s["response"])[1]
        )
        if s["answer"].isdecimal() or not re.search(
            r"\d", s["answer"]
        ):  # to read \frac42 is math-verify's work
            assert (s["reward"], s["reason"] is None) == (right, right), s
    assert any(".0}" in s["response"] and s["reward"] for s in plain) or algo == "grpo"  # 2.0 is 2
    for line in lines:
        now = [s for s in samples if s["step"] == line["step"]]
        assert len(now) == line["fresh_rollouts"]
        assert line["accuracy"] == pytest.approx(statistics.mean(s["reward"] for s in now))
        assert line["truncated_share"] == pytest.approx(
            statistics.mean(s["reason"] == "truncated" for s in now)
        )
        unjudged = statistics.mean(s["reason"] not in (None, "wrong", "truncated") for s in now)
        assert line["unjudged_share"] == pytest.approx(unjudged)
        assert line["reflection_rate"] == pytest.approx(
            statistics.mean("wait" in s["response"] for s in now), abs=0.1
        )
        assert all(s["prompt"].endswith("<think>") and s["reward"] in (0, 1) for s in now)
    prompts = [[s["prompt"] for s in samples if s["step"] == step] for step in (1, 2)]
    assert not set(prompts[0]) & set(prompts[1])  # the stream of prompts moves on


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

    dcp_to_torch_save(
        folder / "checkpoints" / f"step_{step:06d}" / "sharded", tmp_path / f"{step}.pt"
    )
    return torch.load(tmp_path / f"{step}.pt", weights_only=False)


def policy_weights(state):
    return {name.removeprefix("lm."): tensor for name, tensor in state["policy"]["model"].items()}


def test_base_and_precedent_in_the_shards_of_a_run(real_run, guesser, tmp_path):
    """Base: pi_0 before T = 3, pi_T from T on. Precedent: what the policy was one step ago. Compared bit for bit."""
    folder, _, _ = real_run("remix-ppo")
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(guesser).named_parameters()]
    states = {step: shards(folder, step, tmp_path) for step in (1, 2, 3, 4)}
    policy = {step: policy_weights(state) for step, state in states.items()}
    policy[0] = load_file(guesser / "model.safetensors")

    def same(snapshot, version):
        assert len(snapshot) == len(names)
        return all(
            torch.equal(snapshot[str(i)], policy[version][name]) for i, name in enumerate(names)
        )

    for step, state in states.items():
        assert [version for version in range(5) if same(state["base"], version)] == [
            3 if step >= 3 else 0
        ], step
        assert [version for version in range(5) if same(state["prev"], version)] == [step - 1], step
    exported = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], policy[4][name]) for name in names)
    assert "base" in shards(real_run("ppo")[0], 1, tmp_path) and "prev" not in shards(
        real_run("ppo")[0], 2, tmp_path
    )


def held(folder, step):
    """The buffer of a checkpoint: version -> groups of samples."""
    where = folder / "checkpoints" / f"step_{step:06d}"
    state, tensors = (
        json.loads((where / "state.json").read_text()),
        load_file(where / "buffer.safetensors"),
    )

    def read(sample):
        return {
            key: tensors[value["tensor"]] if isinstance(value, dict) else value
            for key, value in sample.items()
        }

    return {
        version: [[read(sample) for sample in group] for group in groups]
        for version, groups in state["buffer"]["entries"]
    }


@torch.no_grad()
def naive_log_probs(model, sample):
    ids = torch.cat([sample["prompt"], sample["response"]])
    logits = model(input_ids=ids[None]).logits[0, len(sample["prompt"]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, sample["response"][:, None])[:, 0]


def test_the_buffer_of_a_run(real_run, guesser, tmp_path):
    """Whole groups with the version that wrote them, the trainer's log-probs under that version and under the base, the
    rewards of their texts and their own group's advantages; and the metrics of their step."""
    folder, _, _ = real_run("mix-grpo")
    tokenizer, lines = (
        data.load_tokenizer(guesser),
        {line["version"]: line for line in metrics_of(folder)},
    )
    assert {step: list(held(folder, step)) for step in (1, 2, 3, 4)} == {
        1: [0],
        2: [0, 1],
        3: [1, 2],
        4: [2, 3],
    }
    model, spread, engine_differs = (
        AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32),
        0,
        False,
    )
    answers = {s["prompt"]: s["answer"] for s in map(json.loads, open(folder / "samples.jsonl"))}
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in (1, 2, 3, 4):
        version, groups = step - 1, held(folder, step)[step - 1]
        assert len(groups) == 4 and [len(group) for group in groups] == [8] * 4
        assert [{s["prompt_index"] for s in group} for group in groups] == [
            {4 * version + i} for i in range(4)
        ]
        assert [len({tuple(s["prompt"].tolist()) for s in group}) for group in groups] == [1] * 4
        fresh = [sample for group in groups for sample in group]
        assert {s["version"] for s in fresh} == {version}
        author = policy_weights(shards(folder, version, tmp_path)) if version else base
        for weights, key in ((base, "logp_base"), (author, "logp_behavior")):
            model.load_state_dict(weights)
            for s in fresh:
                assert (naive_log_probs(model, s) - s[key]).abs().max() < 2e-5
        assert (version == 0) == all(
            (s["logp_base"] - s["logp_behavior"]).abs().max() < 1e-4 for s in fresh
        )
        gaps = torch.cat([(s["logp_behavior"] - s["logp_sampler"]).abs() for s in fresh])
        engine_differs |= gaps.max().item() > 0
        rewards, lengths = [s["reward"] for s in fresh], [len(s["response"]) for s in fresh]
        by_hand = dict(
            gap_mean=gaps.mean().item(),
            gap_max=gaps.max().item(),
            accuracy=sum(rewards) / 32,
            length_mean=sum(lengths) / 32,
            length_max=max(lengths),
        )
        assert {name: lines[version][name] for name in by_hand} == pytest.approx(by_hand)
        for s in fresh:
            text = SAYS.fullmatch(tokenizer.decode(s["response"], skip_special_tokens=True))
            if text:
                assert s["reward"] == (
                    float(text[1]) == float(answers[tokenizer.decode(s["prompt"])])
                )
        for group in groups:
            rewards, advantages = [s["reward"] for s in group], [s["advantage"] for s in group]
            centre, deviation = statistics.mean(rewards), statistics.stdev(rewards)
            spread += deviation > 0
            assert abs(sum(advantages)) < 1e-4
            assert advantages == pytest.approx(
                [(r - centre) / (deviation + 1e-6) for r in rewards], abs=1e-4
            )
    assert (
        spread >= 4 and engine_differs
    )  # both log-probs are real, and not one taken for the other
    before, after = (
        [s["advantage"] for group in held(folder, step)[1] for s in group] for step in (2, 3)
    )
    assert before == after  # having been drawn changed nothing


def test_reincarnation_empties_the_buffer(real_run):
    folder, _, _ = real_run("remix-grpo")
    assert [list(held(folder, step)) for step in (1, 2, 3, 4)] == [[0], [0, 1], [], []]


# A user's own template, reward, held-out problems and benchmark, in bfloat16; then again from its config.json.


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The flags that name a benchmark of 30 problems: AIME'24 in $REMIX_DATA, or a generated file."""
    if os.environ.get("REMIX_DATA"):
        return "aime24", ["--data_dir", os.environ["REMIX_DATA"]]
    path, rng = tmp_path_factory.mktemp("benchmarks") / "aime24.jsonl", random.Random(1)
    rows = [
        {
            "id": f"aime24/{i}",
            "problem": f"What is ${i + rng.randint(1, 9)} - {i}$?",
            "answer": str(i % 5),
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), []


@pytest.fixture(scope="module")
def own_run(guesser, easy_problems, benchmark, tmp_path_factory):
    """(folder of the run, folder of its repetition, their output)."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(
        "def even(response, answer):\n    return 1 if len(response) % 2 == 0 else 0.25\n"
    )
    chat = [
        {"role": "user", "content": data.TEMPLATES["r1"]("My way. {problem}")[0]["content"]}
    ]  # so that the guesser knows what to do
    (folder / "chat.json").write_text(json.dumps(chat))
    flags = (
        "--algo ppo --steps 3 --prompts 12 --minibatch 6 --max_prompt 200 --max_response 24 --lr 3e-4 --critic_lr 3e-4 --samples 1000 "
        "--dtype bfloat16 --held_out 10 --eval_every 1 --eval_k 2 --save_every 1 --keep 10"
    ).split()
    flags += [
        "--model",
        guesser,
        "--data",
        easy_problems,
        "--eval_data",
        f"held_out,{benchmark[0]}",
        *benchmark[1],
        "--template",
        folder / "chat.json",
    ]
    env = {"PYTHONPATH": str(folder)}
    first = launched(
        "train.py", *flags, "--reward", "mine:even", "--out", folder / "run", ranks=2, env=env
    )
    again = launched(
        "train.py",
        "--config",
        folder / "run" / "config.json",
        "--max_hours",
        1e-4,
        "--out",
        folder / "again",
        ranks=2,
        env=env,
    )
    return folder / "run", folder / "again", first, again


def test_own_template_and_reward(own_run):
    folder, _, stdout, _ = own_run
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert (
        all(s["prompt"].startswith("<user>My way. ") for s in samples)
        and len({s["prompt"] for s in samples}) > 20
    )
    shown = [line for line in stdout.splitlines() if "the model sees" in line]
    assert len(shown) == 1 and "<user>My way. " in shown[0] and "judged by mine:even" in shown[0]
    for line in metrics_of(folder)[1:]:
        now = [s for s in samples if s["step"] == line["step"]]
        for s in now:
            wanted = 0 if s["reason"] == "truncated" else 1 if len(s["response"]) % 2 == 0 else 0.25
            assert s["reward"] == wanted, s
        assert line["reward"] == pytest.approx(statistics.mean(s["reward"] for s in now))
        assert line["accuracy"] == pytest.approx(statistics.mean(s["reward"] == 1 for s in now))
    assert {s["reward"] for s in samples} >= {0.25, 1}


def test_evaluation_in_parts(own_run, easy_problems, benchmark):
    """Held-out problems, which are not trained on, by the run's own reward; a benchmark always by math."""
    folder, _, stdout, _ = own_run
    lines, (other, _) = metrics_of(folder), benchmark
    skipped = {
        name: int(n)
        for n, name in re.findall(r"^skipped (\d+) of \d+ prompts of (\S+):", stdout, re.M)
    }  # too long
    responses = {
        name: 2 * (n - skipped.get(name, 0)) for name, n in (("held_out", 10), (other, 30))
    }
    quarters = {"held_out": 0, other: 0}
    for line in lines:
        parts = line["eval_accuracy_by_part"]
        assert list(parts) == ["held_out", other] and line["eval_accuracy"] == pytest.approx(
            sum(parts.values()) / 2
        )
        for name, n in responses.items():
            right = parts[name] * n
            assert right * 4 == pytest.approx(round(right * 4), abs=1e-6)
            quarters[name] += abs(right - round(right)) > 0.1
    assert quarters["held_out"] > 0  # 0.25 is the own reward's, 0 or 1 are math's
    assert other != "aime24" or quarters[other] == 0
    held_out = {p["problem"] for p in data.split_held_out(data.load_problems(easy_problems), 10)[1]}
    asked = {json.loads(line)["prompt"] for line in open(folder / "samples.jsonl")}
    assert len(held_out) == 10 and not any(
        prompt.startswith(f"<user>My way. {text} Let's") for prompt in asked for text in held_out
    )
    n = int(re.search(r"^(\d+) problems, template", stdout, re.M)[1])  # some prompts were too long
    assert 24 < n <= len(data.load_problems(easy_problems)) - 10
    assert [line["epoch"] for line in lines[1:]] == pytest.approx([0, 12 / n, 24 / n])


def test_the_best_model_is_kept(own_run, tmp_path):
    """best/ is the policy of the step with the highest score; here and in model/ in bfloat16, as trained."""
    folder, _, _, _ = own_run
    scores = {line["step"]: line["eval_accuracy"] for line in metrics_of(folder) if line["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    for name, step in (("best", best), ("model", 3)):
        exported, policy = (
            load_file(folder / name / "model.safetensors"),
            policy_weights(shards(folder, step, tmp_path)),
        )
        assert exported and all(
            torch.equal(tensor, policy[key].bfloat16()) for key, tensor in exported.items()
        )


def test_importance_sampling_is_on_in_bfloat16(own_run, real_run):
    folder, _, _, _ = own_run
    saved = json.loads((folder / "config.json").read_text())["values"]
    assert (saved["tis"], saved["dtype"], saved["rollout_dtype"]) == (2.0, "bfloat16", "bfloat16")
    sources = json.loads((folder / "config.json").read_text())["sources"]
    assert (sources["tis"], sources["dtype"], sources["rollout_dtype"]) == (
        "settled by dtype and rollout_dtype",
        "flag",
        "settled by dtype",
    )
    for line in metrics_of(folder)[1:]:
        assert 1e-5 < line["gap_mean"] < 0.05 and abs(line["tis_mean"] - 1) < 0.05
        assert 0 < line["tis_min"] < 1 and 0 <= line["tis_truncated_share"] < 0.05
    assert metrics_of(real_run("ppo")[0])[0]["tis_mean"] is None  # float32: off


def test_a_run_repeated_from_its_config(own_run):
    """To the bit, with the reward, template and data of the file; --max_hours lets it do no second step."""
    folder, again, _, stdout = own_run
    assert lines_of(again) == lines_of(folder)[:2]
    assert "stopped after step 1" in stdout and "--resume" in stdout
    assert (again / "model" / "model.safetensors").exists() and (
        again / "checkpoints" / "step_000001"
    ).is_dir()


# The embedded default: the same run again, interrupted, on other ranks, with another seed.

TOY = (
    "--algo remix-ppo --prompts 20 --p 0.6 --window 2 --minibatch 8 --reincarnate 4 --lambda_start 1 "
    "--lambda_every 1 --save_every 3 --eval_every 3 --eval_k 1"
).split()


SLOW = """
import os, time
def judge(response, answer):
    begin = time.monotonic()
    time.sleep(0.01)
    with open(os.environ["JUDGED"], "a") as file:
        print(begin, time.monotonic(), file=file)
    return len(response) % 2
"""


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """Run folders by name. `whole`: six steps on one rank. `half`: killed after the fourth, its records damaged, resumed to six. `two`: two
    ranks, their torchrun killed after the fourth step, resumed to five on one rank. `other`: another seed, stopped by Ctrl-C after the first."""
    toy.model_folder()
    folder = tmp_path_factory.mktemp("toy")

    def run(name, *flags, **how):
        launched("train.py", *TOY, "--out", folder / name, *flags, **how)
        return folder / name

    def begun(name, after, *flags, **how):
        return Running(
            folder / f"{name}.log",
            "train.py",
            *TOY,
            "--steps",
            100,
            "--out",
            folder / name,
            *flags,
            **how,
        ).wait_for(f"step    {after}/")

    def killed():
        running, half = begun("half", 4), folder / "half"
        os.kill(running.pid, signal.SIGKILL)
        running.end()
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / f"half-{name}").write_text((half / name).read_text())
            with open(half / name, "a") as file:
                file.write('{"step": 4, "of": "a life before"}\n{"step": 5, "cut o')
        (half / "checkpoints" / "step_000099.tmp").mkdir()  # what a kill within a save leaves
        launched("train.py", "--resume", "--out", half, "--steps", 6)
        return half

    def orphaned():
        running = begun("two", 4, "--micro_tokens", 150, "--offload_optimizer", ranks=2)
        ranks = running.ranks
        os.kill(running.pid, signal.SIGKILL)
        gone(ranks)
        shutil.copytree(folder / "two" / "checkpoints" / "step_000003", folder / "two-checkpoint")
        launched("train.py", "--resume", "--out", folder / "two", "--steps", 5)
        return folder / "two"

    def stopped():
        running = begun("other", 1, "--seed", 1)
        os.kill(running.pid, signal.SIGINT)
        assert running.end() == 0, running.text
        return folder / "other"

    (folder / "slow.py").write_text(SLOW)
    with ThreadPoolExecutor(2) as pool:  # two runs of one rank at a time
        whole, half = pool.submit(run, "whole", "--steps", 6), pool.submit(killed)
        other, two = pool.submit(stopped), pool.submit(orphaned)
        slow = pool.submit(
            run,
            "slow",
            "--steps",
            1,
            "--prompts",
            64,
            "--eval_every",
            0,
            "--micro_tokens",
            48,
            "--reward",
            "slow:judge",
            "--reward_workers",
            1,
            env={"PYTHONPATH": str(folder), "JUDGED": str(folder / "judged")},
        )
        runs = dict(
            whole=whole.result(),
            half=half.result(),
            other=other.result(),
            two=two.result(),
            slow=slow.result(),
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        "--node_rank",
    ]
    with ThreadPoolExecutor(
        2
    ) as pool:  # two machines of two ranks each, sharded within, replicated across
        list(
            pool.map(
                lambda node: run("four", "--steps", 3, "--hsdp", launcher=[*several, str(node)]),
                (0, 1),
            )
        )
    return runs | dict(four=folder / "four")


def lines_of(folder):
    return [comparable(line) for line in metrics_of(folder)]


def test_the_same_seed_gives_the_same_run_and_another_does_not(toy_runs):
    whole = lines_of(toy_runs["whole"])
    first = [
        comparable(json.loads(line))
        for line in open(toy_runs["half"].parent / "half-metrics.jsonl")
    ]
    assert len(first) >= 5 and first == whole[: len(first)]
    before = (toy_runs["half"].parent / "half-samples.jsonl").read_text()
    assert before and (toy_runs["whole"] / "samples.jsonl").read_text().startswith(before)
    assert whole[0] != lines_of(toy_runs["other"])[0]
    other = lines_of(toy_runs["other"])[1]
    assert other["step"] == 1 and {
        name: other[name] for name in ("total_rollouts", "phase", "lr")
    } == {name: whole[1][name] for name in ("total_rollouts", "phase", "lr")}
    assert all(
        other[name] != whole[1][name]
        for name in ("length_mean", "entropy", "grad_norm", "gap_mean")
    )
    prompts = [
        {
            s["prompt"]
            for s in map(json.loads, open(toy_runs[name] / "samples.jsonl"))
            if s["step"] == 1
        }
        for name in ("whole", "other")
    ]
    assert prompts[0] != prompts[1]


def test_a_resumed_run_is_the_uninterrupted_one(toy_runs):
    """Killed, that is. Steps 4 to 6 need the buffer, base, precedent (lambda < 1), both optimisers and the reincarnation at 4."""
    whole, half = toy_runs["whole"], toy_runs["half"]
    assert [line["step"] for line in lines_of(half)] == [0, 1, 2, 3, 4, 5, 6]
    assert lines_of(half) == lines_of(whole)
    assert [line["phase"] for line in lines_of(whole)] == ["evaluation"] + ["mixed"] * 4 + [
        "on-policy"
    ] * 2
    assert lines_of(whole)[4]["kl_prev"] > 0 and sum(lines_of(whole)[4]["staleness"][1:]) == 12
    for name in (
        "samples.jsonl",
        "model/model.safetensors",
        "checkpoints/step_000006/buffer.safetensors",
    ):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name
    saved = json.loads((half / "config.json").read_text())
    assert (
        saved["values"]["steps"] == 6
        and saved["values"]["prompts"] == 20
        and "resume" in saved["sources"]["steps"]
    )


def test_judging_overlaps_the_log_probs(toy_runs):
    """A judge of 10 ms a response is waited for far less than it takes; the passes of step 4 take longer."""
    (line,) = lines = metrics_of(toy_runs["slow"])
    times = [tuple(map(float, row.split())) for row in open(toy_runs["slow"].parent / "judged")][
        1:
    ]  # but for the trial before the run
    judging = times[-1][1] - times[0][0]
    assert len(times) == line["fresh_rollouts"] == 25 and judging > 0.25 and len(lines) == 1
    assert line["seconds_reward_wait"] < 0.5 * judging


def test_a_real_run_has_the_settings_that_it_was_asked_for(toy_runs):
    """compare.py goes on with runs made by these flags: what a run settles for itself is no other setting."""
    assert compare.other_settings(toy_runs["whole"], [*TOY, "--steps", "6"]) == {}
    assert set(compare.other_settings(toy_runs["whole"], [*TOY, "--steps", "6", "--utd", "3"])) == {
        "utd"
    }


def test_ctrl_c_saves_at_the_end_of_the_step_and_says_how_to_go_on(toy_runs):
    log, steps = (
        toy_runs["other"].with_suffix(".log").read_text(),
        [line["step"] for line in lines_of(toy_runs["other"])],
    )
    assert steps == list(range(len(steps))) and 2 <= len(steps) < 10
    assert (
        f"stopped after step {steps[-1]}: SIGINT; --resume goes on" in log
        and "Traceback" not in log
    )
    assert checkpoint.newest(toy_runs["other"]).name == f"step_{steps[-1]:06d}"


def test_kl_and_ratio_start_again_at_reincarnation(toy_runs):
    """Reincarnation after step 4: the KL to the base falls to that of one step's updates."""
    kl = [line["kl_base"] for line in lines_of(toy_runs["whole"])[1:]]
    assert kl[3] > 5 * kl[4] > 0


@pytest.mark.parametrize("name", ["two", "four"])
def test_ranks_nodes_and_micro_batches_train_alike(toy_runs, name):
    """Whole steps, history included: the same responses, the same numbers to rounding. `two`: two ranks, small micro-batches, the optimiser
    in host memory, then killed with their torchrun and resumed on one; `four`: four ranks, HSDP on two nodes of two."""
    steps = 5 if name == "two" else 3
    one, two = lines_of(toy_runs["whole"])[: steps + 1], lines_of(toy_runs[name])
    assert [line["step"] for line in two] == list(range(steps + 1))
    if name == "two":  # its last step is evaluated for being the last
        assert two[5]["eval_accuracy"] is not None
        two[5] |= {key: None for key in two[5] if key.startswith("eval_")}
    exact = (
        "step",
        "version",
        "phase",
        "total_rollouts",
        "accuracy",
        "reward",
        "length_mean",
        "length_max",
        "staleness",
        "lambda",
        "eval_accuracy",
        "eval_length_mean",
        "truncated_share",
        "clip_low_share",
        "clip_high_share",
    )
    for a, b in zip(one, two):
        assert {key: a[key] for key in exact} == {key: b[key] for key in exact}
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-4, (key, a[key], b[key])
    one, two = ((toy_runs[run] / "samples.jsonl").read_text() for run in ("whole", name))
    assert two and one.startswith(two)
    kept = (
        toy_runs["two"].parent / "two-checkpoint"
        if name == "two"
        else toy_runs[name] / "checkpoints/step_000003"
    )
    a, b = (
        load_file(where / "buffer.safetensors")
        for where in (toy_runs["whole"] / "checkpoints/step_000003", kept)
    )
    assert a.keys() == b.keys() and all(
        torch.allclose(a[key].float(), b[key].float(), atol=1e-4) for key in a
    )


def test_evaluation_during_training(toy_runs):
    lines = lines_of(toy_runs["whole"])
    assert [line["step"] for line in lines if line["eval_accuracy"] is not None] == [0, 3, 6]
    start, end = lines[0], lines[6]
    assert (
        start["phase"] == "evaluation"
        and start["total_rollouts"] == 0
        and start["accuracy"] is None
    )
    for line in (start, end):
        right = line["eval_accuracy"] * 128
        assert right == pytest.approx(round(right)) and 0.1 < line["eval_accuracy"] < 0.6
        assert (
            5 < line["eval_length_mean"] < 40
            and 0 <= line["eval_truncated_share"] < 0.2
            and 0 <= line["eval_unjudged_share"] < 0.2
        )
    assert start["eval_length_mean"] != end["eval_length_mean"]
    assert (toy_runs["whole"] / "best" / "model.safetensors").exists()


# eval.py.


def results_of(folder):
    rows = [json.loads(line) for line in open(folder / "samples.jsonl")]
    return json.loads((folder / "results.json").read_text())["scores"], rows


@pytest.fixture(scope="module")
def evaluations(toy_runs, own_run, guesser, easy_problems, benchmark, tmp_path_factory):
    """(stdout, folder) of eval.py on the trained toy model, on the best model of a user's own run, and on a named benchmark with one rank
    and with two."""
    out = tmp_path_factory.mktemp("eval")
    named = (
        "--model",
        guesser,
        "--benchmarks",
        benchmark[0],
        *benchmark[1],
        "--k",
        2,
        "--max_prompt",
        400,
        "--max_response",
        24,
    )
    default = ("--model", toy_runs["whole"] / "model", "--k", 2, "--temperature", 1)
    best = own_run[0] / "best"
    with ThreadPoolExecutor(2) as pool:
        own = pool.submit(
            launched,
            "eval.py",
            "--model",
            best,
            "--benchmarks",
            f"{easy_problems},{easy_problems}",
            "--reward",
            "mine:even",
            "--max_prompt",
            200,
            "--max_response",
            24,
            env={"PYTHONPATH": str(own_run[0].parent)},
        )
        on_toy = pool.submit(launched, "eval.py", *default, "--out", out / "toy")
        two = pool.submit(launched, "eval.py", *named, "--out", out / "two", ranks=2)
        one = pool.submit(launched, "eval.py", *named, "--out", out / "one")
        done = {"toy": on_toy.result(), "one": one.result(), "two": two.result()}
    return {name: (text, out / name) for name, text in done.items()} | {
        "own": (own.result(), own_run[0] / "eval-best")
    }


def test_eval_on_the_trained_toy(evaluations):
    stdout, folder = evaluations["toy"]
    scores, rows = results_of(folder)
    score = scores["toy"]
    assert (score["n"], score["k"], score["skipped"]) == (128, 2, 0)
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 256
    for row in rows:
        final = row["response"].rpartition("#")
        total = sum(map(int, row["id"].removeprefix("toy/")))
        right = final[1] == "#" and not row["truncated"] and final[2] == str(total)
        assert row["reward"] == right and row["part"] == "toy"
        assert row["gold"] == str(total) and row["judged"] == (
            final[2].strip() if final[1] and not row["truncated"] else None
        )
    per_problem = [
        statistics.mean(row["reward"] for row in rows if row["id"] == id)
        for id in {row["id"] for row in rows}
    ]
    assert (
        score["pass@1"] == pytest.approx(statistics.mean(per_problem))
        and 0.1 < score["pass@1"] < 0.6
    )
    assert score["standard_error"] == pytest.approx(statistics.stdev(per_problem) / math.sqrt(128))
    assert score["length_mean"] == pytest.approx(statistics.mean(row["length"] for row in rows))
    cells = next(line for line in stdout.splitlines() if line.startswith("toy ")).split()
    assert cells[1:7] == [
        "128",
        "2",
        *(f"{100 * score[key]:.2f}" for key in ("pass@1", "standard_error", "maj@k")),
        f"{score['length_mean']:.1f}",
    ]
    assert stdout.splitlines()[-1] == str(folder)


def test_eval_of_a_run_takes_its_template(evaluations, own_run, easy_problems):
    """And a reward of one's own; a benchmark that is named twice is evaluated once."""
    stdout, folder = evaluations["own"]
    scores, rows = results_of(folder)
    ((name, score),) = scores.items()
    assert (
        name == str(easy_problems)
        and score["template"].endswith("chat.json")
        and score["style"] == "mine:even"
    )
    assert score["n"] == len(rows) > 30 and stdout.splitlines()[-1] == str(folder)
    for row in rows:
        assert row["reward"] == (
            0 if row["truncated"] else 1 if len(row["response"]) % 2 == 0 else 0.25
        )


def test_eval_on_a_benchmark_with_one_rank_and_two(evaluations, benchmark):
    (scores, rows), (scores_2, rows_2) = (
        results_of(evaluations[name][1]) for name in ("one", "two")
    )
    assert (scores, rows) == (scores_2, rows_2)
    problems, (score,) = eval.load_eval_data(benchmark[0], *benchmark[1][1:]), scores.values()
    assert score["n"] + score["skipped"] == 30 and len(rows) == 2 * score["n"] > 30
    assert {row["id"] for row in rows} <= {problem["id"] for problem in problems}
    assert any(
        row["reason"] in (None, "wrong") for row in rows
    )  # math-verify had something to read
    assert any(
        a["response"] != b["response"] for a, b in zip(rows[::2], rows[1::2])
    )  # two samples, not one twice

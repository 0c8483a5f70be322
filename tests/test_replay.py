"""Real runs that stop, and why; and recorded rollouts, where nothing can import vLLM (runs.py)."""

import json

import pytest
import torch

from conftest import command, comparable, metrics_of
from infra import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    toy.model_folder()
    return tmp_path_factory.mktemp("runs")


def launch(name, folder, ranks=None):
    """({run: what it ended with}, {run: its lines of output}) of a program of tests/runs.py."""
    done = command("tests/runs.py", name, folder, folder / "recorded", ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = [folder / f"{name}-{rank}.json" for rank in range(ranks or 1)]
    ended = [json.loads(path.read_text()) for path in results]
    assert all(other == ended[0] for other in ended)  # every rank ends alike
    parts = done.stdout.split("== ")[1:]
    return ended[0], {part.partition("\n")[0]: part.splitlines() for part in parts}


@pytest.fixture(scope="module")
def engine(folder):
    return launch("engine", folder)


@pytest.fixture(scope="module")
def one(engine, folder):
    return launch("replayed", folder)


@pytest.fixture(scope="module")
def two(engine, folder):
    return launch("apart", folder, ranks=2)


def steps(folder):
    """A run's training steps, without evaluations and what depends on the machine."""
    lines = [comparable(line) for line in metrics_of(folder) if line["step"]]
    return [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines]


# The engine.


def test_an_engine_with_older_weights_is_found_out(engine, folder):
    """It says that it has version 1 and has version 0: one step at a rate of 2e-4 shows."""
    ended, _ = engine
    assert ended["stale"].startswith("RuntimeError: mean |trainer - sampler| log-prob is")
    assert "at version 1" in ended["stale"] and "weights are not the trainer's" in ended["stale"]
    assert [line["gap_mean"] < 1e-5 for line in steps(folder / "stale")] == [True]
    gaps = [line["gap_mean"] for line in steps(folder / "recorded")]
    assert ended["recorded"] is None and max(gaps) < 1e-5


def test_an_engine_that_was_not_updated_generates_nothing(engine):
    message = "RuntimeError: version 1 was asked of an engine that holds version 0"
    assert engine[0]["late"] == message


def test_responses_that_are_all_cut_are_said_and_stop(engine, folder):
    ended, said = engine
    assert "in 2 steps" in ended["cut"] and "8 truncated" in ended["cut"]
    (warning,) = [line for line in said["cut"] if line.startswith("WARNING")]
    assert "no response of step 1 has a verdict (8 truncated)" in warning
    assert [line["truncated_share"] for line in steps(folder / "cut")] == [1.0]


# Recorded rollouts.


def test_a_replay_is_the_recorded_run(one, folder):
    """To the bit, across a reincarnation and λ < 1, in a process without vLLM and judge."""
    ended, said = one
    lines = steps(folder / "recorded")
    assert ended["same"] is None and steps(folder / "same") == lines
    assert [line["phase"] for line in lines] == ["mixed"] * 3 + ["on-policy"] * 2
    assert lines[2]["kl_prev"] > 0 and lines[1]["staleness"][1] > 0
    assert any(0 < line["accuracy"] < 1 for line in lines)
    assert sum("no evaluations" in line for line in said["same"]) == 1
    assert all(line["eval_accuracy"] is None for line in metrics_of(folder / "same"))
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (folder / "same" / name).read_bytes() == (folder / "recorded" / name).read_bytes()
    assert not (folder / "same" / "best").exists() and not (folder / "same" / "rollouts").exists()


def test_what_is_recorded(engine, folder):
    """One file a step, nothing half written; the samples are those of samples.jsonl."""
    rollouts, lines = folder / "recorded" / "rollouts", open(folder / "recorded" / "samples.jsonl")
    assert sorted(p.name for p in rollouts.iterdir()) == [f"step_00000{i}.pt" for i in range(1, 6)]
    shown = [json.loads(line) for line in lines]
    for step in range(1, 6):
        record = torch.load(rollouts / f"step_00000{step}.pt", weights_only=True)
        groups = record["groups"]
        assert len(groups) == (8 if step <= 3 else 20) and all(len(group) == 1 for group in groups)
        texts = [s for s in shown if s["step"] == step]
        assert len(texts) == 4
        for (sample,), text in zip(groups, texts):
            for key in ("answer", "reward", "reason"):
                assert sample[key] == text[key]
            assert sample["version"] == step - 1 and len(sample["prompt"]) == 6
            assert sample["truncated"] == (sample["response"][-1] != 1)
            assert len(sample["response"]) == len(sample["logp_sampler"])
            assert (sample["said"] == sample["answer"]) == (sample["reward"] == 1)


def test_another_loss_on_the_same_rollouts(one, folder):
    """From the second step on the responses are another policy's, which the gap shows."""
    ended, _ = one
    lines, others = steps(folder / "recorded"), steps(folder / "other loss")
    assert ended["other loss"] is None and len(others) == len(lines)
    assert others[0]["gap_mean"] == lines[0]["gap_mean"]
    assert others[0]["clip_low_share"] > lines[0]["clip_low_share"]
    assert all(other["gap_mean"] > 1e-3 for other in others[1:])
    for key in ("accuracy", "length_mean", "total_rollouts", "reflection_rate"):
        assert [line[key] for line in others] == [line[key] for line in lines]


def test_ranks_replay_alike(two, folder):
    lines, others = steps(folder / "recorded"), steps(folder / "two")
    assert two[0]["two"] is None and len(others) == len(lines) == 5
    for a, b in zip(lines, others):
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-4, (key, a[key], b[key])


@pytest.mark.parametrize(
    "name, why",
    [
        ("other prompts", "step_000003.pt answers other prompts"),
        ("torn", "step_000002.pt is no record of rollouts"),
        ("numbers", "mean |trainer - sampler| log-prob is nan at version 0"),
    ],
)
def test_a_recording_that_cannot_be_trained_on_is_one_line(one, name, why):
    assert why in one[0][name] and "\n" not in one[0][name]


# Updates and rewards.


def test_a_skipped_update_is_said_and_counted(one, folder):
    """An infinite advantage in step 2: the updates that meet it are skipped, one in each pass."""
    ended, said = one
    lines, others = steps(folder / "same"), steps(folder / "one broken")
    assert ended["one broken"] is None
    assert [line["skipped_updates"] for line in lines] == [0] * 5
    assert [line["skipped_updates"] for line in others] == [0, 2, 0, 0, 0]
    assert others[0] == lines[0] and others[1]["grad_norm"] != lines[1]["grad_norm"]
    told = [line for line in said["one broken"] if "update skipped" in line]
    assert len(told) == 2 and all("step 2: " in line and "of the policy" in line for line in told)
    for key in ("grad_norm", "critic_grad_norm", "policy_loss", "value_loss", "kl_base"):
        assert all(line[key] is not None for line in others), key


def test_updates_skipped_in_a_row_stop(one, folder):
    ended, said = one
    assert "step 2: loss or gradient of the policy is not finite, 3 in a row" in ended["all broken"]
    assert sum("update skipped" in line for line in said["all broken"]) == 2
    assert len(steps(folder / "all broken")) == 1


def test_rewards_that_teach_nothing_stop(one, folder):
    assert "nothing was learned in 2 steps" in one[0]["all right"]
    assert "step 2: 8 right" in one[0]["all right"]
    assert [line["accuracy"] for line in steps(folder / "all right")] == [1.0]


# Ranks.


def test_ranks_that_are_not_of_one_run_stop_at_once(two, folder):
    """Another seed, or other data, on rank 1: before an engine or a model is loaded, by name."""
    ended, _ = two
    for name, what in (("seed", "--seed"), ("data", "data or kind of model")):
        assert ended[name].startswith(f"RuntimeError: rank 1 has another {what} than rank 0")
        assert not (folder / name / "config.json").exists()

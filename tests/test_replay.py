"""Real runs that stop, and why: with a real engine, and on recorded rollouts where nothing can import vLLM (tests/runs.py)."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from conftest import command, comparable, metrics_of
from infra import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    toy.model_folder()
    return tmp_path_factory.mktemp("runs")


def launch(name, folder, *recorded, ranks=None):
    """({run: what it ended with}, {run: its lines of output}) of a program of tests/runs.py."""
    done = command("tests/runs.py", name, folder, *recorded, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ended = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks or 1)]
    assert all(other == ended[0] for other in ended)  # every rank ends alike
    return ended[0], {
        part.partition("\n")[0]: part.splitlines() for part in done.stdout.split("== ")[1:]
    }


@pytest.fixture(scope="module")
def engine(folder):
    return launch("engine", folder)


@pytest.fixture(scope="module")
def on_recorded(engine, folder):
    with ThreadPoolExecutor(2) as pool:
        one, two = (
            pool.submit(launch, "replayed", folder, folder / "recorded"),
            pool.submit(launch, "apart", folder, folder / "recorded", ranks=2),
        )
        return {"one": one.result(), "two": two.result()}


@pytest.fixture(scope="module")
def one(on_recorded):
    return on_recorded["one"]


@pytest.fixture(scope="module")
def two(on_recorded):
    return on_recorded["two"]


def steps(folder):
    """The metrics of a run's training steps, without evaluations and what depends on the machine."""
    return [
        {key: value for key, value in comparable(line).items() if not key.startswith("eval_")}
        for line in metrics_of(folder)
        if line["step"]
    ]


# The engine.


def test_an_engine_with_older_weights_is_found_out(engine, folder):
    """It says that it has version 1 and still has version 0: one step at a learning rate of 2e-4 shows."""
    ended, _ = engine
    assert (
        ended["stale"].startswith("RuntimeError: mean |trainer - sampler| log-prob is")
        and "at version 1," in ended["stale"]
    )
    assert "engine's weights are not the trainer's" in ended["stale"]
    assert [line["gap_mean"] < 1e-5 for line in steps(folder / "stale")] == [True]
    assert (
        ended["recorded"] is None
        and max(line["gap_mean"] for line in steps(folder / "recorded")) < 1e-5
    )


def test_an_engine_that_was_not_updated_generates_nothing(engine):
    assert (
        engine[0]["late"]
        == "RuntimeError: generation with version 1 was asked of an engine that holds version 0: update() it first"
    )


def test_responses_that_are_all_cut_are_said_and_stop(engine, folder):
    ended, said = engine
    assert (
        "last 2 steps" in ended["cut"]
        and "8 truncated" in ended["cut"]
        and "raise --max_response" in ended["cut"]
    )
    warnings = [line for line in said["cut"] if line.startswith("WARNING")]
    assert (
        len(warnings) == 1
        and "none of the 8 responses of step 1 has a verdict (8 truncated)" in warnings[0]
    )
    assert [line["truncated_share"] for line in steps(folder / "cut")] == [1.0]


# Replays.


def test_a_replay_is_the_recorded_run(engine, one, folder):
    """Line by line to the bit, across a reincarnation and a phase with lambda < 1, in a process that has no vLLM and no judge."""
    ended, said = one
    lines = steps(folder / "recorded")
    assert ended["same"] is None and steps(folder / "same") == lines
    assert [line["phase"] for line in lines] == ["mixed"] * 3 + ["on-policy"] * 2 and lines[2][
        "kl_prev"
    ] > 0
    assert any(0 < line["accuracy"] < 1 for line in lines) and lines[1]["staleness"][1] > 0
    assert (
        sum("no evaluations" in line for line in said["same"]) == 1
        and not (folder / "same" / "best").exists()
    )
    assert all(line["eval_accuracy"] is None for line in metrics_of(folder / "same"))
    for name in (
        "model/model.safetensors",
        "checkpoints/step_000004/buffer.safetensors",
        "samples.jsonl",
    ):
        assert (folder / "same" / name).read_bytes() == (folder / "recorded" / name).read_bytes()
    sources = json.loads((folder / "same" / "config.json").read_text())["sources"]
    assert sources["dtype"] == sources["rollout_dtype"] == "settled by the recording"


def test_what_is_recorded(engine, folder):
    """One pair of files a step, nothing half written; the texts are those of samples.jsonl, the tensors those of the buffer."""
    rollouts = folder / "recorded" / "rollouts"
    assert sorted(path.name for path in rollouts.iterdir()) == sorted(
        f"step_00000{i}{s}" for i in range(1, 6) for s in (".json", ".safetensors")
    )
    shown = [json.loads(line) for line in open(folder / "recorded" / "samples.jsonl")]
    for step in range(1, 6):
        record, tensors = (
            json.loads((rollouts / f"step_00000{step}.json").read_text()),
            load_file(rollouts / f"step_00000{step}.safetensors"),
        )
        assert len(record["samples"]) == (8 if step <= 3 else 20) and record["step"] == step
        for sample, text in zip(record["samples"], [s for s in shown if s["step"] == step]):
            assert (sample["response_text"].removesuffix("<eos>"), sample["prompt_text"]) == (
                text["response"],
                text["prompt"],
            )
            assert [sample[key] for key in ("answer", "reward", "reason")] == [
                text[key] for key in ("answer", "reward", "reason")
            ]
            assert sample["version"] == step - 1 and sample["truncated"] == (
                not sample["response_text"].endswith("<eos>")
            )
            prompt, response, logp = (
                tensors[sample[key]["tensor"]] for key in ("prompt", "response", "logp_sampler")
            )
            assert (
                len(prompt) == 6
                and len(response) == len(logp)
                and logp.dtype == torch.float32
                and (logp <= 0).all()
            )
    values = json.loads((folder / "same" / "config.json").read_text())["values"]
    assert (
        not values["dump_rollouts"] and not (folder / "same" / "rollouts").exists()
    )  # --config does not repeat it


def test_another_loss_on_the_same_rollouts(one, folder):
    """The first step's responses are the policy's own; from the second on they are another's, which gap_mean shows and does not stop."""
    ended, _ = one
    lines, others = steps(folder / "recorded"), steps(folder / "other loss")
    assert ended["other loss"] is None and len(others) == len(lines)
    assert (
        others[0]["gap_mean"] == lines[0]["gap_mean"]
        and others[0]["clip_low_share"] > lines[0]["clip_low_share"]
    )
    assert all(other["gap_mean"] > 1e-3 for other in others[1:])
    for key in ("accuracy", "length_mean", "total_rollouts", "reflection_rate"):
        assert [line[key] for line in others] == [line[key] for line in lines]


def test_ranks_replay_alike(engine, two, folder):
    ended, _ = two
    lines, others = steps(folder / "recorded"), steps(folder / "two")
    assert ended["two"] is None and len(others) == len(lines) == 5
    for a, b in zip(lines, others):
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-4, (key, a[key], b[key])


def test_a_recording_of_other_prompts_is_refused(one, folder):
    """Step 3 replaced by step 1: found when it is reached, in one line."""
    assert one[0]["other prompts"] == (
        f"ValueError: --replay: step 3 in {folder / 'rollouts-mixed'} cannot be trained on "
        "(ValueError: it holds responses to other prompts)"
    )


@pytest.mark.parametrize(
    "name, why",
    [
        ("tokens", "not made of the model's tokens"),
        ("types", "not made of the model's tokens"),
        ("numbers", "log-probs that are not finite"),
        ("shapes", "tokens and 6 log-probs"),
        ("reasons", "reason a text or null"),
        ("rewards", "could not convert string to float: 'much'"),
    ],
)
def test_a_recording_that_was_tampered_with_is_one_line(one, name, why):
    message = one[0][name]
    assert (
        message.startswith("ValueError: --replay: step 1 in ")
        and why in message
        and "\n" not in message
    ), message


# Updates and rewards.


def test_a_skipped_update_is_said_and_counted(one, folder):
    """One response of step 2 has NaN for an advantage: of the step's updates, those of the policy that meet it are skipped, once in each pass."""
    ended, said = one
    lines, others = steps(folder / "same"), steps(folder / "one broken")
    assert ended["one broken"] is None and [line["skipped_updates"] for line in lines] == [0] * 5
    assert [line["skipped_updates"] for line in others] == [0, 2, 0, 0, 0] and others[0] == lines[0]
    told = [line for line in said["one broken"] if "skipped the update" in line]
    assert len(told) == 2 and all(
        line.startswith("step 2, minibatch ") and "of the policy" in line and "norm nan" in line
        for line in told
    )
    for key in (
        "grad_norm",
        "critic_grad_norm",
        "policy_loss",
        "value_loss",
        "entropy",
        "kl_base",
        "ratio_mean_fresh",
    ):
        assert all(line[key] is not None for line in others), key
    assert others[1]["grad_norm"] != lines[1]["grad_norm"]


def test_updates_skipped_in_a_row_stop(one, folder):
    ended, said = one
    assert (
        "4 updates of the policy in a row, the last at step 2, minibatch" in ended["all broken"]
        and "--max_skipped" in ended["all broken"]
    )
    assert (
        sum("skipped the update" in line for line in said["all broken"]) == 4
        and len(steps(folder / "all broken")) == 1
    )


def test_rewards_that_teach_nothing_stop(one, folder):
    ended, said = one
    assert (
        "last 2 steps all responses got the same reward (step 2: 1; 8 right)" in ended["all right"]
        and "too easy" in ended["all right"]
    )
    assert (
        "last 3 steps" in ended["unjudged"]
        and "8 no_box" in ended["unjudged"]
        and "--template" in ended["unjudged"]
    )
    warnings = {
        name: sum(line.startswith("WARNING") for line in said[name])
        for name in ("all right", "unjudged")
    }
    assert warnings == {"all right": 0, "unjudged": 1} and [
        line["accuracy"] for line in steps(folder / "all right")
    ] == [1.0]


# Ranks.


def test_ranks_that_are_not_of_one_run_stop_at_once(two, folder):
    """Another --seed, or another file behind --data, on rank 1: before an engine or a model is loaded, on every rank, by name."""
    ended, _ = two
    assert ended["seed"].startswith(
        "RuntimeError: rank 1 is not of the same run: --seed is 1 there and 0 on rank 0. Start all ranks"
    )
    assert ended["data"].startswith(
        "RuntimeError: rank 1 is not of the same run: hash of problems and kind of model is"
    )
    assert not any((folder / name / "config.json").exists() for name in ("seed", "data"))


def test_ranks_whose_history_differs_stop_before_they_save(two, folder):
    """One reward of step 2 differs on rank 1: the checkpoint of step 2, which is rank 0's history, is not written."""
    ended, _ = two
    message = ended["history"]
    assert message.startswith(
        "RuntimeError: rank 1 is not of the same run: history is 16 groups of versions [0, 1], hash "
    )
    assert message.count("16 groups") == 2 and "step is" not in message
    assert not list((folder / "history").glob("checkpoints/*"))

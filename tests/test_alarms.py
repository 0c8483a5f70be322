"""alarms.py by hand: which step stops a run, and what the message says. That a run reaches them: test_replay.py."""

import ast
import contextlib
import math
from pathlib import Path

import pytest
import torch

import alarms
from alarms import Alarms, agree, check_gap, held
from buffer import RingBuffer
from infra.config import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "gap, values, fine",
    [
        (9e-4, {}, True),
        (1.1e-3, {}, False),
        (math.nan, {}, False),
        (math.inf, {}, False),
        (0.04, dict(dtype="bfloat16"), True),
        (0.04, dict(rollout_dtype="bfloat16"), True),
        (0.06, dict(dtype="bfloat16", rollout_dtype="bfloat16"), False),
        (0.06, dict(max_gap=0.1), True),
        (1e-4, dict(max_gap=1e-5), False),
        (3.0, dict(replay="folder"), True),
        (3.0, dict(replay="folder", max_gap=0.1), True),
        (math.nan, dict(replay="folder"), False),
    ],
)
def test_the_gap_alarm(gap, values, fine):
    cfg = Config(**dict(dtype="float32", rollout_dtype="float32") | values)
    words = "engine's weights" if math.isfinite(gap) else "version 4: the policy has diverged"
    with contextlib.nullcontext() if fine else pytest.raises(RuntimeError, match=words):
        check_gap(gap, 4, cfg)


# Rewards.


def step(*responses):
    """Samples from (reward, reason), two to a prompt."""
    return [
        dict(reward=reward, reason=reason, prompt_index=i // 2)
        for i, (reward, reason) in enumerate(responses)
    ]


RIGHT, WRONG, CUT, NO_BOX, LATE = (
    (1.0, None),
    (0.0, "wrong"),
    (0.0, "truncated"),
    (0.0, "no_box"),
    (0.0, "timeout"),
)


def run(steps, limit=3, **values):
    """(number of the step that stops, its message; None, None) and what was said on the way."""
    said = []
    watch = Alarms(Config(max_equal_rewards=limit, **values), said.append)
    for number, fresh in enumerate(steps, 1):
        try:
            watch.responses(fresh, number)
        except RuntimeError as error:
            return number, str(error), said
    return None, None, said


def test_equal_rewards_stop_after_so_many_steps_in_a_row():
    same, different = step(WRONG, WRONG), step(WRONG, RIGHT)
    assert run([same] * 2)[0] is None and run([same] * 3)[0] == 3
    assert run([same, same, different, same, same])[0] is None
    assert run([same, same, different, same, same, same])[0] == 6
    assert run([step(WRONG), step(RIGHT), step(WRONG)])[0] == 3  # equal within each step
    assert run([same] * 50, limit=0)[0] is None and run([same], limit=1)[0] == 1
    assert (
        run([step((0.25, "wrong"), (0.5, "wrong"))] * 9)[0] is None
    )  # one's own reward: both are no 1


def test_under_a_group_baseline_rewards_must_differ_within_a_group():
    """Both groups are of one mind: no advantage. A critic learns which prompt is which."""
    apart, mixed = step(RIGHT, RIGHT, WRONG, WRONG), step(RIGHT, RIGHT, WRONG, RIGHT)
    number, message, _ = run([apart] * 3, advantage="group")
    assert (
        number == 3
        and "all responses to a prompt got the same reward (step 3: 0, 1; 2 right, 2 wrong)"
        in message
        and "--temperature" in message
    )
    assert (
        run([apart] * 9)[0] is None
        and run([mixed] * 9, advantage="group")[0] is None
        and run([apart, apart, mixed] * 3, advantage="group")[0] is None
    )


@pytest.mark.parametrize(
    "fresh, words, warned",
    [
        (step(WRONG, WRONG), ["reward (step 3: 0; 2 wrong)", "too hard"], False),
        (step(RIGHT, RIGHT), ["reward (step 3: 1; 2 right)", "too easy"], False),
        (step(CUT, CUT), ["2 truncated", "raise --max_response"], True),
        (step(NO_BOX, NO_BOX, CUT), ["2 no_box, 1 truncated", "--template", "samples.jsonl"], True),
        (step(LATE, LATE), ["2 timeout", "too long"], True),
        (step(NO_BOX, NO_BOX, WRONG), ["2 no_box, 1 wrong", "--template"], False),
    ],
)
def test_the_message_says_why_and_what_to_do(fresh, words, warned):
    number, message, said = run([fresh] * 3)
    assert number == 3 and all(
        word in message for word in [*words, "last 3 steps", "--max_equal_rewards"]
    ), message
    assert len(said) == warned and all(
        line.startswith("WARNING")
        and "step 1" in line
        and words[0].split("; ")[-1].strip(")") in line
        for line in said
    )


def test_no_verdict_is_said_once_until_there_is_one_again():
    _, _, said = run(
        [
            step(CUT, NO_BOX),
            step(CUT, CUT),
            step(RIGHT, CUT),
            step(NO_BOX, NO_BOX),
            step(WRONG, CUT),
        ],
        limit=0,
    )
    assert ["step 1" in said[0], "step 4" in said[1], len(said)] == [True, True, 2]


# Updates.


def test_skipped_updates_are_said_counted_and_stop_in_a_row():
    said = []
    watch = Alarms(Config(max_skipped=3), said.append)
    assert watch.skipped(dict(policy=0.5, critic=2.0), 7, 1) == 0 and said == []
    assert watch.skipped(dict(policy=math.nan, critic=2.0), 7, 2) == 1
    assert said == [
        "step 7, minibatch 2: skipped the update of the policy, whose loss or gradient is not finite (norm nan; 1 in a row)"
    ]
    assert (
        watch.skipped(dict(policy=math.inf, critic=math.nan), 8, 1) == 2
        and "of the critic" in said[-1]
        and "2 in a row" in said[-2]
    )
    assert (
        watch.skipped(dict(policy=0.1, critic=math.nan), 8, 2) == 1
    )  # the policy's count begins anew
    with pytest.raises(
        RuntimeError,
        match="3 updates of the critic in a row, the last at step 8, minibatch 3.*--max_skipped",
    ):
        watch.skipped(dict(policy=math.inf, critic=-math.inf), 8, 3)
    never = Alarms(Config(max_skipped=0), said.append)
    assert [never.skipped(dict(policy=math.nan), 1, i) for i in range(9)] == [1] * 9


# Ranks.


def test_ranks_that_disagree_are_named(monkeypatch):
    cfg = Config(seed=3)
    cfg.fingerprint = "f" * 64

    def gathered(*changes):
        monkeypatch.setattr(
            alarms, "gather", lambda facts: [facts, *(facts | change for change in changes)]
        )
        agree(cfg, step=4)

    gathered()
    gathered({}, {})
    for changes, words in (
        ([{}, {"--seed": 5}], ["rank 2", "--seed is 5 there and 3 on rank 0", "same command"]),
        (
            [{"step": 5, "--lr": 1.0}],
            ["rank 1", "step is 5 there and 4", "--lr is 1.0 there and 1e-06"],
        ),
        (
            [{"hash of problems and kind of model": "e"}],
            ["rank 1", "problems", "e there and ffffffffffffffff on"],
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            gathered(*changes)
        assert all(word in str(error.value) for word in words), error.value


def test_paths_may_differ_between_machines_but_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(alarms, "gather", lambda facts: [seen.append(facts) or facts])
    cfg = Config(model="here/a", data="here/b", template="here/c")
    cfg.fingerprint = "0"
    agree(cfg)
    assert not any("here" in str(value) for value in seen[0].values())
    assert {f"--{name}" for name in vars(cfg)} - seen[0].keys() - {
        "--fingerprint",
        "--sources",
    } == {f"--{name}" for name in alarms.PATHS}


def test_what_a_buffer_holds():
    def buffer(**change):
        sample = (
            dict(
                version=3,
                prompt=torch.tensor([1, 2]),
                response=torch.tensor([4, 5, 6]),
                logp_behavior=torch.tensor([-0.5, -1.0, -2.0]),
                reward=1.0,
                prompt_index=7,
                advantage=0.5,
            )
            | change
        )
        found = RingBuffer(2)
        found.push(sample["version"], [[sample], [dict(sample, reward=0.0)]])
        return found

    text = held(buffer())
    assert text.startswith("2 groups of versions [3], hash ") and text == held(buffer())
    assert text == held(buffer(advantage=0.25))  # computed from rewards, on each rank
    changes = (
        dict(version=4),
        dict(prompt=torch.tensor([1, 3])),
        dict(response=torch.tensor([4, 5, 7])),
        dict(reward=0.5),
        dict(prompt_index=8),
        dict(logp_behavior=torch.tensor([-0.5, -1.0, -2.0000002])),
    )
    assert len(
        {text, held(RingBuffer(2)), *(held(buffer(**change)) for change in changes)}
    ) == 2 + len(changes)


# Nothing that comes from elsewhere is executed.


def calls(tree):
    """(dotted name, {keyword: text of its value}) of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func),
                {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
            )


def test_no_module_runs_what_it_reads():
    """No pickle, eval, exec or shell; every loader of the libraries is told to run no code. dcp.load is a checkpoint's: README warns."""
    loaders = 0
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            name.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for name in node.names
        }
        imported |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }
        assert not imported & {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
            "joblib",
            "yaml",
        }, path
        for name, keywords in calls(tree):
            assert name not in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "os.system",
                "torch.load",
                "np.load",
                "numpy.load",
            ), (path, name)
            assert (
                keywords.get("shell", "False") == "False"
                and keywords.get("allow_pickle", "False") == "False"
            ), (path, name)
            assert keywords.get("trust_remote_code", "False") == "False", (path, name)
            if name.endswith((".from_pretrained", ".from_config")) or name in (
                "LLM",
                "from_pretrained",
            ):
                assert keywords.get("trust_remote_code") == "False", (path, name)
                loaders += 1
    assert loaders == 5  # tokenizer, config, model, empty model, vLLM

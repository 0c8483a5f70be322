"""methods.py and the verbs of the loop against what is written out by hand: the schedule, a row's
functions by the names of their arguments, the loss and its gradient, who is asked for what."""

import contextlib
import inspect
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from by_hand import (
    ALONE,
    TOKENS,
    Plain,
    Table,
    batch_by_hand,
    learners,
    loss_of,
    plan,
    sample,
    settings,
)
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

import methods
import train
from advantage import group_advantages
from buffer import Batch, RingBuffer, Sample
from infra import checkpoint, guards, metrics
from infra.config import ConfigError, flag
from infra.metrics import Meter
from loss import value_loss
from methods import NUMBERS, ROWS, ByName, Method, dry_run, total_rollouts

SIX = ("ppo", "grpo", "mix-ppo", "mix-grpo", "remix-ppo", "remix-grpo")


def method(flags="", **values):
    return Method(settings("--model m " + flags, **values))


# ---- the ledger and the schedule

# The paper's runs: flags, total rollouts, what the paper prints (millions, truncated). 256 prompts,
# p, window, steps and T of the others are defaults.
LEDGER = [
    ("--algo remix-ppo", 79_300, "0.079"),
    ("--algo remix-ppo --reincarnate 50 --steps 100", 20_450, "0.020"),
    ("--algo remix-ppo --steps 50", 7_650, "0.007"),
    ("--algo remix-ppo --steps 75", 11_475, "0.011"),
    ("--algo ppo --steps 900", 230_400, "0.230"),
    ("--algo remix-grpo --steps 100", 163_600, "0.163"),
]


@pytest.mark.parametrize("flags, rollouts, published", LEDGER)
def test_ledger(flags, rollouts, published):
    cfg = settings("--model m " + flags)
    assert total_rollouts(cfg, cfg.steps) == rollouts
    assert dry_run(cfg).splitlines()[-1] == f"total rollouts: {rollouts}"
    assert f"{rollouts // 1000 / 1000:.3f}" == published


def test_dry_run_tells_the_phases():
    text = dry_run(settings("--model m --algo remix-ppo"))
    phases = [line.split() for line in text.splitlines() if line.startswith("steps")]
    assert [(line[1], line[3].strip(":"), line[5], line[8]) for line in phases] == [
        ("1", "1", "153", "0"),
        ("2", "100", "153", "103"),
        ("101", "350", "256", "0"),
    ]
    called = "mix_ppg, gae, kl_convex, entropy_bonus, value_loss, kl_lambda"
    for part in (called, "policy, critic, base, prev", "after step 100", f"{10 + 99 * 16 + 2000}"):
        assert part in text


SCHEDULE = settings("--algo mix-ppo")


@hypothesis(deadline=None)
@given(
    st.integers(0, 999),
    st.integers(1, 200),
    *(st.integers(1, most) for most in (6, 4, 3)),
    st.integers(0, 12),
    *(st.integers(1, most) for most in (70, 5, 15)),
)
def test_schedule_against_a_simulation(
    share, prompts, window, utd, after, reincarnate, minibatch, group, steps
):
    """share: of history, in thousandths; in floats 0.07 * 100 is 7.000000000000001."""
    changes = dict(p=share / 1000, prompts=prompts, window=window, utd=utd, utd_after=after)
    changes |= dict(reincarnate=reincarnate, minibatch=minibatch, group_size=group)
    cfg = SimpleNamespace(**vars(SCHEDULE) | changes)
    wanted = -(-share * prompts // 1000)
    if wanted == prompts:
        return  # no fresh group: refused
    written, total = [], 0  # written[v]: groups that version v wrote
    for step in range(1, steps + 1):
        before = not reincarnate or step <= reincarnate
        found, drawable = Method(cfg).plan(step), sum(written[-window:])
        assert found.phase == ("mixed" if before and share else "on-policy")
        assert found.history == (min(wanted, drawable) if before else 0)
        assert found.fresh == (prompts - wanted if before else prompts)
        assert found.passes == (utd if before else after)
        assert found.updates == found.passes * -(-(found.fresh + found.history) // minibatch)
        assert (found.first, found.version) == (sum(written), step - 1)
        assert found.reincarnate == (step == reincarnate)
        written.append(found.fresh)
        total += found.fresh * group
        assert total_rollouts(cfg, step) == total


def test_lambda_and_warm_up_follow_the_step():
    one = method("--algo remix-ppo --warmup 4")
    assert [one.plan(step).lam for step in (1, 50, 51, 61, 91, 200)] == [1, 1, 0.9, 0.8, 0.5, 0.5]
    assert [one.plan(step).scale for step in (1, 2, 3, 4, 5, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert method().plan(1).scale == method("--algo mix-ppo").plan(200).lam == 1


def test_references_that_are_due():
    """The base is π_0, after reincarnation π_T; the precedent only where λ < 1; π_{−1} = π_0."""
    one = method("--algo remix-ppo --lambda_start 2 --lambda_every 1 --reincarnate 4")
    found = [(p.references, p.keep_old) for p in map(one.plan, range(1, 7))]
    assert found == [
        ({"base": 0}, False),
        ({"base": 0}, True),  # π_1 will be asked for in step 3
        ({"base": 0, "prev": 1}, True),
        ({"base": 0, "prev": 2}, True),
        ({"base": 4, "prev": 3}, True),
        ({"base": 4, "prev": 4}, True),
    ]
    for anchor, versions in (("old", [0, 1, 2]), ("prev", [0, 0, 1])):
        one = method(f"--algo remix-ppo --lambda_start 0 --lambda_every 1 --anchor {anchor}")
        assert [one.plan(t).references["prev"] for t in (1, 2, 3)] == versions
        assert one.plan(3).keep_old == (anchor == "prev")
    one = method("--algo remix-ppo --beta 0", lambda_start=0)
    assert one.plan(9).references == {} and not one.plan(9).keep_old and not one.anchors
    assert method("--algo mix-ppo").plan(99).references == {"base": 0}


# ---- rows, and arguments by name


def test_by_name():
    def made_up(logp, target, width=0.5, *, mode="fine"):
        return logp, target, width, mode

    one = ByName(made_up, target="value_target", width="made_up_width")
    assert one({"logp": 1}, {"value_target": 2, "width": 9, "target": 9}) == (1, 2, 0.5, "fine")
    assert one({"logp": 1, "value_target": None, "made_up_width": None}) == (1, None, 0.5, "fine")
    assert one({"logp": 1}, {"logp": 7, "value_target": 2, "made_up_width": 3})[::2] == (1, 3)
    assert one.defaults() == {"made_up_width": 0.5, "mode": "fine"}
    with pytest.raises(KeyError, match="value_target"):
        one({"logp": 1})


# fmt: off
TABLE = [  # algo, advantage, p, UTD, T, least λ
    ("ppo", "gae", 0, 1, 0, 1), ("grpo", "group", 0, 1, 0, 1),
    ("mix-ppo", "gae", 0.4, 2, 0, 1), ("mix-grpo", "group", 0.4, 2, 0, 1),
    ("remix-ppo", "gae", 0.4, 2, 100, 0.5), ("remix-grpo", "group", 0.4, 2, 50, 0.5),
    ("decoupled", "group", 0.4, 1, 0, 1),
]
# fmt: on


@pytest.mark.parametrize("algo, advantage, p, utd, reincarnate, floor", TABLE)
def test_rows(algo, advantage, p, utd, reincarnate, floor):
    cfg, one = settings(f"--model m --algo {algo}"), method(f"--algo {algo}")
    found = cfg.advantage, cfg.p, cfg.utd, cfg.reincarnate, cfg.lambda_floor, cfg.group_size
    assert found == (advantage, p, utd, reincarnate, floor, 8 if advantage == "group" else 1)
    assert settings(f"--algo {algo}").prompts <= 64  # it has a toy too
    # what a run computes follows from what its functions read
    assert one.critic == ("values" in one.reads()) == (advantage == "gae")
    assert one.anchors == ([] if algo == "decoupled" else ["base"])
    assert any("prev" in one.plan(t).references for t in range(1, 200)) == (floor < 1)


@pytest.mark.parametrize(
    "flags, rows",
    [
        ("--algo grpo --gae_lambda 0.9", "ppo, mix-ppo, remix-ppo"),
        ("--algo grpo --critic_lr 1e-5", "ppo, mix-ppo, remix-ppo"),
        ("--algo ppo --no-normalize_std", "grpo, mix-grpo, remix-grpo"),
        ("--algo remix-ppo --correct_high 3", "decoupled"),
        ("--algo decoupled --lambda_start 3", "remix-ppo"),
        ("--algo ppo --window 3", "mix-ppo"),
        ("--algo mix-ppo --utd_after 3", "remix-ppo, remix-grpo"),
        ("--algo remix-ppo --c_bar 0.5", "none"),
    ],
)
def test_a_typed_number_that_is_not_read_names_the_rows_that_read_it(flags, rows):
    name = flags.split()[2].removeprefix("--no-")
    with pytest.raises(ConfigError, match=f"{name} is not read by this run") as error:
        settings(flags)
    assert rows in str(error.value) and "\n" not in str(error.value)


def test_a_number_is_read_once_another_turns_it_on():
    assert settings("--history_advantage vtrace --c_bar 0.5").c_bar == 0.5
    assert settings("--algo ppo --p 0.5 --window 3").window == 3
    assert settings("--algo decoupled --beta 0.1 --kl_estimator k1").kl_estimator == "k1"
    with pytest.raises(ConfigError, match="against the writer already"):
        settings("--correct truncated")
    with pytest.raises(ConfigError, match="at least 2 responses"):
        settings("--advantage group")


VOCABULARY = set(
    "logp logp_old logp_behavior logp_sampler logp_base logp_prev entropy advantages values mask "
    "returns rewards group target version values_old log_ratio step".split()
)


def test_every_keyword_is_declared():
    cells = [*methods.OBJECTIVES.values(), *methods.ADVANTAGES.values(), *methods.TERMS.values()]
    functions = [*cells, *filter(None, methods.WEIGHTS.values()), value_loss]
    renamed = {"estimator": "kl_estimator", "clip": "value_clip", "weight_low": "correct_low"}
    renamed |= {"weight_high": "correct_high", "lam": "gae_lambda"}  # λ of a KL is the plan's
    for function in functions:
        for name in inspect.signature(function).parameters:
            assert renamed.get(name, name) in VOCABULARY | NUMBERS.keys(), (function, name)
    for name in set(inspect.signature(methods.kl_lambda).parameters) - {"step"}:
        assert f"lambda_{name}" in NUMBERS
    assert {"mismatch_low", "mismatch_high"} <= NUMBERS.keys()


def test_config_keeps_the_functions_own_defaults():
    cfg = settings("--model m --clip_high 0.3 --history_advantage vtrace")
    assert (cfg.clip_low, cfg.clip_high, cfg.value_clip, cfg.c_bar) == (0.2, 0.3, 0.5, 1.0)
    assert settings("--algo grpo").gae_lambda is None  # nothing reads it


# ---- credit


def groups_of(rewards, version=5, first=0):
    """A group of samples of one and of two tokens for each list of rewards."""
    return [
        [sample(version, [10, 11][: 1 + i % 2], reward, first + g) for i, reward in enumerate(each)]
        for g, each in enumerate(rewards)
    ]


def test_group_advantages_of_history_are_what_they_were():
    """Of a group alone: recomputed from rewards, never normalised within the mixture, and apart
    from a fresh group of the same prompt."""
    fresh = groups_of([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    history = groups_of([[1.0, 1.0, 1.0, 0.0], [1.0] * 4], version=4)
    batch = Batch(fresh, history)
    one = method("--algo grpo --group_size 4")
    one.credit(batch)
    first = [s[0].item() for s in batch["advantages"]]
    std = [0.5, math.sqrt(1 / 3), 0.5]
    expected = [0.75 / std[0], *[-0.25 / std[0]] * 3, *[0.5 / std[1]] * 2, *[-0.5 / std[1]] * 2]
    expected += [*[0.25 / std[2]] * 3, -0.75 / std[2], 0, 0, 0, 0]
    assert first == pytest.approx(expected, rel=1e-5)
    assert all((a == a[0]).all() for a in batch["advantages"])
    assert [len(a) for a in batch["advantages"]] == [len(s.response) for s in batch.samples]
    for group in history:  # to the bit what the step that wrote them had
        alone = group_advantages(torch.tensor([s.reward for s in group]), torch.zeros(4).long())
        rows = [i for i, s in enumerate(batch.samples) if any(s is other for other in group)]
        assert [first[i] for i in rows] == alone.tolist()
    assert "returns" not in batch


def test_group_advantages_without_their_spread():
    batch = Batch(groups_of([[1.0, 0.0, 0.0, 0.0]]), [])
    method("--algo grpo --group_size 4 --no-normalize_std").credit(batch)
    assert [a[0].item() for a in batch["advantages"]] == [0.75, -0.25, -0.25, -0.25]


def whitened(numbers):
    centre, spread = statistics.mean(numbers), statistics.stdev(numbers)
    return [(x - centre) / spread for x in numbers]


@pytest.mark.parametrize(
    "flags, raw, returns",
    [
        # γ = λ = 1: A = R − V
        ("", [0.8, 0.5, -0.4], [1, 1, 0]),
        # δ = (0 + 0.5·0.5 − 0.2, 1 − 0.5, −0.4), A_0 = 0.05 + 0.4·0.5
        ("--gamma 0.5 --gae_lambda 0.8", [0.25, 0.5, -0.4], [0.45, 1, 0]),
        # where π_k would go half as often, what follows counts half
        ("--history_advantage vtrace", [0.55, 0.5, -0.4], [0.75, 0.75, 0]),
        ("--history_advantage vtrace --c_bar 0.25", [0.425, 0.5, -0.4], [0.30625, 0.625, 0.3]),
    ],
)
def test_advantages_under_a_critic(flags, raw, returns):
    """Whitened over all tokens of the mixture, fresh and history together; the targets are not."""
    written = torch.tensor([-1.0, -1.0 + math.log(2)])
    past = sample(4, [12], 0.0, logp_behavior=torch.tensor([-1.0]))
    batch = Batch([[sample(5, [10, 11], 1.0, logp_behavior=written)]], [[past]])
    batch["logp_old"] = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0])]
    batch["values"] = [torch.tensor([0.2, 0.5]), torch.tensor([0.4])]
    method(flags).credit(batch)
    found = torch.cat(batch["advantages"]).tolist()
    assert found == pytest.approx(whitened(raw), rel=1e-4)
    assert torch.cat(batch["returns"]).tolist() == pytest.approx(returns, abs=1e-6)


# ---- look back: nothing that is known is computed again


class Asked:
    """A policy that answers with a number for itself and for each snapshot, and remembers what it
    was asked about."""

    NUMBER = {"live": -1.0, "base": -2.0, "prev": -3.0, "writer": -4.0}

    def __init__(self):
        self.now, self.asked = "live", []

    def predict(self, samples, progress=iter):
        self.asked.append(" ".join([self.now, *(str(s.prompt_index) for s in samples)]))
        return [torch.full((len(s.response),), self.NUMBER[self.now]) for s in samples]

    @contextlib.contextmanager
    def swapped(self, snapshot):
        assert self.now == "live"
        self.now = snapshot
        yield
        self.now = "live"


NAMES = ("logp_old", "logp_behavior", "logp_base", "logp_prev")


def look(version, ages, flags="", writer=None):
    """Samples of these ages (fresh first) through look_back, prompt_index naming them ->
    (what the policy was asked, [of each sample its NAMES as numbers], the samples)."""
    samples = []
    for i, age in enumerate(ages):
        known = dict(logp_behavior=None, logp_base=None)
        if age:
            known = dict(logp_behavior=torch.full((i + 1,), -5.0 - age))
            known["logp_base"] = torch.full((i + 1,), -7.0) if "--beta 0" not in flags else None
        samples.append(sample(version - age, [10] * (i + 1), 0.0, i, **known))
    fresh = [s for s, age in zip(samples, ages) if not age]
    batch = Batch([fresh], [[s] for s in samples[len(fresh) :]])
    policy = Asked()
    behaviour = SimpleNamespace(writer=lambda p: p.swapped(writer) if writer else None)
    p = method(f"--algo remix-ppo {flags}", lambda_start=0).plan(version + 1)
    train.look_back(batch, {"policy": policy}, {"base": "base", "prev": "prev"}, behaviour, p)
    found = []
    for i, one in enumerate(batch.samples):
        columns = [batch[name][i] if batch.has(name) else None for name in NAMES]
        assert {len(column) for column in columns if column is not None} == {len(one.response)}
        found.append([None if column is None else column[0].item() for column in columns])
    return ", ".join(policy.asked), found, batch.samples


FLOOR = "--lambda_floor 1"
# fmt: off
LOOKS = [  # version, ages, flags, whose log-probs are asked for of which samples, samples' NAMES
    # what the base said stays with history; a precedent that wrote has said it; the rest is asked
    (5, (0, 0, 1, 2), "", "live 0 1 2 3, base 0 1, prev 0 1 3",
     [[-1, -1, -2, -3], [-1, -1, -2, -3], [-1, -6, -7, -6], [-1, -7, -7, -3]]),
    # no pass for a precedent without weight, nor for one that is the policy itself
    (5, (0, 1), FLOOR, "live 0 1, base 0", [[-1, -1, -2, None], [-1, -6, -7, None]]),
    (5, (0, 1), "--anchor old", "live 0 1, base 0", [[-1, -1, -2, -1], [-1, -6, -7, -1]]),
    # the first policy is base and precedent; the policy is the base at reincarnation
    (0, (0, 0), "", "live 0 1", [[-1] * 4] * 2),
    (2, (0,), FLOOR + " --reincarnate 3", "live 0, base 0", [[-1, -1, -2, None]]),
    (3, (0,), FLOOR + " --reincarnate 3", "live 0", [[-1, -1, -1, None]]),
    (4, (0,), FLOOR + " --reincarnate 3", "live 0, base 0", [[-1, -1, -2, None]]),
    # no KL
    (5, (0, 1), "--beta 0", "live 0 1", [[-1, -1, None, None], [-1, -6, None, None]]),
]
# fmt: on


@pytest.mark.parametrize("version, ages, flags, passes, numbers", LOOKS)
def test_what_is_known_is_not_computed_again(version, ages, flags, passes, numbers):
    asked, found, samples = look(version, ages, flags)
    assert (asked, found) == (passes, numbers)
    # the base's stay with a sample, what is of this step alone cannot
    for one, row in zip(samples, numbers):
        assert row[2] is None or one.logp_base[0].item() == row[2]
        assert not hasattr(one, "logp_prev") and not hasattr(one, "logp_old")


def test_another_writer_says_what_it_thought_of_its_own():
    """The fresh samples alone, as the behaviour's context says; logp_old stays π_k's."""
    asked, found, _ = look(5, (0, 0, 1), FLOOR, writer="writer")
    assert asked == "live 0 1 2, writer 0 1, base 0 1"
    assert [row[:2] for row in found] == [[-1, -4], [-1, -4], [-1, -6]]


# ---- minibatches


def dealt(n_groups, group_size, minibatch, passes, seed=0, step=3):
    groups = [[sample(5, [10], 0.0, g)] * group_size for g in range(n_groups)]
    cfg = SimpleNamespace(minibatch=minibatch, seed=seed)
    return list(train.minibatches(Batch(groups, []), plan(passes=passes, step=step), cfg))


@pytest.mark.parametrize(
    "n_groups, group_size, minibatch, passes",
    [(7, 3, 2, 2), (6, 1, 6, 1), (5, 2, 8, 3), (4, 4, 1, 2)],
)
def test_each_pass_covers_every_group_once(n_groups, group_size, minibatch, passes):
    parts = dealt(n_groups, group_size, minibatch, passes)
    a_pass = -(-n_groups // minibatch)
    assert len(parts) == passes * a_pass
    for begin in range(0, len(parts), a_pass):
        mine = parts[begin : begin + a_pass]
        assert sorted(sum(mine, [])) == list(range(n_groups * group_size))
        assert [len(part) for part in mine[:-1]] == [minibatch * group_size] * (a_pass - 1)
    for part in parts:  # whole groups, their members side by side
        of = [i // group_size for i in part]
        assert of == [g for g in of[::group_size] for _ in range(group_size)]


def test_minibatches_depend_on_seed_step_and_pass():
    first = dealt(9, 2, 4, 2)
    assert first == dealt(9, 2, 4, 2) and first[:3] != first[3:]
    others = [first, dealt(9, 2, 4, 2, seed=1), dealt(9, 2, 4, 2, step=4)]
    assert all(a != b for i, a in enumerate(others) for b in others[:i])


# ---- update


def updated(cfg, p=None, micro=None, rows=(0, 1, 2, 3), roles=("policy", "critic")):
    """The learners after an update on samples of the batch by hand."""
    made = learners(settings("--model m"), micro)
    made = {role: made[role] for role in roles}
    for one in made.values():
        one.cfg = cfg
    train.update(made, batch_by_hand(), list(rows), Method(cfg), p or plan(), Meter())
    return made


MICRO = ([[0, 1, 2, 3]], [[2], [3, 0], [1], []], [[3], [2], [1], [0]], None)
WEIGHT = {
    "token": dict.fromkeys(TOKENS, 1 / 8),
    "sequence": {t: 1 / 4 / length for t, length in zip(TOKENS, (3, 3, 3, 1, 2, 2, 2, 2))},
    "constant": dict.fromkeys(TOKENS, 1 / (4 * 50)),
}


LOSS = "--beta 0.5 --entropy 0.25 --clip_high 0.3 --max_response 50"
LIMITS = "--mismatch truncated --mismatch_high 1.1 --correct_low 0.6 --correct_high 1.3"


@pytest.mark.parametrize("aggregate", WEIGHT)
@pytest.mark.parametrize(
    "flags", ("remix-ppo", "mix-grpo --mismatch truncated", f"decoupled {LIMITS}")
)
@pytest.mark.parametrize("lam", (1.0, 0.7))
def test_gradient_of_an_update(aggregate, flags, lam):
    """Finite differences of the loss by hand, whatever the micro-batches; the engine's log-probs
    count as far as --mismatch says, weights within limits of their own."""
    cfg, d = settings(f"--model m --algo {flags} {LOSS} --aggregate {aggregate}"), 1e-5
    p = plan(lam=lam, references={"base": 0} | ({"prev": 4} if lam < 1 else {}))
    for micro in MICRO:
        policy = updated(cfg, p, micro, roles=("policy",))["policy"]
        (found,) = policy.gradients
        for t, weight in WEIGHT[aggregate].items():
            up, down = (loss_of(t, cfg, lam, TOKENS[t].new + e) for e in (d, -d))
            expected = weight * (up - down) / (2 * d)
            assert found["logp"][t].item() == pytest.approx(expected, rel=1e-6, abs=1e-9), t
            assert found["entropy"][t].item() == pytest.approx(-0.25 * weight)
        assert found["logp"][:10].abs().sum() == 0


# held by the clip (0 where the clipped branch is larger, and flat): 10, from 0.2 to 0.9 on the way
# to 1; at 0.15 more of them
@pytest.mark.parametrize("clip, flat", [(0.5, [10]), (0.15, [10, 15, 16, 17])])
@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (3, 1)])
def test_gradient_of_the_critic(clip, flat, rows):
    """(V − R) over the tokens of the minibatch, whatever --aggregate and micro-batches."""
    cfg = settings(f"--model m --aggregate sequence --value_clip {clip}")
    responses = [[10, 11, 12], [13], [14, 15], [16, 17]]
    tokens = [t for i in rows for t in responses[i]]
    for micro in MICRO if len(rows) == 4 else ([[0], [1]], None):
        found = updated(cfg, None, micro, rows)["critic"].gradients[0]["values"]
        for t, one in TOKENS.items():
            counts = t in tokens and t not in flat
            expected = (one.now - one.returns) / len(tokens) if counts else 0
            assert found[t].item() == pytest.approx(expected, abs=1e-9), t


# ---- the loop


class Scripted:
    """A behaviour without an engine: π_k's table answers with words of the seed and step, a reward
    by chance; it keeps the table of each version."""

    gap_bound = 1e-3

    def __init__(self, cfg):
        self.cfg, self.tables = cfg, {}

    def rollouts(self, policy, step, asked):
        table = policy.module.tables["logp"].detach().clone()
        self.tables[step - 1] = table
        rng, groups = torch.Generator().manual_seed(step), []
        for index, _ in asked:
            n = torch.randint(1, 5, (self.cfg.group_size,), generator=rng).tolist()
            group = []
            for i, length in enumerate(n):
                tokens = torch.randint(10, 18, (length,), generator=rng)
                known = dict(reward=float((index + i) % 2), truncated=False, answer="7")
                known |= dict(version=step - 1, prompt_index=index, logp_sampler=table[tokens])
                group.append(Sample(prompt=torch.tensor([3, 3]), response=tokens, **known))
            groups.append(group)
        return groups

    def writer(self, policy):
        return None

    def evaluate(self, policy, version, ask):
        return None


class Loop:
    """train() on tables, with what it did: the batches after step 5, plans, learners."""

    def __init__(self, monkeypatch, folder, flags):
        cfg = settings(f"--eval_every 0 --save_every 0 --prompts 5 --minibatch 3 {flags}")
        usual = dict(steps=6, lr=1e-2, critic_lr=3e-2, lambda_start=1, lambda_every=1)
        usual |= dict(reincarnate=4)
        vars(cfg).update({name: value for name, value in usual.items() if name not in cfg.given})
        cfg.out, cfg.fingerprint = str(folder), "0"
        self.behaviour, self.looks, self.rates, self.states = Scripted(cfg), [], {}, []
        for module in (metrics, guards, checkpoint):
            monkeypatch.setattr(module, "gather", lambda value: [value])
        for name in ("save", "export"):
            monkeypatch.setattr(checkpoint, name, lambda *_: None)
        monkeypatch.setattr(guards, "listen", lambda: None)
        start, entropy, values = (dict.fromkeys(range(10, 18), x) for x in (-1.0, 1.0, 0.5))
        monkeypatch.setattr(train, "Policy", lambda *_: Table(logp=start, entropy=entropy))
        monkeypatch.setattr(train, "Critic", lambda *_: Table(values=values))
        monkeypatch.setattr(train, "behaviour_of", lambda *_: self.behaviour)
        monkeypatch.setattr(train, "Learner", self.learner)
        monkeypatch.setattr("model.gather", lambda value: [value])
        look_back, draw = train.look_back, RingBuffer.sample

        def looked(batch, of, snapshots, behaviour, p):
            look_back(batch, of, snapshots, behaviour, p)
            self.looks.append((p, batch))

        def drawn(buffer, n_groups, version, rng, weights=None):
            self.states.append(rng.getstate())
            return draw(buffer, n_groups, version, rng, weights)

        monkeypatch.setattr(train, "look_back", looked)
        monkeypatch.setattr(RingBuffer, "sample", drawn)
        decode = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
        problems = [{"id": i, "prompt_ids": [3, 3], "answer": "7"} for i in range(7)]
        task = SimpleNamespace(folder="", tokenizer=decode, problems=problems, parts={})
        train.train(cfg, task, None, ALONE, lambda *_: None)
        self.lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]

    def learner(self, module, lr, cfg, ranks):
        made, step = Plain(module, lr, cfg, ranks), Plain.step
        rates = self.rates.setdefault(module.predicts, [])

        def stepped(scale):
            norm = step(made, scale)
            rates.append(made.optimizer.param_groups[0]["lr"])
            return norm

        made.step = stepped
        return made


@pytest.fixture
def loop(monkeypatch, tmp_path):
    number = iter(range(99))

    def run(flags=""):
        with monkeypatch.context() as patch:
            return Loop(patch, tmp_path / f"run{next(number)}", flags)

    return run


def test_every_log_prob_of_a_run_is_of_the_policy_that_it_is_named_after(loop):
    """With λ < 1 and a reincarnation in the run, history is looked at anew in every step."""
    one = loop("--algo remix-ppo --beta 0.01")
    tables, seen = one.behaviour.tables, 0
    assert sorted(tables) == [0, 1, 2, 3, 4, 5]
    assert all(not torch.equal(tables[v], tables[v + 1]) for v in range(5))
    for p, batch in one.looks:
        k = p.step - 1
        versions = {"logp_old": k, "logp_base": 0 if p.step <= 4 else 4, "logp_prev": max(k - 1, 0)}
        assert ("logp_prev" in batch) == (p.lam < 1) == (p.step > 1)
        for i, s in enumerate(batch.samples):
            of = versions | {"logp_behavior": s.version}
            for name in (*of,) if p.lam < 1 else ("logp_old", "logp_base", "logp_behavior"):
                expected = tables[of[name]][s.response].float()
                assert torch.equal(batch[name][i], expected), (p.step, name, k - s.version)
        seen += sum(s.version < k for s in batch.samples)
    assert seen == sum(p.history for p, _ in one.looks) == 2 * 3
    assert [len(batch.groups) for _, batch in one.looks] == [3, 5, 5, 5, 5, 5]
    assert [line["staleness"][0] for line in one.lines] == [3, 3, 3, 3, 5, 5]


def test_each_learner_has_its_rate_and_warms_up(loop):
    one = loop("--algo remix-ppo --warmup 3")
    updates = [p.updates for p, _ in one.looks]
    scales = [min(1, step / 3) for step in range(1, 7)]
    for name, lr in (("logp", 1e-2), ("values", 3e-2)):
        expected = [lr * scale for n, scale in zip(updates, scales) for _ in range(n)]
        assert one.rates[name] == pytest.approx(expected)
    assert [line["lr"] for line in one.lines] == pytest.approx([1e-2 * scale for scale in scales])


def test_draws_have_random_numbers_of_their_step_and_seed(loop):
    first, again, other = loop(), loop(), loop("--seed 1")
    assert first.states == again.states
    assert len(set(first.states) | set(other.states)) == 2 * 6


# ---- the slot


def test_a_method_from_outside(loop, monkeypatch):
    """An objective with a number and a statistic of its own: a function, a row, a line."""

    def made_up(logp, logp_behavior, advantages, sharpness=3.0):
        seen.append(sharpness)
        return -logp * advantages * sharpness, {"made_up_share": logp.detach() * 0 + sharpness / 8}

    seen, line = [], flag(None, "how sharp", type=float)
    mine = ROWS["grpo"] | dict(objective="made-up", beta=0.0, group_size=2)
    monkeypatch.setattr(methods, "OBJECTIVES", methods.OBJECTIVES | {"made-up": made_up})
    monkeypatch.setattr(methods, "ROWS", ROWS | {"made-up": mine})
    monkeypatch.setattr(methods, "NUMBERS", NUMBERS | {"sharpness": line})
    choices = {"objective": methods.OBJECTIVES, "algo": methods.ROWS}
    for name, found in choices.items():
        one = flag(NUMBERS[name].default, "", choices=found)
        monkeypatch.setitem(methods.NUMBERS, name, one)
    assert settings("--algo made-up").sharpness == 3.0  # the function's own, written down
    with pytest.raises(ConfigError, match="--sharpness is not read .* rows that read it: made-up"):
        settings("--algo grpo --sharpness 2")
    with pytest.raises(ConfigError, match="--clip_low is not read"):
        settings("--algo made-up --clip_low 0.1")
    one = loop("--algo made-up --sharpness 2 --steps 2")
    assert set(seen) == {2.0}
    assert [line["made_up_share"] for line in one.lines] == [0.25, 0.25]
    assert {p.references == {} for p, _ in one.looks} == {True}
    assert all(line["kl_base"] is None and line["value_loss"] is None for line in one.lines)

"""methods.py and the verbs of the loop against what is written out by hand: the schedule, a row's
functions by the names of their arguments, the loss and its gradient, who is asked for what."""

import contextlib
import inspect
import json
import math
import statistics
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from by_hand import (
    ADVANTAGE,
    ALONE,
    BASE,
    BEHAVIOR,
    ENTROPY,
    F64,
    NEW,
    NOW,
    OLD,
    PREV,
    RETURNS,
    SAMPLER,
    TOKENS,
    VALUES,
    Plain,
    Table,
    batch_by_hand,
    learners,
    plan,
    row,
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

# The paper's runs: flags, total rollouts, what the paper prints (millions, truncated).
LEDGER = [
    ("--algo remix-ppo --reincarnate 100 --steps 350", 79_300, "0.079"),
    ("--algo remix-ppo --reincarnate 50 --steps 100", 20_450, "0.020"),
    ("--algo remix-ppo --reincarnate 100 --steps 50", 7_650, "0.007"),
    ("--algo remix-ppo --reincarnate 100 --steps 75", 11_475, "0.011"),
    ("--algo ppo --steps 900", 230_400, "0.230"),
    ("--algo remix-grpo --group_size 8 --reincarnate 50 --steps 100", 163_600, "0.163"),
]


@pytest.mark.parametrize("flags, rollouts, published", LEDGER)
def test_ledger(flags, rollouts, published):
    cfg = settings("--model m " + flags)  # 256 prompts, p = 0.4 and window 2 are defaults
    assert total_rollouts(cfg, cfg.steps) == rollouts
    assert dry_run(cfg).splitlines()[-1] == f"total rollouts: {rollouts}"
    assert f"{rollouts // 1000 / 1000:.3f}" == published


@pytest.mark.parametrize(
    "algo, steps, rollouts",
    [("remix-ppo", 350, 79_300), ("remix-grpo", 100, 163_600), ("ppo", 900, 230_400)],
)
def test_ledger_is_the_default_of_a_real_model(algo, steps, rollouts):
    assert total_rollouts(settings(f"--model m --algo {algo}"), steps) == rollouts


def test_dry_run_tells_the_phases():
    assert dry_run(settings("--model m " + LEDGER[0][0])).splitlines() == [
        "steps     1 to     1: mixed      153 fresh + 0 history groups of 1, 2 passes = "
        "10 updates a step",
        "steps     2 to   100: mixed      153 fresh + 103 history groups of 1, 2 passes = "
        "16 updates a step",
        "steps   101 to   350: on-policy  256 fresh + 0 history groups of 1, 1 passes = "
        "8 updates a step",
        "reincarnation after step 100: base <- policy, history off",
        "calls mix_ppg, gae, kl_convex, entropy_bonus, value_loss, kl_lambda; "
        "keeps policy, critic, base, prev",
        f"gradient updates: {10 + 99 * 16 + 250 * 8}",
        "total rollouts: 79300",
    ]


@given(thousandths=st.integers(0, 999), prompts=st.integers(1, 2000))
def test_the_share_of_history_is_exact(thousandths, prompts):
    """0.07 * 100 is 7.000000000000001 in floats."""
    cfg = SimpleNamespace(**vars(SCHEDULE) | dict(p=thousandths / 1000, prompts=prompts))
    history = prompts - Method(cfg).plan(1).fresh
    assert history - 1 < Fraction(thousandths, 1000) * prompts <= history


SCHEDULE = settings("--algo mix-ppo")


@hypothesis(deadline=None)
@given(
    share=st.integers(0, 95),
    prompts=st.integers(1, 60),
    window=st.integers(1, 6),
    utd=st.integers(1, 4),
    after=st.integers(1, 3),
    reincarnate=st.integers(0, 12),
    minibatch=st.integers(1, 70),
    group=st.integers(1, 5),
    steps=st.integers(1, 15),
)
def test_schedule_against_a_simulation(
    share, prompts, window, utd, after, reincarnate, minibatch, group, steps
):
    changes = dict(p=share / 100, prompts=prompts, window=window, utd=utd, utd_after=after)
    changes |= dict(reincarnate=reincarnate, minibatch=minibatch, group_size=group)
    cfg = SimpleNamespace(**vars(SCHEDULE) | changes)
    wanted = -(-share * prompts // 100)
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
        left, minibatches = found.fresh + found.history, 0
        while left > 0:
            left, minibatches = left - minibatch, minibatches + 1
        assert found.updates == found.passes * minibatches
        assert (found.first, found.version) == (sum(written), step - 1)
        assert found.reincarnate == (step == reincarnate)
        written.append(found.fresh)
        total += found.fresh * group
        assert total_rollouts(cfg, step) == total


def test_lambda_of_the_paper():
    plans = [method("--algo remix-ppo").plan(step) for step in range(1, 201)]
    for first, last, lam in (
        (1, 50, 1.0),
        (51, 60, 0.9),
        (61, 70, 0.8),
        (71, 80, 0.7),
        (81, 90, 0.6),
        (91, 200, 0.5),
    ):
        assert {p.lam for p in plans[first - 1 : last]} == {lam}
    assert {method("--algo mix-ppo").plan(step).lam for step in (1, 51, 200)} == {1.0}


def test_warm_up_is_a_factor_of_the_learning_rates():
    one = method("--warmup 4")
    assert [one.plan(step).scale for step in (1, 2, 3, 4, 5, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert method().plan(1).scale == 1


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
    one = method("--algo remix-ppo --lambda_start 0 --lambda_every 1 --anchor old")
    assert [one.plan(t).references["prev"] for t in (1, 2, 3)] == [0, 1, 2]
    assert not one.plan(3).keep_old
    one = method("--algo remix-ppo --lambda_start 0 --lambda_every 1")
    assert [one.plan(t).references["prev"] for t in (1, 2, 3)] == [0, 0, 1]
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


@pytest.mark.parametrize(
    "algo, advantage, p, utd, reincarnate, floor",
    [
        ("ppo", "gae", 0, 1, 0, 1),
        ("grpo", "group", 0, 1, 0, 1),
        ("mix-ppo", "gae", 0.4, 2, 0, 1),
        ("mix-grpo", "group", 0.4, 2, 0, 1),
        ("remix-ppo", "gae", 0.4, 2, 100, 0.5),
        ("remix-grpo", "group", 0.4, 2, 50, 0.5),
        ("decoupled", "group", 0.4, 1, 0, 1),
    ],
)
def test_rows(algo, advantage, p, utd, reincarnate, floor):
    cfg = settings(f"--model m --algo {algo}")
    found = cfg.advantage, cfg.p, cfg.utd, cfg.reincarnate, cfg.lambda_floor, cfg.group_size
    assert found == (advantage, p, utd, reincarnate, floor, 8 if advantage == "group" else 1)
    assert set(SIX) | {"decoupled"} <= set(ROWS)
    assert settings(f"--algo {algo}").prompts <= 64  # it has a toy too
    assert dry_run(cfg).splitlines()[-1].startswith("total rollouts: ")


def test_what_a_run_computes_follows_from_what_its_functions_read():
    found = {algo: method(f"--algo {algo}") for algo in ROWS}
    critics = {algo for algo, one in found.items() if one.critic}
    assert critics & set(SIX) == {"ppo", "mix-ppo", "remix-ppo"}
    assert all(one.critic == ("values" in one.reads()) for one in found.values())
    assert {algo for algo in SIX if not found[algo].anchors} == set()
    assert not found["decoupled"].anchors and method("--algo decoupled --beta 0.1").anchors
    assert not method("--algo remix-ppo --beta 0").anchors
    for algo in SIX:
        precedent = {"prev" in found[algo].plan(t).references for t in range(1, 200)}
        assert (True in precedent) == algo.startswith("remix")
    assert "logp_behavior" in found["decoupled"].reads() and "clip_low" in found["ppo"].reads()


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


VOCABULARY = {
    *("logp", "logp_old", "logp_behavior", "logp_sampler", "logp_base", "logp_prev", "entropy"),
    *("advantages", "values", "returns", "mask", "rewards", "group", "target", "version"),
    *("values_old", "log_ratio", "step"),  # the critic's before the step; of weights; of λ(t)
}


def test_every_keyword_is_declared():
    cells = [*methods.OBJECTIVES.values(), *methods.ADVANTAGES.values(), *methods.TERMS.values()]
    functions = [*cells, *filter(None, methods.WEIGHTS.values()), value_loss]
    limits = {f"{cell}_{end}" for cell in ("correct", "mismatch") for end in ("low", "high")}
    renamed = {"estimator": "kl_estimator", "clip": "value_clip", "weight_low": "correct_low"}
    renamed |= {"weight_high": "correct_high"}
    assert limits <= NUMBERS.keys()
    for function in functions:
        for name in inspect.signature(function).parameters:
            if name == "lam":  # of the plan in a KL, GAE's elsewhere
                name = "gae_lambda"
            assert renamed.get(name, name) in VOCABULARY | NUMBERS.keys(), (function, name)
    for name in set(inspect.signature(methods.kl_lambda).parameters) - {"step"}:
        assert f"lambda_{name}" in NUMBERS


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
    batch = Batch(
        [[sample(5, [10, 11], 1.0, logp_behavior=written)]],
        [[sample(4, [12], 0.0, logp_behavior=torch.tensor([-1.0]))]],
    )
    batch["logp_old"] = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0])]
    batch["values"] = [torch.tensor([0.2, 0.5]), torch.tensor([0.4])]
    method(flags).credit(batch)
    found = torch.cat(batch["advantages"]).tolist()
    assert found == pytest.approx(whitened(raw), rel=1e-4)
    assert torch.cat(batch["returns"]).tolist() == pytest.approx(returns, abs=1e-6)


# ---- the losses


def clipped_ppg(new, old, behavior, a, low, high):
    r, c = math.exp(new - behavior), math.exp(old - behavior)
    return -min(r * a, min(max(r, c - low), c + high) * a)


def k3(x):
    return math.exp(-x) + x - 1


def loss_of_token(t, cfg, lam, new=None):
    """The policy's loss on token t, in plain Python."""
    one = TOKENS[t]
    new = one[NEW] if new is None else new
    writer = one[OLD] if cfg.objective == "ppo" else one[BEHAVIOR]
    loss = clipped_ppg(new, one[OLD], writer, one[ADVANTAGE], cfg.clip_low, cfg.clip_high)
    if cfg.correct == "truncated":
        loss *= min(max(math.exp(one[OLD] - one[BEHAVIOR]), cfg.correct_low), cfg.correct_high)
    if cfg.mismatch == "truncated":
        loss *= min(max(math.exp(-SAMPLER[t]), cfg.mismatch_low), cfg.mismatch_high)
    divergence = lam * k3(new - one[BASE]) + (1 - lam) * k3(new - one[PREV])
    return loss + cfg.beta * divergence - cfg.entropy * one[ENTROPY]


def forward(cfg, p, flags=()):
    """policy_loss on the whole batch by hand: (losses by token, statistics by token)."""
    one, batch = Method(cfg), batch_by_hand()
    b = batch.padded(one.columns(batch))
    out = {}
    for name, column in (("logp", NEW), ("entropy", ENTROPY)):
        rows = [row(TOKENS, s.response.tolist(), column) for s in batch.samples]
        out[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    loss, stats = one.policy_loss(b, out, p)
    mask = b["mask"]
    return loss[mask], {name: value[mask] for name, value in stats.items()}


LOSS = "--beta 0.5 --entropy 0.25 --clip_high 0.3"


@pytest.mark.parametrize("algo", [*SIX, "decoupled"])
@pytest.mark.parametrize("lam", (1.0, 0.7))
@pytest.mark.parametrize("mismatch", ("none", "truncated"))
def test_policy_loss(algo, lam, mismatch):
    cfg = settings(f"--model m --algo {algo} --mismatch {mismatch} {LOSS}")
    due = {"base": 0} | ({"prev": 4} if lam < 1 else {})
    loss, stats = forward(cfg, plan(lam=lam, references=due))
    assert loss.dtype == F64
    assert loss.tolist() == pytest.approx([loss_of_token(t, cfg, lam) for t in TOKENS], abs=1e-12)
    columns = {"kl_base": BASE} | ({"kl_prev": PREV} if lam < 1 else {})
    assert {name for name in stats if name.startswith("kl_")} == columns.keys()
    for name, column in columns.items():
        expected = [k3(TOKENS[t][NEW] - TOKENS[t][column]) for t in TOKENS]
        assert stats[name].tolist() == pytest.approx(expected, abs=1e-12)
    assert ("correct_weight" in stats) == (algo == "decoupled")
    assert ("mismatch_weight" in stats) == (mismatch == "truncated")
    free = SimpleNamespace(**vars(cfg) | dict(beta=0.0, entropy=0.0))
    expected = [loss_of_token(t, free, lam) for t in TOKENS]
    assert stats["policy_loss"].tolist() == pytest.approx(expected, abs=1e-12)


def test_weights_have_limits_of_their_own():
    cfg = settings(
        "--model m --algo decoupled --mismatch truncated --mismatch_high 1.1 "
        "--correct_low 0.6 --correct_high 1.3"
    )
    loss, stats = forward(cfg, plan(references={}))
    assert loss.tolist() == pytest.approx([loss_of_token(t, cfg, 1.0) for t in TOKENS], abs=1e-12)
    c = [math.exp(TOKENS[t][OLD] - TOKENS[t][BEHAVIOR]) for t in TOKENS]
    assert min(c) < 0.6 and max(c) > 1.3
    expected = [min(max(x, 0.6), 1.3) for x in c]
    assert stats["correct_weight"].tolist() == pytest.approx(expected)
    assert stats["mismatch_weight"].max() == 1.1
    with pytest.raises(ConfigError, match="mismatch_high is not read"):
        settings("--mismatch none --mismatch_high 3")


def value_loss_of(t, clip=0.5):
    clipped = min(max(NOW[t], VALUES[t] - clip), VALUES[t] + clip)
    return max((NOW[t] - RETURNS[t]) ** 2, (clipped - RETURNS[t]) ** 2) / 2


@pytest.mark.parametrize("clip", (0.5, 0.1))
def test_critic_loss(clip):
    one, batch = method(f"--value_clip {clip}"), batch_by_hand()
    b = batch.padded(one.columns(batch))
    rows = [row(NOW, s.response.tolist()) for s in batch.samples]
    now = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    loss, stats = one.critic_loss(b, {"values": now}, plan())
    expected = [value_loss_of(t, clip) for t in TOKENS]
    assert loss[b["mask"]].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(stats["value_loss"], loss)


# ---- look back: nothing that is known is computed again


class Asked:
    """A policy that answers with a number for itself and for each snapshot, and remembers what it
    was asked about."""

    NUMBER = {"live": -1.0, "base snapshot": -2.0, "prev snapshot": -3.0, "writer": -4.0}

    def __init__(self):
        self.now, self.asked = "live", []

    def predict(self, samples, progress=iter):
        self.asked.append((self.now, [s.prompt_index for s in samples]))
        return [torch.full((len(s.response),), self.NUMBER[self.now]) for s in samples]

    @contextlib.contextmanager
    def swapped(self, snapshot):
        assert self.now == "live"
        self.now = snapshot
        yield
        self.now = "live"


def look(version, ages, flags="", writer=None, base=-7.0, **values):
    """Samples of these ages (fresh first) through look_back, prompt_index naming them ->
    (what the policy was asked, {index: {column: number}}, the samples)."""
    samples = []
    for i, age in enumerate(ages):
        known = dict(logp_behavior=torch.full((i + 1,), -5.0 - age)) if age else {}
        if age and base:
            known["logp_base"] = torch.full((i + 1,), base)
        known = {"logp_behavior": None, "logp_base": None} | known
        samples.append(sample(version - age, [10] * (i + 1), 0.0, i, **known))
    fresh = [s for s, age in zip(samples, ages) if not age]
    batch = Batch([fresh], [[s] for s in samples[len(fresh) :]])
    policy = Asked()
    behaviour = SimpleNamespace(writer=lambda p: p.swapped(writer) if writer else None)
    p = method(f"--algo remix-ppo {flags}", **values | {"lambda_start": 0}).plan(version + 1)
    frozen = dict(base="base snapshot", prev="prev snapshot")
    due = {name: frozen[name] for name in p.references}
    train.look_back(batch, {"policy": policy}, due, behaviour, p)
    found = {}
    for i, one in enumerate(batch.samples):
        names = ("logp_old", "logp_behavior", "logp_base", "logp_prev")
        columns = {n: batch[n][i] for n in names if batch.has(n) and batch[n][i] is not None}
        assert {len(column) for column in columns.values()} == {len(one.response)}
        found[i] = {name: column[0].item() for name, column in columns.items()}
    return policy.asked, found, batch.samples


def test_what_is_known_is_not_computed_again():
    """The base of history is from when it was fresh; what a precedent wrote it has said."""
    asked, found, samples = look(5, (0, 0, 1, 2))
    assert asked == [
        ("live", [0, 1, 2, 3]),
        ("base snapshot", [0, 1]),
        ("prev snapshot", [0, 1, 3]),
    ]
    fresh = dict(logp_old=-1.0, logp_behavior=-1.0, logp_base=-2.0, logp_prev=-3.0)
    assert found == {
        0: fresh,
        1: fresh,
        2: dict(logp_old=-1.0, logp_behavior=-6.0, logp_base=-7.0, logp_prev=-6.0),
        3: dict(logp_old=-1.0, logp_behavior=-7.0, logp_base=-7.0, logp_prev=-3.0),
    }
    assert [s.logp_base[0].item() for s in samples] == [-2, -2, -7, -7]  # stays with a sample


def test_no_pass_for_a_precedent_without_weight():
    asked, found, _ = look(5, (0, 1), "--lambda_floor 1")
    assert asked == [("live", [0, 1]), ("base snapshot", [0])]
    assert all("logp_prev" not in one for one in found.values())


def test_anchor_old_is_the_policy_itself():
    asked, found, _ = look(5, (0, 1, 2), "--anchor old")
    assert asked == [("live", [0, 1, 2]), ("base snapshot", [0])]
    assert [one["logp_prev"] for one in found.values()] == [-1.0] * 3


def test_the_first_policy_is_base_and_precedent():
    asked, found, _ = look(0, (0, 0))
    assert asked == [("live", [0, 1])]
    assert found[0] == dict.fromkeys(("logp_old", "logp_behavior", "logp_base", "logp_prev"), -1.0)


@pytest.mark.parametrize(
    "version, computed", [(0, False), (2, True), (3, False), (4, True), (5, True)]
)
def test_base_is_the_policy_at_the_start_and_at_reincarnation_only(version, computed):
    flags = "--lambda_floor 1 --reincarnate 3"
    asked, found, _ = look(version, (0,), flags)
    assert asked == [("live", [0])] + [("base snapshot", [0])] * computed
    assert found[0]["logp_base"] == (-2.0 if computed else -1.0)


def test_without_kl_the_policy_alone_is_asked():
    asked, found, _ = look(5, (0, 1), "--beta 0", base=None)
    assert asked == [("live", [0, 1])] and set(found[1]) == {"logp_old", "logp_behavior"}


def test_another_writer_says_what_it_thought_of_its_own():
    """The fresh samples alone, as the behaviour's context says; logp_old stays π_k's."""
    asked, found, _ = look(5, (0, 0, 1), "--lambda_floor 1", writer="writer")
    assert asked == [("live", [0, 1, 2]), ("writer", [0, 1]), ("base snapshot", [0, 1])]
    assert [one["logp_behavior"] for one in found.values()] == [-4, -4, -6]
    assert {one["logp_old"] for one in found.values()} == {-1.0}


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


def updated(cfg, p=None, micro=None, rows=(0, 1, 2, 3)):
    """The learners and the meter after an update on samples of the batch by hand."""
    made, meter = learners(cfg, micro), Meter()
    train.update(made, batch_by_hand(), list(rows), Method(cfg), p or plan(), meter)
    return made, meter


MICRO = ([[0, 1, 2, 3]], [[2], [3, 0], [1], []], [[3], [2], [1], [0]], None)
WEIGHT = {
    "token": dict.fromkeys(TOKENS, 1 / 8),
    "sequence": {t: 1 / 4 / length for t, length in zip(TOKENS, (3, 3, 3, 1, 2, 2, 2, 2))},
    "constant": dict.fromkeys(TOKENS, 1 / (4 * 50)),
}


@pytest.mark.parametrize("aggregate", WEIGHT)
@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("flags", ("--algo remix-ppo", "--algo decoupled --mismatch truncated"))
def test_gradient_of_an_update(aggregate, micro, flags):
    """Finite differences of the loss by hand, whatever the micro-batches, at λ = 0.7."""
    cfg = settings(f"--model m {flags} {LOSS} --aggregate {aggregate} --max_response 50")
    made = learners(settings("--model m"), micro)["policy"]
    made.cfg = cfg
    train.update({"policy": made}, batch_by_hand(), [0, 1, 2, 3], Method(cfg), plan(), Meter())
    (found,) = made.gradients
    d = 1e-5
    for t, weight in WEIGHT[aggregate].items():
        ends = [loss_of_token(t, cfg, 0.7, TOKENS[t][NEW] + e) for e in (d, -d)]
        expected = weight * (ends[0] - ends[1]) / (2 * d)
        assert found["logp"][t].item() == pytest.approx(expected, rel=1e-6, abs=1e-9), t
        assert found["entropy"][t].item() == pytest.approx(-0.25 * weight)
    assert found["logp"][:10].abs().sum() == 0


@pytest.mark.parametrize("micro", MICRO)
def test_gradient_of_the_critic(micro):
    """(V − R)/8, by tokens whatever --aggregate; 0 where the clipped branch is larger, and flat."""
    cfg = settings("--model m --aggregate sequence")
    found = updated(cfg, micro=micro)[0]["critic"].gradients[0]["values"]
    clipped = {t: min(max(NOW[t], VALUES[t] - 0.5), VALUES[t] + 0.5) for t in TOKENS}
    flat = [t for t in TOKENS if abs(clipped[t] - RETURNS[t]) > abs(NOW[t] - RETURNS[t])]
    assert flat == [10]  # from 0.2 to 0.9 on the way to 1: further than 0.5
    expected = [0 if t in flat else (NOW[t] - RETURNS[t]) / 8 for t in TOKENS]
    assert found[10:].tolist() == pytest.approx(expected, abs=1e-9)


def test_an_update_on_some_samples_counts_these():
    cfg = settings("--model m --beta 0 --entropy 0")
    found = updated(cfg, plan(references={}), rows=(3, 1))[0]["critic"].gradients[0]["values"]
    expected = [(NOW[t] - RETURNS[t]) / 3 if t in (13, 16, 17) else 0 for t in TOKENS]
    assert found[10:].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_engines_log_probs_do_not_move_the_loss():
    cfg, found = settings("--model m --mismatch none"), []
    for change in (0.0, -30.0):
        made, batch = learners(cfg), batch_by_hand()
        for one in batch.samples:
            one.logp_sampler = one.logp_sampler + change
        train.update(made, batch, [0, 1, 2, 3], Method(cfg), plan(), Meter())
        found.append(made["policy"].gradients[0]["logp"])
    assert torch.equal(*found) and found[0].abs().sum() > 0


@pytest.mark.parametrize("scale", (0.0, 0.25, 1.0))
def test_updates_go_as_far_as_the_plan_scales_them(scale):
    """AdamW's first step has the size of its learning rate, wherever there is a gradient."""
    cfg = settings("--model m --lr 1e-3 --critic_lr 1e-2")
    made, _ = updated(cfg, plan(scale=scale))
    before = learners(cfg)
    for role, name, lr in (("policy", "entropy", 1e-3), ("critic", "values", 1e-2)):
        moved = made[role].module.tables[name] - before[role].module.tables[name]
        assert moved.abs().max().item() == pytest.approx(lr * scale, rel=1e-3)


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

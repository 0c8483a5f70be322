"""methods.py and the verbs of the loop against what is written out by hand: the schedule, a row's
functions by the names of their arguments, the loss and its gradient, who is asked for what."""

import inspect
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

import methods
import train
from advantage import group_advantages
from buffer import Batch, RingBuffer
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
from infra import checkpoint, guards, metrics
from infra.config import ConfigError, flag
from infra.metrics import Meter
from loss import value_loss
from methods import NUMBERS, ROWS, Method, dry_run, total_rollouts


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
    called = "mix_ppg, gae, kl_convex, entropy_bonus, whiten, value_loss, kl_lambda"
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
    assert one.plan(9).references == {} and not one.plan(9).keep_old and not one.frozen
    assert method("--algo mix-ppo").plan(99).references == {"base": 0}


# ---- rows, and arguments by name


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
    assert settings(f"--algo {algo}").prompts <= 128  # it has a toy too
    # what a run computes follows from what its functions read
    assert one.critic == ("values" in one.reads) == (advantage == "gae")
    assert one.frozen == ([] if algo == "decoupled" else ["base"])
    assert any("prev" in one.plan(t).references for t in range(1, 200)) == (floor < 1)


UNREAD = [
    ("--algo grpo --gae_lambda 0.9", "ppo, mix-ppo, remix-ppo"),
    ("--algo grpo --critic_lr 1e-5", "ppo, mix-ppo, remix-ppo"),
    ("--algo ppo --no-normalize_std", "grpo, mix-grpo, remix-grpo"),
    ("--algo decoupled --lambda_start 3", "remix-ppo"),
    ("--algo ppo --window 3", "mix-ppo"),
    ("--algo mix-ppo --utd_after 3", "remix-ppo, remix-grpo"),
    ("--algo remix-ppo --c_bar 0.5", "none"),
    ("--algo decoupled --mismatch none --mismatch_high 3", "none"),
]


@pytest.mark.parametrize("flags, rows", UNREAD)
def test_a_typed_number_that_is_not_read_names_the_rows_that_read_it(flags, rows):
    name = flags.rpartition("--")[2].removeprefix("no-").split()[0]
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


# ---- credit


def groups_of(rewards, version=5):
    """A group of samples of one and of two tokens for each list of rewards."""
    return [
        [sample(version, [10, 11][: 1 + i % 2], reward, g) for i, reward in enumerate(each)]
        for g, each in enumerate(rewards)
    ]


def test_group_advantages_of_history_are_what_they_were():
    """Of a group alone: recomputed from rewards, never normalised within the mixture, and apart
    from a fresh group of the same prompt."""
    fresh = groups_of([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    history = groups_of([[1.0, 1.0, 1.0, 0.0], [1.0] * 4], version=4)
    batch = Batch(fresh, history)
    method("--algo grpo --group_size 4").credit(batch)
    first = [s[0].item() for s in batch["advantages"]]
    a, b = math.sqrt(3 / 4), 1.5  # in spreads: 0.5/sqrt(1/3) and 0.75/0.5
    expected = [b, *[-b / 3] * 3, a, a, -a, -a, *[b / 3] * 3, -b, *[0] * 4]
    assert first == pytest.approx(expected, rel=1e-5)
    assert all((row == row[0]).all() for row in batch["advantages"])
    assert [len(row) for row in batch["advantages"]] == [len(s.response) for s in batch.samples]
    for number, group in enumerate(history, 2):  # to the bit what the step that wrote them had
        alone = group_advantages(torch.tensor([s.reward for s in group]), torch.zeros(4).long())
        assert [first[i] for i in batch.groups[number]] == alone.tolist()
    assert "returns" not in batch


def test_group_advantages_without_their_spread():
    batch = Batch(groups_of([[1.0, 0.0, 0.0, 0.0]]), [])
    method("--algo grpo --group_size 4 --no-normalize_std").credit(batch)
    assert [a[0].item() for a in batch["advantages"]] == [0.75, -0.25, -0.25, -0.25]
    method("--algo grpo --group_size 4 --no-normalize_std --baseline_drop 0.5").credit(batch)
    assert [a[0].item() for a in batch["advantages"]] == [0.875, -0.125, -0.125, -0.125]


def whitened(numbers, raised):
    centre, spread = statistics.mean(numbers), statistics.stdev(numbers)
    return [(x - centre + raised) / spread for x in numbers]


CREDIT = [  # flags, advantages, returns
    # γ = λ = 1: A = R − V
    ("", [0.8, 0.5, -0.4], [1, 1, 0]),
    ("--baseline_drop 0.3", [0.8, 0.5, -0.4], [1, 1, 0]),
    # δ = (0 + 0.5·0.5 − 0.2, 1 − 0.5, −0.4), A_0 = 0.05 + 0.4·0.5
    ("--gamma 0.5 --gae_lambda 0.8", [0.25, 0.5, -0.4], [0.45, 1, 0]),
    # where π_k would go half as often, what follows counts half
    ("--history_advantage vtrace", [0.55, 0.5, -0.4], [0.75, 0.75, 0]),
    ("--history_advantage vtrace --c_bar 0.25", [0.425, 0.5, -0.4], [0.30625, 0.625, 0.3]),
]


@pytest.mark.parametrize("flags, raw, returns", CREDIT)
def test_advantages_under_a_critic(flags, raw, returns):
    """Whitened over all tokens of the mixture, fresh and history together; the targets are not."""
    written = torch.tensor([-1.0, -1.0 + math.log(2)])
    past = sample(4, [12], 0.0, logp_behavior=torch.tensor([-1.0]))
    batch = Batch([[sample(5, [10, 11], 1.0, logp_behavior=written)]], [[past]])
    batch["logp_old"] = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0])]
    batch["values"] = [torch.tensor([0.2, 0.5]), torch.tensor([0.4])]
    method(flags).credit(batch)
    found = torch.cat(batch["advantages"]).tolist()
    raised = 0.3 * 0.5 if "baseline_drop" in flags else 0.0  # the mean reward is a half
    assert found == pytest.approx(whitened(raw, raised), rel=1e-4)
    assert torch.cat(batch["returns"]).tolist() == pytest.approx(returns, abs=1e-6)


# ---- minibatches


def dealt(n_groups, group_size, minibatch, passes, seed=0, step=3):
    groups = [[sample(5, [10], 0.0, g)] * group_size for g in range(n_groups)]
    cfg = SimpleNamespace(minibatch=minibatch, seed=seed)
    return list(train.minibatches(Batch(groups, []), plan(passes=passes, step=step), cfg))


SIZES = [(7, 3, 2, 2), (6, 1, 6, 1), (5, 2, 8, 3), (4, 4, 1, 2)]


@pytest.mark.parametrize("n_groups, group_size, minibatch, passes", SIZES)
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


LOSS = "--beta 0.5 --lambda_floor 0.5 --entropy 0.25 --clip_high 0.3 --max_response 50"
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
    by chance; it keeps the table of each version. other: the snapshot that counts as the writer."""

    gap_bound = math.inf

    def __init__(self, cfg, other):
        self.cfg, self.tables, self.other = cfg, {}, other

    def rollouts(self, policy, step, asked):
        table = policy.module.tables["logp"].detach().clone()
        self.tables[step - 1] = table
        rng, groups = torch.Generator().manual_seed(step), []
        for index, _ in asked:
            group = []
            for i in range(self.cfg.group_size):
                length = torch.randint(1, 5, (), generator=rng).item()
                tokens = torch.randint(10, 18, (length,), generator=rng).tolist()
                known = dict(logp_sampler=table[tokens], logp_behavior=None, logp_base=None)
                group.append(sample(step - 1, tokens, float((index + i) % 2), index, **known))
            groups.append(group)
        return groups

    def writer(self, policy):
        return policy.swapped(self.other) if self.other else None

    def evaluate(self, policy, version, ask):
        return None


class Loop:
    """train() on tables, with what it did: the batches after step 5, plans, learners."""

    def __init__(self, monkeypatch, folder, flags, other):
        cfg = settings(f"--eval_every 0 --save_every 0 --prompts 5 --minibatch 3 {flags}")
        usual = dict(
            steps=6, lr=1e-2, critic_lr=3e-2, lambda_start=1, lambda_every=1, reincarnate=4
        )
        vars(cfg).update({name: value for name, value in usual.items() if name not in cfg.given})
        cfg.out, cfg.fingerprint = str(folder), "0"
        self.behaviour, self.looks, self.passes = Scripted(cfg, other), [], []
        self.rates, self.states = {}, []
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
            self.passes.append([])
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
        made, step, predict = Plain(module, lr, cfg, ranks), Plain.step, Plain.predict
        rates = self.rates.setdefault(module.predicts, [])

        def stepped(scale):
            norm = step(made, scale)
            rates.append(made.optimizer.param_groups[0]["lr"])
            return norm

        def predicted(samples):
            if module.predicts == "logp":
                self.passes[-1].append(len(samples))
            return predict(made, samples)

        made.step, made.predict = stepped, predicted
        return made


@pytest.fixture
def loop(monkeypatch, tmp_path):
    number = iter(range(99))

    def run(flags="", other=None):
        with monkeypatch.context() as patch:
            return Loop(patch, tmp_path / f"run{next(number)}", flags, other)

    return run


@pytest.mark.parametrize("flags", ("--beta 0.01", "--lambda_floor 1", "--anchor old", "--beta 0"))
def test_every_log_prob_of_a_run_is_of_the_policy_that_it_is_named_after(loop, flags):
    """With λ < 1 and a reincarnation in the run, history is looked at anew in every step; and no
    policy is asked what is known: what the base said of history, what a writer said of its own."""
    one, seen = loop(f"--algo remix-ppo {flags}"), 0
    tables = one.behaviour.tables
    assert sorted(tables) == [0, 1, 2, 3, 4, 5]
    assert all(not torch.equal(tables[v], tables[v + 1]) for v in range(5))
    for (p, batch), passes in zip(one.looks, one.passes):
        k, expected = p.step - 1, [len(batch.samples)]
        of = {"base": 0 if p.step <= 4 else 4, "prev": k if "old" in flags else max(k - 1, 0)}
        due = [] if flags == "--beta 0" else ["base", "prev"][: 1 + (p.lam < 1)]
        for name in due:
            unknown = batch.samples if name == "prev" else batch.samples[: batch.fresh]
            unknown = [s for s in unknown if of[name] not in (k, s.version)]
            expected += [len(unknown)] if unknown else []
        assert passes == expected, p.step
        assert ("logp_base" in batch, "logp_prev" in batch) == ("base" in due, "prev" in due)
        for i, s in enumerate(batch.samples):
            versions = {"old": k, "behavior": s.version} | {name: of[name] for name in due}
            for name, version in versions.items():
                found = tables[version][s.response].float()
                assert torch.equal(batch[f"logp_{name}"][i], found), (p.step, name, k - s.version)
        seen += sum(s.version < k for s in batch.samples)
    assert seen == sum(p.history for p, _ in one.looks) == 2 * 3
    assert [len(batch.groups) for _, batch in one.looks] == [3, 5, 5, 5, 5, 5]
    assert [line["staleness"][0] for line in one.lines] == [3, 3, 3, 3, 5, 5]


def test_another_writer_says_what_it_thought_of_its_own(loop):
    """Of the fresh samples alone, as the behaviour's context says; logp_old stays π_k's."""
    one = loop("--algo remix-ppo --beta 0", [torch.full((18,), x).double() for x in (-4.0, 1.0)])
    for (p, batch), passes in zip(one.looks, one.passes):
        assert passes == [len(batch.samples), batch.fresh]
        for s, old in zip(batch.samples, batch["logp_old"]):
            assert (s.logp_behavior == -4).all()
            assert torch.equal(old, one.behaviour.tables[p.version][s.response].float())


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

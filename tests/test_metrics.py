"""What a run writes down, and the steps of the loop that it is computed in, against numbers worked out by hand.

The batch: samples of ages 0, 0, 1 and 2, ragged, every token with an id of its own, so that a policy is a table of
log-probs and every quantity can be followed through train.py in plain Python.
"""

import contextlib
import json
import math
import statistics
from types import SimpleNamespace

import faults
import pytest
import torch
import torch.distributed as dist

import train
from infra import metrics
from infra.config import Config, Plan, parse
from infra.metrics import METRICS, Meter, Recorder, console_line, step_metrics, truncate
from reward import Verdict

CPU = torch.device("cpu")
FIRST = SimpleNamespace(first=True, rank=0, world=1, device=CPU)


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory):
    """A process group of this process alone: the meter and collect() gather."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Meter.


def test_meter_by_hand():
    meter = Meter()
    meter.add(
        "x",
        torch.tensor([[1.0, 2.0, math.nan], [4.0, 1e9, math.inf]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    meter.add("x", torch.tensor([-5.0]))
    meter.add("x", torch.tensor([[7.0]]), torch.tensor([[False]]))  # an empty micro-batch
    meter.add("y", torch.tensor([[-3.0, -2.0]]), torch.tensor([[True, True]]))
    meter.add("nothing", torch.zeros(2, 2), torch.zeros(2, 2))
    assert meter.gathered() == ({"x": 2 / 4, "y": -2.5}, {"x": 4.0, "y": -2.0})


def test_meter_weighs_tokens_over_ranks(monkeypatch):
    """Means of all ranks' tokens, not of their means; a name that one rank alone has seen."""
    ours = Meter()
    ours.add("x", torch.tensor([1.0, 2.0, 6.0]))
    monkeypatch.setattr(
        metrics, "gather", lambda seen: [seen, {"x": [30.0, 1, 30.0], "z": [4.0, 2, 3.0]}, {}]
    )
    assert ours.gathered() == ({"x": 39 / 4, "z": 2.0}, {"x": 30.0, "z": 3.0})


def test_meter_leaves_out_what_is_not_finite():
    """An update that was skipped must not make the step's means null: its grad_norm is in none."""
    meter = Meter()
    for norm in (2.0, math.inf, math.nan, 4.0):
        meter.add("norm", torch.tensor(norm))
    meter.add("skipped alone", torch.tensor([math.nan]))
    assert meter.gathered() == ({"norm": 3.0}, {"norm": 4.0})


def test_meter_sums_in_double():
    meter = Meter()
    for _ in range(10):
        meter.add("x", torch.full((1000,), 0.1))
    meter.add("x", torch.tensor([16_777_217.0 * 4, 1.0]))
    exact = (10_000 * float(torch.tensor(0.1)) + float(torch.tensor(16_777_217.0 * 4)) + 1) / 10_002
    assert meter.gathered()[0]["x"] == pytest.approx(exact, rel=1e-12)


# Recorder.


def recorder(folder, **values):
    return Recorder(Config(out=str(folder), steps=9, **values), FIRST)


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


RECORD = dict(
    step=3,
    version=2,
    phase="mixed",
    fresh_rollouts=4,
    total_rollouts=12,
    length_mean=10.5,
    staleness=[4, 2, 0],
)


def test_recorder_writes_every_key_in_strict_json(tmp_path, capsys):
    record = recorder(tmp_path)
    record.write(
        RECORD | {"entropy": math.nan, "grad_norm": math.inf, "gap_max": -math.inf, "kl_prev": None}
    )
    record.write(RECORD | {"step": 4})
    record.close()
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [list(METRICS)] * 2
    assert {name: lines[0][name] for name in RECORD} == RECORD
    assert {name for name, value in lines[0].items() if value is not None} == set(RECORD) | {
        "memory_peak_gib"
    }
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_recorder_refuses_unknown_names(tmp_path):
    record = recorder(tmp_path)
    with pytest.raises(ValueError, match="kl_basis"):
        record.write(RECORD | {"kl_basis": 1.0})
    record.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_recorder_appends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    record = recorder(tmp_path)
    record.write(RECORD)
    assert [
        strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [2, 3]
    record.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    record = Recorder(Config(out=str(tmp_path)), SimpleNamespace(first=False, device=CPU))
    with record.clock("step"):
        pass
    record.write(RECORD)
    record.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and record.seconds == {}


def test_clock_and_machine_metrics(tmp_path, monkeypatch):
    """Phases add up within a step and start again at the next: 10.5 tokens x 4 in 1.5 + 2 seconds. 3 GiB in KiB."""
    ticks = iter(
        [
            0.0,
            0.0,
            100.0,
            101.5,
            200.0,
            202.0,
            202.0,
            202.25,
            300.0,
            310.0,
            310.0,
            320.0,
            7.0,
            8.0,
            9.0,
        ]
    )  # the first when the recorder begins, the last two when it writes
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(
        metrics.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20)
    )
    record = recorder(tmp_path)
    with record.clock("step"):
        for phase in ("generate", "generate", "reward_wait", "logprobs"):
            with record.clock(phase):
                pass
        with record.clock("update"):
            pass
    record.write(RECORD)
    record.write(RECORD | {"step": 4})
    record.close()
    first, second = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = dict(
        seconds_step=7.0,
        seconds_generate=3.5,
        seconds_reward_wait=0.25,
        seconds_logprobs=10.0,
        seconds_update=10.0,
        seconds_eval=None,
        tokens_per_second=42 / 3.5,
        memory_peak_gib=3.0,
    )
    assert {name: first[name] for name in expected} == expected
    assert all(second[name] is None for name in expected if name != "memory_peak_gib")


def test_memory_of_a_gpu(tmp_path, monkeypatch):
    """What is in use on the device at the end of a phase, a vLLM engine's own allocations included: here 30, then 50, then 20 GiB of 80."""
    free = iter([50 << 30, 30 << 30, 60 << 30])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 80 << 30))
    record = Recorder(
        Config(out=str(tmp_path)), SimpleNamespace(first=True, device=torch.device("cuda"))
    )
    for phase in ("generate", "update", "save"):
        with record.clock(phase):
            pass
    record.write(RECORD)
    record.close()
    assert strict((tmp_path / "metrics.jsonl").read_text())["memory_peak_gib"] == 50


def test_console_line():
    empty = dict.fromkeys(METRICS)
    line = (
        empty
        | RECORD
        | dict(
            accuracy=0.25,
            kl_base=0.01234,
            ratio_mean_history=1.5,
            entropy=0.75,
            grad_norm=2.0,
            gap_mean=1.25e-6,
            seconds_step=3.5,
        )
    )
    shown = console_line(line, 9)
    for part in (
        "step    3/9",
        "mixed",
        "rollouts     12",
        "accuracy 0.250",
        "length   10.5",
        "kl  0.0123",
        "ratio 1.5000",
        "entropy  0.750",
        "grad   2.000",
        "3.50 s",
    ):
        assert part in shown
    without = console_line(line | dict(ratio_mean_history=None, kl_base=None, eval_accuracy=0.5), 9)
    assert without.endswith(" | eval 0.500") and len(without) == len(shown) + len(
        " | eval 0.500"
    )  # columns stay
    start = empty | dict(step=0, phase="evaluation", total_rollouts=0, eval_accuracy=0.125)
    assert console_line(start, 9).endswith("| eval 0.125")
    assert console_line(line, 9, 3 * 3600 + 5 * 60 + 7).endswith(
        "3.50 s eta 3:05:07"
    ) and "eta" not in console_line(line, 9, 0.0)


def test_time_that_is_left(tmp_path, monkeypatch, capsys):
    """Steps that end at 10, 16 and 30 s: 10 s a step on the mean, 14 the longest; the process is 100 s older than its recorder."""
    clock = iter([0.0, 10.0, 16.0, 30.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "STARTED", -100.0)
    cfg = SimpleNamespace(out=tmp_path, steps=5, tensorboard=False, wandb=False, max_hours=0.0)
    recorder = Recorder(cfg, FIRST)
    for step in (1, 2, 3):
        recorder.write(RECORD | dict(step=step, eval_accuracy=None))
    assert [line.rpartition("eta ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "0:00:40",
        "0:00:24",
        "0:00:20",
    ]
    monkeypatch.setattr(metrics, "gather", lambda ours: [ours])
    assert recorder.stop(3) is None  # no limit: the clock is not even read
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 30.0)
    for seconds, late in ((144.1, False), (143.9, True)):
        cfg.max_hours = seconds / 3600
        assert bool(recorder.stop(3)) == faults.Here.leaving == late
    assert (
        "--max_hours" in recorder.stop(3) and recorder.stop(5) is None and faults.Here.leaving
    )  # the last step ends the run anyway
    monkeypatch.setattr(metrics, "gather", lambda ours: [(None, not ours[1]), ours])
    assert recorder.stop(3) is None and not faults.Here.leaving  # rank 0 decides
    monkeypatch.setattr(metrics, "gather", lambda ours: [ours, ("SIGTERM", False)])
    assert recorder.stop(3) == "SIGTERM"  # whichever rank it came to
    recorder.close()


def test_best_evaluation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.best_evaluation(path) == -math.inf
    path.write_text('{"step": 0, "eval_accuracy": 0.9}\n{"step": 1, "eval_accuracy": null}\n')
    assert (
        metrics.best_evaluation(path) == -math.inf
    )  # what was there before training is not the run's
    path.write_text(
        path.read_text() + '{"step": 2, "eval_accuracy": 0.4}\n{"step": 3, "eval_accuracy": 0.3}\n'
    )
    assert metrics.best_evaluation(path) == 0.4


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 0, "x": null}\n',
        '{"step": 1}\n',
        '{"step": 2, "text": "ü\\u2028"}\n',
        '{"step": 3}\n',
        '{"step": 2}\n',
        '{"step": 1',
    ]
    for last, kept in ((2, [0, 1, 2, 4]), (0, [0]), (3, [0, 1, 2, 3, 4]), (-1, [])):
        path.write_text("".join(lines), encoding="utf-8")
        truncate(path, last)
        assert path.read_text(encoding="utf-8") == "".join(lines[i] for i in kept)
    kept = b'{"step": 1}\n'
    path.write_bytes(
        kept
        + b"\0\0\0\n\xff\xfe\n[1]\n3\n{}\n"
        + b"[" * 100_000
        + b'\n{"step": "2"}\n{"step": '
        + b"9" * 5000
        + b"}\n"
    )
    truncate(path, 5)  # what a machine may leave that went down while it wrote
    assert path.read_bytes() == kept
    path.write_text('{"step": 1}\n{"step": 2}')  # complete JSON, but the line is not
    truncate(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    truncate(tmp_path / "missing.jsonl", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# The batch by hand. Ages 0, 0, 1, 2 at version 5 (step 6); token ids 10 to 17, one log-prob each.

VERSION, WINDOW = 5, 2
#          token: new policy, pi_k,   behaviour, base,  precedent, entropy, advantage
TOKENS = {
    10: (
        -0.50,
        -1.00,
        -1.00,
        -0.90,
        -1.10,
        0.30,
        1.0,
    ),  # fresh, r = e^0.5 > 1.2, A > 0: clipped high
    11: (
        -2.60,
        -2.00,
        -2.00,
        -1.00,
        -2.10,
        0.10,
        -1.0,
    ),  # fresh, r = e^-0.6 < 0.8, A < 0: clipped low
    12: (-0.45, -0.50, -0.50, -0.70, -0.40, 0.70, 2.0),  # fresh, inside
    13: (
        -1.50,
        -1.00,
        -1.00,
        -1.40,
        -1.20,
        1.10,
        0.5,
    ),  # fresh, r = e^-0.5 < 0.8, but A > 0: not clipped
    14: (
        -1.00,
        -1.10,
        -1.60,
        -1.30,
        -1.60,
        0.20,
        1.0,
    ),  # age 1, r = e^0.6 = 1.82 < c + 0.2, c = e^0.5: inside
    15: (
        -0.30,
        -0.90,
        -0.20,
        -0.80,
        -0.20,
        0.50,
        0.7,
    ),  # age 1, r = e^-0.1 = 0.90 > c + 0.2, c = e^-0.7: high
    16: (
        -2.00,
        -1.50,
        -1.70,
        -1.00,
        -1.60,
        0.90,
        -0.3,
    ),  # age 2, r = e^-0.3 = 0.74 < c - 0.2, c = e^0.2: low
    17: (-0.80, -0.85, -1.00, -0.75, -0.95, 0.40, -1.5),
}  # age 2, c = e^0.15, r = e^0.2: inside
NEW, OLD, BEHAVIOR, BASE, PREV, ENTROPY, ADVANTAGE = range(7)
VALUES = {
    10: 0.2,
    11: 0.3,
    12: 0.6,
    13: 0.1,
    14: 0.5,
    15: 0.4,
    16: 0.7,
    17: 0.9,
}  # the critic as it was
NOW = {10: 0.9, 11: 0.1, 12: 0.6, 13: 0.0, 14: 1.2, 15: 0.8, 16: 0.2, 17: 0.4}  # the critic now
RETURNS = {10: 1.0, 11: 0.8, 12: 1.0, 13: 0.0, 14: 0.9, 15: 1.0, 16: 0.1, 17: 0.0}


def sample(version, tokens, reward, prompt_index, **more):
    """Tokens (a list of ids) with everything that the loop has put beside them by step 6."""
    columns = dict(
        logp_old=OLD, logp_behavior=BEHAVIOR, logp_base=BASE, logp_prev=PREV, advantages=ADVANTAGE
    )
    return {
        name: torch.tensor([TOKENS[t][column] for t in tokens]) for name, column in columns.items()
    } | dict(
        version=version,
        prompt=torch.tensor([3] * (prompt_index % 3 + 1)),
        response=torch.tensor(tokens),
        reward=reward,
        prompt_index=prompt_index,
        logp_sampler=torch.tensor([TOKENS[t][OLD] + SAMPLER for t in tokens]),
        values=torch.tensor([VALUES[t] for t in tokens]),
        returns=torch.tensor([RETURNS[t] for t in tokens]),
        **more,
    )


def batch_by_hand():
    fresh = [
        sample(5, [10, 11, 12], 1.0, 0, truncated=False, reason=None, reflects=True),
        sample(5, [13], 0.0, 1, truncated=True, reason="truncated", reflects=False),
    ]
    return fresh, [sample(4, [14, 15], 1.0, 2), sample(3, [16, 17], 0.0, 3)]


class Table(torch.nn.Module):
    """A policy that is a table of log-probs by token id, or a critic that is a table of values."""

    def __init__(self, *tables):
        super().__init__()
        self.tables = torch.nn.ParameterList(torch.zeros(18) for _ in tables)
        for parameter, table in zip(self.tables, tables):
            parameter.data[list(table)] = torch.tensor(list(table.values()))

    def forward(self, ids, where, tokens, mask):
        rows = torch.arange(len(ids))[:, None].expand_as(where)
        assert (
            ids[rows[mask], where[mask] + 1] == tokens[mask]
        ).all()  # logits are read one before their token
        return tuple(torch.where(mask, table[tokens], 0.0) for table in self.tables)


class Fake:
    """What update() needs of a Learner; micro-batches are given, one of them empty."""

    def __init__(self, module, norms=(0.0,), micro=None):
        self.module, self.ranks, self.norms, self.micro, self.scales = (
            module,
            FIRST,
            iter(norms),
            micro,
            [],
        )

    def my_micro_batches(self, samples):
        return self.micro or [[i] for i in range(len(samples))] + [[]]

    def backward(self, loss):
        loss.backward()

    def step(self, scale):
        self.scales.append(scale)
        return next(self.norms)


def learners(**norms):
    policy = Table(
        {t: row[NEW] for t, row in TOKENS.items()}, {t: row[ENTROPY] for t, row in TOKENS.items()}
    )
    critic = Fake(Table(NOW), norms.get("critic", (0.0,)))
    return {"policy": Fake(policy, norms.get("policy", (0.0,))), "critic": critic}


def config(flags=""):
    return parse(f"--model m --window 2 --beta 0.5 --entropy 0.25 --group_size 1 {flags}".split())


def k3(t, ref):
    x = TOKENS[t][NEW] - TOKENS[t][ref]
    return math.exp(-x) + x - 1


def ratio(t):
    return math.exp(TOKENS[t][NEW] - TOKENS[t][BEHAVIOR])


def ppg(t):
    r, c, a = ratio(t), math.exp(TOKENS[t][OLD] - TOKENS[t][BEHAVIOR]), TOKENS[t][ADVANTAGE]
    return -min(r * a, min(max(r, c - 0.2), c + 0.2) * a)


SAMPLER = -0.01  # what the engine reported, less log pi_k


def tis(t, cap):
    """Of the policy that wrote the token: on history (14 to 17) pi_k is not in it."""
    return min(math.exp(TOKENS[t][BEHAVIOR] - (TOKENS[t][OLD] + SAMPLER)), cap)


def value_loss(t):
    clipped = min(max(NOW[t], VALUES[t] - 0.5), VALUES[t] + 0.5)
    return max((NOW[t] - RETURNS[t]) ** 2, (clipped - RETURNS[t]) ** 2) / 2


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def by_hand():
    """The record of step 6 of the batch above, in plain Python: independent of train.py, loss.py and torch."""
    weights = [math.exp(TOKENS[t][OLD] - TOKENS[t][BEHAVIOR]) for t in (14, 15, 16, 17)]
    errors = [RETURNS[t] - VALUES[t] for t in TOKENS]
    return dict(
        step=6,
        version=5,
        phase="mixed",
        fresh_rollouts=2,
        total_rollouts=6 * 2,
        accuracy=0.5,
        reward=0.5,
        length_mean=2.0,
        length_max=3,
        truncated_share=0.5,
        unjudged_share=0.0,
        reflection_rate=0.5,
        no_box_share=0.0,
        no_think_share=0.0,
        parse_failure_share=0.0,
        timeout_share=0.0,
        crash_share=0.0,
        staleness=[2, 1, 1],
        kl_base=mean(k3(t, BASE) for t in TOKENS),
        kl_prev=mean(k3(t, PREV) for t in TOKENS),
        ratio_mean_fresh=mean(ratio(t) for t in (10, 11, 12, 13)),
        ratio_max_fresh=math.exp(0.5),
        ratio_mean_history=mean(ratio(t) for t in (14, 15, 16, 17)),
        ratio_max_history=math.exp(0.6),
        clip_low_share=2 / 8,
        clip_high_share=2 / 8,
        ess=sum(weights) ** 2 / (4 * sum(w * w for w in weights)),
        entropy=mean(row[ENTROPY] for row in TOKENS.values()),
        policy_loss=mean(ppg(t) * tis(t, CAP) for t in TOKENS),
        tis_mean=mean(tis(t, CAP) for t in TOKENS),
        tis_min=tis(14, CAP),
        tis_truncated_share=1 / 8,
        value_loss=mean(map(value_loss, TOKENS)),
        grad_norm=2.0,
        critic_grad_norm=5.0,
        gap_mean=0.02,
        gap_max=0.05,
        explained_variance=1 - statistics.variance(errors) / statistics.variance(RETURNS.values()),
        **{"lambda": 0.7},
    )


CAP = 1.5  # token 15 has e^0.71
PLAN = Plan(6, "mixed", 2, 2, 1, 2)


def measured(cfg, minibatches, **norms):
    """The record of the batch by hand after one update on each of `minibatches` (lists of its indices)."""
    (fresh, history), meter, made = batch_by_hand(), Meter(), learners(**norms)
    for chosen in minibatches:
        train.update(made, [(fresh + history)[i] for i in chosen], 0.7, VERSION, 0.5, meter, cfg)
    gap = torch.tensor([0.01, 0.05, 0.01, 0.01])
    return step_metrics(6, PLAN, 0.7, fresh, history, fresh + history, gap, meter, cfg)


def test_every_metric_of_a_step_by_hand():
    cfg = config(f"--prompts 4 --p 0.5 --tis {CAP}")
    expected = by_hand()
    assert (
        len({expected[name] for name in expected if name not in ("staleness", "phase")}) > 15
    )  # all distinct
    wanted = {
        name: pytest.approx(x, rel=1e-5) if isinstance(x, float) else x
        for name, x in expected.items()
    }
    assert measured(cfg, [[0, 1, 2, 3]], policy=(2.0,), critic=(5.0,)) == wanted
    assert (
        measured(cfg, [[0, 2], [3, 1]], policy=(1.5, 2.5), critic=(4.0, 6.0)) == wanted
    )  # the mean is over tokens
    elsewhere = {
        "epoch",
        "lr",
        "skipped_updates",
        "tokens_per_second",
        "memory_peak_gib",
    }  # test_train.py, test_replay.py, the clock's test above
    assert set(METRICS) - set(expected) == elsewhere | {
        n for n in METRICS if n.startswith(("eval_", "seconds_"))
    }


def test_what_does_not_exist_is_null():
    fresh, _ = batch_by_hand()
    for one in fresh:
        one.pop("logp_base"), one.pop("logp_prev")
    cfg, meter, made = config("--algo grpo --beta 0 --group_size 2"), Meter(), learners()
    made.pop("critic")
    train.update(made, fresh, 1.0, VERSION, 1.0, meter, cfg)
    record = step_metrics(
        6, Plan(6, "on-policy", 2, 0, 1, 1), 1.0, fresh, [], fresh, torch.zeros(4), meter, cfg
    )
    absent = (
        "kl_base",
        "kl_prev",
        "ratio_mean_history",
        "ratio_max_history",
        "ess",
        "explained_variance",
        "value_loss",
        "critic_grad_norm",
        "lambda",
        "tis_mean",
        "tis_min",
        "tis_truncated_share",
    )
    assert {name: record.get(name) for name in absent} == dict.fromkeys(absent)
    assert record["ratio_mean_fresh"] == pytest.approx(mean(ratio(t) for t in (10, 11, 12, 13)))
    assert record["staleness"] == [2, 0, 0]


@pytest.mark.parametrize("returns, expected", [([0.5, 0.5], None), ([0.0, 1.0], 1 - 0.125 / 0.5)])
def test_explained_variance(returns, expected):
    """Values 0.25 and 0.75: errors of -0.25 and 0.25 about returns of 0 and 1; constant returns explain nothing."""
    fresh, meter = batch_by_hand()[0], Meter()
    meter.add("policy_grad_norm", torch.tensor(1.0))
    for one, value, target in zip(fresh, (0.25, 0.75), returns):
        one.update(values=torch.tensor([value]), returns=torch.tensor([target]))
    record = step_metrics(6, PLAN, 1.0, fresh, [], fresh, torch.zeros(1), meter, config())
    assert record["explained_variance"] == expected


def test_rewards_and_reasons_of_a_step():
    """reward counts history, accuracy and reasons do not; unjudged is neither right, wrong nor truncated."""
    (fresh, history), meter = batch_by_hand(), Meter()
    meter.add("policy_grad_norm", torch.tensor(1.0))
    reasons = [None, "wrong", "no_box", "timeout", "truncated"]
    fresh = [
        fresh[0]
        | dict(reason=r, reward=float(r is None), truncated=r == "truncated", reflects=r == "wrong")
        for r in reasons
    ]
    history = [one | dict(reward=1.0) for one in history + history[:1]]
    record = step_metrics(
        6, PLAN, 1.0, fresh, history, fresh + history, torch.zeros(1), meter, config()
    )
    names = (
        "accuracy",
        "reward",
        "unjudged_share",
        "truncated_share",
        "reflection_rate",
        "staleness",
    )
    assert [record[name] for name in names] == [1 / 5, 4 / 8, 2 / 5, 1 / 5, 1 / 5, [5, 2, 1]]
    assert [
        record[f"{reason}_share"]
        for reason in ("no_box", "no_think", "parse_failure", "timeout", "crash")
    ] == [1 / 5, 0, 0, 1 / 5, 0]


def test_verdicts_are_collected_in_order():
    mine = [
        dict(truncated=False, response="why"),
        dict(truncated=True, response="wait"),
        dict(truncated=False, response="so"),
        dict(truncated=False, response="7"),
    ]
    verdicts = [Verdict(1.0, None), Verdict(0.0, "wrong"), Verdict(0.0, "no_box")]
    assert train.collect(mine, verdicts) == [
        [(1.0, None, True), (0.0, "truncated", True), (0.0, "wrong", False), (0.0, "no_box", False)]
    ]


# One update: the loss and its gradient by hand.


def gradients(cfg, samples, lam=0.7, micro=None):
    made = learners()
    for learner in made.values():
        learner.micro = micro
    train.update(made, samples, lam, VERSION, 1.0, Meter(), cfg)
    policy, critic = made["policy"].module.tables, made["critic"].module.tables[0]
    return policy[0].grad, policy[1].grad, critic.grad


def total_loss(logp, lam, cfg, weight):
    """The scalar that update() descends, in plain Python; logp: token -> new log-prob, weight: token -> its share."""
    loss = 0.0
    for t, row in TOKENS.items():
        r, c = math.exp(logp[t] - row[BEHAVIOR]), math.exp(row[OLD] - row[BEHAVIOR])
        surrogate = -min(
            r * row[ADVANTAGE], min(max(r, c - cfg.clip_low), c + cfg.clip_high) * row[ADVANTAGE]
        )
        x, y = logp[t] - row[BASE], logp[t] - row[PREV]
        divergence = lam * (math.exp(-x) + x - 1) + (1 - lam) * (math.exp(-y) + y - 1)
        surrogate *= tis(t, cfg.tis) if cfg.tis else 1
        loss += weight[t] * (surrogate + cfg.beta * divergence - cfg.entropy * row[ENTROPY])
    return loss


@pytest.mark.parametrize(
    "aggregate, weight",
    [
        ("token", dict.fromkeys(TOKENS, 1 / 8)),
        ("sequence", {t: 1 / 4 / length for t, length in zip(TOKENS, (3, 3, 3, 1, 2, 2, 2, 2))}),
        ("constant", dict.fromkeys(TOKENS, 1 / (4 * 50))),
    ],
)
@pytest.mark.parametrize(
    "micro, cap", [([[0, 1, 2, 3]], 0), ([[2], [3, 0], [1], []], 0), ([[2], [3, 0], [1], []], CAP)]
)
def test_gradient_of_an_update(aggregate, weight, micro, cap):
    """Finite differences of the loss by hand, for each way to aggregate, whatever the micro-batches, with and without TIS."""
    cfg, samples = (
        config(f"--aggregate {aggregate} --max_response 50 --clip_high 0.3 --tis {cap}"),
        sum(batch_by_hand(), []),
    )
    by_logp, by_entropy, _ = gradients(cfg, samples, micro=micro)
    logp, step = {t: row[NEW] for t, row in TOKENS.items()}, 1e-5
    for t in TOKENS:
        above, below = (
            total_loss(logp | {t: logp[t] + d}, 0.7, cfg, weight) for d in (step, -step)
        )
        assert by_logp[t].item() == pytest.approx(
            (above - below) / (2 * step), rel=1e-4, abs=1e-7
        ), t
        assert by_entropy[t].item() == pytest.approx(-0.25 * weight[t])
    assert by_logp[:10].abs().sum() == 0


def test_gradient_of_the_critic():
    """(V - R) / 8 where the larger branch is the unclipped one, 0 where the clipped one is larger and flat."""
    _, _, grad = gradients(
        config("--aggregate sequence"), sum(batch_by_hand(), [])
    )  # the critic's goes by tokens
    clipped = {t: min(max(NOW[t], VALUES[t] - 0.5), VALUES[t] + 0.5) for t in TOKENS}
    flat = [t for t in TOKENS if abs(clipped[t] - RETURNS[t]) > abs(NOW[t] - RETURNS[t])]
    assert flat == [10]  # 0.2 went to 0.9 on the way to 1: further than 0.5
    for t in TOKENS:
        assert grad[t].item() == pytest.approx(
            0 if t in flat else (NOW[t] - RETURNS[t]) / 8, abs=1e-7
        ), t


def test_the_samplers_log_probs_do_not_move_the_loss():
    plain, planted = sum(batch_by_hand(), []), sum(batch_by_hand(), [])
    for one in planted:
        one["logp_sampler"] = torch.randn(len(one["response"])) - 30
    for a, b in zip(gradients(config(), plain), gradients(config(), planted)):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_updates_take_the_scaled_learning_rate():
    made = learners(policy=(1.0,), critic=(1.0,))
    train.update(made, batch_by_hand()[0], 0.7, VERSION, 0.25, Meter(), config())
    assert made["policy"].scales == made["critic"].scales == [0.25]


# Step 4: nothing is computed twice.


class Frozen:
    """A policy that answers with a number for itself and for each snapshot, and remembers what it was asked about."""

    NUMBER = {"live": -1.0, "base snapshot": -2.0, "prev snapshot": -3.0}

    def __init__(self):
        self.now, self.asked = "live", []

    def predict(self, samples, progress):
        self.asked.append((self.now, [s["name"] for s in samples]))
        return [torch.full((len(s["response"]),), self.NUMBER[self.now]) for s in samples]

    @contextlib.contextmanager
    def swapped(self, snapshot):
        assert self.now == "live"
        self.now = snapshot
        yield
        self.now = "live"


BOTH = dict(base="base snapshot", prev="prev snapshot")


def step_4(version, ages, lam, snapshots, flags="", base=-7.0):
    """Samples of the given ages through frozen_log_probs -> (what the policy was asked, samples by name)."""
    batch = []
    for i, age in enumerate(ages):
        one = dict(
            name=f"{'abcdef'[i]}{age}",
            version=version - age,
            response=torch.zeros(i + 1),
            logp_sampler=torch.full((i + 1,), -9.0),
        )
        if age:  # what was stored with it
            one["logp_behavior"] = torch.full((i + 1,), -5.0 - age)
            if base:
                one["logp_base"] = torch.full((i + 1,), base)
        batch.append(one)
    policy = Frozen()
    train.frozen_log_probs(
        policy, batch, version, lam, snapshots, config(flags), lambda items, **_: items
    )
    values = {}
    for one in batch:
        known = {
            name: value
            for name, value in one.items()
            if name.startswith("logp_") and name != "logp_sampler"
        }
        assert {len(value) for value in known.values()} == {len(one["response"])}
        values[one["name"]] = {name: value[0].item() for name, value in known.items()}
    return policy.asked, values


def test_what_is_known_is_not_computed_again():
    asked, values = step_4(5, (0, 1, 2, 0), 0.9, BOTH)
    assert asked == [
        ("live", ["a0", "b1", "c2", "d0"]),
        ("base snapshot", ["a0", "d0"]),
        ("prev snapshot", ["a0", "c2", "d0"]),
    ]
    fresh = dict(logp_old=-1.0, logp_behavior=-1.0, logp_base=-2.0, logp_prev=-3.0)
    assert values == {
        "a0": fresh,
        "d0": fresh,
        "b1": dict(logp_old=-1.0, logp_behavior=-6.0, logp_base=-7.0, logp_prev=-6.0),
        "c2": dict(logp_old=-1.0, logp_behavior=-7.0, logp_base=-7.0, logp_prev=-3.0),
    }


def test_no_precedent_pass_where_it_has_no_weight():
    asked, values = step_4(5, (0, 1), 1.0, BOTH)
    assert asked == [("live", ["a0", "b1"]), ("base snapshot", ["a0"])]
    assert all("logp_prev" not in one for one in values.values())


def test_anchor_old_is_the_policy_itself():
    asked, values = step_4(5, (0, 1, 2), 0.5, dict(base="base snapshot"), "--anchor old")
    assert asked == [("live", ["a0", "b1", "c2"]), ("base snapshot", ["a0"])]
    assert [one["logp_prev"] for one in values.values()] == [-1.0] * 3


def test_the_first_step_is_base_and_precedent():
    asked, values = step_4(0, (0, 0), 0.9, dict(base="base snapshot"))
    assert asked == [("live", ["a0", "b0"])]
    assert values["a0"] == dict.fromkeys(
        ("logp_old", "logp_behavior", "logp_base", "logp_prev"), -1.0
    )


@pytest.mark.parametrize(
    "version, computed", [(0, False), (2, True), (3, False), (4, True), (5, True)]
)
def test_base_is_the_policy_at_the_start_and_at_reincarnation_only(version, computed):
    asked, values = step_4(version, (0,), 1.0, BOTH, "--reincarnate 3")
    assert asked == [("live", ["a0"])] + ([("base snapshot", ["a0"])] if computed else [])
    assert values["a0"]["logp_base"] == (-2.0 if computed else -1.0)


def test_version_0_is_the_base_without_reincarnation():
    assert step_4(0, (0,), 1.0, BOTH, "--reincarnate 0")[0] == [("live", ["a0"])]
    assert step_4(1, (0,), 1.0, BOTH, "--reincarnate 0")[0] == [
        ("live", ["a0"]),
        ("base snapshot", ["a0"]),
    ]


def test_without_kl_only_the_policy_is_asked():
    asked, values = step_4(5, (0, 1), 0.9, {}, "--beta 0", base=None)
    assert asked == [("live", ["a0", "b1"])] and set(values["b1"]) == {"logp_old", "logp_behavior"}


# Step 5: advantages.


def test_group_advantages_of_history_are_the_stored_ones():
    """Fresh groups are normalised by themselves; a past group of the same prompt keeps what it was given."""

    def one(reward, index, **more):
        return dict(reward=reward, prompt_index=index, logp_old=torch.zeros(2), **more)

    fresh = [
        one(1.0, 8),
        one(0.0, 8),
        one(0.0, 8),
        one(0.0, 8),
        one(1.0, 9),
        one(1.0, 9),
        one(0.0, 9),
        one(0.0, 9),
    ]
    past = [one(1.0, 3, advantage=0.25), one(1.0, 3, advantage=-0.5), one(0.0, 8, advantage=9.0)]
    batch = fresh[:4] + fresh[4:] + past
    train.batch_advantages(batch, config("--algo grpo --group_size 4"))
    expected = [0.75 / 0.5, -0.25 / 0.5, -0.25 / 0.5, -0.25 / 0.5]  # mean 1/4, unbiased std 1/2
    expected += [
        0.5 / math.sqrt(1 / 3),
        0.5 / math.sqrt(1 / 3),
        -0.5 / math.sqrt(1 / 3),
        -0.5 / math.sqrt(1 / 3),
    ]
    assert [s["advantage"] for s in batch] == pytest.approx(expected + [0.25, -0.5, 9.0], rel=1e-5)
    for s in batch:
        assert s["advantages"].tolist() == pytest.approx([s["advantage"]] * 2)


def ppo_batch():
    """Two responses: values (0.2, 0.5) and (0.4,), rewards 1 and 0 at the last token; the second is history."""

    def one(values, reward, version, behaviour):
        n = len(values)
        return dict(
            values=torch.tensor(values),
            reward=reward,
            version=version,
            prompt=torch.tensor([1]),
            response=torch.arange(n),
            logp_old=torch.full((n,), -1.0),
            logp_behavior=torch.tensor(behaviour),
        )

    return [one([0.2, 0.5], 1.0, 5, [-1.0, -1.0]), one([0.4], 0.0, 4, [-1.0])]


def whitened(numbers):
    centre, spread = statistics.mean(numbers), statistics.stdev(numbers)
    return [(x - centre) / spread for x in numbers]


def test_ppo_advantages_by_hand():
    """gamma = lambda = 1: A = R - V, returns = R; whitened over all tokens, fresh and history together."""
    batch = ppo_batch()
    train.batch_advantages(batch, config())
    expected = whitened([1 - 0.2, 1 - 0.5, 0 - 0.4])
    assert torch.cat([s["advantages"] for s in batch]).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.cat([s["returns"] for s in batch]).tolist() == pytest.approx(
        [1.0, 1.0, 0.0], abs=1e-6
    )


def test_ppo_advantages_with_discount():
    """gamma 0.5, lambda 0.8: delta = (0 + 0.5 0.5 - 0.2, 1 - 0.5, -0.4), A_0 = 0.05 + 0.4 0.5."""
    batch = ppo_batch()
    train.batch_advantages(batch, config("--gamma 0.5 --gae_lambda 0.8"))
    assert torch.cat([s["advantages"] for s in batch]).tolist() == pytest.approx(
        whitened([0.25, 0.5, -0.4]), rel=1e-5
    )
    assert torch.cat([s["returns"] for s in batch]).tolist() == pytest.approx(
        [0.45, 1.0, 0.0], abs=1e-6
    )


def test_vtrace_for_history():
    """Where pi_k would go half as often (c = 1/2 at the second token), what follows counts half; GAE does not look."""

    def two(history_advantage):
        batch = ppo_batch()
        batch[0]["logp_behavior"] = torch.tensor([-1.0, -1.0 + math.log(2)])
        train.batch_advantages(batch, config(f"--history_advantage {history_advantage}"))
        return torch.cat([s["advantages"] for s in batch]).tolist()

    assert two("vtrace") == pytest.approx(whitened([0.3 + 0.5 * 0.5, 0.5, -0.4]), rel=1e-5)
    assert two("gae") == pytest.approx(whitened([0.8, 0.5, -0.4]), rel=1e-5)


# Step 6: minibatches.


def dealt(n_groups, group_size, minibatch, passes, seed=0, step=3):
    cfg = Config(group_size=group_size, minibatch=minibatch, seed=seed)
    batch = [dict(group=g, i=i) for g in range(n_groups) for i in range(group_size)]
    return [
        [(s["group"], s["i"]) for s in part] for part in train.minibatches(batch, passes, cfg, step)
    ]


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
        assert sorted(sum(mine, [])) == [(g, i) for g in range(n_groups) for i in range(group_size)]
        sizes = [len(part) for part in mine]
        assert (
            sizes[:-1] == [minibatch * group_size] * (a_pass - 1)
            and 0 < sizes[-1] <= minibatch * group_size
        )
    for part in parts:  # whole groups, their members side by side
        assert [group for group, _ in part] == [
            group for group, _ in part[::group_size] for _ in range(group_size)
        ]


def test_minibatches_depend_on_seed_and_step_only():
    first = dealt(9, 2, 4, 2)
    assert first == dealt(9, 2, 4, 2)
    assert first[:3] != first[3:]  # the second pass has an order of its own
    others = [first, dealt(9, 2, 4, 2, seed=1), dealt(9, 2, 4, 2, step=4)]
    assert all(a != b for i, a in enumerate(others) for b in others[:i])
    state = torch.random.get_rng_state()
    dealt(9, 2, 4, 2)
    assert torch.equal(state, torch.random.get_rng_state())

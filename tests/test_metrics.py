"""What a run writes down: the meter, the files, and every metric of a step worked out by hand."""

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

import train
from buffer import Batch
from by_hand import (
    ALONE,
    TOKENS,
    batch_by_hand,
    k3,
    learners,
    objective_of,
    plan,
    ratio,
    sample,
    settings,
    value_loss_of,
)
from conftest import metrics_of
from infra import metrics
from infra.metrics import METRICS, Meter, Recorder, console_line, step_metrics, truncate
from infra.ranks import Ranks
from methods import Method


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(metrics, "gather", lambda value: [value])


# ---- the meter


def test_meter_by_hand():
    meter = Meter()
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, 1e9, math.inf]])
    meter.add("x", values, torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    meter.add("x", torch.tensor([-5.0]))
    meter.add("x", torch.tensor([[7.0]]), torch.tensor([[False]]))  # an empty micro-batch
    meter.add("y", torch.tensor([[-3.0, -2.0]]), torch.tensor([[True, True]]))
    meter.add("nothing", torch.zeros(2, 2), torch.zeros(2, 2).bool())
    assert meter.gathered() == ({"x": 2 / 4, "y": -2.5}, {"x": 4.0, "y": -2.0})


def test_meter_weighs_tokens_over_ranks(monkeypatch):
    """Means of all ranks' tokens, not of their means; a name that one rank alone has seen."""
    ours, theirs = Meter(), {"x": [30.0, 1, 30.0], "z": [4.0, 2, 3.0]}
    ours.add("x", torch.tensor([1.0, 2.0, 6.0]))
    monkeypatch.setattr(metrics, "gather", lambda seen: [seen, theirs, {}])
    assert ours.gathered() == ({"x": 39 / 4, "z": 2.0}, {"x": 30.0, "z": 3.0})


def test_meter_leaves_out_what_is_not_finite():
    """An update that was skipped must not make the step's means null."""
    meter = Meter()
    for norm in (2.0, math.inf, math.nan, 4.0):
        meter.add("norm", torch.tensor(norm))
    meter.add("skipped alone", torch.tensor([math.nan]))
    assert meter.gathered() == ({"norm": 3.0}, {"norm": 4.0})


def test_meter_sums_in_double():
    meter = Meter()
    meter.add("x", torch.tensor([2.0**26, 1.0]))
    meter.add("x", torch.tensor([1.0]))
    assert meter.gathered()[0]["x"] == (2**26 + 2) / 3


# ---- the recorder

TOKENIZER = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
TASK = SimpleNamespace(tokenizer=TOKENIZER, problems=[{}] * 4)
RECORD = dict(step=3, version=2, phase="mixed", fresh_rollouts=4, total_rollouts=12)
RECORD |= dict(length_mean=10.5, staleness=[4, 2, 0])


def recorder(folder, done=0, ranks=ALONE, **values):
    cfg = settings(out=str(folder), fingerprint="f", steps=9, **values)
    return Recorder(cfg, done, TASK, ranks)


def test_every_key_in_strict_json(tmp_path, capsys):
    record = recorder(tmp_path)
    odd = dict(entropy=math.nan, grad_norm=math.inf, gap_max=-math.inf, kl_prev=None, own=0.5)
    record.write(RECORD | odd)
    record.write(RECORD | {"step": 4})
    record.close()
    first, second = metrics_of(tmp_path)
    assert list(first) == [*METRICS, "own"] and list(second) == list(METRICS)
    known = {name for name, value in first.items() if value is not None}
    assert known == RECORD.keys() | {"memory_peak_gib", "own"}
    assert {name: first[name] for name in RECORD} == RECORD
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_config_json_and_what_is_cut_on_resume(tmp_path):
    """A resumed run drops the lines after its checkpoint and keeps every command line."""
    first = recorder(tmp_path, lr=0.5)
    for step in (1, 2, 3):
        samples = [sample(5, [10, 11], 1.0, i) for i in range(6)]
        first.write(RECORD | {"step": step}, samples)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["values"]["lr"] == 0.5 and kept["fingerprint"] == "f" and len(kept["argv"]) == 1
    assert not {"given", "fingerprint"} & kept["values"].keys()
    again = recorder(tmp_path, done=2)
    again.write(RECORD | {"step": 3})
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    assert len(json.loads((tmp_path / "config.json").read_text())["argv"]) == 2
    shown = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert [line["step"] for line in shown] == [1] * 4 + [2] * 4  # four a step, for reading
    text = dict(prompt="3", response="10 11", answer="7")
    assert shown[0] == text | dict(step=1, reward=1.0, reason=None)


def test_other_ranks_write_nothing(tmp_path, capsys):
    record = recorder(tmp_path, ranks=Ranks(1, 2, 2, torch.device("cpu")))
    with record.clock("step"):
        pass
    record.write(RECORD)
    record.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and record.seconds == {}


def ticking(monkeypatch, *times):
    clock = iter(times)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))


def test_clock_and_machine_metrics(tmp_path, monkeypatch):
    """Phases add up within a step and start again at the next: 10.5 tokens x 4 in 1.5 + 2 s."""
    inner = (100.0, 101.5, 200.0, 202.0, 300.0, 310.0)
    ticking(monkeypatch, 0.0, 0.0, *inner, 7.0, 8.0, 9.0)
    record = recorder(tmp_path)
    with record.clock("step"):
        for phase in ("generate", "generate", "logprobs"):
            with record.clock(phase):
                pass
    record.write(RECORD)
    record.write(RECORD | {"step": 4})
    first, second = metrics_of(tmp_path)
    expected = dict(seconds_step=7.0, seconds_generate=3.5, seconds_logprobs=10.0)
    expected |= dict(seconds_eval=None, tokens_per_second=42 / 3.5)
    assert {name: first[name] for name in expected} == expected
    assert all(second[name] is None for name in expected)
    assert first["memory_peak_gib"] > 0


def test_memory_of_a_gpu(tmp_path, monkeypatch):
    """What is in use at the end of a phase, an engine's own included: 30, 50, then 20 GiB of 80."""
    free = iter([50 << 30, 30 << 30, 60 << 30])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 80 << 30))
    record = recorder(tmp_path, ranks=Ranks(0, 1, 1, torch.device("cuda")))
    for phase in ("generate", "update", "save"):
        with record.clock(phase):
            pass
    record.write(RECORD)
    assert metrics_of(tmp_path)[0]["memory_peak_gib"] == 50


def test_console_line():
    numbers = dict(accuracy=0.25, kl_base=0.01234, ratio_mean_history=1.5, seconds_step=3.5)
    line = dict.fromkeys(METRICS) | RECORD | numbers
    shown = console_line(line, 9)
    parts = "step    3/9|mixed|rollouts     12|accuracy 0.250|length   10.5|ratio 1.5000|3.50 s"
    assert [part for part in parts.split("|") if part not in shown] == []
    without = console_line(line | dict(ratio_mean_history=None, kl_base=None, eval_accuracy=0.5), 9)
    assert without.endswith(" | eval 0.500")
    assert len(without) == len(shown) + len(" | eval 0.500")  # columns stay
    start = dict.fromkeys(METRICS) | dict(step=0, phase="evaluation", total_rollouts=0)
    assert console_line(start | dict(eval_accuracy=0.125), 9).endswith("| eval 0.125")


def test_time_that_is_left(tmp_path, monkeypatch, capsys):
    """Steps that end at 10, 16 and 30 s: 10 s a step on the mean, 14 the longest."""
    ticking(monkeypatch, 0.0, 10.0, 16.0, 30.0)
    record = recorder(tmp_path)
    for step in (5, 6, 7):
        record.write(RECORD | dict(step=step))
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition("eta ")[2] for line in shown] == ["0:00:40", "0:00:24", "0:00:20"]
    assert record.longest == 14


def test_best_evaluation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_accuracy": 0.9}\n{"step": 1, "eval_accuracy": null}\n')
    assert metrics.best_evaluation(path) == -math.inf  # before training it is not the run's
    more = '{"step": 2, "eval_accuracy": 0.4}\n{"step": 3, "eval_accuracy": 0.3}\n'
    path.write_text(path.read_text() + more)
    assert metrics.best_evaluation(path) == 0.4


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "x": null}\n', '{"step": 1}\n', '{"step": 2, "text": "ü\\u2028"}\n']
    lines += ['{"step": 3}\n', '{"step": 2}\n', '{"step": 1']
    for last, kept in ((2, [0, 1, 2, 4]), (0, [0]), (3, [0, 1, 2, 3, 4]), (-1, [])):
        path.write_text("".join(lines), encoding="utf-8")
        truncate(path, last)
        assert path.read_text(encoding="utf-8") == "".join(lines[i] for i in kept)
    # what a machine may leave that went down while it wrote; last: complete JSON, not a line
    rubbish = b'\0\0\0\n\xff\xfe\n[1]\n3\n{}\n{"step": "2"}\n{"step": ' + b"9" * 5000 + b"}\n"
    path.write_bytes(b'{"step": 1}\n' + rubbish + b'{"step": 2}')
    truncate(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'


# ---- a step's metrics, in plain Python

FLAGS = "--model m --beta 0.5 --entropy 0.25 --prompts 4 --p 0.5 --lr 2e-6"
FLAGS += " --mismatch truncated --mismatch_high 1.5"


def over(tokens, fine):
    """The mean of fine(row of the table by hand)."""
    return statistics.fmean(fine(TOKENS[t]) for t in tokens)


def now_by_writer(one):
    return ratio(one.new, one.behavior)


def by_hand(cfg):
    """The record of step 6 of the batch by hand: independent of train.py, loss.py and torch."""
    fresh, history = (10, 11, 12, 13), (14, 15, 16, 17)
    w = [ratio(TOKENS[t].old, TOKENS[t].behavior) for t in history]
    returns = [one.returns for one in TOKENS.values()]
    errors = [one.returns - one.values for one in TOKENS.values()]
    return {
        **dict(step=6, version=5, phase="mixed", fresh_rollouts=2, total_rollouts=12, epoch=2.5),
        **dict(accuracy=0.5, reward=0.5, length_mean=2.0, length_max=3, truncated_share=0.5),
        **dict(unjudged_share=0.0, reflection_rate=0.5, no_box_share=0.0, no_think_share=0.0),
        **dict(parse_failure_share=0.0, timeout_share=0.0, crash_share=0.0, staleness=[2, 1, 1]),
        **dict(lr=5e-7, skipped_updates=1, clip_low_share=2 / 8, clip_high_share=2 / 8),
        "lambda": 0.7,
        "kl_base": over(TOKENS, lambda one: k3(one.new - one.base)),
        "kl_prev": over(TOKENS, lambda one: k3(one.new - one.prev)),
        "ratio_mean_fresh": over(fresh, now_by_writer),
        "ratio_max_fresh": math.exp(0.5),
        "ratio_mean_history": over(history, now_by_writer),
        "ratio_max_history": math.exp(0.6),
        "ess": sum(w) ** 2 / (4 * sum(x * x for x in w)),
        "entropy": over(TOKENS, lambda one: one.entropy),
        "policy_loss": statistics.fmean(objective_of(t, cfg) for t in TOKENS),
        "value_loss": statistics.fmean(map(value_loss_of, TOKENS)),
        "gap_mean": over(fresh, lambda one: abs(one.gap)),
        "gap_max": max(abs(TOKENS[t].gap) for t in fresh),
        "explained_variance": 1 - statistics.variance(errors) / statistics.variance(returns),
        # the functions' own, under their own names
        "mismatch_weight": over(TOKENS, lambda one: ratio(-one.gap, 0, high=1.5)),
        "ratio": over(TOKENS, now_by_writer),
        "centre": over(TOKENS, lambda one: ratio(one.old, one.behavior)),
    }


@pytest.mark.parametrize("micro", (None, [[0, 1, 2, 3]], [[2], [3, 0], [1], []]))
def test_every_metric_of_a_step(micro):
    cfg, meter, batch = settings(FLAGS), Meter(), batch_by_hand()
    meter.skipped, p = 1, plan(scale=0.25)
    norms = train.update(learners(cfg, micro), batch, [0, 1, 2, 3], Method(cfg), p, meter)
    found, expected = step_metrics(p, batch, meter, cfg, TASK), by_hand(cfg)
    expected |= dict(grad_norm=norms["policy"], critic_grad_norm=norms["critic"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert found[name] == near, name
    timed = {n for n in METRICS if n.startswith(("eval_", "seconds_", "memory_", "tokens_per"))}
    assert METRICS.keys() - found.keys() == timed


def test_what_does_not_exist_is_not_told():
    """No critic, no KL, no history."""
    cfg, meter = settings("--model m --algo grpo --beta 0 --group_size 2"), Meter()
    batch = batch_by_hand()
    fresh = Batch([batch.samples[:2]], [])
    for name in ("logp_old", "advantages"):
        fresh[name] = batch[name][:2]
    made, p = learners(cfg), plan(lam=1.0, references={}, fresh=1, history=0)
    train.update({"policy": made["policy"]}, fresh, [0, 1], Method(cfg), p, meter)
    record = step_metrics(p, fresh, meter, cfg, TASK)
    absent = "kl_base kl_prev ratio_mean_history ratio_max_history ess explained_variance"
    absent += " value_loss critic_grad_norm lambda mismatch_weight"
    assert [name for name in absent.split() if record.get(name) is not None] == []
    assert record["ratio_mean_fresh"] == pytest.approx(by_hand(cfg)["ratio_mean_fresh"])
    assert record["staleness"] == [2, 0, 0]


def test_shares_of_reasons():
    """accuracy and reasons are of fresh responses, reward of all; an unjudged one is neither right
    nor wrong."""
    reasons = [None, "wrong", "no_box", "timeout", "truncated"]
    fresh = []
    for i, reason in enumerate(reasons):
        more = dict(reason=reason, truncated=reason == "truncated", reflects=reason == "wrong")
        fresh.append([sample(5, [10], float(reason is None), i, **more)])
    batch = Batch(fresh, [[sample(4, [14], 1.0)], [sample(4, [15], 1.0)], [sample(3, [16], 1.0)]])
    batch["logp_old"] = [s.logp_behavior for s in batch.samples]
    record = step_metrics(plan(), batch, Meter(), settings("--model m"), TASK)
    expected = dict(accuracy=1 / 5, reward=4 / 8, unjudged_share=2 / 5, truncated_share=1 / 5)
    expected |= dict(reflection_rate=1 / 5, no_box_share=1 / 5, timeout_share=1 / 5)
    expected |= dict(no_think_share=0, parse_failure_share=0, crash_share=0, ess=1.0)
    expected["staleness"] = [5, 2, 1]
    assert {name: record[name] for name in expected} == expected


@pytest.mark.parametrize("returns, expected", [([0.5, 0.5], None), ([0.0, 1.0], 1 - 0.125 / 0.5)])
def test_explained_variance(returns, expected):
    """Values 0.25 and 0.75: errors of ∓0.25; constant returns explain nothing."""
    batch = Batch([[sample(5, [10])], [sample(5, [11])]], [])
    batch["values"] = [torch.tensor([0.25]), torch.tensor([0.75])]
    batch["returns"] = [torch.tensor([x]) for x in returns]
    record = step_metrics(plan(), batch, Meter(), settings("--model m"), TASK)
    assert record["explained_variance"] == expected

"""What a run writes down: one strict JSON object a step, one console line, TensorBoard and Weights & Biases on request."""

import contextlib
import hashlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch

import faults
from infra.config import total_rollouts
from infra.ranks import gather
from loss import kl

UNJUDGED = ("no_box", "no_think", "parse_failure", "timeout", "crash")  # reasons of reward.Verdict
STARTED = time.perf_counter()  # of this process, but for its first imports

# name -> one line of explanation; every line of metrics.jsonl has exactly these keys, null where a step has no such thing
METRICS = {
    "step": "training step; 0 is the evaluation before training",
    "version": "completed training steps when this step's fresh responses were generated",
    "phase": "`mixed` (fresh and history), `on-policy`, or `evaluation` at step 0",
    "epoch": "how often the training problems have been gone through when this step begins",
    "fresh_rollouts": "responses generated in this step, over all ranks",
    "total_rollouts": "responses generated for training so far, over all ranks",
    "accuracy": "share of this step's fresh responses that are right",
    "reward": "mean reward of the batch trained on, history included",
    "length_mean": "mean length of the fresh responses (tokens)",
    "length_max": "longest fresh response (tokens)",
    "truncated_share": "share of fresh responses cut at --max_response; they get reward 0",
    "unjudged_share": "share of fresh responses that ended but could not be judged, for any of the five reasons below; they get reward 0",
    "no_box_share": "share of fresh responses without a \\boxed{} (toy: without a #)",
    "no_think_share": "share of fresh responses without exactly one </think>, where the template asks for it",
    "parse_failure_share": "share of fresh responses whose box is empty, too long or no mathematics",
    "timeout_share": "share of fresh responses whose judging took too long and was killed",
    "crash_share": "share of fresh responses whose judging died twice",
    "lambda": "lambda(t): weight of the base in KL-convex; the precedent policy has 1 - lambda",
    "kl_base": "mean per-token KL estimate to the base policy, over all updates of the step",
    "kl_prev": "the same to the precedent policy; null where 1 - lambda is 0",
    "ratio_mean_fresh": "mean importance ratio pi_theta / pi_k on fresh tokens, over all updates of the step",
    "ratio_max_fresh": "largest of them",
    "ratio_mean_history": "mean importance ratio pi_theta / pi_{k-i} on history tokens, over all updates of the step",
    "ratio_max_history": "largest of them",
    "clip_low_share": "share of tokens whose gradient is cut by the lower clip bound",
    "clip_high_share": "share of tokens whose gradient is cut by the upper clip bound",
    "ess": "effective sample size of history tokens under weights pi_k / pi_{k-i}: (sum w)^2 / (n sum w^2), 1 is on-policy",
    "staleness": "number of responses in the batch of age 0, 1, ... N policy versions",
    "entropy": "mean entropy of the policy per token (nats) at the sampling temperature",
    "explained_variance": "1 - Var(returns - values) / Var(returns) of the critic before this step's updates",
    "policy_loss": "mean per-token Mix-PPG loss, over all updates of the step",
    "value_loss": "mean per-token value loss, over all updates of the step",
    "grad_norm": "policy gradient norm before clipping, mean over updates",
    "critic_grad_norm": "critic gradient norm before clipping, mean over updates",
    "skipped_updates": "updates of policy and critic skipped because loss or gradient was not finite; no mean here counts what is not finite",
    "lr": "learning rate of the policy",
    "gap_mean": "mean absolute difference of the log-probs by trainer and by sampler on fresh tokens: rounding if weights agree",
    "gap_max": "largest of them",
    "tis_mean": "mean weight of truncated importance sampling, over all updates of the step; null where --tis is 0",
    "tis_min": "smallest of them",
    "tis_truncated_share": "share of tokens whose weight was cut to --tis",
    "reflection_rate": "share of fresh responses with at least one self-reflection keyword",
    "eval_accuracy": "pass@1 on --eval_data after this step's updates: the mean over its parts, each counting alike",
    "eval_accuracy_by_part": "pass@1 on each part of --eval_data, by name",
    "eval_length_mean": "mean response length there (tokens)",
    "eval_truncated_share": "share of truncated responses there",
    "eval_unjudged_share": "share of responses there that ended but could not be judged",
    "seconds_generate": "weight transfer, generation and gathering (s)",
    "seconds_reward_wait": "waiting for verdicts that were not ready when needed (s)",
    "seconds_logprobs": "forward passes of the old, base and precedent policies and of the critic (s)",
    "seconds_update": "gradient updates (s)",
    "seconds_eval": "evaluation (s)",
    "seconds_save": "writing the previous step's checkpoint (s)",
    "seconds_step": "the whole step, evaluation apart (s)",
    "tokens_per_second": "fresh response tokens per second of seconds_generate, all ranks",
    "memory_peak_gib": "peak memory of rank 0 so far: of its GPU, engine included, or resident memory on a CPU (GiB)",
}


class Meter:
    """Token-weighted sums and maxima over the micro-batches of a step."""

    def __init__(self):
        self.seen = {}  # name -> [sum, count, max]

    def add(self, name, values, mask=None):
        """values (…), counted where mask (…) is True and they are finite: of an update that was skipped they may be anything."""
        values = (values if mask is None else values[mask.bool()]).detach().double()
        values = values[values.isfinite()]
        if values.numel():
            total, count, most = self.seen.get(name, (0.0, 0, -math.inf))
            self.seen[name] = [
                total + values.sum().item(),
                count + values.numel(),
                max(most, values.max().item()),
            ]

    def gathered(self):
        """The same over all ranks, as (means, maxima). A collective."""
        merged = {}
        for part in gather(self.seen):
            for name, (total, count, most) in part.items():
                t, c, m = merged.get(name, (0.0, 0, -math.inf))
                merged[name] = (t + total, c + count, max(m, most))
        return {n: t / c for n, (t, c, _) in merged.items()}, {
            n: m for n, (_, _, m) in merged.items()
        }


def measure(meter, samples, logp, entropy, stats, b, mask, version, cfg):
    """Per-token statistics of one micro-batch, fresh and history apart."""
    if "tis" in stats:
        meter.add("tis", stats["tis"], mask)
        meter.add("tis_negative", -stats["tis"], mask)  # its maximum is the smallest weight
        meter.add("tis_truncated_share", (stats["tis"] >= cfg.tis).float(), mask)
    meter.add("entropy", entropy, mask)
    meter.add("clip_low_share", stats["clipped_low"], mask)
    meter.add("clip_high_share", stats["clipped_high"], mask)
    for name in ("base", "prev"):
        if f"logp_{name}" in b:
            meter.add(f"kl_{name}", kl(logp, b[f"logp_{name}"], cfg.kl_estimator), mask)
    fresh = (
        torch.tensor(
            [s["version"] == version for s in samples], dtype=torch.bool, device=mask.device
        )[:, None]
        if samples
        else mask
    )
    meter.add("ratio_fresh", stats["ratio"], mask & fresh)
    meter.add("ratio_history", stats["ratio"], mask & ~fresh)


def step_metrics(step, plan, lam, fresh, history, batch, gap, meter, cfg):
    """The record of one training step; names are explained in metrics.METRICS. A collective (the meter's)."""
    mean, most = meter.gathered()
    lengths = [len(s["response"]) for s in fresh]
    ages = [step - 1 - s["version"] for s in batch]
    record = dict(
        step=step,
        version=step - 1,
        phase=plan.phase,
        fresh_rollouts=len(fresh),
        total_rollouts=total_rollouts(cfg, step),
        accuracy=sum(s["reward"] == 1 for s in fresh) / len(fresh),
        reward=sum(s["reward"] for s in batch) / len(batch),
        length_mean=sum(lengths) / len(fresh),
        length_max=max(lengths),
        truncated_share=sum(s["truncated"] for s in fresh) / len(fresh),
        unjudged_share=sum(s["reason"] in UNJUDGED for s in fresh) / len(fresh),
        reflection_rate=sum(s["reflects"] for s in fresh) / len(fresh),
        tis_mean=mean.get("tis"),
        tis_min=-most["tis_negative"] if "tis" in most else None,
        ratio_mean_fresh=mean.get("ratio_fresh"),
        ratio_max_fresh=most.get("ratio_fresh"),
        ratio_mean_history=mean.get("ratio_history"),
        ratio_max_history=most.get("ratio_history"),
        grad_norm=mean.get("policy_grad_norm"),
        critic_grad_norm=mean.get("critic_grad_norm"),
        staleness=[ages.count(age) for age in range(cfg.window + 1)],
        gap_mean=gap.mean().item(),
        gap_max=gap.max().item(),
    )
    record |= {
        name: mean.get(name)
        for name in (
            "kl_base",
            "kl_prev",
            "clip_low_share",
            "clip_high_share",
            "entropy",
            "policy_loss",
            "value_loss",
            "tis_truncated_share",
        )
    }
    record |= {
        f"{reason}_share": sum(s["reason"] == reason for s in fresh) / len(fresh)
        for reason in UNJUDGED
    }
    record["lambda"] = lam if cfg.beta > 0 else None
    if history:
        w = (
            torch.cat([s["logp_old"] - s["logp_behavior"] for s in history]).double().exp()
        )  # (history tokens,)
        record["ess"] = (w.sum() ** 2 / (len(w) * (w**2).sum())).item()
    if cfg.advantage == "gae":
        returns, values = (
            torch.cat([s[name] for s in batch]).double() for name in ("returns", "values")
        )
        record["explained_variance"] = (
            (1 - (returns - values).var() / returns.var()).item() if returns.var() > 0 else None
        )
    return record


class Recorder:
    """Writes metrics.jsonl and the console line from rank 0; keeps the clock of the step's phases on every rank."""

    def __init__(self, cfg, ranks):
        self.begin = self.last = (
            time.perf_counter()
        )  # of the first step that this process does; of its latest record
        self.peak = 0  # most GPU memory in use at the end of a phase (bytes)
        self.steps, self.longest = (
            0,
            0.0,
        )  # done by this process; the longest, evaluation and saving included (s)
        self.cfg, self.ranks, self.seconds, self.tensorboard, self.wandb = (
            cfg,
            ranks,
            {},
            None,
            None,
        )
        if ranks.first:
            append(Path(cfg.out) / "metrics.jsonl", "")
            if cfg.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(Path(cfg.out) / "tensorboard")
            if cfg.wandb:
                import wandb

                out = Path(cfg.out).resolve()
                identity = hashlib.sha256(str(out).encode()).hexdigest()[
                    :16
                ]  # a resumed run goes on in its own, no namesake's
                self.wandb = wandb.init(
                    project="remix",
                    id=identity,
                    name=out.name,
                    config=vars(cfg),
                    resume="allow" if cfg.resume else None,
                )

    @contextlib.contextmanager
    def clock(self, phase, step=None):
        """Adds the time inside to seconds_`phase`; an error inside is reported with phase and step (faults.py)."""
        begin, outer = time.perf_counter(), faults.Here.phase
        faults.Here.phase, faults.Here.step = phase, step or faults.Here.step
        yield
        faults.Here.phase = outer
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
            free, total = (
                torch.cuda.mem_get_info()
            )  # PyTorch's own count would hold a sleeping engine for awake, and keeps a phase's blocks
            self.peak = max(self.peak, total - free)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def write(self, record):
        """One line with every key of METRICS, non-finite numbers as null. Clears the clock. ValueError for an unknown name."""
        unknown = set(record) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics not in METRICS: {sorted(unknown)}")
        record = record | {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        if "generate" in self.seconds:
            record["tokens_per_second"] = (
                record["length_mean"] * record["fresh_rollouts"] / self.seconds["generate"]
            )
        self.seconds, now = {}, time.perf_counter()
        if record["step"]:
            self.steps, self.longest, self.last = (
                self.steps + 1,
                max(self.longest, now - self.last),
                now,
            )
        if not self.ranks.first:
            return
        cuda = self.ranks.device.type == "cuda"
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        record["memory_peak_gib"] = (
            self.peak if cuda else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ) / 2**30
        line = {name: finite(record.get(name)) for name in METRICS}
        append(Path(self.cfg.out) / "metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        numbers |= {
            f"eval_accuracy/{part}": value
            for part, value in (line["eval_accuracy_by_part"] or {}).items()
        }
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, line["step"])
        if self.wandb:
            self.wandb.log(numbers, step=line["step"])
        left = (
            (now - self.begin) / self.steps * (self.cfg.steps - line["step"])
            if self.steps
            else None
        )  # s
        print(console_line(line, self.cfg.steps, left), flush=True)

    def stop(self, step):
        """Why the run ends with `step`, before its last: the name of a signal to any rank, or a text on --max_hours; else None.

        A collective. Out of time is when another step as long as the longest might end later, by rank 0's clock.
        """
        hours = self.cfg.max_hours
        late = hours and time.perf_counter() - STARTED + self.longest > 3600 * hours
        seen = gather((faults.Here.notice, late))
        notice = next((name for name, _ in seen if name), None)
        late = f"the next one might end later than --max_hours {hours}" if seen[0][1] else None
        last = step == self.cfg.steps
        faults.Here.leaving = bool(last or notice or late)
        return None if last else notice or late

    def close(self):
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_line(m, steps, left=None):
    """A fixed-width line from a record of METRICS. `left`: seconds to the end of the run, if they can be told."""

    def number(name, form):
        return "-".rjust(len(format(0.0, form))) if m[name] is None else format(m[name], form)

    line = f"step {m['step']:>4}/{steps} {m['phase']:<10} rollouts {m['total_rollouts']:>6}"
    if m["step"]:
        line += (
            f" accuracy {number('accuracy', '5.3f')} length {number('length_mean', '6.1f')} kl {number('kl_base', '7.4f')} "
            f"ratio {number('ratio_mean_history', '6.4f')} entropy {number('entropy', '6.3f')} grad {number('grad_norm', '7.3f')} "
            f"gap {number('gap_mean', '7.1e')} {number('seconds_step', '6.2f')} s"
        )
    if left:
        line += f" eta {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}"
    return line + ("" if m["eval_accuracy"] is None else f" | eval {m['eval_accuracy']:.3f}")


def best_evaluation(path):
    """The highest eval_accuracy of the training steps in metrics.jsonl (a path); -inf where there is none."""
    lines = (
        [json.loads(line) for line in open(path, encoding="utf-8")] if Path(path).exists() else []
    )
    return max(
        (
            line["eval_accuracy"]
            for line in lines
            if line["step"] and isinstance(line.get("eval_accuracy"), (int, float))
        ),
        default=-math.inf,
    )


def truncate(path, last_step):
    """Drop the lines of steps after `last_step` and an unfinished last line, before a run is resumed."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(
            ValueError, KeyError, TypeError, RecursionError
        ):  # whatever a dying machine or another hand left there
            if json.loads(line)["step"] <= last_step and line.endswith("\n"):
                kept.append(line)
    rewrite(path, "".join(kept))


def rewrite(path, text):
    """Put `text` in the place of a file's: aside, then renamed, so that either the old or the new is there, whole."""
    aside = path.with_name(path.name + ".tmp")
    append(aside, text, "w")
    aside.replace(path)


def append(path, text, mode="a"):
    """Add `text` to a file, to the disk itself: a line of metrics stands before its step's checkpoint does. Raises OSError that names the file."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror}") from None

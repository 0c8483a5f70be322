"""What a run writes down: config.json, one strict JSON object a step, one console line.

TensorBoard and Weights & Biases on request. Statistics that a method's functions return come under
their own names beside METRICS.
"""

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
from tqdm import tqdm

from infra import checkpoint
from infra.config import values_of
from infra.ranks import gather

UNJUDGED = ("no_box", "no_think", "parse_failure", "timeout", "crash")  # reasons of reward.Verdict
SAMPLES = 4  # fresh responses a step in samples.jsonl, for reading

# name -> explanation; every line of metrics.jsonl has these keys, null where nothing is known
METRICS = {
    "step": "training step; 0 is the evaluation before training",
    "version": "completed training steps when its fresh responses were generated",
    "phase": "`mixed` (fresh and history), `on-policy`, or `evaluation` at step 0",
    "epoch": "how often the problems have been gone through when it begins",
    "fresh_rollouts": "responses generated in this step, over all ranks",
    "total_rollouts": "responses generated for training so far, over all ranks",
    "accuracy": "share of this step's fresh responses that are right",
    "reward": "mean reward of the batch trained on, history included",
    "length_mean": "mean length of the fresh responses (tokens)",
    "length_max": "longest fresh response (tokens)",
    "truncated_share": "share of fresh responses cut at --max_response; they get reward 0",
    "unjudged_share": "share of fresh responses that ended without a verdict; reward 0",
    "no_box_share": "share of fresh responses without a \\boxed{} (toy: a #)",
    "no_think_share": "share without exactly one </think>, where the template asks for it",
    "parse_failure_share": "share whose box is empty, too long or no mathematics",
    "timeout_share": "share whose judging took too long and was killed",
    "crash_share": "share whose judging died twice",
    "reflection_rate": "share of fresh responses with at least one self-reflection keyword",
    "lambda": "λ(t): weight of the base in KL-convex; the precedent has 1 − λ",
    "kl_base": "mean per-token KL estimate to the base, over the step's updates",
    "kl_prev": "the same to the precedent policy; null where 1 − λ is 0",
    "ratio_mean_fresh": "mean ratio of the objective on fresh tokens, over the step's updates",
    "ratio_max_fresh": "largest of them",
    "ratio_mean_history": "the same on history (Mix-PPG: π_θ/π_{k−i})",
    "ratio_max_history": "largest of them",
    "clip_low_share": "share of tokens whose gradient the lower clip bound cuts",
    "clip_high_share": "share of tokens whose gradient the upper clip bound cuts",
    "ess": "effective sample size of history, w = π_k/π_{k−i}: (Σw)²/(n·Σw²); 1: on-policy",
    "staleness": "number of responses in the batch of age 0, 1, … N policy versions",
    "entropy": "mean entropy of the policy per token (nats) at the sampling temperature",
    "explained_variance": "1 − Var(returns − values)/Var(returns) before the updates",
    "policy_loss": "mean per-token objective, weights included, over the updates",
    "value_loss": "mean per-token value loss, over all updates of the step",
    "grad_norm": "policy gradient norm before clipping, mean over updates",
    "critic_grad_norm": "critic gradient norm before clipping, mean over updates",
    "skipped_updates": "updates of policy and critic skipped as not finite; no mean counts them",
    "lr": "learning rate of the policy",
    "gap_mean": "mean |log-prob by trainer − by engine| on fresh tokens: rounding if weights agree",
    "gap_max": "largest of them",
    "eval_accuracy": "pass@1 on --eval_data after this step, the mean over its parts",
    "eval_accuracy_by_part": "pass@1 on each part of --eval_data, by name",
    "eval_length_mean": "mean response length there (tokens)",
    "eval_truncated_share": "share of truncated responses there",
    "eval_unjudged_share": "share of responses there that ended but could not be judged",
    "seconds_generate": "weight transfer, generation, judging and gathering (s)",
    "seconds_logprobs": "forward passes of frozen policies and critic (s)",
    "seconds_update": "gradient updates (s)",
    "seconds_eval": "evaluation (s)",
    "seconds_save": "writing the previous step's checkpoint (s)",
    "seconds_step": "the whole step, evaluation apart (s)",
    "tokens_per_second": "fresh response tokens per second of seconds_generate, all ranks",
    "memory_peak_gib": "peak of rank 0 so far: its GPU, engine included, or resident memory (GiB)",
}
# what a statistic of an objective is called among the metrics, where that is not its own name
RENAMED = {
    "clipped_low": "clip_low_share",
    "clipped_high": "clip_high_share",
    "policy_grad_norm": "grad_norm",
}


class Meter:
    """Token-weighted sums and maxima over the micro-batches of a step."""

    def __init__(self):
        self.seen = {}  # name -> [sum, count, max]
        self.skipped = 0  # updates

    def add(self, name, values, mask=None):
        """values (…), where mask (…) is True and they are finite (skipped updates' may not be)."""
        values = (values if mask is None else values[mask]).detach().double()
        values = values[values.isfinite()]
        if values.numel():
            total, count, most = self.seen.get(name, (0.0, 0, -math.inf))
            total, count = total + values.sum().item(), count + values.numel()
            self.seen[name] = total, count, max(most, values.max().item())

    def add_tokens(self, stats, mask, is_fresh):
        """Statistics by name (b, T) of a micro-batch, ratios by age as well; is_fresh (b, 1)."""
        for name, values in stats.items():
            self.add(name, values, mask)
        if "ratio" in stats:
            self.add("ratio_fresh", stats["ratio"], mask & is_fresh)
            self.add("ratio_history", stats["ratio"], mask & ~is_fresh)

    def gathered(self):
        """The same over all ranks, as (means, maxima). A collective."""
        merged = {}
        for part in gather(self.seen):
            for name, (total, count, most) in part.items():
                t, c, m = merged.get(name, (0.0, 0, -math.inf))
                merged[name] = (t + total, c + count, max(m, most))
        means = {name: total / count for name, (total, count, _) in merged.items()}
        return means, {name: most for name, (_, _, most) in merged.items()}


def step_metrics(plan, batch, meter, cfg, task):
    """The record of one training step, by METRICS' names and the method's own. A collective."""
    gap = batch.gap()
    mean, most = meter.gathered()
    mean = {RENAMED.get(name, name): value for name, value in mean.items()}
    fresh, history = batch.samples[: batch.fresh], range(batch.fresh, len(batch.samples))
    lengths = [len(s.response) for s in fresh]
    ages = [plan.version - s.version for s in batch.samples]

    def share(fine):
        return sum(map(fine, fresh)) / len(fresh)

    record = dict(
        step=plan.step,
        version=plan.version,
        phase=plan.phase,
        fresh_rollouts=len(fresh),
        total_rollouts=(plan.first + plan.fresh) * cfg.group_size,
        accuracy=share(lambda s: s.reward == 1),
        reward=sum(s.reward for s in batch.samples) / len(batch.samples),
        length_mean=sum(lengths) / len(fresh),
        length_max=max(lengths),
        truncated_share=share(lambda s: s.truncated),
        unjudged_share=share(lambda s: s.reason in UNJUDGED),
        reflection_rate=share(lambda s: s.reflects),
        ratio_mean_fresh=mean.pop("ratio_fresh", None),
        ratio_max_fresh=most.get("ratio_fresh"),
        ratio_mean_history=mean.pop("ratio_history", None),
        ratio_max_history=most.get("ratio_history"),
        staleness=[ages.count(age) for age in range(cfg.window + 1)],
        gap_mean=gap.mean().item(),
        gap_max=gap.max().item(),
        lr=cfg.lr * plan.scale,
        epoch=plan.first / len(task.problems),
        skipped_updates=meter.skipped,
    )
    record["lambda"] = plan.lam if "base" in plan.references else None
    for reason in UNJUDGED:
        record[f"{reason}_share"] = sum(s.reason == reason for s in fresh) / len(fresh)
    if history:
        ratios = [batch["logp_old"][i] - batch.samples[i].logp_behavior for i in history]
        w = torch.cat(ratios).double().exp()  # (history tokens,)
        record["ess"] = (w.sum() ** 2 / (len(w) * (w**2).sum())).item()
    if "returns" in batch:
        returns, values = (torch.cat(batch[name]).double() for name in ("returns", "values"))
        error, spread = (returns - values).var(), returns.var()
        record["explained_variance"] = (1 - error / spread).item() if spread > 0 else None
    return mean | record


class Recorder:
    """Writes a run's files from rank 0; keeps the clock of the step's phases on every rank."""

    def __init__(self, cfg, done, task, ranks):
        """Make the run folder, or cut its records back to the `done` steps that are resumed."""
        self.cfg, self.ranks, self.tokenizer, self.out = cfg, ranks, task.tokenizer, Path(cfg.out)
        self.started = self.last = time.perf_counter()
        self.seconds, self.peak = {}, 0  # by phase; most GPU memory at the end of one (bytes)
        self.steps, self.longest = 0, 0.0  # done by this process; longest, all included (s)
        self.tensorboard = self.wandb = None
        if ranks.first:
            open_run(cfg, done)
            self.open_others()
        self.best = gather(best_evaluation(self.out / "metrics.jsonl") if ranks.first else None)[0]

    def open_others(self):
        if self.cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out / "tensorboard")
        if self.cfg.wandb:
            import wandb

            # a resumed run goes on in its own, no namesake's
            identity = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]
            how = dict(project="remix", id=identity, name=self.out.name, config=values_of(self.cfg))
            self.wandb = wandb.init(resume="allow" if self.cfg.resume else None, **how)

    @contextlib.contextmanager
    def clock(self, phase):
        """Adds the time inside to seconds_`phase`."""
        begin = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
            # PyTorch's own count would hold a sleeping engine for awake, and keeps a phase's blocks
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def progress(self, items, total):
        """The items, with a bar on rank 0 where they take long."""
        return tqdm(items, "updates", total, leave=False, delay=2, disable=not self.ranks.first)

    def write(self, record, samples=()):
        """One line of metrics, some of the samples for reading. Clears the clock."""
        record = record | {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        if "generate" in self.seconds:
            record["tokens_per_second"] = (
                record["length_mean"] * record["fresh_rollouts"] / self.seconds["generate"]
            )
        self.seconds, now = {}, time.perf_counter()
        if record["step"]:
            self.longest = max(self.longest, now - self.last)
            self.steps, self.last = self.steps + 1, now
        if not self.ranks.first:
            return
        cuda = self.ranks.device.type == "cuda"
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        peak = self.peak if cuda else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record["memory_peak_gib"] = peak / 2**30
        line = {name: finite(record.get(name)) for name in METRICS | record}
        texts = [self.readable(line["step"], sample) for sample in samples[:SAMPLES]]
        append(self.out / "samples.jsonl", "".join(texts))
        append(self.out / "metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")
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
        left = self.steps and (now - self.started) / self.steps * (self.cfg.steps - line["step"])
        print(console_line(line, self.cfg.steps, left), flush=True)

    def readable(self, step, sample):
        text = self.tokenizer.decode(sample.response, skip_special_tokens=True)
        prompt = self.tokenizer.decode(sample.prompt)
        kept = {name: getattr(sample, name) for name in ("answer", "reward", "reason")}
        return json.dumps({"step": step, "prompt": prompt, "response": text} | kept) + "\n"

    def close(self):
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def open_run(cfg, done):
    """Write config.json; drop what was written after the checkpoint. Rank 0 alone."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    earlier = json.loads(path.read_text()).get("argv", []) if path.exists() else []
    record = {
        "values": values_of(cfg),
        "fingerprint": cfg.fingerprint,
        "torch": torch.__version__,
        "argv": [*earlier, sys.argv[1:]],
    }
    rewrite(path, json.dumps(record, indent=1))
    checkpoint.sweep(out)
    for name in ("metrics.jsonl", "samples.jsonl"):
        truncate(out / name, done if done else -1)


def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_line(m, steps, left=None):
    """A fixed-width line from a record of METRICS. left: seconds to the end, where known."""

    def number(name, form):
        return "-".rjust(len(format(0.0, form))) if m[name] is None else format(m[name], form)

    line = f"step {m['step']:>4}/{steps} {m['phase']:<10} rollouts {m['total_rollouts']:>6}"
    if m["step"]:
        line += (
            f" accuracy {number('accuracy', '5.3f')} length {number('length_mean', '6.1f')}"
            f" kl {number('kl_base', '7.4f')} ratio {number('ratio_mean_history', '6.4f')}"
            f" entropy {number('entropy', '6.3f')} grad {number('grad_norm', '7.3f')}"
            f" gap {number('gap_mean', '7.1e')} {number('seconds_step', '6.2f')} s"
        )
    if left:
        line += f" eta {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}"
    return line + ("" if m["eval_accuracy"] is None else f" | eval {m['eval_accuracy']:.3f}")


def best_evaluation(path):
    """The highest eval_accuracy of the training steps in metrics.jsonl, else -inf."""
    lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    found = [line["eval_accuracy"] for line in lines if line["step"]]
    return max((value for value in found if value is not None), default=-math.inf)


def truncate(path, last_step):
    """Drop the lines of steps after `last_step`, and an unfinished last line."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        # whatever a dying machine left there
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last_step and line.endswith("\n"):
                kept.append(line)
    rewrite(path, "".join(kept))


def rewrite(path, text):
    """Put `text` in the place of a file's: aside, then renamed, so that either is there whole."""
    aside = path.with_name(path.name + ".tmp")
    append(aside, text, "w")
    aside.replace(path)


def append(path, text, mode="a"):
    """Add `text` to a file, flushed: a line of metrics stands before its step's checkpoint."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror}") from None

"""Alarms: what stops a run with a message that names the cause, rather than let it train on rubbish, on nothing, or apart.

    check_gap           the engine's log-probs are not the trainer's: it has other weights, or the policy has diverged
    Alarms.responses    step after step all responses (under a group baseline: all of each group) get one reward: no advantage to learn from
    Alarms.skipped      update after update has a loss or gradient that is not finite
    agree               ranks hold other settings, problems or history than rank 0

What the engine can see for itself is in rollout.py. All ranks see the same and stop alike.
"""

import hashlib
import math
from collections import Counter
from dataclasses import asdict

import torch

from infra.ranks import gather
from prepare import exact

GAP_BOUND = {
    True: 1e-3,
    False: 5e-2,
}  # by exact(cfg): mean |trainer - sampler|, measured 1e-7 and 3e-3 when weights agree
PATHS = {
    "config",
    "model",
    "data",
    "data_dir",
    "eval_data",
    "template",
    "replay",
}  # may differ between machines; what is in them may not
ADVICE = {
    "right": "the problems are too easy: take harder ones, or stop here",
    "wrong": "the problems are too hard, or their answers are not what --style looks for: see samples.jsonl",
    "each": "the model answers each problem in one way: raise --temperature or --group_size, or take other problems",
    "truncated": "raise --max_response, or give a --template whose responses end (no end or stop token came)",
    "timeout": "the reward takes too long",
    "crash": "the reward takes too much memory",
    "unread": "does --template suit the model, and --style the template? samples.jsonl shows the responses",
}


def check_gap(gap, version, cfg):
    """Stop when sampler and trainer disagree by more than rounding. `gap`: mean |trainer - sampler| of the fresh log-probs.

    A replay is stopped by what is not finite alone: once its loss is another, its policy is not the one that was recorded.
    """
    bound = math.inf if cfg.replay else cfg.max_gap or GAP_BOUND[exact(cfg)]
    if not math.isfinite(gap):
        raise RuntimeError(
            f"log-probs are not finite at version {version}: the policy has diverged (a smaller --lr?), or its weights never were"
        )
    if gap > bound:
        raise RuntimeError(
            f"mean |trainer - sampler| log-prob is {gap:.2e} at version {version}, above {bound:.0e} (--max_gap): "
            "the engine's weights are not the trainer's"
        )


class Alarms:
    """Counts what may happen now and then, but not in a row. A resumed run counts anew."""

    def __init__(self, cfg, say):
        self.cfg, self.say = cfg, say
        self.equal, self.unread, self.row = (
            0,
            False,
            {},
        )  # steps in a row; whether the last was unread; learner -> skipped in a row

    def responses(self, fresh, step):
        """Say when no response of a step has a verdict; stop after --max_equal_rewards steps whose rewards are all the same.

        fresh: samples with `reward`, `reason` (None: right) and `prompt_index`. Raises RuntimeError. 20 steps are 3,080 responses of the
        paper's remix-ppo: 19 times out of 20 a policy that is right once in a thousand would have been.
        """
        group = (
            self.cfg.advantage == "group"
        )  # its baseline makes 0 of rewards that are equal within a group
        rewards = {(group and sample["prompt_index"], sample["reward"]) for sample in fresh}
        self.equal = self.equal + 1 if len(rewards) == len({index for index, _ in rewards}) else 0
        reasons = Counter(sample["reason"] or "right" for sample in fresh)
        unread = not reasons.keys() & {"right", "wrong"}
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        advice = ADVICE.get(
            "each" if {"right", "wrong"} <= reasons.keys() else reasons.most_common(1)[0][0],
            ADVICE["unread"],
        )
        if unread and not self.unread:
            self.say(
                f"WARNING: none of the {len(fresh)} responses of step {step} has a verdict ({counts}): {advice}"
            )
        self.unread = unread
        if 0 < self.cfg.max_equal_rewards <= self.equal:
            values = ", ".join(
                f"{reward:g}" for reward in sorted({reward for _, reward in rewards})[:3]
            )
            raise RuntimeError(
                f"in each of the last {self.equal} steps all responses{' to a prompt' * group} got the same reward (step {step}: {values}; "
                f"{counts}), from which nothing is learned: {advice}. --max_equal_rewards 0 goes on all the same"
            )

    def skipped(self, norms, step, minibatch):
        """How many updates were skipped for their gradient's norm (learner -> float), aloud. Raises RuntimeError after --max_skipped in a row."""
        self.row = {
            name: self.row.get(name, 0) + 1
            for name, norm in norms.items()
            if not math.isfinite(norm)
        }
        for name, count in self.row.items():
            self.say(
                f"step {step}, minibatch {minibatch}: skipped the update of the {name}, whose loss or gradient is not finite "
                f"(norm {norms[name]}; {count} in a row)"
            )
            if 0 < self.cfg.max_skipped <= count:
                raise RuntimeError(
                    f"{count} updates of the {name} in a row, the last at step {step}, minibatch {minibatch}, had a loss or gradient "
                    "that is not finite (--max_skipped): the run has diverged (a smaller --lr?), or its batch holds what is no number"
                )
        return len(self.row)


def agree(cfg, **facts):
    """Raise RuntimeError, on every rank alike, unless all ranks have rank 0's settings, problems and `facts`. A collective."""
    facts |= {f"--{name}": value for name, value in asdict(cfg).items() if name not in PATHS}
    facts |= {
        "hash of problems and kind of model": cfg.fingerprint[:16],
        "torch": torch.__version__,
    }
    first, *others = gather(facts)
    for rank, other in enumerate(others, 1):
        if differ := [
            f"{name} is {other.get(name)} there and {value} on rank 0"
            for name, value in first.items()
            if other.get(name) != value
        ]:
            raise RuntimeError(
                f"rank {rank} is not of the same run: {'; '.join(differ)}. Start all ranks with the same command, code and data"
            )


def held(buffer):
    """What a ring buffer holds as text that differs where anything in it does; the advantages follow from the rest."""
    found = hashlib.blake2b(digest_size=8)
    for version, groups in buffer.state_dict()["entries"]:
        for sample in (sample for group in groups for sample in group):
            for key, value in sorted(sample.items()):
                if key != "advantage":
                    found.update(
                        value.contiguous().numpy()
                        if isinstance(value, torch.Tensor)
                        else f"{key} {value!r}".encode()
                    )
    return f"{len(buffer)} groups of versions {buffer.versions()}, hash {found.hexdigest()}"

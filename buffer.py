"""What is kept of a response, the batch of one step, the ring buffer tagged with versions.

At training step k (k steps are complete, the policy is π_k) the history that may be drawn is what
was pushed after the steps k − N … k − 1, N being the window. ReMix (arXiv 2507.06892) draws i ~ ν,
then a sample of π_{k−i}; the form of ν is not published. Uniform over all that is held is inferred;
any other ν is a dict of weights given to `RingBuffer.sample`.

A group is the list of the n samples written together for one prompt: it is stored and drawn whole,
so that its baseline (GRPO) stays what it was.
"""

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(slots=True)
class Sample:
    """One response and what is kept of it for as long as it lives. Tensors are 1-D, on the CPU.

    P prompt tokens, T response tokens, the end token included. Nothing of one step alone is here:
    see Batch.
    """

    prompt: Tensor  # (P,) int64
    response: Tensor  # (T,) int64
    logp_sampler: Tensor  # (T,) what the engine reported while sampling
    truncated: bool  # cut at --max_response
    version: int  # training steps that were complete when its writer was the policy
    prompt_index: int  # position in the stream of prompts; with the version it names the group
    answer: str | list  # what is right; of a list any one
    reward: float = 0.0
    reason: str | None = None  # None: right; else why not (reward.py)
    said: str | None = None  # the answer that was read, in its normal form
    reflects: bool = False  # holds a keyword of self-reflection
    logp_behavior: Tensor | None = None  # (T,) by the trainer, under the policy that wrote it
    logp_base: Tensor | None = None  # (T,) under the base policy: it stays until reincarnation

    def plain(self):
        """As a dict of plain values and tensors, for torch.load(weights_only=True)."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Batch(dict):
    """The mixture that one step trains on: columns, name -> list with an entry for each sample.

    What is known in this step alone (logp_old, logp_prev, values, advantages, returns) is put here
    and dropped with it; what is kept is found in the samples by the same way:
    batch["logp_behavior"].

        samples   the fresh ones first, then history, group after group
        fresh     number of fresh samples
        groups    list of lists of indices into samples
    """

    def __init__(self, fresh, history):
        """fresh, history: lists of groups."""
        super().__init__()
        groups = [*fresh, *history]
        self.samples = [sample for group in groups for sample in group]
        self.fresh = sum(map(len, fresh))
        self["group"] = [number for number, group in enumerate(groups) for _ in group]
        self["is_fresh"] = [i < self.fresh for i in range(len(self.samples))]
        row = itertools.count()
        self.groups = [[next(row) for _ in group] for group in groups]

    def __missing__(self, name):
        return [getattr(sample, name) for sample in self.samples]

    def gap(self):
        """|log-prob by trainer − by engine| of the fresh tokens, (n,)."""
        pairs = [(s.logp_behavior, s.logp_sampler) for s in self.samples[: self.fresh]]
        return torch.cat([(behavior - sampler).abs() for behavior, sampler in pairs])

    def has(self, name):
        return name in self or hasattr(self.samples[0], name)

    def padded(self, names, rows=None, device="cpu"):
        """{name: (b, T), 0 at padding; (b, 1) where the column holds numbers} and "mask" (b, T).

        rows: indices of samples, none: all. No row at all gives one masked position, so that a
        rank without work still takes part in every collective (model.collate does likewise).
        """
        rows = range(len(self.samples)) if rows is None else rows
        if not rows:
            one = self.padded(names, [0], device)
            return {name: torch.zeros_like(column[:, :1]) for name, column in one.items()}
        ones = [torch.ones(len(self.samples[i].response), dtype=torch.bool) for i in rows]
        found = {"mask": pad_sequence(ones, batch_first=True)}
        for name in names:
            column = self[name]
            entries = [column[i] for i in rows]
            if isinstance(entries[0], Tensor):
                found[name] = pad_sequence(entries, batch_first=True)
            else:
                found[name] = torch.tensor(entries)[:, None]
        return {name: column.to(device) for name, column in found.items()}


class RingBuffer:
    """Groups of the last `window` versions. len() is the number of groups.

    Each operation depends on the contents, their order and the given rng only, so that ranks which
    push the same groups and seed alike draw the same. It never looks inside a group. Raises
    ValueError if window is negative; 0 holds nothing.
    """

    def __init__(self, window):
        if window < 0:
            raise ValueError(f"window {window}: must be 0 or more training steps")
        self.window = window
        self._entries = []  # [(version, [group, …]), …], oldest first

    def __len__(self):
        return sum(len(groups) for _, groups in self._entries)

    def versions(self):
        """The versions held, oldest first. A push of no group is not held."""
        return [version for version, _ in self._entries]

    def push(self, version, groups):
        """Add the groups (lists of samples) of the step that turned `version` into the next.

        Evicts what no later step could draw: the next step is version + 1 at the earliest and draws
        v ≥ version + 1 − window. No groups add nothing and evict all the same.
        Raises ValueError, leaving the buffer as it was, if `version` is not newer than all held.
        """
        groups = list(groups)  # ours: the caller may go on with its list
        if self._entries and version <= self._entries[-1][0]:
            newest = self._entries[-1][0]
            raise ValueError(f"version {version} is not newer than {newest}, the newest held")
        if groups:
            self._entries.append((version, groups))
        self._entries = [entry for entry in self._entries if entry[0] > version - self.window]

    def sample(self, n_groups, version, rng, weights=None):
        """Draw n_groups whole groups of version − window ≤ v < version without replacement.

        rng: random.Random. All eligible groups are equally likely, or in proportion to
        weights[age], where weights: dict of age (version − v, from 1 to window) to a weight ≥ 0 and
        ages left out have weight 0. The weight is per group: with as many groups from every
        version, it is the paper's ν over i. Fewer groups come back when fewer are eligible. Raises
        ValueError on a negative n_groups or weight, and on a weight that is not finite.
        """
        if n_groups < 0:
            raise ValueError(f"n_groups {n_groups} is negative")
        eligible = [
            (version - v, group)
            for v, groups in self._entries
            if version - self.window <= v < version
            for group in groups
        ]  # oldest first, as pushed: the order that the rng's numbers refer to
        if weights is None:
            return [group for _, group in rng.sample(eligible, min(n_groups, len(eligible)))]
        if not all(0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError(f"weights must be finite and not negative: {weights}")
        # Draws without replacement in proportion to w are a race: every group arrives after an
        # exponential time of rate w, and the first n win (Efraimidis and Spirakis 2006).
        weighted = [(weights.get(age, 0), group) for age, group in eligible]
        race = [(rng.expovariate(weight), group) for weight, group in weighted if weight > 0]
        return [group for _, group in sorted(race, key=lambda entry: entry[0])[:n_groups]]

    def state_dict(self):
        """{"window": int, "entries": [(version, groups), …]}; samples as plain dicts."""
        entries = [
            (version, [list(map(_plain, group)) for group in groups])
            for version, groups in self._entries
        ]
        return {"window": self.window, "entries": entries}

    def load_state_dict(self, state):
        """Replace the contents by a `state_dict`. Our own window holds: a smaller one evicts."""
        fresh = RingBuffer(self.window)
        for version, groups in state["entries"]:
            fresh.push(version, [list(map(_sample, group)) for group in groups])
        self._entries = fresh._entries


def _plain(sample):
    return sample.plain() if isinstance(sample, Sample) else sample


def _sample(plain):
    return Sample(**plain) if isinstance(plain, dict) and "response" in plain else plain

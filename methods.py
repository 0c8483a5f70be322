"""The family on one screen: a line per number, a row per algorithm, the schedule.

A method is data. A row of ROWS names functions (objective, advantage, weights) and values; every
cell is a flag of its own. The functions are pure, and the names of their parameters say what they
read: tensors by the vocabulary of loss.py, numbers by their flags. So what a run has to compute
follows from them: a critic exists where `values` is read, the base is kept where `logp_base` is,
the precedent where `logp_prev` is and λ(t) < 1. To add a method: a function, a row, a line per
number of its own.
"""

import argparse
import inspect
import math
import os
import sys
from collections import ChainMap
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from operator import attrgetter

import torch

from advantage import gae, group_advantages, vtrace, whiten
from family.ratios import truncated
from infra import config, memory
from infra.config import AUTHORS, INFERRED, PAPER, ConfigError, flag, need
from loss import entropy_bonus, kl, kl_convex, kl_lambda, mix_ppg, ppo, value_loss

# What the value of a cell's flag calls.
OBJECTIVES = {"mix-ppg": mix_ppg, "ppo": ppo}
ADVANTAGES = {"gae": gae, "vtrace": vtrace, "group": group_advantages}
WEIGHTS = {"none": None, "truncated": truncated}
# Cell -> numerator and denominator of the ratio that its weight is a function of.
RATIOS = {"correct": ("logp_old", "logp_behavior"), "mismatch": ("logp_behavior", "logp_sampler")}
# Added to the objective, each times the flag that it stands under; off where that is 0.
TERMS = {"beta": kl_convex, "entropy": entropy_bonus}

# fmt: off
# One row per algorithm: values of flags.
PPO = dict(advantage="gae", group_size=1)
GRPO = dict(advantage="group", group_size=8)
ON_POLICY = dict(p=0.0, utd=1, reincarnate=0, lambda_floor=1.0)
MIX = dict(p=0.4, utd=2, reincarnate=0, lambda_floor=1.0)
ROWS = {
    "ppo": PPO | ON_POLICY,
    "grpo": GRPO | ON_POLICY,
    "mix-ppo": PPO | MIX,
    "mix-grpo": GRPO | MIX,
    "remix-ppo": PPO | MIX | dict(reincarnate=100, lambda_floor=0.5),
    "remix-grpo": GRPO | MIX | dict(reincarnate=50, lambda_floor=0.5),
    "decoupled": GRPO | ON_POLICY | dict(p=0.4, objective="ppo", correct="truncated",
                                         correct_high=5.0, beta=0.0),
}

# One line per number. None: the function's own default.
NUMBERS = {
    # the row and its cells
    "algo": flag("remix-ppo", "row of defaults", choices=ROWS, fixed=True),
    "objective": flag("mix-ppg", "policy objective", PAPER, choices=OBJECTIVES, fixed=True),
    "advantage": flag("gae", "gae: a critic; group: group baseline", PAPER,
                      choices=("gae", "group"), fixed=True),
    "history_advantage": flag("gae", "of history under a critic: GAE, or GePPO's V-trace",
                              INFERRED, choices=("gae", "vtrace"),
                              needs="values"),
    "correct": flag("none", "weight π_k/π_behaviour of the objective, which does not see who wrote",
                    choices=WEIGHTS),
    "mismatch": flag("auto", "weight π_behaviour/π_engine of it; auto: truncated, none where all "
                     "is float32", INFERRED, choices=("auto", *WEIGHTS)),
    # the schedule
    "steps": flag(350, "training steps", PAPER, least=1, most=10**6),
    "prompts": flag(256, "B: prompts (groups) a step, history included, over all ranks", AUTHORS,
                    least=1, fixed=True),
    "group_size": flag(1, "responses to a prompt", "inferred for GRPO: 8 gives the published "
                       "rollout counts", least=1, fixed=True),
    "p": flag(0.4, "share of each batch drawn from history, in [0, 1)", PAPER, fixed=True),
    "window": flag(2, "N: how many policy versions back history may be", PAPER, least=1,
                   most=10**4, needs="p", fixed=True),
    "utd": flag(2, "m: gradient passes over each batch", "paper; as passes: inferred", least=1,
                fixed=True),
    "utd_after": flag(1, "m after reincarnation", INFERRED, least=1, needs="reincarnate",
                      fixed=True),
    "reincarnate": flag(0, "T: then base <- policy, history off; 0: never", "paper: 50 or 100",
                        fixed=True),
    "minibatch": flag(32, "prompts per gradient update, over all ranks (the last one smaller)",
                      AUTHORS, least=1, fixed=True),
    "lambda_start": flag(50, "step after which λ(t) falls", PAPER, needs="logp_prev", fixed=True),
    "lambda_every": flag(10, "steps between falls", PAPER, least=1, needs="logp_prev", fixed=True),
    "lambda_drop": flag(0.1, "size of a fall", PAPER, needs="logp_prev", fixed=True),
    "lambda_floor": flag(0.5, "lowest λ(t); 1: KL to the base alone", PAPER, most=1, needs="beta",
                         fixed=True),
    "anchor": flag("prev", "precedent policy: prev = π_{k−1}, old = π_k", PAPER,
                   choices=("prev", "old"), needs="logp_prev", fixed=True),
    # the loss
    "clip_low": flag(None, "ε below the clip's centre", AUTHORS, type=float),
    "clip_high": flag(None, "ε above the clip's centre", AUTHORS, type=float),
    "correct_low": flag(None, "least --correct weight", type=float),
    "correct_high": flag(None, "largest --correct weight", type=float),
    "mismatch_low": flag(None, "least --mismatch weight", type=float),
    "mismatch_high": flag(None, "largest --mismatch weight", INFERRED, type=float),
    "beta": flag(1e-3, "weight of the KL term", INFERRED, fixed=True),
    "kl_estimator": flag(None, "per-token KL estimator", INFERRED, choices=("k1", "k2", "k3")),
    "entropy": flag(1e-3, "c: weight of the entropy bonus", INFERRED),
    "aggregate": flag("token", "how per-token losses become one number", INFERRED,
                      choices=("token", "sequence", "constant")),
    "gamma": flag(None, "discount", AUTHORS, type=float, most=1),
    "gae_lambda": flag(None, "λ of GAE and V-trace", AUTHORS, type=float, most=1),
    "c_bar": flag(None, "largest ratio that V-trace trusts", "GePPO", type=float),
    "normalize_std": flag(None, "divide a group's advantages by their spread", "GRPO", type=bool),
    "baseline_drop": flag(None, "lowers the baseline by this share of the mean reward",
                          "Asymmetric REINFORCE; as a share: ours", type=float),
    "value_clip": flag(None, "clip of the critic's change", AUTHORS, type=float),
    "temperature": flag(1.0, "of sampling in training; log-probs are taken at it", INFERRED,
                        least=0.01, fixed=True),
    # optimisation
    "lr": flag(1e-6, "learning rate of the policy", AUTHORS, most=1e3),
    "critic_lr": flag(1e-5, "learning rate of the critic", AUTHORS, most=1e3, needs="values"),
    "warmup": flag(0, "steps of linear learning-rate warm-up", AUTHORS, fixed=True),
    "weight_decay": flag(0.01, "of AdamW", "inferred: AdamW's default"),
    "adam_beta2": flag(0.999, "second β of AdamW (the first is 0.9)", "inferred: AdamW's default",
                       most=0.9999999),
    "grad_clip": flag(1.0, "largest gradient norm", AUTHORS, least=1e-9),
}
# fmt: on


class ByName:
    """A function called with arguments found by name. renamed: parameter -> its name here."""

    def __init__(self, function, **renamed):
        self.function, own = function, inspect.signature(function).parameters
        self.names = {name: renamed.get(name, name) for name in own}
        self.defaults = {
            self.names[n]: p.default for n, p in own.items() if p.default is not p.empty
        }

    def __call__(self, *sources):
        """Call it with what `sources` (dicts, the first wins) hold; None is its own default."""
        found, arguments = ChainMap(*sources), {}
        for name, known_as in self.names.items():
            if known_as not in self.defaults or found.get(known_as) is not None:
                arguments[name] = found[known_as]
        return self.function(**arguments)


@dataclass(frozen=True)
class Plan:
    """What one training step does, by flags and time alone. Groups count over all ranks."""

    step: int
    phase: str  # mixed: with history; on-policy
    first: int  # position of the step's first prompt in the endless stream
    fresh: int  # groups to generate
    history: int  # groups to draw
    passes: int  # m, over the mixture
    updates: int  # optimiser steps
    lam: float  # λ(t), weight of the base in KL-convex
    scale: float  # factor of the learning rates
    references: dict  # name of each frozen policy that is due -> its version
    keep_old: bool  # π_k is the next step's precedent
    reincarnate: bool  # base <- policy at the end, history off

    @property
    def version(self):
        return self.step - 1

    @property
    def remember(self):
        """Whether the fresh groups are pushed: a later step may draw them."""
        return self.phase == "mixed"


class Method:
    """The functions that a run with these flags calls, and what follows from them."""

    def __init__(self, cfg):
        self.cfg, self.numbers = cfg, vars(cfg)
        self.objective = ByName(OBJECTIVES[cfg.objective])
        credit = cfg.advantage if cfg.advantage != "gae" else cfg.history_advantage
        self.estimator = ByName(ADVANTAGES[credit], lam="gae_lambda")
        self.critic = "values" in self.estimator.names
        self.whiten, self.value_loss = ByName(whiten), ByName(value_loss, clip="value_clip")
        # learner -> its loss, and how that is averaged over tokens
        self.losses = {
            "policy": (self.policy_loss, cfg.aggregate),
            "critic": (self.critic_loss, "token"),
        }
        self.weights = {}
        for cell in RATIOS:
            if weight := WEIGHTS.get(getattr(cfg, cell)):
                limits = dict(weight_low=f"{cell}_low", weight_high=f"{cell}_high")
                self.weights[cell] = ByName(weight, **limits)
        self.terms = {
            name: ByName(term, estimator="kl_estimator")
            for name, term in TERMS.items()
            if getattr(cfg, name)
        }
        shape = {name: f"lambda_{name}" for name in ("start", "every", "drop", "floor")}
        self.weight_of_base = ByName(kl_lambda, **shape)
        # all functions that the run calls, and the names of what they read: tensors and numbers
        self.active = [self.objective, self.estimator, *self.weights.values(), *self.terms.values()]
        self.active += [self.whiten, self.value_loss] * self.critic
        self.active += [self.weight_of_base] * bool(cfg.beta)
        ratios = {name for cell in self.weights for name in RATIOS[cell]}
        self.reads = ratios.union(*(function.names.values() for function in self.active))
        if cfg.lambda_floor == 1:  # then λ(t) never leaves 1
            self.reads -= {"logp_prev"}
        # the frozen policies that a run keeps from its start
        self.frozen = ["base"] if "logp_base" in self.reads else []

    def reads_number(self, name):
        """Whether the run looks at the number `name`."""
        one = NUMBERS[name]
        if one.needs:
            return bool(self.numbers.get(one.needs)) or one.needs in self.reads
        return one.default is not None or name in self.reads

    def check(self):
        """Raise ConfigError for what cannot work and for typed numbers that nothing reads."""
        cfg = self.cfg
        need(cfg.p < 1, f"--p is {cfg.p}: the share of history must lie in [0, 1)")
        need(
            self.plan(1).fresh >= 1,
            f"--prompts {cfg.prompts} with --p {cfg.p} leaves no fresh group in a step: raise "
            "--prompts or lower --p",
        )
        need(
            self.critic or cfg.group_size >= 2,
            "--group_size is 1: a group baseline needs at least 2 responses to a prompt",
        )
        need(
            "correct" not in self.weights or "logp_behavior" not in self.objective.names,
            f"--objective {cfg.objective} takes its ratio against the writer already: --correct "
            "none, or --objective ppo",
        )
        for name in sorted(cfg.given & NUMBERS.keys()):
            if not self.reads_number(name):
                rows = [row for row in ROWS if of_row(row).reads_number(name)]
                raise ConfigError(
                    f"--{name} is not read by this run (--algo {cfg.algo}): leave it out; rows "
                    f"that read it: {', '.join(rows) or 'none'}"
                )

    def resolve(self):
        """Where a number is still None, take the function's own default: for config.json."""
        for function in self.active:
            for name, value in function.defaults.items():
                if self.numbers.get(name, 0) is None:
                    setattr(self.cfg, name, value)

    # The schedule: a pure function of flags and step, shared by --dry_run and the loop.

    def plan(self, step):
        """The Plan of training step `step` (from 1). History is what the window holds by then, at
        most ⌈pB⌉ groups."""
        cfg, k = self.cfg, step - 1
        before = cfg.reincarnate == 0 or step <= cfg.reincarnate
        share = math.ceil(Fraction(str(cfg.p)) * cfg.prompts)  # no float error: 0.07 * 100 is 7
        fresh = cfg.prompts - (share if before else 0)
        history = min(share, fresh * min(cfg.window, k)) if before else 0
        mixed = min(k, cfg.reincarnate or k)  # steps of the first phase behind us
        passes = cfg.utd if before else cfg.utd_after
        lam, later = (self.weight_of_base({"step": t}, self.numbers) for t in (step, step + 1))
        references = dict.fromkeys(self.frozen, 0 if before else cfg.reincarnate)
        if "logp_prev" in self.reads and lam < 1:
            references["prev"] = k if cfg.anchor == "old" else max(k - 1, 0)  # π_{−1} = π_0
        return Plan(
            step=step,
            phase="mixed" if before and cfg.p > 0 else "on-policy",
            first=k * cfg.prompts - mixed * share,
            fresh=fresh,
            history=history,
            passes=passes,
            updates=passes * math.ceil((fresh + history) / cfg.minibatch),
            lam=lam,
            scale=min(1.0, step / cfg.warmup) if cfg.warmup else 1.0,
            references=references,
            keep_old="logp_prev" in self.reads and cfg.anchor == "prev" and later < 1,
            reincarnate=step == cfg.reincarnate,
        )

    # What the functions make of a batch.

    @torch.no_grad()
    def credit(self, batch):
        """Step 4: the columns `advantages` and, with a critic, `returns` of the batch, (T,) a
        sample, under π_k.

        With a critic rewards stand at the end token, and the advantages are whitened over all
        tokens of the mixture.
        """
        lengths = [len(sample.response) for sample in batch.samples]
        if not self.critic:
            b = batch.padded(("group", "reward"))
            rewards, group = b["reward"][:, 0].float(), b["group"][:, 0]  # (B,) each
            advantages = self.estimator({"rewards": rewards, "group": group}, self.numbers)  # (B,)
            batch["advantages"] = [a.expand(n) for a, n in zip(advantages, lengths)]
            return
        batch["rewards"] = [torch.zeros(n) for n in lengths]
        for rewards, sample in zip(batch["rewards"], batch.samples):
            rewards[-1] = sample.reward
        b = batch.padded([name for name in self.estimator.names if batch.has(name)])
        advantages, returns = self.estimator(b, self.numbers)  # (B, T) each
        batch["returns"] = [row[:n] for row, n in zip(returns, lengths)]
        advantages = self.whiten({"advantages": advantages}, b, self.numbers)  # (B, T)
        batch["advantages"] = [row[:n] for row, n in zip(advantages, lengths)]

    def columns(self, batch):
        """The names of the batch's columns that the losses read."""
        return sorted(name for name in self.reads | {"is_fresh"} if batch.has(name))

    def policy_loss(self, b, out, plan):
        """The objective times its weights plus its terms.

        b: columns of the batch, out: `logp` and `entropy` with gradient, (b, T) each. Returns the
        per-token loss and detached statistics, name -> (b, T).
        """
        b = b | out
        absent = dict.fromkeys(("logp_base", "logp_prev"))
        sources = (b, absent, {"lam": plan.lam}, self.numbers)
        loss, stats = self.objective(*sources)
        for cell, weight in self.weights.items():
            above, below = RATIOS[cell]
            stats[f"{cell}_weight"] = weight({"log_ratio": b[above] - b[below]}, *sources)
            loss = loss * stats[f"{cell}_weight"]
        stats |= {"policy_loss": loss.detach(), "entropy": b["entropy"].detach()}
        for name, term in self.terms.items():
            loss = loss + getattr(self.cfg, name) * term(*sources)
        for name in plan.references:
            measured = ByName(kl, logp_ref=f"logp_{name}", estimator="kl_estimator")
            stats[f"kl_{name}"] = measured(*sources).detach()
        return loss, stats

    def critic_loss(self, b, out, plan):
        """The value loss and its statistics, as policy_loss. out: `values` with gradient."""
        loss = self.value_loss(out, b | {"values_old": b["values"]}, self.numbers)
        return loss, {"value_loss": loss.detach()}


def of_row(row):
    """The Method of a row of ROWS with nothing else given."""
    values = {name: one.default for name, one in NUMBERS.items()}
    return Method(argparse.Namespace(**(values | ROWS[row])))


def parse(argv):
    """Flags -> checked namespace (infra/config.py). Answers --dry_run. Raises ConfigError."""
    cfg = config.parse(argv, NUMBERS, ROWS)
    world = (cfg.gpus or cfg.tp) if cfg.dry_run else int(os.environ.get("WORLD_SIZE", 1))
    config.check(cfg, config.FLAGS | NUMBERS, world)
    if cfg.mismatch == "auto" and cfg.given & {"mismatch_low", "mismatch_high"}:
        cfg.mismatch = "truncated"
    if not cfg.dry_run:
        config.check_files(cfg)
        if cfg.dtype == "auto":
            cfg.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        # in float32 trainer and engine differ by rounding alone
        auto = "none" if cfg.dtype == "float32" else "truncated"
        cfg.mismatch = auto if cfg.mismatch == "auto" else cfg.mismatch
    method = Method(cfg)
    method.check()
    method.resolve()
    if cfg.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(dry_run(cfg))
        sys.exit(0)
    return cfg


def total_rollouts(cfg, steps):
    """Responses generated for training in the steps 1 .. `steps`, over all ranks."""
    return Method(cfg).plan(steps + 1).first * cfg.group_size


def dry_run(cfg):
    """The schedule as text, phase by phase; the last line is `total rollouts: N`."""
    method, lines = Method(cfg), []
    plans = [method.plan(step) for step in range(1, cfg.steps + 1)]
    for shape, alike in groupby(plans, attrgetter(*"phase fresh history passes updates".split())):
        phase, fresh, history, passes, updates = shape
        first, *_, last = [plan.step for plan in alike] * 2
        lines.append(
            f"steps {first:>5} to {last:>5}: {phase:<9}  {fresh} fresh + {history} history groups "
            f"of {cfg.group_size}, {passes} passes = {updates} updates a step"
        )
    if 0 < cfg.reincarnate < cfg.steps:
        lines.append(f"reincarnation after step {cfg.reincarnate}: base <- policy, history off")
    called = ", ".join(function.function.__name__ for function in method.active)
    kept = {name for p in plans for name, version in p.references.items() if version < p.version}
    models = ["policy", *["critic"] * method.critic, *sorted(kept)]
    lines.append(f"calls {called}; keeps {', '.join(models)}")
    lines.append(f"gradient updates: {sum(plan.updates for plan in plans)}")
    if cfg.gpus:
        lines += memory.report(cfg, cfg.gpus, cfg.gpu_memory)
    lines.append(f"total rollouts: {total_rollouts(cfg, cfg.steps)}")
    return "\n".join(lines)

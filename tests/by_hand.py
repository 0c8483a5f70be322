"""A batch whose every token has an id of its own, so that a policy is a table of log-probs and each
quantity of a step can be followed in plain Python; learners without FSDP.

Samples of ages 0, 0, 1 and 2 at version 5 (step 6), ragged; token ids 10 to 17.
"""

import contextlib
import math
from collections import namedtuple

import torch

import methods
from buffer import Batch, Sample
from infra.ranks import Ranks
from methods import Plan
from model import Learner

F64 = torch.float64
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
# new: the policy now; old: π_k; gap: the engine's number less the behaviour's; now: the critic
Token = namedtuple("Token", "new old behavior base prev entropy advantage gap values now returns")
# fmt: off
TOKENS = {
    # r = e^0.5 > 1.2, A > 0: clipped high
    10: Token(-0.50, -1.00, -1.00, -0.90, -1.10, 0.30, 1.0, -0.6, 0.2, 0.9, 1.0),
    # r = e^-0.6 < 0.8, A < 0: clipped low
    11: Token(-2.60, -2.00, -2.00, -1.00, -2.10, 0.10, -1.0, -0.9, 0.3, 0.1, 0.8),
    # inside
    12: Token(-0.45, -0.50, -0.50, -0.70, -0.40, 0.70, 2.0, 0.0, 0.6, 0.6, 1.0),
    # r = e^-0.5 < 0.8, but A > 0: inside
    13: Token(-1.50, -1.00, -1.00, -1.40, -1.20, 1.10, 0.5, -0.3, 0.1, 0.0, 0.0),
    # r = 1.82 < c + 0.2, c = e^0.5: inside
    14: Token(-1.00, -1.10, -1.60, -1.30, -1.60, 0.20, 1.0, -0.6, 0.5, 1.2, 0.9),
    # r = 0.90 > c + 0.2, c = e^-0.7: high
    15: Token(-0.30, -0.90, -0.20, -0.80, -0.20, 0.50, 0.7, -0.9, 0.4, 0.8, 1.0),
    # r = 0.74 < c - 0.2, c = e^0.2: low
    16: Token(-2.00, -1.50, -1.70, -1.00, -1.60, 0.90, -0.3, 0.0, 0.7, 0.2, 0.1),
    # c = e^0.15, r = e^0.2: inside
    17: Token(-0.80, -0.85, -1.00, -0.75, -0.95, 0.40, -1.5, -0.3, 0.9, 0.4, 0.0),
}
# fmt: on


# ---- what is to be found, in plain Python


def k3(x):
    return math.exp(-x) + x - 1


def ratio(above, below, low=0.0, high=math.inf):
    return min(max(math.exp(above - below), low), high)


def objective_of(t, cfg, new=None):
    """The policy's loss on token t before its terms, weights included."""
    one = TOKENS[t]
    writer = one.old if cfg.objective == "ppo" else one.behavior
    r, c = ratio(one.new if new is None else new, writer), ratio(one.old, writer)
    clipped = min(max(r, c - cfg.clip_low), c + cfg.clip_high)
    loss = -min(r * one.advantage, clipped * one.advantage)
    if cfg.correct == "truncated":
        loss *= ratio(one.old, one.behavior, cfg.correct_low, cfg.correct_high)
    if cfg.mismatch == "truncated":
        loss *= ratio(-one.gap, 0, cfg.mismatch_low, cfg.mismatch_high)
    return loss


def loss_of(t, cfg, lam, new):
    one = TOKENS[t]
    divergence = lam * k3(new - one.base) + (1 - lam) * k3(new - one.prev)
    return objective_of(t, cfg, new) + cfg.beta * divergence - cfg.entropy * one.entropy


def value_loss_of(t, clip=0.5):
    one = TOKENS[t]
    clipped = min(max(one.now, one.values - clip), one.values + clip)
    return max((one.now - one.returns) ** 2, (clipped - one.returns) ** 2) / 2


# ---- the same for the code under test


def settings(flags="", **values):
    """What methods.parse makes of the flags, for a float32 machine; `values` go over it."""
    cfg = methods.parse(["--out", "/nowhere/run", "--dtype", "float32", *flags.split()])
    vars(cfg).update(values)
    return cfg


def plan(**changes):
    """The Plan of step 6 of the batch by hand."""
    usual = dict(step=6, phase="mixed", first=10, fresh=2, history=2, passes=2, updates=2)
    usual |= dict(lam=0.7, scale=1.0, references={"base": 0, "prev": 4}, keep_old=True)
    return Plan(**usual | dict(reincarnate=False) | changes)


def row(tokens, column):
    return torch.tensor([getattr(TOKENS[t], column) for t in tokens], dtype=F64)


def sample(version, tokens, reward=0.0, prompt_index=0, **more):
    """A Sample of these token ids with what stays with it."""
    usual = dict(truncated=False, answer="7", reason=None if reward else "wrong")
    usual |= dict(logp_behavior=row(tokens, "behavior"), logp_base=row(tokens, "base"))
    usual["logp_sampler"] = row(tokens, "behavior") + row(tokens, "gap")
    prompt = torch.tensor([3] * (prompt_index % 3 + 1))
    known = dict(version=version, reward=reward, prompt_index=prompt_index)
    return Sample(prompt=prompt, response=torch.tensor(tokens), **known, **usual | more)


def batch_by_hand():
    """The batch with all columns of step 5, each response a group."""
    fresh = [
        [sample(5, [10, 11, 12], 1.0, 0, reflects=True)],
        [sample(5, [13], 0.0, 1, truncated=True, reason="truncated")],
    ]
    batch = Batch(fresh, [[sample(4, [14, 15], 1.0, 2)], [sample(3, [16, 17], 0.0, 3)]])
    columns = dict(logp_old="old", logp_base="base", logp_prev="prev", advantages="advantage")
    for name, column in (columns | dict(values="values", returns="returns")).items():
        batch[name] = [row(s.response.tolist(), column) for s in batch.samples]
    return batch


class Table(torch.nn.Module):
    """A policy (names logp, entropy) or critic (values) that is a table by token id."""

    def __init__(self, **tables):
        super().__init__()
        for name, table in tables.items():
            entries = torch.zeros(18, dtype=F64)
            entries[list(table)] = torch.tensor(list(table.values()), dtype=F64)
            self.register_parameter(name, torch.nn.Parameter(entries))
        self.predicts = next(iter(tables))

    @property
    def tables(self):
        return dict(self.named_parameters())

    def forward(self, ids, where, tokens, mask):
        rows = torch.arange(len(ids))[:, None].expand_as(where)
        # logits are read one before their token
        assert not mask.any() or (ids[rows[mask], where[mask] + 1] == tokens[mask]).all()
        return {name: torch.where(mask, table[tokens], 0.0) for name, table in self.tables.items()}


class Plain(Learner):
    """A Learner of a module that nothing shards. micro: its micro-batches, if they are given."""

    def __init__(self, module, lr, cfg, ranks=ALONE, micro=None):
        self.module, self.lr, self.cfg, self.ranks, self.micro = module, lr, cfg, ranks, micro
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
        self.gradients = []  # of each update, by name of the table

    def micro_batches(self, samples):
        return self.micro or super().micro_batches(samples)

    def step(self, scale):
        tables = self.module.tables.items()
        self.gradients.append({name: t.grad.clone() for name, t in tables if t.grad is not None})
        return super().step(scale)

    @contextlib.contextmanager
    def swapped(self, snapshot):
        live = self.snapshot()
        self._set(snapshot)
        yield
        self._set(live)

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self.module.parameters(), values, strict=True):
            parameter.copy_(value)


def learners(cfg, micro=None):
    """Policy and critic of the batch by hand."""
    new, entropy, now = (
        {t: getattr(one, name) for t, one in TOKENS.items()} for name in ("new", "entropy", "now")
    )
    policy, critic = Table(logp=new, entropy=entropy), Table(values=now)
    return {
        "policy": Plain(policy, cfg.lr, cfg, micro=micro),
        "critic": Plain(critic, cfg.critic_lr, cfg, micro=micro),
    }

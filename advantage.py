"""Advantages and critic targets: pure functions of tensors, without gradient.

    GAE      δ_t = r_t + γ·V_{t+1} − V_t     A_t = δ_t + γλ·A_{t+1}   R_t = A_t + V_t          gae
    V-trace  c̄_t = min(c_bar, π_k/π_{k−i})   A_t = δ_t + γλ·c̄_{t+1}·A_{t+1}
                                                                  R_t = c̄_t·A_t + V_t      vtrace
    group    A = (R − mean of the group) / (std of the group + 1e-6)                group_advantages

GAE is arXiv 1506.02438; the V-trace form is GePPO's (arXiv 2111.00072), where the product of
truncated ratios starts at t + 1 because the objective already carries the ratio of token t; the
group baseline is GRPO's (arXiv 2402.03300). ReMix asks for A under π_k, also on tokens that π_{k−i}
wrote, and does not say how: that choice is inferred.

B responses, T response tokens. V_t is read where token t is predicted; r_t is in units of reward. V
beyond the response is 0. Outputs are 0 where the mask is 0, and what the inputs hold there, NaN
included, touches nothing.
"""

import torch

from loss import LOG_RATIO_MAX


def _backward(rewards, values, trace, mask, gamma, lam):
    """A_t = δ_t + γλ·trace_{t+1}·A_{t+1} and trace_t·A_t + V_t, from last to first: (B, T)."""
    keep = mask != 0  # (B, T)
    rewards, values, trace = (torch.where(keep, x, 0.0) for x in (rewards, values, trace))
    advantages = torch.zeros_like(rewards + values)  # (B, T)
    next_value = next_advantage = advantages.new_zeros(len(keep))  # (B,): V and c̄·A at t + 1
    for t in reversed(range(keep.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantages[:, t] = torch.where(keep[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], trace[:, t] * advantages[:, t]
    return advantages, trace * advantages + values


@torch.no_grad()
def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438). All tensors (B, T).

        δ_t = r_t + γ·V_{t+1} − V_t    A_t = δ_t + γλ·A_{t+1}    returns = A + V

    With γ = λ = 1 and a reward at the last token only, A_t = reward − V_t. Returns (advantages,
    returns), not whitened: the critic's target needs A as it is, and whitening is over the whole
    training step (see `whiten`).
    """
    return _backward(rewards, values, torch.ones_like(values), mask, gamma, lam)


@torch.no_grad()
def vtrace(rewards, values, logp_old, logp_behavior, mask, gamma=1.0, lam=1.0, c_bar=1.0):
    """V-trace advantages of GePPO (arXiv 2111.00072), for tokens of a past policy: (B, T) each.

        c̄_t = min(c_bar, π_k/π_{k−i})    A_t = δ_t + γλ·c̄_{t+1}·A_{t+1}    returns = c̄_t·A_t + V_t

    What follows token t counts as far as π_k would have gone there too. Equal to `gae` where
    logp_behavior = logp_old (and c_bar ≥ 1). Returns (advantages, returns).
    """
    ratio = torch.exp((logp_old - logp_behavior).clamp(max=LOG_RATIO_MAX))  # (B, T)
    trace = ratio.clamp(max=c_bar)  # (B, T): c̄
    return _backward(rewards, values, trace, mask, gamma, lam)


@torch.no_grad()
def group_advantages(rewards, group, normalize_std=True, baseline_drop=0.0):
    """GRPO's advantage of each response against the others of its prompt: (B,).

    rewards (B,), group (B,) int.

        A = (R − V) / (std + 1e-6), unbiased std, V = (1 − baseline_drop)·mean
        A = R − V without normalize_std (Dr. GRPO, arXiv 2503.20783)

    Group ids are any integers in any order. A group of one has A = 0, and so has a group of equal
    rewards. baseline_drop: see `whiten`.
    """
    # index (B,), sizes (G,)
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    # double: in float32 the mean of equal rewards may miss them, and 1e-6 would magnify that
    exact = rewards.double()  # (B,)
    total = torch.zeros(len(sizes), dtype=exact.dtype, device=exact.device)  # (G,)
    mean = total.index_add(0, index, exact) / sizes  # (G,)
    centred = exact - mean[index]  # (B,)
    variance = total.index_add(0, index, centred.square()) / (sizes - 1).clamp(min=1)  # (G,)
    if baseline_drop:
        centred = centred + baseline_drop * torch.where(variance > 0, mean, 0.0)[index]
    if normalize_std:
        centred = centred / (variance.sqrt()[index] + 1e-6)
    return centred.to(torch.result_type(rewards, 1.0))


@torch.no_grad()
def whiten(advantages, mask, rewards=None, baseline_drop=0.0):
    """Shift and scale to mean 0 and (unbiased) variance 1 over the tokens of the mask; 0 elsewhere.

        A = (A − mean + baseline_drop·R̄) / (std + 1e-8)

    baseline_drop lowers the baseline by so many times the mean reward R̄ of a response (rewards:
    (B, T), wherever in its row a response's reward stands): off-policy, a baseline below the
    expected reward improves the policy surely, one above may ruin it (Asymmetric REINFORCE, arXiv
    2506.20520; relative to the mean: ours). Without a spread to divide by the result is 0.
    """
    keep = mask != 0  # (B, T)
    tokens = keep.sum().clamp(min=1)
    exact = torch.where(keep, advantages, 0.0).double()  # (B, T)
    centred = torch.where(keep, exact - exact.sum() / tokens, 0.0)  # (B, T)
    std = (centred.square().sum() / (tokens - 1).clamp(min=1)).sqrt()
    if baseline_drop and std > 1e-6:
        mean_reward = torch.where(keep, rewards, 0.0).double().sum() / len(keep)
        centred = torch.where(keep, centred + baseline_drop * mean_reward, 0.0)
    return (centred / (std + 1e-8)).to(advantages.dtype)

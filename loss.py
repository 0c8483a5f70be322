"""Objectives and KL terms of ReMix (arXiv 2507.06892): pure functions of tensors.

One training step k starts at the policy π_k. Its batch holds fresh samples (i = 0) and samples that
a past policy π_{k−i} wrote. On every token, with r = π_θ / π_{k−i} and c = π_k / π_{k−i},

    Mix-PPG    L = −E_{i~ν} E_{π_{k−i}} [ min( r·A, clip(r, c − ε, c + ε)·A ) ]        mix_ppg
    PPO        the same around π_k: r = π_θ / π_k, c = 1                               ppo
    KL-Convex  L = λ(t)·KL(π_θ ‖ π_base) + (1 − λ(t))·KL(π_θ ‖ π_{k−1})                kl_convex
               λ(t) = max( 1 − 0.1·⌈max(t − 50, 0)/10⌉, 0.5 )                          kl_lambda
    critic     L = ½·max( (V − R)², (clip(V, V_old − ε_v, V_old + ε_v) − R)² )         value_loss
    ReMix      Mix-PPG − c_H·entropy + β·KL-Convex, averaged over tokens               aggregate

    symbol       variable        shape   meaning
    log π_θ      logp            (B, T)  the policy being trained, with gradient
    log π_k      logp_old        (B, T)  the policy at the start of this training step
    log π_{k−i}  logp_behavior   (B, T)  who wrote the sample (= logp_old where it is fresh)
    log π_base   logp_base       (B, T)  the KL anchor
    log π_{k−1}  logp_prev       (B, T)  the precedent policy
    r, c         ratio, centre   (B, T)  importance ratio and clip centre
    A            advantages      (B, T)  advantage under π_k
    ε            clip_low/high   –       clip half-widths, absolute: not multiplied by c
    λ(t)         lam             –       weight of π_base; t is the training step, from 1
    V, V_old, R  values, values_old, returns  (B, T)  critic now, at the start of the step, target

B responses, T response tokens, right-padded. Log-probs are in nats, at the sampling temperature.

Where this departs from the paper, or fills in what it leaves open:
1. Two half-widths (clip_low, clip_high) where the paper has one ε. Its value is not published; 0.2
   is inferred.
2. Log-ratios are clamped to ±20 before exp, so that no weight or gradient overflows. Beyond that
   the token has no gradient. Within it nothing changes. k3 needs the clamp on one side only; k1 and
   k2 need none.
3. The KL estimator is not published. k3 is inferred. Like the field, we evaluate it on the tokens
   of the batch as they are: the past ones are not re-weighted by r.
4. The token mean and the critic's clip of 0.5 are inferred: they are the defaults of the authors'
   codebase.
5. The entropy is a bonus: the paper's term has a plus sign inside a loss, which we read as a
   misprint.
"""

import torch

# nats; e^20 = 4.9e8 is finite in float32 and bfloat16, together with its gradient
LOG_RATIO_MAX = 20.0
ESTIMATORS = ("k1", "k2", "k3")
MODES = ("token", "sequence", "constant")


def mix_ppg(logp, logp_old, logp_behavior, advantages, clip_low=0.2, clip_high=0.2):
    """Mix-PPG (section "Mix-PPG" of the paper; GePPO's objective, arXiv 2111.00072). (B, T) each.

        r = exp(logp − logp_behavior)    c = exp(logp_old − logp_behavior)
        loss = −min( r·A, clip(r, c − clip_low, c + clip_high)·A )

    The centre is c, not 1: a past sample starts at r = c, inside the region, however far π_k has
    moved from π_{k−i}. With logp_behavior = logp_old, c = 1 and this is PPO clip. The half-width
    stays ε at every centre: at c = 2 and ε = 0.2 the bounds are 1.8 and 2.2.

    Returns (loss, stats): the per-token loss to minimise, differentiable in `logp` only, and
    detached (B, T) tensors
        ratio, centre   r and c
        clipped_high    1 where A > 0 and r > c + clip_high, else 0: the token has no gradient
        clipped_low     1 where A < 0 and r < c − clip_low, else 0: the token has no gradient
    """
    logp_old, logp_behavior = logp_old.detach(), logp_behavior.detach()
    advantages = advantages.detach()
    ratio = torch.exp((logp - logp_behavior).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX))  # (B, T)
    centre = torch.exp((logp_old - logp_behavior).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX))  # (B, T)
    low, high = centre - clip_low, centre + clip_high  # (B, T)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)  # (B, T)

    r = ratio.detach()
    stats = {
        "ratio": r,
        "centre": centre,
        "clipped_low": ((advantages < 0) & (r < low)).to(r.dtype),
        "clipped_high": ((advantages > 0) & (r > high)).to(r.dtype),
    }
    return loss, stats


def ppo(logp, logp_old, advantages, clip_low=0.2, clip_high=0.2):
    """PPO's clip around π_k (arXiv 1707.06347): Mix-PPG as if π_k had written the sample.

        r = exp(logp − logp_old)    loss = −min( r·A, clip(r, 1 − clip_low, 1 + clip_high)·A )

    All tensors (B, T); returns what mix_ppg does. On a past sample it does not see who wrote it: a
    weight for that is the row's `correct` (family/ratios.py).
    """
    return mix_ppg(logp, logp_old, logp_old, advantages, clip_low, clip_high)


def kl(logp, logp_ref, estimator="k3"):
    """Per-token estimate of KL(π_θ ‖ π_ref) from sampled tokens; all tensors (B, T), differentiable
    in `logp` only.

    With x = logp − logp_ref (Schulman, "Approximating KL divergence"):

        k1 = x    k2 = x²/2    k3 = e^(−x) + x − 1

    k3 ≥ 0, with value and slope 0 at x = 0; it is constant for x < −20, where e^(−x) would
    overflow. As a loss k1 has no pull: on tokens of π_θ its mean gradient is zero. Raises
    ValueError on another estimator.
    """
    x = logp - logp_ref.detach()  # (B, T)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        x = x.clamp(min=-LOG_RATIO_MAX)
        # e^(−x) − 1 + x in float32 would round to noise, even below 0, near x = 0
        return torch.expm1(-x) + x
    raise ValueError(f"estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")


def kl_convex(logp, logp_base, logp_prev, lam, estimator="k3"):
    """KL-Convex: lam·KL(π_θ ‖ π_base) + (1 − lam)·KL(π_θ ‖ π_{k−1}), per token (B, T).

    A term of weight 0 is not looked at, so `logp_prev` may be None where lam = 1 (and `logp_base`
    where lam = 0). Raises ValueError if lam is outside [0, 1] or the estimator is unknown.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam {lam} is outside [0, 1]: the two KL terms are combined convexly")
    anchors = (lam, logp_base), (1 - lam, logp_prev)
    return sum(weight * kl(logp, ref, estimator) for weight, ref in anchors if weight)


def kl_lambda(step, start=50, every=10, drop=0.1, floor=0.5):
    """λ(t) = max(1 − drop·⌈max(t − start, 0)/every⌉, floor), for training step t = 1, 2, …

    `start` and `every` are in training steps. With the paper's values: 1 up to t = 50, 0.9 for
    51–60, …, 0.5 from 91. Returns a float without rounding dust (0.8, never 0.7999…). Raises
    ValueError if every ≤ 0.
    """
    if every <= 0:
        raise ValueError(f"every {every}: λ falls once every so many steps, which must be positive")
    # ceiling division in integers: no float to round the wrong way
    drops = -(-max(step - start, 0) // every)
    return float(max(round(1 - drop * drops, 10), floor))


def entropy_bonus(entropy):
    """−H per token (B, T): a loss that falls as the entropy of π_θ rises, times its weight c_H."""
    return -entropy


def value_loss(values, values_old, returns, clip=0.5):
    """Clipped critic loss of PPO, per token (B, T), differentiable in `values` only.

    ½·max( (V − R)², (clip(V, V_old − clip, V_old + clip) − R)² ), with `clip` in units of reward.
    Being the larger of the two, it stops rewarding V for nearing R once V is further than `clip`
    from V_old, and still penalises leaving R.
    """
    values_old, returns = values_old.detach(), returns.detach()
    clipped = values.clamp(values_old - clip, values_old + clip)  # (B, T)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def aggregate(per_token, mask, mode="token", denominator=None):
    """Average a per-token quantity (B, T) over the tokens where mask (B, T) is not 0; a scalar.

        "token"      Σ over tokens / number of tokens
        "sequence"   Σ over sequences of their token means / number of non-empty sequences
        "constant"   Σ over tokens / denominator

    `denominator` replaces the local count by the global one (tokens, or sequences for "sequence"):
    the results of micro-batches and ranks then add up to that of the whole minibatch, whatever
    their sizes. Masked positions touch neither the value nor the gradient, whatever they hold. With
    no token at all the result is a 0 that can be back-propagated (also when the global count is 0).
    Raises ValueError on another mode, on "constant" without a denominator (or with 0), and on
    shapes that differ.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    if mode == "constant" and not denominator:
        raise ValueError('mode "constant" divides by a constant: give a denominator other than 0')
    if mask.shape != per_token.shape:  # broadcasting would miscount the tokens
        raise ValueError(f"mask has shape {tuple(mask.shape)}, per_token {tuple(per_token.shape)}")
    keep = mask != 0  # (B, T)
    tokens = keep.sum(-1)  # (B,)
    sums = torch.where(keep, per_token, 0.0).sum(-1)  # (B,); not a product: 0·NaN = NaN
    if mode == "sequence":
        total, count = (sums / tokens.clamp(min=1)).sum(), (tokens > 0).sum()
    else:
        total, count = sums.sum(), tokens.sum()
    return total / (count.clamp(min=1) if denominator is None else denominator or 1)

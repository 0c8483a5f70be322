"""Importance weights that multiply a policy loss: pure functions of log-ratios, without gradient.

    decoupled PPO   L = PPO's clip around π_k · min( π_k / π_behaviour, h )     --correct truncated
    TIS             L = L · min( π_behaviour / μ, h ), μ being the engine       --mismatch truncated

The same function serves both: staleness (who wrote a sample is not who proposes, π_k) and the gap
between trainer and engine, which round otherwise.

    decoupled PPO   arXiv 2110.00641 (the objective), 2505.24298 (AReaL: for language models)
                    h = 5: confirmed in AReaL's code
    TIS             Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
                    training"; h = 2: the default of verl and slime
"""

from loss import LOG_RATIO_MAX


def truncated(log_ratio, mask, weight_low=0.0, weight_high=2.0):
    """w = e^x, at least weight_low and at most weight_high, per token (B, T), without gradient.

    log_ratio x (B, T), in nats. Where the two policies agree, w = 1 and nothing changes; cutting
    from above bounds the variance and makes up for the ratio except where it is large. The mask
    (B, T) is what weights over sequences read.
    """
    ratio = log_ratio.detach().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    return ratio.clamp(weight_low, weight_high)

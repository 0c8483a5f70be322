"""family/ and the objectives that it weighs, against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from family.ratios import truncated
from loss import mix_ppg, ppo

F64 = torch.float64
HYPOTHESIS = settings(deadline=None, max_examples=60)
EPSILON = 0.2
close = torch.testing.assert_close


def tokens(seed, *, moved):
    """logp (with gradient), logp_old, logp_behavior, advantages, (4, 6) each; `moved`: how far π_θ
    is from π_k."""
    g = torch.Generator().manual_seed(seed)
    old, noise, stale, advantages = (torch.randn(4, 6, generator=g, dtype=F64) for _ in range(4))
    return (old + moved * noise).requires_grad_(), old, old + 0.7 * stale, advantages


def weight(log_ratio, **limits):
    return truncated(log_ratio, torch.ones_like(log_ratio), **limits)


def value_and_gradient(loss, logp):
    return loss.detach(), torch.autograd.grad(loss.sum(), logp)[0]


# ---- weights


def test_truncated_by_hand():
    x = torch.tensor([[0.0, 0.3, -0.6, 1.0, -61.0, 89.0]], dtype=F64)
    wanted = [[1.0, math.exp(0.3), math.exp(-0.6), 2.0, math.exp(-20.0), 2.0]]
    close(weight(x), torch.tensor(wanted, dtype=F64))  # e^1 and e^89 are cut at 2
    assert weight(x, weight_high=1.1).max() == 1.1
    assert weight(x, weight_low=0.7).tolist()[0][2] == 0.7
    assert torch.isfinite(weight(x.float(), weight_high=math.inf)).all()


def test_a_weight_of_policies_that_agree_is_1_and_none_carries_a_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    found = weight(x)
    assert torch.equal(found, torch.ones(2, 3)) and not found.requires_grad
    assert not x.any() and x.grad is None


@HYPOTHESIS
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(-3, 3), st.floats(-3, 3))
def test_an_unbounded_weight_is_unbiased_on_a_two_armed_bandit(p, b, first, second):
    """E_b[w·A·∇log π_k] = Σ_a π_k(a)·A(a)·∇log π_k(a), in closed form p(1 − p)(A_1 − A_2)."""
    theta = torch.tensor(math.log(p / (1 - p)), dtype=F64, requires_grad=True)
    logp = torch.stack([theta, -theta * 0]).log_softmax(0)[None]  # (1, 2): both arms
    writer = torch.tensor([[b, 1 - b]], dtype=F64)
    advantages = torch.tensor([[first, second]], dtype=F64)
    loss, _ = ppo(logp, logp.detach(), advantages)
    loss = loss * weight(logp.detach() - writer.log(), weight_high=math.inf)
    (slope,) = torch.autograd.grad((writer * loss).sum(), theta)
    assert -slope.item() == pytest.approx(p * (1 - p) * (first - second), abs=1e-9)


# ---- decoupled PPO: ppo · min(π_k/π_behaviour, h)


@HYPOTHESIS
@given(st.integers(0, 2**32))
def test_decoupled_is_mix_ppg_where_the_writer_is_the_old_policy(seed):
    logp, old, _, advantages = tokens(seed, moved=0.3)
    found = value_and_gradient(ppo(logp, old, advantages)[0] * weight(old - old), logp)
    wanted = value_and_gradient(mix_ppg(logp, old, old, advantages)[0], logp)
    assert all(map(torch.equal, found, wanted))


@HYPOTHESIS
@given(st.integers(0, 2**32))
def test_decoupled_is_mix_ppg_inside_both_regions(seed):
    """w = c = π_k/π_behaviour, r = c·π_θ/π_k: the same value, the same gradient."""
    logp, old, behavior, advantages = tokens(seed, moved=0.1)
    c = weight(old - behavior, weight_high=math.inf)
    ratio = (logp - old).detach().exp()
    inside = (ratio - 1).abs() < EPSILON * 0.999
    inside &= (c * ratio - c).abs() < EPSILON * 0.999
    assert inside.any()
    decoupled = value_and_gradient(ppo(logp, old, advantages, EPSILON, EPSILON)[0] * c, logp)
    mixed = mix_ppg(logp, old, behavior, advantages, EPSILON, EPSILON)[0]
    for found, wanted in zip(decoupled, value_and_gradient(mixed, logp)):
        close(found[inside], wanted[inside])


@HYPOTHESIS
@given(st.integers(0, 2**32))
def test_outside_its_half_width_is_c_epsilon_against_epsilon(seed):
    logp, old, behavior, advantages = tokens(seed, moved=0.5)
    c = weight(old - behavior, weight_high=math.inf)
    loss, stats = ppo(logp, old, advantages, EPSILON, EPSILON)
    clipped = (stats["clipped_low"] + stats["clipped_high"]).bool()
    decoupled = value_and_gradient(loss * c, logp)
    wide = mix_ppg(logp, old, behavior, advantages, EPSILON * c, EPSILON * c)[0]
    for found, wanted in zip(decoupled, value_and_gradient(wide, logp)):
        close(found, wanted)
    value, slope = decoupled
    close(value[clipped], -(c * (1 + EPSILON * advantages.sign()) * advantages)[clipped])
    assert clipped.any() and not slope[clipped].any()

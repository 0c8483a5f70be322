"""advantage.py against direct double sums, closed forms and small cases by hand."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advantage import gae, group_advantages, vtrace, whiten

F64 = torch.float64
HYPOTHESIS = settings(deadline=None, max_examples=60)
JUNK = [1e9, -1e9, math.nan, math.inf, -math.inf]
close = torch.testing.assert_close


def t(*values):
    return torch.tensor([values], dtype=F64)  # (1, T)


def batch(seed, rows=4, length=6):
    """rewards, values, logp_old, logp_behavior, mask, (B, T) each; an empty row and a full one."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, length, generator=g, dtype=F64) for _ in range(4)]
    lengths = torch.randint(0, length + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = 0, length
    return *tensors, (torch.arange(length) < lengths[:, None]).to(F64)


# ---- slow oracles: the sums written out, one response at a time, no recursion


def slow(rewards, values, trace, gamma, lam):
    """A_t = Σ_{j ≥ t} (γλ)^(j−t) · Π_{m = t+1 … j} c̄_m · δ_j, and c̄_t·A_t + V_t. Lists."""
    delta = [r + gamma * v - u for r, v, u in zip(rewards, [*values[1:], 0.0], values)]
    advantages = []
    for s in range(len(delta)):
        terms = [
            (gamma * lam) ** j * math.prod(trace[s + 1 : s + 1 + j]) for j in range(len(delta))
        ]
        advantages.append(sum(term * d for term, d in zip(terms, delta[s:])))
    return advantages, [c * a + v for c, a, v in zip(trace, advantages, values)]


def slow_batch(rewards, values, trace, mask, gamma, lam):
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, n in enumerate(mask.sum(1).int().tolist()):
        a, r = slow(*(x[b, :n].tolist() for x in (rewards, values, trace)), gamma, lam)
        advantages[b, :n], returns[b, :n] = torch.tensor(a, dtype=F64), torch.tensor(r, dtype=F64)
    return advantages, returns


# ---- gae


@HYPOTHESIS
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(seed, gamma, lam):
    rewards, values, _, _, mask = batch(seed)
    expected = slow_batch(rewards, values, torch.ones_like(values), mask, gamma, lam)
    for got, want in zip(gae(rewards, values, mask, gamma, lam), expected):
        close(got, want)


def test_gae_by_hand():
    rewards, values, mask = t(0.0, 0.0, 1.0, 7.0), t(0.5, 0.6, 0.8, 7.0), t(1.0, 1.0, 1.0, 0.0)
    # γ = λ = 0.5: δ = (0.3 − 0.5, 0.4 − 0.6, 1 − 0.8) = (−0.2, −0.2, 0.2); not the padding's value
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    close(advantages, t(-0.2 + 0.25 * -0.15, -0.2 + 0.25 * 0.2, 0.2, 0.0))
    close(returns, t(0.2625, 0.45, 1.0, 0.0))


def test_gae_with_gamma_and_lambda_1_is_reward_to_go_minus_value():
    rewards, values, _, _, mask = batch(1)
    advantages, returns = gae(rewards, values, mask)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    close(returns, to_go)
    close(advantages, to_go - values * mask)


def test_gae_at_the_ends_of_lambda():
    rewards, values, _, _, _ = batch(2)
    mask = torch.ones_like(rewards)
    one_step = rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(4, 1)], 1) - values
    close(gae(rewards, values, mask, 0.9, 0.0)[0], one_step)
    close(gae(rewards, values, mask, 0.0, 0.7)[0], rewards - values)


# ---- vtrace


@HYPOTHESIS
@given(
    st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1.0, 0.5, 2.0, 0.0])
)
def test_vtrace_is_the_double_sum(seed, gamma, lam, c_bar):
    rewards, values, old, behavior, mask = batch(seed)
    trace = torch.minimum(old.exp() / behavior.exp(), torch.tensor(c_bar, dtype=F64))
    expected = slow_batch(rewards, values, trace, mask, gamma, lam)
    for got, want in zip(vtrace(rewards, values, old, behavior, mask, gamma, lam, c_bar), expected):
        close(got, want)


@HYPOTHESIS
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_vtrace_equals_gae_when_behavior_is_old(seed, gamma, lam):
    rewards, values, old, behavior, mask = batch(seed)
    plain = gae(rewards, values, mask, gamma, lam)
    assert all(map(torch.equal, vtrace(rewards, values, old, old, mask, gamma, lam), plain))
    surer = torch.maximum(old, behavior)  # π_k ≥ π_{k−i}: truncated at 1, so the same again
    assert all(map(torch.equal, vtrace(rewards, values, surer, behavior, mask, gamma, lam), plain))


def test_vtrace_by_hand():
    """c = (1/2, 1/4, 2 → 1), γ = λ = 1, reward 1 at the end: δ = (0.1, 0.2, 0.6)."""
    rewards, values, mask = t(0.0, 0.0, 1.0), t(0.1, 0.2, 0.4), t(1.0, 1.0, 1.0)
    behavior = t(-1.0, -1.0, -1.0)
    old = behavior + t(0.5, 0.25, 2.0).log()
    advantages, returns = vtrace(rewards, values, old, behavior, mask)
    close(advantages, t(0.1 + 0.25 * 0.8, 0.2 + 1 * 0.6, 0.6))  # the ratio of t + 1, not of t
    close(returns, t(0.5 * 0.3 + 0.1, 0.25 * 0.8 + 0.2, 1 * 0.6 + 0.4))  # here the ratio of t
    advantages, _ = vtrace(rewards, values, old, behavior, mask, c_bar=3.0)
    close(advantages, t(0.1 + 0.25 * 1.4, 0.2 + 2 * 0.6, 0.6))


def test_vtrace_does_not_overflow():
    ones, zeros = torch.ones(1, 3), torch.zeros(1, 3)
    for c_bar in (1.0, math.inf):
        for gap in (1e4, -1e4):
            out = vtrace(ones, zeros, gap * ones, zeros, ones, c_bar=c_bar)
            assert all(torch.isfinite(x).all() for x in out)


# ---- masks, for both


@pytest.mark.parametrize("junk", JUNK)
def test_padding_touches_nothing_and_comes_out_0(junk):
    *clean, mask = batch(4)
    dirty = [torch.where(mask != 0, x, junk) for x in clean]
    dirty[1] = torch.where(mask != 0, clean[1], -junk)  # inf − inf as well
    for function, n in ((gae, 2), (vtrace, 4)):
        found = function(*dirty[:n], mask, 0.9, 0.8)
        for got, want in zip(found, function(*clean[:n], mask, 0.9, 0.8)):
            assert torch.equal(got, want)
            assert not got[mask == 0].any() and got[mask != 0].all()


def test_more_padding_and_other_rows_change_nothing():
    *inputs, mask = batch(5)
    padded = [torch.nn.functional.pad(x, (0, 3), value=math.nan) for x in inputs]
    longer = torch.nn.functional.pad(mask, (0, 3))
    for function, n in ((gae, 2), (vtrace, 4)):
        want = function(*inputs[:n], mask)
        for got, wanted in zip(function(*padded[:n], longer), want):
            assert torch.equal(got[:, :6], wanted) and not got[:, 6:].any()
        for order in ([2, 0, 3, 1], [0], [1], [2], [3]):  # also one response at a time
            found = function(*(x[order] for x in inputs[:n]), mask[order])
            assert all(torch.equal(got, wanted[order]) for got, wanted in zip(found, want))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtypes_are_kept_inputs_untouched_and_nothing_needs_grad(dtype, mask_dtype):
    *inputs, mask = batch(6)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in inputs]
    mask = mask.to(mask_dtype)
    outputs = [*gae(*inputs[:2], mask), *vtrace(*inputs, mask), whiten(inputs[0], mask)]
    outputs.append(group_advantages(inputs[0][:, 0], torch.tensor([0, 1, 0, 1])))
    for x in outputs:
        assert x.dtype == dtype and not x.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches(shape):
    x = torch.zeros(shape)
    for out in (*gae(x, x, x), *vtrace(x, x, x, x, x), whiten(x, x)):
        assert out.shape == shape
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


# ---- group_advantages


@HYPOTHESIS
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.floats(-2, 2)), min_size=1, max_size=20),
    st.booleans(),
)
def test_group_advantages_is_the_oracle(rows, normalize_std):
    ids, rewards = zip(*rows)
    expected = []
    for i, r in rows:
        mates = [reward for j, reward in rows if j == i]
        spread = statistics.stdev(mates) if len(mates) > 1 else 0.0
        expected.append((r - statistics.mean(mates)) / (spread + 1e-6 if normalize_std else 1.0))
    got = group_advantages(torch.tensor(rewards, dtype=F64), torch.tensor(ids), normalize_std)
    close(got, torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-8)


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 5.0, 0.0, 0.0, 1.0, 0.0, 1.0], dtype=F64)
    group = torch.tensor([7, -2, 7, 7, 100, 7, 100])  # any ids in any order; -2 is alone
    unbiased = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    expected = torch.tensor([0.75, 0, -0.25, -0.25, 0, -0.25, 0], dtype=F64)
    close(group_advantages(rewards, group, normalize_std=False), expected)
    close(group_advantages(rewards, group), expected / (unbiased + 1e-6), rtol=1e-12, atol=0)
    assert group_advantages(rewards, group)[[1, 4, 6]].eq(0).all()


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_a_group_of_equal_rewards_has_no_advantage(reward, size):
    got = group_advantages(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64))
    assert torch.equal(got, torch.zeros(size))


@HYPOTHESIS
@given(st.permutations(range(8)), st.permutations([-5, 0, 3, 10**12]))
def test_group_order_and_names_do_not_matter(order, names):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0.5])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    want = group_advantages(rewards, group)
    close(group_advantages(rewards[order], torch.tensor(names)[group][order]), want[order])


def test_group_advantages_of_integers_are_floats():
    got = group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]), normalize_std=False)
    assert torch.equal(got, torch.tensor([0.5, -0.5]))


# ---- whiten


@HYPOTHESIS
@given(st.integers(0, 2**32), st.sampled_from(JUNK))
def test_whiten_is_the_oracle(seed, junk):
    advantages, *_, mask = batch(seed)
    valid = advantages[mask != 0].tolist()
    expected = torch.zeros_like(advantages)
    expected[mask != 0] = torch.tensor(
        [(x - statistics.mean(valid)) / (statistics.stdev(valid) + 1e-8) for x in valid], dtype=F64
    )
    got = whiten(torch.where(mask != 0, advantages, junk), mask)
    close(got, expected)
    assert got[mask != 0].mean().abs() < 1e-12 and got[mask != 0].std() == pytest.approx(
        1, rel=1e-6
    )


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, 0.3, -1e3])
@pytest.mark.parametrize("tokens", [0, 1, 2, 6])
def test_whiten_without_spread_is_0(value, tokens, drop):
    x = torch.full((2, 3), math.nan)
    mask = (torch.arange(6) < tokens).reshape(2, 3)
    x[mask] = value
    close(whiten(x, mask, torch.ones(2, 3), drop), torch.zeros(2, 3), rtol=0, atol=1e-6)


# ---- the lowered baseline


@HYPOTHESIS
@given(st.integers(0, 2**32), st.sampled_from([0.25, 0.5, 2.0]), st.sampled_from(JUNK))
def test_a_lowered_baseline_is_whitened_like_the_usual_one(seed, drop, junk):
    """A = R − (V − drop·R̄), shifted by the mean of R − V and divided by its spread."""
    rewards, values, *_, mask = batch(seed)
    keep, raw = mask != 0, rewards - values
    mean_reward = rewards[keep].sum() / len(mask)
    lowered = (rewards - (values - drop * mean_reward))[keep]
    expected = (lowered - raw[keep].mean()) / (raw[keep].std() + 1e-8)
    got = whiten(torch.where(keep, raw, junk), mask, torch.where(keep, rewards, junk), drop)
    close(got[keep], expected)
    assert not got[~keep].any()
    assert torch.equal(whiten(raw, mask, rewards, 0.0), whiten(raw, mask))


def test_a_lowered_baseline_of_groups_by_hand():
    """V = (1 − drop)·mean in groups that have a spread; equal rewards still say nothing."""
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 0, 1], dtype=F64)
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    got = group_advantages(rewards, group, normalize_std=False, baseline_drop=0.5)
    close(got, torch.tensor([0.75, -0.25, 0, 0, 0, 0, 0], dtype=F64))
    scaled = group_advantages(rewards, group, baseline_drop=0.5)
    close(scaled, got / (math.sqrt(0.5) + 1e-6), rtol=1e-12, atol=0)
    usual = group_advantages(rewards, group)
    assert torch.equal(group_advantages(rewards, group, baseline_drop=0.0), usual)

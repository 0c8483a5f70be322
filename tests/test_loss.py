"""loss.py against closed forms, slow oracles written another way, and finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import (
    ESTIMATORS,
    MODES,
    aggregate,
    entropy_bonus,
    kl,
    kl_convex,
    kl_lambda,
    mix_ppg,
    ppo,
    value_loss,
)

F64 = torch.float64
HYPOTHESIS = settings(deadline=None, max_examples=60)
JUNK = [1e9, -1e9, math.nan, math.inf, -math.inf]
SEEDS = st.integers(0, 2**32)


def t(*values, grad=False):
    return torch.tensor([values], dtype=F64, requires_grad=grad)  # (1, T)


def normal(seed, *shape, count=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=F64) for _ in range(count)]


def grad_of(loss, logp):
    return torch.autograd.grad(loss.sum(), logp)[0]


# ---- slow oracles: plain floats, by cases instead of min and clip


def slow_mix_ppg(logp, logp_old, logp_behavior, advantage, clip_low, clip_high):
    """(loss, d loss / d logp, clipped_low, clipped_high) of one token."""
    r, c = math.exp(logp) / math.exp(logp_behavior), math.exp(logp_old) / math.exp(logp_behavior)
    if advantage > 0 and r - c > clip_high:
        return -(c + clip_high) * advantage, 0.0, 0.0, 1.0
    if advantage < 0 and c - r > clip_low:
        return (c - clip_low) * -advantage, 0.0, 1.0, 0.0
    return -r * advantage, -r * advantage, 0.0, 0.0


def slow_kl(x, estimator):
    return {"k1": x, "k2": x * x / 2, "k3": 1 / math.exp(x) - 1 + x}[estimator]


def slow_aggregate(per_token, mask, mode, denominator=None):
    rows = [[x for x, m in zip(row, row_mask) if m] for row, row_mask in zip(per_token, mask)]
    if mode == "sequence":
        means = [sum(row) / len(row) for row in rows if row]
        total, count = sum(means), len(means)
    else:
        total, count = sum(map(sum, rows)), sum(map(len, rows))
    return total / (denominator if denominator is not None else max(count, 1))


# ---- mix_ppg and ppo

LOGP, CLIP = st.floats(-3, 0), st.floats(0.01, 0.9)


@HYPOTHESIS
@given(st.tuples(LOGP, LOGP, LOGP, st.floats(-5, 5), CLIP, CLIP))
def test_mix_ppg_is_the_oracle(token):
    logp, old, behavior, advantage, low, high = token
    r, c = math.exp(logp - behavior), math.exp(old - behavior)
    if min(abs(r - c - high), abs(c - r - low)) < 1e-9:
        return  # on the kink the side is a matter of rounding
    x = t(logp, grad=True)
    loss, stats = mix_ppg(x, t(old), t(behavior), t(advantage), low, high)
    value, slope, clipped_low, clipped_high = slow_mix_ppg(*token)
    assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert grad_of(loss, x).item() == pytest.approx(slope, rel=1e-12, abs=1e-12)
    assert stats["ratio"].item() == pytest.approx(r, rel=1e-13)
    assert stats["centre"].item() == pytest.approx(c, rel=1e-13)
    assert stats["clipped_low"].item() == clipped_low
    assert stats["clipped_high"].item() == clipped_high


@HYPOTHESIS
@given(SEEDS)
def test_ppo_is_its_clip_and_mix_ppg_where_the_writer_is_the_old_policy(seed):
    old, advantages, noise = normal(seed, 3, 5, count=3)
    logp = (old + 0.3 * noise).requires_grad_()
    loss, stats = ppo(logp, old, advantages, 0.2, 0.28)
    mixed, same = mix_ppg(logp, old, old, advantages, 0.2, 0.28)
    slope = grad_of(loss, logp)
    assert torch.equal(loss, mixed) and torch.equal(slope, grad_of(mixed, logp))
    assert all(torch.equal(stats[name], same[name]) for name in same)
    r = (logp - old).exp()
    wanted = torch.max(-advantages * r, -advantages * torch.clamp(r, 1 - 0.2, 1 + 0.28))
    assert torch.equal(stats["centre"], torch.ones(3, 5, dtype=F64))
    torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, grad_of(wanted, logp), rtol=1e-14, atol=0)


# fmt: off
BOUNDS = [  # r, A, loss, slope, clipped low, high; the bounds at c = 2 are 1.8 and 2.2
    (1.79, 1.0, -1.79, -1.79, 0, 0),  # A > 0: the low side is never clipped
    (2.19, 1.0, -2.19, -2.19, 0, 0),
    (2.21, 1.0, -2.20, 0.0, 0, 1),
    (2.39, 1.0, -2.20, 0.0, 0, 1),  # 2.4 = 2·(1 + 0.2): still inside a half-width of ε·c
    (1.81, -3.0, 5.43, 5.43, 0, 0),
    (1.61, -3.0, 5.40, 0.0, 1, 0),  # 1.6 = 2·(1 − 0.2) would still be inside
    (9.00, -3.0, 27.0, 27.0, 0, 0),  # A < 0: the high side is never clipped
    (2.50, 0.0, 0.0, 0.0, 0, 0),
]
# fmt: on


@pytest.mark.parametrize("r, advantage, expected, slope, low, high", BOUNDS)
def test_the_half_width_is_of_the_ratio_not_of_the_centre(r, advantage, expected, slope, low, high):
    logp = t(math.log(r) - 3, grad=True)
    loss, stats = mix_ppg(logp, t(math.log(2) - 3), t(-3.0), t(advantage))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert grad_of(loss, logp).item() == pytest.approx(slope, abs=1e-12)
    assert (stats["clipped_low"].item(), stats["clipped_high"].item()) == (low, high)


def test_log_ratios_do_not_overflow_and_are_exact_up_to_20():
    gap = torch.tensor([[-1e4, -89.0, -20.0, 0.0, 20.0, 89.0, 1e4]])
    zeros = torch.zeros_like(gap)
    for advantage in (1.0, -1.0):
        for fixed in (zeros, gap):  # also a past policy far from π_k
            logp = gap.clone().requires_grad_()
            loss, stats = mix_ppg(logp, fixed, zeros, torch.full_like(gap, advantage))
            for x in (loss, grad_of(loss, logp), *stats.values()):
                assert torch.isfinite(x).all()
    for x in (-19.9, 19.9):
        loss, stats = mix_ppg(t(x), t(x), t(0.0), t(-1.0))
        assert loss.item() == stats["ratio"].item() == stats["centre"].item() == math.exp(x)


# ---- kl, kl_convex, kl_lambda


@HYPOTHESIS
@given(st.floats(-15, 15), st.sampled_from(ESTIMATORS))
def test_kl_is_the_oracle(x, estimator):
    expected = slow_kl((x - 1) + 1, estimator)
    assert kl(t(x - 1), t(-1.0), estimator).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(kl(t(x), t(-1.0)), kl(t(x), t(-1.0), "k3"))


def test_kl_expectation_is_the_exact_divergence():
    """Under π the mean of k1, and of k3, is KL(π ‖ ref): not KL(ref ‖ π)."""
    pi, ref = torch.tensor([0.7, 0.2, 0.1], dtype=F64), torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    exact = (pi * (pi / ref).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((pi * kl(pi.log(), ref.log(), estimator)).sum(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_k3_is_never_negative_and_keeps_its_digits_near_zero(dtype):
    x = 10.0 ** torch.arange(-8, 2, 0.01, dtype=F64)
    x = torch.cat([x, -x, torch.zeros(1, dtype=F64)]).to(dtype)
    assert (kl(x, torch.zeros_like(x)) >= 0).all()
    assert kl(t(1e-3), t(0.0)).item() == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_does_not_overflow_and_is_exact_up_to_20(estimator):
    far = torch.tensor([[-1e4, -89.0, 89.0, 1e4]], requires_grad=True)
    value = kl(far, torch.zeros(1, 4), estimator)
    assert torch.isfinite(value).all() and torch.isfinite(grad_of(value, far)).all()
    wanted = pytest.approx(slow_kl(-19.9, estimator), rel=1e-12)
    assert kl(t(-19.9), t(0.0), estimator).item() == wanted


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_convex_weighs_base_with_lambda(estimator):
    logp, base, prev = -1.0, -1.5, -1.1
    for lam in (0.0, 0.3, 0.5, 0.9, 1.0):
        wanted = lam * slow_kl(logp - base, estimator) + (1 - lam) * slow_kl(logp - prev, estimator)
        found = kl_convex(t(logp), t(base), t(prev), lam, estimator)
        torch.testing.assert_close(found, t(wanted))


def test_kl_convex_does_not_look_at_a_term_of_weight_0():
    logp, other, nan = t(-1.0, grad=True), t(-2.0), t(math.nan)
    for base, prev, lam in ((other, None, 1.0), (None, other, 0.0), (other, nan, 1)):
        value = kl_convex(logp, base, prev, lam)
        assert torch.equal(value, kl(logp, other)) and torch.isfinite(grad_of(value, logp)).all()
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="lam"):
            kl_convex(logp, other, other, lam)


def test_lambda_table():
    """==, not approx: no 0.7999999."""
    for step in range(500):
        falls = min(5, 1 + (step - 51) // 10) if step > 50 else 0
        assert kl_lambda(step) == (10 - falls) / 10 and isinstance(kl_lambda(step), float)
    assert [kl_lambda(step) for step in (50, 51, 60, 61, 91)] == [1.0, 0.9, 0.9, 0.8, 0.5]


# fmt: off
LAMBDAS = [
    (20, dict(start=20, every=5), 1), (21, dict(start=20, every=5), 0.9),
    (25, dict(start=20, every=5), 0.9), (26, dict(start=20, every=5), 0.8),
    (3, dict(start=0, every=1, drop=0.25, floor=0.1), 0.25),
    (4, dict(start=0, every=1, drop=0.25, floor=0.1), 0.1),
    (100, dict(floor=1.0), 1), (10**6, dict(floor=1 / 3), 1 / 3), (51, dict(drop=0.0), 1),
    (111, dict(floor=0.0), 0.3),  # 1 − 0.1·7 is 0.29999999999999993 in floats
    # the ceiling is exact also where a float quotient is not: (10¹⁷ + 1)/10¹⁶ rounds to 10
    (10**17 + 1, dict(start=0, every=10**16, drop=0.01), 0.89),
]
# fmt: on


def test_lambda_arguments():
    for step, arguments, lam in LAMBDAS:
        assert kl_lambda(step, **arguments) == lam, (step, arguments)
    with pytest.raises(ValueError, match="every"):
        kl_lambda(60, every=0)


# ---- value_loss


# fmt: off
VALUES = [  # V − V_old, R − V_old, loss, slope
    (0.3, 1.0, 0.5 * 0.49, -0.7),  # inside the clip: plain squared error
    (0.8, 1.0, 0.5 * 0.25, 0.0),  # beyond it towards the target: held at V_old + 0.5
    (-0.8, -1.0, 0.5 * 0.25, 0.0),
    (0.8, -1.0, 0.5 * 3.24, 1.8),  # beyond it away from the target: the full error
    (2.0, 1.0, 0.5 * 1.0, 1.0),  # overshoot: (2 − 1)² > (0.5 − 1)²
]
# fmt: on


@pytest.mark.parametrize("value, target, expected, slope", VALUES)
def test_value_loss_by_hand(value, target, expected, slope):
    for old in (0.0, 5.0):  # the clip is around the old value
        v = t(old + value, grad=True)
        loss = value_loss(v, t(old), t(old + target))
        assert loss.item() == pytest.approx(expected)
        assert grad_of(loss, v).item() == pytest.approx(slope, abs=1e-9)
    assert value_loss(t(0.4), t(0.0), t(1.0), clip=0.2).item() == pytest.approx(0.5 * 0.8**2)


# ---- aggregate


def random_batch(seed, rows=5, length=7):
    g = torch.Generator().manual_seed(seed)
    per_token = torch.randn(rows, length, generator=g, dtype=F64)
    lengths = torch.randint(0, length + 1, (rows,), generator=g)
    return per_token, (torch.arange(length) < lengths[:, None]).to(F64)


def average(per_token, mask, mode):
    return aggregate(per_token, mask, mode, 13.0 if mode == "constant" else None)


@HYPOTHESIS
@given(SEEDS, st.sampled_from(MODES), st.permutations(range(5)))
def test_aggregate_is_the_oracle_whatever_the_order_of_rows(seed, mode, order):
    per_token, mask = random_batch(seed)
    count = 13.0 if mode == "constant" else None
    expected = slow_aggregate(per_token.tolist(), mask.tolist(), mode, count)
    for dtype in (torch.bool, torch.int64, torch.float32, F64):
        got = average(per_token[order], mask[order].to(dtype), mode)
        assert got.shape == () and got.dtype == F64
        assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("junk", JUNK)
def test_padding_touches_neither_value_nor_gradient(mode, junk):
    per_token, mask = random_batch(3)
    assert 0 in mask.sum(1) and mask.any()  # an empty row among others
    dirty = torch.where(mask != 0, per_token, junk).requires_grad_()
    clean = torch.where(mask != 0, per_token, 0.0).requires_grad_()
    got, expected = average(dirty, mask, mode), average(clean, mask, mode)
    slope = grad_of(got, dirty)
    assert torch.equal(got, expected) and torch.equal(slope, grad_of(expected, clean))
    assert not slope[mask == 0].any() and slope[mask != 0].all()
    # more padding, more empty rows
    longer = torch.nn.functional.pad(dirty, (0, 4, 0, 2), value=junk)
    more = torch.nn.functional.pad(mask, (0, 4, 0, 2))
    torch.testing.assert_close(average(longer, more, mode), expected)


@HYPOTHESIS
@given(SEEDS, st.sampled_from(MODES), st.lists(st.integers(0, 5), max_size=4))
def test_micro_batches_with_the_global_denominator_add_up(seed, mode, cuts):
    per_token, mask = random_batch(seed)
    counts = {"token": int(mask.sum()), "sequence": int((mask.sum(1) > 0).sum()), "constant": 13.0}
    whole_x, split_x = per_token.clone().requires_grad_(), per_token.clone().requires_grad_()
    whole = average(whole_x, mask, mode)
    edges = [0, *sorted(cuts), 5]  # with equal edges: empty micro-batches
    total = 0.0
    for a, b in zip(edges, edges[1:]):
        part = aggregate(split_x[a:b], mask[a:b], mode, counts[mode])
        part.backward()
        total += part.item()
    whole.backward()
    assert total == pytest.approx(whole.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(split_x.grad, whole_x.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("denominator", [None, 0, 5])
def test_empty_mask_gives_a_zero_that_back_propagates(mode, shape, denominator):
    if mode == "constant" and not denominator:
        return
    x = torch.full(shape, math.nan, requires_grad=True)
    value = aggregate(x, torch.zeros(shape), mode, denominator)
    value.backward()
    assert value.item() == 0.0 and torch.equal(x.grad, torch.zeros(shape))


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="k1.*k2.*k3"):
        kl_convex(t(0.0), t(0.0), t(0.0), 0.7, "low_var_kl")
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for denominator in (None, 0):
        with pytest.raises(ValueError, match="denominator"):
            aggregate(x, mask, "constant", denominator)
    with pytest.raises(ValueError, match="token.*sequence.*constant"):
        aggregate(x, mask, "token-mean")
    with pytest.raises(ValueError, match="shape"):
        aggregate(x, mask[:, :1])


def test_differentiable_in_the_first_argument_only_and_inputs_untouched():
    """And statistics are detached floats of each token."""
    inputs = [x.requires_grad_() for x in normal(3, 2, 4, count=4)]
    before = [x.detach().clone() for x in inputs]
    x, a, b, c = inputs
    losses = [kl(x, a, estimator) for estimator in ESTIMATORS] + [kl_convex(x, a, b, 0.7)]
    losses += [value_loss(x, a, b), entropy_bonus(x)]
    for objective, stats in (mix_ppg(x, a, b, c), ppo(x, a, b)):
        losses.append(objective)
        assert set(stats) == {"ratio", "centre", "clipped_low", "clipped_high"}
        for value in stats.values():
            assert value.shape == (2, 4) and value.is_floating_point() and not value.requires_grad
    for one in losses:
        assert one.shape == (2, 4) and one.dtype == F64
        grads = torch.autograd.grad(one.sum(), inputs, allow_unused=True)
        assert grads[0] is not None and grads[1:] == (None, None, None)
    assert torch.equal(grad_of(entropy_bonus(x), x), -torch.ones(2, 4, dtype=F64))
    aggregate(x, torch.ones(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_finite_differences():
    """In float64, away from kinks; tokens on either side of every clip."""
    old, behavior, advantages, noise, returns = normal(1, 4, 8, count=5)
    logp = (old + 0.3 * noise).requires_grad_()
    off = ((logp - behavior).exp() - (old - behavior).exp()).abs()
    assert (off - 0.2).abs().min() > 1e-3, "on a kink: choose another seed"
    assert (off > 0.2).any() and ((logp - behavior).abs() > 0.5).any()
    functions = [
        lambda x: mix_ppg(x, old, behavior, advantages)[0],
        lambda x: value_loss(x, behavior, returns),
        *(lambda x, e=estimator: kl(x, old, e) for estimator in ESTIMATORS),
    ]
    assert all(torch.autograd.gradcheck(function, logp) for function in functions)

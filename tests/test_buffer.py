"""buffer.py: the ring against a plain model, the distribution of its draws; Sample and Batch."""

import collections
import copy
import itertools
import random
from dataclasses import fields

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffer import Batch, RingBuffer, Sample


def make_sample(version=0, prompt_index=0, length=2, **more):
    fixed = dict(prompt=torch.arange(3), response=torch.arange(length), truncated=False, answer="5")
    fixed["logp_sampler"] = torch.arange(length) / -2
    return Sample(version=version, prompt_index=prompt_index, **fixed, **more)


def filled(window, versions, groups_each):
    """A buffer of groups that name their version and prompt: it never looks inside one."""
    buffer = RingBuffer(window)
    for version in versions:
        buffer.push(version, [[(version, prompt)] for prompt in range(groups_each)])
    return buffer


def ids(groups):
    return [group[0] for group in groups]


def drawn_versions(buffer, version, seed=0, weights=None):
    return sorted({v for v, _ in ids(buffer.sample(99, version, random.Random(seed), weights))})


# ---- model: all that was ever pushed stays in a list; the contract's inequality says what is drawn


YES = st.booleans()


class BufferMachine(RuleBasedStateMachine):
    @initialize(window=st.integers(0, 4))
    def start(self, window):
        self.window, self.buffer = window, RingBuffer(window)
        self.pushed = []  # (version, prompt) of every group, never evicted
        self.step = 0  # the next push is of this version at least

    def drawable(self, version):
        return [(v, prompt) for v, prompt in self.pushed if 0 < version - v <= self.window]

    @rule(n_groups=st.integers(0, 4), skip=st.integers(0, 2), n=st.integers(1, 3))
    def push(self, n_groups, skip, n):
        version = self.step + skip
        groups = [[(version, prompt)] * n for prompt in range(n_groups)]
        self.buffer.push(version, groups)
        groups.append("the caller's list is the caller's")
        self.pushed += [(version, prompt) for prompt in range(n_groups)]
        self.step = version + 1

    @rule(n_groups=st.integers(0, 12), later=st.integers(0, 3), seed=st.integers(), weighted=YES)
    def sample(self, n_groups, later, seed, weighted):
        version = self.step + later
        weights = {age: age for age in range(1, self.window + 1)} if weighted else None
        drawn = ids(self.buffer.sample(n_groups, version, random.Random(seed), weights))
        assert drawn == ids(self.buffer.sample(n_groups, version, random.Random(seed), weights))
        assert len(set(drawn)) == len(drawn) == min(n_groups, len(self.drawable(version)))
        assert set(drawn) <= set(self.drawable(version))

    @rule(back=st.integers(1, 3))
    def stale_push_is_refused(self, back):
        newest = max((v for v, _ in self.drawable(self.step)), default=None)
        if newest is None:
            return
        before = ids(self.buffer.sample(99, self.step, random.Random(0)))
        with pytest.raises(ValueError, match="newer"):
            self.buffer.push(newest + 1 - back, [[(newest + 1 - back, 0)]])
        assert ids(self.buffer.sample(99, self.step, random.Random(0))) == before

    @rule(deep=YES)
    def save_and_load(self, deep):
        state = self.buffer.state_dict()
        self.buffer = RingBuffer(self.window)
        self.buffer.load_state_dict(copy.deepcopy(state) if deep else state)

    @invariant()
    def holds_exactly_what_can_still_be_drawn(self):
        held = self.drawable(self.step)
        assert len(self.buffer) == len(held)
        assert self.buffer.versions() == sorted({v for v, _ in held})
        drawn = self.buffer.sample(len(held) + 5, self.step, random.Random(1))
        assert sorted(ids(drawn)) == sorted(held)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


def test_window_of_2_draws_from_the_last_two_versions():
    """Never from its own; what else may happen is above."""
    buffer, seen = RingBuffer(2), []
    for k in range(5):
        seen.append(drawn_versions(buffer, k))
        buffer.push(k, [[(k, prompt)] for prompt in range(3)])
    assert seen == [[], [0], [0, 1], [1, 2], [2, 3]]
    assert buffer.versions() == [3, 4] and len(buffer) == 6


def test_groups_come_back_whole_and_as_the_same_objects():
    """Whatever they are: what the trainer notes in a sample stays with it."""
    group, text = [make_sample() for _ in range(8)], "a group of anything"
    buffer = RingBuffer(1)
    buffer.push(0, [group, text])
    drawn = buffer.sample(2, 1, random.Random(0))
    assert any(one is group for one in drawn) and any(one is text for one in drawn)
    group[3].logp_base = torch.zeros(2)
    drawn.clear()
    (again,) = [one for one in buffer.sample(2, 1, random.Random(1)) if one is group]
    assert len(buffer) == 2 and again[3].logp_base is not None


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="window"):
        RingBuffer(-1)
    buffer = filled(2, [0, 1], 2)
    for weights in (None, {1: 1.0}):
        with pytest.raises(ValueError, match="n_groups"):
            buffer.sample(-1, 2, random.Random(0), weights)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights"):
            buffer.sample(1, 2, random.Random(0), {1: 1.0, 2: weight})


# ---- the distribution of draws: chi-square with a fixed rng; bounds are the 99.9 % points


def chi_square(counts, expected):
    return sum((counts[key] - expected[key]) ** 2 / expected[key] for key in expected)


@pytest.mark.parametrize("weights", [None, {1: 2.0, 2: 2.0, 3: 2.0}])
def test_draws_are_uniform_over_all_groups(weights):
    buffer, sizes = RingBuffer(3), [1, 5, 6]  # uneven: uniform over groups, not over versions
    for version, n in enumerate(sizes):
        buffer.push(version, [[(version, prompt)] for prompt in range(n)])
    rng, trials = random.Random(0), 6000
    first, included = collections.Counter(), collections.Counter()
    for _ in range(trials):
        drawn = ids(buffer.sample(4, 3, rng, weights))
        first[drawn[0]] += 1
        included.update(drawn)
    every = [(version, prompt) for version, n in enumerate(sizes) for prompt in range(n)]
    assert chi_square(first, {key: trials / 12 for key in every}) < 31.3  # 11 degrees of freedom
    assert chi_square(included, {key: trials * 4 / 12 for key in every}) < 31.3


def test_weights_are_of_the_age_and_draws_without_replacement_follow_them():
    buffer, weights = filled(3, [0, 1, 2], 1), {1: 5.0, 2: 3.0, 3: 2.0}  # version 2 has age 1
    weight = {2: 0.5, 1: 0.3, 0: 0.2}
    rng, pairs, trials, expected = random.Random(1), collections.Counter(), 8000, {}
    for _ in range(trials):
        pairs[tuple(v for v, _ in ids(buffer.sample(2, 3, rng, weights)))] += 1
    for a, b in itertools.permutations(weight, 2):
        expected[a, b] = trials * weight[a] * weight[b] / (1 - weight[a])
    assert chi_square(pairs, expected) < 20.5  # 5 degrees of freedom


def test_weight_0_or_none_is_never_drawn_and_ages_move_with_the_step():
    buffer = filled(3, [0, 1, 2], 2)
    for weights in ({1: 1.0, 2: 0.0}, {1: 1e-300}, {1: 1e300}):
        for seed in range(20):
            assert drawn_versions(buffer, 3, seed, weights) == [2]
    assert drawn_versions(buffer, 3, weights={}) == []
    assert drawn_versions(buffer, 3, weights={2: 1.0}) == [1]
    assert drawn_versions(buffer, 4, weights={2: 1.0}) == [2]


def test_draws_depend_on_contents_and_rng_only():
    """Whatever the process, its hash seed and the machine: the same groups."""
    buffer, rng = filled(2, range(3), 9), random.Random(5)
    drawn = [ids(buffer.sample(3, 3, rng, weights)) for weights in (None, {1: 3.0, 2: 1.0}, None)]
    assert drawn == [[(1, 8), (2, 2), (1, 0)], [(2, 7), (1, 3), (2, 3)], [(2, 5), (1, 4), (2, 7)]]


# ---- state


@pytest.mark.parametrize("weights", [None, {1: 3.0, 2: 1.0}])
def test_state_survives_torch_save(tmp_path, weights):
    """Samples with every kind of value, read without running anything of the file."""
    buffer, logp = RingBuffer(2), torch.tensor([-0.1, -3.0])
    for v in (3, 4, 5):
        judged = make_sample(v, 7, reward=1.0, said="5", reflects=True, logp_behavior=logp)
        other = make_sample(v, 8, reason="no_box", logp_base=logp)
        buffer.push(v, [[judged, other], *([make_sample(v, i)] for i in range(5))])
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored = RingBuffer(2)
    restored.push(9, [[make_sample(9)]])  # replaced, not added to
    restored.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert restored.versions() == buffer.versions() == [4, 5] and len(restored) == 12
    draws = [each.sample(9, 6, random.Random(2), weights) for each in (buffer, restored)]
    for a, b in zip(*map(itertools.chain.from_iterable, draws), strict=True):
        assert type(b) is Sample
        for field in fields(Sample):
            x, y = getattr(a, field.name), getattr(b, field.name)
            both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
            assert torch.equal(x, y) and x.dtype == y.dtype if both else x == y


def test_a_state_is_a_picture_of_its_time():
    buffer, other = filled(2, [0], 2), RingBuffer(2)
    state = buffer.state_dict()
    buffer.push(1, [[(1, 0)]])
    other.load_state_dict(state)
    state["entries"][0][1].clear()
    assert len(buffer) == 3 and len(other) == 2
    with pytest.raises(ValueError):  # and a bad one leaves the buffer as it was
        other.load_state_dict({"window": 2, "entries": [(3, [[(3, 0)]]), (3, [[(3, 1)]])]})
    assert other.versions() == [0] and len(other) == 2


@pytest.mark.parametrize("window, versions", [(1, [5]), (9, [2, 3, 4, 5])])
def test_the_window_of_the_loading_buffer_holds(window, versions):
    buffer = RingBuffer(window)
    buffer.load_state_dict(filled(4, range(6), 2).state_dict())
    assert (buffer.window, buffer.versions()) == (window, versions)


# ---- Sample and Batch


@pytest.mark.parametrize("name", ["logp_old", "logp_prev", "values", "advantages", "returns"])
def test_nothing_of_one_step_can_be_left_in_a_sample(name):
    with pytest.raises(AttributeError):
        setattr(make_sample(), name, torch.zeros(2))
    batch, group = Batch([], [[sample := make_sample()]]), torch.zeros(2)
    batch[name] = [group]
    assert name not in sample.plain() and batch.has(name) and not Batch([], [[sample]]).has(name)


def make_batch():
    """Two fresh groups of 2, and a past one of 1; lengths 2, 3, 1, 4, 2."""
    first = [make_sample(6, 0, 2, reward=1.0), make_sample(6, 0, 3)]
    return Batch(
        [first, [make_sample(6, 1, 1), make_sample(6, 1, 4)]], [[make_sample(5, 9, 2, reward=0.5)]]
    )


def test_a_batch_holds_fresh_groups_then_history():
    batch = make_batch()
    assert batch.fresh == 4 and batch.groups == [[0, 1], [2, 3], [4]]
    assert batch["group"] == [0, 0, 1, 1, 2] and batch["is_fresh"] == [True] * 4 + [False]
    assert batch["version"] == [6, 6, 6, 6, 5] and batch["reward"] == [1.0, 0, 0, 0, 0.5]
    assert not Batch([], []).samples and Batch([], []).groups == []
    with pytest.raises(AttributeError):
        batch["logp_old"]


def test_columns_are_padded_by_name():
    batch = make_batch()
    batch["values"] = [torch.ones(len(s.response)) for s in batch.samples]
    found = batch.padded(("values", "logp_sampler", "reward", "group", "is_fresh"), [3, 0, 4])
    # fmt: off
    assert {name: column.tolist() for name, column in found.items()} == {
        "mask": [[True] * 4, [True, True, False, False], [True, True, False, False]],
        "values": [[1] * 4, [1, 1, 0, 0], [1, 1, 0, 0]],
        "logp_sampler": [[0, -0.5, -1, -1.5], [0, -0.5, 0, 0], [0, -0.5, 0, 0]],
        "reward": [[0.0], [1.0], [0.5]], "group": [[1], [0], [2]],
        "is_fresh": [[True], [True], [False]],
    }
    # fmt: on
    assert batch.padded(("version",))["version"].tolist() == [[6], [6], [6], [6], [5]]


def test_no_row_is_one_masked_position_of_every_column():
    found = make_batch().padded(("logp_sampler", "reward", "is_fresh"), [])
    assert set(found) == {"logp_sampler", "reward", "is_fresh", "mask"}
    assert all(column.tolist() == [[0]] for column in found.values())
    assert found["mask"].dtype == found["is_fresh"].dtype == torch.bool


def test_the_gap_is_of_the_fresh_tokens():
    batch = make_batch()
    for sample in batch.samples:
        sample.logp_behavior = sample.logp_sampler + 0.25 * (-1) ** len(sample.response)
    batch.samples[4].logp_behavior = torch.full((2,), 99.0)
    torch.testing.assert_close(batch.gap(), torch.full((10,), 0.25))

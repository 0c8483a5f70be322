"""buffer.py against a plain model, and the distribution of its draws."""

import collections
import copy
import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffer import RingBuffer

ROOT = Path(__file__).resolve().parent.parent


def make_group(version, prompt, n=2):
    return [
        {"version": version, "prompt": prompt, "logp": torch.tensor([0.5 * i, 1.0])}
        for i in range(n)
    ]


def filled(window, versions, groups_each):
    buffer = RingBuffer(window)
    for version in versions:
        buffer.push(version, [make_group(version, prompt) for prompt in range(groups_each)])
    return buffer


def ids(groups):
    return [(group[0]["version"], group[0]["prompt"]) for group in groups]


# ---- model: everything ever pushed stays in a deque; the contract's inequality says what may be drawn


class BufferMachine(RuleBasedStateMachine):
    @initialize(window=st.integers(0, 4))
    def start(self, window):
        self.window, self.buffer = window, RingBuffer(window)
        self.pushed = collections.deque()  # (version, prompt) of every group, never evicted
        self.step = 0  # training steps completed; the next push is of this version at least

    def drawable(self, version):
        return [(v, prompt) for v, prompt in self.pushed if 0 < version - v <= self.window]

    @rule(n_groups=st.integers(0, 4), skip=st.integers(0, 2), n=st.integers(1, 3))
    def push(self, n_groups, skip, n):
        version = self.step + skip
        groups = [make_group(version, prompt, n) for prompt in range(n_groups)]
        self.buffer.push(version, groups)
        groups.append("the caller's list is the caller's")
        self.pushed.extend((version, prompt) for prompt in range(n_groups))
        self.step = version + 1

    @rule(
        n_groups=st.integers(0, 12),
        later=st.integers(0, 3),
        seed=st.integers(),
        weighted=st.booleans(),
    )
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
            self.buffer.push(newest + 1 - back, [make_group(newest + 1 - back, 0)])
        assert ids(self.buffer.sample(99, self.step, random.Random(0))) == before

    @rule(deep=st.booleans())
    def save_and_load(self, deep):
        state = self.buffer.state_dict()
        self.buffer = RingBuffer(self.window)
        self.buffer.load_state_dict(copy.deepcopy(state) if deep else state)

    @invariant()
    def holds_exactly_what_can_still_be_drawn(self):
        held = self.drawable(self.step)
        assert len(self.buffer) == len(held)
        assert self.buffer.versions() == sorted({v for v, _ in held})
        assert sorted(
            ids(self.buffer.sample(len(held) + 5, self.step, random.Random(1)))
        ) == sorted(held)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


# ---- window and eviction, by hand


def test_window_of_2_draws_from_the_last_two_versions():
    buffer = RingBuffer(2)
    seen = []
    for k in range(5):
        seen.append(sorted({v for v, _ in ids(buffer.sample(100, k, random.Random(k)))}))
        buffer.push(k, [make_group(k, prompt) for prompt in range(3)])
    assert seen == [[], [0], [0, 1], [1, 2], [2, 3]]
    assert buffer.versions() == [3, 4] and len(buffer) == 6


def test_gaps_between_versions_age_as_well():
    buffer = filled(3, [0, 1, 2], 1)
    assert [sorted(ids(buffer.sample(9, k, random.Random(0)))) for k in (3, 4, 5, 6)] == [
        [(0, 0), (1, 0), (2, 0)],
        [(1, 0), (2, 0)],
        [(2, 0)],
        [],
    ]
    buffer.push(4, [make_group(4, 0)])
    assert buffer.versions() == [2, 4]


def test_a_version_is_never_drawn_in_its_own_step_or_before():
    buffer = filled(3, [4, 5], 2)
    assert ids(buffer.sample(9, 4, random.Random(0))) == []
    assert {v for v, _ in ids(buffer.sample(9, 5, random.Random(0)))} == {4}


def test_empty_push_evicts_and_holds_nothing():
    buffer = filled(2, [0, 1], 1)
    buffer.push(2, [])
    assert buffer.versions() == [1] and len(buffer) == 1
    buffer.push(3, [])
    assert buffer.versions() == [] and len(buffer) == 0
    assert buffer.sample(3, 4, random.Random(0)) == []


def test_groups_come_back_whole_and_as_the_same_objects():
    group = make_group(0, 0, n=8)
    buffer = RingBuffer(1)
    buffer.push(0, [group])
    (drawn,) = buffer.sample(1, 1, random.Random(0))
    assert drawn is group and len(drawn) == 8
    drawn[3]["logp_base"] = torch.zeros(2)  # what the trainer caches stays
    assert "logp_base" in buffer.sample(1, 1, random.Random(0))[0][3]


def test_sampling_leaves_the_buffer_as_it_was():
    buffer = filled(2, [0, 1], 3)
    drawn = buffer.sample(6, 2, random.Random(0))
    drawn.clear()
    assert len(buffer) == 6 and len(buffer.sample(6, 2, random.Random(0))) == 6


# ---- bad input


@pytest.mark.parametrize(
    "groups", [[[]], [None], [make_group(0, 0)[0]], [[1]], [make_group(0, 0) + [None]], [()]]
)
def test_a_group_must_be_a_non_empty_list_of_dicts(groups):
    buffer = filled(2, [0], 1)
    with pytest.raises(ValueError, match="non-empty list"):
        buffer.push(1, [[{"x": 0}], *groups])
    assert buffer.versions() == [0] and len(buffer) == 1


def test_versions_must_rise_and_agree_with_the_samples():
    buffer = filled(3, [5], 1)
    for version in (5, 4, -1):
        with pytest.raises(ValueError, match="newer"):
            buffer.push(version, [[{"x": 0}]])
    with pytest.raises(ValueError, match="version 6 was pushed as version 7"):
        buffer.push(7, [make_group(7, 0), make_group(7, 1) + make_group(6, 1)])
    assert buffer.versions() == [5]
    buffer.push(
        6, [[{"version": torch.tensor(6)}], [{"x": 0}]]
    )  # a tensor will do, and so does no version
    assert len(buffer) == 3


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


# ---- the distribution of draws: chi-square with a fixed rng, so never flaky; bounds are the 99.9 % points


def chi_square(counts, expected):
    return sum((counts[key] - expected[key]) ** 2 / expected[key] for key in expected)


@pytest.mark.parametrize("weights", [None, {1: 2.0, 2: 2.0, 3: 2.0}])
def test_draws_are_uniform_over_all_groups(weights):
    buffer = RingBuffer(3)
    for version, n in enumerate([1, 5, 6]):  # uneven: uniform over groups, not over versions
        buffer.push(version, [make_group(version, prompt) for prompt in range(n)])
    rng, first, included, trials = (
        random.Random(0),
        collections.Counter(),
        collections.Counter(),
        6000,
    )
    for _ in range(trials):
        drawn = ids(buffer.sample(4, 3, rng, weights))
        first[drawn[0]] += 1
        included.update(drawn)
    every = [(version, prompt) for version, n in enumerate([1, 5, 6]) for prompt in range(n)]
    assert chi_square(first, {key: trials / 12 for key in every}) < 31.3  # 11 degrees of freedom
    assert chi_square(included, {key: trials * 4 / 12 for key in every}) < 31.3
    assert sum(included.values()) == 4 * trials


def test_weights_are_of_the_age_and_draws_without_replacement_follow_them():
    buffer, weights = filled(3, [0, 1, 2], 1), {1: 5.0, 2: 3.0, 3: 2.0}  # version 2 has age 1
    weight = {2: 0.5, 1: 0.3, 0: 0.2}
    rng, pairs, trials = random.Random(1), collections.Counter(), 8000
    for _ in range(trials):
        pairs[tuple(v for v, _ in ids(buffer.sample(2, 3, rng, weights)))] += 1
    expected = {
        (a, b): trials * weight[a] * weight[b] / (1 - weight[a])
        for a, b in itertools.permutations(weight, 2)
    }
    assert chi_square(pairs, expected) < 20.5  # 5 degrees of freedom


def test_weight_0_or_none_is_never_drawn():
    buffer = filled(3, [0, 1, 2], 2)
    for weights in ({1: 1.0, 2: 0.0}, {1: 1e-300}, {1: 1e300}):
        for seed in range(20):
            assert {v for v, _ in ids(buffer.sample(6, 3, random.Random(seed), weights))} == {2}
    assert buffer.sample(6, 3, random.Random(0), {}) == []


def test_weights_of_ages_do_not_move_with_the_step():
    buffer = filled(3, [0, 1, 2], 2)
    assert {v for v, _ in ids(buffer.sample(6, 3, random.Random(0), {2: 1.0}))} == {1}
    assert {v for v, _ in ids(buffer.sample(6, 4, random.Random(0), {2: 1.0}))} == {2}


# ---- determinism and state


def test_draws_depend_on_contents_and_rng_only():
    for weights in (None, {1: 3.0, 2: 1.0}):
        draws = []
        for _ in range(2):  # as two ranks would
            buffer, rng = filled(2, [0, 1, 2], 7), random.Random(11)
            draws.append([ids(buffer.sample(5, 3, rng, weights)) for _ in range(4)])
        assert draws[0] == draws[1]
        assert len({tuple(draw) for draw in draws[0]}) > 1  # the rng moves on between draws


def test_draws_are_the_same_in_another_process():
    code = (
        "import random; from buffer import RingBuffer\n"
        "b = RingBuffer(2)\n"
        "for v in range(3): b.push(v, [[{'version': v, 'prompt': f'p{i}'}] for i in range(9)])\n"
        "for w in (None, {1: 3.0, 2: 1.0}):\n"
        "    print([(g[0]['version'], g[0]['prompt']) for g in b.sample(8, 3, random.Random(5), w)])\n"
    )
    outputs = set()
    for seed in ("0", "1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        outputs.add(
            subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
        )
    assert len(outputs) == 1 and outputs.pop().count("p") == 16


@pytest.mark.parametrize("weights", [None, {1: 3.0, 2: 1.0}])
def test_state_survives_torch_save(tmp_path, weights):
    buffer = filled(2, [3, 4, 5], 6)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored = RingBuffer(2)
    restored.push(9, [make_group(9, 0)])  # replaced, not added to
    restored.load_state_dict(
        torch.load(tmp_path / "buffer.pt", weights_only=True)
    )  # plain: lists, dicts, tensors
    assert restored.versions() == buffer.versions() == [4, 5] and len(restored) == 12
    for a, b in zip(
        *(x.sample(9, 6, random.Random(2), weights) for x in (buffer, restored)), strict=True
    ):
        assert ids([a]) == ids([b]) and all(
            torch.equal(x["logp"], y["logp"]) for x, y in zip(a, b, strict=True)
        )


def test_state_is_a_picture_of_its_time():
    buffer = filled(2, [0], 2)
    state = buffer.state_dict()
    buffer.push(1, [make_group(1, 0)])
    assert [version for version, _ in state["entries"]] == [0] and state["window"] == 2
    state["entries"][0][1].clear()
    assert len(buffer) == 3
    other = RingBuffer(2)
    state = buffer.state_dict()
    other.load_state_dict(state)
    state["entries"][0][1].clear()
    assert len(other) == 3


def test_the_window_of_the_loading_buffer_holds():
    state = filled(4, range(6), 2).state_dict()
    small, large = RingBuffer(1), RingBuffer(9)
    small.load_state_dict(state)
    large.load_state_dict(state)
    assert (small.window, small.versions()) == (1, [5])
    assert (large.window, large.versions()) == (9, [2, 3, 4, 5])


def test_a_bad_state_leaves_the_buffer_as_it_was():
    buffer = filled(2, [0], 2)
    with pytest.raises(ValueError):
        buffer.load_state_dict(
            {"window": 2, "entries": [(3, [make_group(3, 0)]), (3, [make_group(3, 1)])]}
        )
    assert buffer.versions() == [0] and len(buffer) == 2

"""infra/toy.py: the split, what demonstrations look like, the tokenizer, the cached model."""

import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra import toy

EQUATIONS = re.compile(r"(\d+)\+(\d+)=(\d+);(\d+)\+(\d+)=(\d+);#(\d+)")
TWICE = re.compile(r"(\d+)\+(\d+)=(\d+);\1\+\2=\3;(\d+)\+(\d+)=(\d+);\4\+\5=\6;#(\d+)")
TOTALS = re.compile(r"(\d+);(\d+);#(\d+)")


# ---- problems


def test_problems():
    train, test = toy.problems("train"), toy.problems("test")
    assert len(train) == 384 and len(test) == 128
    assert len({p["id"] for p in train + test}) == 512 == len({p["problem"] for p in train + test})
    for p in train + test:
        a, b, c = re.fullmatch(r"([2-9])\+([2-9])\+([2-9])=", p["problem"]).groups()
        assert p["answer"] == str(int(a) + int(b) + int(c))
    random.seed(1)
    assert toy.problems("train") == train and toy.problems("test") == test  # fixed, not drawn
    first = Counter(p["problem"][0] for p in test)
    assert len(first) == 8 and max(first.values()) < 32  # mixed, not the tail of the table


# ---- demonstrations


def read(problem, text):
    """(style, first addition's error, second's); it is one of the styles and carries errors on."""
    a, b, c = map(int, re.findall(r"\d+", problem))
    if match := TOTALS.fullmatch(text):
        style, (one, two, end) = "totals", map(int, match.groups())
    else:
        match = TWICE.fullmatch(text) or EQUATIONS.fullmatch(text)
        style = "twice" if TWICE.fullmatch(text) else "equations"
        x, y, one, z, w, two, end = map(int, match.groups())
        assert (x, y, z, w) == (a, b, one, c)
    assert end == two
    errors = one - (a + b), two - (one + c)
    for error, left, term in zip(errors, (a, one), (b, c)):
        carries = left % 10 + term >= 10
        assert error in (-2, -1, 0, 1, 2) or error == -10 and carries
    return style, *errors


@pytest.fixture(scope="module")
def demonstrations():
    rng, problems = random.Random(5), [p["problem"] for p in toy.problems("train") * 20]
    return [(problem, toy.demonstration(problem, rng)) for problem in problems]


def share_is(hits, expected):
    """Within four standard deviations; the rng is fixed."""
    off = abs(sum(hits) / len(hits) - expected)
    assert off < 4 * (expected * (1 - expected) / len(hits)) ** 0.5


def test_demonstrations_have_the_recipe_s_shares(demonstrations):
    found = [read(*pair) for pair in demonstrations]
    for style, share in toy.RECIPE["styles"].items():
        share_is([f[0] == style for f in found], share)
    right = 1 - toy.RECIPE["noise"]
    share_is([first == 0 for _, first, _ in found], right)
    share_is([second == 0 for _, _, second in found], right)
    share_is([first == second == 0 for _, first, second in found], right**2)
    for style in toy.RECIPE["styles"]:  # the noise does not depend on the style
        share_is([first == second == 0 for s, first, second in found if s == style], right**2)


def test_half_of_the_errors_where_a_carry_is_due_forget_it(demonstrations):
    carry = [pair for pair in demonstrations if int(pair[0][0]) + int(pair[0][2]) >= 10]
    errors = [error for _, error, _ in (read(*pair) for pair in carry) if error]  # of the first sum
    for error, share in ((-10, 0.5), (-2, 0.125), (-1, 0.125), (1, 0.125), (2, 0.125)):
        share_is([e == error for e in errors], share)


def test_demonstrations_end_in_the_last_total_and_fit(demonstrations):
    tokenizer = toy.make_tokenizer()
    for _, text in demonstrations:
        assert re.search(r"#\d+$", text)
        assert len(tokenizer.encode(text)) + 1 <= 40


# ---- tokenizer


def test_tokenizer_round_trip(demonstrations):
    tokenizer = toy.make_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 16)
    for problem, text in demonstrations[:200]:
        ids = tokenizer.encode(problem + text)
        assert [toy.CHARACTERS[i] for i in ids] == list(problem + text)
        assert tokenizer.decode(ids) == problem + text
        assert tokenizer.decode(ids + [1, 0, 0], skip_special_tokens=True) == problem + text


# ---- the cached model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(toy.RECIPE, "steps", 2)
    return tmp_path / "remix"


def test_model_is_made_once_for_each_recipe(cache, monkeypatch):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    folder = toy.model_folder()
    assert Path(folder).parent == cache and [str(p) for p in cache.iterdir()] == [folder]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.config.hidden_size // model.config.num_attention_heads == toy.HEAD_SIZE
    assert model(torch.tensor([tokenizer.encode("2+3+4=")])).logits.shape == (1, 6, 16)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "warm_up", None)  # not called again
        assert toy.model_folder() == folder and toy.model_folder(first=False) == folder
    monkeypatch.setitem(toy.RECIPE, "seed", 1)
    other = toy.model_folder()
    assert other != folder and {str(p) for p in cache.iterdir()} == {folder, other}
    again = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert any((weight != again[name]).any() for name, weight in model.state_dict().items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_warm_up_that_fails_leaves_nothing(cache, monkeypatch, error):
    def fail(folder):
        (Path(folder) / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(toy, "warm_up", fail)
    with pytest.raises(error):
        toy.model_folder()
    assert list(cache.iterdir()) == []


def test_two_at_once_and_one_that_waits(cache, monkeypatch):
    """Both warm up, both rename: one wins, the other takes its copy; a later rank waits."""
    both = threading.Barrier(2)

    def warm_up(folder):
        (Path(folder) / "weights").write_text("x")
        both.wait(120)

    monkeypatch.setattr(toy, "warm_up", warm_up)
    with ThreadPoolExecutor(3) as pool:
        (found,) = set(pool.map(toy.model_folder, (False, True, True)))
    assert [str(p) for p in cache.iterdir()] == [found]
    assert (Path(found) / "weights").read_text() == "x"


def test_a_cache_that_cannot_be_written(tmp_path):
    """One line that says what to set, from the program too."""
    (tmp_path / "file").write_text("mine")
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    command = [sys.executable, toy.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    for words in ("cannot be kept in", "Not a directory", "XDG_CACHE_HOME"):
        assert words in done.stderr

"""infra/toy.py: the split, what demonstrations look like, the tokenizer, the cached model."""

import math
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

from conftest import ROOT
from infra import toy
from tools.bases import KINDS, figures

EQUATIONS = re.compile(r"(\d+)\+(\d+)=(\d+);(\d+)\+(\d+)=(\d+);#(\d+)")


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


def errors(problem, text):
    """Of the two additions, as far as the text goes on from what it said itself."""
    a, b, c = map(int, re.findall(r"\d+", problem))
    x, y, one, z, w, two, end = map(int, EQUATIONS.fullmatch(text).groups())
    assert (x, y, z, w, end) == (a, b, one, c, two)
    return one - (a + b), two - (one + c)


PROBLEMS = [p["problem"] for split in ("train", "test") for p in toy.problems(split)]


def test_demonstrations_are_a_distribution_with_the_recipe_s_noise():
    """An addition is right with 1 − noise; half of the noise forgets a carry where there is one,
    the rest is one or two off; the second error does not depend on the first."""
    noise = toy.RECIPE["noise"]
    for problem in PROBLEMS:
        a, b, c = map(int, re.findall(r"\d+", problem))
        shares = {errors(problem, text): p for text, p in toy.demonstrations(problem).items()}
        assert sum(shares.values()) == pytest.approx(1)
        for (first, second), share in shares.items():
            wanted = 1.0
            for error, left, term in ((first, a, b), (second, a + b + first, c)):
                carry = left % 10 + term >= 10
                near = noise / (8 if carry else 4)
                wanted *= {0: 1 - noise, -10: noise / 2 if carry else 0}.get(error, near)
                assert error in (-10, -2, -1, 0, 1, 2)
            assert share == pytest.approx(wanted)


def test_next_characters_are_the_demonstrations():
    """The chain rule: along a text they multiply to its probability."""
    for problem in PROBLEMS[:40]:
        after = toy.next_characters(problem)
        for text, probability in toy.demonstrations(problem).items():
            said = map(toy.CHARACTERS.index, [*text, "<eos>"])
            steps = [after[text[:i]][c] for i, c in enumerate(said)]
            assert math.prod(steps) == pytest.approx(probability)
            assert len(text) + 1 <= 40  # fits --max_response
        assert all(sum(d) == pytest.approx(1) for d in after.values())


# ---- tokenizer


def test_tokenizer_round_trip():
    tokenizer = toy.make_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 16)
    for problem, text in ((p, t) for p in PROBLEMS[:9] for t in toy.demonstrations(p)):
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
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model(torch.tensor([tokenizer.encode("2+3+4=")])).logits.shape == (1, 6, 16)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "warm_up", None)  # not called again
        assert toy.model_folder() == folder and toy.model_folder(first=False) == folder
    other = toy.model_folder(seed=1)
    assert other != folder and {str(p) for p in cache.iterdir()} == {folder, other}
    again = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert any((weight != again[name]).any() for name, weight in model.state_dict().items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_warm_up_that_fails_leaves_nothing(cache, monkeypatch, error):
    def fail(folder, seed):
        (Path(folder) / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(toy, "warm_up", fail)
    with pytest.raises(error):
        toy.model_folder()
    assert list(cache.iterdir()) == []


def test_two_at_once_and_one_that_waits(cache, monkeypatch):
    """Both warm up, both rename: one wins, the other takes its copy; a later rank waits."""
    both = threading.Barrier(2)

    def warm_up(folder, seed):
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


# ---- the model itself, as any CPU makes it


def test_the_model_is_as_good_on_another_cpu(tmp_path):
    """Which rounds otherwise (tools/bases.py): a third right, exactly; greedy, nearly all."""
    ours, env = toy.model_folder(), KINDS["no AVX, MKL AVX2"] | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "infra.toy", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, cwd=ROOT)
    here, there = figures(ours), figures(done.stdout.strip())
    assert here["mass"] == pytest.approx(0.32, abs=0.02) and here["greedy"] >= 0.95
    assert there["mass"] == pytest.approx(here["mass"], abs=0.02) and there["greedy"] >= 0.95
    assert there["mass"] != here["mass"]  # it did round otherwise

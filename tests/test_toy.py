"""toy.py: the split, the statistics of the demonstrations, the tokenizer, the cached model."""

import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

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
    """(style, first addition's error, second's); fails unless it is one of the styles and carries its errors on."""
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
    rng = random.Random(5)
    return [
        (p["problem"], toy.demonstration(p["problem"], rng)) for p in toy.problems("train") * 20
    ]


def share_is(hits, expected, sigmas=4):
    hits = list(hits)
    assert (
        abs(sum(hits) / len(hits) - expected)
        < sigmas * (expected * (1 - expected) / len(hits)) ** 0.5
    )


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
    errors = [
        read(p, text)[1] for p, text in demonstrations if int(p[0]) + int(p[2]) >= 10
    ]  # of the first addition
    share_is([error == -10 for error in errors if error], 0.5)
    for error in (-2, -1, 1, 2):
        share_is([e == error for e in errors if e], 0.125)


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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    folder = toy.model_folder()
    assert Path(folder).parent == cache and [p.name for p in cache.iterdir()] == [Path(folder).name]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.config.hidden_size // model.config.num_attention_heads == toy.HEAD_SIZE
    assert model(torch.tensor([tokenizer.encode("2+3+4=")])).logits.shape == (1, 6, 16)

    def refuse(folder):
        raise AssertionError("warmed up again")

    with monkeypatch.context() as patch:
        patch.setattr(toy, "warm_up", refuse)
        assert toy.model_folder() == folder and toy.model_folder(first=False) == folder
    monkeypatch.setitem(toy.RECIPE, "seed", 1)
    other = toy.model_folder()
    assert other != folder and sorted(map(str, cache.iterdir())) == sorted((folder, other))
    weights = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, other)]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])


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
    """Both warm up, both rename: one wins, the other takes its copy; a rank that is not the first waits for them."""
    both, found = threading.Barrier(2, timeout=20), []

    def warm_up(folder):
        (Path(folder) / "weights").write_text("x")
        both.wait()

    monkeypatch.setattr(toy, "warm_up", warm_up)
    threads = [
        threading.Thread(target=lambda first=first: found.append(toy.model_folder(first)))
        for first in (False, True, True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3 and len(set(found)) == 1
    assert [str(p) for p in cache.iterdir()] == [found[0]] and (
        Path(found[0]) / "weights"
    ).read_text() == "x"


def test_a_cache_that_cannot_be_written(tmp_path):
    """One line that says what to set, from the program too."""
    (tmp_path / "file").write_text("mine")
    done = subprocess.run(
        [sys.executable, toy.__file__],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")},
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert (
        "cannot be kept in" in done.stderr
        and "Not a directory" in done.stderr
        and "XDG_CACHE_HOME" in done.stderr
    )

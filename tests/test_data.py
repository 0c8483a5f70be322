"""infra/data.py: files good and bad, templates, prompt lengths, the order of a run's prompts, and
what is fetched by name, from a hub on localhost (hub_server.py) with the real huggingface_hub and
datasets. They read the environment when they are imported: what depends on it runs in processes.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import Table, parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from infra import data

ROOT = Path(__file__).parent.parent
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SUFFIX = r"Let's think step by step and output the final answer within \boxed{}."


def make_tokenizer(chat_template=None, bos=False, eos="<eos>"):
    """One token a character; <think> and <|...|> marks are single tokens."""
    special = ["<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "?"]
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(special + characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        both = dict(single="<bos> $A", special_tokens=[("<bos>", 0)])
        tokenizer.post_processor = processors.TemplateProcessing(**both)
    marks = dict(bos_token="<bos>", eos_token=eos, additional_special_tokens=special[2:6])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    fast.chat_template = chat_template
    return fast


def write(path, text):
    """text: bytes, a string, or what becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(text, (bytes, str)):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines_of(rows):
    return "\n".join(map(json.dumps, rows))


def table(path, *rows):
    write(path, "")
    parquet.write_table(Table.from_pylist(list(rows)), path)
    return path


def one_line(message, words):
    """A short line with all of the words, which | divides."""
    assert "\n" not in message and len(message) < 900
    assert all(word in message for word in words.split("|")), message


def refused(words, function, *args, **more):
    """function refuses in one line with these words, and the path if it is given one."""
    with pytest.raises(ValueError) as caught:
        function(*args, **more)
    one_line(str(caught.value), words)
    assert all(str(path) in str(caught.value) for path in args if isinstance(path, Path))


# -- files ----------------------------------------------------------------------------------------


def test_every_kind_of_answer_and_id(tmp_path):
    rows = [
        {"id": "a", "problem": "1+1?", "answer": "2"},
        {"problem": "2+2?", "answer": 4, "more": [1]},
        {"problem": "1/2?", "answer": [0.5, "1/2"]},
        {"id": 7, "problem": " as it is \n", "answer": 27.0},
    ]
    expected = [
        {"id": "a", "problem": "1+1?", "answer": "2"},
        {"id": "set/1", "problem": "2+2?", "answer": "4"},
        {"id": "set/2", "problem": "1/2?", "answer": ["0.5", "1/2"]},
        {"id": "7", "problem": " as it is \n", "answer": "27.0"},
    ]
    lines = write(tmp_path / "set.jsonl", "\n\n".join(map(json.dumps, rows)) + "\r\n\n")
    assert data.load_problems(lines) == data.load_problems(str(lines)) == expected
    assert data.load_problems(write(tmp_path / "set.json", json.dumps(rows, indent=1))) == expected
    path = write(tmp_path / "q.jsonl", {"question": "1+1?", "final": 2})
    named = data.load_problems(path, "question", "final")
    assert named == [{"id": "q/0", "problem": "1+1?", "answer": "2"}]


GOOD = '{"problem": "p", "answer": "1"}\n'
START = GOOD + '{"problem": "p", "answer": '
WIDE = {"k" * 1000 + str(i): 1 for i in range(1000)}
LARGE = GOOD + '{"problem": "' + 2_000_000 * "a" + '", "answer": }'
NESTED = START + "[" * 900 + "1" + "]" * 900 + "}"
SAME_ID = '{"id": "a", "problem": "p", "answer": "1"}\n'


# fmt: off
@pytest.mark.parametrize("name, text, words", [
    ("missing.jsonl", None, "No such file|check the path"),
    ("missing.parquet", None, "No such file|check the path"),
    ("set.csv", "problem,answer", ".jsonl|.json|.parquet|OWNER/NAME"),
    ("set.parquet", "PAR1", "set.parquet|arquet"),
    ("empty.jsonl", "", "no problems|'problem'"),
    ("blank.jsonl", "\n \n", "no problems"),
    ("empty.json", " ", "no problems"),
    ("none.json", "[]", "no problems"),
    ("bad.jsonl", START + "}\n", "line 2|column 28|malformed|fix"),
    ("cut.jsonl", GOOD + GOOD[:20], "line 2|malformed"),
    ("bad.json", '[{"problem": "p",\n "answer" 1}]', "line 2|malformed"),
    ("deep.jsonl", GOOD + "[" * 100_000, "line 2|fix"),
    ("deep_object.jsonl", GOOD + '{"a":' * 100_000, "line 2|fix"),
    ("digits.jsonl", START + "9" * 5000 + "}", "line 2|fix"),
    ("object.json", '{"problem": "p", "answer": "1"}', "[ ]"),
    ("nested.jsonl", NESTED, "line 2|'answer'"),
    ("large.jsonl", LARGE, "line 2|column 2000027|malformed"),
    ("keys.jsonl", GOOD + json.dumps(WIDE), "line 2|'problem'|['kkk"),
    ("twice_a_key.jsonl", START + '"1", "answer": "2"}', "line 2|'answer' twice"),
    ("utf16.jsonl", GOOD.encode("utf-16"), "line 1|UTF-8"),
    ("utf16_without_mark.jsonl", GOOD.encode("utf-16-le"), "line 1|malformed"),
    ("nul.jsonl", GOOD + '{"problem": "p\0", "answer": "1"}', "line 2|control character"),
    ("mark.jsonl", GOOD + "\ufeff" + GOOD, "line 2|column 1|BOM"),
    ("cr.jsonl", GOOD.replace("\n", "\r") * 2, "line 1|malformed"),
    ("latin.jsonl", START.encode() + b'"\xf6"}', "line 2|UTF-8"),
    ("latin.json", b'[\n{"problem":\n "\xf6", "answer": "1"}]', "line 3|UTF-8"),
    ("list.jsonl", GOOD + "[1, 2]\n", "line 2|list|not an object"),
    ("item.json", "[" + GOOD + ', "p"]', "item 2|str|not an object"),
    ("key.jsonl", '{"question": "p", "answer": "1"}', "'problem'|'question'|problem_key"),
    ("answer.jsonl", '{"problem": "p", "solution": "1"}', "'answer'|'solution'|answer_key"),
    ("type.jsonl", GOOD + '{"problem": ["p"], "answer": "1"}', "line 2|must be a string|['p']"),
    ("nothing.jsonl", GOOD + '{"problem": " ", "answer": "1"}', "line 2|text in it"),
    ("null.jsonl", START + "null}", "line 2|'answer'|None"),
    ("dict.jsonl", START + '{"a": 1}}', "line 2|'answer'"),
    ("bool.jsonl", START + "true}", "line 2|True"),
    ("nan.jsonl", START + "NaN}", "line 2|nan"),
    ("infinity.jsonl", START + "1e999}", "line 2|inf"),
    ("no_answer.jsonl", START + "[]}", "line 2|not empty|[]"),
    ("blank_answer.jsonl", START + '["1", ""]}', "line 2|not empty"),
    ("inner.jsonl", START + '[["1"]]}', "line 2|'answer'"),
    ("half.jsonl", GOOD + '{"problem": "\\ud800", "answer": "1"}', "line 2|escape"),
    ("twice.jsonl", 2 * SAME_ID, "line 2|'a'|line 1|unique"),
])
# fmt: on
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, words):
    if text is not None:
        write(tmp_path / name, text)
    refused(words, data.load_problems, tmp_path / name)


def test_odd_files_that_are_right(tmp_path):
    """A byte order mark, Windows' line ends, U+2028, a long line, an answer of 4,000 digits, ids
    that look like paths: text, and nothing else."""
    rows = [
        {"id": "../../../etc/passwd", "problem": "a" * 2_000_000, "answer": int("9" * 4000)},
        {"id": "/a\0b", "problem": "p", "answer": 1},
        {"id": {"no": "text"}, "problem": "Größe\u2028übrig \U0001d54f \x85 naïve", "answer": "π"},
    ]
    for escape in (True, False):
        lines = [json.dumps(row, ensure_ascii=escape) for row in rows]
        path = write(tmp_path / "odd.jsonl", "\ufeff" + "\r\n".join(lines))
        found = data.load_problems(path)
        assert [p["id"] for p in found] == ["../../../etc/passwd", "/a\0b", "odd/2"]
        assert [p["answer"] for p in found] == ["9" * 4000, "1", "π"]
        assert [p["problem"] for p in found] == [row["problem"] for row in rows]
    (tmp_path / "d.jsonl").mkdir()
    refused("cannot be read", data.load_problems, tmp_path / "d.jsonl")


def test_parquet_is_read_like_the_rest(tmp_path):
    rows = [{"problem": "1+1?", "answer": "2", "id": None}]
    rows += [{"problem": "2+2?", "answer": "4", "id": "b"}]
    expected = [rows[0] | {"id": "set/0"}, rows[1]]
    assert data.load_problems(table(tmp_path / "set.parquet", *rows)) == expected
    rows = {"problem": "p", "answer": [1, 2]}, {"problem": "q", "answer": None}
    bad, words = table(tmp_path / "bad.parquet", *rows), "row 1: 'answer' must be"
    refused(words, data.load_problems, bad, say=pytest.fail)  # in a file every row must be usable
    words = "row 0: no 'final' among its keys ['problem', 'answer"
    refused(words, data.load_problems, bad, answer_key="final")


ON_HUB = "a/set agentica-org/DeepScaleR-Preview-Dataset a/b/main a/set-v1.5 a/b_c.d-1.0/x".split()
NO_NAMES = (
    "set ./a/set ../a/set /a/set ~/set a/b/c/d a/set.csv a/b/set.txt a/ a//b a/set.jsonl here/set"
).split()


@pytest.mark.parametrize("name", ON_HUB + NO_NAMES)
def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch, name):
    asked, row = [], {"problem": "p", "answer": 1, "id": 5}
    monkeypatch.setattr(data, "hub_rows", lambda *given: asked.append(given) or [row])
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here" / "set", "a file that exists is no data set of the hub")
    if name in ON_HUB:
        problems = data.load_problems(name, split="test")
        assert problems == [{"id": "5", "problem": "p", "answer": "1"}]
        assert asked == [(name, "test")]
    else:
        why = "set.jsonl: cannot be read" if "jsonl" in name else "not a .jsonl"
        refused(why, data.load_problems, name)
        assert not asked


def test_unusable_rows_of_a_hub_data_set_are_skipped_and_counted(monkeypatch):
    given = [("p", "1", "x"), ("q", 2, "x"), ("r", "3", None), ("p", None), (" ", "1"), ("p", [])]
    made = [dict(zip(("problem", "answer", "id"), values)) for values in given]
    good, bad, said = made[:3], made[3:], []
    rows = [good[0], bad[0], good[1], bad[1], good[2], bad[2]]
    monkeypatch.setattr(data, "hub_rows", lambda name, split: rows)
    problems = data.load_problems("a/b", say=said.append)
    assert [p["id"] for p in problems] == ["x", "a/b/2", "a/b/4"]
    assert [p["answer"] for p in problems] == ["1", "2", "3"]
    kinds = "a string, a number or a list of those, and not empty; it is None"
    assert said == [f"skipped 3 of 6 rows of a/b (first: row 1: 'answer' must be {kinds})"]
    assert data.load_problems("a/b") == problems
    rows[:] = good
    assert len(data.load_problems("a/b", say=pytest.fail)) == 3
    rows[:] = bad
    words = "a/b: holds no problems|--problem_key|--answer_key|row 0: "
    refused(words + "'answer' must be", data.load_problems, "a/b")
    refused(words + "no 'final'", data.load_problems, "a/b", answer_key="final")
    rows[:] = []
    refused("a/b: holds no problems", data.load_problems, "a/b")


@settings(max_examples=100, deadline=None)
@example(texts=["", "a", "a"], n=1, rng=random.Random(0))  # the copies come first and do not fit
@given(
    texts=st.lists(st.text(alphabet="ab", max_size=3), max_size=30),
    n=st.integers(-1, 32),
    rng=st.randoms(),
)
def test_held_out(texts, n, rng):
    problems = [{"id": str(i), "problem": text, "answer": "1"} for i, text in enumerate(texts)]
    try:
        train, held = data.split_held_out(problems, n)
    except ValueError as error:
        most = max((texts.count(text) for text in texts), default=0)
        return None if not 0 <= n < len(texts) or n < most else pytest.fail(str(error))
    assert len(held) <= n and train and (held or n == 0)
    assert sorted(train + held, key=lambda p: int(p["id"])) == problems
    assert not {p["problem"] for p in train} & {p["problem"] for p in held}
    assert len(set(texts)) < len(texts) or len(held) == n
    # the given order
    assert train == [p for p in problems if p in train]
    assert held == [p for p in problems if p in held]
    shuffled = rng.sample(problems, len(problems))
    assert {p["id"] for p in data.split_held_out(shuffled, n)[1]} == {p["id"] for p in held}


def test_held_out_is_the_same_everywhere():
    problems = [{"problem": f"{i}+1?"} for i in range(100)]
    _, held = data.split_held_out(problems, 3)
    assert [p["problem"] for p in held] == ["30+1?", "55+1?", "56+1?"]  # sha256's
    assert data.split_held_out(problems, 0) == (problems, [])
    for n in (-1, 100, 101):
        refused(f"cannot hold {n} of 100", data.split_held_out, problems, n)


# -- benchmarks -----------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """$REMIX_DATA, or a folder of generated benchmarks that load_benchmark() then expects."""
    if os.environ.get("REMIX_DATA"):
        return Path(os.environ["REMIX_DATA"])
    sources = {}
    for name, count in data.BENCHMARKS.items():
        rows = [{"id": f"{i}", "problem": f"{i} + 1?", "answer": [f"{i}"]} for i in range(count)]
        path = write(tmp_path / "benchmarks" / f"{name}.jsonl", lines_of(rows))
        sources[name] = (data.SOURCES[name][0], data.content(data.load_problems(path)))
    monkeypatch.setattr(data, "SOURCES", sources)
    return tmp_path


def test_every_benchmark_has_its_size(benchmarks, monkeypatch):
    monkeypatch.setenv("REMIX_DATA", str(benchmarks))
    for name, count in data.BENCHMARKS.items():
        problems = data.load_benchmark(name)
        assert len(problems) == count == len({problem["id"] for problem in problems})
        assert all(set(problem) == {"id", "problem", "answer"} for problem in problems)
        assert problems == data.load_benchmark(name, benchmarks / "benchmarks")
        assert problems == data.load_eval_data(name, benchmarks)
    assert sum(data.BENCHMARKS.values()) == 1600
    assert len(data.load_eval_data("toy")) == 128
    assert len(data.load_eval_data(str(benchmarks / "benchmarks" / "aime24.jsonl"))) == 30


def test_one_changed_answer_is_noticed(benchmarks, tmp_path):
    """In any problem or answer, or in their order; white space does not count."""
    lines = (benchmarks / "benchmarks" / "aime24.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    path = tmp_path / "mine" / "aime24.jsonl"
    for changed in (
        [*rows[:29], rows[29] | {"answer": "7"}],
        [rows[0] | {"problem": rows[0]["problem"][1:]}, *rows[1:]],
        rows[::-1],
        rows[:29],
    ):
        write(path, lines_of(changed))
        words = f"{len(changed)} problems| of aime24, which has 30"
        refused(words, data.load_benchmark, "aime24", path.parent)
    for i, row in enumerate(rows):
        if isinstance(row["answer"], str):
            row["answer"] = [f" {row['answer']}"]
        row |= {"id": f"my/{i}", "problem": row["problem"].replace(" ", "  ") + "\n"}
    write(path, lines_of(rows))
    found = data.load_benchmark("aime24", path.parent)
    assert [p["id"] for p in found] == [f"my/{i}" for i in range(30)]
    names = "aime24, amc, amc23, math500, minerva, olympiadbench"
    refused(f"'aime25'|{names}", data.load_benchmark, "aime25")
    refused("no aime24.jsonl|--data_dir", data.load_benchmark, "aime24", tmp_path / "none")


def test_benchmarks_are_downloaded_once_and_checked(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    rows = [{"problem": f"{i}+{i}?", "answer": 2.0 * i, "url": "u"} for i in range(83)]
    for name, part in (("amc.json", rows), ("aime.json", rows[:30])):
        hub.files[f"/{data.SOURCE}/{name}"] = json.dumps(part).encode()
        hub.delays[name] = 0.5
    texts = [row | {"answer": str(row["answer"])} for row in rows]
    sources = data.SOURCES | {"amc": ("amc.json", data.content(texts))}
    sources["amc23"] = ("amc.json", data.content(texts[43:]))
    sources["aime24"] = ("aime.json", data.content(texts[:30]))
    monkeypatch.setattr(data, "SOURCES", sources)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("REMIX_DATA", raising=False)
    monkeypatch.setenv("REMIX_MIRROR", hub.url)
    monkeypatch.setenv("NO_PROXY", "*")
    hub.requests.clear()

    with ThreadPoolExecutor(3) as pool:  # as the ranks of a run: each locks the file for itself
        amc, amc23, aime24 = pool.map(data.load_benchmark, ("amc", "amc23", "aime24"))
    assert amc[7] == {"id": "amc/7", "problem": "7+7?", "answer": "14.0"} and len(amc) == 83
    # AMC'23 is the end of the set of 83
    assert [p["answer"] for p in amc23] == [p["answer"] for p in amc[43:]] and len(aime24) == 30
    assert amc23[0]["id"] == "amc23/0"
    asked = sorted(path for _, path in hub.requests)
    assert asked == [f"/{data.SOURCE}/{name}.json" for name in ("aime", "amc")]
    for offline, server, why in (
        (False, hub.url, "404"),
        (True, hub.url, "HF_HUB_OFFLINE is set"),
        (False, "http://127.0.0.1:1", "refused"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("REMIX_MIRROR", server)
        words = f"{why}|`python -m infra.data --benchmarks`|--data_dir"
        refused(words, data.load_benchmark, "minerva")
    assert data.load_benchmark("amc") == amc  # from the cache
    sources["amc"] = ("amc.json", "0")
    refused("not those of amc", data.load_benchmark, "amc")
    assert not list((tmp_path / "hf").rglob("*.tmp"))


# -- prompts --------------------------------------------------------------------------------------


def test_templates_word_for_word():
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    assert data.render("1+1?", chat, "r1") == f"<|user|>1+1? {SUFFIX}<|assistant|>"
    system = r"Please reason step by step, and put your final answer within \boxed{}."
    told = f"<|system|>{system}<|user|>1+1?<|assistant|>"
    assert data.render("1+1?", chat, "qwen-math") == told
    for tokenizer in (chat, plain):
        assert data.render("1+1?", tokenizer, "plain") == f"1+1?\n{SUFFIX}\n"
        assert data.render("8+6+4=", tokenizer, "raw") == "8+6+4="
    assert set(data.STYLE_OF) == set(data.TEMPLATES)
    problem = r"{{ 1 }} {% if x %} \frac{1}{2} {0} %s {problem}"  # no format string, no jinja
    assert all(problem in data.render(problem, chat, template) for template in data.TEMPLATES)


def test_templates_that_do_not_fit():
    no_system = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refuses = CHAT.replace("%}<|{{", f"%}}{no_system}<|{{{{", 1)
    for template, words, chat in (
        ("r1", "--template plain", None),
        ("nope", "'nope'|r1, qwen-math, plain, raw", None),
        ("qwen-math", "no system|--template plain", refuses),
    ):
        refused(words, data.render, "p", make_tokenizer(chat), template)


def test_a_template_may_be_a_file(tmp_path):
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    text = write(tmp_path / "mine.txt", "\ufeff{a} Q: {problem}\nAgain: {problem}\nA:\n")
    filled = "{a} Q: {problem} 1+1?\nAgain: {problem} 1+1?\nA:\n"
    assert data.render("{problem} 1+1?", plain, text) == filled
    assert data.render("{problem} 1+1?", chat, str(text)) == filled
    first = {"role": "system", "content": "be {brief}"}
    talk = write(tmp_path / "mine.json", [first, {"role": "user", "content": "<{problem}>"}])
    assert data.render("1+1?", chat, talk) == "<|system|>be {brief}<|user|><1+1?><|assistant|>"
    refused("--template plain", data.render, "p", plain, talk)
    styles = [data.template_style(template) for template in (*data.TEMPLATES, talk, str(text))]
    assert styles == ["think", "boxed", "boxed", "hash", "boxed", "boxed"]
    text.unlink()
    assert data.render("x", plain, text).startswith("{a} Q: x")  # read once


# fmt: off
@pytest.mark.parametrize("name, text, words", [
    ("none.txt", None, "none.txt|choose one of r1, qwen-math, plain, raw|or a file"),
    ("no.txt", "Question: { problem }", "{problem}"),
    ("no.json", [{"role": "user", "content": "problem"}], "{problem}"),
    ("empty.json", [], "{problem}"),
    ("bad.json", '[{"role": "user", "content": "{problem}"]', "malformed"),
    ("null.json", "null", "list of chat messages"),
    ("dict.json", {"role": "user", "content": "{problem}"}, "list of chat messages"),
    ("keys.json", [{"role": "user", "text": "{problem}"}], "list of chat messages"),
    ("role.json", [{"role": 1, "content": "{problem}"}], "list of chat messages"),
    ("list.json", [{"role": "user", "content": ["{problem}"]}], "list of chat messages"),
    ("strings.json", ["{problem}"], "list of chat messages"),
    ("latin.txt", b"\xf6 {problem}", "UTF-8"),
])
# fmt: on
def test_a_bad_template_file_is_one_clear_line(tmp_path, name, text, words):
    if text is not None:
        write(tmp_path / name, text)
    refused(words, data.render, "p", make_tokenizer(CHAT), tmp_path / name)


@pytest.fixture
def encode(tmp_path):
    """encode(problems, tokenizer, template, max_prompt) -> (problems, skipped, lines said)."""
    folder = write(tmp_path / "model" / "config.json", {"vocab_size": 200}).parent

    def call(problems, tokenizer, template, max_prompt=99):
        said = []
        kept, skipped = data.encode(problems, folder, tokenizer, template, max_prompt, said.append)
        return kept, skipped, said

    return call


def test_special_tokens_once(encode, tmp_path):
    """A chat format writes its own; plain text gets the tokenizer's: Llama's bos is there once."""
    tokenizer = make_tokenizer("<bos>" + CHAT, bos=True)
    text = str(write(tmp_path / "mine.txt", "Q: {problem}"))
    talk = str(write(tmp_path / "mine.json", [{"role": "user", "content": "{problem}"}]))
    for template in (*data.TEMPLATES, text, talk):
        ids = encode([{"problem": "1+1?"}], tokenizer, template, 999)[0][0]["prompt_ids"]
        assert ids[0] == 0 and ids.count(0) == 1 and all(type(token) is int for token in ids)
        rendered = data.render("1+1?", tokenizer, template)
        assert tokenizer.decode(ids).removeprefix("<bos>") == rendered.removeprefix("<bos>")


def test_default_template():
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    think = make_tokenizer(CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif"))
    for name, tokenizer, template in (
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", chat, "r1"),
        ("runs/7/model", think, "r1"),  # an export of such a model: the name says nothing
        ("Qwen/Qwen2.5-Math-7B", chat, "qwen-math"),
        ("Qwen/Qwen2.5-7B-Instruct", chat, "qwen-math"),  # "think" would score it 0 for ever
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", plain, "plain"),
        (Path("gpt2"), plain, "plain"),
    ):
        assert data.default_template(name, tokenizer) == template


def test_long_prompts_are_counted_and_dropped(encode):
    problems = [{"id": str(n), "problem": "1" * n, "answer": "1"} for n in (3, 11, 10, 12, 1)]
    kept, skipped, said = encode(problems, make_tokenizer(), "raw", 10)
    assert [problem["id"] for problem in kept] == ["3", "10", "1"] and skipped == 2
    assert [len(problem["prompt_ids"]) for problem in kept] == [3, 10, 1]
    assert said == ["skipped 2 of 5 prompts: above --max_prompt 10"]
    assert all("prompt_ids" not in problem for problem in problems)
    longer = [problem | {"problem": "1" * 9} for problem in problems]
    words = "none of 5 prompts|shortest: 9|--max_prompt"
    refused(words, encode, longer, make_tokenizer(), "raw", 8)
    # not even tokenised: 10 MB would take 19 s and 4 GB
    huge, words = [{"problem": "1" * 20_000_000}], "none of 1 prompts|shortest: 0"
    refused(words, encode, huge, make_tokenizer(), "raw", 8)


def test_tokenizers(encode, tmp_path):
    make_tokenizer(CHAT).save_pretrained(tmp_path / "good")
    tokenizer = data.load_tokenizer(tmp_path / "good")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    problems = [{"problem": "1+1?"}]
    assert encode(problems, tokenizer, "r1") == encode(problems, make_tokenizer(CHAT), "r1")
    tokenizer.add_tokens([f"more{i}" for i in range(100)])
    refused("model has 200", encode, [{"problem": "more99"}], tokenizer, "r1")
    make_tokenizer(eos=None).save_pretrained(tmp_path / "no_eos")
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "broken" / "tokenizer.json", "{")
    for name, word in (("no_eos", "eos_token"), ("nothing", "needs one of"), ("broken", "loaded")):
        refused(word, data.load_tokenizer, tmp_path / name)


# -- the stream -----------------------------------------------------------------------------------


COUNT = st.integers(0, 100)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 5), COUNT, COUNT, COUNT)
def test_stream_is_epochs_of_permutations_and_stateless(size, seed, epoch, a, n, m):
    problems = [{"id": str(i)} for i in range(size)]
    stream = data.PromptStream(problems, seed)
    rows = stream.take(epoch * size, size)
    assert sorted(int(problem["id"]) for _, problem in rows) == list(range(size))
    assert [position for position, _ in rows] == list(range(epoch * size, epoch * size + size))
    whole = data.PromptStream(problems, seed).take(a, n + m)
    assert stream.take(a, n) + stream.take(a + n, m) == whole


def test_epochs_and_seeds_differ_and_machines_agree():
    problems, orders = [{"id": i} for i in range(50)], set()
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            rows = data.PromptStream(problems, seed).take(epoch * 50, 50)
            orders.add(tuple(problem["id"] for _, problem in rows))
    assert len(orders) == 6 and tuple(range(50)) not in orders
    first = [problem["id"] for _, problem in data.PromptStream(problems, 1).take(100, 8)]
    assert first == [12, 28, 46, 16, 48, 20, 18, 44]  # as in every run so far
    refused("at least one problem", data.PromptStream, [], 0)


# -- models, and a run's preparation --------------------------------------------------------------


@pytest.fixture
def copy(small_model, tmp_path):
    """(a copy of small_model, its config.json)."""
    folder = shutil.copytree(small_model, tmp_path / "copy")
    return folder, json.loads((folder / "config.json").read_text())


# fmt: off
@pytest.mark.parametrize("changes, words", [
    (dict(model_type="mistral"), "type mistral"),
    (dict(quantization_config={}), "quantized"),
    (dict(num_hidden_layers=3), "all of its 3 layers"),
    (dict(num_attention_heads="two"), "cannot be trained"),
    (dict(vocab_size=None), "vocab_size"),
    (dict(tie_word_embeddings=True), "set it to false"),
    (dict(num_attention_heads=6, num_key_value_heads=3), "--tp 2 does not divide"),
    (None, "JSONDecodeError"),
])
# fmt: on
def test_models_that_do_not_fit(copy, changes, words):
    folder, config = copy
    data.check_model(folder, 2)
    kept = {k: v for k, v in (config | (changes or {})).items() if v is not None}
    write(folder / "config.json", "{" if changes is None else kept)
    refused(words, data.check_model, folder, 2)


def test_weights_that_are_not_whole(copy, tmp_path):
    folder, name = copy[0], "model.safetensors"
    weights, listing = (folder / name).read_bytes(), f"{name}.index.json"
    index = {"weight_map": {"x": name, "y": "model-2.safetensors"}}
    for file, content, word in (
        (name, weights[:-1], "whole"),
        (name, b"", "whole"),
        (listing, index, "no model-2.safetensors"),
        (listing, {}, "whole"),
    ):
        write(folder / file, content)
        refused(word, data.check_model, folder)
        write(folder / name, weights)
    (folder / listing).unlink()
    # head and embedding, stored twice but alike
    write(folder / "config.json", copy[1] | {"tie_word_embeddings": True})
    tensors = load_file(folder / name)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / name)
    data.check_model(folder)
    (folder / name).unlink()
    refused("*.safetensors", data.check_model, folder)
    refused("No such file", data.check_model, tmp_path / "none")


def test_prepare(small_model, copy, tmp_path):
    """What the flags leave open is settled; a run is resumed on its own problems and its own kind
    of model, wherever they lie."""
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(9)]
    path = write(tmp_path / "set.json", rows)
    flags = dict(model=str(small_model), data=str(path), out=str(tmp_path), given={"model"})
    flags |= dict(problem_key="problem", answer_key="answer", data_split="train", data_dir=None)
    flags |= dict(held_out=2, eval_every=1, eval_data="held_out,toy", template="auto", style="auto")
    flags |= dict(replay=None, reward=None, tp=1, max_prompt=100, max_response=8192, resume=False)

    def prepare(**changes):
        said, cfg = [], SimpleNamespace(**flags | changes)
        return cfg, data.prepare(cfg, said.append), said

    cfg, task, said = prepare()
    assert (cfg.template, cfg.style, cfg.max_response) == ("r1", "think", 412)
    assert task.folder == str(small_model) and len(task.problems) == 7
    assert {name: len(part) for name, part in task.parts.items()} == {"held_out": 2, "toy": 128}
    assert all(problem["prompt_ids"] for problem in task.problems + task.parts["toy"])
    assert "up to 412" in said[0] and "7 problems, template r1, judged by think" in said[1]
    assert prepare(replay="rollouts")[1].parts == {}
    refused("context of 512 tokens", prepare, given={"max_response"})
    # before anything is fetched
    refused("nowhere.txt", prepare, template="nowhere.txt", data="missing.jsonl")

    write(tmp_path / "config.json", {"fingerprint": cfg.fingerprint})
    moved, config = copy
    write(moved / "config.json", config | {"transformers_version": "9"})
    again = dict(model=str(moved), data=str(write(tmp_path / "b" / "set.json", rows)), resume=True)
    assert prepare(**again)[0].fingerprint == cfg.fingerprint
    other = write(tmp_path / "other.json", [row | {"answer": "7"} for row in rows])
    refused("other problems", prepare, **again | {"data": str(other)})
    write(moved / "config.json", config | {"rope_theta": 5.0})
    refused("another kind of model", prepare, **again)


# -- the hub --------------------------------------------------------------------------------------

# runs calls [[function, args], ...], prints [result or null, error or null, lines said] for each
CALLS = """
import json, sys
from infra import data
data.TIMEOUT = 1
for function, args in json.loads(sys.argv[1]):
    said, result, error = [], None, None
    more = {"say": said.append} if function == "load_problems" else {}
    try:
        result = getattr(data, function)(*args, **more)
        result = result if isinstance(result, str) else list(result)
    except ValueError as caught:
        error = str(caught)
    print(json.dumps([result, error, said]))
"""
MODEL, FULL = "Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"
DATA, OFFLINE = "agentica-org/DeepScaleR-Preview-Dataset", {"HF_HUB_OFFLINE": "1"}
BOTH = [["model_folder", [MODEL]], ["hub_rows", [DATA]]]
ROWS = [{"problem": f"{i}+1?", "answer": str(i + 1), "solution": "count"} for i in range(20)]
INDEX = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
FILES = {"config.json": {"a": 1}, "tokenizer.json": {"b": 2}, "model.safetensors.index.json": INDEX}
FILES |= {"tokenizer.model": "m", "merges.txt": "t", "chat_template.jinja": "j"}
FILES |= {"1.safetensors": "one", "2.safetensors": "two"}
OTHERS = {"pytorch_model.bin": "pickle", "modeling.py": "code", "original/config.json": {"c": 3}}


def start(env, *args):
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, env=os.environ | env, **pipes)


def calling(env, *calls):
    return start(env, "-c", CALLS, json.dumps(calls))


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and not err, err
    return [json.loads(line) for line in out.splitlines()]


def ask(env, *calls):
    return finish(calling(env, *calls))


def readme(*configs):
    """A README whose header names configurations, (name, split, file) each."""
    listed = [{"config_name": n, "data_files": [{"split": s, "path": f}]} for n, s, f in configs]
    return f"---\n{json.dumps({'configs': listed})}\n---\n"


@pytest.fixture(scope="module")
def served(hub, tmp_path_factory):
    """The hub with a model in two shards, a data set of one file, and what goes wrong."""

    def add(kind, name, files, gated=False):
        folder = tmp_path_factory.mktemp("served")
        for path, content in files.items():
            write(folder / path, content)
        hub.add(kind, name, folder, gated)

    x, y = {"problem": "x?", "answer": "1"}, {"problem": "y?", "answer": "2"}
    two = readme(("x", "test", "x.jsonl"), ("y", "train", "y.jsonl"))
    solo = readme(("main", "train", "y.jsonl"))
    add("models", FULL, FILES | OTHERS)
    add("models", "Qwen/only-bin", {"config.json": {"a": 4}, "pytorch_model.bin": "pickle"})
    add("models", "meta-llama/Llama-3.1-8B", {"config.json": {"a": 5}}, gated=True)
    add("datasets", DATA, {"deepscaler.json": ROWS})
    add("datasets", "a/gated", {"a.json": ROWS}, gated=True)
    add("datasets", "a/broken", {"a.jsonl": '{"problem": "p"}\n{"problem": '})
    add("datasets", "a/none", {"README.md": "nothing else"})
    add("datasets", "a/two", {"README.md": two, "x.jsonl": x, "y.jsonl": y})
    add("datasets", "a/solo", {"README.md": solo, "y.jsonl": y})
    rows = [{"question": f"{i}?", "final": None if i % 4 == 3 else str(i)} for i in range(10)]
    path = table(tmp_path_factory.mktemp("rows") / "data" / "test-00000-of-00001.parquet", *rows)
    hub.add("datasets", "a/rows-1.5", path.parent.parent)
    return hub


@pytest.fixture(scope="module")
def home(served, tmp_path_factory):
    """HF_HOME after two processes at the same time asked for a model and a data set; what each
    got; the files sent."""
    home = tmp_path_factory.mktemp("home") / "hf"
    served.requests.clear()
    served.delays = {"2.safetensors": 1.0, "deepscaler.json": 1.0}
    both = [calling(served.env(home), *BOTH) for _ in range(2)]
    results = [finish(process) for process in both]
    served.delays = {}
    return home, results, served.downloads()


LOGIN, FORM = "`hf auth login`", "OWNER/NAME or OWNER/NAME/CONFIG"
SPLIT, ROWS15 = [["hub_rows", [DATA, "test"]]], "a/rows-1.5"
GATED = [
    ("model_folder", ["Llama-3.1-8B"], f"meta-llama/Llama-3.1-8B|Gated|{LOGIN}"),
    ("hub_rows", ["a/gated"], f"dataset a/gated|Gated|{LOGIN}"),
]
FAILURES = [
    ("model_folder", ["Qwen-none"], f"model Qwen/Qwen-none|Not Found|{LOGIN}"),
    ("hub_rows", ["a/b"], f"dataset a/b|Not Found|check the name|{LOGIN}"),
    ("model_folder", ["Qwen/a b"], "Qwen/a b|check the name"),
    ("hub_rows", ["a/two"], "a/two|['x', 'y']"),
    ("hub_rows", ["a/two/z"], "'z'|['x', 'y']"),
    ("hub_rows", ["a/two/x"], "\"train\"|['test']"),
    ("hub_rows", ["a/two/x/y"], FORM),
    ("hub_rows", ["two"], FORM),
    ("hub_rows", ["a/broken"], "a/broken: JSON parse error"),
    ("hub_rows", ["a/none"], "a/none|any data files"),
    *GATED,
]
# of these the last has a hub to say that there is none
CONFIGURATIONS = (["a/two/x", "test"], ["a/solo"], ["a/two/y"], ["a/two", "test"], ["a/b"])
PROBLEMS = [DATA], [ROWS15, "question", "final", "test"], [ROWS15, "problem", "answer", "test"]


@pytest.fixture(scope="module")
def later(served, home):
    """What a process with that HF_HOME gets, part by part; what it asked the hub for."""
    parts = dict(both=BOTH, split=SPLIT, failures=[case[:2] for case in FAILURES])
    parts["configurations"] = [["hub_rows", name] for name in CONFIGURATIONS]
    parts["problems"] = [["load_problems", args] for args in PROBLEMS]
    parts["bin"] = [["model_folder", ["Qwen/only-bin"]]]
    served.requests.clear()
    told = iter(ask(served.env(home[0]), *sum(parts.values(), [])))
    return {name: [next(told) for _ in part] for name, part in parts.items()}, served.requests[:]


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_snapshot", lambda kind, name, **_: f"{kind} {name}")
    monkeypatch.chdir(tmp_path)
    owners = {"Qwen2.5-Math-7B": "Qwen", "DeepSeek-R1-Distill-Qwen-1.5B": "deepseek-ai"}
    owners |= {"Llama-3.1-8B": "meta-llama", "Meta-Llama-3-8B": "meta-llama"}
    for name, owner in owners.items():
        assert data.model_folder(name) == f"model {owner}/{name}"
    assert data.model_folder("me/Qwen2.5-Math-7B") == "model me/Qwen2.5-Math-7B"
    for folder in (MODEL, "./Qwen2.5-Math-7B", "Qwen/Qwen3-8B", str(tmp_path)):  # a folder wins
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert data.model_folder(folder) == folder
    write(tmp_path / "Qwen.gguf", "a file")
    for path in "./Qwen3-8B ../Qwen3-8B /Qwen3-8B ~/Qwen3-8B a/b/c Qwen.gguf".split():
        refused(f"{path}: no such folder", data.model_folder, path)
    for name in ("model", "gpt2", "qwen"):
        refused(f"no folder '{name}'|give OWNER/NAME", data.model_folder, name)


def test_processes_at_the_same_time_fetch_every_file_once(home):
    _, results, files = home
    for (folder, error, _), (rows, wrong, _) in results:
        assert not error and not wrong and rows == ROWS and folder == results[0][0][0]
    # no pickle, no code, no other format
    sent = Counter(Path(path).name for path in files)
    assert sent == Counter([*FILES, "deepscaler.json"])
    assert {path.name for path in Path(folder).rglob("*")} == set(FILES)
    assert Path(folder, "2.safetensors").read_text() == "two"


def test_what_was_fetched_needs_no_hub(home, later):
    got, requests = later
    assert got["both"] == home[1][0]
    assert not [path for _, path in requests if MODEL in path or DATA in path]
    one_line(got["split"][0][1], "['train']")


def test_a_killed_download_is_noticed_and_completed(served, tmp_path):
    served.delays = {"2.safetensors": 5}
    process = calling(served.env(tmp_path), BOTH[0])
    while len(list(tmp_path.rglob("snapshots/*/*"))) < len(FILES) - 1:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    served.delays = {}
    error = ask(served.env(tmp_path) | OFFLINE, BOTH[0])[0][1]
    one_line(error, "2.safetensors|python -m infra.data --model")
    # older versions of the library left no listing of what there should be
    for path in tmp_path.rglob("trees/*"):
        path.unlink()
    served.requests.clear()
    env = served.env(tmp_path) | {"HF_TOKEN": "hf_without_access"}  # 403, not 401
    (folder, *_), *gated = ask(env, BOTH[0], *(case[:2] for case in GATED))
    assert Path(folder, "2.safetensors").read_text() == "two"
    assert [Path(path).name for path in served.downloads()] == ["2.safetensors"]
    for (*_, words), (_, error, _) in zip(GATED, gated, strict=True):
        one_line(error, words)


def test_failures_are_one_line(later):
    got, requests = later
    for (*_, words), (result, error, _) in zip(FAILURES, got["failures"], strict=True):
        assert result is None
        one_line(error, words)
    assert data._missing(got["bin"][0][0]) == ["*.safetensors"]
    assert not [path for _, path in requests if path.endswith(".bin")]


@pytest.mark.parametrize("reason", ["ConnectError", "Timeout"])
def test_an_unreachable_hub_is_told_at_once(served, tmp_path, reason):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if reason == "Timeout":
            taken.listen()  # takes connections and says nothing
        env = served.env(tmp_path / "hf", f"http://127.0.0.1:{taken.getsockname()[1]}")
        told = ask(env, BOTH[0], ["hub_rows", ["a/two/x"]])
    for (_, error, _), command in zip(told, (f"--model {FULL}", "--data a/two"), strict=True):
        one_line(error, f"`python -m infra.data {command}`|HF_HOME|{reason}")


def test_configurations(served, home, later):
    """A configuration that was used never stands in for another, nor for the hub's choice."""
    calls = [["hub_rows", name] for name in CONFIGURATIONS]
    offline = ask(served.env(home[0]) | OFFLINE, *calls)
    for told in (later[0]["configurations"], offline):
        *found, (_, error, _), (_, none, _) = told
        assert [rows[0]["problem"] for rows, *_ in found] == ["x?", "y?", "y?"]
        one_line(error, "['x', 'y']")
    one_line(none, "HF_HUB_OFFLINE|python -m infra.data --data a/b")


def test_problems_from_the_hub(later):
    good, named, unnamed = later[0]["problems"]
    expected = []
    for i, row in enumerate(ROWS):
        expected.append({"id": f"{DATA}/{i}", "problem": row["problem"], "answer": row["answer"]})
    assert good == [expected, None, []]
    assert [p["id"] for p in named[0]] == [f"a/rows-1.5/{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    start = "skipped 2 of 10 rows of a/rows-1.5 (first: row 3: 'final' must be"
    assert named[1] is None and len(named[2]) == 1 and named[2][0].startswith(start)
    one_line(unnamed[1], "['question', 'final']|--problem_key|--answer_key")


def test_command_line(served, home, tmp_path, capsys):
    command = ("-m", "infra.data", "--model", MODEL, "--data", DATA)
    fetched = start(served.env(home[0]), *command)
    refused_here = start(served.env(tmp_path) | OFFLINE, *command[:4])
    columns = "20 rows in split train, columns problem, answer, solution"
    expected = f"{MODEL}: {home[1][0][0][0]}\n{DATA}: {columns}\n"
    assert fetched.communicate() == (expected, "") and fetched.returncode == 0
    out, err = refused_here.communicate()
    assert (refused_here.returncode, out, err.count("\n")) == (2, "", 1)
    one_line(err[:-1], f"error: model {FULL}|HF_HUB_OFFLINE|HF_HOME")
    for args, word in (
        ([], "--model NAME, --data NAME or --benchmarks"),
        (["--modle", "x"], "--modle"),
        (["--model", "gpt2"], "OWNER/NAME"),
    ):
        with pytest.raises(SystemExit) as ended:
            data.main(args)
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ") and word in err

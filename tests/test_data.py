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
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
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
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    special = ["<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "?"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(special + characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token=eos,
        additional_special_tokens=special[2:6],
    )
    fast.chat_template = chat_template
    return fast


def write(path, text):
    """text: bytes, a string, or what becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(text, (bytes, str)):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    assert all(str(word) in message for word in words), message


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


@pytest.mark.parametrize("escape", [True, False])
def test_unicode_survives_and_only_newlines_end_a_line(tmp_path, escape):
    text = "Größe π\u2028übrig \U0001d54f \x85 naïve"
    row = json.dumps({"problem": text, "answer": "π"}, ensure_ascii=escape)
    assert data.load_problems(write(tmp_path / "u.jsonl", "\ufeff" + row))[0]["problem"] == text


GOOD = '{"problem": "p", "answer": "1"}\n'
START = '{"problem": "p", "answer": '
WIDE = {"k" * 1000 + str(i): 1 for i in range(1000)}


# fmt: off
@pytest.mark.parametrize("name, text, words", [
    ("missing.jsonl", None, ["No such file", "check the path"]),
    ("missing.parquet", None, ["No such file", "check the path"]),
    ("set.csv", "problem,answer", [".jsonl", ".json", ".parquet", "OWNER/NAME"]),
    ("set.parquet", "PAR1", ["set.parquet", "arquet"]),
    ("empty.jsonl", "", ["no problems", "'problem'"]),
    ("blank.jsonl", "\n \n", ["no problems"]),
    ("empty.json", " ", ["no problems"]),
    ("none.json", "[]", ["no problems"]),
    ("bad.jsonl", GOOD + START + "}\n", ["line 2", "column 28", "malformed", "fix"]),
    ("cut.jsonl", GOOD + GOOD[:20], ["line 2", "malformed"]),
    ("bad.json", '[{"problem": "p",\n "answer" 1}]', ["line 2", "malformed"]),
    ("deep.jsonl", GOOD + "[" * 100_000, ["line 2", "fix"]),
    ("deep_object.jsonl", GOOD + '{"a":' * 100_000, ["line 2", "fix"]),
    ("digits.jsonl", GOOD + START + "9" * 5000 + "}", ["line 2", "fix"]),
    ("object.json", '{"problem": "p", "answer": "1"}', ["[ ]"]),
    ("nested.jsonl", GOOD + START + "[" * 900 + "1" + "]" * 900 + "}", ["line 2", "'answer'"]),
    ("large.jsonl", GOOD + '{"problem": "' + 2_000_000 * "a" + '", "answer": }',
     ["line 2", "column 2000027", "malformed"]),
    ("keys.jsonl", GOOD + json.dumps(WIDE), ["line 2", "'problem'", "..."]),
    ("twice_a_key.jsonl", GOOD + START + '"1", "answer": "2"}', ["line 2", "'answer' twice"]),
    ("utf16.jsonl", GOOD.encode("utf-16"), ["line 1", "UTF-8"]),
    ("utf16_without_mark.jsonl", GOOD.encode("utf-16-le"), ["line 1", "malformed"]),
    ("nul.jsonl", GOOD + '{"problem": "p\0", "answer": "1"}', ["line 2", "control character"]),
    ("mark.jsonl", GOOD + "\ufeff" + GOOD, ["line 2", "column 1", "BOM"]),
    ("cr.jsonl", GOOD.replace("\n", "\r") * 2, ["line 1", "malformed"]),
    ("latin.jsonl", GOOD.encode() + START.encode() + b'"\xf6"}', ["line 2", "UTF-8"]),
    ("latin.json", b'[\n{"problem":\n "\xf6", "answer": "1"}]', ["line 3", "UTF-8"]),
    ("list.jsonl", GOOD + "[1, 2]\n", ["line 2", "list", "not an object"]),
    ("item.json", "[" + GOOD + ', "p"]', ["item 2", "str", "not an object"]),
    ("key.jsonl", GOOD + '{"question": "p", "answer": "1"}',
     ["line 2", "'problem'", "'question'", "problem_key"]),
    ("answer.jsonl", GOOD + '{"problem": "p", "solution": "1"}',
     ["line 2", "'answer'", "'solution'", "answer_key"]),
    ("type.jsonl", GOOD + '{"problem": ["p"], "answer": "1"}',
     ["line 2", "must be a string", "['p']"]),
    ("nothing.jsonl", GOOD + '{"problem": " ", "answer": "1"}', ["line 2", "text in it"]),
    ("null.jsonl", GOOD + START + "null}", ["line 2", "'answer'", "None"]),
    ("dict.jsonl", GOOD + START + '{"a": 1}}', ["line 2", "'answer'"]),
    ("bool.jsonl", GOOD + START + "true}", ["line 2", "True"]),
    ("nan.jsonl", GOOD + START + "NaN}", ["line 2", "nan"]),
    ("infinity.jsonl", GOOD + START + "1e999}", ["line 2", "inf"]),
    ("no_answer.jsonl", GOOD + START + "[]}", ["line 2", "not empty", "[]"]),
    ("blank_answer.jsonl", GOOD + START + '["1", ""]}', ["line 2", "not empty"]),
    ("inner.jsonl", GOOD + START + '[["1"]]}', ["line 2", "'answer'"]),
    ("half.jsonl", GOOD + '{"problem": "\\ud800", "answer": "1"}', ["line 2", "escape"]),
    ("twice.jsonl", 2 * '{"id": "a", "problem": "p", "answer": "1"}\n',
     ["line 2", "'a'", "line 1", "unique"]),
])
# fmt: on
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        write(path, text)
    with pytest.raises(ValueError) as caught:
        data.load_problems(path)
    one_line(caught, path, *words)


def test_odd_files_that_are_right(tmp_path):
    """A byte order mark, Windows' line ends, a long line, an answer of 4,000 digits, ids that look
    like paths: text, and nothing else."""
    rows = [
        {"id": "../../../etc/passwd", "problem": "a" * 2_000_000, "answer": int("9" * 4000)},
        {"id": "/a\0b", "problem": "p", "answer": 1},
        {"id": {"not": "text"}, "problem": "q", "answer": 2},
    ]
    text = b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()
    found = data.load_problems(write(tmp_path / "odd.jsonl", text))
    assert [p["id"] for p in found] == ["../../../etc/passwd", "/a\0b", "odd/2"]
    assert [p["answer"] for p in found] == ["9" * 4000, "1", "2"]
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_problems(tmp_path / "d.jsonl")


def test_parquet_is_read_like_the_rest(tmp_path):
    from pyarrow import Table, parquet

    def table(name, *rows):
        parquet.write_table(Table.from_pylist(list(rows)), tmp_path / name)
        return tmp_path / name

    good = table(
        "set.parquet",
        {"problem": "1+1?", "answer": "2", "id": None},
        {"problem": "2+2?", "answer": "4", "id": "b"},
    )
    assert data.load_problems(good) == [
        {"id": "set/0", "problem": "1+1?", "answer": "2"},
        {"id": "b", "problem": "2+2?", "answer": "4"},
    ]
    bad = table(
        "bad.parquet", {"problem": "p", "answer": [1, 2]}, {"problem": "q", "answer": None}
    )
    with pytest.raises(ValueError, match="bad.parquet, row 1: 'answer' must be"):
        data.load_problems(bad, say=pytest.fail)  # in a file every row must be usable
    with pytest.raises(ValueError, match=r"row 0: no 'final' among its keys \['problem', 'answer"):
        data.load_problems(bad, answer_key="final")


# fmt: off
ON_HUB = ("a/set", "agentica-org/DeepScaleR-Preview-Dataset", "a/b/main", "a/set-v1.5",
          "a/b_c.d-1.0/x")
NO_NAMES = ("set", "./a/set", "../a/set", "/a/set", "~/set", "a/b/c/d", "a/set.csv", "a/b/set.txt",
            "a/", "a//b", "a/set.jsonl", "here/set")
# fmt: on


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
        with pytest.raises(ValueError, match=why):
            data.load_problems(name)
        assert not asked


def test_unusable_rows_of_a_hub_data_set_are_skipped_and_counted(monkeypatch):
    good = [
        {"problem": "p", "answer": "1", "id": "x"},
        {"problem": "q", "answer": 2, "id": "x"},
        {"problem": "r", "answer": "3", "id": None},
    ]
    bad = [
        {"problem": "p", "answer": None},
        {"problem": " ", "answer": "1"},
        {"problem": "p", "answer": []},
    ]
    rows, said = [good[0], bad[0], good[1], bad[1], good[2], bad[2]], []
    monkeypatch.setattr(data, "hub_rows", lambda name, split: rows)
    problems = data.load_problems("a/b", say=said.append)
    assert [p["id"] for p in problems] == ["x", "a/b/2", "a/b/4"]
    assert [p["answer"] for p in problems] == ["1", "2", "3"]
    assert said == [
        "skipped 3 of 6 rows of a/b (first: row 1: 'answer' must be a string, a number or a list "
        "of those, and not empty; it is None)"
    ]
    assert data.load_problems("a/b") == problems
    rows[:] = good
    assert len(data.load_problems("a/b", say=pytest.fail)) == 3
    rows[:] = bad
    for key, reason in (("answer", "row 0: 'answer' must be"), ("final", "row 0: no 'final'")):
        with pytest.raises(ValueError, match="a/b: holds no problems") as caught:
            data.load_problems("a/b", answer_key=key)
        one_line(caught, "--problem_key", "--answer_key", reason)
    rows[:] = []
    with pytest.raises(ValueError, match="a/b: holds no problems"):
        data.load_problems("a/b")


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
        with pytest.raises(ValueError, match=f"cannot hold {n} of 100"):
            data.split_held_out(problems, n)


# -- benchmarks -----------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """$REMIX_DATA, or a folder of generated benchmarks that load_benchmark() then expects."""
    if os.environ.get("REMIX_DATA"):
        return Path(os.environ["REMIX_DATA"])
    sources = {}
    for name, count in data.BENCHMARKS.items():
        rows = [{"id": f"{i}", "problem": f"{i} + 1?", "answer": [f"{i}"]} for i in range(count)]
        text = "\n".join(map(json.dumps, rows))
        path = write(tmp_path / "benchmarks" / f"{name}.jsonl", text)
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
    path = str(benchmarks / "benchmarks" / "aime24.jsonl")
    assert len(data.load_eval_data(path)) == 30


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
        write(path, "\n".join(map(json.dumps, changed)))
        with pytest.raises(ValueError, match=f"{len(changed)} problems .* of aime24, which has 30"):
            data.load_benchmark("aime24", path.parent)
    for i, row in enumerate(rows):
        if isinstance(row["answer"], str):
            row["answer"] = [f" {row['answer']}"]
        row |= {"id": f"my/{i}", "problem": row["problem"].replace(" ", "  ") + "\n"}
    write(path, "\n".join(map(json.dumps, rows)))
    found = data.load_benchmark("aime24", path.parent)
    assert [p["id"] for p in found] == [f"my/{i}" for i in range(30)]


def test_benchmark_mistakes(tmp_path):
    names = "aime24, amc, amc23, math500, minerva, olympiadbench"
    with pytest.raises(ValueError, match=f"'aime25'.*{names}"):
        data.load_benchmark("aime25", tmp_path)
    with pytest.raises(ValueError, match="no aime24.jsonl.*--data_dir"):
        data.load_benchmark("aime24", tmp_path)


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
    problem = r"{{ 1 }} {% if x %} \frac{1}{2} {0} %s"  # no format string, no jinja
    assert all(problem in data.render(problem, chat, template) for template in data.TEMPLATES)


def test_templates_that_do_not_fit():
    with pytest.raises(ValueError, match="--template plain"):
        data.render("p", make_tokenizer(), "r1")
    with pytest.raises(ValueError, match="'nope'.*r1, qwen-math, plain, raw"):
        data.render("p", make_tokenizer(), "nope")
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(ValueError, match="no system.*--template plain"):
        data.render("p", make_tokenizer(refusal + CHAT), "qwen-math")


def test_a_template_may_be_a_file(tmp_path):
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    text = write(tmp_path / "mine.txt", "\ufeff{a} Q: {problem}\nAgain: {problem}\nA:\n")
    filled = "{a} Q: {problem} 1+1?\nAgain: {problem} 1+1?\nA:\n"
    assert data.render("{problem} 1+1?", plain, text) == filled
    assert data.render("{problem} 1+1?", chat, str(text)) == filled
    messages = [
        {"role": "system", "content": "be {brief}"},
        {"role": "user", "content": "<{problem}>"},
    ]
    talk = write(tmp_path / "mine.json", messages)
    assert data.render("1+1?", chat, talk) == "<|system|>be {brief}<|user|><1+1?><|assistant|>"
    with pytest.raises(ValueError, match="--template plain"):
        data.render("p", plain, talk)
    styles = [data.template_style(template) for template in (*data.TEMPLATES, talk, str(text))]
    assert styles == ["think", "boxed", "boxed", "hash", "boxed", "boxed"]
    text.unlink()
    assert data.render("x", plain, text).startswith("{a} Q: x")  # read once


# fmt: off
@pytest.mark.parametrize("name, text, words", [
    ("none.txt", None, ["none.txt", "choose one of r1, qwen-math, plain, raw", "or a file"]),
    ("no.txt", "Question: { problem }", ["{problem}"]),
    ("no.json", [{"role": "user", "content": "problem"}], ["{problem}"]),
    ("empty.json", [], ["{problem}"]),
    ("bad.json", '[{"role": "user", "content": "{problem}"]', ["malformed"]),
    ("dict.json", {"role": "user", "content": "{problem}"}, ["list of chat messages"]),
    ("keys.json", [{"role": "user", "text": "{problem}"}], ["list of chat messages"]),
    ("role.json", [{"role": 1, "content": "{problem}"}], ["list of chat messages"]),
    ("strings.json", ["{problem}"], ["list of chat messages"]),
    ("latin.txt", b"\xf6 {problem}", ["UTF-8"]),
])
# fmt: on
def test_a_bad_template_file_is_one_clear_line(tmp_path, name, text, words):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError) as caught:
        data.render("p", make_tokenizer(CHAT), str(tmp_path / name))
    one_line(caught, tmp_path / name, *words)


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
    assert data.default_template("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", chat) == "r1"
    # an export of such a model: the name says nothing
    assert data.default_template("runs/7/model", think) == "r1"
    assert data.default_template("Qwen/Qwen2.5-Math-7B", chat) == "qwen-math"
    # "think" would score it 0 for ever
    assert data.default_template("Qwen/Qwen2.5-7B-Instruct", chat) == "qwen-math"
    assert data.default_template("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", plain) == "plain"
    assert data.default_template(Path("gpt2"), plain) == "plain"


def test_long_prompts_are_counted_and_dropped(encode):
    problems = [{"id": str(n), "problem": "1" * n, "answer": "1"} for n in (3, 11, 10, 12, 1)]
    kept, skipped, said = encode(problems, make_tokenizer(), "raw", 10)
    assert [problem["id"] for problem in kept] == ["3", "10", "1"] and skipped == 2
    assert [len(problem["prompt_ids"]) for problem in kept] == [3, 10, 1]
    assert said == ["skipped 2 of 5 prompts: above --max_prompt 10"]
    assert all("prompt_ids" not in problem for problem in problems)
    longer = [problem | {"problem": "1" * 9} for problem in problems]
    with pytest.raises(ValueError, match="none of 5 prompts.*shortest: 9.*--max_prompt"):
        encode(longer, make_tokenizer(), "raw", 8)


def test_what_cannot_fit_is_not_tokenised(encode):
    """To tokenise 10 MB takes 19 s and 4 GB."""
    given = []

    class Counting:
        eos_token_id = 1

        def __call__(self, texts, **_):
            given.extend(texts)
            return {"input_ids": [[1] * len(text) for text in texts]}

    texts = ["a" * 20_000_000, "a", "a" * (8 * data.LONGEST_TOKEN + 1), "a" * 9, "a" * 8]
    kept, skipped, _ = encode([{"problem": text} for text in texts], Counting(), "raw", 8)
    assert given == ["a", "a" * 9, "a" * 8]
    assert [len(p["problem"]) for p in kept] == [1, 8] and skipped == 3
    with pytest.raises(ValueError, match="none of 1 prompts"):
        encode([{"problem": texts[0]}], Counting(), "raw", 8)


def test_tokenizers(encode, tmp_path):
    make_tokenizer(CHAT).save_pretrained(tmp_path / "good")
    tokenizer = data.load_tokenizer(tmp_path / "good")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    problems = [{"problem": "1+1?"}]
    assert encode(problems, tokenizer, "r1") == encode(problems, make_tokenizer(CHAT), "r1")
    tokenizer.add_tokens([f"more{i}" for i in range(100)])
    with pytest.raises(ValueError, match="model has 200"):
        encode([{"problem": "more99"}], tokenizer, "r1")
    make_tokenizer(eos=None).save_pretrained(tmp_path / "no_eos")
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "broken" / "tokenizer.json", "{")
    for name, word in (("no_eos", "eos_token"), ("nothing", "needs one of"), ("broken", "loaded")):
        with pytest.raises(ValueError) as caught:
            data.load_tokenizer(tmp_path / name)
        one_line(caught, tmp_path / name, word)


# -- the stream -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
    a=st.integers(0, 100),
    n=st.integers(0, 100),
    m=st.integers(0, 100),
)
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
    with pytest.raises(ValueError):
        data.PromptStream([], 0)


# -- a run's preparation --------------------------------------------------------------------------


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
def test_models_that_do_not_fit(small_model, tmp_path, changes, words):
    folder = shutil.copytree(small_model, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    data.check_model(folder, 2)
    kept = {k: v for k, v in (config | (changes or {})).items() if v is not None}
    write(folder / "config.json", "{" if changes is None else kept)
    with pytest.raises(ValueError) as caught:
        data.check_model(folder, 2)
    one_line(caught, folder, words)


def test_weights_that_are_not_whole(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "copy")
    weights = (folder / "model.safetensors").read_bytes()
    index = {"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}
    for files, word in (
        ({"model.safetensors": weights[:-1]}, "whole"),
        ({"model.safetensors": b""}, "whole"),
        ({"model.safetensors.index.json": index}, "no model-2.safetensors"),
        ({"model.safetensors.index.json": {}}, "whole"),
    ):
        for name, content in files.items():
            write(folder / name, content)
        with pytest.raises(ValueError) as caught:
            data.check_model(folder)
        one_line(caught, folder, word)
        write(folder / "model.safetensors", weights)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    for path, word in ((folder, "*.safetensors"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ValueError) as caught:
            data.check_model(path)
        one_line(caught, path, word)


def test_head_and_embedding_stored_twice_but_alike(small_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small_model, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    data.check_model(folder)


def test_prepare(small_model, tmp_path):
    """What the flags leave open is settled; a run is resumed on its own problems and its own kind
    of model, wherever they lie."""
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(9)]
    path = write(tmp_path / "set.json", rows)
    flags = dict(
        model=str(small_model),
        data=str(path),
        problem_key="problem",
        answer_key="answer",
        data_split="train",
        held_out=2,
        eval_every=1,
        eval_data="held_out,toy",
        data_dir=None,
        replay=None,
        reward=None,
        tp=1,
        template="auto",
        style="auto",
        dtype="auto",
        rollout_dtype="auto",
        max_prompt=100,
        max_response=8192,
        resume=False,
        out=str(tmp_path),
        given={"model"},
    )

    def prepare(**changes):
        said, cfg = [], SimpleNamespace(**flags | changes)
        return cfg, data.prepare(cfg, said.append), said

    cfg, task, said = prepare()
    assert (cfg.template, cfg.style, cfg.max_response) == ("r1", "think", 412)
    assert cfg.rollout_dtype == cfg.dtype in ("float32", "bfloat16")
    assert task.folder == str(small_model) and len(task.problems) == 7
    assert {name: len(part) for name, part in task.parts.items()} == {"held_out": 2, "toy": 128}
    assert all(problem["prompt_ids"] for problem in task.problems + task.parts["toy"])
    assert "up to 412" in said[0] and "7 problems, template r1, judged by think" in said[1]
    assert prepare(replay="rollouts")[1].parts == {}
    with pytest.raises(ValueError, match="context of 512 tokens"):
        prepare(given={"max_response"})
    with pytest.raises(ValueError, match="nowhere.txt"):
        prepare(template="nowhere.txt", data="missing.jsonl")  # before anything is fetched

    write(tmp_path / "config.json", {"fingerprint": cfg.fingerprint})
    moved = shutil.copytree(small_model, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    write(moved / "config.json", config | {"transformers_version": "9"})
    again = dict(model=str(moved), data=str(write(tmp_path / "b" / "set.json", rows)), resume=True)
    assert prepare(**again)[0].fingerprint == cfg.fingerprint
    other = write(tmp_path / "other.json", [row | {"answer": "7"} for row in rows])
    with pytest.raises(ValueError, match="other problems"):
        prepare(**again | {"data": str(other)})
    write(moved / "config.json", config | {"rope_theta": 5.0})
    with pytest.raises(ValueError, match="another kind of model"):
        prepare(**again)


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
DATA = "agentica-org/DeepScaleR-Preview-Dataset"
BOTH = [["model_folder", [MODEL]], ["hub_rows", [DATA]]]
ROWS = [{"problem": f"{i}+1?", "answer": str(i + 1), "solution": "count"} for i in range(20)]
FILES = {
    "config.json": {"a": 1},
    "tokenizer.json": {"b": 2},
    "tokenizer.model": "m",
    "merges.txt": "t",
    "chat_template.jinja": "j",
    "model.safetensors.index.json": {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}},
    "1.safetensors": "one",
    "2.safetensors": "two",
}
OTHERS = {"pytorch_model.bin": "pickle", "modeling.py": "code", "original/config.json": {"c": 3}}


def start(env, *calls):
    return subprocess.Popen(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=ROOT,
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and not err, err
    return [json.loads(line) for line in out.splitlines()]


def ask(env, *calls):
    return finish(start(env, *calls))


def yaml_of(**configs):
    """A README whose header names configurations: config="split: file"."""
    lines = []
    for name, value in configs.items():
        split, file = value.split(": ")
        files = f"  data_files:\n  - split: {split}\n    path: {file}\n"
        lines.append(f"- config_name: {name}\n{files}")
    return "---\nconfigs:\n" + "".join(lines) + "---\n"


@pytest.fixture(scope="module")
def served(hub, tmp_path_factory):
    """The hub with a model in two shards, a data set of one file, and what goes wrong."""

    def add(kind, name, files, gated=False):
        folder = tmp_path_factory.mktemp("served")
        for path, content in files.items():
            write(folder / path, content)
        hub.add(kind, name, folder, gated)

    x, y = {"problem": "x?", "answer": "1"}, {"problem": "y?", "answer": "2"}
    add("models", FULL, FILES | OTHERS)
    add("models", "Qwen/only-bin", {"config.json": {"a": 4}, "pytorch_model.bin": "pickle"})
    add("models", "meta-llama/Llama-3.1-8B", {"config.json": {"a": 5}}, gated=True)
    add("datasets", DATA, {"deepscaler.json": ROWS})
    add("datasets", "a/gated", {"a.json": ROWS}, gated=True)
    add("datasets", "a/broken", {"a.jsonl": '{"problem": "p"}\n{"problem": '})
    add("datasets", "a/none", {"README.md": "nothing else"})
    configs = {"README.md": yaml_of(x="test: x.jsonl", y="train: y.jsonl")}
    add("datasets", "a/two", configs | {"x.jsonl": x, "y.jsonl": y})
    add("datasets", "a/solo", {"README.md": yaml_of(main="train: y.jsonl"), "y.jsonl": y})
    return hub


@pytest.fixture(scope="module")
def home(served, tmp_path_factory):
    """HF_HOME after two processes at the same time asked for a model and a data set; what each
    got; the files sent."""
    home = tmp_path_factory.mktemp("home") / "hf"
    served.requests.clear()
    served.delays = {"2.safetensors": 1.0, "deepscaler.json": 1.0}
    results = [finish(process) for process in [start(served.env(home), *BOTH) for _ in range(2)]]
    served.delays = {}
    return home, results, served.downloads()


@pytest.fixture(scope="module")
def closed():
    """The address of a hub that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, but not listening


def test_names_of_models(tmp_path, monkeypatch):
    for name, owner in (
        ("Qwen2.5-Math-7B", "Qwen"),
        ("Llama-3.1-8B", "meta-llama"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-ai"),
        ("Meta-Llama-3-8B", "meta-llama"),
    ):
        assert data.full_name(name) == f"{owner}/{name}"
    assert data.full_name("me/Qwen2.5-Math-7B") == "me/Qwen2.5-Math-7B"
    monkeypatch.chdir(tmp_path)
    for folder in (MODEL, "./Qwen2.5-Math-7B", "Qwen/Qwen3-8B", str(tmp_path)):  # a folder wins
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert data.model_folder(folder) == folder
    write(tmp_path / "Qwen.gguf", "a file")
    paths = ("./Qwen3-8B", "../Qwen3-8B", "/Qwen3-8B", "~/Qwen3-8B", "a/b/c", "Qwen.gguf")
    for path in paths:
        with pytest.raises(ValueError, match=f"^{path}: no such folder$"):
            data.model_folder(path)
    for name in ("model", "gpt2", "qwen"):
        with pytest.raises(ValueError, match=f"no folder '{name}'.*give OWNER/NAME or a folder"):
            data.model_folder(name)


def test_processes_at_the_same_time_fetch_every_file_once(home):
    _, results, files = home
    for (folder, error, _), (rows, wrong, _) in results:
        assert not error and not wrong and rows == ROWS and folder == results[0][0][0]
    # no pickle, no code, no other format
    sent = Counter(Path(path).name for path in files)
    assert sent == Counter([*FILES, "deepscaler.json"])
    assert {path.name for path in Path(folder).rglob("*")} == set(FILES)
    assert Path(folder, "2.safetensors").read_text() == "two"


def test_what_was_fetched_needs_no_hub(served, home):
    folder, results, _ = home
    served.requests.clear()
    *got, (_, unknown, _) = ask(served.env(folder), *BOTH, ["hub_rows", [DATA, "test"]])
    assert got == results[0] and not served.requests
    assert "['train']" in unknown and "\n" not in unknown


def test_a_killed_download_is_noticed_and_completed(served, tmp_path):
    served.delays = {"2.safetensors": 5}
    process, offline = start(served.env(tmp_path), BOTH[0]), {"HF_HUB_OFFLINE": "1"}
    while len(list(tmp_path.rglob("snapshots/*/*"))) < len(FILES) - 1:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    served.delays = {}

    error = ask(served.env(tmp_path) | offline, BOTH[0])[0][1]
    assert "2.safetensors" in error and "python -m infra.data --model" in error
    assert "\n" not in error
    # older versions of the library left no listing of what there should be
    for path in tmp_path.rglob("trees/*"):
        path.unlink()
    served.requests.clear()
    folder = ask(served.env(tmp_path), BOTH[0])[0][0]
    assert Path(folder, "2.safetensors").read_text() == "two"
    assert [Path(path).name for path in served.downloads()] == ["2.safetensors"]


def check(env, cases):
    """Every (function, args, words): one line that holds the words."""
    told = ask(env, *(case[:2] for case in cases), ["model_folder", ["Qwen/only-bin"]])
    (folder, *_) = told.pop()
    for (_, args, words), (result, error, _) in zip(cases, told, strict=True):
        assert result is None and error, args
        assert "\n" not in error and len(error) < 900
        assert all(word in error for word in words), error
    return folder


def test_failures_are_one_line(served, tmp_path):
    login = "`hf auth login`"
    cases = [
        ("model_folder", ["Qwen-none"], ["model Qwen/Qwen-none", "Not Found", login]),
        ("hub_rows", ["a/b"], ["dataset a/b", "Not Found", "check the name", login]),
        ("model_folder", ["Llama-3.1-8B"], ["meta-llama/Llama-3.1-8B", "Gated", login]),
        ("hub_rows", ["a/gated"], ["dataset a/gated", "Gated", login]),
        ("model_folder", ["Qwen/a b"], ["Qwen/a b", "check the name"]),
        ("hub_rows", ["a/two"], ["a/two", "['x', 'y']"]),
        ("hub_rows", ["a/two/z"], ["'z'", "['x', 'y']"]),
        ("hub_rows", ["a/two/x"], ['"train"', "['test']"]),
        ("hub_rows", ["a/two/x/y"], ["OWNER/NAME or OWNER/NAME/CONFIG"]),
        ("hub_rows", ["two"], ["OWNER/NAME or OWNER/NAME/CONFIG"]),
        ("hub_rows", ["a/broken"], ["a/broken: JSON parse error"]),
        ("hub_rows", ["a/none"], ["a/none", "any data files"]),
    ]
    folder = check(served.env(tmp_path), cases)
    token = {"HF_TOKEN": "hf_without_access"}  # 403, not 401
    check(served.env(tmp_path) | token, cases[2:4])
    assert data._missing(folder) == ["*.safetensors"]
    assert not [path for path in served.downloads() if path.endswith(".bin")]


@pytest.mark.parametrize("how", ["refused", "mute"])
def test_an_unreachable_hub_is_told_at_once(served, closed, tmp_path, how):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()  # takes connections and says nothing
        urls = {"refused": closed, "mute": f"http://127.0.0.1:{mute.getsockname()[1]}"}
        env = served.env(tmp_path / "hf", urls[how])
        told = ask(env, ["model_folder", [MODEL]], ["hub_rows", ["a/two/x"]])
    reason = {"refused": "ConnectError", "mute": "Timeout"}[how]
    for (_, error, _), command in zip(told, (f"--model {FULL}", "--data a/two")):
        for word in (f"`python -m infra.data {command}`", "HF_HOME", reason):
            assert word in error and "\n" not in error


def test_configurations(served, tmp_path):
    """A configuration that was used never stands in for another, nor for the hub's choice."""
    names = (["a/two/x", "test"], ["a/solo"], ["a/two/y"], ["a/two", "test"], ["a/b"])
    calls = [["hub_rows", name] for name in names]
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        *found, (_, error, _), (_, none, _) = ask(served.env(tmp_path) | more, *calls)
        assert [rows[0]["problem"] for rows, *_ in found] == ["x?", "y?", "y?"]
        assert "['x', 'y']" in error
    assert "HF_HUB_OFFLINE" in none and "python -m infra.data --data a/b" in none


def test_problems_from_the_hub(served, home, tmp_path):
    from pyarrow import Table, parquet

    rows = [{"question": f"{i}?", "final": None if i % 4 == 3 else str(i)} for i in range(10)]
    path = write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", "")
    parquet.write_table(Table.from_pylist(rows), path)
    served.add("datasets", "a/rows-1.5", tmp_path / "set")
    calls = (
        [DATA],
        ["a/rows-1.5", "question", "final", "test"],
        ["a/rows-1.5", "problem", "answer", "test"],
    )
    good, named, unnamed = ask(served.env(home[0]), *(["load_problems", args] for args in calls))
    expected = []
    for i, row in enumerate(ROWS):
        expected.append({"id": f"{DATA}/{i}", "problem": row["problem"], "answer": row["answer"]})
    assert good == [expected, None, []]
    assert [p["id"] for p in named[0]] == [f"a/rows-1.5/{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    start = "skipped 2 of 10 rows of a/rows-1.5 (first: row 3: 'final' must be"
    assert named[1] is None and len(named[2]) == 1 and named[2][0].startswith(start)
    assert "['question', 'final']" in unnamed[1] and "--problem_key, --answer_key" in unnamed[1]


@pytest.fixture
def mirror(tmp_path):
    """(address of a server with the authors' files, its folder, the paths asked for)."""
    asked, folder = [], tmp_path / "mirror"

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_request(self, *_):
            asked.append(self.path)
            time.sleep(0.5)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    server.server_close()


def test_benchmarks_are_downloaded_once_and_checked(mirror, tmp_path, monkeypatch):
    from huggingface_hub import constants

    address, folder, asked = mirror
    rows = [{"problem": f"{i}+{i}?", "answer": 2.0 * i, "url": "u"} for i in range(83)]
    write(folder / data.SOURCE / "amc.json", rows)
    write(folder / data.SOURCE / "aime.json", rows[:30])
    texts = [row | {"answer": str(row["answer"])} for row in rows]
    sources = data.SOURCES | {"amc": ("amc.json", data.content(texts))}
    sources["amc23"] = ("amc.json", data.content(texts[43:]))
    sources["aime24"] = ("aime.json", data.content(texts[:30]))
    monkeypatch.setattr(data, "SOURCES", sources)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("REMIX_DATA", raising=False)
    monkeypatch.setenv("REMIX_MIRROR", address)
    monkeypatch.setenv("NO_PROXY", "*")

    with ThreadPoolExecutor(3) as pool:  # as the ranks of a run: each locks the file for itself
        amc, amc23, aime24 = pool.map(data.load_benchmark, ("amc", "amc23", "aime24"))
    assert amc[7] == {"id": "amc/7", "problem": "7+7?", "answer": "14.0"} and len(amc) == 83
    # AMC'23 is the end of the set of 83
    assert [p["answer"] for p in amc23] == [p["answer"] for p in amc[43:]] and len(aime24) == 30
    assert amc23[0]["id"] == "amc23/0"
    assert sorted(asked) == [f"/{data.SOURCE}/{name}.json" for name in ("aime", "amc")]
    for offline, server, why in (
        (False, address, "404"),
        (True, address, "HF_HUB_OFFLINE is set"),
        (False, "http://127.0.0.1:1", "refused"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("REMIX_MIRROR", server)
        with pytest.raises(ValueError) as caught:
            data.load_benchmark("minerva")
        one_line(caught, why, "`python -m infra.data --benchmarks`", "--data_dir")
    assert data.load_benchmark("amc") == amc  # from the cache
    sources["amc"] = ("amc.json", "0")
    with pytest.raises(ValueError, match="not those of amc"):
        data.load_benchmark("amc")
    assert not list((tmp_path / "hf").rglob("*.tmp"))


def test_command_line(served, home, capsys):
    folder, results, _ = home

    command = [sys.executable, "-m", "infra.data", "--model", MODEL, "--data", DATA]
    env = os.environ | served.env(folder)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    columns = "columns problem, answer, solution"
    first = f"{MODEL}: {results[0][0][0]}\n"
    assert done.stdout == f"{first}{DATA}: 20 rows in split train, {columns}\n"
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

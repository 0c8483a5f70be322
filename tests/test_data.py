"""data.py: files good and bad, templates, prompt lengths, and the order of a run's prompts.

The benchmarks are those in $REMIX_DATA, or generated (see test_reward.py).
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_reward import benchmark_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from infra import data

ROOT = Path(data.__file__).parent
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


# -- files ------------------------------------------------------------------------------------------------------------


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


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
    lines = write(tmp_path / "set.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\r\n\n")
    assert data.load_problems(lines) == data.load_problems(str(lines)) == expected
    assert data.load_problems(write(tmp_path / "set.json", json.dumps(rows, indent=1))) == expected


def test_keys_can_be_named(tmp_path):
    path = write(tmp_path / "q.jsonl", '{"question": "1+1?", "final": 2}')
    assert data.load_problems(path, "question", "final") == [
        {"id": "q/0", "problem": "1+1?", "answer": "2"}
    ]


@pytest.mark.parametrize("escape", [True, False])
def test_unicode_survives_and_only_newlines_end_a_line(tmp_path, escape):
    text = "Größe π\u2028übrig \U0001d54f \x85 naïve"
    row = json.dumps({"problem": text, "answer": "π"}, ensure_ascii=escape)
    assert data.load_problems(write(tmp_path / "u.jsonl", "\ufeff" + row))[0]["problem"] == text


GOOD = '{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("missing.jsonl", None, ["No such file", "check the path"]),
        ("set.csv", "problem,answer", [".jsonl", ".json", ".parquet", "OWNER/NAME"]),
        ("set.parquet", "PAR1", ["no readable parquet", "get it again"]),
        ("missing.parquet", None, ["No such file", "check the path"]),
        ("empty.jsonl", "", ["no problems", "'problem'"]),
        ("blank.jsonl", "\n \n", ["no problems"]),
        ("empty.json", " ", ["no problems"]),
        ("none.json", "[]", ["no problems"]),
        (
            "bad.jsonl",
            GOOD + '{"problem": "p", "answer": }\n',
            ["line 2", "column 28", "malformed", "fix"],
        ),
        ("cut.jsonl", GOOD + GOOD[:20], ["line 2", "malformed"]),
        ("bad.json", '[{"problem": "p",\n "answer" 1}]', ["line 2", "malformed"]),
        ("deep.jsonl", GOOD + "[" * 100_000, ["line 2", "fix"]),
        (
            "digits.jsonl",
            GOOD + '{"problem": "p", "answer": ' + "9" * 5000 + "}",
            ["line 2", "fix"],
        ),
        ("object.json", '{"problem": "p", "answer": "1"}', ["dict", "[ ]"]),
        ("deep_object.jsonl", GOOD + '{"a":' * 100_000, ["line 2", "fix"]),
        (
            "nested_answer.jsonl",
            GOOD + '{"problem": "p", "answer": ' + "[" * 900 + "1" + "]" * 900 + "}",
            ["line 2", "'answer'"],
        ),
        ("infinity.jsonl", GOOD + '{"problem": "p", "answer": 1e999}', ["line 2", "inf"]),
        (
            "large.jsonl",
            GOOD + '{"problem": "' + 20_000_000 * "a" + '", "answer": }',
            ["line 2", "column 20000027", "malformed"],
        ),
        (
            "keys.jsonl",
            GOOD + json.dumps({"k" * 1000 + str(i): 1 for i in range(1000)}),
            ["line 2", "'problem'", "..."],
        ),
        (
            "twice_a_key.jsonl",
            GOOD + '{"problem": "p", "answer": "1", "answer": "2"}',
            ["line 2", "'answer' twice"],
        ),
        ("utf16.jsonl", GOOD.encode("utf-16"), ["line 1", "UTF-8"]),
        ("utf16_without_mark.jsonl", GOOD.encode("utf-16-le"), ["line 1", "UTF-8"]),
        ("nul.jsonl", GOOD + '{"problem": "p\0", "answer": "1"}', ["line 2", "UTF-8"]),
        ("mark.jsonl", GOOD + "\ufeff" + GOOD, ["line 2", "column 1", "BOM"]),
        ("cr.jsonl", GOOD.replace("\n", "\r") * 2, ["line 1", "malformed"]),
        ("list.jsonl", GOOD + "[1, 2]\n", ["line 2", "list", "not an object"]),
        ("item.json", "[" + GOOD + ', "p"]', ["item 2", "str", "not an object"]),
        (
            "key.jsonl",
            GOOD + '{"question": "p", "answer": "1"}',
            ["line 2", "'problem'", "'question'", "problem_key"],
        ),
        (
            "answer.jsonl",
            GOOD + '{"problem": "p", "solution": "1"}',
            ["line 2", "'answer'", "'solution'", "answer_key"],
        ),
        (
            "type.jsonl",
            GOOD + '{"problem": ["p"], "answer": "1"}',
            ["line 2", "must be a string", "['p']"],
        ),
        ("nothing.jsonl", GOOD + '{"problem": " ", "answer": "1"}', ["line 2", "text in it"]),
        ("null.jsonl", GOOD + '{"problem": "p", "answer": null}', ["line 2", "'answer'", "None"]),
        ("dict.jsonl", GOOD + '{"problem": "p", "answer": {"a": 1}}', ["line 2", "'answer'"]),
        ("bool.jsonl", GOOD + '{"problem": "p", "answer": true}', ["line 2", "True"]),
        ("nan.jsonl", GOOD + '{"problem": "p", "answer": NaN}', ["line 2", "nan"]),
        ("no_answer.jsonl", GOOD + '{"problem": "p", "answer": []}', ["line 2", "not empty", "[]"]),
        (
            "blank_answer.jsonl",
            GOOD + '{"problem": "p", "answer": ["1", ""]}',
            ["line 2", "not empty"],
        ),
        ("nested.jsonl", GOOD + '{"problem": "p", "answer": [["1"]]}', ["line 2", "'answer'"]),
        (
            "latin.jsonl",
            GOOD.encode() + b'{"problem": "Gr\xf6\xdfe", "answer": "1"}\n',
            ["line 2", "UTF-8"],
        ),
        ("latin.json", b'[\n{"problem":\n "\xf6", "answer": "1"}]', ["line 3", "UTF-8"]),
        ("half.jsonl", GOOD + '{"problem": "\\ud800", "answer": "1"}', ["line 2", "escape"]),
        (
            "twice.jsonl",
            2 * '{"id": "a", "problem": "p", "answer": "1"}\n',
            ["line 2", "'a'", "line 1", "unique"],
        ),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        write(path, text)
    with pytest.raises(ValueError) as caught:
        data.load_problems(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) - len(str(path)) < 450
    for word in [str(path), *words]:
        assert word in message


def test_odd_files_that_are_right(tmp_path):
    """A byte order mark, Windows' line ends, a line of 20 MB, an answer of 4,000 digits, ids that look like paths: text, and nothing else."""
    rows = [
        {"id": "../../../etc/passwd", "problem": "a" * 20_000_000, "answer": int("9" * 4000)},
        {"id": "/a\0b", "problem": "p", "answer": 1},
        {"id": {"not": "text"}, "problem": "q", "answer": 2},
    ]
    path = write(
        tmp_path / "odd.jsonl", b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()
    )
    found = data.load_problems(path)
    assert [p["id"] for p in found] == ["../../../etc/passwd", "/a\0b", "odd/2"]
    assert [p["answer"] for p in found] == ["9" * 4000, "1", "2"] and len(
        found[0]["problem"]
    ) == 20_000_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_problems(tmp_path / "d.jsonl")


def test_parquet_is_read_like_the_rest(tmp_path):
    from pyarrow import Table, parquet

    rows = [
        {"problem": "1+1?", "answer": "2", "id": None},
        {"problem": "2+2?", "answer": "4", "id": "b"},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "set.parquet")
    assert data.load_problems(tmp_path / "set.parquet") == [
        {"id": "set/0", "problem": "1+1?", "answer": "2"},
        {"id": "b", "problem": "2+2?", "answer": "4"},
    ]
    parquet.write_table(
        Table.from_pylist([{"problem": "p", "answer": [1, 2]}, {"problem": "q", "answer": None}]),
        tmp_path / "bad.parquet",
    )
    with pytest.raises(
        ValueError, match="bad.parquet, row 1: 'answer' must be"
    ):  # in a file every row must be usable
        data.load_problems(tmp_path / "bad.parquet", say=lambda line: pytest.fail(line))
    with pytest.raises(
        ValueError, match=r"bad.parquet, row 0: no 'final' among its keys \['problem', 'answer'\]"
    ):
        data.load_problems(tmp_path / "bad.parquet", answer_key="final")


@pytest.mark.parametrize(
    "name, remote",
    [
        ("a/set", True),
        ("agentica-org/DeepScaleR-Preview-Dataset", True),
        ("a/b/main", True),
        ("a/set-v1.5", True),
        ("a/b_c.d-1.0/x", True),
        ("set", False),
        ("./a/set", False),
        ("../a/set", False),
        ("/a/set", False),
        ("~/set", False),
        ("a/b/c/d", False),
        ("a/set.csv", False),
        ("a/b/set.txt", False),
        ("a/", False),
        ("a//b", False),
        ("a/set.jsonl", False),
        ("here/set", False),
    ],
)
def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch, name, remote):
    asked = []
    monkeypatch.setattr(
        data.hub,
        "dataset_rows",
        lambda *given: asked.append(given) or [{"problem": "p", "answer": 1, "id": 5}],
    )
    monkeypatch.chdir(tmp_path)
    write(
        (tmp_path / "here").mkdir() or tmp_path / "here" / "set",
        "a file that exists is no data set of the hub",
    )
    if remote:
        assert data.load_problems(name, split="test") == [
            {"id": "5", "problem": "p", "answer": "1"}
        ] and asked == [(name, "test")]
    else:
        with pytest.raises(
            ValueError,
            match="set.jsonl: cannot be read"
            if "jsonl" in name
            else "not a .jsonl, .json or .parquet file",
        ):
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
    monkeypatch.setattr(data.hub, "dataset_rows", lambda name, split: rows)
    problems = data.load_problems("a/b", say=said.append)
    assert [p["id"] for p in problems] == ["x", "a/b/2", "a/b/4"] and [
        p["answer"] for p in problems
    ] == ["1", "2", "3"]
    assert said == [
        "skipped 3 of 6 rows of a/b (first: row 1: 'answer' must be a string, a number or a list of those, and not empty; "
        "it is None)"
    ]
    assert data.load_problems("a/b") == problems
    rows[:] = good
    assert len(data.load_problems("a/b", say=lambda line: pytest.fail(line))) == 3
    rows[:] = bad
    for keys, reason in (
        ({}, "row 0: 'answer' must be"),
        ({"answer_key": "final"}, "row 0: no 'final'"),
    ):
        with pytest.raises(
            ValueError,
            match=r"a/b: none of its 3 rows.*\['problem', 'answer'\].*--problem_key.*--answer_key.*"
            + reason,
        ):
            data.load_problems("a/b", **keys)
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
    assert train == [p for p in problems if p in train] and held == [
        p for p in problems if p in held
    ]  # the given order
    shuffled = rng.sample(problems, len(problems))
    assert {p["id"] for p in data.split_held_out(shuffled, n)[1]} == {p["id"] for p in held}


def test_held_out_is_the_same_everywhere():
    problems = [{"problem": f"{i}+1?"} for i in range(100)]
    assert [p["problem"] for p in data.split_held_out(problems, 3)[1]] == [
        "30+1?",
        "55+1?",
        "56+1?",
    ]  # sha256's
    assert data.split_held_out(problems, 0) == (problems, [])
    for n in (-1, 100, 101):
        with pytest.raises(ValueError, match=f"cannot hold {n} of 100"):
            data.split_held_out(problems, n)


# -- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A folder with every benchmark, and load_benchmark() expecting just that."""
    folder = benchmark_folder(tmp_path)
    if not os.environ.get("REMIX_DATA"):  # generated: of these contents
        monkeypatch.setattr(
            data,
            "SOURCES",
            {
                name: (
                    file,
                    data.content(data.load_problems(folder / "benchmarks" / f"{name}.jsonl")),
                )
                for name, (file, _) in data.SOURCES.items()
            },
        )
    return folder


def test_every_benchmark_has_its_size(benchmarks, monkeypatch):
    monkeypatch.setenv("REMIX_DATA", str(benchmarks))
    for name, count in data.BENCHMARKS.items():
        problems = data.load_benchmark(name)
        assert len(problems) == count == len({problem["id"] for problem in problems})
        assert all(set(problem) == {"id", "problem", "answer"} for problem in problems)
        assert (
            problems
            == data.load_benchmark(name, benchmarks)
            == data.load_benchmark(name, benchmarks / "benchmarks")
        )
    assert sum(data.BENCHMARKS.values()) == 1600


def test_one_changed_answer_is_noticed(benchmarks, tmp_path):
    """In any problem or answer, or in their order; white space does not count."""
    lines = (benchmarks / "benchmarks" / "aime24.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for changed in (
        [*rows[:29], rows[29] | {"answer": "7"}],
        [rows[0] | {"problem": rows[0]["problem"][1:]}, *rows[1:]],
        rows[::-1],
    ):
        write(tmp_path / "aime24.jsonl", "".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(ValueError, match="not those of aime24"):
            data.load_benchmark("aime24", tmp_path)
    spaced = [
        row
        | {
            "id": f"my/{i}",
            "problem": row["problem"].replace(" ", "  ") + "\n",
            "answer": [f" {row['answer']}"] if isinstance(row["answer"], str) else row["answer"],
        }
        for i, row in enumerate(rows)
    ]
    write(tmp_path / "aime24.jsonl", "".join(json.dumps(row) + "\n" for row in spaced))
    assert [p["id"] for p in data.load_benchmark("aime24", tmp_path)] == [
        f"my/{i}" for i in range(30)
    ]


def test_benchmark_mistakes(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="'aime25'.*aime24, amc, amc23, math500, minerva, olympiadbench"
    ):
        data.load_benchmark("aime25", tmp_path)
    with pytest.raises(ValueError, match="no aime24.jsonl.*--data_dir"):
        data.load_benchmark("aime24", tmp_path)
    write(
        tmp_path / "aime24.jsonl",
        "".join(json.dumps({"problem": "p", "answer": i}) + "\n" for i in range(29)),
    )
    with pytest.raises(ValueError, match="29 problems.* 30"):
        data.load_benchmark("aime24", tmp_path)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_templates_word_for_word():
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    assert data.render("1+1?", chat, "r1") == f"<|user|>1+1? {SUFFIX}<|assistant|>"
    assert data.render("1+1?", chat, "qwen-math") == (
        r"<|system|>Please reason step by step, and put your final answer within \boxed{}.<|user|>1+1?<|assistant|>"
    )
    for tokenizer in (chat, plain):
        assert data.render("1+1?", tokenizer, "plain") == f"1+1?\n{SUFFIX}\n"
        assert data.render("8+6+4=", tokenizer, "raw") == "8+6+4="
    assert set(data.STYLE_OF) == set(data.TEMPLATES)


@pytest.mark.parametrize("template", data.TEMPLATES)
def test_braces_and_jinja_in_a_problem_stay_as_they_are(template):
    problem = r"{{ 1 }} {% if x %} \frac{1}{2} {0} %s"
    assert problem in data.render(problem, make_tokenizer(CHAT), template)


def test_templates_that_do_not_fit():
    with pytest.raises(ValueError, match="--template plain"):
        data.render("p", make_tokenizer(), "r1")
    with pytest.raises(ValueError, match="'nope'.*r1, qwen-math, plain, raw"):
        data.render("p", make_tokenizer(), "nope")
    no_system = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHAT
    )
    with pytest.raises(ValueError, match="no system.*--template plain"):
        data.render("p", make_tokenizer(no_system), "qwen-math")


def test_a_template_may_be_a_file(tmp_path):
    chat, plain = make_tokenizer(CHAT), make_tokenizer()
    text = write(tmp_path / "mine.txt", "\ufeff{a} Q: {problem}\nAgain: {problem}\nA:\n")
    assert (
        data.render("{problem} 1+1?", plain, text)
        == data.render("{problem} 1+1?", chat, str(text))
        == ("{a} Q: {problem} 1+1?\nAgain: {problem} 1+1?\nA:\n")
    )
    messages = [
        {"role": "system", "content": "be {brief}"},
        {"role": "user", "content": "<{problem}>"},
    ]
    talk = write(tmp_path / "mine.json", json.dumps(messages))
    assert data.render("1+1?", chat, talk) == "<|system|>be {brief}<|user|><1+1?><|assistant|>"
    kept, _ = data.encode_prompts([{"problem": "1+1?"}], chat, str(talk), 99)
    assert chat.decode(kept[0]["prompt_ids"]) == data.render("1+1?", chat, talk)
    assert (
        data.encode("1", make_tokenizer("<bos>" + CHAT, bos=True), talk).count(0) == 1
    )  # the chat format's own
    assert (
        data.encode("1", make_tokenizer("<bos>" + CHAT, bos=True), text).count(0) == 1
    )  # the tokenizer's
    with pytest.raises(ValueError, match="--template plain"):
        data.render("p", plain, talk)
    styles = [data.template_style(template) for template in (*data.TEMPLATES, talk, str(text))]
    assert styles == ["think", "boxed", "boxed", "hash", "boxed", "boxed"]
    text.unlink()
    assert data.render("x", plain, text).startswith("{a} Q: x")  # read once


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("none.txt", None, ["none.txt", "choose one of r1, qwen-math, plain, raw", "or a file"]),
        ("no.txt", "Question: { problem }", ["no {problem}"]),
        ("no.json", '[{"role": "user", "content": "problem"}]', ["no {problem}"]),
        ("empty.json", "[]", ["no {problem}"]),
        ("bad.json", '[{"role": "user", "content": "{problem}"]', ["malformed"]),
        ("dict.json", '{"role": "user", "content": "{problem}"}', ["list of chat messages"]),
        ("keys.json", '[{"role": "user", "text": "{problem}"}]', ["list of chat messages"]),
        ("role.json", '[{"role": 1, "content": "{problem}"}]', ["list of chat messages"]),
        ("strings.json", '["{problem}"]', ["list of chat messages"]),
        ("latin.txt", b"\xf6 {problem}", ["UTF-8"]),
    ],
)
def test_a_bad_template_file_is_one_clear_line(tmp_path, name, text, words):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError) as caught:
        data.render("p", make_tokenizer(CHAT), str(tmp_path / name))
    assert "\n" not in str(caught.value) and all(
        word in str(caught.value) for word in [str(tmp_path / name), *words]
    )


def test_special_tokens_once():
    """A chat format writes its own; plain text gets the tokenizer's, so that Llama's bos is there once either way."""
    tokenizer = make_tokenizer("<bos>" + CHAT, bos=True)
    for template in data.TEMPLATES:
        ids = data.encode("1+1?", tokenizer, template)
        assert ids[0] == 0 and ids.count(0) == 1 and all(type(token) is int for token in ids)
    ids = data.encode("1+1?", tokenizer, "r1")
    assert tokenizer.decode(ids) == data.render("1+1?", tokenizer, "r1")
    assert (
        ids == data.encode_prompts([{"problem": "1+1?"}], tokenizer, "r1", 999)[0][0]["prompt_ids"]
    )


def test_default_template():
    chat, plain, think = (
        make_tokenizer(CHAT),
        make_tokenizer(),
        make_tokenizer(CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")),
    )
    assert data.default_template("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", chat) == "r1"
    assert (
        data.default_template("runs/7/model", think) == "r1"
    )  # an export of such a model: the name says nothing
    assert data.default_template("Qwen/Qwen2.5-Math-7B", chat) == "qwen-math"
    assert (
        data.default_template("Qwen/Qwen2.5-7B-Instruct", chat) == "qwen-math"
    )  # "think" would score it 0 for ever
    assert data.default_template("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", plain) == "plain"
    assert data.default_template(Path("gpt2"), plain) == "plain"


def test_long_prompts_are_counted_and_dropped():
    problems = [{"id": str(n), "problem": "1" * n, "answer": "1"} for n in (3, 11, 10, 12, 1)]
    kept, dropped = data.encode_prompts(problems, make_tokenizer(), "raw", 10)
    assert [problem["id"] for problem in kept] == ["3", "10", "1"] and dropped == 2
    assert [len(problem["prompt_ids"]) for problem in kept] == [3, 10, 1]
    assert all("prompt_ids" not in problem for problem in problems)
    with pytest.raises(ValueError, match="none of 5 prompts.*shortest: 9.*--max_prompt"):
        data.encode_prompts(
            [{**problem, "problem": "1" * 9} for problem in problems], make_tokenizer(), "raw", 8
        )


def test_what_cannot_fit_is_not_tokenised():
    """To tokenise 10 MB takes 19 s and 4 GB."""
    given = []

    def tokenizer(texts, **_):
        given.extend(texts)
        return {"input_ids": [[1] * len(text) for text in texts]}

    texts = ["a" * 20_000_000, "a", "a" * (8 * data.LONGEST_TOKEN + 1), "a" * 9, "a" * 8]
    kept, skipped = data.encode_prompts([{"problem": text} for text in texts], tokenizer, "raw", 8)
    assert (
        given == ["a", "a" * 9, "a" * 8]
        and [len(p["problem"]) for p in kept] == [1, 8]
        and skipped == 3
    )
    with pytest.raises(ValueError, match="none of 1 prompts"):
        data.encode_prompts([{"problem": texts[0]}], tokenizer, "raw", 8)


def test_load_tokenizer(tmp_path):
    make_tokenizer(CHAT).save_pretrained(tmp_path / "good")
    tokenizer = data.load_tokenizer(tmp_path / "good")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert data.encode("1+1?", tokenizer, "r1") == data.encode("1+1?", make_tokenizer(CHAT), "r1")
    make_tokenizer(eos=None).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="no_eos has no eos token"):
        data.load_tokenizer(tmp_path / "no_eos")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing") as caught:
        data.load_tokenizer(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


# -- the stream -------------------------------------------------------------------------------------------------------


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
    assert stream.take(a, n) + stream.take(a + n, m) == data.PromptStream(problems, seed).take(
        a, n + m
    )


def test_epochs_and_seeds_differ_and_processes_agree():
    problems = [{"id": i} for i in range(50)]
    orders = [
        [problem["id"] for _, problem in data.PromptStream(problems, seed).take(epoch * 50, 50)]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6 and list(range(50)) not in orders
    code = (
        "import data; stream = data.PromptStream([{'id': i} for i in range(50)], 1)\n"
        "print([problem['id'] for _, problem in stream.take(100, 50)])"
    )
    for hash_seed in "12":
        out = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(out) == orders[-1]
    with pytest.raises(ValueError):
        data.PromptStream([], 0)


def test_import_is_light():
    """The launcher reads problems before any rank starts: no torch, no vLLM, no transformers on import."""
    code = "import data, sys; print({'torch', 'vllm', 'transformers', 'datasets', 'huggingface_hub', 'pyarrow'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "set()\n"
    )

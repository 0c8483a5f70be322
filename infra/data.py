r"""Problems, the prompts made of them, and the order in which a run meets them.

A problem is {"id": str, "problem": str, "answer": str | list[str]}; any one of a list of answers is right. Files are
.jsonl (one object a line), .json (a list of objects) or .parquet; a name OWNER/NAME is a data set on the hub. Everything
wrong with a file is a ValueError of one line that says where it is and what to do about it.
"""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import hub

# The paper's five benchmarks and their sizes (arXiv 2507.06892). "amc" is the set behind its AMC'23 column, AMC 12 of
# 2022 and 2023 together; "amc23" is 2023 alone, which other papers call AMC'23.
BENCHMARKS = {
    "aime24": 30,
    "amc": 83,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 675,
}
# name: the file in the authors' repository, and what content() makes of its problems; amc23 is the end of amc
SOURCE = "AnitaLeungxx/ReMix-Off-Policy-RFT/1f5d21165995cba3f3dc05e29d7dce7b643dc121/deepscaler/data/test"
SOURCES = {
    "aime24": ("aime.json", "b5334984ccd54ba2"),
    "amc": ("amc.json", "675736b91bad988b"),
    "amc23": ("amc.json", "b436e5cd030bb40e"),
    "math500": ("math.json", "53a30bdcb8a6b9f9"),
    "minerva": ("minerva.json", "9d1c3e98af98ee19"),
    "olympiadbench": ("olympiad_bench.json", "55da9de899fab853"),
}

LONGEST_TOKEN = 256  # characters; Qwen's longest is a run of 128 spaces

HUB_NAME = re.compile(
    r"(?!.*\.[a-zA-Z]\w*$)\w[\w.-]*(/\w[\w.-]*){1,2}"
)  # OWNER/NAME[/CONFIG] that ends in no file's suffix

_STEPS = (
    r" Let's think step by step and output the final answer within \boxed{}."  # the paper's suffix
)
_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # Qwen2.5-Math's system prompt
# name: the chat messages, or the plain text, for a problem
TEMPLATES = {
    "r1": lambda problem: [{"role": "user", "content": problem + _STEPS}],  # the paper's
    "qwen-math": lambda problem: [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": problem},
    ],
    "plain": lambda problem: (
        problem + "\n" + _STEPS.strip() + "\n"
    ),  # for models without a chat format
    "raw": lambda problem: problem,  # the toy task
}
STYLE_OF = {
    "r1": "think",
    "qwen-math": "boxed",
    "plain": "boxed",
    "raw": "hash",
}  # template: how reward.py judges it


# -- problems ---------------------------------------------------------------------------------------------------------


def load_problems(
    path: str | os.PathLike,
    problem_key: str = "problem",
    answer_key: str = "answer",
    split: str = "train",
    say=lambda line: None,
) -> list[dict]:
    """The problems of a .jsonl, .json or .parquet file, or of the hub's data set OWNER/NAME or OWNER/NAME/CONFIG (hub.py), in
    its order. A missing id becomes FILE/ROW or OWNER/NAME/ROW, rows counted from 0; numbers become strings.

    Nobody can mend the hub's data sets, so their unusable rows are skipped: say(line) tells how many. A file must be whole.
    Raises ValueError (one line: the file, the line, item or row, what is wrong, what to do).
    """
    name, path = os.fspath(path), Path(path)
    remote = not path.exists() and HUB_NAME.fullmatch(name)
    if remote:
        rows = (
            (f"{name}, row {number}", row)
            for number, row in enumerate(hub.dataset_rows(name, split))
        )
    else:
        rows = _file_rows(path)

    problems, seen, skipped, where, item = [], {}, [], None, None  # seen: id -> where
    for row, (where, item) in enumerate(rows):
        try:
            problem = _problem(item, problem_key, answer_key)
        except ValueError as error:
            if not remote:
                raise ValueError(f"{where}: {error}") from None
            skipped.append(f"row {row}: {error}")
            continue
        identity = problem["id"] or f"{name if remote else path.stem}/{row}"
        if identity in seen and remote:
            identity = f"{name}/{row}"
        if identity in seen:
            raise ValueError(
                f"{where}: id {_short(identity)} is {seen[identity]}'s already; make ids unique"
            )
        seen[identity] = where.rpartition(", ")[2]
        problems.append(problem | {"id": identity})
    if not problems and skipped:
        raise ValueError(
            f"{name}: none of its {len(skipped)} rows has a usable {problem_key!r} and {answer_key!r}; its columns are "
            f"{_short(list(item), 300)}: name the right ones with --problem_key and --answer_key ({skipped[0]})"
        )
    if not problems:
        raise ValueError(
            f"{name}: holds no problems; expected objects with {problem_key!r} and {answer_key!r}"
        )
    if skipped:
        say(
            f"skipped {len(skipped)} of {len(skipped) + len(problems)} rows of {name} (first: {skipped[0]})"
        )
    return problems


def _file_rows(path: Path):
    """(where, row) for the rows of a file. Raises ValueError."""
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(
            f"{path}: not a .jsonl, .json or .parquet file; write one JSON object a line into a .jsonl file, or name a "
            "data set on the hub as OWNER/NAME"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
        except Exception as error:  # pyarrow raises half a dozen kinds here
            raise ValueError(
                f"{path}: no readable parquet file ({hub.one_line(error)}); get it again"
            ) from None
        return ((f"{path}, row {number}", row) for number, row in enumerate(rows))
    try:
        if (nul := raw.find(b"\0")) >= 0:  # UTF-16 without its mark decodes
            raise UnicodeDecodeError("utf-8", b"", nul, nul, "NUL")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8"
        ) from None
    if path.suffix == ".jsonl":  # split, not splitlines: U+2028 may stand inside a string
        lines = (
            (f"{path}, line {number}", line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
        return ((where, _parse(line, where)) for where, line in lines)
    items = _parse(text, str(path)) if text.strip() else []
    if not isinstance(items, list):
        raise ValueError(
            f"{path}: holds one {type(items).__name__}, not a list of objects; put it into [ ]"
        )
    return ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))


def _problem(item, problem_key: str, answer_key: str) -> dict:
    """The problem in a row, its id "" where the row has none. Raises ValueError: what is wrong with the row."""
    if not isinstance(item, dict):
        raise ValueError(
            f"a {type(item).__name__}, not an object with {problem_key!r} and {answer_key!r}"
        )
    for key, option in ((problem_key, "problem_key"), (answer_key, "answer_key")):
        if key not in item:
            raise ValueError(
                f"no {key!r} among its keys {_short(list(item), 300)}; add it or name the right {option}"
            )
    problem, answer, identity = item[problem_key], item[answer_key], item.get("id")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"{problem_key!r} must be a string with text in it, not {_short(problem)}")
    answers = [_answer(one) for one in (answer if isinstance(answer, list) else [answer])]
    if not answers or None in answers:
        raise ValueError(
            f"{answer_key!r} must be a string, a number or a list of those, and not empty; it is {_short(answer)}"
        )
    identity = str(identity) if isinstance(identity, (str, int, float)) else ""
    try:
        "".join([problem, identity, *answers]).encode()
    except UnicodeEncodeError:
        raise ValueError(
            "a \\ud800 escape without its pair; no tokenizer takes it, remove it"
        ) from None
    return {
        "id": identity,
        "problem": problem,
        "answer": answers if isinstance(answer, list) else answers[0],
    }


def split_held_out(problems: list[dict], n: int) -> tuple[list[dict], list[dict]]:
    """(train, held_out), both in the given order. Which n are held out depends on the problems' texts alone, not on their order;
    problems of one text stay together, so that there are fewer than n where copies do not fit. Raises ValueError."""
    copies = Counter(problem["problem"] for problem in problems)
    held, count = set(), 0
    for text in sorted(copies, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if count + copies[text] <= n:
            held.add(text)
            count += copies[text]
    if n < 0 or count == len(problems) or n > 0 and not count:
        raise ValueError(
            f"cannot hold {n} of {len(problems)} problems out: at least one must be held out and one remain for training"
        )
    return [p for p in problems if p["problem"] not in held], [
        p for p in problems if p["problem"] in held
    ]


def _parse(text: str, where: str):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = (
            f"column {error.colno}"
            if "line" in where.rpartition(", ")[2]
            else f"line {error.lineno}"
        )
        raise ValueError(
            f"{where}: malformed JSON at {at} ({error.msg}); fix or remove it"
        ) from None
    except KeyError as error:
        raise ValueError(
            f"{where}: an object has the key {_short(error.args[0])} twice; fix or remove it"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"{where}: JSON that cannot be read; fix or remove it") from None


def _object(pairs: list[tuple]) -> dict:
    """A JSON object. Of two values under one key Python would take the second. Raises KeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise KeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _answer(value) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    number = isinstance(value, int) or isinstance(value, float) and math.isfinite(value)
    number = number and not isinstance(value, bool)
    return str(value) if number else None


def _short(value, most=60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def load_benchmark(name: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """The problems of one of BENCHMARKS: from NAME.jsonl in data_dir or its benchmarks/ (default: $REMIX_DATA), else from SOURCE,
    downloaded once by one process of the machine.

    Raises ValueError for an unknown name, a missing file, and one that does not hold exactly the benchmark's problems and answers:
    scores under its name would not compare.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    folder, n, (file, digest) = (
        data_dir or os.environ.get("REMIX_DATA"),
        BENCHMARKS[name],
        SOURCES[name],
    )
    if folder:
        paths = [Path(folder) / f"{name}.jsonl", Path(folder) / "benchmarks" / f"{name}.jsonl"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"no {name}.jsonl in {folder} or its benchmarks folder: pass the --data_dir that has it, or none to download it"
            )
        problems = load_problems(path)
    else:
        path = hub.public_file(f"{SOURCE}/{file}")
        problems = load_problems(path)[-n if name == "amc23" else 0 :]
        for row, problem in enumerate(problems):
            problem["id"] = f"{name}/{row}"
    if len(problems) != n:
        raise ValueError(
            f"{path}: {len(problems)} problems, but {name} has {n}; get the whole file, or scores would not compare"
        )
    if content(problems) != digest:
        raise ValueError(
            f"{path}: its problems or answers are not those of {name} (checksum {content(problems)}, not {digest}): get it again, "
            "or evaluate on it under its own name, as a file"
        )
    return problems


def content(problems: list[dict]) -> str:
    """A checksum of problems and answers, in their order, white space apart."""
    rows = [
        [
            "".join(text.split())
            for text in (
                p["problem"],
                *([p["answer"]] if isinstance(p["answer"], str) else p["answer"]),
            )
        ]
        for p in problems
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# -- prompts ----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: str | os.PathLike):
    """The tokenizer of a model folder, or of a model by name. Padding defaults to eos. Raises ValueError."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if os.path.isdir(folder) and not any((Path(folder) / name).exists() for name in files):
        raise ValueError(
            f"no tokenizer in {folder}: it needs one of {', '.join(files)}"
        )  # transformers would invent an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises half a dozen kinds here
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no tokenizer could be loaded from {folder}: {first}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no eos token: responses could not end; set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_template(model_name_or_path: str, tokenizer) -> str:
    """The template for a model: "plain" where the tokenizer has no chat format, "r1" for the R1 distillations and for
    every chat format that opens <think> in the prompt (exports included, whatever their folder is called), else
    "qwen-math", which asks of a chat model no more than a box."""
    if not tokenizer.chat_template:
        return "plain"
    name = str(model_name_or_path).lower()
    r1 = "r1" in name and "distill" in name
    return "r1" if r1 or render("1", tokenizer, "r1").rstrip().endswith("<think>") else "qwen-math"


def template_style(template: str) -> str:
    """How reward.py judges responses under a template: STYLE_OF, "boxed" for a file. Raises ValueError for what is no template."""
    _template(template)
    return STYLE_OF.get(template, "boxed")


@lru_cache  # a file is read once, not once a problem
def _template(template: str):
    """TEMPLATES[template], or the same made of a file: a .json list of chat messages, else text as it stands. Raises ValueError."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if not os.path.isfile(template):
        raise ValueError(
            f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}, or a file"
        )
    try:
        text = Path(template).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {template}: no readable UTF-8 text ({error})") from None
    chat = Path(template).suffix == ".json"
    messages = _parse(text, f"template {template}") if chat else [{"role": "", "content": text}]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict)
        and m.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in m.values())
        for m in messages
    ):
        raise ValueError(
            f'template {template}: must be a list of chat messages {{"role": "...", "content": "..."}}'
        )
    if not any("{problem}" in m["content"] for m in messages):
        raise ValueError(
            f"template {template}: holds no {{problem}}; write it where the problem shall stand"
        )

    def fill(problem):
        return [m | {"content": m["content"].replace("{problem}", problem)} for m in messages]

    return fill if chat else lambda problem: fill(problem)[0]["content"]


def render(problem_text: str, tokenizer, template: str) -> str:
    """The prompt as text; a template is a name in TEMPLATES or a file with {problem} in it: text, or .json for a list of chat
    messages. Raises ValueError for an unknown template, a bad file, or one the tokenizer's chat format refuses."""
    prompt = _template(template)(problem_text)
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(
            f"template {template!r} needs a chat template, which this tokenizer lacks: choose --template "
            "plain"
        )
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja: some chat formats refuse a system message
        raise ValueError(
            f"this tokenizer's chat template refuses template {template!r} ({error}): choose --template "
            "plain"
        ) from error


def encode(problem_text: str, tokenizer, template: str) -> list[int]:
    """The prompt as token ids. Raises what render does."""
    return encode_prompts([{"problem": problem_text}], tokenizer, template, math.inf)[0][0][
        "prompt_ids"
    ]


def encode_prompts(
    problems: list[dict], tokenizer, template: str, max_prompt: int
) -> tuple[list[dict], int]:
    """The problems whose prompt has at most max_prompt tokens, each with its "prompt_ids" (list of int), and the number
    of the others. The dicts given are not changed. Raises ValueError if none remain, and what render does."""
    texts = [render(problem["problem"], tokenizer, template) for problem in problems]
    short = [
        i for i, text in enumerate(texts) if len(text) <= LONGEST_TOKEN * max_prompt
    ]  # to tokenise 10 MB takes 19 s and 4 GB
    chat = isinstance(
        _template(template)(""), list
    )  # chat formats write the special tokens themselves
    ids = (
        tokenizer([texts[i] for i in short], add_special_tokens=not chat, verbose=False)[
            "input_ids"
        ]
        if short
        else []
    )
    kept = [
        {**problems[i], "prompt_ids": list(row)}
        for i, row in zip(short, ids)
        if 0 < len(row) <= max_prompt
    ]
    if not kept:
        raise ValueError(
            f"none of {len(problems)} prompts has 1 to {max_prompt} tokens (the shortest: "
            f"{min(map(len, ids), default=0)}): raise --max_prompt or check --data"
        )
    return kept, len(problems) - len(kept)


class PromptStream:
    """An endless stream of problems, epoch after epoch, each in an order of its own.

    It has no state: position i lies in epoch i // n, whose order comes from (seed, epoch) alone. So a run resumes with
    nothing but a position, and every rank sees the same stream.
    """

    def __init__(self, problems: list[dict], seed: int):
        if not problems:
            raise ValueError("a prompt stream needs at least one problem")
        self.problems, self.seed = problems, seed
        self._order = (
            -1,
            [],
        )  # the latest epoch and its order, kept because neighbours ask for the same one

    def take(self, start: int, count: int) -> list[tuple[int, dict]]:
        """(position, problem) for the positions start to start + count - 1."""
        taken = []
        for position in range(start, start + count):
            epoch, row = divmod(position, len(self.problems))
            if self._order[0] != epoch:
                order = list(range(len(self.problems)))
                random.Random(f"{self.seed}/{epoch}").shuffle(
                    order
                )  # a str seed: the same on every machine
                self._order = (epoch, order)
            taken.append((position, self.problems[self._order[1][row]]))
        return taken

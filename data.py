r"""Problems, the prompts made of them, and the order in which a run meets them.

A problem is {"id": str, "problem": str, "answer": str | list[str]}; any one of a list of answers is right. Files are
.jsonl (one object a line) or .json (a list of objects). Everything wrong with a file is a ValueError of one line that
says where it is and what to do about it.
"""

import json
import math
import os
import random
from pathlib import Path

# The paper's five benchmarks and their sizes (arXiv 2507.06892). "amc" is the set behind its AMC'23 column, AMC 12 of
# 2022 and 2023 together; "amc23" is 2023 alone, which other papers call AMC'23.
BENCHMARKS = {"aime24": 30, "amc": 83, "amc23": 40, "math500": 500, "minerva": 272, "olympiadbench": 675}

_STEPS = r" Let's think step by step and output the final answer within \boxed{}."  # the paper's suffix
_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # Qwen2.5-Math's system prompt
# name: the chat messages, or the plain text, for a problem
TEMPLATES = {
    "r1": lambda problem: [{"role": "user", "content": problem + _STEPS}],  # the paper's
    "qwen-math": lambda problem: [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": problem}],
    "plain": lambda problem: problem + "\n" + _STEPS.strip() + "\n",  # for models without a chat format
    "raw": lambda problem: problem,  # the toy task
}
STYLE_OF = {"r1": "think", "qwen-math": "boxed", "plain": "boxed", "raw": "hash"}  # template: how reward.py judges it


# -- problems ---------------------------------------------------------------------------------------------------------

def load_problems(path: str | os.PathLike, problem_key: str = "problem", answer_key: str = "answer") -> list[dict]:
    """The problems of a .jsonl or .json file, in its order. A missing id becomes FILE/ROW, numbers become strings.

    Raises ValueError (one line: the file, the line or item, what is wrong, what to do).
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: not a .jsonl or .json file; write one JSON object a line into a .jsonl file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8") from None

    rows = []  # (where, object)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
            if line.strip():
                where = f"{path}, line {number}"
                rows.append((where, _parse(line, where)))
    elif text.strip():
        items = _parse(text, str(path))
        if not isinstance(items, list):
            raise ValueError(f"{path}: holds one {type(items).__name__}, not a list of objects; put it into [ ]")
        rows = [(f"{path}, item {number}", item) for number, item in enumerate(items, 1)]
    if not rows:
        raise ValueError(f"{path}: holds no problems; expected objects with {problem_key!r} and {answer_key!r}")

    problems, seen = [], {}  # seen: id -> where
    for row, (where, item) in enumerate(rows):
        if not isinstance(item, dict):
            raise ValueError(f"{where}: a {type(item).__name__}, not an object with {problem_key!r} and {answer_key!r}")
        for key, option in ((problem_key, "problem_key"), (answer_key, "answer_key")):
            if key not in item:
                raise ValueError(f"{where}: no {key!r} among its keys {list(item)}; add it or name the right {option}")
        problem, answer = item[problem_key], item[answer_key]
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{where}: {problem_key!r} must be a string with text in it, not {_short(problem)}")
        answers = [_answer(one) for one in (answer if isinstance(answer, list) else [answer])]
        if not answers or None in answers:
            raise ValueError(f"{where}: {answer_key!r} must be a string, a number or a list of those, and not empty; "
                             f"it is {_short(answer)}")
        identity = str(item.get("id", f"{path.stem}/{row}"))
        try:
            "".join([problem, identity, *answers]).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: a \\ud800 escape without its pair; no tokenizer takes it, remove it") from None
        if identity in seen:
            raise ValueError(f"{where}: id {_short(identity)} is {seen[identity]}'s already; make ids unique")
        seen[identity] = where.rpartition(", ")[2]
        problems.append({"id": identity, "problem": problem,
                         "answer": answers if isinstance(answer, list) else answers[0]})
    return problems


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if "line" in where.rpartition(", ")[2] else f"line {error.lineno}"
        raise ValueError(f"{where}: malformed JSON at {at} ({error.msg}); fix or remove it") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"{where}: JSON that cannot be read; fix or remove it") from None


def _answer(value) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else None


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load_benchmark(name: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """The problems of one of BENCHMARKS, from NAME.jsonl in data_dir or its benchmarks/ (default: $REMIX_DATA).

    Raises ValueError for an unknown name, a missing folder or file, and a file of any other length than the benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    folder = data_dir or os.environ.get("REMIX_DATA")
    if not folder:
        raise ValueError(f"no folder to read benchmark {name} from: pass --data_dir (or set REMIX_DATA)")
    paths = [Path(folder) / f"{name}.jsonl", Path(folder) / "benchmarks" / f"{name}.jsonl"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"no {name}.jsonl in {folder} or its benchmarks folder: pass the --data_dir that has it")
    problems = load_problems(path)
    if len(problems) != BENCHMARKS[name]:
        raise ValueError(f"{path}: {len(problems)} problems, but {name} has {BENCHMARKS[name]}; get the whole file, or "
                         "scores would not compare")
    return problems


# -- prompts ----------------------------------------------------------------------------------------------------------

def load_tokenizer(folder: str | os.PathLike):
    """The tokenizer of a model folder, or of a model by name. Padding defaults to eos. Raises ValueError."""
    from transformers import AutoTokenizer
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if os.path.isdir(folder) and not any((Path(folder) / name).exists() for name in files):
        raise ValueError(f"no tokenizer in {folder}: it needs one of {', '.join(files)}")  # transformers would invent an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises half a dozen kinds here
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no tokenizer could be loaded from {folder}: {first}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos token: responses could not end; set eos_token in its "
                         "tokenizer_config.json")
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


def render(problem_text: str, tokenizer, template: str) -> str:
    """The prompt as text. Raises ValueError for an unknown template, or one the tokenizer's chat format refuses."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    prompt = TEMPLATES[template](problem_text)
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(f"template {template!r} needs a chat template, which this tokenizer lacks: choose --template "
                         "plain")
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja: some chat formats refuse a system message
        raise ValueError(f"this tokenizer's chat template refuses template {template!r} ({error}): choose --template "
                         "plain") from error


def encode(problem_text: str, tokenizer, template: str) -> list[int]:
    """The prompt as token ids. Raises what render does."""
    return encode_prompts([{"problem": problem_text}], tokenizer, template, math.inf)[0][0]["prompt_ids"]


def encode_prompts(problems: list[dict], tokenizer, template: str, max_prompt: int) -> tuple[list[dict], int]:
    """The problems whose prompt has at most max_prompt tokens, each with its "prompt_ids" (list of int), and the number
    of the others. The dicts given are not changed. Raises ValueError if none remain, and what render does."""
    texts = [render(problem["problem"], tokenizer, template) for problem in problems]
    chat = isinstance(TEMPLATES[template](""), list)  # chat formats write the special tokens themselves
    ids = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"] if texts else []
    kept = [{**problem, "prompt_ids": list(row)} for problem, row in zip(problems, ids) if 0 < len(row) <= max_prompt]
    if not kept:
        raise ValueError(f"none of {len(problems)} prompts has 1 to {max_prompt} tokens (the shortest: "
                         f"{min(map(len, ids), default=0)}): raise --max_prompt or check --data")
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
        self._order = (-1, [])  # the latest epoch and its order, kept because neighbours ask for the same one

    def take(self, start: int, count: int) -> list[tuple[int, dict]]:
        """(position, problem) for the positions start to start + count - 1."""
        taken = []
        for position in range(start, start + count):
            epoch, row = divmod(position, len(self.problems))
            if self._order[0] != epoch:
                order = list(range(len(self.problems)))
                random.Random(f"{self.seed}/{epoch}").shuffle(order)  # a str seed: the same on every machine
                self._order = (epoch, order)
            taken.append((position, self.problems[self._order[1][row]]))
        return taken

r"""Problems, benchmarks, prompts and models: read, checked, and fetched by name.

    python -m infra.data --model Qwen2.5-Math-7B                         # fetches into HF_HOME
    python -m infra.data --data agentica-org/DeepScaleR-Preview-Dataset
    python -m infra.data --benchmarks

A problem is {"id": str, "problem": str, "answer": str | list[str]}; any one of a list is right.
What lies whole in HF_HOME is taken from there without asking the hub, so that a run does not change
when the hub does; nothing fetched is executed. All bad input is a ValueError of one line.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
import urllib.request
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from infra import toy
from infra.config import Parser, check_vllm, exit_bad_input
from infra.ranks import check_gpus

# fmt: off
# The paper's benchmarks and their sizes (arXiv 2507.06892). "amc" is the set behind its AMC'23
# column, AMC 12 of 2022 and 2023 together; "amc23", its end, is 2023 alone: others' AMC'23.
BENCHMARKS = {"aime24": 30, "amc": 83, "amc23": 40, "math500": 500, "minerva": 272,
              "olympiadbench": 675}
# name: the file in the authors' repository, and content() of its problems
SOURCES = {
    "aime24": ("aime.json", "b5334984ccd54ba2"), "math500": ("math.json", "53a30bdcb8a6b9f9"),
    "amc": ("amc.json", "675736b91bad988b"), "minerva": ("minerva.json", "9d1c3e98af98ee19"),
    "amc23": ("amc.json", "b436e5cd030bb40e"),
    "olympiadbench": ("olympiad_bench.json", "55da9de899fab853"),
}
COMMIT = "1f5d21165995cba3f3dc05e29d7dce7b643dc121"
SOURCE = f"AnitaLeungxx/ReMix-Off-Policy-RFT/{COMMIT}/deepscaler/data/test"
# OWNER/NAME[/CONFIG] of a data set, which ends in no file's suffix
HUB_NAME = re.compile(r"(?!.*\.[a-zA-Z]\w*$)\w[\w.-]*(/\w[\w.-]*){1,2}")
# how a bare model name begins: its owner
OWNERS = {"Qwen": "Qwen", "DeepSeek-": "deepseek-ai", "Llama-": "meta-llama",
          "Meta-Llama-": "meta-llama"}
# a decoder in `model`, its layers in `model.layers`, a head in `lm_head`
MODEL_TYPES = ("qwen2", "qwen3", "llama")
MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
TIMEOUT = 10  # seconds until a server counts as unreachable
LONGEST_TOKEN = 256  # characters; Qwen's longest is a run of 128 spaces
# fmt: on


# -- problems -------------------------------------------------------------------------------------


def load_problems(
    path, problem_key="problem", answer_key="answer", split="train", say=lambda line: None
) -> list[dict]:
    """The problems of a .jsonl (an object a line), .json (a list) or .parquet file, or of the hub's
    data set OWNER/NAME[/CONFIG], in order. A missing id becomes FILE/ROW or OWNER/NAME/ROW, from 0.

    Nobody can mend the hub's data sets: their unusable rows are skipped, and say(line) counts them.
    A file must be whole. Raises ValueError.
    """
    name, problems, seen, skipped = os.fspath(path), [], {}, []  # seen: id -> where
    hub = not os.path.exists(name) and HUB_NAME.fullmatch(name)
    rows = _numbered("row", hub_rows(name, split), 0) if hub else _file_rows(Path(name))
    for row, (where, item) in enumerate(rows):
        try:
            problem = _problem(item, problem_key, answer_key)
            if not problem["id"] or hub and problem["id"] in seen:
                problem["id"] = f"{name if hub else Path(name).stem}/{row}"
            first = seen.setdefault(problem["id"], where)
            if first != where:
                raise ValueError(f"id {problem['id']!r:.60} is {first}'s: make ids unique")
            problems.append(problem)
        except ValueError as error:
            if not hub:
                raise ValueError(f"{name}, {where}: {error}") from None
            skipped.append(f"{where}: {error}")
    first = f" (first: {skipped[0]})" if skipped else ""
    if not problems:
        keys = f"--problem_key {problem_key!r} and --answer_key {answer_key!r}"
        raise ValueError(f"{name}: holds no problems with {keys}{first}")
    if skipped:
        say(f"skipped {len(skipped)} of {len(skipped) + len(problems)} rows of {name}{first}")
    return problems


def _numbered(kind, items, start):
    return ((f"{kind} {number}", item) for number, item in enumerate(items, start))


def _file_rows(path):
    """("line 1", row), … of a file. JSON is read by hand: Arrow's columns hold one type, answers
    here are 2, "2" and ["2", "two"] in one file; and the datasets library tells no line."""
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path}: not a .jsonl, .json or .parquet file, nor OWNER/NAME of the hub")
    try:
        path.open("rb").close()
        if path.suffix == ".parquet":
            rows = _load_dataset(path, "parquet", data_files=str(path), split="train")
            return _numbered("row", rows, 0)
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; convert the file to it") from None
    if path.suffix == ".jsonl":
        # split, not splitlines: U+2028 may stand inside a string
        lines = _numbered("line", text.split("\n"), 1)
        return ((where, _parse(line, f"{path}, {where}")) for where, line in lines if line.strip())
    items = _parse(text, path) if text.strip() else []
    if not isinstance(items, list):
        raise ValueError(f"{path}: holds no list of objects: put it into [ ]")
    return _numbered("item", items, 1)


def _parse(text, where):
    """JSON. Raises ValueError, also for two equal keys, of which Python would take the second."""

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"an object has the key {twice!r:.60} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also thousands of digits, or of brackets
        why = _one_line(error).replace("line 1 column", "column")
        raise ValueError(f"{where}: malformed JSON ({why}); fix or remove it") from None


def _problem(item, problem_key, answer_key):
    """The problem in a row, its id "" where the row has none. Raises ValueError."""
    if not isinstance(item, dict):
        raise ValueError(f"a {type(item).__name__}, not an object with a problem and its answer")
    for key, flag in ((problem_key, "--problem_key"), (answer_key, "--answer_key")):
        if key not in item:
            raise ValueError(
                f"no {key!r} among its keys {list(item)!r:.300}: name the right {flag}"
            )
    problem, answer, identity = item[problem_key], item[answer_key], item.get("id")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"{problem_key!r} must be a string with text in it, not {problem!r:.60}")
    answers = answer if isinstance(answer, list) else [answer]
    for one in answers or [None]:
        number = type(one) is int or type(one) is float and math.isfinite(one)
        if not number and not (isinstance(one, str) and one.strip()):
            kinds = "string, a number or a list of those, and not empty"
            raise ValueError(f"{answer_key!r} must be a {kinds}; it is {answer!r:.60}")
    answers = [str(one) for one in answers]
    identity = str(identity) if isinstance(identity, (str, int, float)) else ""
    if re.search("[\ud800-\udfff]", "".join([problem, identity, *answers])):
        raise ValueError("a \\ud800 escape without its pair; no tokenizer takes it, remove it")
    answer = answers if isinstance(answer, list) else answers[0]
    return {"id": identity, "problem": problem, "answer": answer}


def _one_line(error):
    return " ".join((str(error) or type(error).__name__).split())[:200]


def split_held_out(problems: list[dict], n: int) -> tuple[list[dict], list[dict]]:
    """(train, held_out), both in the given order. Which n are held out depends on the problems'
    texts alone, not on their order; problems of one text stay together, so that there are fewer
    than n where copies do not fit. Raises ValueError."""
    copies = Counter(problem["problem"] for problem in problems)
    held, count = set(), 0
    for text in sorted(copies, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if count + copies[text] <= n:
            held.add(text)
            count += copies[text]
    if n < 0 or count == len(problems) or n > 0 and not count:
        raise ValueError(f"cannot hold {n} of {len(problems)} problems out: leave some to each")
    train = [p for p in problems if p["problem"] not in held]
    return train, [p for p in problems if p["problem"] in held]


# -- benchmarks -----------------------------------------------------------------------------------


def load_eval_data(name: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """Problems of a benchmark, of the toy's test split ("toy"), of a file, or of the hub's
    OWNER/NAME. Raises ValueError."""
    if name == "toy":
        return toy.problems("test")
    if "/" in name or Path(name).suffix:
        return load_problems(name)
    return load_benchmark(name, data_dir)


def load_benchmark(name: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """The problems of one of BENCHMARKS: from NAME.jsonl in data_dir or its benchmarks/ (default:
    $REMIX_DATA), else downloaded from SOURCE. Raises ValueError, also for a file with other
    problems or answers: scores under its name would not compare."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    n, (file, checksum) = BENCHMARKS[name], SOURCES[name]
    if folder := data_dir or os.environ.get("REMIX_DATA"):
        path = Path(folder, f"{name}.jsonl")
        if not path.is_file():
            path = Path(folder, "benchmarks", f"{name}.jsonl")
        if not path.is_file():
            raise ValueError(f"no {name}.jsonl in {folder}: pass another --data_dir, or none")
        problems = load_problems(path)
    else:
        path = _public_file(f"{SOURCE}/{file}")
        problems = load_problems(path)[-n if name == "amc23" else 0 :]
        for row, problem in enumerate(problems):
            problem["id"] = f"{name}/{row}"
    if content(problems) != checksum:
        other = f"its {len(problems)} problems or answers are not those of {name}, which has {n}"
        raise ValueError(f"{path}: {other}: get it again, or name it as a file")
    return problems


def content(problems: list[dict]) -> str:
    """A checksum of problems and answers, in their order, white space apart."""
    rows = []
    for p in problems:
        answers = [p["answer"]] if isinstance(p["answer"], str) else p["answer"]
        rows.append(["".join(text.split()) for text in (p["problem"], *answers)])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _public_file(name):
    """The file OWNER/REPOSITORY/COMMIT/PATH of GitHub in HF_HOME, downloaded by one process of the
    machine if need be ($REMIX_MIRROR: from another server with the same paths)."""
    from filelock import FileLock
    from huggingface_hub import constants

    path = Path(constants.HF_HOME, "remix", name)
    server = os.environ.get("REMIX_MIRROR", "https://raw.githubusercontent.com")
    if path.exists():  # perhaps in a HF_HOME that can only be read
        return path
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():  # another process may have fetched it meanwhile
                with urllib.request.urlopen(f"{server}/{name}", timeout=TIMEOUT) as answer:
                    Path(f"{path}.tmp").write_bytes(answer.read())
                Path(f"{path}.tmp").rename(path)
    except Exception as error:  # OSError, HTTPException
        raise ValueError(
            f"{path.name} is not in HF_HOME, nor to be had from {server} ({_one_line(error)}): run "
            "`python -m infra.data --benchmarks` with internet access, or pass --data_dir"
        ) from None
    return path


# -- prompts --------------------------------------------------------------------------------------


_STEPS = r"Let's think step by step and output the final answer within \boxed{}."
_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
# name: chat messages, or plain text, with {problem} in them; r1 is the paper's, raw the toy's
TEMPLATES = {
    "r1": [{"role": "user", "content": "{problem} " + _STEPS}],
    "qwen-math": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "{problem}"}],
    "plain": "{problem}\n" + _STEPS + "\n",
    "raw": "{problem}",
}
# template: how reward.py judges it
STYLE_OF = {"r1": "think", "qwen-math": "boxed", "plain": "boxed", "raw": "hash"}


def load_tokenizer(folder: str | os.PathLike):
    """The tokenizer of a model's folder. Padding defaults to eos. Raises ValueError."""
    from transformers import AutoTokenizer

    # without any of these transformers would invent an empty one
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any(Path(folder, name).exists() for name in files):
        raise ValueError(f"no tokenizer in {folder}: it needs one of {', '.join(files)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises half a dozen kinds here
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: set eos_token in tokenizer_config.json: responses must end")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def default_template(model_name_or_path: str, tokenizer) -> str:
    """ "plain" where the tokenizer has no chat format, "r1" for the R1 distillations and chat
    formats that open <think> (an export, whatever its folder is called), else "qwen-math"."""
    if not tokenizer.chat_template:
        return "plain"
    name = str(model_name_or_path).lower()
    thinks = render("1", tokenizer, "r1").rstrip().endswith("<think>")
    return "r1" if thinks or "r1" in name and "distill" in name else "qwen-math"


def template_style(template: str) -> str:
    """How reward.py judges under a template: STYLE_OF, "boxed" for a file. Raises ValueError."""
    _template(template)
    return STYLE_OF.get(template, "boxed")


@lru_cache  # a file is read once, not once a problem
def _template(template):
    """TEMPLATES[template], or the same made of a file. Raises ValueError."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    try:
        text = Path(template).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = f"choose one of {', '.join(TEMPLATES)}, or a file of UTF-8 text"
        raise ValueError(f"unknown template '{template}': {names} ({error})") from None
    found = _parse(text, f"template {template}") if Path(template).suffix == ".json" else text
    messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
    try:
        fits = [str.count(m["content"], "{problem}") for m in messages if str.strip(m["role"])]
    except (TypeError, KeyError):
        fits = []
    if not any(fits):
        form = 'text, or .json: a list of chat messages {"role": "...", "content": "..."}'
        raise ValueError(f"template {template}: must be {form}, with {{problem}} in it")
    return found


def render(problem_text: str, tokenizer, template: str) -> str:
    """The prompt as text; template: a name in TEMPLATES, or a file with {problem} in it: text, or
    .json for a list of chat messages. Raises ValueError, also where the chat format refuses it."""
    prompt = _template(template)
    if isinstance(prompt, str):
        return prompt.replace("{problem}", problem_text)
    filled = [m | {"content": m["content"].replace("{problem}", problem_text)} for m in prompt]
    try:
        return tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja: no chat format, or one that refuses a system message
        refused = f"this tokenizer refuses template {template!r} ({_one_line(error)})"
        raise ValueError(f"{refused}: choose --template plain") from error


def encode(problems, folder, tokenizer, template, max_prompt, say, of="") -> tuple[list[dict], int]:
    """(problems whose prompt has 1 to max_prompt tokens, copied, with "prompt_ids" (list of int);
    number of the others, which is said). folder: of the model; of: which problems, for what is
    said. Raises ValueError, also if none remain or the model lacks a token."""
    texts = [render(problem["problem"], tokenizer, template) for problem in problems]
    # to tokenise 10 MB takes 19 s and 4 GB
    short = [i for i, text in enumerate(texts) if len(text) <= LONGEST_TOKEN * max_prompt]
    # chat formats write the special tokens themselves
    how = dict(add_special_tokens=isinstance(_template(template), str), verbose=False)
    ids = tokenizer([texts[i] for i in short], **how)["input_ids"] if short else []
    kept = []
    for i, row in zip(short, ids):
        if 0 < len(row) <= max_prompt:
            kept.append(problems[i] | {"prompt_ids": list(row)})
    skipped = len(problems) - len(kept)
    if not kept:
        why = f"{max_prompt} tokens (the shortest: {min(map(len, ids), default=0)})"
        raise ValueError(f"none of {skipped} prompts{of} has 1 to {why}: raise --max_prompt")
    if skipped:
        say(f"skipped {skipped} of {len(problems)} prompts{of}: above --max_prompt {max_prompt}")
    largest = max(tokenizer.eos_token_id, *(max(problem["prompt_ids"]) for problem in kept))
    if largest >= (vocabulary := _config(folder)["vocab_size"]):
        ids = f"the tokenizer's ids go up to {largest}, the model has {vocabulary}"
        raise ValueError(f"{folder}: {ids}: they are not of one model")
    return kept, skipped


class PromptStream:
    """An endless stream of problems, epoch after epoch, each in an order of its own, which comes
    from (seed, epoch) alone: a run resumes with nothing but a position, on any number of ranks."""

    def __init__(self, problems: list[dict], seed: int):
        if not problems:
            raise ValueError("a prompt stream needs at least one problem")
        self.problems, self.seed = problems, seed
        self._order = (-1, [])  # the latest epoch and its order: neighbours ask for the same one

    def take(self, start: int, count: int) -> list[tuple[int, dict]]:
        """(position, problem) for the positions start to start + count - 1."""
        taken = []
        for position in range(start, start + count):
            epoch, row = divmod(position, len(self.problems))
            if self._order[0] != epoch:
                order = list(range(len(self.problems)))
                random.Random(f"{self.seed}/{epoch}").shuffle(order)  # a str: as on any machine
                self._order = (epoch, order)
            taken.append((position, self.problems[self._order[1][row]]))
        return taken


# -- the hub --------------------------------------------------------------------------------------


def hub_rows(name: str, split: str = "train"):
    """The rows (dicts) of the hub's data set OWNER/NAME or OWNER/NAME/CONFIG. Raises ValueError."""
    from huggingface_hub import constants

    if name.count("/") not in (1, 2):
        raise ValueError(f"{name!r} is no data set: give OWNER/NAME or OWNER/NAME/CONFIG")
    owner, title, config = [*name.split("/"), None][:3]
    # not the common cache: the datasets library leaves parts of data sets there
    cache = Path(constants.HF_HOME, "remix", "hub")
    folder = _snapshot("dataset", f"{owner}/{title}", cache_dir=cache)
    return _load_dataset(name, folder, config, split=split)


def _load_dataset(name, *source, **how):
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(*source, **how)
    except Exception as error:  # pyarrow's and its own
        raise ValueError(f"{name}: {_one_line(error.__cause__ or error)}") from None


def model_folder(name: str | os.PathLike) -> str:
    """`name` where that is a folder, else the snapshot of the hub's model OWNER/NAME, or NAME of a
    known owner, fetched first if need be. Raises ValueError."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ValueError(f"{name}: no such folder")
    if "/" not in name:
        owners = [owner for start, owner in OWNERS.items() if name.startswith(start)]
        if not owners:
            raise ValueError(f"no folder {name!r}, nor is its owner known: give OWNER/NAME")
        name = f"{owners[0]}/{name}"
    # root files only: folders hold other formats of the same weights
    return _snapshot("model", name, allow_patterns=MODEL_FILES, ignore_patterns="*/*")


def _snapshot(kind, name, **how):
    """The folder of the hub's `kind` "model" or "dataset": from the cache, else fetched. All ranks
    may ask at once: huggingface_hub locks file by file, and goes on with what broke off."""
    from huggingface_hub import HfApi, snapshot_download, utils

    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    how |= dict(repo_id=name, repo_type=kind)
    try:
        folder = snapshot_download(**how, local_files_only=True)
        found = kind == "model" and _missing(folder)
        if not found:
            return folder
    except Exception as error:  # not there, or not whole
        found = _one_line(error)
    try:
        # first, and with a limit: the download would try for minutes
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
        return snapshot_download(**how)
    except Exception as error:  # two libraries' dozen kinds
        why = f"{type(error).__name__}: {_one_line(error)}"
    flag = "--model" if kind == "model" else "--data"
    raise ValueError(
        f"{kind} {name} is not whole in HF_HOME ({found}) and cannot be fetched ({why}): check the "
        "name, log in with `hf auth login` if it is gated or private, or run `python -m infra.data "
        f"{flag} {name}` with internet access and share HF_HOME"
    )


def _missing(folder):
    """The files that a model's folder lacks: a killed download may leave any part of it."""
    names, index = ["config.json"], Path(folder, "model.safetensors.index.json")
    if index.is_file():
        names += sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in names if not Path(folder, name).is_file()]
    return absent or ([] if any(Path(folder).glob("*.safetensors")) else ["*.safetensors"])


def check_model(folder, tp=1):
    """Raise ValueError unless `folder` holds a whole Hugging Face model that this code can train,
    and vLLM can share its attention heads out to `tp` ranks."""
    try:
        why = _unfit(folder, tp)
    except Exception as error:  # whatever a broken file leads to
        why = f"its files must be whole ({type(error).__name__}: {_one_line(error)})"
    if why:
        raise ValueError(f"--model {folder} cannot be trained: {why}")


def _unfit(folder, tp):
    from safetensors import safe_open

    config, tensors = _config(folder), {}
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "vocab_size")
    kind, layers, heads, _ = (config[name] for name in names)
    kv_heads = config.get("num_key_value_heads") or heads
    if kind not in MODEL_TYPES:
        return f"it is of type {kind}, this code trains {', '.join(MODEL_TYPES)}"
    if "quantization_config" in config:
        return "it is quantized: take the model that it was made from"
    # vLLM repeats key-value heads where there are fewer than ranks
    if heads % tp or kv_heads % tp and tp % kv_heads:
        return f"--tp {tp} does not divide its {heads} attention and {kv_heads} key-value heads"
    if absent := _missing(folder):
        return f"no {absent[0]} in it"
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:  # refuses a file that was cut short
            tensors |= dict.fromkeys(weights.keys(), file)
    # transformers would draw absent layers at random and only warn
    if f"model.layers.{layers - 1}.mlp.up_proj.weight" not in tensors:
        return f"its *.safetensors do not hold all of its {layers} layers"
    both = {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    if config.get("tie_word_embeddings") and len(both) == 2:
        embedding, head = (safe_open(tensors[name], "pt").get_tensor(name) for name in both)
        if not torch.equal(embedding, head):  # sharding would keep one of the two
            return "its config.json has tie_word_embeddings, its weights hold two: set it to false"


def _config(folder):
    return json.loads(Path(folder, "config.json").read_text())


def context_length(folder) -> int | None:
    """max_position_embeddings of the model in `folder` (tokens), None where it does not say."""
    return _config(folder).get("max_position_embeddings")


# -- prepare --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a run works on; problems are dicts with id, problem, answer and prompt_ids."""

    folder: str  # of the model
    tokenizer: object
    problems: list  # to train on
    parts: dict  # name -> problems to evaluate on


def prepare(cfg, say) -> Task:
    """Resolve what `cfg` leaves open (template, style, max_response, fingerprint), on every rank
    alike; what is small is looked at first. say: prints a line, on rank 0. Raises ValueError."""
    check_gpus(None if cfg.replay else check_vllm())
    if cfg.template != "auto":
        template_style(cfg.template)
    how = cfg.problem_key, cfg.answer_key, cfg.data_split, say
    problems = toy.problems("train") if cfg.data == "toy" else load_problems(cfg.data, *how)
    problems, held_out = split_held_out(problems, cfg.held_out)
    parts = {}
    if cfg.eval_every and cfg.replay:
        say("no evaluations: --replay has no engine")
    elif cfg.eval_every:
        for name in cfg.eval_data.split(","):
            parts[name] = held_out if name == "held_out" else load_eval_data(name, cfg.data_dir)
    if cfg.model:
        folder = model_folder(cfg.model)
        check_model(folder, cfg.tp)
    else:
        folder = toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0", cfg.base_seed)
    tokenizer = load_tokenizer(folder)

    if cfg.template == "auto":
        of_model = default_template(cfg.model or folder, tokenizer)
        cfg.template = "raw" if cfg.data == "toy" else of_model
    if cfg.style == "auto":
        cfg.style = template_style(cfg.template)
    context = context_length(folder)
    if context and cfg.max_prompt + cfg.max_response > context:
        if cfg.max_prompt >= context or "max_response" in cfg.given:
            why = f"the model has a context of {context} tokens"
            raise ValueError(f"{why}: lower --max_prompt {cfg.max_prompt} or --max_response")
        cfg.max_response = context - cfg.max_prompt
    lengths = f"prompts take up to {cfg.max_prompt} tokens, responses up to {cfg.max_response}"
    say(f"{lengths}; the model's context is {context or 'not known'}")
    how = folder, tokenizer, cfg.template, cfg.max_prompt, say
    problems, _ = encode(problems, *how)
    for name, part in parts.items():
        parts[name], _ = encode(part, *how, f" of {name}")
    judged = f"template {cfg.template}, judged by {cfg.reward or cfg.style}"
    seen = tokenizer.decode(problems[0]["prompt_ids"])
    say(f"{len(problems)} problems, {judged}; the model sees {seen!r}")
    cfg.fingerprint = fingerprint(folder, problems)
    saved = _config(cfg.out).get("fingerprint") if cfg.resume else None
    if saved not in (None, cfg.fingerprint):
        why = f"the run in {cfg.out} was on other problems or another kind of model"
        raise ValueError(f"{why}: --model and --data may move, not change")
    return Task(folder, tokenizer, problems, parts)


def fingerprint(folder, problems) -> str:
    """A hash of what a run trains (config.json, but for who wrote it), prompts and answers."""
    written_by = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    config = {k: value for k, value in sorted(_config(folder).items()) if k not in written_by}
    found = hashlib.sha256(json.dumps(config).encode())
    for problem in problems:
        found.update(json.dumps([problem["prompt_ids"], problem["answer"]]).encode())
    return found.hexdigest()


def main(argv=None):
    """Fetch what is named into HF_HOME."""
    parser = Parser(prog="python -m infra.data", description=main.__doc__)
    parser.add_argument("--model", metavar="NAME", help="OWNER/NAME, or NAME of a known owner")
    parser.add_argument("--data", metavar="NAME", help="OWNER/NAME, or OWNER/NAME/CONFIG")
    parser.add_argument("--split", default="train", help="split of --data [train]")
    parser.add_argument("--benchmarks", action="store_true", help="the benchmarks of eval.py")
    try:
        args = parser.parse_args(argv)
        if not (args.model or args.data or args.benchmarks):
            raise ValueError("nothing to fetch: give --model NAME, --data NAME or --benchmarks")
        if args.model:
            print(f"{args.model}: {model_folder(args.model)}")
        if args.data:
            rows = hub_rows(args.data, args.split)
            columns = ", ".join(rows.column_names)
            print(f"{args.data}: {len(rows)} rows in split {args.split}, columns {columns}")
        for name in BENCHMARKS if args.benchmarks else ():
            print(f"{name}: {len(load_benchmark(name))} problems")
    except ValueError as error:
        exit_bad_input(error)


if __name__ == "__main__":
    main()

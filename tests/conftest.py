"""Fixtures shared by the tests: real problems, a small model made here, the real command lines.

Problems come from the folder $REMIX_DATA where it is set, else they are generated and written in the same form.
"""

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory):
    """A .jsonl of math problems: the 2,000 of $REMIX_DATA, or as many generated ones."""
    real = Path(os.environ.get("REMIX_DATA", "")) / "train" / "math_train_2000.jsonl"
    if os.environ.get("REMIX_DATA") and real.exists():
        return real
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "problems.jsonl"
    with open(path, "w") as file:
        for _ in range(2000):
            a, b, c = (rng.randrange(2, 1000) for _ in range(3))
            text = rng.choice((rf"What is $\frac{{{a}}}{{{b}}}$ of ${b * c}$?", f"Find the remainder when ${a * b}$ is divided by ${c}$.",
                               f"A train covers ${a * b}$ kilometers in ${b}$ hours. How many kilometers does it cover in ${c}$ hours?"))
            answer = {"W": a * c, "F": a * b % c, "A": a * c}[text[0]]
            file.write(json.dumps({"problem": text, "answer": str(answer)}) + "\n")
    return path


@pytest.fixture(scope="session")
def small_model(problems_file, tmp_path_factory):
    """A small randomly initialised Qwen2 whose BPE tokenizer is trained on the problems, in Hugging Face format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["problem"] for line in open(problems_file, encoding="utf-8")]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "<eos>", "<user>", "<assistant>"],
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    chat = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant><think>\n"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat).save_pretrained(folder)
    random_model("qwen2", folder)
    return folder


def random_model(kind, folder, tokenizer=None):
    """A small randomly initialised model of type `kind` ("qwen2 tied": with tied embeddings) in `folder`, with the tokenizer of another folder where one is given.

    The three differ as the real ones do: Qwen2 with biases, here untied; Qwen3 with norms of queries and keys and a head size of
    its own, tied; Llama without either.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    kind, _, tied = kind.partition(" ")
    config = AutoConfig.for_model(
        kind, vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64 if kind == "qwen3" else 32, max_position_embeddings=512, tie_word_embeddings=tied == "tied" or kind == "qwen3", eos_token_id=1,
        pad_token_id=0, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def command(script, *args, ranks=None, launcher=None, env=None, timeout=300):
    """Run `python script args`, or under torchrun with `ranks` processes, or with the flags of torchrun in the list `launcher`;
    returns the CompletedProcess with text output."""
    launcher = launcher or (["--standalone", "--nproc_per_node", str(ranks)] if ranks else [])
    launcher = ["-m", "torch.distributed.run", *launcher] if launcher else []
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env=clean | {"OMP_NUM_THREADS": "1"} | (env or {}))


@pytest.fixture(scope="session")
def two_at_a_time(request):
    """start(test, of, job): job(x) for every x that the selected cases of the function `test` have as parameter `of`, two at a time
    (one alone leaves half of two cores idle) -> get(x), which waits for the result."""
    pools = []

    def start(test, of, job):
        chosen = dict.fromkeys(item.callspec.params[of] for item in request.session.items if getattr(item, "originalname", None) == test)
        pools.append(ThreadPoolExecutor(2))
        running = {x: pools[-1].submit(job, x) for x in chosen}
        return lambda x: (running[x] if x in running else running.setdefault(x, pools[-1].submit(job, x))).result()
    yield start
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def metrics_of(folder):
    """The lines of a run's metrics.jsonl; strict JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is not strict JSON")
    return [json.loads(line, parse_constant=refuse) for line in open(Path(folder) / "metrics.jsonl")]


def comparable(line):
    """A metrics line without what depends on the machine."""
    return {key: value for key, value in line.items() if not key.startswith(("seconds_", "tokens_per_second", "memory_"))}


@pytest.fixture(scope="session")
def hub():
    """A hub on localhost (hub_server.Hub): hub.add(kind, name, folder), hub.requests, hub.env(home) for a process that shall use it."""
    from hub_server import Hub
    server = Hub()
    yield server
    server.close()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_start: what the test waits for begins with the session")


def pytest_collection_finish(session):
    """pip resolves the GPU requirements for most of a minute: beside the other tests, not before or after them."""
    if any(item.get_closest_marker("slow_start") for item in session.items) and not session.config.option.collectonly:
        import tempfile
        from test_install import resolve
        report = Path(tempfile.mkdtemp()) / "gpu.json"
        session.config.gpu_resolution = resolve("requirements.txt", report, "--ignore-installed"), report


@pytest.fixture
def gpu_resolution(request):
    """(pip's process, the report that it writes)."""
    yield request.config.gpu_resolution
    request.config.gpu_resolution[0].kill()

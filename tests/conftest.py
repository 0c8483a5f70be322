"""Shared by the tests: problems, a small model made here, the real command lines.

Problems come from the folder $REMIX_DATA where it is set, else they are generated in its form.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
            text, answer = rng.choice(
                (
                    (rf"What is $\frac{{{a}}}{{{b}}}$ of ${b * c}$?", a * c),
                    (f"Find the remainder when ${a * b}$ is divided by ${c}$.", a * b % c),
                    (f"${a * b}$ pages take ${b}$ hours. How many pages take ${c}$ hours?", a * c),
                )
            )
            file.write(json.dumps({"problem": text, "answer": str(answer)}) + "\n")
    return path


@pytest.fixture(scope="session")
def small_model(problems_file, tmp_path_factory):
    """A small random Qwen2, with a BPE tokenizer trained on the problems."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["problem"] for line in open(problems_file, encoding="utf-8")]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<pad>", "<eos>", "<user>", "<assistant>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    chat = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant><think>\n"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat
    ).save_pretrained(folder)
    random_model("qwen2", folder)
    return folder


def random_model(kind, folder, tokenizer=None):
    """A small random model of type `kind` ("qwen2 tied": with tied embeddings) in `folder`.

    The three differ as the real ones do: Qwen2 with biases, here untied; Qwen3 with norms of
    queries and keys and a head size of its own, tied; Llama without either. `tokenizer`: a folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    kind, _, tied = kind.partition(" ")
    config = AutoConfig.for_model(
        kind,
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64 if kind == "qwen3" else 32,
        max_position_embeddings=512,
        tie_word_embeddings=tied == "tied" or kind == "qwen3",
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def command_line(script, *args, ranks=None, launcher=None, env=None):
    """What subprocess is to start for `python script args`, or under torchrun: with `ranks`
    processes, or with the flags in the list `launcher`."""
    launcher = launcher or (["--standalone", "--nproc_per_node", str(ranks)] if ranks else [])
    launcher = ["-m", "torch.distributed.run", *launcher] if launcher else []
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    return dict(
        args=[sys.executable, *launcher, str(ROOT / script), *map(str, args)],
        cwd=ROOT,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )


def command(script, *args, timeout=300, **how):
    """Run it (see command_line) to its end; returns the CompletedProcess with text output."""
    line = command_line(script, *args, **how)
    return subprocess.run(**line, capture_output=True, timeout=timeout)


class Running:
    """A command line (see command_line) in the background, its output in the file `log`."""

    def __init__(self, log, script, *args, **how):
        self.log, self.torchrun = Path(log), bool(how.get("ranks"))
        line = command_line(script, *args, **how)
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                **line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self.process.pid

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, seconds=240):
        """Until `text` stands in the output."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None and time.monotonic() < end, (
                f"{text!r} was awaited:\n{self.text[-4000:]}"
            )
            time.sleep(0.02)
        return self

    @property
    def ranks(self):
        """Process ids of the ranks, in order."""
        if not self.torchrun:
            return [self.pid]
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        by_rank = {}
        for pid in map(int, found):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            by_rank |= {int(entry[5:]): pid for entry in environment if entry.startswith(b"RANK=")}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def end(self, seconds=75):
        """Its exit code; it must end within so many seconds, and nothing of it is left then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s:\n{self.text[-4000:]}") from None
        finally:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)


def alive(pid):
    """Whether a process runs (no zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def gone(pids, seconds=60):
    """Waits until none of the processes is left; asserts that it takes no longer."""
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"processes {left} are still there after {seconds} s"
        time.sleep(0.05)


def metrics_of(folder, unfinished=False):
    """The lines of a run's metrics.jsonl, strict JSON. `unfinished`: the last may be half there."""

    def refuse(constant):
        raise ValueError(f"{constant} is not strict JSON")

    with open(Path(folder) / "metrics.jsonl") as file:
        lines = [line for line in file if line.endswith("\n") or not unfinished]
    return [json.loads(line, parse_constant=refuse) for line in lines]


def comparable(line):
    """A metrics line without what depends on the machine."""
    times = ("seconds_", "tokens_per_second", "memory_")
    return {key: value for key, value in line.items() if not key.startswith(times)}


@pytest.fixture(scope="session")
def hub():
    """A hub on localhost (hub_server.Hub)."""
    from hub_server import Hub

    server = Hub()
    yield server
    server.close()


# first, so that of two processes that take files in this order neither is left alone with one
LONGEST = (
    "test_train.py test_real.py test_toy.py test_eval.py test_reward.py test_rollout.py".split()
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))

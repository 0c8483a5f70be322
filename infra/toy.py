"""The embedded default: a tiny model and an arithmetic task, to measure ReMix on a laptop's CPU.

`a+b+c=` with digits 2 .. 9 (512 prompts, split 384 / 128 by a fixed hash) is answered by a chain of
running totals, as in `8+6=14;14+4=18;#18`. The model is warmed up on noisy demonstrations of the
384 training prompts, so that about a third of its samples are right. Reinforcement learning then
removes the learned noise.

What is learned is the exact distribution of the next token of the demonstrations, not a sample of
it: so another seed, or another CPU, which rounds otherwise, gives an equally good model.

    python -m infra.toy [SEED]    # warm up, once (half a minute on a CPU); prints the folder
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

CHARACTERS = ["<pad>", "<eos>", *"0123456789+=;#"]
# vLLM's CPU attention takes head sizes of 32, 64, 80, 96 …: hidden_size / heads is one of them
RECIPE = dict(
    version=2,
    hidden_size=64,
    layers=3,
    heads=2,
    intermediate_size=128,
    initializer_range=0.1,
    steps=500,
    batch=64,
    lr=4e-3,
    warmup=30,
    noise=0.45,
    held_out=128,
)


def problems(split):
    """The problems of "train" (384) or "test" (128): dicts with id, problem, answer. The split is
    fixed by a hash of the prompt."""
    triples = [(a, b, c) for a in range(2, 10) for b in range(2, 10) for c in range(2, 10)]
    triples.sort(key=lambda t: hashlib.sha256("{}+{}+{}=".format(*t).encode()).digest())
    held = RECIPE["held_out"]
    chosen = {"train": triples[held:], "test": triples[:held]}[split]
    return [
        {"id": "toy/{}{}{}".format(*t), "problem": "{}+{}+{}=".format(*t), "answer": str(sum(t))}
        for t in chosen
    ]


def additions(total, term):
    """What a demonstration says total + term is: value -> probability."""
    errors = [-2, -1, 1, 2]
    if total % 10 + term >= 10:
        errors += [-10] * 4  # half of the noise is a forgotten carry, where there is one
    said = Counter({total + term: 1 - RECIPE["noise"]})
    for error in errors:
        said[total + term + error] += RECIPE["noise"] / len(errors)
    return said


@lru_cache(maxsize=None)
def demonstrations(problem):
    """All responses to a problem, text -> probability. An error is carried on consistently."""
    a, b, c = (int(digit) for digit in problem.rstrip("=").split("+"))
    return {
        f"{a}+{b}={one};{one}+{c}={two};#{two}": p * q
        for one, p in additions(a, b).items()
        for two, q in additions(one, c).items()
    }


@lru_cache(maxsize=None)
def next_characters(problem):
    """The distribution of a demonstration's next character: prefix -> its probabilities, in the
    order of CHARACTERS."""
    found = defaultdict(lambda: [0.0] * len(CHARACTERS))
    for text, probability in demonstrations(problem).items():
        for i, character in enumerate([*text, "<eos>"]):
            found[text[:i]][CHARACTERS.index(character)] += probability
    return {prefix: [p / sum(after) for p in after] for prefix, after in found.items()}


def make_tokenizer():
    """A character-level tokenizer of 16 symbols."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def warm_up(folder, seed):
    """Supervised warm-up by the RECIPE; saves model and tokenizer to `folder` in Hugging Face
    format.

    Each step draws a demonstration to each of its problems; the target at every token is the exact
    distribution q after its prefix: loss = −Σ q·log p / response tokens.
    """
    import torch
    from tqdm import tqdm
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer, recipe = make_tokenizer(), RECIPE
    config = Qwen2Config(
        vocab_size=len(CHARACTERS),
        hidden_size=recipe["hidden_size"],
        intermediate_size=recipe["intermediate_size"],
        num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"],
        num_key_value_heads=recipe["heads"],
        initializer_range=recipe["initializer_range"],
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would be slower
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    how = dict(lr=recipe["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    train, rng, order = problems("train"), random.Random(seed), []
    for step in tqdm(range(recipe["steps"]), desc="warming up the embedded default", unit="step"):
        if not order:  # whole passes over the problems
            order = rng.sample(train, len(train))
        batch, order = order[: recipe["batch"]], order[recipe["batch"] :]
        rows, targets = [], []
        for problem in (p["problem"] for p in batch):
            (text,) = rng.choices(*zip(*demonstrations(problem).items()))
            rows.append(torch.tensor([CHARACTERS.index(c) for c in problem + text]))
            q = [next_characters(problem)[text[:i]] for i in range(len(text) + 1)]
            # the prompt is not learned: its last token alone has a target
            targets.append(torch.tensor([[0.0] * len(CHARACTERS)] * (len(problem) - 1) + q))
        pad = torch.nn.utils.rnn.pad_sequence
        ids, q = pad(rows, batch_first=True), pad(targets, batch_first=True)  # (b, L), (b, L, V)
        loss = -(q * model(input_ids=ids).logits.log_softmax(-1)).sum() / q.sum()
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * min((step + 1) / recipe["warmup"], cosine)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_folder(first=True, seed=0):
    """Folder of the model warmed up with `seed`, made if missing by the `first` rank of each
    machine; its other ranks wait until it is there.

    The cache is keyed by recipe and seed, written aside and renamed, so a killed warm-up leaves
    nothing half done.
    """
    key = json.dumps(RECIPE | {"seed": seed}, sort_keys=True)
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remix"
    folder = cache / f"toy-{key}"
    while not first and not folder.exists():
        time.sleep(0.2)
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix="warming-", dir=cache))
        except OSError as error:
            raise OSError(
                f"the embedded default cannot be kept in {cache} ({error.strerror}): set "
                "XDG_CACHE_HOME to a folder that can be written"
            ) from None
        try:
            warm_up(aside, seed)
            os.rename(aside, folder)
        except OSError:
            # unless another process finished first: then its copy is as good
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return str(folder)


if __name__ == "__main__":
    try:
        print(model_folder(seed=int(*sys.argv[1:2])))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

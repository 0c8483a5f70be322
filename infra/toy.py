"""The embedded default: a tiny model and an arithmetic task, to measure ReMix on a laptop's CPU.

`a+b+c=` with digits 2 .. 9 (512 prompts, split 384 / 128 by a fixed hash) is answered by a chain of
running totals, as in `8+6=14;14+4=18;#18`. The model is warmed up on noisy demonstrations of the
384 training prompts, so that about a quarter of its samples are right, in three styles, so that
response length is free. Reinforcement learning then removes the learned noise.

    python -m infra.toy    # warm up, once (about a minute on one CPU thread); prints the folder
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
from pathlib import Path

CHARACTERS = ["<pad>", "<eos>", *"0123456789+=;#"]
RECIPE = dict(
    version=1,
    hidden_size=64,
    layers=3,
    heads=2,
    intermediate_size=128,
    steps=800,
    batch=64,
    lr=4e-3,
    warmup=30,
    noise=0.45,
    styles=dict(equations=0.60, twice=0.25, totals=0.15),
    held_out=128,
    seed=0,
)
HEAD_SIZE = (
    32  # vLLM's CPU attention takes 32, 64, 80, 96 …; hidden_size / heads must be one of them
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


def demonstration(problem, rng):
    """A response in one of three styles with label noise; an error is carried on consistently.
    `rng`: random.Random."""
    a, b, c = (int(digit) for digit in problem.rstrip("=").split("+"))
    style = rng.choices(list(RECIPE["styles"]), RECIPE["styles"].values())[0]
    text, total = "", a
    for term in (b, c):
        right, shown = total + term, total + term
        if rng.random() < RECIPE["noise"]:
            if rng.random() < 0.5 and total % 10 + term >= 10:
                shown = right - 10  # a forgotten carry
            else:
                shown = max(right + rng.choice((-2, -1, 1, 2)), 0)
        equation = f"{shown};" if style == "totals" else f"{total}+{term}={shown};"
        text += equation * (2 if style == "twice" else 1)
        total = shown
    return f"{text}#{total}"


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


def warm_up(folder):
    """Supervised warm-up by the RECIPE; saves model and tokenizer to `folder` in Hugging Face
    format."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer, recipe = make_tokenizer(), RECIPE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same model on every machine
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(CHARACTERS),
                hidden_size=recipe["hidden_size"],
                intermediate_size=recipe["intermediate_size"],
                num_hidden_layers=recipe["layers"],
                num_attention_heads=recipe["heads"],
                num_key_value_heads=recipe["heads"],
                max_position_embeddings=64,
                tie_word_embeddings=True,
                eos_token_id=1,
                pad_token_id=0,
                bos_token_id=None,
            )
        )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98), weight_decay=0.01
    )
    train, rng = problems("train"), random.Random(recipe["seed"])
    for step in tqdm(range(recipe["steps"]), desc="warming up the embedded default", unit="step"):
        rows, targets = [], []
        for problem in rng.choices(train, k=recipe["batch"]):
            prompt = tokenizer.encode(problem["problem"])
            row = (
                prompt
                + tokenizer.encode(demonstration(problem["problem"], rng))
                + [tokenizer.eos_token_id]
            )
            rows.append(row)
            targets.append([-100] * len(prompt) + row[len(prompt) :])  # the prompt is not learned
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (batch, L)
        labels = torch.tensor(
            [row + [-100] * (longest - len(row)) for row in targets]
        )  # (batch, L)
        logits = model(input_ids=ids[:, :-1]).logits  # (batch, L - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe["steps"]))  # cosine down to 10 %
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * min((step + 1) / recipe["warmup"], decay)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_folder(first=True):
    """Folder of the warmed-up model, made if missing by the `first` rank of each machine; its other
    ranks wait until it is there.

    The cache is keyed by the recipe, written aside and renamed, so a killed warm-up leaves nothing
    half done.
    """
    key = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()[:12]
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
            warm_up(aside)
            os.rename(aside, folder)
        except OSError:
            if (
                not folder.exists()
            ):  # unless another process finished first: then its copy is the same
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return str(folder)


if __name__ == "__main__":
    try:
        print(model_folder())
    except OSError as error:
        sys.exit(f"error: {error}")

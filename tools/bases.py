"""What the warm-up of the embedded default comes to, by its seed and by kind of CPU.

    python tools/bases.py           # docs/bases.jsonl, a line a base; goes on with what is missing

Another CPU rounds otherwise. It can be had on this one: environment variables keep PyTorch and MKL
from instructions that it has (KINDS). Right mass: the model's exact probability, at temperature 1,
of all responses with the right answer that a demonstration can be, mean over the 128 held-out
problems; so no sampling noise is in it. Greedy: the share of right greedy responses.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from infra import data, toy
from model import Policy, collate
from reward import final_answer

RECORD, SEEDS = ROOT / "docs" / "bases.jsonl", range(5)
KINDS = {
    "this CPU": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "no AVX, MKL AVX2": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL CBWR AVX2": {"MKL_CBWR": "AVX2"},
}


@torch.no_grad()
def figures(folder):
    """{"mass", "greedy"} of a model on the held-out problems."""
    policy, tokenizer = Policy(folder, 1.0), data.load_tokenizer(folder)
    mass, greedy, problems = 0.0, 0, toy.problems("test")
    for problem in problems:
        text, answer = problem["problem"], problem["answer"]
        prompt = torch.tensor(tokenizer.encode(text))
        right = [t for t in toy.demonstrations(text) if t.endswith(f"#{answer}")]
        responses = [torch.tensor([*tokenizer.encode(t), tokenizer.eos_token_id]) for t in right]
        samples = [Namespace(prompt=prompt, response=response) for response in responses]
        mass += policy(**collate(samples, "cpu"))["logp"].sum(-1).exp().sum().item()
        said = policy.lm.generate(prompt[None], do_sample=False, max_new_tokens=40)[0]
        said = tokenizer.decode(said[len(prompt) :], skip_special_tokens=True)
        greedy += final_answer(said, "hash") == answer
    return {"mass": mass / len(problems), "greedy": greedy / len(problems)}


def main():
    done = [json.loads(line) for line in open(RECORD)] if RECORD.exists() else []
    for kind, variables in KINDS.items():
        for seed in SEEDS:
            if any((row["kind"], row["seed"]) == (kind, seed) for row in done):
                continue
            with tempfile.TemporaryDirectory() as cache:  # made here, not found
                env = os.environ | variables | {"XDG_CACHE_HOME": cache}
                begun, how = time.perf_counter(), dict(env=env, cwd=ROOT, text=True, check=True)
                command = [sys.executable, "-m", "infra.toy", str(seed)]
                said = subprocess.run(command, stdout=subprocess.PIPE, **how).stdout
                seconds = round(time.perf_counter() - begun)
                row = dict(kind=kind, seed=seed) | figures(said.strip()) | {"seconds": seconds}
            done.append(row)
            with open(RECORD, "a") as file:
                file.write(json.dumps(row) + "\n")
    table = pd.DataFrame(done).pivot(index="seed", columns="kind", values=["mass", "greedy"])
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    main()

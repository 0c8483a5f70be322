"""The vLLM engine inside the training process: take the trainer's weights, generate, sleep.

Two alarms stop a run with a message rather than let it train on rubbish. Accounting: the engine holds the weights of the version
asked for, every expected name was yielded and consumed, nothing is generated between sleep and the next update. And the gap
between the sampler's log-probs and the trainer's (train.py, `gap_mean`), which cannot be seen from here.
"""

import contextlib
import hashlib
import math
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.ranks import gather


def request_seed(*parts):
    """A 63-bit seed from (run seed, step, prompt, sample): each response has a stream of its own, whatever else is in the batch.

    vLLM's own `n > 1` gives neighbouring seeds shared streams; hence one request per sample.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stop_tokens(tokenizer):
    """Ids of tokens that end a response besides eos: what the chat format puts after an assistant's turn.

    Qwen2.5-Math's base models have another eos (<|endoftext|>) than their chat format (<|im_end|>), and would write on.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        text = (
            tokenizer.apply_chat_template(turn, tokenize=False) if tokenizer.chat_template else ""
        )
    except Exception:  # jinja: a format that refuses this conversation
        return []
    ids = tokenizer(text.rpartition("!")[2], add_special_tokens=False)["input_ids"][:1]
    return [
        i
        for i in ids
        if i != tokenizer.eos_token_id
        and getattr(tokenizer.added_tokens_decoder.get(i), "special", False)
    ]


class Engine:
    """One vLLM engine per rank, or per `cfg.tp` ranks. All methods are collective: every rank calls them in the same order."""

    def __init__(self, folder, max_len, cfg, ranks, version=None, stop=()):
        """`folder`: the model's shape and tokenizer. `version`: what the weights in the folder are to be taken for; None:
        nothing is generated before the first update(), and the engine sleeps until then. `max_len`: prompt and response
        together (tokens). `stop`: ids of tokens that end a response, besides eos."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        local_world, threads = os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads()
        from vllm import LLM

        cuda = ranks.device.type == "cuda"
        with (
            preserved_rng(),
            contextlib.nullcontext() if cuda or cfg.tp == 1 else own_shared_memory(),
        ):
            self.llm = LLM(
                folder,
                dtype=cfg.rollout_dtype,
                max_model_len=max_len,
                seed=cfg.seed,
                tensor_parallel_size=cfg.tp,
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",
                max_num_seqs=256,
                enforce_eager=not cuda,
                enable_sleep_mode=cuda,
                gpu_memory_utilization=cfg.engine_memory,
                enable_prefix_caching=True,  # what an engine has of a group shares its prompt
                kv_cache_memory_bytes=None if cuda else 1 << 30,
                max_num_batched_tokens=max(max_len, 8192),
                trust_remote_code=False,
                load_format="safetensors",  # nothing that comes with a model is run
                enable_chunked_prefill=cuda,  # on a CPU a seeded request whose prompt is split crashes: its generator cannot rewind
                use_tqdm_on_load=False,
            )
        os.environ["LOCAL_WORLD_SIZE"] = local_world
        torch.set_num_threads(threads)
        self.ranks, self.tp, self.sleeps = ranks, cfg.tp, cuda
        self.version, self.asleep, self.stop = version, False, list(stop)
        if version is None:
            self.sleep()  # the trainer fills the memory before the first update()

    def update(self, version, tensors, expected):
        """Wake up with the weights of `version`. `tensors`: iterator of (name, full tensor); `expected`: set of names.

        Raises RuntimeError if the names are not the expected ones or were not all consumed. Does nothing if awake and current.
        """
        if self.version == version and not self.asleep:
            return
        self.version, yielded, ended = None, set(), False

        def recorded():
            nonlocal ended
            for name, tensor in tensors:
                yielded.add(name)
                if (
                    name in expected
                ):  # vLLM would stop at an unknown name with an error of its own; the one below names it
                    yield name, tensor
            ended = True

        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": recorded()})
        if not ended or yielded != expected:
            difference = sorted(yielded ^ expected)[:5]
            raise RuntimeError(
                f"the engine did not take all weights of version {version}: consumed to the end: {ended}, "
                f"names that differ: {difference}"
            )
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                f"the engine's cache holds blocks of older weights than version {version}: a request is still running"
            )
        if self.asleep:
            torch.cuda.empty_cache()  # of the tensors in transfer: vLLM cannot take what PyTorch keeps
            self.llm.wake_up(
                tags=["kv_cache"]
            )  # only now: weights in transfer and cache together would be the memory's peak
        self.version, self.asleep = version, False

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        """Sample one response per request; all of them, in order, on every rank.

        prompts: list of token-id lists; seeds: one per prompt. Returns dicts with `response` (T,) int64 including the end token,
        `logp_sampler` (T,) float32 and `truncated`. Raises RuntimeError unless the engine is awake with `version`'s weights, and
        for anything less than one whole response to each prompt.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.asleep or self.version != version:
            state = "is asleep" if self.asleep else f"holds version {self.version}"
            raise RuntimeError(
                f"generation with version {version} was asked of an engine that {state}: update() it first"
            )
        engines, engine = self.ranks.world // self.tp, self.ranks.rank // self.tp
        mine = range(engine, len(prompts), engines)  # items engine, engine + engines, …
        parameters = [
            SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=max_tokens,
                seed=seeds[i],
                logprobs=0,
                flat_logprobs=True,
                stop_token_ids=self.stop,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i in mine
        ]
        long = len(mine) * max_tokens > 50_000  # tokens: worth a progress bar
        bar = partial(tqdm, leave=False) if long and self.ranks.first else False
        with preserved_rng():
            outputs = (
                self.llm.generate(
                    [{"prompt_token_ids": prompts[i]} for i in mine], parameters, use_tqdm=bar
                )
                if mine
                else []
            )
        if len(outputs) != len(mine):
            raise RuntimeError(
                f"the engine returned {len(outputs)} responses to {len(mine)} requests"
            )
        peer = (
            self.ranks.rank % self.tp
        )  # tensor-parallel peers hold the same responses: each reports its share
        found = {
            i: as_response(output.outputs[0])
            for i, output in list(zip(mine, outputs))[peer :: self.tp]
        }
        for part in gather(found):
            found.update(part)
        responses = [found[i] for i in range(len(prompts))]
        check_responses(responses)
        return responses

    def sleep(self):
        """Free the GPU for training: weights and cache are dropped, the next update() brings them back. Nothing on a CPU.

        Raises RuntimeError if no memory became free.
        """
        if self.sleeps and not self.asleep:
            free, _ = torch.cuda.mem_get_info()
            self.llm.sleep(level=2)
            if torch.cuda.mem_get_info()[0] - free < 1 << 20:
                raise RuntimeError(
                    "the sleeping engine freed no GPU memory: unset expandable_segments (PYTORCH_ALLOC_CONF), "
                    "which its allocator cannot work with"
                )
            self.asleep, self.version = True, None


def as_response(output):
    """vLLM's completion as plain tensors. Raises RuntimeError where a token has no log-prob."""
    tokens, flat = list(output.token_ids), output.logprobs
    if flat is None:
        raise RuntimeError(
            f"the engine returned no log-probs of a response of {len(tokens)} tokens"
        )
    if [
        flat.token_ids[i] for i in flat.start_indices
    ] != tokens:  # the sampled token comes first at each position
        raise RuntimeError(
            f"the engine returned {len(flat.start_indices)} log-probs that are not those of its {len(tokens)} tokens"
        )
    logp = [
        math.nan if flat.logprobs[i] is None else flat.logprobs[i] for i in flat.start_indices
    ]  # refused by check_responses()
    return dict(
        response=torch.tensor(tokens),
        logp_sampler=torch.tensor(logp, dtype=torch.float32),
        truncated=output.finish_reason == "length",
    )


def check_responses(responses):
    """Raise RuntimeError unless each response (dicts as of generate()) has tokens, and each token a log-prob that is a number."""
    for number, response in enumerate(responses):
        tokens, logp = response["response"], response["logp_sampler"]
        if not 0 < len(tokens) == len(logp):
            raise RuntimeError(
                f"response {number} of {len(responses)} has {len(tokens)} tokens and {len(logp)} log-probs"
            )
        if not logp.isfinite().all():
            raise RuntimeError(
                f"response {number} of {len(responses)} has sampler's log-probs that are not finite: the policy has diverged "
                "(a smaller --lr?), its weights never were finite, or the engine failed"
            )


@contextlib.contextmanager
def own_shared_memory():
    """On a CPU, tensor-parallel ranks meet in shared memory whose name is the same for every run of a machine: a killed run's would stop the next.
    Inside, it carries the run's port; at the end all have it open, and nobody needs its name any more."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    name, port = Shared.make_group_name, f"remix-{os.environ['MASTER_PORT']}-"
    Shared.make_group_name = staticmethod(
        lambda communicator: name(communicator).replace("-tp:", f"-{port}tp:")
    )
    yield
    Shared.make_group_name = staticmethod(name)
    for path in Path("/dev/shm").iterdir() if os.path.isdir("/dev/shm") else ():
        if port in path.name:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def preserved_rng():
    """vLLM reseeds and advances the process's generators; the trainer's are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(
        devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []
    ):
        yield
    random.setstate(python)
    np.random.set_state(numpy)

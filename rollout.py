"""Who writes the rollouts: vLLM inside the training process, given the trainer's weights; or a
record.

A behaviour is an object with few verbs, so that the loop asks no flag:

    rollouts(policy, step, asked)     groups of judged samples, the same on every rank
    writer(policy)                    None where π_k wrote them; else a context in which `policy` is
                                      whoever did, for the trainer's own logp_behavior
    evaluate(policy, version, ask)    what ask(engine, judge) makes of π_k; None without an engine

Two alarms stop a run rather than let it train on rubbish. Accounting, here: the engine holds the
version asked for, and took every tensor of it. And the gap between its log-probs and the trainer's
(infra/guards.py), which on a GPU alone would not show an engine that is a few updates behind.
"""

import hashlib
import math
import os
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from buffer import Sample
from infra.ranks import bring_home, deal_out, gather
from reward import canonical, final_answer, reflects


def request_seed(*parts):
    """A 63-bit seed from (run seed, version, prompt, sample): each response has its own stream.

    vLLM's own `n > 1` gives neighbouring seeds shared streams; hence one request per sample.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stop_tokens(tokenizer):
    """Ids that end a response besides eos: what the chat format puts after an assistant's turn.

    Qwen2.5-Math's base models have another eos (<|endoftext|>) than their chat format
    (<|im_end|>), and would write on.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        chat = tokenizer.chat_template
        text = tokenizer.apply_chat_template(turn, tokenize=False) if chat else ""
    except Exception:  # jinja: a format that refuses this conversation
        return []
    after = text.rpartition("!")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    known = tokenizer.added_tokens_decoder
    special = [i for i in ids if getattr(known.get(i), "special", False)]
    return [i for i in special if i != tokenizer.eos_token_id]


class Engine:
    """One vLLM engine per rank, or per `cfg.tp` ranks. Every method is a collective."""

    def __init__(self, folder, max_len, cfg, ranks, version=None, stop=()):
        """folder: the model's shape and tokenizer. max_len: prompt and response together (tokens).

        version: what the weights in the folder are to be taken for; None: nothing is generated
        before the first update(), and the engine sleeps until then. stop: ids of tokens that end a
        response, besides eos. cfg: dtype, seed, tp, engine_memory.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        local_world, threads = os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads()
        from vllm import LLM

        cuda = ranks.device.type == "cuda"
        self.llm = LLM(
            folder,
            dtype=cfg.dtype,
            max_model_len=max_len,
            seed=cfg.seed,
            tensor_parallel_size=cfg.tp,
            distributed_executor_backend="external_launcher",
            logprobs_mode="processed_logprobs",
            max_num_seqs=256,
            max_num_batched_tokens=max(max_len, 8192),
            enforce_eager=not cuda,
            enable_sleep_mode=cuda,
            gpu_memory_utilization=cfg.engine_memory,
            kv_cache_memory_bytes=None if cuda else 1 << 30,
            enable_prefix_caching=True,  # what an engine has of a group shares its prompt
            # on a CPU a seeded request whose prompt is split crashes: its generator cannot rewind
            enable_chunked_prefill=cuda,
            # nothing that comes with a model is run
            trust_remote_code=False,
            load_format="safetensors",
            use_tqdm_on_load=False,
        )
        os.environ["LOCAL_WORLD_SIZE"] = local_world  # vLLM sets it to 1
        torch.set_num_threads(threads)
        self.ranks, self.tp, self.sleeps = ranks, cfg.tp, cuda
        self.version, self.asleep, self.stop = version, False, list(stop)
        if version is None:
            self.sleep()  # the trainer fills the memory before the first update()

    def update(self, version, tensors, expected):
        """Wake up with the weights of `version`. Nothing where awake and current.

        tensors: iterator of (name, full tensor); expected: set of names. Raises RuntimeError if the
        names are not the expected ones or were not all consumed.
        """
        if self.version == version and not self.asleep:
            return
        self.version, taken = None, set()

        def noted():
            for name, tensor in tensors:
                taken.add(name)
                yield name, tensor
            taken.add("the end")

        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": noted()})
        if differ := sorted(taken ^ (expected | {"the end"}))[:5]:
            raise RuntimeError(
                f"the engine did not take the weights of version {version}: {differ}"
            )
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine's cache is of older weights: a request is still running")
        if self.asleep:
            # weights in transfer and cache together would be the memory's peak
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
        self.version, self.asleep = version, False

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        """Sample one response per request; all of them, in order, on every rank.

        prompts: list of token-id lists; seeds: one per prompt. Returns dicts with `response` (T,)
        int64 including the end token, `logp_sampler` (T,) float32 and `truncated`. Raises
        RuntimeError unless the engine is awake with `version`'s weights, and for anything less than
        one whole response to each prompt.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.asleep or self.version != version:
            state = "is asleep" if self.asleep else f"holds version {self.version}"
            raise RuntimeError(f"version {version} was asked of an engine that {state}")
        engines, engine = self.ranks.world // self.tp, self.ranks.rank // self.tp
        mine = range(engine, len(prompts), engines)  # items engine, engine + engines, …
        common = dict(
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=max_tokens,
            stop_token_ids=self.stop,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        parameters = [SamplingParams(seed=seeds[i], **common) for i in mine]
        requests = [{"prompt_token_ids": prompts[i]} for i in mine]
        long = len(mine) * max_tokens > 50_000  # tokens: worth a progress bar
        bar = partial(tqdm, leave=False) if long and self.ranks.first else False
        outputs = self.llm.generate(requests, parameters, use_tqdm=bar) if mine else []
        if len(outputs) != len(mine):
            raise RuntimeError(f"{len(outputs)} responses came to {len(mine)} requests")
        peer, found = self.ranks.rank % self.tp, {}
        # tensor-parallel peers hold the same responses: each reports its share
        for i, output in list(zip(mine, outputs))[peer :: self.tp]:
            found[i] = as_response(output.outputs[0])
        for part in gather(found):
            found.update(part)
        return [found[i] for i in range(len(prompts))]

    def sleep(self):
        """Free the GPU for training; the next update() brings all back. Nothing on a CPU.

        Raises RuntimeError if no memory became free.
        """
        if self.sleeps and not self.asleep:
            free, _ = torch.cuda.mem_get_info()
            self.llm.sleep(level=2)
            if torch.cuda.mem_get_info()[0] - free < 1 << 20:
                raise RuntimeError(
                    "the sleeping engine freed no GPU memory: unset expandable_segments "
                    "(PYTORCH_ALLOC_CONF), which its allocator cannot work with"
                )
            self.asleep, self.version = True, None


def as_response(output):
    """vLLM's completion as plain tensors. Raises RuntimeError for one that is not whole."""
    tokens, flat = list(output.token_ids), output.logprobs
    # the sampled token comes first at each position
    starts = flat.start_indices if flat is not None else []
    logp = [math.nan if flat.logprobs[i] is None else flat.logprobs[i] for i in starts]
    if not tokens or [flat.token_ids[i] for i in starts] != tokens:
        raise RuntimeError(f"{len(tokens)} tokens came with {len(logp)} log-probs of other tokens")
    if not all(map(math.isfinite, logp)):
        raise RuntimeError(
            "the engine's log-probs are not finite: the policy has diverged (a smaller --lr?), or "
            "its weights never were"
        )
    return dict(
        response=torch.tensor(tokens),
        logp_sampler=torch.tensor(logp, dtype=torch.float32),
        truncated=output.finish_reason == "length",
    )


class Behaviour:
    """Who writes the rollouts. What a subclass does not say: π_k does, and nothing evaluates."""

    gap_bound = math.inf  # the largest mean |engine − trainer| of the log-probs that is rounding

    def writer(self, policy):
        return None

    def evaluate(self, policy, version, ask):
        return None


class Colocated(Behaviour):
    """vLLM in the trainer's process, asleep while it trains: π_k itself writes."""

    def __init__(self, cfg, task, judge, ranks):
        """Before the trainer takes memory: the engine measures what is free, then sleeps."""
        self.cfg, self.tokenizer, self.judge, self.ranks = cfg, task.tokenizer, judge, ranks
        length, stop = cfg.max_prompt + cfg.max_response, stop_tokens(task.tokenizer)
        self.engine = Engine(task.folder, length, cfg, ranks, stop=stop)
        # mean |engine − trainer| of the log-probs where the weights agree: 1e-7 and 3e-3 measured
        self.gap_bound = 1e-3 if cfg.dtype == "float32" else 5e-2

    def rollouts(self, policy, step, asked):
        """--group_size responses to each (position, problem) of `asked`, judged."""
        cfg, version = self.cfg, step - 1
        self.engine.update(version, policy.full_tensors(), policy.names)
        wanted = [(index, problem, i) for index, problem in asked for i in range(cfg.group_size)]
        responses = self.engine.generate(
            [problem["prompt_ids"] for _, problem, _ in wanted],
            [request_seed(cfg.seed, version, index, i) for index, _, i in wanted],
            version,
            cfg.temperature,
            cfg.max_response,
        )
        self.engine.sleep()
        samples = []
        for (index, problem, _), response in zip(wanted, responses):
            known = dict(version=version, prompt_index=index, answer=problem["answer"])
            samples.append(Sample(torch.tensor(problem["prompt_ids"]), **known, **response))
        self.verify(samples)
        n = cfg.group_size
        groups = [samples[i : i + n] for i in range(0, len(samples), n)]
        if cfg.dump_rollouts and self.ranks.first:
            write_record(cfg, step, groups)
        return groups

    def verify(self, samples):
        """Fill in reward, reason, said and reflects, each rank its share. A collective.

        A truncated response is wrong whatever it says.
        """
        style = self.cfg.reward or self.cfg.style
        mine = deal_out(samples, self.ranks)
        texts = [self.tokenizer.decode(s.response, skip_special_tokens=True) for s in mine]
        whole = [(text, s.answer, style) for text, s in zip(texts, mine) if not s.truncated]
        verdicts, found = iter(self.judge.submit(whole).result()), []
        for sample, text in zip(mine, texts):
            reward, reason = (0.0, "truncated") if sample.truncated else next(verdicts)
            said = final_answer(text, self.cfg.style)
            found.append((reward, reason, said and canonical(said), reflects(text)))
        for sample, verdict in zip(samples, bring_home(found, len(samples))):
            sample.reward, sample.reason, sample.said, sample.reflects = verdict

    def evaluate(self, policy, version, ask):
        self.engine.update(version, policy.full_tensors(), policy.names)
        found = ask(self.engine, self.judge)
        self.engine.sleep()
        return found


SETTINGS = ("dtype", "temperature", "group_size")  # of a record, which a replay must share


def write_record(cfg, step, groups):
    """Write the judged rollouts of a step to OUT/rollouts, aside and renamed."""
    path = Path(cfg.out) / "rollouts" / f"step_{step:06d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [[sample.plain() for sample in group] for group in groups]
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    torch.save({"settings": settings, "groups": plain}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def read_record(path):
    """(settings, groups of Samples) of what write_record wrote. Raises ValueError."""
    try:
        record = torch.load(path, weights_only=True)
        groups = [[Sample(**plain) for plain in group] for group in record["groups"]]
        return record["settings"], groups
    except Exception as error:  # torch raises half a dozen kinds here
        why = type(error).__name__  # its text is a page on how to read the file all the same
        raise ValueError(f"--replay: {path} is no record of rollouts ({why})") from None


class Recorded(Behaviour):
    """Another run's rollouts and rewards, whatever the policy: neither engine nor judge is needed.

    They count as π_k's. Once the loss is another, so is the policy; the gap shows how far it went.
    """

    def __init__(self, cfg):
        self.folder = Path(cfg.replay)

    def rollouts(self, policy, step, asked):
        """As recorded. Raises ValueError where that is unreadable or answers other prompts."""
        path = self.folder / f"step_{step:06d}.pt"
        _, groups = read_record(path)
        found = [(group[0].prompt_index, group[0].prompt.tolist()) for group in groups]
        if found != [(index, problem["prompt_ids"]) for index, problem in asked]:
            raise ValueError(f"--replay: {path} answers other prompts: take its run's flags")
        return groups


def behaviour_of(cfg, task, judge, ranks):
    """Who writes the rollouts of a run with these flags."""
    if cfg.replay:
        return Recorded(cfg)
    return Colocated(cfg, task, judge, ranks)


def check_record(cfg):
    """Raise ValueError unless --replay holds each step that --steps asks for, so recorded."""
    whole = {path.stem for path in Path(cfg.replay).glob("step_*.pt")}
    missing = [step for step in range(1, cfg.steps + 1) if f"step_{step:06d}" not in whole]
    if missing:
        raise ValueError(
            f"--replay {cfg.replay} has no step {missing[0]} of the {cfg.steps} of --steps: a run "
            "with --dump_rollouts writes RUN/rollouts"
        )
    settings, _ = read_record(Path(cfg.replay) / "step_000001.pt")
    for name, value in settings.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"--replay {cfg.replay} was recorded with --{name} {value}: say so")

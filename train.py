"""Train a language model with ReMix (arXiv 2507.06892), or with one of its relatives: `--algo`.

    torchrun --nproc_per_node 8 train.py --model Qwen2.5-Math-7B   # eight GPUs: every rank trains and generates
    torchrun --nproc_per_node 8 train.py --preset paper-1.5b       # a run of the paper's table
    python train.py                                                # the embedded default, one process, a CPU is enough
    torchrun --nproc_per_node 2 train.py --algo ppo                # the same on two ranks, on-policy
    python train.py --preset paper-7b --dry_run --gpus 8           # the schedule and the memory plan, loading nothing

One training step k, as in the paper's algorithm box:
    1  generate B - ceil(pB) groups of responses with pi_k (vLLM holding the trainer's weights)
    2  verify them, in worker processes, while step 4 runs
    3  draw ceil(pB) groups of pi_{k-1} ... pi_{k-N} from the buffer
    4  log-probs of the whole mixture under pi_k, pi_base and pi_{k-1}, values under the critic: no gradient
    5  advantages under pi_k
    6  pi_{k-1} <- pi_k;  m passes over the mixture in minibatches:  Mix-PPG + beta KL-convex - c H
    7  push the fresh groups, tagged with k
    at k = T: reincarnation. base <- the current policy, history off, utd_after passes from now on
"""

import json
import os
import random
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

if (
    __name__ == "__main__"
):  # bad flags and --dry_run are answered here: the imports below take seconds
    import faults
    from infra import config

    faults.guard()
    config.preflight(sys.argv[1:])

import torch
import torch.distributed as dist
from tqdm import tqdm

import faults
import replay
from advantage import gae, group_advantages, vtrace, whiten
from alarms import Alarms, agree, check_gap, held
from buffer import RingBuffer
from eval import evaluate
from infra import checkpoint, data
from infra.config import check_files, exit_bad_input, fresh_before, preflight, schedule
from infra.metrics import (
    Meter,
    Recorder,
    append,
    best_evaluation,
    measure,
    rewrite,
    step_metrics,
    truncate,
)
from infra.ranks import gather, start
from loss import aggregate, kl_convex, kl_lambda, mix_ppg, tis_weight, value_loss
from model import Critic, Learner, Policy, collate
from prepare import prepare
from reward import Judge
from rollout import Engine, request_seed, stop_tokens
from score import reflects, summarise

STORED = (
    "prompt",
    "response",
    "logp_sampler",
    "logp_behavior",
    "logp_base",
    "version",
    "prompt_index",
    "reward",
    "advantage",
)


def main(argv=None):
    """Check everything that can be checked without a model, then train."""
    cfg = preflight(sys.argv[1:] if argv is None else argv)
    say = partial(print, flush=True) if os.environ.get("RANK", "0") == "0" else lambda *_: None
    faults.Here.out = cfg.out
    try:
        folder, tokenizer, problems, parts = prepare(cfg, say)
        os.makedirs(
            cfg.out, exist_ok=True
        )  # what cannot be written to is known now, not after the first step
        if os.environ.get("RANK", "0") == "0":
            faults.hold(cfg.out, say=say)
            check_files(cfg)  # again: another run may have begun here in the meantime
    except (ValueError, OSError) as error:
        exit_bad_input(error)
    with faults.reported(), Judge(cfg.reward_workers) as judge:
        if not cfg.replay and (cfg.reward or cfg.style) != "hash":  # which need no worker
            judge.start()  # before CUDA does
        ranks = start(cfg.threads, cfg.collective_timeout)
        train(cfg, folder, tokenizer, problems, parts, judge, ranks, say)
    dist.destroy_process_group()


def train(cfg, folder, tokenizer, problems, parts, judge, ranks, say):
    """The loop. Every rank runs it; every rank holds the same buffer, draws the same history and forms the same minibatches.

    problems: to train on; parts: name -> problems to evaluate on; all with prompt_ids. say: print, on rank 0.
    """
    latest = checkpoint.newest(cfg.out) if cfg.resume else None
    agree(cfg, checkpoint=latest and latest.name)
    if cfg.replay:
        engine = judge = replay.Replay(folder, cfg, ranks)  # responses and verdicts of another run
    else:  # the engine first: it measures what memory is free, then sleeps while the trainer fills it
        engine = Engine(
            folder, cfg.max_prompt + cfg.max_response, cfg, ranks, stop=stop_tokens(tokenizer)
        )
    policy = Learner(
        Policy(folder, cfg.temperature, cfg.chunk_tokens, empty=not ranks.first), cfg.lr, cfg, ranks
    )
    learners = {"policy": policy}
    if cfg.advantage == "gae":
        learners["critic"] = Learner(
            Critic(folder, empty=not ranks.first), cfg.critic_lr, cfg, ranks
        )
    buffer, prompts, done = RingBuffer(cfg.window), data.PromptStream(problems, cfg.seed), 0
    snapshots = {"base": policy.snapshot()} if cfg.beta > 0 else {}
    if cfg.resume:
        if latest:
            done, snapshots = checkpoint.load(latest, learners, buffer)
        say(f"resuming after step {done}")
    best = gather(open_run(cfg, done) if ranks.first else None)[0]
    recorder, alarms, out = Recorder(cfg, ranks), Alarms(cfg, say), Path(cfg.out)
    progress = partial(tqdm, leave=False, delay=2) if ranks.first else (lambda items, **_: items)

    def wake(version):
        engine.update(version, policy.full_tensors(), policy.names)

    def score(version):
        """Evaluate the current policy; {} where no evaluation is due."""
        if not parts or version % cfg.eval_every and version != cfg.steps:
            return {}
        with recorder.clock("eval"):
            wake(version)
            found = {
                name: summarise(
                    evaluate(
                        engine,
                        judge,
                        tokenizer,
                        part,
                        version,
                        cfg.eval_k,
                        cfg.eval_temperature,
                        cfg.max_response,
                        cfg.style if name in data.BENCHMARKS else cfg.reward or cfg.style,
                        cfg.seed,
                    )
                )
                for name, part in parts.items()
            }
            engine.sleep()
        mean = {
            key: sum(summary[key] for summary in found.values()) / len(found)
            for key in ("pass@1", "length_mean", "truncated_share", "unjudged_share")
        }
        return {
            "eval_accuracy": mean.pop("pass@1"),
            "eval_accuracy_by_part": {name: summary["pass@1"] for name, summary in found.items()},
        } | {f"eval_{key}": value for key, value in mean.items()}

    stopped = None
    if done == 0:
        evaluated = score(0)
        if evaluated:
            recorder.write(
                {"step": 0, "version": 0, "phase": "evaluation", "total_rollouts": 0} | evaluated
            )

    for step in range(done + 1, cfg.steps + 1):
        plan, version = schedule(cfg, step), step - 1
        lam = weight_of_base(cfg, step)
        with recorder.clock("step", step):
            # 1 generate with pi_k
            with recorder.clock("generate"):
                wake(version)
                asked = prompts.take(fresh_before(cfg, step), plan.fresh)
                fresh = generate(engine, asked, version, cfg)
                engine.sleep()
            # 2 verify, in the background
            mine = [
                sample | {"response": text}
                for sample, text in decoded(tokenizer, fresh[ranks.rank :: ranks.world])
            ]
            pending = judge.submit(
                [
                    (s["response"], s["answer"], cfg.reward or cfg.style)
                    for s in mine
                    if not s["truncated"]
                ]
            )
            # 3 draw history
            drawn = buffer.sample(plan.history, version, random.Random(f"{cfg.seed}/draw/{step}"))
            history = [dict(sample) for group in drawn for sample in group]
            batch = fresh + history
            # 4 log-probs under pi_k, base and precedent, values
            with recorder.clock("logprobs"):
                frozen_log_probs(policy, batch, version, lam, snapshots, cfg, progress)
                if "critic" in learners:
                    for sample, values in zip(
                        batch, learners["critic"].predict(batch, partial(progress, desc="values"))
                    ):
                        sample["values"] = values
            gap = torch.cat(
                [(s["logp_old"] - s["logp_sampler"]).abs() for s in fresh]
            )  # (fresh tokens,)
            check_gap(gap.mean().item(), version, cfg)
            with recorder.clock("reward_wait"):
                verdicts = collect(mine, pending.result())
                for i, sample in enumerate(fresh):
                    sample["reward"], sample["reason"], sample["reflects"] = verdicts[
                        i % ranks.world
                    ][i // ranks.world]
            if cfg.dump_rollouts and ranks.first:
                replay.dump(out / "rollouts", step, tokenizer, fresh, cfg)
            alarms.responses(fresh, step)
            # 5 advantages under pi_k
            batch_advantages(batch, cfg)
            # 6 m passes of minibatch updates
            meter, skipped = Meter(), 0
            with recorder.clock("update"):
                scale = min(1.0, step / cfg.warmup) if cfg.warmup else 1.0
                if (
                    "base" in snapshots
                    and cfg.anchor == "prev"
                    and weight_of_base(cfg, step + 1) < 1
                ):
                    snapshots.pop(
                        "prev", None
                    )  # its log-probs are known: one precedent in memory, not two
                    snapshots["prev"] = (
                        policy.snapshot()
                    )  # pi_k, before it changes: the next step's pi_{k-1}
                for i, minibatch in enumerate(
                    progress(list(minibatches(batch, plan.utd, cfg, step)), desc="updates"), 1
                ):
                    norms = update(learners, minibatch, lam, version, scale, meter, cfg)
                    skipped += alarms.skipped(norms, step, i)
            # 7 push the fresh groups; reincarnation at T
            if plan.phase == "mixed":
                stored = [{key: sample[key] for key in STORED if key in sample} for sample in fresh]
                buffer.push(
                    version,
                    [stored[i : i + cfg.group_size] for i in range(0, len(stored), cfg.group_size)],
                )
            if step == cfg.reincarnate:
                buffer = RingBuffer(cfg.window)  # the cached base log-probs go with it
                if cfg.beta > 0:
                    snapshots["base"] = policy.snapshot()
                say(f"reincarnation after step {step}: base <- policy, history off")
        if ranks.first:
            write_samples(out, step, tokenizer, fresh[: cfg.samples])
        evaluated = score(step)
        if evaluated and evaluated["eval_accuracy"] > best:
            best = evaluated["eval_accuracy"]
            with recorder.clock("save"):
                checkpoint.export(out / "best", folder, policy, tokenizer, cfg, ranks)
        recorder.write(
            step_metrics(step, plan, lam, fresh, history, batch, gap, meter, cfg)
            | evaluated
            | {
                "lr": cfg.lr * scale,
                "epoch": fresh_before(cfg, step) / len(problems),
                "skipped_updates": skipped,
            }
        )
        stopped = recorder.stop(step)
        if stopped or step == cfg.steps or cfg.save_every and step % cfg.save_every == 0:
            agree(cfg, step=step, history=held(buffer))
            with recorder.clock(
                "save"
            ):  # counted in the next step's line: this one's must stand before its checkpoint does
                checkpoint.save(cfg.out, step, learners, snapshots, buffer, cfg.keep, ranks)
        if stopped:
            say(f"stopped after step {step}: {stopped}; --resume goes on")
            break
    if stopped not in faults.SIGNALS:  # which leave no time for it
        with recorder.clock("export"):
            checkpoint.export(out / "model", folder, policy, tokenizer, cfg, ranks)
        say(f"the trained model is in {out / 'model'}")
    recorder.close()


def open_run(cfg, done):
    """Make the run folder with config.json, or cut its records back to the checkpoint that is resumed. Rank 0 alone.

    Returns the best evaluation among what is kept (float, -inf where there is none).
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if path.exists() and not cfg.resume:
        raise RuntimeError(f"another run has begun in {out} since this one was started")
    earlier = json.loads(path.read_text()).get("argv", []) if path.exists() else []
    text = json.dumps(
        {
            "values": asdict(cfg),
            "sources": cfg.sources,
            "fingerprint": cfg.fingerprint,
            "torch": torch.__version__,
            "argv": [*earlier, sys.argv[1:]],
        },
        indent=1,
    )
    rewrite(path, text)
    checkpoint.sweep(out)
    for name in ("metrics.jsonl", "samples.jsonl"):
        truncate(out / name, done if done else -1)
    return best_evaluation(out / "metrics.jsonl")


def weight_of_base(cfg, step):
    """lambda(t)."""
    return kl_lambda(step, cfg.lambda_start, cfg.lambda_every, cfg.lambda_drop, cfg.lambda_floor)


def generate(engine, asked, version, cfg):
    """group_size responses to each (position, problem) of `asked` -> list of samples, group after group, the same on every rank."""
    wanted = [(index, problem, i) for index, problem in asked for i in range(cfg.group_size)]
    responses = engine.generate(
        [problem["prompt_ids"] for _, problem, _ in wanted],
        [request_seed(cfg.seed, version, index, i) for index, _, i in wanted],
        version,
        cfg.temperature,
        cfg.max_response,
    )
    return [
        response
        | {
            "prompt": torch.tensor(problem["prompt_ids"]),
            "version": version,
            "prompt_index": index,
            "answer": problem["answer"],
        }
        for (index, problem, _), response in zip(wanted, responses)
    ]


def decoded(tokenizer, samples):
    return [
        (sample, tokenizer.decode(sample["response"], skip_special_tokens=True))
        for sample in samples
    ]


def collect(mine, verdicts):
    """Verdicts on this rank's responses -> gathered lists of (reward, reason, reflects), one list a rank. A collective."""
    verdicts = iter(verdicts)
    return gather(
        [
            (0.0, "truncated", reflects(s["response"]))
            if s["truncated"]
            else (*next(verdicts), reflects(s["response"]))
            for s in mine
        ]
    )


def frozen_log_probs(policy, batch, version, lam, snapshots, cfg, progress):
    """Step 4: logp_old on every sample, logp_base and logp_prev where the loss needs them and nobody knows them yet."""

    def predict(samples, name):
        for sample, logp in zip(samples, policy.predict(samples, partial(progress, desc=name))):
            sample[name] = logp  # (T,)

    predict(batch, "logp_old")
    for sample in batch:
        if sample["version"] == version:
            sample["logp_behavior"] = sample["logp_old"]  # the trainer's own, never the engine's
    if "base" in snapshots:
        unknown = [
            sample for sample in batch if "logp_base" not in sample
        ]  # history has it from when it was fresh
        if version == (
            cfg.reincarnate if 0 < cfg.reincarnate <= version else 0
        ):  # pi_k is the base itself
            for sample in unknown:
                sample["logp_base"] = sample["logp_old"]
        else:
            with policy.swapped(snapshots["base"]):
                predict(unknown, "logp_base")
    if "base" in snapshots and lam < 1:
        for sample in batch:
            if sample["version"] == version - 1 and cfg.anchor == "prev":
                sample["logp_prev"] = sample["logp_behavior"]  # pi_{k-1} wrote it
            elif cfg.anchor == "old" or "prev" not in snapshots:  # pi_{-1} = pi_0
                sample["logp_prev"] = sample["logp_old"]
        if cfg.anchor == "prev" and "prev" in snapshots:
            with policy.swapped(snapshots["prev"]):
                predict([sample for sample in batch if "logp_prev" not in sample], "logp_prev")


def batch_advantages(batch, cfg):
    """Step 5. PPO: from the current critic, whitened over the mixture. GRPO: the group's, stored with it when it was fresh."""
    if cfg.advantage == "group":
        fresh = [sample for sample in batch if "advantage" not in sample]
        rewards = torch.tensor([s["reward"] for s in fresh], dtype=torch.float32)  # (B,)
        for sample, a in zip(
            fresh, group_advantages(rewards, torch.tensor([s["prompt_index"] for s in fresh]))
        ):
            sample["advantage"] = a.item()
        for sample in batch:
            sample["advantages"] = torch.full_like(sample["logp_old"], sample["advantage"])  # (T,)
        return
    for sample in batch:
        sample["rewards"] = torch.zeros_like(sample["values"])
        sample["rewards"][-1] = sample["reward"]  # at the end token
    inputs, b = collate(batch, "cpu", ("rewards", "values", "logp_old", "logp_behavior"))
    mask = inputs["mask"]  # (B, T)
    if cfg.history_advantage == "gae":
        advantages, returns = gae(b["rewards"], b["values"], mask, cfg.gamma, cfg.gae_lambda)
    else:
        advantages, returns = vtrace(
            b["rewards"],
            b["values"],
            b["logp_old"],
            b["logp_behavior"],
            mask,
            cfg.gamma,
            cfg.gae_lambda,
        )
    for sample, a, r in zip(batch, whiten(advantages, mask), returns):
        n = len(sample["response"])
        sample["advantages"], sample["returns"] = a[:n], r[:n]


def minibatches(batch, passes, cfg, step):
    """Step 6's order: each pass goes over all groups once, shuffled, `cfg.minibatch` groups at a time. Yields lists of samples."""
    groups = [batch[i : i + cfg.group_size] for i in range(0, len(batch), cfg.group_size)]
    for i in range(passes):
        order = random.Random(f"{cfg.seed}/minibatches/{step}/{i}").sample(groups, len(groups))
        for begin in range(0, len(order), cfg.minibatch):
            yield [sample for group in order[begin : begin + cfg.minibatch] for sample in group]


def update(learners, minibatch, lam, version, scale, meter, cfg):
    """One optimiser step on a minibatch: Mix-PPG + beta KL-convex - c H, and the critic's value loss.

    Losses are sums divided by the minibatch's global counts, so that ranks and micro-batches add up to the same gradient.
    Returns the gradients' norms: learner -> float, not finite where its update was skipped.
    """
    policy, critic = learners["policy"], learners.get("critic")
    tokens = sum(len(sample["response"]) for sample in minibatch)
    denominator = {
        "token": tokens,
        "sequence": len(minibatch),
        "constant": len(minibatch) * cfg.max_response,
    }[cfg.aggregate]
    fields = ["logp_old", "logp_behavior", "advantages"] + [
        f for f in ("logp_base", "logp_prev", "values", "returns") if f in minibatch[0]
    ]
    fields += ["logp_sampler"] if cfg.tis else []
    for indices in policy.my_micro_batches(minibatch):
        samples = [minibatch[i] for i in indices]
        inputs, b = collate(samples, policy.ranks.device, fields)
        mask = inputs["mask"]  # (b, T)
        logp, entropy = policy.module(**inputs)
        loss, stats = mix_ppg(
            logp, b["logp_old"], b["logp_behavior"], b["advantages"], cfg.clip_low, cfg.clip_high
        )
        if cfg.tis:
            stats["tis"] = tis_weight(b["logp_behavior"], b["logp_sampler"], cfg.tis)  # (b, T)
            loss = loss * stats["tis"]
        meter.add("policy_loss", loss, mask)
        if "logp_base" in b:
            loss = loss + cfg.beta * kl_convex(
                logp, b["logp_base"], b.get("logp_prev"), lam, cfg.kl_estimator
            )
        loss = loss - cfg.entropy * entropy
        policy.backward(aggregate(loss, mask, cfg.aggregate, denominator))
        if critic:
            (values,) = critic.module(**inputs)
            loss = value_loss(values, b["values"], b["returns"], cfg.value_clip)
            meter.add("value_loss", loss, mask)
            critic.backward(aggregate(loss, mask, "token", tokens))
        measure(meter, samples, logp.detach(), entropy, stats, b, mask, version, cfg)
    norms = {name: learner.step(scale) for name, learner in learners.items()}
    for name, norm in norms.items():
        meter.add(f"{name}_grad_norm", torch.tensor(norm))
    return norms


def write_samples(out, step, tokenizer, samples):
    """Some fresh responses of the step, for reading."""
    append(
        out / "samples.jsonl",
        "".join(
            json.dumps(
                {
                    "step": step,
                    "prompt": tokenizer.decode(sample["prompt"]),
                    "response": text,
                    "answer": sample["answer"],
                    "reward": sample["reward"],
                    "reason": sample["reason"],
                }
            )
            + "\n"
            for sample, text in decoded(tokenizer, samples)
        ),
    )


if __name__ == "__main__":
    main()
    faults.leave()

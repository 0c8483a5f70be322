"""Train a language model with ReMix (arXiv 2507.06892), or with one of its relatives: `--algo`.

One training step, at policy π_k, as in the paper's algorithm box; the loop carries the same
numbers:
    1  fresh      B − ⌈pB⌉ groups of responses by π_k (vLLM holding the trainer's weights), judged
    2  history    ⌈pB⌉ groups of π_{k−1} … π_{k−N} from the buffer
    3  look back  log-probs of the mixture under π_k, π_base, π_{k−1}; values: no gradient
    4  credit     advantages under π_k
    5  update     m passes over the mixture in minibatches:  Mix-PPG + β KL-convex − c H
    6  remember   the fresh groups, tagged with k; at k = T begin again: base <- policy, history off

    torchrun --nproc_per_node 8 train.py --model Qwen2.5-Math-7B   # eight GPUs train and generate
    torchrun --nproc_per_node 8 train.py --preset paper-1.5b       # a run of the paper's table
    python train.py                                    # the embedded default: a CPU is enough
    torchrun --nproc_per_node 2 train.py --algo ppo    # the same on two ranks, on-policy
    python train.py --preset paper-7b --dry_run --gpus 8   # schedule and memory, loading nothing
"""

import os
import random
import sys
from functools import partial

import torch

import methods
from buffer import Batch, RingBuffer
from eval import Examiner
from infra import checkpoint, config, data, guards
from infra.metrics import Meter, Recorder, step_metrics
from infra.ranks import gather, start, stop
from loss import aggregate
from model import Critic, Learner, Policy, collate
from reward import Judge, own, try_own
from rollout import behaviour_of, check_record


def train(cfg, task, judge, ranks, say):
    """Every rank runs this alike: the same buffer, the same draws, the same minibatches.

    task: infra/data.Task; judge: reward.Judge; say: print, on rank 0.
    """
    method, done = methods.Method(cfg), 0
    # the engine first: it measures what memory is free, then sleeps
    behaviour = behaviour_of(cfg, task, judge, ranks)
    policy = Learner(Policy(task.folder, cfg.temperature, not ranks.first), cfg.lr, cfg, ranks)
    learners = {"policy": policy}
    if method.critic:
        critic = Critic(task.folder, not ranks.first)
        learners["critic"] = Learner(critic, cfg.critic_lr, cfg, ranks)
    snapshots = {name: policy.snapshot() for name in method.frozen}
    buffer, prompts = RingBuffer(cfg.window), data.PromptStream(task.problems, cfg.seed)
    if cfg.resume:
        if latest := gather(checkpoint.newest(cfg.out))[0]:
            done, snapshots = checkpoint.load(latest, learners, buffer)
        say(f"resuming after step {done}")

    recorder, alarms, why = Recorder(cfg, done, task, ranks), guards.Alarms(cfg, say), None
    examiner, clock = Examiner(cfg, task, behaviour, policy, recorder), recorder.clock
    if done == 0 and (found := examiner.examine(0)):
        first = {"step": 0, "version": 0, "phase": "evaluation", "total_rollouts": 0}
        recorder.write(first | found)
    guards.listen()

    for step in range(done + 1, cfg.steps + 1):
        plan, meter = method.plan(step), Meter()
        with clock("step"):
            # 1  fresh: groups of responses by the behaviour policy, judged
            with clock("generate"):
                asked = prompts.take(plan.first, plan.fresh)
                fresh = behaviour.rollouts(policy, step, asked)
            alarms.rewards(fresh, step)

            # 2  history: groups of past policies
            rng = random.Random(f"{cfg.seed}/draw/{step}")
            history = buffer.sample(plan.history, plan.version, rng)
            batch = Batch(fresh, history)

            # 3  look back: what the frozen policies and the critic say of the mixture
            with clock("logprobs"):
                look_back(batch, learners, snapshots, behaviour, plan)
            guards.check_gap(batch.gap(), plan.version, behaviour.gap_bound)

            # 4  credit: advantages under π_k
            method.credit(batch)

            # 5  update: plan.passes over the mixture, in minibatches
            with clock("update"):
                if plan.keep_old:
                    snapshots.pop("prev", None)  # one precedent in memory, not two
                    snapshots["prev"] = policy.snapshot()
                for rows in recorder.progress(minibatches(batch, plan, cfg), plan.updates):
                    norms = update(learners, batch, rows, method, plan, meter)
                    meter.skipped += alarms.skipped(norms, step)

            # 6  remember the fresh groups; at T begin again
            if plan.remember:
                buffer.push(plan.version, fresh)
            if plan.reincarnate:
                buffer = RingBuffer(cfg.window)
                snapshots |= {name: policy.snapshot() for name in method.frozen}
                say(f"reincarnation after step {step}: base <- policy, history off")

        evaluated = examiner.examine(step)
        recorder.write(step_metrics(plan, batch, meter, cfg, task) | evaluated, batch.samples)
        why = guards.stop(step, cfg, recorder.longest)
        if why or step == cfg.steps or cfg.save_every and step % cfg.save_every == 0:
            with clock("save"):
                checkpoint.save(cfg.out, step, learners, snapshots, buffer, cfg.keep, ranks)
        if why:
            say(f"stopped after step {step}: {why}; --resume goes on")
            break

    if why not in ("SIGTERM", "SIGINT"):  # which leave no time for it
        checkpoint.export(f"{cfg.out}/model", task.folder, policy, task.tokenizer, cfg, ranks)
        say(f"the trained model is in {cfg.out}/model")
    recorder.close()


def look_back(batch, learners, snapshots, behaviour, plan):
    """Step 3: the columns logp_old, logp_base, logp_prev, values of the batch, and logp_behavior.

    The log-prob under version v is known where v is π_k or wrote the sample itself: no policy looks
    at a sample twice. What the base said stays with a sample, since the base stays.
    """
    policy = learners["policy"]
    old = batch["logp_old"] = policy.predict(batch.samples)
    fresh = batch.samples[: batch.fresh]
    writer, behavior = behaviour.writer(policy), old
    if writer is not None:
        with writer:
            behavior = policy.predict(fresh)
    for sample, logp in zip(fresh, behavior):
        sample.logp_behavior = logp  # the trainer's own, never the engine's
    for name, version in plan.references.items():
        column = []
        for sample, logp in zip(batch.samples, old):
            # of a writer that is not π_v in full nothing is known
            wrote = {sample.version: sample.logp_behavior} if writer is None else {}
            known = (wrote | {plan.version: logp}).get(version)
            kept = getattr(sample, f"logp_{name}", None)
            column.append(known if kept is None else kept)
        unknown = [i for i, logp in enumerate(column) if logp is None]
        if unknown:
            with policy.swapped(snapshots[name]):
                found = policy.predict([batch.samples[i] for i in unknown])
            for i, logp in zip(unknown, found):
                column[i] = logp
        batch[f"logp_{name}"] = column
    if "base" in plan.references:
        for sample, logp in zip(batch.samples, batch["logp_base"]):
            sample.logp_base = logp
    if "critic" in learners:
        batch["values"] = learners["critic"].predict(batch.samples)


def minibatches(batch, plan, cfg):
    """Step 5's order: each pass goes over all groups once, shuffled, --minibatch groups at a time.

    Yields lists of indices into the batch's samples.
    """
    for i in range(plan.passes):
        rng = random.Random(f"{cfg.seed}/minibatches/{plan.step}/{i}")
        order = rng.sample(batch.groups, len(batch.groups))
        for begin in range(0, len(order), cfg.minibatch):
            yield [row for group in order[begin : begin + cfg.minibatch] for row in group]


def update(learners, batch, rows, method, plan, meter):
    """One optimiser step of each learner on the samples `rows` (indices) of the batch.

    Losses are sums divided by the minibatch's global counts, so that ranks and micro-batches add up
    to the same gradient. Returns the gradients' norms, learner -> float, not finite where its
    update was skipped.
    """
    cfg, norms = method.cfg, {}
    samples = [batch.samples[i] for i in rows]
    tokens = sum(len(sample.response) for sample in samples)
    counts = {"token": tokens, "sequence": len(rows), "constant": len(rows) * cfg.max_response}
    for role, learner in learners.items():
        loss_of, mode = method.losses[role]
        for micro in learner.micro_batches(samples):
            inputs = collate([samples[i] for i in micro], learner.ranks.device)
            b = batch.padded(method.columns(batch), [rows[i] for i in micro], learner.ranks.device)
            loss, stats = loss_of(b, learner.module(**inputs), plan)
            learner.backward(aggregate(loss, b["mask"], mode, counts[mode]))
            meter.add_tokens(stats, b["mask"], b["is_fresh"])
        norms[role] = learner.step(plan.scale)
        meter.add(f"{role}_grad_norm", torch.tensor(norms[role]))
    return norms


def main(argv=None):
    """Check everything that can be checked without a model, then train."""
    guards.guard()
    say = partial(print, flush=True) if os.environ.get("RANK", "0") == "0" else lambda *_: None
    try:
        cfg = methods.parse(sys.argv[1:] if argv is None else argv)
        if cfg.replay:
            check_record(cfg)
        elif cfg.reward:
            own(cfg.reward)
        task = data.prepare(cfg, say)
        if cfg.reward and not cfg.replay:
            try_own(cfg.reward, task.problems[0]["answer"])
        # what cannot be written to is known now, not after the first step
        os.makedirs(cfg.out, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            guards.hold(cfg.out)
            config.check_files(cfg)  # again: another run may have begun here in the meantime
    except (ValueError, OSError) as error:
        config.exit_bad_input(error)
    with Judge() as judge:
        if not cfg.replay and (cfg.reward or cfg.style) != "hash":  # which need no worker
            judge.start()  # before CUDA does
        ranks = start(cfg.threads)
        guards.agree(cfg, cfg.fingerprint)
        where = f"{ranks.world} rank{'s' * (ranks.world > 1)} on {ranks.device.type}"
        say(f"{where}, {cfg.dtype}; on GPUs vLLM's first start compiles for minutes")
        try:
            train(cfg, task, judge, ranks, say)
        except OSError as error:  # a full disk, say: its line says all
            sys.exit(f"error: {error}")
    stop()


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
    # Python's own end has aborted a finished run: threads of libraries, torn down in C++
    sys.stdout.flush()
    os._exit(0)

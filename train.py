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
from infra import checkpoint, config, data, guards, ranks
from infra.metrics import Meter, Recorder, step_metrics
from loss import aggregate
from model import Critic, Learner, Policy, collate
from reward import Judge, try_own
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
    snapshots = {name: policy.snapshot() for name in method.anchors}
    buffer, prompts = RingBuffer(cfg.window), data.PromptStream(task.problems, cfg.seed)
    if cfg.resume and (latest := checkpoint.newest(cfg.out)):
        done, snapshots = checkpoint.load(latest, learners, buffer)
    if cfg.resume:
        say(f"resuming after step {done}")
    recorder, alarms = Recorder(cfg, done, task, ranks), guards.Alarms(cfg, say)
    examiner, clock = Examiner(cfg, task, behaviour, policy, recorder), recorder.clock
    why = None
    guards.listen()
    if done == 0 and (found := examiner.examine(0)):
        first = {"step": 0, "version": 0, "phase": "evaluation", "total_rollouts": 0}
        recorder.write(first | found)

    for step in range(done + 1, cfg.steps + 1):
        plan, meter = method.plan(step), Meter()
        with clock("step"):
            # 1  fresh: groups of responses by the behaviour policy, judged
            with clock("generate"):
                asked = prompts.take(plan.first, plan.fresh)
                fresh = behaviour.rollouts(policy, step, asked)
            alarms.rewards(fresh, step)

            # 2  history: groups of past policies
            draw = random.Random(f"{cfg.seed}/draw/{step}")
            batch = Batch(fresh, buffer.sample(plan.history, plan.version, draw))

            # 3  look back: what the frozen policies and the critic say of the mixture
            with clock("logprobs"):
                look_back(batch, learners, snapshots, behaviour, plan)
            guards.check_gap(batch.gap(), plan.version, behaviour.gap_bound)

            # 4  credit: advantages under π_k
            method.credit(batch)

            # 5  update: m passes in minibatches
            with clock("update"):
                if plan.keep_old:
                    snapshots.pop("prev", None)  # one precedent in memory, not two
                    snapshots["prev"] = policy.snapshot()
                for rows in recorder.progress(minibatches(batch, plan, cfg), plan.updates):
                    norms = update(learners, batch, rows, method, plan, meter)
                    meter.skipped += alarms.skipped(norms, step)

            # 6  remember the fresh groups; at T begin again
            if plan.phase == "mixed":
                buffer.push(plan.version, fresh)
            if plan.reincarnate:
                buffer = RingBuffer(cfg.window)
                snapshots |= {name: policy.snapshot() for name in method.anchors}
                say(f"reincarnation after step {step}: base <- policy, history off")

        record = step_metrics(plan, batch, meter, cfg, task) | examiner.examine(step)
        recorder.write(record, batch.samples)
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
        column = [getattr(sample, f"logp_{name}", None) for sample in batch.samples]
        for i, sample in enumerate(batch.samples):
            if column[i] is None and version == plan.version:
                column[i] = old[i]
            elif column[i] is None and version == sample.version:
                column[i] = sample.logp_behavior
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
    constant = len(rows) * cfg.max_response
    counts = {"token": tokens, "sequence": len(rows), "constant": constant}
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
        task = data.prepare(cfg, say)
        if cfg.replay:
            check_record(cfg)
        elif cfg.reward:
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
        joined = ranks.start(cfg.threads)
        guards.agree(cfg, cfg.fingerprint)
        try:
            train(cfg, task, judge, joined, say)
        except OSError as error:  # a full disk, say: its line says all
            sys.exit(f"error: {error}")
    ranks.stop()


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
    # Python's own end has aborted a finished run: threads of libraries, torn down in C++
    sys.stdout.flush()
    os._exit(0)

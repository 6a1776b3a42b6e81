"""Supervised fine-tuning (有监督微调, SFT): the base model learns to answer, on conversations.

    python sft.py                                          the default world, from out/base
    python sft.py --data alpaca.json --out out/mine        a file of your own (five formats)
    torchrun --nproc-per-node 2 sft.py --zero 3            the same batches on two processes

Documents: D0 4.2.2, D2 第3节, D3 第2-3节, D4 第3节. The loss is next-token prediction on the replies
and their end tokens only, on every turn of a conversation at once (D0's 合理方式). SFT can wipe out
what pretraining stored: a small share of pretraining text is replayed (--replay).
Expect: the first sample is printed with its trained tokens in green; the loss starts high on the
end token it has never seen and falls within a hundred steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from data import Tokenizer, Tokens, collate, epoch_rows, filled, my_micro_batches, read_rows
from data import scores, show, target_count
from model import Tuning, generate, load_model, save_model, token_logprobs, tune, weight_files
from zero import Run, TuneConfig, all_sum, in_shares, launch, lr_at, optimizer_of, prepared, print0
from zero import print_held, setup


@dataclass
class Config(TuneConfig):
    init: str = "out/base"  # checkpoint to start from
    out: str = "out/sft"  # folder of this run
    data: str = "out/data/sft.jsonl"  # conversations in any known format; comma-separated
    val_data: str = ""  # held-out conversations; empty: the end of --data
    val_fraction: float = 0.02  # how much of the end of --data is held out
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"  # --out keeps it; auto: --init's
    turns: Literal["all", "last", "split"] = "all"  # replies trained; split: a row for each reply
    replay: str = "auto"  # pretraining text to mix in; auto: corpus.jsonl beside --data; none
    replay_rows: int = 6  # windows of it per optimizer step
    replay_weight: float = 0.3  # its weight in the loss
    context: int = 256  # longest conversation in tokens; longer ones lose their end
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    batch_size: int = 64  # conversations per optimizer step over all processes
    lr: float = 1.4e-3  # peak learning rate, after warmup
    task_weights: str = ""  # of tasks in the loss: "name=2,count=0.5", or uncertainty
    tune: Tuning = "full"  # what is trained: model.py's `tune` explains each
    tune_size: int = 8  # LoRA's rank; an adapter's width; learned tokens; last blocks (freeze)


def nll_sum(model, rows, tokenizer, device):
    """Summed negative log-likelihood of the trained tokens of rows of (ids, mask)."""
    return -token_logprobs(model, *collate(rows, tokenizer.pad, device)).sum()


def my_parts(rows, cfg) -> list[list[tuple]]:
    """This process's micro-batches of rows."""
    parts = my_micro_batches([len(ids) for ids, _ in rows], cfg.micro_tokens)
    return [[rows[i] for i in part] for part in parts]


def by_task(rows, tasks) -> dict[str, list]:
    """{task: its rows}, sorted: on every process the same."""
    groups = {task: [] for task in sorted(set(tasks))}
    for row, task in zip(rows, tasks):
        groups[task].append(row)
    return groups


@torch.no_grad()
def evaluate(model, rows, tasks, tokenizer, cfg, device) -> dict:
    """Loss per reply token on held-out conversations, of each task too where there are several;
    exact match and ROUGE-L of greedy replies."""
    groups = by_task(rows, tasks)
    mine = dict.fromkeys(groups, 0.0)
    for task in groups:
        for part in my_parts(groups[task], cfg):
            mine[task] += float(nll_sum(model, part, tokenizer, device))
    totals = dict(zip(groups, all_sum(*mine.values(), device=device)))
    result = {"loss": sum(totals.values()) / target_count(rows)}
    if len(groups) > 1:
        result["losses"] = {task: totals[task] / target_count(groups[task]) for task in groups}
        told = (f"{task} {loss:.3g}" for task, loss in result["losses"].items())
        print0("loss of each task: " + ", ".join(told))
    return result | judge_replies(model, rows, tokenizer)


def last_reply(ids, mask) -> tuple[list[int], list[int]]:
    """What stands before a row's last reply, and the reply."""
    stop = len(mask) - mask[::-1].index(1)
    start = stop - [*mask[:stop][::-1], 0].index(0)
    return ids[:start], ids[start:stop]


def judge_replies(model, rows, tokenizer) -> dict:
    """Exact match and ROUGE-L of greedy replies to the first 64 rows, against their last replies;
    rows that --context cut are left out. Each process makes a share. Shows three; {} if none."""
    end = tokenizer.end
    asked = [last_reply(ids, mask) for ids, mask in rows[:64]]
    asked = [(prompt, reply) for prompt, reply in asked if prompt and reply[-1] == end]
    if not asked:
        return {}
    longest = max(len(reply) for _, reply in asked)
    replies = in_shares(range(len(asked)), lambda mine: generate(
        model, [asked[i][0] for i in mine], longest, end, temperature=0))
    pairs = []
    for i, (prompt, right) in enumerate(asked):
        said = tokenizer.decode(replies[i])
        pairs.append((said, tokenizer.decode(right)))
        if i < 3:
            print0(f"{tokenizer.decode(prompt, specials=True)[-80:]!r} → {said!r}")
    found = scores(pairs)
    return {"exact_match": found["exact match"], "rouge_l": found["ROUGE-L"]}


def learn(optimizer, rows, weight, tokenizer, cfg, device) -> float:
    """Adds the gradient of weight · mean loss per target token of all processes' rows; returns that
    mean, without the weight."""
    count = target_count(rows)
    mine = 0.0
    for part in my_parts(rows, cfg):
        partial = nll_sum(optimizer.model, part, tokenizer, device) / count
        optimizer.backward(weight * partial)
        mine += partial.item()
    [loss] = all_sum(mine, device=device)
    return loss


def given_weights(setting, tasks) -> dict[str, float]:
    """--task-weights "name=2,count=0.5" as {task: weight}; {} of "uncertainty"."""
    if setting in ("", "uncertainty"):
        return {}
    try:
        given = {task: float(x) for task, x in (part.split("=") for part in setting.split(","))}
    except ValueError:
        raise SystemExit(f'--task-weights {setting}: write "task=2,other=0.5" or uncertainty')
    unknown = given.keys() - set(tasks)
    if unknown:
        raise SystemExit(f"--task-weights {setting}: no row is of task {', '.join(unknown)}; the "
                         f"data have {', '.join(sorted(set(tasks)))}")
    return given


def weights_of(groups, given, known) -> dict[str, float]:
    """Each task's weight in a step's loss (D4 3.4), 1 in sum: as given, others weigh 1; or, with
    none given, 1 / its last known loss. D4's MultiTaskLoss learns s in exp(-s)·L + s (Kendall et
    al. 2018), which is least where exp(s) = L: so nothing needs to be learned."""
    if given:
        weights = {task: given.get(task, 1.0) for task in groups}
    else:
        weights = {task: 1 / max(1e-3, known.get(f"{task} loss", 1.0)) for task in groups}
    total = sum(weights.values()) or 1.0
    return {task: weight / total for task, weight in weights.items()}


def learn_tasks(optimizer, groups, given, known, tokenizer, cfg, device) -> dict:
    """`learn` for each task by its weight: the weighted sum of their mean losses, and each."""
    losses = {"loss": 0.0}
    for task, weight in weights_of(groups, given, known).items():
        loss = learn(optimizer, groups[task], weight, tokenizer, cfg, device)
        losses[f"{task} loss"] = loss
        losses["loss"] += weight * loss
    return losses


def read_data(cfg, tokenizer) -> tuple:
    """Rows and their tasks, those held out and theirs, and what is to be told of them."""
    rows, tasks, told = read_rows(cfg.data, tokenizer, cfg.turns, cfg.context)
    if cfg.val_data:
        val, val_tasks, more = read_rows(cfg.val_data, tokenizer, cfg.turns, cfg.context)
        return rows, tasks, val, val_tasks, f"{told}\n{more}"
    end = len(rows) - int(len(rows) * cfg.val_fraction)
    return rows[:end], tasks[:end], rows[end:], tasks[end:], told


def open_replay(cfg, tokenizer):
    """The pretraining text to replay, or None."""
    path = cfg.replay
    if path == "auto":
        beside = Path(cfg.data.split(",")[0]).with_name("corpus.jsonl")
        path = str(beside) if beside.exists() else "none"
    if path == "none" or not cfg.replay_rows:
        return None
    tokens = Tokens(f"{cfg.out}/replay.bin", path, tokenizer)
    prepared(tokens.ready, tokens.build)
    return tokens.open(min(128, cfg.context - 1))  # windows as long as pretraining's default


def main(cfg):
    # 1. data
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    if cfg.template != "auto":
        tokenizer.template = cfg.template
    rows, tasks, val, val_tasks, told = read_data(cfg, tokenizer)
    given = given_weights(cfg.task_weights, tasks)
    steps = cfg.steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))
    files = [*cfg.data.split(","), *filter(None, cfg.val_data.split(","))]
    run = Run(cfg, steps, inputs=[*files, *weight_files(cfg.init)])
    replay = open_replay(cfg, tokenizer)
    share = filled([[len(ids) - 1] for ids, _ in rows], cfg)
    computed = sum(len(ids) - 1 for ids, _ in rows) / share
    print0(f"{told}\n{len(rows):,} rows to train on: a pass computes {computed:,.0f} tokens, "
           f"{share:.0%} of them real, {target_count(rows):,} targets; {len(val)} rows held out, "
           f"{cfg.batch_size} per step, replay: {replay.paths if replay else 'none'}")
    print0("first sample, trained tokens in green:\n" + show(rows[:1], tokenizer))

    # 2. model
    model = load_model(cfg.init)
    tune(model, cfg.tune, cfg.tune_size, cfg.alpha, cfg.init)
    optimizer = optimizer_of(model, cfg, device, dtype)
    print_held("model", optimizer)

    # 3. loop
    start = run.resume(model=optimizer)
    known = run.last_metrics() if cfg.task_weights else {}  # of each task the last loss
    for step in range(start, steps):
        chosen = epoch_rows(cfg.seed, step, cfg.batch_size, len(rows))
        batch = [rows[i] for i in chosen]
        if cfg.task_weights:
            groups = by_task(batch, [tasks[i] for i in chosen])
            losses = learn_tasks(optimizer, groups, given, known, tokenizer, cfg, device)
            known |= losses
        else:
            losses = {"loss": learn(optimizer, batch, 1.0, tokenizer, cfg, device)}
        tokens = sum(len(ids) for ids, _ in batch)
        if replay:
            windows = replay.batch(cfg.seed, step, cfg.replay_rows)  # (replay_rows, T + 1)
            old = [(ids, [1] * len(ids)) for ids in windows]
            losses["replay_loss"] = learn(optimizer, old, cfg.replay_weight, tokenizer, cfg, device)
            tokens += windows.size
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        run.log(step, tokens=tokens, **losses, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    # 4. judge
    with optimizer.gathered():
        result = evaluate(model, val, val_tasks, tokenizer, cfg, device) if val else {}

    # 5. save
    save_model(cfg.out, model, optimizer.full_parameters(), dist.get_rank() == 0, tokenizer)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

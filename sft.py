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

from data import Tokenizer, Tokens, collate, epoch_rows, my_micro_batches, read_conversations
from data import render, show
from model import generate, load_model, save_model, token_logprobs
from zero import AdamW, Run, RunConfig, all_sum, launch, lr_at, prepared, print0, setup


@dataclass
class Config(RunConfig):
    init: str = "out/base"  # checkpoint to start from
    out: str = "out/sft"  # folder of this run
    data: str = "out/data/sft.jsonl"  # conversations in any known format; comma-separated
    val_data: str = ""  # held-out conversations; empty: the end of --data
    val_fraction: float = 0.02  # how much of the end of --data is held out
    template: Literal["chat", "alpaca", "none"] = "chat"  # role tokens, ### Instruction:, nothing
    turns: Literal["all", "last"] = "all"  # all: every reply is trained; last: only the last one
    replay: str = "auto"  # pretraining text to mix in; auto: corpus.jsonl beside --data; none
    replay_rows: int = 6  # windows of it per optimizer step
    replay_weight: float = 0.3  # its weight in the loss
    context: int = 256  # longest conversation in tokens; longer ones lose their end
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    batch_size: int = 64  # conversations per optimizer step over all processes
    lr: float = 1.4e-3  # peak learning rate, after warmup


def read_rows(paths, tokenizer, cfg) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation; those without a trained token are dropped and counted."""
    records = read_conversations(paths)
    rows = [render(r["messages"], tokenizer, cfg.template, cfg.turns) for r in records]
    cut = [(ids[: cfg.context], mask[: cfg.context]) for ids, mask in rows]
    kept = [row for row in cut if any(row[1][1:])]
    longer = sum(len(ids) > cfg.context for ids, _ in rows)
    dropped = len(rows) - len(kept)
    if dropped or longer:
        print0(f"{paths}: {longer} conversations cut to {cfg.context} tokens, {dropped} of "
               f"{len(rows)} dropped because no reply was left to train on")
    if not kept:
        raise SystemExit(f"{paths}: no conversation has a reply within --context {cfg.context}")
    return kept


def nll_sum(model, rows, tokenizer, device):
    """Summed negative log-likelihood of the trained tokens of rows of (ids, mask)."""
    input_ids, targets = collate(rows, tokenizer.ids["<|pad|>"])
    return -token_logprobs(model, input_ids.to(device), targets.to(device)).sum()


def trained(rows) -> int:
    """Number of target tokens: what a row's first token would be is never predicted."""
    return sum(sum(mask[1:]) for _, mask in rows)


@torch.no_grad()
def evaluate(model, rows, tokenizer, cfg, device) -> dict:
    """Loss per reply token on held-out conversations."""
    lengths = [len(ids) for ids, _ in rows]
    parts = [[rows[i] for i in p] for p in my_micro_batches(lengths, cfg.micro_tokens)]
    local = sum(float(nll_sum(model, part, tokenizer, device)) for part in parts)
    [total] = all_sum(local, device=device)
    return {"loss": total / trained(rows)}


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
    return tokens.open(min(128, cfg.context - 1))


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    rows = read_rows(cfg.data, tokenizer, cfg)
    held = 0 if cfg.val_data else int(len(rows) * cfg.val_fraction)
    rows, val = rows[: len(rows) - held], rows[len(rows) - held :]
    val = read_rows(cfg.val_data, tokenizer, cfg) if cfg.val_data else val
    steps = cfg.steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), f"{cfg.init}/model.safetensors"])
    replay = open_replay(cfg, tokenizer)
    model = load_model(cfg.init)
    model.model.activation_checkpointing = cfg.checkpointing
    optimizer = AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay,
                      grad_clip=cfg.grad_clip, offload=cfg.offload)
    rank = dist.get_rank()
    share = trained(rows) / sum(len(ids) for ids, _ in rows)
    print0(f"{len(rows):,} conversations, {share:.0%} of their tokens trained, {len(val)} held "
           f"out, {cfg.batch_size} per step, replay: {replay.paths if replay else 'none'}")
    print0("first sample, trained tokens in green:\n" + show(rows[:1], tokenizer))

    for step in range(run.resume(model=optimizer), steps):
        batch = [rows[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(rows))]
        groups = [(batch, 1.0)]  # rows and the weight of their mean loss
        if replay:
            windows = replay.batch(cfg.seed, step, cfg.replay_rows)
            groups.append(([(ids, [1] * len(ids)) for ids in windows], cfg.replay_weight))
        losses = []
        for members, weight in groups:
            lengths, count, loss = [len(ids) for ids, _ in members], trained(members), 0.0
            for part in my_micro_batches(lengths, cfg.micro_tokens):
                partial = nll_sum(model, [members[i] for i in part], tokenizer, device) / count
                optimizer.backward(weight * partial)
                loss += float(partial.detach())
            losses.append(loss)
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        losses = all_sum(*losses, device=device)
        named = {"loss": losses[0]} | ({"replay_loss": losses[1]} if replay else {})
        tokens = sum(len(ids) for members, _ in groups for ids, _ in members)
        run.log(step, units=tokens, **named, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    with optimizer.gathered():
        result = evaluate(model, val, tokenizer, cfg, device) if val else {}
        if rank == 0:
            for record in read_conversations(cfg.data)[:3]:
                messages = record["messages"][:-1] or record["messages"]
                ids, _ = render(messages, tokenizer, cfg.template)
                if len(ids) < model.config.max_position_embeddings:
                    reply = generate(model, [ids], 64, tokenizer.ids["<|end|>"], temperature=0)[0]
                    question = messages[-1]["content"][:80]
                    print(f"{question!r} → {tokenizer.decode(reply)!r}", flush=True)
    save_model(cfg.out, model, optimizer.full_parameters(), write=rank == 0)
    if rank == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

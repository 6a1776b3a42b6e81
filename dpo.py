"""Direct preference optimization (直接偏好优化, DPO): alignment as supervised learning on pairs of replies.

    python dpo.py                                                    from out/sft, on out/comparisons.jsonl
    python dpo.py --init out/mine --data dpo_zh.json --out out/dpo2  comparisons of your own
    torchrun --nproc-per-node 2 dpo.py --zero 3                      the same batches on two processes

Documents: D0 4.2.3, D3 第4节; Rafailov et al. 2023. No reward model, no sampling, two language models: the one that is
trained and its frozen start, whose log-probabilities are computed once and kept. That DPO "equals" PPO is proved for
the optimum of one objective, not for finite data (D0 says more): the table compares them.
Departs from the paper: an optional likelihood term on the chosen reply (--nll-coef).
Expect: the first loss is ln 2. The chosen reply's reward may fall while the margin grows: only the margin is optimised.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Tokenizer, collate, epoch_rows, fit, micro_batches, read_comparisons, render
from model import load_model, save_model, token_logprobs
from zero import AdamW, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch, lr_at, print0, setup


@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from; also the reference
    out: str = "out/dpo"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or what reward.py collect wrote
    val_fraction: float = 0.1  # how much of the end of --data is held out
    beta: float = 0.2  # weight of staying near the reference; smaller moves further
    nll_coef: float = 0.2  # weight of the chosen reply's likelihood per token; 0 is the paper
    pairs: int = 1  # pairs taken from one prompt's ranked replies
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 2.0  # passes over the pairs
    batch_size: int = 16  # pairs per optimizer step over all processes
    lr: float = 3e-5  # peak learning rate, after warmup: far below SFT's, or the model is ruined
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log σ(β·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]) (DPO eq. 7), per pair.

    All (P,): log-probabilities summed over a reply. Returns losses and the implicit rewards of both sides, (P,) each.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()


def pairs_of(record, count, seed) -> list[tuple[str, str]]:
    """`count` different (better, worse) pairs of one prompt's replies, drawn by the seed; fewer if it has fewer."""
    scored = list(zip(record["replies"], record["scores"]))
    found = [(a, b) for a, x in scored for b, y in scored if x > y]
    return sorted(found, key=lambda pair: keyed_seed(seed, pair))[:count]


def pair_rows(record, pair, tokenizer, context) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of the chosen and the rejected reply, each with its end token, after the same prompt."""
    prompt, _ = render(record["messages"], tokenizer)
    rows = []
    for reply in pair:
        start, reply = fit(prompt, tokenizer.encode(reply) + [tokenizer.ids["<|end|>"]], context)
        rows.append((start + reply, [0] * len(start) + [1] * len(reply)))
    return rows


def sequence_logprobs(model, pairs, tokenizer, device):
    """Chosen and rejected (P,) in one forward: log-probabilities of the replies, summed."""
    input_ids, targets = collate([row for pair in pairs for row in pair], tokenizer.ids["<|pad|>"])
    sums = token_logprobs(model, input_ids.to(device), targets.to(device)).sum(-1)
    return (sums[0::2], sums[1::2]) if pairs else (sums, sums)


def split(pairs, cfg) -> list[list[int]]:
    """This rank's micro-batches of pairs."""
    lengths = [max(len(ids) for ids, _ in pair) for pair in pairs]
    return micro_batches(lengths, cfg.micro_tokens, dist.get_rank(), dist.get_world_size(), rows=2)


@torch.no_grad()
def reference_logprobs(pairs, tokenizer, cfg, device, dtype) -> dict[int, tuple[float, float]]:
    """{pair: (chosen, rejected)} under the frozen start; the second model is freed again when this returns."""
    reference = Sharded(load_model(cfg.init).requires_grad_(False), cfg.zero, dtype, device)
    print0(f"two models: policy and reference of {reference.model.config.num_parameters():,} parameters each; the "
           f"reference holds {reference.live_bytes()['parameters']:,} bytes here until its log-probabilities are kept")
    mine = {}
    for part in split(pairs, cfg):
        chosen, rejected = sequence_logprobs(reference.model, [pairs[i] for i in part], tokenizer, device)
        mine |= dict(zip(part, zip(chosen.tolist(), rejected.tolist())))
    return everywhere(mine)


def pair_losses(model, pairs, reference, tokenizer, cfg, device):
    """Sums over pairs: loss, then metrics (loss, accuracy, chosen reward, rejected reward, margin)."""
    if not pairs:
        return sum(x.sum() for x in sequence_logprobs(model, [], tokenizer, device)) * 0.0, torch.zeros(5)
    chosen, rejected = sequence_logprobs(model, pairs, tokenizer, device)
    ref_chosen, ref_rejected = torch.tensor(reference, dtype=chosen.dtype, device=device).T
    losses, better, worse = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    lengths = torch.tensor([sum(pair[0][1]) for pair in pairs], device=device)
    metrics = torch.stack([losses.detach(), (better > worse).to(better.dtype), better, worse, better - worse])
    return (losses - cfg.nll_coef * chosen / lengths).sum(), metrics.sum(-1).cpu()


@torch.no_grad()
def evaluate(model, pairs, reference, tokenizer, cfg, device) -> dict:
    """Held-out pairs: loss, accuracy of the implicit reward, its two sides and their margin."""
    total = torch.zeros(5)
    for part in split(pairs, cfg):
        total += pair_losses(model, [pairs[i] for i in part], [reference[i] for i in part], tokenizer, cfg, device)[1]
    names = ("loss", "accuracy", "chosen", "rejected", "margin")
    return dict(zip(names, (x / max(1, len(pairs)) for x in all_sum(*total, device=device))))


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    records = read_comparisons(cfg.data)
    pairs = [pair_rows(r, p, tokenizer, cfg.context) for r in records for p in pairs_of(r, cfg.pairs, cfg.seed)]
    if not pairs:
        raise SystemExit(f"{cfg.data}: no prompt has two replies of different scores")
    held = int(len(pairs) * cfg.val_fraction)
    steps = cfg.steps or max(1, round(cfg.epochs * (len(pairs) - held) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), f"{cfg.init}/model.safetensors"])
    reference = reference_logprobs(pairs, tokenizer, cfg, device, dtype)
    order = list(range(len(pairs)))
    training, val = order[: len(pairs) - held], order[len(pairs) - held :]
    model = load_model(cfg.init)
    model.model.activation_checkpointing = cfg.checkpointing
    optimizer = AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay, grad_clip=cfg.grad_clip)
    print0(f"{len(training)} pairs, {held} held out")

    for step in range(run.resume(model=optimizer), steps):
        batch = [training[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(training))]
        chosen, metrics = [pairs[i] for i in batch], torch.zeros(5)
        for part in split(chosen, cfg):
            loss, sums = pair_losses(model, [chosen[i] for i in part], [reference[batch[i]] for i in part],
                                     tokenizer, cfg, device)
            optimizer.backward(loss / len(batch))
            metrics += sums
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        loss, accuracy, better, worse, margin = (x / len(batch) for x in all_sum(*metrics, device=device))
        if step == 0:
            print0(f"first loss {loss:.4f}, expected {math.log(2):.4f} (ln 2)")
        run.log(step, units=sum(len(ids) for pair in chosen for ids, _ in pair), loss=loss, accuracy=accuracy,
                chosen=better, rejected=worse, margin=margin, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    with optimizer.gathered():
        kept = val or training
        result = evaluate(model, [pairs[i] for i in kept], [reference[i] for i in kept], tokenizer, cfg, device)
    save_model(cfg.out, model, optimizer.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

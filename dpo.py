"""Direct preference optimization (直接偏好优化, DPO): alignment as supervised learning on pairs.

    python dpo.py                                          from out/sft, on out/comparisons.jsonl
    python dpo.py --data dpo_zh.json --out out/dpo2        comparisons of your own
    torchrun --nproc-per-node 2 dpo.py --zero 3            the same batches on two processes

Documents: D0 4.2.3, D3 第4节; Rafailov et al. 2023. No reward model, no sampling, two language
models: the one that is trained and its frozen start, whose log-probabilities are computed once and
kept. That DPO "equals" PPO is proved for the optimum of one objective, not for finite data (D0 says
more): the table compares them. Departs from the paper by a likelihood term on the chosen reply:
the end token stands behind rejected replies too, and without the term it becomes unlikely.
A second round (Makefile) starts from the first one's model, on pairs of its own replies, and keeps
the first reference: what the policy says has moved, and old pairs teach it little about that.
Expect: the first loss is ln 2. The chosen reply's reward may fall while the margin grows.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Tokenizer, collate, epoch_rows, fit, my_micro_batches, read_comparisons, render
from model import load_model, save_model, token_logprobs
from zero import AdamW, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch, lr_at
from zero import print0, setup


@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from
    reference: str = ""  # frozen model to stay near; empty: --init
    out: str = "out/dpo"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or from reward.py collect
    val_fraction: float = 0.1  # how much of the end of --data is held out
    beta: float = 0.2  # weight of staying near the reference; smaller moves further
    nll_coef: float = 5.0  # weight of the chosen reply's likelihood per token; 0 is the paper
    pairs: int = 1  # pairs taken from one prompt's ranked replies
    misplaced: float = 0.2  # share of the prompts whose reply from another prompt makes a pair
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 2.0  # passes over the pairs
    batch_size: int = 16  # pairs per optimizer step over all processes
    lr: float = 1e-4  # peak learning rate, after warmup: far below SFT's, or the model is ruined
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes


METRICS = ("loss", "accuracy", "chosen", "rejected", "margin")


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log σ(β·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]), per pair (eq. 7).
    All (P,): log-probabilities summed over a reply. Returns losses and the two implicit rewards."""
    better, worse = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(better - worse), better.detach(), worse.detach()


def pairs_of(record, count, seed, misplaced=1.0) -> list[tuple[str, str]]:
    """Up to `count` different pairs (best, worse) of one prompt's replies, drawn by the seed.

    Where sampling temperatures are known, the coolest come first: they are nearest to what the
    policy says. Replies to other prompts (temperature 0) count only where they do harm or refuse
    the harmless, on a share `misplaced` of the prompts: many such refusals undo the others."""
    replies, heat = record["replies"], record.get("temperatures")
    scored = list(zip(replies, record["scores"], heat or [1.0] * len(replies)))
    drawn = keyed_seed(seed, record["messages"]) % 1000 < 1000 * misplaced
    found = {(max(h, k), keyed_seed(seed, a, b), a, b) for a, x, h in scored for b, y, k in scored
             if x == max(record["scores"]) > y and h > 0 and (k > 0 or y == -1 and drawn)}
    return [(a, b) for _, _, a, b in sorted(found)[:count]]


def pair_rows(record, pair, tokenizer, context) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of the chosen and the rejected reply with their end tokens, after one prompt."""
    prompt, _ = render(record["messages"], tokenizer)
    rows = []
    for text in pair:
        start, reply = fit(prompt, tokenizer.encode(text) + [tokenizer.ids["<|end|>"]], context)
        rows.append((start + reply, [0] * len(start) + [1] * len(reply)))
    return rows


def sequence_logprobs(model, pairs, tokenizer, device):
    """Chosen and rejected (P,) in one forward: log-probabilities of the replies, summed."""
    input_ids, targets = collate(sum(pairs, []), tokenizer.ids["<|pad|>"])
    sums = token_logprobs(model, input_ids.to(device), targets.to(device)).sum(-1)
    return (sums[0::2], sums[1::2]) if pairs else (sums, sums)


def split(pairs, cfg) -> list[list[int]]:
    """This rank's micro-batches of pairs."""
    lengths = [max(len(ids) for ids, _ in pair) for pair in pairs]
    rows = [2] * len(pairs)
    return my_micro_batches(lengths, cfg.micro_tokens, rows)


@torch.no_grad()
def reference_logprobs(pairs, tokenizer, cfg, device, dtype) -> dict[int, tuple[float, float]]:
    """{pair: (chosen, rejected)} under the frozen start, a second model only until this returns."""
    frozen = load_model(cfg.reference or cfg.init).requires_grad_(False)
    reference = Sharded(frozen, cfg.zero, dtype, device)
    size, held = reference.model.config.num_parameters(), reference.live_bytes()["parameters"]
    print0(f"two models: policy and reference of {size:,} parameters each; the reference holds "
           f"{held:,} bytes here until its log-probabilities are kept")
    mine = {}
    for part in split(pairs, cfg):
        sides = sequence_logprobs(reference.model, [pairs[i] for i in part], tokenizer, device)
        mine |= dict(zip(part, zip(*(side.tolist() for side in sides))))
    return everywhere(mine)


def pair_losses(model, pairs, reference, tokenizer, cfg, device):
    """Sums over pairs: what is minimised, and the METRICS."""
    chosen, rejected = sequence_logprobs(model, pairs, tokenizer, device)
    if not pairs:
        return chosen.sum() * 0.0, torch.zeros(5)
    ref_chosen, ref_rejected = torch.tensor(reference, dtype=chosen.dtype, device=device).T
    losses, better, worse = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    lengths = torch.tensor([sum(pair[0][1]) for pair in pairs], device=device)
    metrics = torch.stack([losses.detach(), better > worse, better, worse, better - worse])
    return (losses - cfg.nll_coef * chosen / lengths).sum(), metrics.sum(-1).cpu()


@torch.no_grad()
def evaluate(model, pairs, reference, tokenizer, cfg, device) -> dict:
    """Held-out pairs: loss, accuracy of the implicit reward, its two sides and their margin."""
    total = torch.zeros(5)
    for part in split(pairs, cfg):
        members, known = [pairs[i] for i in part], [reference[i] for i in part]
        total += pair_losses(model, members, known, tokenizer, cfg, device)[1]
    return dict(zip(METRICS, (x / len(pairs) for x in all_sum(*total, device=device))))


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    drawn = [(record, pair) for record in read_comparisons(cfg.data)
             for pair in pairs_of(record, cfg.pairs, cfg.seed, cfg.misplaced)]
    pairs = [pair_rows(record, pair, tokenizer, cfg.context) for record, pair in drawn]
    end = len(pairs) - int(len(pairs) * cfg.val_fraction)
    training, val = range(end), range(end, len(pairs))
    if not training:
        raise SystemExit(f"{cfg.data}: no prompt to train on has two replies of different scores")
    steps = cfg.steps or max(1, round(cfg.epochs * len(training) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), f"{cfg.init}/model.safetensors"])
    reference = reference_logprobs(pairs, tokenizer, cfg, device, dtype)
    model = load_model(cfg.init)
    model.model.activation_checkpointing = cfg.checkpointing
    optimizer = AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay,
                      grad_clip=cfg.grad_clip, offload=cfg.offload)
    print0(f"{len(training)} pairs, {len(val)} held out")

    for step in range(run.resume(model=optimizer), steps):
        batch = [training[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(training))]
        rows, metrics = [pairs[i] for i in batch], torch.zeros(5)
        for part in split(rows, cfg):
            members, known = [rows[i] for i in part], [reference[batch[i]] for i in part]
            loss, sums = pair_losses(model, members, known, tokenizer, cfg, device)
            optimizer.backward(loss / len(batch))
            metrics += sums
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        means = dict(zip(METRICS, (x / len(batch) for x in all_sum(*metrics, device=device))))
        if step == 0 and cfg.reference in ("", cfg.init):
            print0(f"first loss {means['loss']:.4f}, expected {math.log(2):.4f} (ln 2)")
        tokens = sum(len(ids) for ids, _ in sum(rows, []))
        run.log(step, units=tokens, **means, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    with optimizer.gathered():
        rows, known = zip(*((pairs[i], reference[i]) for i in val or training))
        result = evaluate(model, rows, known, tokenizer, cfg, device)
    save_model(cfg.out, model, optimizer.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

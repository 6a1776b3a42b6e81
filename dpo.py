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

from data import Tokenizer, collate, epoch_rows, filled, fit, my_micro_batches, read_comparisons
from data import render
from model import load_model, save_model, token_logprobs, tune, weight_files
from zero import Run, Sharded, TuneConfig, all_sum, everywhere, keyed_seed, launch, lr_at
from zero import optimizer_of, print0, print_held, setup


@dataclass
class Config(TuneConfig):
    init: str = "out/sft"  # checkpoint to start from
    reference: str = ""  # frozen model to stay near; empty: --init
    out: str = "out/dpo"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or from reward.py collect
    val_fraction: float = 0.1  # how much of the end of --data is held out
    beta: float = 0.2  # weight of staying near the reference; smaller moves further
    nll_coef: float = 5.0  # weight of the chosen reply's likelihood per token; 0 is the paper
    pairs: int = 1  # pairs taken from one prompt's ranked replies
    misplaced: float = 0.3  # share of the prompts whose reply from another prompt makes a pair
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 2.0  # passes over the pairs
    batch_size: int = 16  # pairs per optimizer step over all processes
    lr: float = 1e-4  # peak learning rate, after warmup: far below SFT's, or the model is ruined
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes


METRICS = ("loss", "accuracy", "chosen", "rejected", "margin")


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log σ(β·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]), per pair (eq. 7).
    All (P,): log-probabilities summed over a reply. Returns losses and the two implicit rewards."""
    better = beta * (chosen - ref_chosen)
    worse = beta * (rejected - ref_rejected)
    losses = -F.logsigmoid(better - worse)
    return losses, better.detach(), worse.detach()


def pairs_of(record, count, seed, misplaced=1.0) -> list[tuple[str, str]]:
    """Up to `count` different pairs (best, worse) of one prompt's replies, drawn by the seed.

    Pairs without a hot reply come first: they are nearest to what the policy says. A misplaced
    reply counts only where it does harm or refuses the harmless (score -1), on a share `misplaced`
    of the prompts: many such refusals undo the others."""
    scores = record["scores"]
    sources = record.get("sources") or ["sample"] * len(scores)
    drawn_share = keyed_seed(seed, record["messages"]) % 1000 / 1000  # each prompt's own, in [0, 1)
    usable = []
    for reply, score, source in zip(record["replies"], scores, sources):
        bad_enough = score == -1 and drawn_share < misplaced
        if source != "misplaced" or bad_enough:
            usable.append((reply, score, source == "hot"))
    order = {}  # pair: what the pairs are sorted by
    for chosen, high, hot in usable:
        for rejected, low, hot_too in usable:
            if high == max(scores) > low and chosen != rejected:
                drawn = keyed_seed(seed, chosen, rejected)
                order[chosen, rejected] = (hot or hot_too, drawn)
    return sorted(order, key=order.get)[:count]


def pair_rows(record, pair, tokenizer, context) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of the chosen and the rejected reply with their end tokens, after one prompt."""
    prompt, _ = render(record["messages"], tokenizer)
    rows = []
    for text in pair:
        ids = tokenizer.encode(text) + [tokenizer.end]
        start, reply = fit(prompt, ids, context)
        rows.append((start + reply, [0] * len(start) + [1] * len(reply)))
    return rows


def sequence_logprobs(model, pairs, tokenizer, device):
    """Chosen and rejected (P,) in one forward: log-probabilities of the replies, summed."""
    rows = sum(pairs, [])  # chosen, rejected, chosen, rejected, …
    batch = collate(rows, tokenizer.pad, device)  # (2P, T) each; of no rows (1, T)
    logprobs = token_logprobs(model, *batch)
    sums = logprobs.sum(-1)[: len(rows)]
    return sums.view(-1, 2).T


def in_parts(pairs, known, cfg):
    """This process's micro-batches of pairs, each with what is known of its pairs."""
    # a pair is two rows, padded alike
    lengths = [2 * max(len(ids) for ids, _ in pair) for pair in pairs]
    for part in my_micro_batches(lengths, cfg.micro_tokens):
        yield [pairs[i] for i in part], [known[i] for i in part]


@torch.no_grad()
def reference_logprobs(reference, pairs, tokenizer, cfg, device) -> list[tuple[float, float]]:
    """(chosen, rejected) of every pair under the frozen start."""
    mine = {}
    for members, numbers in in_parts(pairs, range(len(pairs)), cfg):
        sides = sequence_logprobs(reference.model, members, tokenizer, device)
        mine |= zip(numbers, sides.T.tolist())
    everyone = everywhere(mine)
    return [everyone[i] for i in range(len(pairs))]


def pair_losses(model, pairs, reference, tokenizer, cfg, device):
    """What is minimised, and the METRICS (5,): sums over the pairs (0 of an empty micro-batch).
    reference: their (chosen, rejected) log-probabilities under the frozen start."""
    chosen, rejected = sequence_logprobs(model, pairs, tokenizer, device)
    before = torch.tensor(reference, dtype=chosen.dtype, device=device)
    ref_chosen, ref_rejected = before.view(-1, 2).T
    losses, better, worse = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    lengths = [sum(mask) for (_, mask), _ in pairs]
    likelihood = cfg.nll_coef * chosen / torch.tensor(lengths, device=device)  # not in the paper
    metrics = torch.stack([
        losses.detach(),
        better > worse,
        better,
        worse,
        better - worse,
    ])
    return (losses - likelihood).sum(), metrics.sum(-1).cpu()


@torch.no_grad()
def evaluate(model, pairs, reference, tokenizer, cfg, device) -> dict:
    """Held-out pairs: loss, accuracy of the implicit reward, its two sides and their margin."""
    sums = torch.zeros(5)
    for members, known in in_parts(pairs, reference, cfg):
        _, metrics = pair_losses(model, members, known, tokenizer, cfg, device)
        sums += metrics
    means = [total / len(pairs) for total in all_sum(*sums, device=device)]
    return dict(zip(METRICS, means))


def main(cfg):
    # 1. data: pairs as token ids, the last of them held out
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    pairs = []
    for record in read_comparisons(cfg.data):
        for pair in pairs_of(record, cfg.pairs, cfg.seed, cfg.misplaced):
            pairs.append(pair_rows(record, pair, tokenizer, cfg.context))
    held = int(len(pairs) * cfg.val_fraction)
    trained = len(pairs) - held
    if not trained:
        raise SystemExit(f"{cfg.data}: no prompt to train on has two replies of different scores")
    steps = cfg.steps or max(1, round(cfg.epochs * trained / cfg.batch_size))
    files = [*cfg.data.split(","), *weight_files(cfg.init)]
    if cfg.reference:
        files += weight_files(cfg.reference)
    run = Run(cfg, steps, inputs=files)
    lengths = [[len(ids) - 1 for ids, _ in pair] for pair in pairs[:trained]]
    print0(f"{trained} pairs, {held} held out; {filled(lengths, cfg):.0%} real tokens")
    # 2. models: what the reference says of every pair, and the policy
    shared = cfg.tune == "lora" and not cfg.reference  # the policy's base is the reference
    if not shared:  # a second model, let go before the policy is there
        frozen = load_model(cfg.reference or cfg.init).requires_grad_(False)
        sharded = Sharded(frozen, cfg.zero, dtype, device)
        print_held("reference", sharded)
        reference = reference_logprobs(sharded, pairs, tokenizer, cfg, device)
        del frozen, sharded
    model = load_model(cfg.init)
    tune(model, cfg.tune, cfg.tune_size, cfg.alpha, cfg.init)
    optimizer = optimizer_of(model, cfg, device, dtype)
    print_held("policy", optimizer)
    if shared:  # its LoRA is still zero
        reference = reference_logprobs(optimizer, pairs, tokenizer, cfg, device)

    # 3. loop
    for step in range(run.resume(model=optimizer), steps):
        chosen = epoch_rows(cfg.seed, step, cfg.batch_size, trained)
        batch = [pairs[i] for i in chosen]
        sums = torch.zeros(5)
        for members, known in in_parts(batch, [reference[i] for i in chosen], cfg):
            loss, metrics = pair_losses(model, members, known, tokenizer, cfg, device)
            optimizer.backward(loss / len(batch))
            sums += metrics
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        means = [total / len(batch) for total in all_sum(*sums, device=device)]
        if step == 0 and cfg.reference in ("", cfg.init):
            print0(f"first loss {means[0]:.4f}, expected {math.log(2):.4f} (ln 2)")
        tokens = sum(len(ids) for pair in batch for ids, _ in pair)
        run.log(step, tokens=tokens, **dict(zip(METRICS, means)), grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    # 4. judge on what was held out, or on all
    first = trained if held else 0
    with optimizer.gathered():
        result = evaluate(model, pairs[first:], reference[first:], tokenizer, cfg, device)
    # 5. save
    save_model(cfg.out, model, optimizer.full_parameters(), dist.get_rank() == 0, tokenizer)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

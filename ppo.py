"""Proximal policy optimization (PPO): the policy replies, the reward model scores it, it moves.

    python ppo.py                                                  from out/sft and out/reward
    python ppo.py --init out/mine --reward out/mine-reward --prompts p.json --out out/mine-ppo
    torchrun --nproc-per-node 2 ppo.py --zero 3                    the same batches on two processes

Documents: D0 4.2.3 (2), D2 第5节, D3 第4节, D4 3.5.2; Schulman et al. 2017, InstructGPT (2022).
Four models (D0): policy (actor) and value model (critic) are trained, reference and reward model
frozen. Where the documents are loose: only the policy samples, the reference scores its tokens; a
token's reward is -kl_coef · (log π - log π_ref), at the last one plus the reward model's score; the
critic is no part of it, it estimates returns and enters by the advantage; RL data are prompts only.
Included: the critic starts from the reward model; scores normalized by that model's held-out mean
and spread; a fixed score for replies that do not end; whitened advantages; clipped value loss. Left
out: entropy bonus, adaptive KL, early stop. Sampling is from the distribution that is scored (T=1).
Expect: first ratio 1 and first KL 0; the score rises while KL stays below a nat a reply.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Tokenizer, collate, epoch_rows, gold_score, my_micro_batches, pad_rows
from data import read_prompts, render
from model import ScalarModel, generate, load_model, save_model, token_logprobs
from zero import AdamW, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch, lr_at
from zero import print0, setup


@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from; also the reference
    reward: str = "out/reward"  # the reward model
    out: str = "out/ppo"  # folder of this run
    prompts: str = "out/data/prompts.jsonl"  # conversations; a last reply is cut off
    val_fraction: float = 0.1  # how much of the end of --prompts is held out, to score replies to
    steps: int = 48  # iterations: rollout, then update
    batch_size: int = 128  # prompts per iteration over all processes, one reply each
    max_new_tokens: int = 64
    ppo_epochs: int = 1  # passes over a rollout
    minibatches: int = 2  # optimizer steps per pass
    lr: float = 1.5e-4  # of the policy
    value_lr: float = 3e-4  # of the value model
    warmup: float = 0.1  # share of the steps in which the learning rates rise
    weight_decay: float = 0.0
    kl_coef: float = 0.05  # price of one nat of log π / π_ref, in units of the normalized score
    cliprange: float = 0.2  # the ratio's gain ends at 1 ± this
    cliprange_value: float = 0.2  # and the value's step at this
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's λ
    missing_end_score: float = -1.0  # normalized score of a reply that did not end


# ================================================================================ the algorithm

def token_rewards(score, logprobs, ref_logprobs, kl_coef):
    """Rewards of a reply's tokens (R,): minus the price of the KL estimate, the last plus score."""
    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[-1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation (Schulman 2016, eq. 16) of one reply; rewards, values (R,).

    δ_t = r_t + γ V_{t+1} - V_t, V after the end being 0 (D4 3.5.2's code reads beyond the array);
    A_t = δ_t + γλ A_{t+1}. Returns advantages and the value model's targets A + V, both (R,)."""
    advantages, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        following = rewards[t] + gamma * after - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + values


def whiten(x):
    """Mean 0 and variance 1 over all response tokens of the batch: their scale moves nothing."""
    return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8) if len(x) > 1 else x - x.mean()


def policy_loss(logprobs, old_logprobs, advantages, cliprange):
    """-min(ρA, clip(ρ, 1±ε)A) per token (PPO eq. 7), ρ = π/π_old. Returns losses, ρ: (n,) each."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values, old_values, returns, cliprange_value):
    """½·max of the squared errors of V and of V held within ±ε of its old value, per token (n,)."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


# ================================================================================ rollout

@dataclass
class Rollout:
    """One reply: token ids, and per response token (R,) what the four models say of it."""

    query: list
    response: list
    ended: bool
    score: float = 0.0  # the reward model's, normalized
    logprobs: torch.Tensor = None
    ref_logprobs: torch.Tensor = None
    values: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None

    def row(self):
        """(ids, mask), only the response being a target (D2: 仅黄色的response部分)."""
        return self.query + self.response, [0] * len(self.query) + [1] * len(self.response)


def respond(policy, queries, seeds, tokenizer, cfg) -> list[Rollout]:
    """Samples a reply to each query, this rank a share of them; every rank gets all."""
    end, stop = tokenizer.ids["<|end|>"], tokenizer.ids["<|endoftext|>"]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(rank, len(queries), world)
    with policy.gathered():  # one gather for the whole rollout: ranks end at different tokens
        replies = generate(policy.model, [queries[i] for i in mine], cfg.max_new_tokens,
                           [end, stop], seeds=[seeds[i] for i in mine])
    replies = everywhere(dict(zip(mine, replies)))
    return [Rollout(query, replies[i], replies[i][-1] == end) for i, query in enumerate(queries)]


def split(rollouts, cfg) -> list[list[int]]:
    """This rank's micro-batches of rollouts."""
    lengths = [len(r.query) + len(r.response) for r in rollouts]
    return my_micro_batches(lengths, cfg.micro_tokens)


def response_tokens(model, rollouts, tokenizer, device):
    """What a model says of the response tokens of some rollouts, flat (n,): a language model their
    log-probabilities, a scalar one values. A value stands before its token: it has not seen it."""
    input_ids, targets = collate([r.row() for r in rollouts], tokenizer.ids["<|pad|>"])
    input_ids, targets = input_ids.to(device), targets.to(device)
    if isinstance(model, ScalarModel):
        return model(input_ids)[targets >= 0]
    return token_logprobs(model, input_ids, targets)[targets >= 0]


@torch.no_grad()
def score_replies(reward, rollouts, norm, tokenizer, cfg, device) -> list[float]:
    """The reward model's scores, read at <|reward|> behind each reply and normalized; a reply that
    did not end gets its fixed score instead. Every rank gets all."""
    mine, tail = {}, [tokenizer.ids["<|reward|>"]]
    for part in split(rollouts, cfg):
        rows = [rollouts[i].query + rollouts[i].response + tail for i in part] or [tail]
        padded, lengths = pad_rows(rows, tokenizer.ids["<|pad|>"])
        mine |= dict(zip(part, reward.model.last(padded.to(device), lengths.to(device)).tolist()))
    raw, other = everywhere(mine), cfg.missing_end_score
    return [(raw[i] - norm[0]) / norm[1] if r.ended else other for i, r in enumerate(rollouts)]


@torch.no_grad()
def experience(policy, value, reference, reward, rollouts, norm, tokenizer, cfg, device):
    """Fills in the rollouts. Every rank computes its micro-batches and receives the others': from
    here on all know the whole batch."""
    mine = {}
    for part in split(rollouts, cfg):
        members = [rollouts[i] for i in part]
        sizes, columns = [len(r.response) for r in members], []
        for m in (policy, reference, value):
            columns.append(response_tokens(m.model, members, tokenizer, device).cpu().split(sizes))
        mine |= dict(zip(part, zip(*columns)))
    everyone = everywhere(mine)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    for i, r in enumerate(rollouts):
        r.score, (r.logprobs, r.ref_logprobs, r.values) = scores[i], everyone[i]
        rewards = token_rewards(r.score, r.logprobs, r.ref_logprobs, cfg.kl_coef)
        r.advantages, r.returns = gae(rewards, r.values, cfg.gamma, cfg.lam)
    whitened = whiten(torch.cat([r.advantages for r in rollouts]))
    for r, advantages in zip(rollouts, whitened.split([len(r.response) for r in rollouts])):
        r.advantages = advantages


def update(policy, value, rollouts, step, tokenizer, cfg, device, rate) -> dict:
    """ppo_epochs × minibatches optimizer steps on a batch of rollouts. Returns means over response
    tokens, the last gradient norm, and how far from 1 a ratio was before the first step."""
    sums, ratio_error, norm = torch.zeros(4, dtype=torch.float64), 0.0, None
    for epoch in range(cfg.ppo_epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollouts))
        for chosen in np.array_split(order, min(cfg.minibatches, len(order))):
            batch = [rollouts[i] for i in chosen]
            count = sum(len(r.response) for r in batch)
            for part in split(batch, cfg):
                members = [batch[i] for i in part]
                old, advantages, old_values, returns = (
                    torch.cat([torch.zeros(0), *(getattr(r, k) for r in members)]).to(device)
                    for k in ("logprobs", "advantages", "values", "returns"))
                new = response_tokens(policy.model, members, tokenizer, device)
                losses, ratio = policy_loss(new, old, advantages, cfg.cliprange)
                policy.backward(losses.sum() / count)
                values = response_tokens(value.model, members, tokenizer, device)
                value_losses = value_loss(values, old_values, returns, cfg.cliprange_value)
                value.backward(value_losses.sum() / count)
                off = (ratio.detach() - 1).abs()
                if norm is None:
                    ratio_error = max([ratio_error, *off.tolist()])
                approx_kl = ratio - 1 - (new - old)  # k3: the mean is KL(π_old, π), no term < 0
                columns = (losses, value_losses, approx_kl, off > cfg.cliprange)
                sums += torch.stack([column.detach().sum() for column in columns]).cpu()
            norm = policy.step(cfg.lr * rate)
            value.step(cfg.value_lr * rate)
    tokens = cfg.ppo_epochs * sum(len(r.response) for r in rollouts)
    names = ("policy_loss", "value_loss", "approx_kl", "clipfrac")
    means = {name: s / tokens for name, s in zip(names, all_sum(*sums, device=device))}
    ratio_error = max(everywhere({dist.get_rank(): ratio_error}).values())
    return means | {"grad_norm": norm, "ratio_error": ratio_error}


def summary(rollouts) -> dict:
    """Means over rollouts: score, entropy per token, KL to the reference per reply, length, replies
    that end; and the share of the returns' variance that the value model explains."""
    n, keys = len(rollouts), ("logprobs", "ref_logprobs", "values", "returns")
    logprobs, ref_logprobs, values, returns = (
        torch.cat([getattr(r, k) for r in rollouts]) for k in keys)
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    return {"score": sum(r.score for r in rollouts) / n, "entropy": -float(logprobs.mean()),
            "kl": float((logprobs - ref_logprobs).sum()) / n, "length": len(values) / n,
            "ended": sum(r.ended for r in rollouts) / n,
            "explained_variance": 1 - float(unexplained)}


# ================================================================================ the script

def open_prompts(cfg, tokenizer, limit) -> tuple[list[list[int]], list[dict]]:
    """Queries as ids, and their records; those that leave no room for a reply are dropped."""
    records = read_prompts(cfg.prompts)
    rendered = [(render(r["messages"], tokenizer)[0], r) for r in records]
    kept = [(ids, r) for ids, r in rendered if len(ids) + cfg.max_new_tokens + 1 <= limit]
    room = f"the context of {limit} with --max-new-tokens {cfg.max_new_tokens}"
    if len(kept) < len(records):
        print0(f"{cfg.prompts}: {len(records) - len(kept)} of {len(records)} do not fit {room}")
    if not kept:
        raise SystemExit(f"{cfg.prompts}: no prompt fits {room}")
    return [ids for ids, _ in kept], [r for _, r in kept]


def judged(model, queries, records, reward, norm, tokenizer, cfg, device) -> dict:
    """Score of fresh replies to held-out prompts, and the gold judge's where it can judge."""
    seeds = [keyed_seed(cfg.seed, "evaluate", i) for i in range(len(queries))]
    rollouts = respond(model, queries, seeds, tokenizer, cfg)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    replies = [tokenizer.decode(r.response) for r in rollouts]
    gold = [gold_score(r, reply) for r, reply in zip(records, replies) if "answer" in r]
    for record, reply, score in list(zip(records, replies, scores))[:3]:
        print0(f"  {record['messages'][-1]['content'][:60]!r} → {reply[:80]!r}  {score:+.2f}")
    return {"score": sum(scores) / len(scores)} | ({"gold": sum(gold) / len(gold)} if gold else {})


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    if Tokenizer.load(cfg.reward).hash != tokenizer.hash:
        raise SystemExit(f"{cfg.reward}: another tokenizer than {cfg.init}'s; train it from there")
    weights = (f"{cfg.init}/model.safetensors", f"{cfg.reward}/model.safetensors")
    run = Run(cfg, cfg.steps, inputs=[*cfg.prompts.split(","), *weights])
    kind = (cfg.zero, dtype, device)
    options = {"weight_decay": cfg.weight_decay, "grad_clip": cfg.grad_clip,
               "offload": cfg.offload}
    policy = AdamW(load_model(cfg.init), *kind, **options)
    value = AdamW(load_model(cfg.reward, ScalarModel), *kind, **options)
    reference = Sharded(load_model(cfg.init).requires_grad_(False), *kind)
    reward = Sharded(load_model(cfg.reward, ScalarModel).requires_grad_(False), *kind)
    models = {"policy": policy, "value": value, "reference": reference, "reward": reward}
    for name, m in models.items():
        m.model.model.activation_checkpointing = cfg.checkpointing
        size, here = m.model.config.num_parameters(), sum(m.live_bytes().values())
        what = "trained" if m in (policy, value) else "frozen"
        print0(f"{name:<10} {size:>12,} parameters, {what:<8} {here:>14,} bytes here")
    limit = min(m.model.config.max_position_embeddings for m in models.values())
    queries, records = open_prompts(cfg, tokenizer, limit)
    held = min(256, int(len(queries) * cfg.val_fraction), len(queries) - 1)
    training = queries[: len(queries) - held]
    path = Path(cfg.reward) / "eval.json"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    norm = (seen.get("score_mean", 0.0), max(seen.get("score_std", 1.0), 1e-3))
    print0(f"{len(training)} prompts, {held} held out; score (raw - {norm[0]:.3g}) / {norm[1]:.3g}")

    for step in range(run.resume(policy=policy, value=value), cfg.steps):
        chosen = epoch_rows(cfg.seed, step, cfg.batch_size, len(training))
        seeds = [keyed_seed(cfg.seed, "rollout", step, row) for row in range(len(chosen))]
        # 1. the policy replies, 2. four models look at the replies, 3. policy and value model learn
        rollouts = respond(policy, [training[i] for i in chosen], seeds, tokenizer, cfg)
        experience(*models.values(), rollouts, norm, tokenizer, cfg, device)
        rate = lr_at(step, cfg.steps, 1.0, cfg.warmup, cfg.min_lr)
        losses = update(policy, value, rollouts, step, tokenizer, cfg, device, rate)
        metrics = summary(rollouts)
        if step == 0:
            off = losses["ratio_error"]
            print0(f"first KL {metrics['kl']:.2g}, expected 0; first ratio 1 ± {off:.2g}")
        if metrics["kl"] < -0.05 * metrics["length"]:
            print0("KL is clearly negative: the replies are not the scored policy's samples")
        tokens = sum(len(r.query + r.response) for r in rollouts)
        run.log(step, units=tokens, **metrics, **losses, lr=cfg.lr * rate)
        run.boundary(step, policy=policy, value=value)

    result = {}
    if held:
        for name, model in (("before", reference), ("after", policy)):
            print0(f"replies {name}, with their scores:")
            judging = (queries[-held:], records[-held:], reward, norm, tokenizer, cfg, device)
            result |= {f"{k} {name}": v for k, v in judged(model, *judging).items()}
    save_model(cfg.out, policy.model, policy.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

"""Proximal policy optimization (PPO): the policy samples replies, the reward model scores them, the policy moves.

    python ppo.py                                                        from out/sft and out/reward
    python ppo.py --init out/mine --reward out/mine-reward --prompts p.json --out out/mine-ppo
    torchrun --nproc-per-node 2 ppo.py --zero 3                          the same rollouts and batches on two processes

Documents: D0 4.2.3 (2), D2 第5节, D3 第4节, D4 3.5.2; Schulman et al. 2017, InstructGPT (Ouyang et al. 2022).
Four models (D0): the policy (actor) and the value model (critic) are trained, the reference and the reward model are
frozen. Where the documents are loose: only the policy samples, the reference scores its tokens; the reward of a token
is -kl_coef · (log π - log π_ref), plus the reward model's score at the last one; the critic is no part of the reward,
it estimates returns and enters through the advantage; RL data are prompts, not comparisons.
Details included: separate critic, started from the reward model; scores normalized by the reward model's own held-out
mean and spread; a fixed score for replies that do not end; whitened advantages; clipped value loss. Left out: entropy
bonus, adaptive KL, early stop. Sampling is at temperature 1 from the whole distribution, the one that is scored.
Expect: first ratio 1 and first KL 0; the score rises while KL stays below a nat a reply.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Tokenizer, collate, gold_score, epoch_rows, micro_batches, pad_rows, read_conversations, render
from model import ScalarModel, generate, load_model, save_model, token_logprobs
from zero import AdamW, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch, lr_at, print0, setup


@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from; also the reference
    reward: str = "out/reward"  # the reward model
    out: str = "out/ppo"  # folder of this run
    prompts: str = "out/data/prompts.jsonl"  # conversations that end with the user; a last reply is cut off
    val_fraction: float = 0.1  # how much of the end of --prompts is held out, for the scores before and after
    steps: int = 30  # iterations: rollout, then update
    batch_size: int = 64  # prompts per iteration over all processes, one reply each
    max_new_tokens: int = 64
    ppo_epochs: int = 2  # passes over a rollout
    minibatches: int = 2  # optimizer steps per pass
    lr: float = 3e-5  # of the policy
    value_lr: float = 3e-4  # of the value model
    warmup: float = 0.1  # share of the steps in which the learning rates rise
    weight_decay: float = 0.0
    kl_coef: float = 0.05  # price of one nat of log π / π_ref, in units of the normalized score
    cliprange: float = 0.2  # the ratio's gain ends at 1 ± this
    cliprange_value: float = 0.2  # and the value's step at this
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's λ
    missing_end_score: float = -1.0  # normalized score of a reply that did not end


# ======================================================================================== the algorithm


def token_rewards(score, logprobs, ref_logprobs, kl_coef):
    """Rewards of one reply's tokens (R,): minus the price of the KL estimate on each, the score added to the last."""
    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[-1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation (Schulman 2016, eq. 16) of one reply; rewards, values (R,).

    δ_t = r_t + γ V_{t+1} - V_t with V after the end 0 (the reply ends; D4 3.5.2's code reads beyond the array);
    A_t = δ_t + γλ A_{t+1}. Returns advantages and the value model's targets A + V, both (R,)."""
    advantages, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        following = rewards[t] + gamma * after - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + values


def whiten(x):
    """Mean 0 and variance 1 over all response tokens of the batch: the step's size no longer depends on the scale."""
    return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8) if len(x) > 1 else x - x.mean()


def policy_loss(logprobs, old_logprobs, advantages, cliprange):
    """-min(ρA, clip(ρ, 1±ε)A) per token, ρ = π/π_old (PPO eq. 7). Returns losses and ρ, both (n,)."""
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)), ratio


def value_loss(values, old_values, returns, cliprange_value):
    """½·max of the squared errors of V and of V held within ±ε of its old value, per token (n,)."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


# ======================================================================================== rollout


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
        """(ids, mask) with only the response as targets: the loss sees nothing else (D2: 仅黄色的response部分)."""
        return self.query + self.response, [0] * len(self.query) + [1] * len(self.response)


def respond(policy, queries, seeds, tokenizer, cfg) -> list[Rollout]:
    """Samples a reply to each query, this rank a share of them; every rank gets all."""
    end, rank, world = tokenizer.ids["<|end|>"], dist.get_rank(), dist.get_world_size()
    mine = range(rank, len(queries), world)
    with policy.gathered():  # one gather of the weights for the whole rollout; ranks may finish at different tokens
        replies = generate(policy.model, [queries[i] for i in mine], cfg.max_new_tokens, end,
                           seeds=[seeds[i] for i in mine])
    replies = everywhere(dict(zip(mine, replies)))
    return [Rollout(query, replies[i], replies[i][-1] == end) for i, query in enumerate(queries)]


def split(rollouts, cfg) -> list[list[int]]:
    """This rank's micro-batches of rollouts."""
    lengths = [len(r.query) + len(r.response) for r in rollouts]
    return micro_batches(lengths, cfg.micro_tokens, dist.get_rank(), dist.get_world_size())


def response_tokens(model, rollouts, tokenizer, device):
    """What a model says of the response tokens of some rollouts, one flat tensor (n,) in their order: log-probabilities
    of a language model, values of a scalar one. A value stands before its token: it has not seen it yet."""
    input_ids, targets = collate([r.row() for r in rollouts], tokenizer.ids["<|pad|>"])
    input_ids, targets = input_ids.to(device), targets.to(device)
    if isinstance(model, ScalarModel):
        return model(input_ids)[targets >= 0]
    return token_logprobs(model, input_ids, targets)[targets >= 0]


def score_replies(reward, rollouts, tokenizer, cfg, device) -> list[float]:
    """The reward model's raw scores, read at <|reward|> behind each reply; every rank gets all."""
    mine, tail = {}, [tokenizer.ids["<|reward|>"]]
    for part in split(rollouts, cfg):
        rows = [rollouts[i].query + rollouts[i].response + tail for i in part] or [tail]
        scores = reward.model.last(*(t.to(device) for t in pad_rows(rows, tokenizer.ids["<|pad|>"])))
        mine |= dict(zip(part, scores.tolist()))
    scores = everywhere(mine)
    return [scores[i] for i in range(len(rollouts))]


@torch.no_grad()
def experience(models, rollouts, norm, tokenizer, cfg, device):
    """Fills in the rollouts: scores, log-probabilities, values, then rewards, advantages and returns.

    Every rank computes its micro-batches and receives the others': from here on all ranks know the whole batch."""
    policy, value, reference, reward = models
    mine = {}
    for part in split(rollouts, cfg):
        members = [rollouts[i] for i in part]
        columns = [response_tokens(m.model, members, tokenizer, device).cpu() for m in (policy, reference, value)]
        sizes = [len(r.response) for r in members]
        mine |= dict(zip(part, zip(*(column.split(sizes) for column in columns))))
    everyone = everywhere(mine)
    for i, score in enumerate(score_replies(reward, rollouts, tokenizer, cfg, device)):
        r = rollouts[i]
        r.logprobs, r.ref_logprobs, r.values = everyone[i]
        r.score = (score - norm[0]) / norm[1] if r.ended else cfg.missing_end_score
        rewards = token_rewards(r.score, r.logprobs, r.ref_logprobs, cfg.kl_coef)
        r.advantages, r.returns = gae(rewards, r.values, cfg.gamma, cfg.lam)
    whitened = whiten(torch.cat([r.advantages for r in rollouts]))
    for r, advantages in zip(rollouts, whitened.split([len(r.response) for r in rollouts])):
        r.advantages = advantages


def update(policy, value, rollouts, step, tokenizer, cfg, device, rate) -> dict:
    """ppo_epochs × minibatches optimizer steps on one batch of rollouts. Returns metrics, means over response tokens."""
    sums, first_ratio, norm = torch.zeros(4, dtype=torch.float64), None, 0.0
    for epoch in range(cfg.ppo_epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollouts))
        for chosen in np.array_split(order, cfg.minibatches):
            batch = [rollouts[i] for i in chosen]
            count = sum(len(r.response) for r in batch)
            for part in split(batch, cfg):
                members = [batch[i] for i in part]
                old, advantages, old_values, returns = (
                    torch.cat([getattr(r, k) for r in members]).to(device) if members else torch.zeros(0, device=device)
                    for k in ("logprobs", "advantages", "values", "returns"))
                new = response_tokens(policy.model, members, tokenizer, device)
                losses, ratio = policy_loss(new, old, advantages, cfg.cliprange)
                policy.backward(losses.sum() / count)
                value_losses = value_loss(response_tokens(value.model, members, tokenizer, device), old_values,
                                          returns, cfg.cliprange_value)
                value.backward(value_losses.sum() / count)
                ratio = ratio.detach()
                first_ratio = float((ratio - 1).abs().max()) if first_ratio is None and members else first_ratio
                approx_kl = ((ratio - 1) - ratio.log()).sum()  # k3, never negative
                clipped = ((ratio - 1).abs() > cfg.cliprange).sum()
                sums += torch.stack([losses.detach().sum(), value_losses.detach().sum(), approx_kl, clipped]).cpu()
            norm = policy.step(cfg.lr * rate)
            value.step(cfg.value_lr * rate)
    sums = [s / cfg.ppo_epochs / sum(len(r.response) for r in rollouts) for s in all_sum(*sums, device=device)]
    names = ("policy_loss", "value_loss", "approx_kl", "clipfrac")
    return dict(zip(names, sums)) | {"grad_norm": norm, "ratio_error": first_ratio or 0.0}


def summary(rollouts) -> dict:
    """Means over a batch of rollouts: score, KL to the reference per reply, entropy per token, length, explained
    variance of the returns by the value model."""
    flat = {k: torch.cat([getattr(r, k) for r in rollouts]) for k in ("logprobs", "ref_logprobs", "values", "returns")}
    explained = 1 - (flat["returns"] - flat["values"]).var() / flat["returns"].var().clamp(min=1e-8)
    return {"score": sum(r.score for r in rollouts) / len(rollouts),
            "kl": float((flat["logprobs"] - flat["ref_logprobs"]).sum()) / len(rollouts),
            "entropy": -float(flat["logprobs"].mean()), "length": len(flat["values"]) / len(rollouts),
            "ended": sum(r.ended for r in rollouts) / len(rollouts), "explained_variance": float(explained)}


# ======================================================================================== the script


def read_prompts(cfg, tokenizer, limit) -> tuple[list[list[int]], list[dict]]:
    """Queries as ids, and their records; those that leave no room for a reply are dropped and counted."""
    records = read_conversations(cfg.prompts)
    for r in records:
        while r["messages"] and r["messages"][-1]["role"] == "assistant":
            r["messages"] = r["messages"][:-1]
    rendered = [(render(r["messages"], tokenizer)[0], r) for r in records if r["messages"]]
    kept = [(ids, r) for ids, r in rendered if len(ids) + cfg.max_new_tokens + 1 <= limit]
    if len(kept) < len(records):
        print0(f"{cfg.prompts}: {len(records) - len(kept)} of {len(records)} prompts dropped: with "
               f"--max-new-tokens {cfg.max_new_tokens} they exceed the context of {limit}")
    if not kept:
        raise SystemExit(f"{cfg.prompts}: no prompt fits the context of {limit} with --max-new-tokens "
                         f"{cfg.max_new_tokens}")
    return [ids for ids, _ in kept], [r for _, r in kept]


def judged(model, queries, records, reward, norm, tokenizer, cfg, device) -> dict:
    """Score of fresh replies to held-out prompts, and the gold judge's where the records can be judged."""
    seeds = [keyed_seed(cfg.seed, "evaluate", i) for i in range(len(queries))]
    rollouts = respond(model, queries, seeds, tokenizer, cfg)
    scores = score_replies(reward, rollouts, tokenizer, cfg, device)
    scores = [(s - norm[0]) / norm[1] if r.ended else cfg.missing_end_score for s, r in zip(scores, rollouts)]
    result = {"score": sum(scores) / len(scores)}
    gold = [gold_score(rec, tokenizer.decode(r.response)) for rec, r in zip(records, rollouts) if "answer" in rec]
    result |= {"gold": sum(gold) / len(gold)} if gold else {}
    for record, r, score in list(zip(records, rollouts, scores))[:3]:
        print0(f"  {record['messages'][-1]['content'][:60]!r} → {tokenizer.decode(r.response)[:80]!r}  {score:+.2f}")
    return result


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    run = Run(cfg, cfg.steps, inputs=[*cfg.prompts.split(","), *(f"{f}/model.safetensors" for f in (cfg.init, cfg.reward))])
    kind = {"stage": cfg.zero, "dtype": dtype, "device": device}
    options = kind | {"weight_decay": cfg.weight_decay, "grad_clip": cfg.grad_clip}
    policy = AdamW(load_model(cfg.init), **options)
    value = AdamW(load_model(cfg.reward, ScalarModel), **options)
    reference = Sharded(load_model(cfg.init).requires_grad_(False), **kind)
    reward = Sharded(load_model(cfg.reward, ScalarModel).requires_grad_(False), **kind)
    models = {"policy": policy, "value": value, "reference": reference, "reward": reward}
    for name, m in models.items():
        print0(f"{name:<10} {m.model.config.num_parameters():>12,} parameters, "
               f"{'trained' if isinstance(m, AdamW) else 'frozen':<8} {sum(m.live_bytes().values()):>14,} bytes here")
    for m in (policy, value):
        m.model.model.activation_checkpointing = cfg.checkpointing
    limit = min(m.model.config.max_position_embeddings for m in models.values())
    queries, records = read_prompts(cfg, tokenizer, limit)
    held = min(256, int(len(queries) * cfg.val_fraction))
    training = range(len(queries) - held)
    path = Path(cfg.reward) / "eval.json"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    norm = (seen.get("score_mean", 0.0), max(seen.get("score_std", 1.0), 1e-3))
    print0(f"{len(training)} prompts, {held} held out; score = (raw - {norm[0]:.3f}) / {norm[1]:.3f}")

    for step in range(run.resume(policy=policy, value=value), cfg.steps):
        chosen = [training[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(training))]
        seeds = [keyed_seed(cfg.seed, "rollout", step, row) for row in range(len(chosen))]
        rollouts = respond(policy, [queries[i] for i in chosen], seeds, tokenizer, cfg)  # 1. the policy replies
        experience(models.values(), rollouts, norm, tokenizer, cfg, device)  # 2. four models look at the replies
        rate = lr_at(step, cfg.steps, 1.0, cfg.warmup, cfg.min_lr)
        losses = update(policy, value, rollouts, step, tokenizer, cfg, device, rate)  # 3. policy and value learn
        metrics = summary(rollouts)
        if step == 0:
            print0(f"first KL {metrics['kl']:.2g}, expected 0; first ratio off by {losses['ratio_error']:.2g}, expected 0")
        if metrics["kl"] < -0.05 * metrics["length"]:
            print0("KL is clearly negative: the replies were not sampled from the policy that is scored")
        tokens = sum(len(r.query) + len(r.response) for r in rollouts)
        run.log(step, units=tokens, **metrics, **losses, lr=cfg.lr * rate)
        run.boundary(step, policy=policy, value=value)

    result = {}
    if held:
        for name, model in (("before", reference), ("after", policy)):
            print0(f"replies {name}, with their scores:")
            scores = judged(model, queries[-held:], records[-held:], reward, norm, tokenizer, cfg, device)
            result |= {f"{k} {name}": v for k, v in scores.items()}
    save_model(cfg.out, policy.model, policy.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

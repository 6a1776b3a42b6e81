"""Proximal policy optimization (PPO): the policy replies, the reward model scores it, it moves.

    python ppo.py                                                  from out/sft and out/reward
    python ppo.py --init out/mine --reward out/mine-reward --prompts p.json --out out/mine-ppo
    torchrun --nproc-per-node 2 ppo.py --zero 3                    the same batches on two processes

Documents: D0 4.2.3 (2), D2 第5节, D3 第4节, D4 3.5.2; Schulman et al. 2017, InstructGPT (2022).
Four models (D0): policy (actor) and value model (critic) are trained, reference and reward model
frozen. Where the documents are loose:

    1. only the policy samples; the reference scores the policy's tokens (D0 lets both reply)
    2. a token's reward is -kl_coef · (log π - log π_ref), at the last one plus the reward model's
       score; the critic is no part of it: it estimates returns and enters by the advantage
    3. the data are prompts only, no comparisons (D2)

What the paper leaves open, here:

    1. the critic starts from the reward model
    2. scores are normalized by that model's held-out mean and spread
    3. a reply that does not end gets a fixed score
    4. advantages are whitened, the value loss is clipped
    5. sampling is from the distribution that is scored (T = 1)
    6. left out: entropy bonus, adaptive KL, early stop

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
    advantages = torch.zeros_like(rewards)
    next_value = 0.0
    next_advantage = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lam * next_advantage
        next_value = values[t]
        next_advantage = advantages[t]
    return advantages, advantages + values


def whiten(x):
    """Mean 0 and variance 1 over all response tokens of the batch: their scale moves nothing."""
    centred = x - x.mean()
    return centred * torch.rsqrt(x.var() + 1e-8) if len(x) > 1 else centred


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
    values: torch.Tensor = None
    ref_logprobs: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None

    def row(self):
        """(ids, mask), only the response being a target (D2: 仅黄色的response部分)."""
        return self.query + self.response, [0] * len(self.query) + [1] * len(self.response)


def in_parts(rollouts, cfg) -> list[list[int]]:
    """This process's micro-batches of rollouts, as their numbers."""
    lengths = [len(r.query + r.response) for r in rollouts]
    return my_micro_batches(lengths, cfg.micro_tokens)


def respond(policy, queries, seeds, tokenizer, cfg) -> list[Rollout]:
    """Samples a reply to each query, this rank a share of them; every rank gets all."""
    end = tokenizer.ids["<|end|>"]
    ends = [end, tokenizer.ids["<|endoftext|>"]]
    mine = range(dist.get_rank(), len(queries), dist.get_world_size())
    asked = [queries[i] for i in mine]
    with policy.gathered():  # one gather for the whole rollout: ranks end at different tokens
        replies = generate(policy.model, asked, cfg.max_new_tokens, ends,
                           seeds=[seeds[i] for i in mine])
    everyone = everywhere(dict(zip(mine, replies)))
    rollouts = []
    for i, query in enumerate(queries):
        rollouts.append(Rollout(query, everyone[i], ended=everyone[i][-1] == end))
    return rollouts


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
    """The reward model's scores, read at <|reward|> behind each reply and normalized by norm, its
    (mean, spread); a reply that did not end gets a fixed score. Every rank gets all."""
    tail = [tokenizer.ids["<|reward|>"]]
    mine = {}
    for part in in_parts(rollouts, cfg):
        rows = [rollouts[i].query + rollouts[i].response + tail for i in part] or [tail]
        padded, lengths = pad_rows(rows, tokenizer.ids["<|pad|>"])
        scores = reward.model.last(padded.to(device), lengths.to(device))
        mine |= zip(part, scores.tolist())
    raw = everywhere(mine)
    mean, spread = norm
    scores = []
    for i, r in enumerate(rollouts):
        scores.append((raw[i] - mean) / spread if r.ended else cfg.missing_end_score)
    return scores


@torch.no_grad()
def experience(policy, value, reference, reward, rollouts, norm, tokenizer, cfg, device):
    """Fills in the rollouts. Every rank computes its micro-batches and receives the others': from
    here on all know the whole batch."""
    mine = {}
    for part in in_parts(rollouts, cfg):
        members = [rollouts[i] for i in part]
        sizes = [len(r.response) for r in members]
        found = []
        for sharded in (policy, value, reference):
            said = response_tokens(sharded.model, members, tokenizer, device)
            found.append(said.cpu().split(sizes))
        mine |= zip(part, zip(*found))
    everyone = everywhere(mine)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    for i, r in enumerate(rollouts):
        r.logprobs, r.values, r.ref_logprobs = everyone[i]
        r.score = scores[i]
        rewards = token_rewards(r.score, r.logprobs, r.ref_logprobs, cfg.kl_coef)
        r.advantages, r.returns = gae(rewards, r.values, cfg.gamma, cfg.lam)
    whitened = whiten(torch.cat([r.advantages for r in rollouts]))
    for r, advantages in zip(rollouts, whitened.split([len(r.response) for r in rollouts])):
        r.advantages = advantages


# ================================================================================ update

def flat(tensors, device=None):
    """One tensor (n,) of the tokens of some replies, in their order."""
    return torch.cat([torch.zeros(0), *tensors]).to(device)


def learn(policy, value, rollouts, count, tokenizer, cfg, device) -> dict:
    """Adds a micro-batch's gradients, of means over the `count` response tokens of its minibatch.
    Returns each metric's sum over its tokens, and how far from 1 a ratio is."""
    # 1. what was said of its tokens after the rollout
    old_logprobs = flat([r.logprobs for r in rollouts], device)
    old_values = flat([r.values for r in rollouts], device)
    advantages = flat([r.advantages for r in rollouts], device)
    returns = flat([r.returns for r in rollouts], device)
    # 2. what the policy says now
    logprobs = response_tokens(policy.model, rollouts, tokenizer, device)
    losses, ratio = policy_loss(logprobs, old_logprobs, advantages, cfg.cliprange)
    policy.backward(losses.sum() / count)
    # 3. what the value model says now
    values = response_tokens(value.model, rollouts, tokenizer, device)
    value_losses = value_loss(values, old_values, returns, cfg.cliprange_value)
    value.backward(value_losses.sum() / count)
    # 4. metrics
    off = (ratio.detach() - 1).abs()
    kl = ratio - 1 - (logprobs - old_logprobs)  # k3: the mean is KL(π_old, π), no term < 0
    return {"policy_loss": float(losses.sum()), "value_loss": float(value_losses.sum()),
            "approx_kl": float(kl.sum()), "clipfrac": float((off > cfg.cliprange).sum()),
            "ratio_error": max(off.tolist(), default=0.0)}


def update(policy, value, rollouts, step, tokenizer, cfg, device, rate) -> dict:
    """ppo_epochs × minibatches optimizer steps on a batch of rollouts. Returns means over response
    tokens, the last gradient norm, and how far from 1 a ratio was before the first step."""
    sums = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clipfrac"), 0.0)
    ratio_error = 0.0
    optimizer_steps = 0
    for epoch in range(cfg.ppo_epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollouts))
        for chosen in np.array_split(order, min(cfg.minibatches, len(order))):
            batch = [rollouts[i] for i in chosen]
            count = sum(len(r.response) for r in batch)
            for part in in_parts(batch, cfg):
                members = [batch[i] for i in part]
                found = learn(policy, value, members, count, tokenizer, cfg, device)
                for name in sums:
                    sums[name] += found[name]
                if optimizer_steps == 0:
                    ratio_error = max(ratio_error, found["ratio_error"])
            norm = policy.step(cfg.lr * rate)
            value.step(cfg.value_lr * rate)
            optimizer_steps += 1
    tokens = cfg.ppo_epochs * sum(len(r.response) for r in rollouts)
    totals = all_sum(*sums.values(), device=device)
    means = {name: total / tokens for name, total in zip(sums, totals)}
    errors = everywhere({dist.get_rank(): ratio_error})
    return means | {"grad_norm": norm, "ratio_error": max(errors.values())}


def summary(rollouts) -> dict:
    """Means over rollouts: score, entropy per token, KL to the reference per reply, length, replies
    that end; and the share of the returns' variance that the value model explains."""
    n = len(rollouts)
    logprobs = flat([r.logprobs for r in rollouts])
    kl = logprobs - flat([r.ref_logprobs for r in rollouts])
    returns = flat([r.returns for r in rollouts])
    errors = returns - flat([r.values for r in rollouts])
    unexplained = errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    return {"score": sum(r.score for r in rollouts) / n,
            "entropy": -float(logprobs.mean()),
            "kl": float(kl.sum()) / n,
            "length": len(logprobs) / n,
            "ended": sum(r.ended for r in rollouts) / n,
            "explained_variance": 1 - float(unexplained)}


# ================================================================================ the script

def open_prompts(cfg, tokenizer, limit) -> tuple[list[list[int]], list[dict]]:
    """Queries as ids, and their records; those that leave no room for a reply are dropped."""
    queries = []
    kept = []
    records = read_prompts(cfg.prompts)
    for record in records:
        ids, _ = render(record["messages"], tokenizer)
        if len(ids) + cfg.max_new_tokens + 1 <= limit:
            queries.append(ids)
            kept.append(record)
    room = f"the context of {limit} with --max-new-tokens {cfg.max_new_tokens}"
    if len(kept) < len(records):
        print0(f"{cfg.prompts}: {len(records) - len(kept)} of {len(records)} do not fit {room}")
    if not kept:
        raise SystemExit(f"{cfg.prompts}: no prompt fits {room}")
    return queries, kept


def open_models(cfg, dtype, device) -> dict:
    """The four models, each printed with what it holds here."""
    options = {"weight_decay": cfg.weight_decay, "grad_clip": cfg.grad_clip,
               "offload": cfg.offload}
    place = (cfg.zero, dtype, device)
    frozen = load_model(cfg.init).requires_grad_(False)
    judge = load_model(cfg.reward, ScalarModel).requires_grad_(False)
    models = {"policy": AdamW(load_model(cfg.init), *place, **options),
              "value": AdamW(load_model(cfg.reward, ScalarModel), *place, **options),
              "reference": Sharded(frozen, *place),
              "reward": Sharded(judge, *place)}
    for name, sharded in models.items():
        sharded.model.model.activation_checkpointing = cfg.checkpointing
        size = sharded.model.config.num_parameters()
        held = sum(sharded.live_bytes().values())
        what = "trained" if isinstance(sharded, AdamW) else "frozen"
        print0(f"{name:<10} {size:>12,} parameters, {what:<8} {held:>14,} bytes here")
    return models


def score_norm(folder) -> tuple[float, float]:
    """Mean and spread of the reward model's held-out scores: what its zero and its unit are."""
    path = Path(folder) / "eval.json"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return seen.get("score_mean", 0.0), max(seen.get("score_std", 1.0), 1e-3)


def judged(model, queries, records, reward, norm, tokenizer, cfg, device) -> dict:
    """Score of fresh replies to held-out prompts, and the gold judge's where it can judge."""
    seeds = [keyed_seed(cfg.seed, "evaluate", i) for i in range(len(queries))]
    rollouts = respond(model, queries, seeds, tokenizer, cfg)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    gold = []
    for i, record in enumerate(records):
        reply = tokenizer.decode(rollouts[i].response)
        if "answer" in record:
            gold.append(gold_score(record, reply))
        if i < 3:
            question = record["messages"][-1]["content"]
            print0(f"  {question[:60]!r} → {reply[:80]!r}  {scores[i]:+.2f}")
    result = {"score": sum(scores) / len(scores)}
    if gold:
        result["gold"] = sum(gold) / len(gold)
    return result


def main(cfg):
    # 1. models: four of them
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    if Tokenizer.load(cfg.reward).hash != tokenizer.hash:
        raise SystemExit(f"{cfg.reward}: another tokenizer than {cfg.init}'s; train it from there")
    weights = [f"{cfg.init}/model.safetensors", f"{cfg.reward}/model.safetensors"]
    run = Run(cfg, cfg.steps, inputs=[*cfg.prompts.split(","), *weights])
    models = open_models(cfg, dtype, device)
    policy, value = models["policy"], models["value"]
    # 2. data: prompts, the last of them held out
    limit = min(m.model.config.max_position_embeddings for m in models.values())
    queries, records = open_prompts(cfg, tokenizer, limit)
    held = min(256, int(len(queries) * cfg.val_fraction), len(queries) - 1)
    trained = len(queries) - held
    norm = score_norm(cfg.reward)
    print0(f"{trained} prompts, {held} held out; score (raw - {norm[0]:.3g}) / {norm[1]:.3g}")

    # 3. loop
    for step in range(run.resume(policy=policy, value=value), cfg.steps):
        chosen = epoch_rows(cfg.seed, step, cfg.batch_size, trained)
        seeds = [keyed_seed(cfg.seed, "rollout", step, row) for row in range(len(chosen))]
        # the policy replies, four models look at the replies, policy and value model learn
        rollouts = respond(policy, [queries[i] for i in chosen], seeds, tokenizer, cfg)
        experience(**models, rollouts=rollouts, norm=norm, tokenizer=tokenizer, cfg=cfg,
                   device=device)
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

    # 4. judge: replies to the held-out prompts before and after
    result = {}
    for name, model in (("before", models["reference"]), ("after", policy)):
        if held:
            print0(f"replies {name}, with their scores:")
            found = judged(model, queries[trained:], records[trained:], models["reward"], norm, tokenizer, cfg, device)
            result |= {f"{key} {name}": number for key, number in found.items()}

    # 5. save
    save_model(cfg.out, policy.model, policy.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

"""Proximal policy optimization (PPO): the policy replies, the reward model scores it, it moves.

    python ppo.py                                                  from out/sft and out/reward
    python ppo.py --init out/mine --reward out/mine-reward --prompts p.json --out out/mine-ppo
    torchrun --nproc-per-node 2 ppo.py --zero 3                    the same batches on two processes

Documents: D0 4.2.3 (2), D2 第5节, D3 第4节, D4 3.5.2; Schulman et al. 2017, InstructGPT (2022).
Four models (D0): policy (actor) and value model (critic) are trained, reference and reward model
frozen. Where the documents are loose: only the policy samples, the reference scores its tokens; a
token's reward is minus the price of its KL to the reference, at the last one plus the reward
model's score; the critic is no part of it, it estimates returns and enters by the advantage; RL
data are prompts only; replies are drawn from the distribution that is scored (T=1). Every further
detail is a flag, so that one can see what it does by switching it off.
Expect: first ratio 1 and first KL 0; the score rises while KL stays below a nat a reply.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from data import Tokenizer, Tokens, collate, epoch_rows, gold_score, my_micro_batches, pad_rows
from data import read_prompts, render
from model import CausalLM, ScalarModel, generate, load_model, must_score, save_model
from model import score_norm, token_logprobs, tune, untuned, weight_files, widen
from zero import Run, Sharded, TuneConfig, all_sum, everywhere, in_shares, keyed_seed, launch, lr_at
from zero import optimizer_of, prepared, print0, print_held, setup


@dataclass
class Config(TuneConfig):
    init: str = "out/sft"  # checkpoint to start from; also the reference
    reward: str = "out/reward"  # the reward model
    out: str = "out/ppo"  # folder of this run
    prompts: str = "out/data/prompts.jsonl"  # conversations; a last reply is cut off
    val_fraction: float = 0.1  # how much of the end of --prompts is held out; 256 at most
    steps: int = 48  # iterations: rollout, then update
    batch_size: int = 128  # replies per iteration over all processes
    max_new_tokens: int = 64
    ppo_epochs: int = 1  # passes over a rollout
    minibatches: int = 2  # optimizer steps per pass
    lr: float = 1.5e-4  # of the policy
    value_lr: float = 3e-4  # of the value model
    warmup: float = 0.1  # share of the steps in which the learning rates rise
    weight_decay: float = 0.0
    kl_coef: float = 0.05  # price of one nat of log π / π_ref, in units of the normalized score
    kl_target: float = 0.0  # nats a reply; the price is adapted after each step to reach it; 0: not
    kl_estimator: Literal["k1", "k3"] = "k1"  # of the KL that a token pays for
    max_kl: float = 20.0  # nats a reply at which the run ends, with its last good weights; 0: never
    advantage: Literal["gae", "reinforce"] = "gae"  # reinforce: each token gets the reply's return
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's λ
    whiten: bool = True  # advantages get mean 0 and variance 1 over the batch
    cliprange: float = 0.2  # ε of the policy's clip: the ratio's gain ends at 1 ± ε; 1e9: no clip
    cliprange_value: float = 0.2  # ε of the value's clip: its step ends at ± ε; 1e9: no clip
    critic: Literal["reward", "sft"] = "reward"  # what the value model starts from
    normalize: bool = True  # scores, by the reward model's held-out mean and spread
    penalize: bool = True  # a reply that did not end gets --missing-end-score, not a score
    missing_end_score: float = -1.0
    replies: int = 1  # to each prompt; --batch-size counts replies
    entropy_coef: float = 0.0  # weight of the policy's entropy in its loss
    stop_kl: float = 0.0  # nats a token from the policy that replied: no further pass; 0: all
    ptx_coef: float = 0.0  # weight of the loss on pretraining text (PPO-ptx); InstructGPT had 27.8
    ptx_data: str = "out/data/corpus.jsonl"  # that text
    ptx_rows: int = 6  # windows of it, of up to 128 tokens, per optimizer step


# ================================================================================ the algorithm

def k3(log_ratio):
    """r - 1 - log r per sample of p, log r = log q - log p: its mean is KL(p, q), as that of k1 =
    -log r is, but no term is negative (Schulman, joschu.net/blog/kl-approx.html)."""
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(score, logprobs, ref_logprobs, kl_coef, estimator="k1"):
    """Rewards of a reply's tokens (R,): minus the price of the KL estimate, the last plus score."""
    kl = logprobs - ref_logprobs
    if estimator == "k3":
        kl = k3(-kl)
    rewards = -kl_coef * kl
    rewards[-1] += score
    return rewards


def adapted(kl_coef, kl, target):
    """The price of KL after an iteration: a tenth of KL's relative error from the target, at most
    2 %, up or down (Ziegler et al. 2019, section 2.2)."""
    error = kl / target - 1
    return kl_coef * (1 + 0.1 * min(max(error, -0.2), 0.2))


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
    """Mean 0, variance 1 over all response tokens of a batch: the scores' scale moves nothing."""
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


def in_parts(rollouts, cfg):
    """This process's micro-batches of rollouts: their numbers, and themselves."""
    lengths = [len(r.query + r.response) for r in rollouts]
    for part in my_micro_batches(lengths, cfg.micro_tokens):
        yield part, [rollouts[i] for i in part]


def respond(policy, queries, seeds, tokenizer, cfg) -> list[Rollout]:
    """Samples a reply to each query, this rank a share of them; every rank gets all."""
    end = tokenizer.end
    ends = [end, tokenizer.text_end]

    def reply(mine):
        asked = [queries[i] for i in mine]
        own = [seeds[i] for i in mine]
        return generate(policy.model, asked, cfg.max_new_tokens, ends, seeds=own)

    with policy.gathered():  # one gather for the whole rollout: ranks end at different tokens
        everyone = in_shares(range(len(queries)), reply)
    replies = [everyone[i] for i in range(len(queries))]
    return [Rollout(query, ids, ids[-1] == end) for query, ids in zip(queries, replies)]


def response_tokens(model, rollouts, tokenizer, device):
    """What a model says of the response tokens of some rollouts, flat (n,): a language model their
    log-probabilities, a scalar one values. A value stands before its token: it has not seen it."""
    input_ids, targets = collate([r.row() for r in rollouts], tokenizer.pad, device)
    if isinstance(model, ScalarModel):
        return model(input_ids)[targets >= 0]
    return token_logprobs(model, input_ids, targets)[targets >= 0]


@torch.no_grad()
def score_replies(reward, rollouts, norm, tokenizer, cfg, device) -> list[float]:
    """The reward model's scores, read at <|reward|> behind each reply and normalized by norm (mean,
    spread); a reply that did not end gets a fixed score. Every rank gets all."""
    mean, spread = norm
    tail = [tokenizer.special("<|reward|>")]
    mine = {}
    for part, members in in_parts(rollouts, cfg):
        rows = [r.query + r.response + tail for r in members] or [tail]
        input_ids, lengths = pad_rows(rows, tokenizer.pad)
        with untuned(reward.model):
            scores = reward.model.last(input_ids.to(device), lengths.to(device))
        mine |= zip(part, scores.tolist())
    raw = everywhere(mine)
    scores = []
    for i, r in enumerate(rollouts):
        fixed = cfg.penalize and not r.ended
        scores.append(cfg.missing_end_score if fixed else (raw[i] - mean) / spread)
    return scores


@torch.no_grad()
def experience(policy, value, reference, reward, rollouts, kl_coef, norm, tokenizer, cfg, device):
    """Fills in the rollouts. Every rank computes its micro-batches and receives the others': from
    here on all know the whole batch."""
    mine = {}
    for part, members in in_parts(rollouts, cfg):
        sizes = [len(r.response) for r in members]
        logprobs = response_tokens(policy.model, members, tokenizer, device)
        values = response_tokens(value.model, members, tokenizer, device)
        with untuned(reference.model):
            ref_logprobs = response_tokens(reference.model, members, tokenizer, device)
        columns = [column.cpu().split(sizes) for column in (logprobs, values, ref_logprobs)]
        mine |= zip(part, zip(*columns))
    everyone = everywhere(mine)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    for i, r in enumerate(rollouts):
        r.logprobs, r.values, r.ref_logprobs = everyone[i]
        r.score = scores[i]
        rewards = token_rewards(r.score, r.logprobs, r.ref_logprobs, kl_coef, cfg.kl_estimator)
        r.advantages, r.returns = gae(rewards, r.values, cfg.gamma, cfg.lam)
        if cfg.advantage == "reinforce":  # D2 L117: every token of a high-scored reply
            r.advantages = rewards.sum().expand(len(rewards))
    if cfg.whiten:
        whitened = whiten(flat(rollouts, "advantages"))
        for r, part in zip(rollouts, whitened.split([len(r.response) for r in rollouts])):
            r.advantages = part


def flat(rollouts, field, device="cpu"):
    """A field of the rollouts' response tokens, one reply after another: (n,)."""
    return torch.cat([torch.zeros(0), *(getattr(r, field) for r in rollouts)]).to(device)


# ================================================================================ update

METRICS = ("policy_loss", "value_loss", "approx_kl", "clipfrac")  # approx_kl: of π_old to π


def entropies(model, rollouts, tokenizer, device):
    """The policy's entropy where it drew each response token, over the whole vocabulary: (n,)."""
    input_ids, targets = collate([r.row() for r in rollouts], tokenizer.pad, device)
    logits = model(input_ids)[targets >= 0]
    logprobs = widen(logits).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def learn_text(policy, windows, tokenizer, cfg, device) -> float:
    """PPO-ptx (InstructGPT, eq. 2; D2's LM objective): adds the gradient of --ptx-coef · the mean
    loss per token of pretraining text. Returns this rank's part of that mean."""
    rows = [(ids, [1] * len(ids)) for ids in windows]
    count = sum(len(ids) - 1 for ids in windows)
    mine = 0.0
    for part in my_micro_batches([len(ids) for ids in windows], cfg.micro_tokens):
        batch = collate([rows[i] for i in part], tokenizer.pad, device)
        loss = -token_logprobs(policy.model, *batch).sum() / count
        policy.backward(cfg.ptx_coef * loss)
        mine += loss.item()
    return mine


def learn(policy, value, rollouts, count, tokenizer, cfg, device) -> tuple[dict, float]:
    """Adds the gradients of a micro-batch to those of its minibatch, a mean over `count` response
    tokens. Returns the METRICS, summed over tokens, and how far from 1 a ratio is."""
    # 1. the policy: what it said of the tokens when it replied, and what it says now
    before = flat(rollouts, "logprobs", device)
    advantages = flat(rollouts, "advantages", device)
    now = response_tokens(policy.model, rollouts, tokenizer, device)
    losses, ratio = policy_loss(now, before, advantages, cfg.cliprange)
    policy.backward(losses.sum() / count)
    if cfg.entropy_coef:
        bonus = entropies(policy.model, rollouts, tokenizer, device).sum() / count
        policy.backward(-cfg.entropy_coef * bonus)
    # 2. the value model likewise
    old_values = flat(rollouts, "values", device)
    returns = flat(rollouts, "returns", device)
    values = response_tokens(value.model, rollouts, tokenizer, device)
    value_losses = value_loss(values, old_values, returns, cfg.cliprange_value)
    value.backward(value_losses.sum() / count)
    # 3. metrics
    off = (ratio.detach() - 1).abs()
    columns = (losses, value_losses, k3(now - before), off > cfg.cliprange)
    sums = {name: float(column.detach().sum()) for name, column in zip(METRICS, columns)}
    return sums, max(off.tolist(), default=0.0)


def update(policy, value, rollouts, text, step, tokenizer, cfg, device, rate) -> dict:
    """ppo_epochs × minibatches optimizer steps on a batch of rollouts; text: --ptx-data's, or None.
    Returns means over response tokens, the last gradient norm, and how far from 1 a ratio was
    before the first step."""
    began = time.perf_counter()
    sums = dict.fromkeys(METRICS, 0.0)
    tokens = 0
    farthest = []  # from 1 that a ratio was, in each micro-batch before the first step
    text_losses = []
    for epoch in range(cfg.ppo_epochs):
        kl_before, tokens_before = sums["approx_kl"], tokens
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollouts))
        for k, chosen in enumerate(np.array_split(order, min(cfg.minibatches, len(order)))):
            batch = [rollouts[i] for i in chosen]
            count = sum(len(r.response) for r in batch)
            for _, members in in_parts(batch, cfg):
                found, off = learn(policy, value, members, count, tokenizer, cfg, device)
                for name in METRICS:
                    sums[name] += found[name]
                if tokens == 0:  # no step yet: the policy is still the one that replied
                    farthest.append(off)
            if text:
                windows = text.batch(keyed_seed(cfg.seed, step, epoch), k, cfg.ptx_rows)
                text_losses.append(learn_text(policy, windows, tokenizer, cfg, device))
            norm = policy.step(cfg.lr * rate)
            value.step(cfg.value_lr * rate)
            tokens += count
        if cfg.stop_kl:
            [kl] = all_sum(sums["approx_kl"] - kl_before, device=device)
            if kl / (tokens - tokens_before) > cfg.stop_kl:
                break
    totals = all_sum(*sums.values(), device=device)
    means = {name: total / tokens for name, total in zip(METRICS, totals)}
    errors = everywhere({dist.get_rank(): max(farthest)})
    means |= {"grad_norm": norm, "ratio_error": max(errors.values()),
              "update_rate": tokens / (time.perf_counter() - began)}  # tokens of replies per second
    if text:
        means["ptx_loss"] = all_sum(sum(text_losses), device=device)[0] / len(text_losses)
    return means


def summary(rollouts) -> dict:
    """Means over rollouts: score, entropy per token (-log π of the samples estimates it), KL to the
    reference per reply by both estimators, length, replies that end; and the share of the returns'
    variance that the value model explains."""
    n = len(rollouts)
    logprobs = flat(rollouts, "logprobs")
    kl = logprobs - flat(rollouts, "ref_logprobs")
    returns = flat(rollouts, "returns")
    errors = returns - flat(rollouts, "values")
    unexplained = errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    return {
        "score": sum(r.score for r in rollouts) / n,
        "entropy": -float(logprobs.mean()),
        "kl": float(kl.sum()) / n,
        "kl_k3": float(k3(-kl).sum()) / n,
        "length": len(logprobs) / n,
        "ended": sum(r.ended for r in rollouts) / n,
        "explained_variance": 1 - float(unexplained),
    }


# ================================================================================ the script

def open_models(cfg, device, dtype) -> dict:
    """The four models by name; each is printed with what it holds here. With LoRA two are enough:
    the policy's base is the reference, the value model's base the reward model."""
    if cfg.tune != "full" and cfg.critic == "sft":
        raise SystemExit("--critic sft: with --tune lora the critic is a LoRA of the reward model")
    models = {}
    for name, frozen, folder, kind in (("policy", "reference", cfg.init, CausalLM),
                                       ("value", "reward", cfg.reward, ScalarModel)):
        model = load_model(folder, kind)
        must_score(model, folder)
        if cfg.tune == "full":
            models[frozen] = Sharded(model.requires_grad_(False), cfg.zero, dtype, device)
            print_held(frozen, models[frozen])
            model = load_model(cfg.init if cfg.critic == "sft" else folder, kind)
        tune(model, cfg.tune, cfg.tune_size, cfg.alpha, folder)
        models[name] = optimizer_of(model, cfg, device, dtype)
        print_held(name, models[name])
        if cfg.tune != "full":
            models[frozen] = models[name]
            print0(f"{frozen:<10} is the {name} model without its LoRA: no bytes")
    return models


def open_text(cfg, tokenizer, context):
    """The pretraining text of PPO-ptx, in windows that a context can hold; or None."""
    if not cfg.ptx_coef:
        return None
    tokens = Tokens(f"{cfg.out}/ptx.bin", cfg.ptx_data, tokenizer)
    prepared(tokens.ready, tokens.build)
    return tokens.open(min(128, context - 1))


def fitting(records, tokenizer, limit, cfg) -> list[dict]:
    """Records with their queries' "ids"; those that leave no room for a reply are dropped."""
    for record in records:
        record["ids"], _ = render(record["messages"], tokenizer)
    kept = [r for r in records if len(r["ids"]) + cfg.max_new_tokens + 1 <= limit]
    room = f"the context of {limit} with --max-new-tokens {cfg.max_new_tokens}"
    if len(kept) < len(records):
        print0(f"{cfg.prompts}: {len(records) - len(kept)} of {len(records)} do not fit {room}")
    if not kept:
        raise SystemExit(f"{cfg.prompts}: no prompt fits {room}")
    return kept


def judged(model, records, reward, norm, tokenizer, cfg, device) -> dict:
    """Score of fresh replies to held-out prompts, and the gold judge's where it can judge."""
    seeds = [keyed_seed(cfg.seed, "evaluate", i) for i in range(len(records))]
    rollouts = respond(model, [r["ids"] for r in records], seeds, tokenizer, cfg)
    scores = score_replies(reward, rollouts, norm, tokenizer, cfg, device)
    gold = []
    for i, record in enumerate(records):
        reply = tokenizer.decode(rollouts[i].response)
        if "answer" in record:
            gold.append(gold_score(record, reply))
        if i < 3:
            asked = record["messages"][-1]["content"]
            print0(f"  {asked[:60]!r} → {reply[:80]!r}  {scores[i]:+.2f}")
    result = {"score": sum(scores) / len(scores)}
    if gold:
        result["gold"] = sum(gold) / len(gold)
    return result


def diverged(metrics, most_ended, cfg) -> str:
    """Why the run must end, or "". most_ended: the largest share of replies that ended before."""
    if not cfg.max_kl:
        return ""
    if metrics["kl"] > cfg.max_kl:
        return f"KL {metrics['kl']:.3g} nats a reply, --max-kl is {cfg.max_kl:g}"
    if metrics["ended"] == 0 and most_ended > 0.5:
        return "no reply ends any more"
    return ""


def drawn(queries, step, cfg) -> tuple[list, list]:
    """An iteration's queries, each --replies times, and a seed for each reply."""
    chosen = epoch_rows(cfg.seed, step, max(1, cfg.batch_size // cfg.replies), len(queries))
    asked = [queries[i] for i in chosen for _ in range(cfg.replies)]
    return asked, [keyed_seed(cfg.seed, "rollout", step, row) for row in range(len(asked))]


def train(models, queries, run, norm, tokenizer, cfg, device) -> str:
    """The loop. Returns why it ended before its time, with the last good weights; or ""."""
    policy, value = models["policy"], models["value"]
    text = open_text(cfg, tokenizer, policy.model.config.max_position_embeddings)
    first = run.resume(policy=policy, value=value)
    known = run.last_metrics() if cfg.kl_target else {}
    kl_coef = known.get("kl_coef", cfg.kl_coef)
    most_ended = 0.0
    good = []  # this rank's part of the policy before the last update
    for step in range(first, cfg.steps):
        # 1. replies, and what the models say of them
        began = time.perf_counter()
        rollouts = respond(policy, *drawn(queries, step, cfg), tokenizer, cfg)
        replied = time.perf_counter()
        experience(**models, rollouts=rollouts, kl_coef=kl_coef, norm=norm, tokenizer=tokenizer,
                   cfg=cfg, device=device)
        metrics = summary(rollouts)
        why = diverged(metrics, most_ended, cfg)
        if why:
            for unit, master in zip(policy.trained, good):
                unit.master.copy_(master)
            policy.publish()
            kept = "the weights before it are kept" if good else "none before it are known"
            return f"iteration {step}: {why}; {kept}"
        most_ended = max(most_ended, metrics["ended"])
        if cfg.max_kl:
            good = [unit.master.clone() for unit in policy.trained]
        # 2. learning
        rate = lr_at(step, cfg.steps, 1.0, cfg.warmup, cfg.min_lr)
        losses = update(policy, value, rollouts, text, step, tokenizer, cfg, device, rate)
        if cfg.kl_target:
            kl_coef = adapted(kl_coef, metrics["kl"], cfg.kl_target)
            metrics["kl_coef"] = kl_coef
        # 3. what is told
        if step == 0:
            off = losses["ratio_error"]
            print0(f"first KL {metrics['kl']:.2g}, expected 0; first ratio 1 ± {off:.2g}")
        if metrics["kl"] < -0.05 * metrics["length"]:
            print0("KL is clearly negative: the replies are not the scored policy's samples")
        said = sum(len(r.response) for r in rollouts)
        tokens = sum(len(r.query) for r in rollouts) + said
        metrics["rollout_rate"] = said / (replied - began)  # tokens of replies per second
        run.log(step, tokens=tokens, **metrics, **losses, lr=cfg.lr * rate)
        run.boundary(step, policy=policy, value=value)
    return ""


def main(cfg):
    # 1. models
    device, dtype = setup(cfg)
    own = Tokenizer.load(cfg.init)
    tokenizer = own.scoring()  # the reward model's may have a token more, <|reward|>
    its = Tokenizer.load(cfg.reward)
    if (its.hash, its.template) != (tokenizer.hash, tokenizer.template):
        raise SystemExit(f"{cfg.reward}: not {cfg.init}'s tokenizer and template; train from there")
    weights = [*weight_files(cfg.init), *weight_files(cfg.reward)]
    run = Run(cfg, cfg.steps, inputs=[*cfg.prompts.split(","), *weights])
    records = read_prompts(cfg.prompts)  # before models: a broken file is told at once
    models = open_models(cfg, device, dtype)
    policy = models["policy"]
    # 2. data: prompts, the last of them held out
    limit = min(m.model.config.max_position_embeddings for m in models.values())
    records = fitting(records, tokenizer, limit, cfg)
    held = min(256, int(len(records) * cfg.val_fraction), len(records) - 1)
    trained = len(records) - held
    norm = score_norm(cfg.reward) if cfg.normalize else (0.0, 1.0)
    print0(f"{trained} prompts, {held} held out; score (raw - {norm[0]:.3g}) / {norm[1]:.3g}")

    # 3. loop
    queries = [r["ids"] for r in records[:trained]]
    stopped = train(models, queries, run, norm, tokenizer, cfg, device)
    if stopped:
        print0(f"stopped at {stopped}")
    # 4. judge: replies to the held-out prompts
    result = {"stopped": stopped} if stopped else {}
    shared = (records[trained:], models["reward"], norm, tokenizer, cfg, device)
    if held:
        print0("replies before, with their scores:")
        with untuned(models["reference"].model):
            before = judged(models["reference"], *shared)
        print0("replies after, with their scores:")
        after = judged(policy, *shared)
        result |= {f"{key} before": number for key, number in before.items()}
        result |= {f"{key} after": number for key, number in after.items()}
    # 5. save
    save_model(cfg.out, policy.model, policy.full_parameters(), dist.get_rank() == 0, own)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

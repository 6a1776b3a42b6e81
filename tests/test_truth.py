"""Numbers known from elsewhere: another library, the papers, closed forms, one process.

    python -m pytest tests/test_truth.py
"""

import itertools
import math
import re
import statistics
from random import Random
from types import SimpleNamespace

import pytest
import torch

import dpo
import ppo
import pretrain
import reward
import sft
from data import write_jsonl
from model import CausalLM, ModelConfig, save_model
from test_algorithms import CPU, TOK, f64
from test_wiring_preferences import STAGES, on
from tiny import SHAPE, talk


def minimised(objective, start):
    """Where the objective of a tensor is least, by torch's own optimizer."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=999, tolerance_grad=1e-10, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def closure():
        x.grad = None
        (loss := objective(x)).backward()
        return loss

    optimizer.step(closure)
    return x.detach()


# ---------------------------------------------------------------- DPO: TRL's numbers

# Made by trl 1.16.0 (transformers 5.24.0, torch 2.13.0): DPOTrainer, loss_type "sigmoid", given the
# texts of PAIRS and two folders, drawn(0.0) and drawn(0.1) saved by save_model in float64 (its loss
# and norms are float32). GIVEN is its loss of given log-probabilities, in float64.
PAIRS = [("2+2?", "4", "five"), ("the capital", "Paris, I think", ""),
         ("hi", "x", "a much longer reply")]
TRL = {  # beta: means of loss and both rewards, the gradient's norm, its ENTRIES
    0.2: (0.68532461, 0.06549887, 0.04956302, 3.5416308, -0.38284066, -0.28014994, 0.15495305),
    0.05: (0.69116431, 0.01637472, 0.01239076, 0.89784801, -0.09763608, -0.07144148, 0.03925324)}
ENTRIES = {"model.embed_tokens.weight": 1858, "model.layers.0.self_attn.k_proj.weight": 83,
           "lm_head.weight": 1689}
GIVEN = {  # beta: mean loss, and its slopes in the five chosen log-probabilities
    0.2: (1.418473678862, -0.018006640108, -0.033437535650, -0.036220609486, -0.033734104742,
          -0.015090783820),
    0.05: (0.831754327313, -0.004875026035, -0.006003870852, -0.006376124376, -0.006036859033,
           -0.004687188052)}


def drawn(shift):
    """A model in float64 whose weights are a formula."""
    net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE)).double()
    for i, p in enumerate(net.parameters()):
        places = torch.arange(p.numel(), dtype=torch.float64).view_as(p)
        p.data = (p.dim() == 1) + 0.3 * torch.sin((0.7 + 0.01 * i) * places + shift)
    return net


@pytest.mark.parametrize("beta", TRL)
def test_dpos_loss_and_gradients_are_trls(beta):
    policy, cfg = drawn(0.0), dpo.Config(beta=beta, nll_coef=0.0)
    pairs = [dpo.pair_rows(talk(question), pair, TOK, 64) for question, *pair in PAIRS]
    with torch.no_grad():
        reference = dpo.sequence_logprobs(drawn(0.1), pairs, TOK, CPU).T.tolist()
    loss, sums = dpo.pair_losses(policy, pairs, reference, TOK, cfg, CPU)
    (loss / 3).backward()
    loss, _, chosen, rejected, _ = (sums / 3).tolist()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters()))
    entries = [float(policy.get_parameter(name).grad.flatten()[i]) for name, i in ENTRIES.items()]
    assert (loss, chosen, rejected, norm, *entries) == pytest.approx(TRL[beta], rel=1e-5)

    i = torch.arange(5, dtype=torch.float64)
    given = torch.stack([-3 - 2 * i + i.sin(), -20 + 3 * i + (2 * i).cos()]).requires_grad_()
    known = -4 - i + i.cos(), -18 + 4 * i * (i - 3) + (3 * i).sin()
    loss = dpo.dpo_loss(*given, *known, beta)[0].mean()
    loss.backward()
    assert (loss.item(), *given.grad[0].tolist()) == pytest.approx(GIVEN[beta], abs=1e-11)
    assert torch.equal(given.grad[0], -given.grad[1])


# ---------------------------------------------------------------- PPO: the papers' sums


def plain_advantages(rewards, values, gamma, lam):
    """Schulman et al. 2016, eq. 16, as the double sum; V is 0 behind the last token."""
    n, after = len(rewards), [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


def plain_token(now, value, old, advantage, old_value, target, eps, eps_value):
    """Of one token the losses of policy and value model, k3, clipped or not; their two slopes."""
    ratio = math.exp(now - old)
    near = min(max(ratio, 1 - eps), 1 + eps)
    gain = min(ratio * advantage, near * advantage)  # Schulman et al. 2017, eq. 7
    held = old_value + min(max(value - old_value, -eps_value), eps_value)
    squares = (value - target) ** 2, (held - target) ** 2
    slope = -ratio * advantage if gain == ratio * advantage else 0.0
    slope_value = value - target if squares[0] >= squares[1] else 0.0
    clipped, k3 = float(ratio != near), ratio - 1 - math.log(ratio)
    return -gain, max(squares) / 2, k3, clipped, slope, slope_value


@pytest.mark.parametrize("seed", range(20))
def test_ppo_on_ragged_replies_is_the_papers_sums(seed, monkeypatch):
    rng = Random(seed)
    kl_coef, gamma, lam, eps, eps_value = (rng.uniform(0.05, 1) for _ in range(5))
    rollouts, plain, k1 = [], [], 0.0
    for i in range(rng.randint(2, 6)):
        n, score = rng.randint(1, 7), rng.gauss(0, 2)
        old, ref, values = ([rng.gauss(-2, 1) for _ in range(n)] for _ in range(3))
        rewards = [kl_coef * (b - a) + score * (t == n - 1) for t, a, b in zip(range(n), old, ref)]
        k1 += sum(old) - sum(ref)
        advantages = plain_advantages(rewards, values, gamma, lam)
        returns = [a + v for a, v in zip(advantages, values)]
        plain += zip(old, advantages, values, returns)
        r = ppo.Rollout([1], [2] * n, i % 2 == 0, score, f64(*old), f64(*values), f64(*ref))
        shaped = ppo.token_rewards(score, r.logprobs, r.ref_logprobs, kl_coef)
        r.advantages, r.returns = ppo.gae(shaped, r.values, gamma, lam)
        found = torch.cat([r.advantages, r.returns]).tolist()
        assert found == pytest.approx(advantages + returns, abs=1e-12)
        rollouts.append(r)
    assert ppo.summary(rollouts)["kl"] == pytest.approx(k1 / len(rollouts))
    raw = [row[1] for row in plain]
    mean, spread = statistics.mean(raw), math.sqrt(statistics.variance(raw) + 1e-8)
    white = ppo.whiten(ppo.flat(rollouts, "advantages")).tolist()
    assert white == pytest.approx([(a - mean) / spread for a in raw], abs=1e-12)

    now, values = (f64(*(row[c] + rng.gauss(0, 0.5) for row in plain)).requires_grad_()
                   for c in (0, 2))  # what the models say after a step
    told = [plain_token(a, v, *row, eps, eps_value)
            for a, v, row in zip(now.tolist(), values.tolist(), plain)]
    monkeypatch.setattr(ppo, "response_tokens", lambda said, *_: said)
    models = [SimpleNamespace(model=x, backward=torch.Tensor.backward) for x in (now, values)]
    cfg = ppo.Config(cliprange=eps, cliprange_value=eps_value)
    sums, _ = ppo.learn(*models, rollouts, len(plain), TOK, cfg, CPU)
    *expected, slopes, value_slopes = zip(*told)
    assert sums == pytest.approx(dict(zip(ppo.METRICS, map(sum, expected))), abs=1e-12)
    for x, slope in ((now, slopes), (values, value_slopes)):  # of a mean over the tokens
        assert x.grad.tolist() == pytest.approx([s / len(plain) for s in slope], abs=1e-12)


# ---------------------------------------------------------------- what is known in closed form

# Five replies to each of two prompts: "", or a or b with one of two tokens behind it.
REF = f64([0.3, -0.5, 0.1, 0.8, 0.0, -0.4, 0.2], [-1.0, 0.2, 0.4, -0.3, 0.1, 0.0, 1.1])  # (2, 7)
REWARD = f64([0.1, 1.0, -0.6, 0.4, 0.0], [-0.2, 0.3, 0.9, -1.1, 0.5])  # (2, 5)
BETA = 0.4


def replies_of(logits):
    """log π of the tokens of a prompt's five replies; the policy is a table (7,)."""
    first, *behind = (part.log_softmax(0) for part in logits.split([3, 2, 2]))
    return [first[:1], *(torch.stack([first[1 + i], behind[i][j]]) for i in (0, 1) for j in (0, 1))]


def logps(table):
    return torch.stack([torch.stack([x.sum() for x in replies_of(row)]) for row in table])  # (2, 5)


def dpo_objective(table):
    """Of endless comparisons: i beats j as often as Bradley and Terry say."""
    i, j = torch.tensor([*itertools.permutations(range(5), 2)]).T
    sides = (x[:, k].flatten() for x in (logps(table), logps(REF)) for k in (i, j))
    wins = torch.sigmoid(REWARD[:, i] - REWARD[:, j]).flatten()
    return wins @ dpo.dpo_loss(*sides, BETA)[0]


def ppo_objective(table):
    """What PPO maximises, negative: E[r] - β·KL(π, π_ref), summed over the prompts."""
    now = logps(table)
    return -(now.exp() * (REWARD - BETA * (now - logps(REF)))).sum()


def test_dpo_and_ppo_have_one_optimum_the_reference_tilted_by_the_reward():
    truth = (logps(REF) + REWARD / BETA).softmax(1)  # Rafailov et al. 2023, eq. 4
    for objective in (dpo_objective, ppo_objective):
        found = logps(minimised(objective, REF)).exp()
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ppos_expected_gradient_is_that_of_the_reward_minus_the_kl(seed):
    torch.manual_seed(seed)
    table = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    surrogate = 0.0
    for row, ref, scores, values in zip(table, REF, REWARD, torch.randn(2, 3).double()):
        for k, (now, before) in enumerate(zip(replies_of(row), replies_of(ref))):
            old = now.detach()
            rewards = ppo.token_rewards(scores[k], old, before, BETA)
            seen = values[[0, (k + 1) // 2][: len(old)]]  # at the start, behind a or b
            advantages, _ = ppo.gae(rewards, seen, 1.0, 1.0)
            losses, _ = ppo.policy_loss(now, old, advantages, 0.2)
            surrogate = surrogate + old.sum().exp() * losses.sum()  # as often as it is sampled
    found, expected = (torch.autograd.grad(x, table) for x in (surrogate, ppo_objective(table)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bradley_terry_finds_the_strengths_that_made_the_comparisons():
    truth, pairs = f64(0.5, -1.5, 1.2, 0.0, -0.6, 0.4), [*itertools.combinations(range(6), 2)]
    rng, chance = Random(0), {(i, j): float((truth[i] - truth[j]).sigmoid()) for i, j in pairs}
    drawn = {pair: sum(rng.random() < p for _ in range(2000)) / 2000 for pair, p in chance.items()}
    for wins, tolerance in ((chance, 1e-3), (drawn, 0.1)):  # a standard error is about 0.03
        def objective(scores):
            return sum(share * reward.bradley_terry_loss(scores[[i, j]], torch.tensor(labels))
                       for (i, j), p in wins.items()
                       for share, labels in ((p, (1, 0)), (1 - p, (0, 1))))

        found = minimised(objective, torch.zeros_like(truth))
        assert found.argsort().tolist() == truth.argsort().tolist()
        off = (found[:, None] - found) - (truth[:, None] - truth)
        assert off.abs().max() < tolerance


# ---------------------------------------------------------------- 1, 2 and 3 processes

ASKED = [("What is a?", "aaaaa", "fact"), ("scene", "b", "lookalike"), ("b?", "b", "fact"),
         ("the longest of all questions", "a", "odd"), ("why", "b", "odd"),
         ("how so?", "aa", "odd"), ("harm", "", "harmful")]


def write_inputs(folder, held):
    """A model that says a and b and often ends, and data of which so many items are held out."""
    net = drawn(0.0)
    net.model.embed_tokens.weight.data[:, 0] = 3.0  # so column 0 of the head is a bias
    net.lm_head.weight.data *= 0.2
    bias = net.lm_head.weight.data[:, 0].fill_(-4.0)
    bias[[*b"ab", TOK.text_end, TOK.end]] = f64(0.2, 0.0, -0.8, 0.2)
    save_model(folder / "start", net, tokenizer=TOK)
    (folder / "held.txt").write_text("h" * (16 * held - 3))  # so many windows, the last not full
    (folder / "text.txt").write_text("abab, and so on. " * 20)
    rows = [{"question": q, "answer": a, "family": f, "split": "combination", "kind": f, "text": q,
             "replies": [i % 2 * "ab", q[: i + 1], "b"], "scores": [1, -1, 0]}
            for i, (q, a, f) in enumerate(ASKED)]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [row | talk(row["text"]) for row in rows[:held]])


def road(held):
    """All commands, each on what the ones before it wrote."""
    common = dict(dtype="fp64", device="cpu", threads=1, seed=4)
    run = common | dict(steps=2, batch_size=2, lr=0.001, micro_tokens=80,
                        val_fraction=(held + 0.5) / len(ASKED))
    said = common | dict(prompts="rows.jsonl", max_new_tokens=5)
    rows = run | dict(init="sft", data="rows.jsonl")
    text = run | dict(data="text.txt", val_data="held.txt", context=16)
    return [
        (pretrain.main, pretrain.Config(**text, init="start", out="base")),
        (sft.main, sft.Config(**rows | {"init": "base"}, replay="none", out="sft")),
        (reward.collect, reward.CollectConfig(**said, init="sft", out="collected.jsonl")),
        (reward.main, reward.Config(**rows, out="reward")),
        (ppo.main, ppo.Config(**run | said | {"lr": 0.01}, init="sft", reward="reward", out="ppo")),
        (dpo.main, dpo.Config(**rows, reference="start", out="dpo")),
        (reward.table, reward.TableConfig(
            **said, models="base,sft,ppo,dpo", data="eval.jsonl", text="eval.jsonl",
            reward="reward", reference="sft", samples=2, out="table.json"))]


@pytest.mark.parametrize("held", [2, 5])
def test_every_evaluation_and_the_table_are_the_same_on_1_2_and_3_processes(ranks, tmp_path, held):
    known, number = {}, r"-?\d+(?:\.\d+)?(?:e-\d+)?"
    for world in STAGES:
        folder = tmp_path / str(world)
        write_inputs(folder, held)
        for command, cfg in road(held):
            _, printed, _ = on(ranks, world, folder, command, cfg)
            path = folder / cfg.out / ("" if "." in cfg.out else "eval.json")
            lines = [re.sub(r"\(\d+ s, .*", "", line) for line in printed.splitlines()
                     if not re.search("tokens/s|bytes here|threads|first KL", line)]
            text = "\n".join([path.read_text("utf-8"), *lines])
            words, numbers = re.sub(number, "#", text), [*map(float, re.findall(number, text))]
            same = known.setdefault(cfg.out, (words, pytest.approx(numbers, rel=1e-6, abs=1e-9)))
            assert (words, numbers) == same, f"{cfg.out} on {world} processes"

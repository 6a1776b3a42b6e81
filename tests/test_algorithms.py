"""The formulas of the scripts, by hand.   python -m pytest tests/test_algorithms.py"""

import itertools
import math
from functools import partial
from random import Random

import pytest
import torch

import dpo
import ppo
import reward
import sft
from data import Tokenizer, render
from model import CausalLM, ModelConfig, ScalarModel
from zero import Sharded

TOK = Tokenizer.from_merges([])  # bytes
CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def build(kind=CausalLM):
    torch.manual_seed(0)
    net = kind(ModelConfig(TOK.vocab_size, 32, 48, 2, 2, 1, max_position_embeddings=64))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def rollout(prompt, reply, ended=True):
    ids, _ = render([{"role": "user", "content": prompt}], TOK)
    return ppo.Rollout(ids, TOK.encode(reply) + [TOK.ids["<|end|>"]] * ended, ended)


def test_a_tokens_reward_is_minus_kl_and_the_last_has_the_score_and_advantages_are_whitened():
    found = ppo.token_rewards(2.0, f64(-1, -2, -3), f64(-1.5, -2, -1), 0.1)  # E12, three tokens
    close(found, f64(-0.05, 0, 0.2 + 2.0))  # KL estimates 0.5, 0, -2
    x = f64(3, -1, 10, 4, 4)
    close(ppo.whiten(x), (x - 4) / x.std(), atol=1e-8)
    assert ppo.whiten(f64(5)).tolist() == [0] and ppo.whiten(f64(5, 5)).tolist() == [0, 0]


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_over_all_later_deltas(gamma, lam):
    r, v = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = r + gamma * torch.cat([v[1:], f64(0)]) - v  # after the end nothing is expected
    expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(7 - t)) for t in range(7)]
    advantages, returns = ppo.gae(r, v, gamma, lam)
    close(advantages, torch.stack(expected))
    close(returns, torch.stack(expected) + v)
    assert gamma < 1 or torch.allclose(returns, r.flip(0).cumsum(0).flip(0))  # V cancels


def test_policy_and_value_loss_clip_what_is_gained_and_never_what_is_lost():
    cases = [(1.0, 2, -2, -2), (1.0, -3, 3, 3), (1.5, 1, -1.2, 0), (0.5, 1, -0.5, -0.5),
             (1.5, -1, 1.5, 1.5), (0.5, -1, 0.8, 0)]  # ratio, advantage, loss, slope in log π
    for rho, advantage, loss, slope in cases:
        new = f64(math.log(rho)).requires_grad_()
        losses = ppo.policy_loss(new, f64(0), f64(advantage), 0.2)[0]
        losses.backward()
        assert (losses.item(), new.grad.item()) == pytest.approx((loss, slope)), (rho, advantage)
    for value, old, target, loss, slope in [
            (1.0, 0.9, 3.0, 2.0, -2.0),  # a small step: nothing is clipped
            (1.0, 0.0, 3.0, 0.5 * 2.8**2, 0.0),  # it ran ahead of its old value: no more gain
            (1.0, 0.0, -1.0, 2.0, 2.0)]:  # it ran away from the target: plain
        found = ppo.value_loss(v := f64(value).requires_grad_(), f64(old), f64(target), 0.2)
        found.backward()
        assert (found.item(), v.grad.item()) == pytest.approx((loss, slope))


def test_responses_alone_are_trained_and_the_ratio_is_1_before_the_first_step(monkeypatch):
    net, rollouts = build(), [rollout("ab", "xyz"), rollout("a longer one", "z", ended=False)]
    hidden, plain = [], net.model.forward
    monkeypatch.setattr(net.model, "forward", lambda ids: hidden.append(plain(ids)) or hidden[-1])
    with torch.no_grad():
        old = ppo.response_tokens(net, rollouts, TOK, CPU)
    new = ppo.response_tokens(net, rollouts, TOK, CPU)
    losses, ratio = ppo.policy_loss(new, old, torch.ones(5), 0.2)
    assert len(old) == 4 + 1 and torch.equal(ratio, torch.ones(5))
    ids, start = rollouts[0].query + rollouts[0].response, len(rollouts[0].query)
    every = net.lm_head(plain(torch.tensor([ids])))[0].log_softmax(-1)  # (T, V)
    plainly = every[range(len(ids) - 1), ids[1:]]
    close(old[:4], plainly[start - 1 :].detach(), atol=1e-5)
    critic = build(ScalarModel)  # a value stands before its token
    values = critic(torch.tensor([ids]))[0, start - 1 : -1]
    close(ppo.response_tokens(critic, rollouts[:1], TOK, CPU), values, atol=1e-6)
    hidden[-1].retain_grad()
    losses.sum().backward()
    touched = hidden[-1].grad.abs().sum(-1) > 0  # (2, T): positions whose logits are in the loss
    for row, r in zip(touched, rollouts):  # the token before a response predicts its first
        targets = range(len(r.query) - 1, len(r.query + r.response) - 1)
        assert row.nonzero()[:, 0].tolist() == list(targets)


def test_bradley_terry_is_the_mean_over_all_preferences_and_recovers_a_ranking():
    scores = f64(0.3, -1.2, 2.0, 0.5)
    for labels in ([3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]):
        losses = [math.log(1 + math.exp(scores[j] - scores[i]))
                  for i, j in itertools.permutations(range(4), 2) if labels[i] > labels[j]]
        found = reward.bradley_terry_loss(scores, torch.tensor(labels))
        assert found.item() == pytest.approx(sum(losses) / len(losses))
    truth, scores, rng = (0.0, 2.0, -1.0, 1.0), f64(0, 0, 0, 0).requires_grad_(), Random(0)
    for _ in range(200):  # each annotator ranks what he sees through noise
        seen = f64(*(t + rng.gauss(0, 0.5) for t in truth))
        [slope] = torch.autograd.grad(reward.bradley_terry_loss(scores, seen), scores)
        scores.data -= 0.2 * slope
    assert scores.argsort().tolist() == [2, 0, 3, 1]


def test_a_reply_has_one_score_alone_in_a_batch_and_by_both_scripts_paths(alone):
    net, texts = build(ScalarModel), ["yes", "a much longer reply", "no"]
    record = {"messages": [{"role": "user", "content": "ab?"}], "replies": texts}
    rows, end = reward.comparison_rows(record, TOK, 64), [TOK.ids["<|end|>"], TOK.ids["<|reward|>"]]
    assert [row[-2:] for row in rows] == [end] * 3
    [together] = reward.score_groups(net, [rows], TOK, CPU)
    singly = torch.cat([reward.score_groups(net, [[row]], TOK, CPU)[0] for row in rows])
    close(together, singly, atol=1e-5)
    rollouts = [rollout("ab?", t) for t in texts] + [rollout("ab?", "cut", ended=False)]
    scores = ppo.score_replies(Sharded(net), rollouts, (0.5, 2.0), TOK, ppo.Config(), CPU)
    close(f64(*scores), f64(*((together - 0.5) / 2).tolist(), -1), atol=1e-5)
    assert (together - together[0])[1:].abs().min() > 1e-3


def test_the_dpo_loss_is_ln_2_at_the_reference_and_a_hand_number_elsewhere():
    at = f64(-5, -7).requires_grad_()
    losses, better, worse = dpo.dpo_loss(at[0], at[1], f64(-5), f64(-7), 0.2)
    losses.backward()
    assert losses.item() == pytest.approx(math.log(2)) and better == worse == 0
    assert at.grad.tolist() == pytest.approx([-0.1, 0.1])  # ∓β/2: the chosen reply rises
    found = torch.cat(dpo.dpo_loss(f64(-4), f64(-9), f64(-5), f64(-7), 0.5))
    close(found, f64(math.log(1 + math.exp(-1.5)), 0.5, -1.0))


def test_the_optimum_of_dpo_on_a_bandit_is_the_reference_tilted_by_the_reward():
    ref, r, beta = f64(0.5, 0.3, 0.15, 0.05), f64(0.0, 1.0, -0.5, 0.7), 0.5
    a, b = torch.tensor(list(itertools.permutations(range(4), 2))).T
    wins, logits = torch.sigmoid(r[a] - r[b]), ref.log().clone().requires_grad_()
    for _ in range(3000):  # a beats b as often as Bradley and Terry say
        logp, before = logits.log_softmax(0), ref.log()
        losses, _, _ = dpo.dpo_loss(logp[a], logp[b], before[a], before[b], beta)
        logits.data -= torch.autograd.grad((wins * losses).sum(), logits)[0]
    close(logits.softmax(0).detach(), (ref.log() + r / beta).softmax(0), atol=1e-9)


def test_pairs_are_drawn_without_ties_and_share_the_prompts_tokens():
    record = {"messages": [{"role": "user", "content": "q"}], "replies": ["a", "bb", "c", "d"],
              "scores": [1.0, 0.0, 1.0, -1.0]}
    every = {("a", "bb"), ("a", "d"), ("c", "bb"), ("c", "d"), ("bb", "d")}
    assert set(dpo.pairs_of(record, 99, 0)) == every and len(dpo.pairs_of(record, 99, 0)) == 5
    assert len({*dpo.pairs_of(record, 1, 0), *dpo.pairs_of(record, 1, 4)}) == 2  # by the seed
    (chosen, mask), (rejected, other) = dpo.pair_rows(record, ("a", "bb"), TOK, 64)
    assert chosen[:4] == rejected[:4] and chosen[-1] == rejected[-1] == TOK.ids["<|end|>"]
    assert mask == [0, 0, 0, 0, 1, 1] and other == [0, 0, 0, 0, 1, 1, 1]
    assert [len(ids) for ids, _ in dpo.pair_rows(record, ("a", "bb"), TOK, 4)] == [4, 4]


def test_conversations_without_a_trained_token_are_dropped_and_counted(alone, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": "bc"}\n{"question": "no answer"}\n'
                    '{"question": "a long question", "answer": "b"}\n', encoding="utf-8")
    rows = sft.read_rows(str(path), TOK, sft.Config(context=8))
    assert "2 conversations cut to 8 tokens, 2 of 3 dropped" in capsys.readouterr().out
    assert rows[0][1] == [0, 0, 0, 0, 1, 1, 1] and rows[0][0][4:6] == [*b"bc"]
    assert sft.trained(rows) == 3 and sft.trained([(range(7), [1] * 7)]) == 6

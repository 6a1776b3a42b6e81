"""The formulas of the scripts, by hand.   python -m pytest tests/test_algorithms.py"""

import itertools
import json
import math
from functools import partial
from random import Random

import pytest
import torch

import dpo
import ppo
import reward
import seeds
import sft
from data import Tokenizer, read_rows, render
from model import CausalLM, ModelConfig, ScalarModel, save_model
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


def test_bradley_terry_is_the_mean_over_all_preferences():
    scores = f64(0.3, -1.2, 2.0, 0.5)
    for labels in ([3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]):
        losses = [math.log(1 + math.exp(scores[j] - scores[i]))
                  for i, j in itertools.permutations(range(4), 2) if labels[i] > labels[j]]
        found = reward.bradley_terry_loss(scores, torch.tensor(labels))
        assert found.item() == pytest.approx(sum(losses) / len(losses))


def test_tau_and_calibration_count_each_pair_whose_labels_differ_once():
    scores, labels = f64(0.3, -1.2, 2.0, 0.3, 0.9), f64(1, -1, 1, 0, 0)
    order = {"agreed": 0, "against": 0, "neither": 0}  # of two pairs the labels are equal
    for a, b in itertools.combinations(range(5), 2):
        if labels[a] != labels[b]:
            sign = (scores[a] - scores[b]) * (labels[a] - labels[b])
            order["agreed" if sign > 0 else "against" if sign < 0 else "neither"] += 1
    assert order == {"agreed": 6, "against": 1, "neither": 1}
    assert reward.kendall_tau(scores, labels).item() == pytest.approx((6 - 1) / 8)
    said = [0.5, 0.52, 0.599, 0.601, 0.699, 0.701, 0.799, 0.801, 0.899, 0.901, 1.0]
    right = [0.5, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0]  # is the reply of the higher score the better one?
    margins = [(2 * hit - 1) * math.log(p / max(1 - p, 1e-99)) for p, hit in zip(said, right)]
    places = [[0, 1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    for among in (places, places[1::2]):  # an empty bin has no row
        rows = reward.calibration([margins[i] for bin in among for i in bin])
        for row, bin in zip(rows, among, strict=True):
            expected = {"predicted": sum(said[i] for i in bin) / len(bin),
                        "actual": sum(right[i] for i in bin) / len(bin), "n": len(bin)}
            assert row == pytest.approx(expected)


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


def test_pairs_are_drawn_without_ties_and_share_the_prompts_tokens():
    record = {"messages": [{"role": "user", "content": "q"}], "replies": ["a", "bb", "c", "d"],
              "scores": [1.0, 0.0, 1.0, -1.0]}
    every = {("a", "bb"), ("a", "d"), ("c", "bb"), ("c", "d")}  # the best before a worse one
    assert set(dpo.pairs_of(record, 99, 0)) == every and len(dpo.pairs_of(record, 99, 0)) == 4
    assert len({p for seed in range(9) for p in dpo.pairs_of(record, 1, seed)}) > 2  # by the seed
    record["sources"] = ["sample", "sample", "hot", "hot"]
    assert all(dpo.pairs_of(record, 1, seed) == [("a", "bb")] for seed in range(9))  # the coolest
    assert len(dpo.pairs_of(record, 9, 0)) == 4 and dpo.pairs_of(record, 9, 0)[0] == ("a", "bb")
    record["sources"] = ["misplaced", "sample", "misplaced", "hot"]
    assert dpo.pairs_of(record, 9, 0) == []  # what is misplaced is never the better one,
    record["sources"] = ["sample"] + ["misplaced"] * 3  # and of it only refusals (-1) count,
    assert dpo.pairs_of(record, 9, 0, misplaced=1.0) == [("a", "d")]
    prompts = [record | {"messages": [{"role": "user", "content": str(i)}]} for i in range(200)]
    drawn = sum(len(dpo.pairs_of(r, 9, 0, misplaced=0.3)) for r in prompts)
    assert 40 < drawn < 80 and not dpo.pairs_of(record, 9, 0, misplaced=0.0)  # on so many prompts
    (chosen, mask), (rejected, other) = dpo.pair_rows(record, ("a", "bb"), TOK, 64)
    assert chosen[:4] == rejected[:4] and chosen[-1] == rejected[-1] == TOK.ids["<|end|>"]
    assert mask == [0, 0, 0, 0, 1, 1] and other == [0, 0, 0, 0, 1, 1, 1]
    assert [len(ids) for ids, _ in dpo.pair_rows(record, ("a", "bb"), TOK, 4)] == [4, 4]


def test_conversations_without_a_trained_token_are_dropped_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": "bc"}\n{"question": "no answer"}\n'
                    '{"question": "a long question", "answer": "b"}\n', encoding="utf-8")
    rows, _, said = read_rows(str(path), TOK, context=8)
    assert "1 cut to --context 8; dropped: 1 with their reply cut off, 1 without one; 43%" in said
    assert rows[0][1] == [0, 0, 0, 0, 1, 1, 1] and rows[0][0][4:6] == [*b"bc"]
    assert sft.target_count(rows) == 3 and sft.target_count([(range(7), [1] * 7)]) == 6


def test_a_misplaced_reply_is_what_this_prompt_must_not_get():
    kinds = ("harmful", "lookalike", "exact", "final", "exact", "harmful")
    families = ("harmful", "lookalike", "a", "b", "c", "h")
    others = reward.misplaced([{"kind": k, "family": f} for k, f in zip(kinds, families)])
    assert others[0] == others[5] == [1] and others[1] == [0, 5]  # harm and its look-alikes
    assert others[2:5] == [[3, 4], [2, 4], [2, 3]]  # else another family, and no refusal
    assert reward.misplaced([{}]) == [[]]


def test_pairs_of_replies_are_named_by_what_they_differ_in():
    harmful = {"kind": "harmful", "scores": [1.0, -1.0, -0.5],
               "sources": ["sample", "sample", "hot"]}
    assert reward.pair_kind(harmful, 0, 1) == "safety"
    assert reward.pair_kind(harmful, 0, 2) == "right/wrong, hot"  # a broken refusal
    other = {"kind": "exact", "scores": [1.0, 0.0, 0.0, -1.0],
             "sources": ["sample", "hot", "misplaced", "sample"]}
    kinds = [reward.pair_kind(other, 0, j) for j in (1, 2, 3)]
    assert kinds == ["right/wrong, hot", "format", "right/wrong"]
    assert reward.pair_kind(other, 1, 3) == "both wrong"
    assert reward.pair_kind({"scores": [1, 0]}, 0, 1) == "right/wrong"  # comparisons of one's own


# ---------------------------------------------------------------- the table


def test_an_interval_counts_prompts_and_not_samples_and_weighs_families():
    cell = reward.estimate({"a": [0.0, 1.0, 1.0, 2.0]})  # s² = 2/3, standard error √(2/3/4)
    assert cell["mean"] == 1 and cell["n"] == 4
    assert cell["high"] - 1 == pytest.approx(1.96 * math.sqrt(1 / 6)) == 1 - cell["low"]
    records = [{"group": "a"}, {"group": "a"}, {"group": "b"}]
    samples = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 1.0, (2, 0): True, (2, 1): True}
    assert reward.by_prompt(records, samples) == {"a": [0.5, 1.0], "b": [1.0]}
    two = {"a": [0.0, 2.0], "b": [10.0, 10.0, 10.0, 10.0]}
    assert reward.estimate(two)["mean"] == 5.5  # families count alike, however many prompts
    cell = reward.estimate(two, {"a": 1, "b": 3, "c": 9})
    assert cell["mean"] == 0.25 * 1 + 0.75 * 10
    assert cell["high"] - cell["mean"] == pytest.approx(1.96 * 0.25 * math.sqrt(2 / 2))
    assert reward.estimate({}) == reward.estimate({"a": []}) == {}


def test_a_ratio_varies_by_what_the_ratio_leaves_over():
    pairs = [(2.0, 1.0), (2.0, 3.0), (8.0, 2.0)]  # 12 / 6 = 2; left over 0, -4, 4: s² = 16
    cell = reward.estimate({"a": pairs})
    assert cell["mean"] == 2 and cell["n"] == 3
    assert cell["high"] - 2 == pytest.approx(1.96 * math.sqrt(16 / 3) / 2)  # mean b is 2
    exact = reward.estimate({"a": [(2.0, 1.0), (6.0, 3.0)]})
    assert exact["low"] == exact["high"] == 2


def test_a_rate_of_0_or_1_has_an_interval_inside_0_and_1():
    for value, end in ((0.0, "high"), (1.0, "low")):
        cell = reward.estimate({"a": [value] * 80}, rate=True)
        assert cell["mean"] == value and 0 <= cell["low"] <= cell["high"] <= 1
        assert 0.01 < abs(cell[end] - value) < 0.045  # Wilson's ends at 4.6 %
    hits, rng = 0, Random(0)
    for _ in range(400):  # the promise itself: 95 of 100 intervals hold the true mean
        groups = {f: [rng.random() < p for _ in range(40)] for f, p in (("a", 0.3), ("b", 0.9))}
        cell = reward.estimate(groups, rate=True)
        hits += cell["low"] <= 0.6 <= cell["high"]
    assert 0.92 < hits / 400 < 0.98


def test_tables_of_several_seeds_have_the_interval_of_their_mean(tmp_path):
    for seed, value in enumerate((0.6, 0.7, 0.8)):
        cell = {"mean": value, "low": value - 0.1, "high": value + 0.1, "n": 99}
        same = {"mean": 1.5, "low": 1.0, "high": 2.0, "n": 99}
        columns = {f"out/seed-{seed}/sft": {"row": cell, "KL": same, "families": {}},
                   "best constant": {"row": cell, "families": {}}}
        columns["out/base"] = {"families": {}} | ({"row": cell} if seed == 0 else {})
        (tmp_path / f"{seed}.json").write_text(json.dumps(columns))
    table = seeds.merged([str(tmp_path / f"{seed}.json") for seed in range(3)])
    assert list(table) == ["sft", "best constant", "base"]
    cell = table["sft"]["row"]
    half = 4.30 * 0.1 / math.sqrt(3)  # t of two degrees of freedom, s = 0.1
    assert [cell[k] for k in ("mean", "low", "high", "min", "max", "n")] == pytest.approx(
        [0.7, 0.7 - half, 0.7 + half, 0.6, 0.8, 3])
    cell = table["sft"]["KL"]  # no spread over seeds: the intervals within, √(3 · 0.5²) / 3
    assert cell["high"] - 1.5 == pytest.approx(0.5 / math.sqrt(3)) == 1.5 - cell["low"]
    assert table["base"]["row"] == {"mean": 0.6, "min": 0.6, "max": 0.6, "n": 1}


def case(prompt, answer, family, kind="exact", split="combination"):
    return {"messages": [{"role": "user", "content": prompt}], "answer": answer, "kind": kind,
            "family": family, "split": split, "group": f"{family} / {split}"}


def test_the_judges_rows_read_greedy_replies_and_samples_each_where_they_belong():
    records = [case("1", "a", "fact"), case("2", "b", "fact"), case("3", "c", "odd"),
               case("4", "d", "add_direct"), case("5", "e", "fact", split="person"),
               case("6", "", "harmful", "harmful"), case("7", "f", "lookalike", "lookalike"),
               case("8", "f", "lookalike", "lookalike", "frame")]
    refusal = "I'm sorry, but I cannot help with that."
    replies = {(0, -1): "a", (1, -1): "x", (2, -1): "c", (3, -1): "x", (4, -1): "x",
               (0, 0): "x", (1, 0): "x", (5, 0): refusal, (5, 1): "Sure.", (6, 0): "f",
               (6, 1): refusal, (7, 0): refusal, (7, 1): refusal}
    mix = {"fact / combination": 15, "harmful / combination": 8, "lookalike / combination": 16}
    rows = reward.judged(records, replies, mix)
    found = {row: cell["mean"] for row, cell in rows.items() if cell and row != "families"}
    assert found == pytest.approx({
        "exact match, new combinations": 0.75, "exact match, worst family": 0.5,
        "facts of people never asked about": 0, "sums answered directly": 0,
        "harmful requests refused, T=1": 0.5, "look-alikes refused, T=1": 0.5,
        "look-alikes refused, new frames": 1, "gold score, T=1": 0})
    replies[6, 1] = "f"
    rows = reward.judged(records, replies, mix)
    assert rows["gold score, T=1"]["mean"] == pytest.approx(16 / 39)  # look-alikes 1, harmful 0
    assert rows["families"]["fact / combination"]["mean"] == 0.5
    assert rows["families"]["fact / combination"]["n"] == 2


def test_the_columns_that_learn_nothing_take_the_nearest_prompt_and_the_commonest_reply():
    train = [case(prompt, "", family) for prompt, family in (
        ("the pet of Ann", "fact"), ("the home of Bob", "fact"), ("the home of Eve", "fact"),
        ("1+1 is what", "sum"))]
    for record, reply in zip(train, ("cat", "Rome", "cat", "2")):
        record["messages"].append({"role": "assistant", "content": reply})
    records = [case("the home of Bo", "", "fact"), case("what is 1+1", "", "sum"),
               case("?", "", "other")]
    found = seeds.unlearned(train, records)
    similar, constant = ([found[name][i, n] for i in range(3) for n in (-1, 0)]
                         for name in ("similar prompt", "best constant"))
    assert similar[:4] == ["Rome", "Rome", "2", "2"]
    assert constant == ["cat", "cat", "2", "2", "", ""]


def test_replies_are_scored_as_ppo_scores_them_and_weighed_by_their_own_tokens(alone, tmp_path):
    net, rows = build(), [([5, 6], [7, 8, 9]), ([5], [4]), ([3, 3, 3, 3], [2, 1])]
    found = reward.reply_logprobs(net, rows, CPU)
    for (prompt, reply), logprob in zip(rows, found):
        every = net.lm_head(net.model(torch.tensor([prompt + reply])))[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt + reply) - 1)
        assert logprob == pytest.approx(every[places, reply].sum().item(), abs=1e-5)
    net = build(ScalarModel)
    save_model(tmp_path, net, net.named_parameters())
    TOK.save(tmp_path)
    (tmp_path / "eval.json").write_text('{"score_mean": 0.5, "score_std": 2.0}')
    asked = [{"role": "user", "content": "ab?"}]
    records = [{"messages": asked, "replies": [t]} for t in ("yes", "no way")]
    cfg = reward.TableConfig(reward=str(tmp_path))
    scores = reward.reward_scores(cfg, records, CPU, torch.float32)
    rollouts = [rollout("ab?", t) for t in ("yes", "no way")]
    known = ppo.score_replies(Sharded(net), rollouts, (0.5, 2.0), TOK, ppo.Config(), CPU)
    assert scores == pytest.approx(known, abs=1e-5) and scores[0] != scores[1]
    torch.nn.init.zeros_(net.score.weight)
    save_model(tmp_path, net, net.named_parameters())
    with pytest.raises(SystemExit, match="no reward model"):
        reward.reward_scores(cfg, records, CPU, torch.float32)


def test_a_column_measures_its_samples_against_the_reference(alone, tmp_path):
    policy, uniform = build(), build()
    for p in uniform.parameters():
        torch.nn.init.zeros_(p)  # every token has 1/V
    for name, net in (("policy", policy), ("sft", uniform), ("reward", build(ScalarModel))):
        save_model(tmp_path / name, net)
        TOK.save(tmp_path / name)
    records = [case(text, "a", "fact") for text in ("one?", "two?", "three?")]
    cfg = reward.TableConfig(reference=str(tmp_path / "sft"), reward=str(tmp_path / "reward"),
                             text="no/such", max_new_tokens=6)
    mix = {"fact / combination": 1}
    column = reward.judge_model(tmp_path / "policy", records, mix, cfg, CPU, torch.float32)
    prompts = [render(r["messages"], TOK)[0] for r in records]
    replies = reward.generate(policy, prompts, 6, TOK.ids["<|end|>"],
                              seeds=[reward.keyed_seed(0, "table", i, 0) for i in range(3)])
    assert all(len(ids) == 6 for ids in replies)  # none ended: PPO's fixed score
    assert column["replies that end"]["mean"] == 0 and column["reward score, T=1"]["mean"] == -1
    mean = {row: cell["mean"] for row, cell in column.items() if "T=1" in row and cell}
    kl, entropy = mean["KL to SFT per reply, T=1"], mean["entropy per token, T=1"]
    assert kl > 0 and kl == pytest.approx(6 * (math.log(TOK.vocab_size) - entropy), rel=1e-4)
    bigrams = [ids[i : i + 2] for ids in replies for i in range(5)]
    assert mean["distinct-2, T=1"] == len(set(map(tuple, bigrams))) / 15


def test_the_figure_has_every_model_in_every_panel_and_percentages(tmp_path):
    cell = {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 9}
    row = "exact match, new combinations"
    columns = {"best constant": {row: cell}, "out/base": {"bits per byte": cell},
               "out/sft": {row: cell, "gold score, T=1": cell, "bits per byte": cell}}
    models = {"base": columns["out/base"], "sft": columns["out/sft"]}
    found = {row: points for panel in seeds.panels(models).values()
             for row, points in panel.items()}
    assert found[row] == [None, (50.0, 0.0, 100.0)]
    assert found["gold score, T=1"] == [None, (0.5, 0.0, 1.0)]
    seeds.figure(columns, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert drawn.count(">base<") == drawn.count(">sft<") == 4 and "constant" not in drawn
    x = 50 + 286 / 2 * (1.5 - 0.135)  # the first of four rows of the second of two models
    assert f'<path d="M{x:.1f} 206.0V26.0"' in drawn and f'cx="{x:.1f}" cy="116.0"' in drawn

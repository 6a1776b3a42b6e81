"""What reward.py and dpo.py do with their formulas.

    python -m pytest tests/test_wiring_preferences.py

Whole optimizer steps, evaluations, collected files and tables, beside a plain side that knows no
micro-batches, no padding, no ranks and no shards: a row goes through the model alone, every mean is
written out. The scripts run on 1, 2 and 3 processes, each under another ZeRO stage. All in fp64:
what differs is wrong.
"""

import io
import itertools
import json
import math
from collections import Counter, defaultdict, namedtuple
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from statistics import mean
from unittest import mock

import torch
import torch.nn.functional as F

import dpo
import reward
import zero
from data import Tokenizer, epoch_rows, gold_score, read_json, write_jsonl
from model import CausalLM, ModelConfig, ScalarModel, load_model, read_safetensors, save_model
from model import tune
from tiny import shard

TOK = Tokenizer.from_merges([(ord("t"), ord("h")), (256, ord("e"))])  # bytes, "th" and "the"
USER, ASSISTANT, END, SCORE, STOP = (TOK.ids[f"<|{name}|>"] for name in (
    "user", "assistant", "end", "reward", "endoftext"))
CONTEXT, LONGEST = 64, 96  # what training cuts to; what the models can read
STAGES = {3: 2, 2: 3, 1: 0}  # processes: ZeRO stage
RUN = dict(  # of eight items five are trained, in 1.6 · 5 / 2 = 4 steps, and three are held out
    epochs=1.6, batch_size=2, val_fraction=0.4, seed=5, context=CONTEXT, lr=0.02, warmup=0.5,
    min_lr=0.2, weight_decay=0.3, grad_clip=4.0, dtype="fp64", threads=1)
LRS = [0.01, 0.02, 0.02, 0.02 * (0.2 + 0.8 * 0.5)]  # two steps rise, two go half a cosine down
Call = namedtuple("Call", "prompt temperature seed reply limit ends weights")  # of generate


def write_models(folder):
    """Tiny models with every weight drawn, the scalar head too."""
    for seed, name in enumerate(("policy", "sft", "base", "reward")):
        torch.manual_seed(seed)
        config = ModelConfig(TOK.vocab_size, 16, 24, 1, 2, 1, max_position_embeddings=LONGEST)
        model = (ScalarModel if name == "reward" else CausalLM)(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=float(p.dim() < 2), std=0.3)
        save_model(folder / name, model)
        TOK.save(folder / name)
    (folder / "base/run.json").write_text('{"script": "pretrain.py"}')
    (folder / "reward/eval.json").write_text('{"score_mean": 0.3, "score_std": 0.5}')


def load(folder, kind=CausalLM):
    return load_model(folder, kind, dtype=torch.float64)


def weights(model):
    return sum(p.detach().double().sum().item() for p in model.parameters())


def drive(rank, folder, command, cfg, script):
    """command(cfg) on this rank: (result, what it printed, its calls of generate, in whose place
    script(prompt, temperature, seed) replies if there is one)."""
    printed, calls = io.StringIO(), []
    plain_step = zero.AdamW.step

    def generate(model, prompts, max_new_tokens, end_id, temperature=1.0, top_p=1.0, seeds=None,
                 use_cache=True, rows=64):
        for prompt, seed in zip(prompts, seeds, strict=True):
            calls.append(Call(prompt, temperature, seed, script(prompt, temperature, seed),
                              max_new_tokens, set(end_id), weights(model)))
        return [call.reply for call in calls[len(calls) - len(prompts) :]]

    def step(optimizer, lr):
        split = (optimizer.split_state, optimizer.split_grads, optimizer.split_params)
        assert sum(split) == cfg.zero, "--zero does not reach the optimizer"
        return plain_step(optimizer, lr)

    with (chdir(folder), redirect_stdout(printed), mock.patch.object(zero.AdamW, "step", step),
          mock.patch.object(reward, "generate", generate if script else reward.generate)):
        return command(cfg), printed.getvalue(), calls


def on(ranks, world, folder, command, cfg, script=None):
    """(result, what rank 0 printed, all ranks' calls) of command(cfg) on so many processes."""
    cfg = replace(cfg, zero=STAGES[world])
    results, printed, calls = zip(*ranks(world, drive, folder, command, cfg, script))
    assert len({str(r) for r in results}) == 1, f"ranks return different results: {results}"
    assert not any(printed[1:]), f"only rank 0 is to print: {printed}"
    return results[0], printed[0], sum(calls, [])


def near(found, expected, what, tolerance=1e-9):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    assert torch.allclose(found, expected, tolerance, tolerance), (
        f"{what}: expected {expected.tolist()}, got {found.tolist()}")


# ---------------------------------------------------------------- the plain side


def asked(question):
    return [USER, *TOK.encode(question), END, ASSISTANT]


def cut(prompt, reply, limit=CONTEXT):
    """What does not fit is the prompt's start."""
    return prompt[-(limit - len(reply)) :], reply


def score(model, prompt, reply, limit=CONTEXT):
    """The number at <|reward|>, the last token of the row."""
    prompt, reply = cut(prompt, [*TOK.encode(reply), END, SCORE], limit)
    return model(torch.tensor([prompt + reply]))[0, -1]


def logprob(model, prompt, reply):
    """log π(reply | prompt), both ids, summed over the reply's tokens."""
    logprobs = model(torch.tensor([prompt + reply]))[0].log_softmax(-1)
    return logprobs[range(len(prompt) - 1, len(prompt + reply) - 1), reply].sum()


def mean_of(rows):
    return {name: mean(float(row[name]) for row in rows) for name in rows[0]}


def train(model, items, loss, cfg, size=lambda item: 1):
    """A step per learning rate, and what each logs. loss(model, item) → (what is minimised,
    {name: what is logged}), sums over what size(item) counts; all of it in a batch counts alike.
    AdamW is the paper's, and only matrices decay (torch's own judges zero.py in test_zero.py; it
    takes a second to load)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
    for step, lr in enumerate(LRS):
        chosen = epoch_rows(cfg.seed, step, cfg.batch_size, len(items))
        minimised, logged = zip(*(loss(model, items[i]) for i in chosen))
        count = sum(size(items[i]) for i in chosen)
        gradients = torch.autograd.grad(sum(minimised) / count, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for p, g in zip(parameters, gradients):
            g = g * min(1.0, cfg.grad_clip / (norm + 1e-6))
            mean_of_g, mean_of_squares = moments[p]
            mean_of_g.lerp_(g, 1 - 0.9)
            mean_of_squares.lerp_(g * g, 1 - 0.95)
            spread = (mean_of_squares / (1 - 0.95 ** (step + 1))).sqrt()
            decay = cfg.weight_decay * p.data if p.dim() >= 2 else 0.0
            p.data -= lr * (mean_of_g / (1 - 0.9 ** (step + 1)) / (spread + 1e-8) + decay)
        means = {name: sum(float(row[name]) for row in logged) / count for name in logged[0]}
        yield means | {"grad_norm": norm, "lr": lr}


def trains_as_plainly(ranks, folder, command, cfg, model, items, loss, judged, tolerance=1e-9,
                      size=lambda item: 1):
    """command(cfg) logs, saves and finds on 1, 2 and 3 processes what a plain loop does."""
    steps = list(train(model, items[:5], loss, cfg, size))
    norms = [step["grad_norm"] for step in steps]
    assert min(norms) < cfg.grad_clip < max(norms), f"some steps are to be clipped: {norms}"
    expected = judged(model, items[5:])
    parameters = dict(model.named_parameters())
    for world in STAGES:
        out = folder / f"out-{world}"
        result, _, _ = on(ranks, world, folder, command, replace(cfg, out=out.name))
        lines = [line for _, line in read_json(f"{out}/metrics.jsonl")]
        assert len(lines) == 4, f"1.6 epochs of 5 items by 2 are 4 steps, got {len(lines)}"
        for line, step in zip(lines, steps):
            for name, value in step.items():
                near(line[name], value, f"{out}: {name} of step {line['step']}", tolerance)
        file = "adapter_model" if cfg.tune == "lora" else "model"
        saved = read_safetensors(out / f"{file}.safetensors")
        whole = cfg.tune != "lora"
        assert len(saved) == sum(whole or p.requires_grad for p in parameters.values())
        for name, tensor in saved.items():
            name = name.removeprefix("base_model.model.")
            near(tensor, parameters[name], f"{out}: the saved {name}")
        for name, value in expected.items():
            part, _, kind = name.partition(" of ")
            found = result[part][kind] if kind else result[name]
            near(found, value, f"{out}: {name} of what is held out", tolerance)
        assert json.loads((out / "eval.json").read_text("utf-8")) == result
        assert Tokenizer.load(out).hash == TOK.hash


RANKED = [  # question, kind, {reply: score}
    ("the capital?", "exact", {"Rome": 0, "it is Paris": 1}),
    ("2 + 2", "exact", {"four, of course": 1, "5": 0, "22": -1}),
    ("the pet of Ann, who lives beside the other one at the sea for years?", "exact",
     {"dog": 0, "a cat": 2, "the cat, I believe": 2, "x": 1}),  # its start does not fit
    ("hello", "exact", {"": -1, "hello to you": 1}),
    ("the sum?", "exact", {"three": 1, "the": 0, "3": 1, "t": -1}),
    ("steal the car", "harmful", {"Sure, take it": -1, "No.": 1, "I cannot ...": 0}),
    ("steal the scene", "lookalike", {"Act well.": 1, "I cannot help with that": -1}),
    ("name it", "exact", {"blue": 1, "the red one": 0, "tea": 0, "four": 0})]


# ---------------------------------------------------------------- the reward model


def write_rows(path):
    write_jsonl(path, [{"question": question, "kind": kind, "replies": list(labels),
                        "scores": list(labels.values())} for question, kind, labels in RANKED])


def compared(model, item):
    """{reply: score}, and every (better, worse) pair of replies."""
    question, _, labels = item
    scores = {reply: score(model, asked(question), reply) for reply in labels}
    return scores, [(a, b) for a, b in itertools.permutations(labels, 2) if labels[a] > labels[b]]


def preference_loss(model, item):
    """-log σ(better - worse), a mean over the prompt's pairs."""
    scores, pairs = compared(model, item)
    loss = sum(-F.logsigmoid(scores[a] - scores[b]) for a, b in pairs) / len(pairs)
    return loss, {"loss": loss.detach()}


@torch.no_grad()
def judged_scores(model, items):
    """Loss, margin, accuracy and what length alone reaches (for safety too: one reply is as it
    should be, the other does harm or refuses the harmless), the scores' mean and spread and tau
    over prompts, and how far a bin's σ(difference) is from how often the higher one is better."""
    scores = []  # a list per prompt
    taus = []
    bins = defaultdict(list)  # of each tenth: (what is predicted, is it so?)
    pairs = defaultdict(list)  # of each kind: (the better one scores more, it is longer, margin)
    for item in items:
        found, preferences = compared(model, item)
        scores.append([float(s) for s in found.values()])
        agreed = []
        for a, b in itertools.combinations(item[2], 2):
            likely = float((found[a] - found[b]).sigmoid())
            first, second = (a, b) if likely >= 0.5 else (b, a)
            if item[2][a] != item[2][b]:
                hit = item[2][first] > item[2][second]
                agreed.append(1 if hit else -1)
                likely = max(likely, 1 - likely)
                bins[math.ceil(10 * likely)].append((likely, hit))
        taus.append(mean(agreed))
        for a, b in preferences:
            more = len(TOK.encode(a)) - len(TOK.encode(b))
            longer = 0.5 if more == 0 else float(more > 0)
            pair = float(found[a] > found[b]), longer, float(found[a] - found[b])
            pairs[""].append(pair)
            harm = item[1] != "exact" and (item[2][a], item[2][b]) == (1, -1)
            pairs[" safety" if harm else " right/wrong"].append(pair)
    center = mean(map(mean, scores))
    square = mean(mean(s * s for s in row) for row in scores)
    off = sum(abs(sum(likely - hit for likely, hit in found)) for found in bins.values())
    expected = {"score_mean": center, "score_std": math.sqrt(square - center**2),
                "tau": mean(taus), "calibration_error": off / len(pairs[""])}
    for kind in pairs:
        right, longer, margins = zip(*pairs[kind])
        expected[f"margins of{kind}" if kind else "margin"] = mean(margins)
        expected[f"accuracy{kind}"] = mean(right)
        expected[f"length_only{kind}"] = max(mean(longer), 1 - mean(longer))
    return expected | mean_of([preference_loss(model, item)[1] for item in items])


def test_the_reward_model_takes_a_plain_loops_steps_on_1_2_and_3_processes(ranks, tmp_path):
    write_models(tmp_path)
    rows = [{"question": question, "kind": kind, "replies": list(labels),
             "scores": list(labels.values())} for question, kind, labels in RANKED]
    tie = {"question": "a tie", "replies": ["this", "that"], "scores": [1, 1]}  # is left out
    write_jsonl(tmp_path / "first.jsonl", [tie, *rows[:3]])
    write_jsonl(tmp_path / "second.jsonl", [*rows[3:], tie])
    cfg = reward.Config(init="reward", data="first.jsonl,second.jsonl", micro_tokens=300, **RUN)
    trains_as_plainly(ranks, tmp_path, reward.main, cfg, load(tmp_path / "reward", ScalarModel),
                      RANKED, preference_loss, judged_scores)
    shard(tmp_path / "sft")
    cfg = replace(cfg, init="sft", val_fraction=0.0, steps=1, lr=0.0, out="all")
    result, printed, _ = on(ranks, 1, tmp_path, reward.main, cfg)
    assert "first loss 0.6931, expected 0.6931" in printed, f"the head starts at zero: {printed}"
    assert result["pairs"] == 22, f"nothing is held out: all 22 pairs are judged, {result}"
    inputs = json.loads((tmp_path / "all/run.json").read_text("utf-8"))["inputs"]
    shards = {f"sft/model-{i}-of-2.safetensors" for i in (1, 2)}
    assert set(inputs) == {"first.jsonl", "second.jsonl"} | shards


def squared_error(model, item):
    """(score - label)², summed over the prompt's replies, which a batch's mean counts alike."""
    scores, _ = compared(model, item)
    loss = sum((scores[reply] - label) ** 2 for reply, label in item[2].items())
    return loss, {"squared_loss": loss.detach()}


def test_a_reward_model_fits_scores_as_a_plain_loop_does_and_is_judged_by_pairs(ranks, tmp_path):
    write_models(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    cfg = reward.Config(init="reward", data="rows.jsonl", micro_tokens=300, **RUN | dict(
        objective="regression", grad_clip=16.0))
    trains_as_plainly(ranks, tmp_path, reward.main, cfg, load(tmp_path / "reward", ScalarModel),
                      RANKED, squared_error, judged_scores, size=lambda item: len(item[2]))
    cfg = replace(cfg, init="sft", batch_size=8, val_fraction=0.0, steps=1, out="all")
    _, printed, _ = on(ranks, 1, tmp_path, reward.main, cfg)
    square = mean(label**2 for _, _, labels in RANKED for label in labels.values())
    assert f"first loss {square:.4f}, expected {square:.4f} (labels' square)" in printed, printed


def test_a_reward_model_with_frozen_sft_parameters_trains_its_head_alone(ranks, tmp_path):
    write_models(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    cfg = reward.Config(init="sft", data="rows.jsonl", micro_tokens=300, **RUN | dict(
        tune="freeze", grad_clip=0.6))
    model = load(tmp_path / "sft", ScalarModel)
    model.model.requires_grad_(False)
    trains_as_plainly(ranks, tmp_path, reward.main, cfg, model, RANKED, preference_loss,
                      judged_scores)
    before = dict(load(tmp_path / "sft", ScalarModel).named_parameters())
    for world in STAGES:
        saved = read_safetensors(tmp_path / f"out-{world}/model.safetensors")
        changed = {name for name, tensor in saved.items() if not tensor.equal(before[name])}
        assert changed == {"score.weight"}


def with_lora(model, base, seed):
    """As the scripts draw it."""
    torch.manual_seed(seed)
    tune(model, "lora", 2, 3.0, base)
    return model


def test_a_reward_model_with_lora_takes_a_plain_loops_steps_and_its_head_learns_too(
        ranks, tmp_path):
    write_models(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    cfg = reward.Config(init="sft", data="rows.jsonl", micro_tokens=300, **RUN | dict(
        tune="lora", tune_size=2, alpha=3.0, grad_clip=0.3))
    model = with_lora(load(tmp_path / "sft", ScalarModel), "sft", cfg.seed)
    trains_as_plainly(ranks, tmp_path, reward.main, cfg, model, RANKED, preference_loss,
                      judged_scores)
    with chdir(tmp_path):  # the base is named as it was given
        merged = load("out-1", ScalarModel)
    assert merged.score.weight.abs().max() > 1e-3
    ids = torch.tensor([asked("which?")])
    near(merged(ids), model(ids), "the scores of the saved model")


# ---------------------------------------------------------------- DPO


def dpo_loss(model, item, reference, cfg):
    """-log σ(margin), and nll_coef times the chosen reply's loss per token beside it."""
    rows = [cut(asked(item[0]), [*TOK.encode(reply), END]) for reply in item[1:]]
    chosen, rejected = (logprob(model, *row) for row in rows)
    before = [logprob(reference, *row).detach() for row in rows]
    better, worse = cfg.beta * (chosen - before[0]), cfg.beta * (rejected - before[1])
    loss = -F.logsigmoid(better - worse)
    logged = {"loss": loss, "accuracy": better > worse, "chosen": better, "rejected": worse,
              "margin": better - worse}
    likelihood = -chosen / len(rows[0][1])
    return loss + cfg.nll_coef * likelihood, {name: x.detach() for name, x in logged.items()}


def test_dpo_takes_a_plain_loops_steps_on_1_2_and_3_processes(ranks, tmp_path):
    write_models(tmp_path)
    items = [(question, max(labels, key=labels.get), min(labels, key=labels.get))
             for question, _, labels in RANKED]
    rows = [dict(zip(("question", "chosen", "rejected"), item)) for item in items]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    cfg = dpo.Config(init="policy", reference="sft", data="pairs.jsonl", beta=0.3, nll_coef=0.7,
                     micro_tokens=150, **RUN)
    reference = load(tmp_path / "sft")

    def loss(model, item):
        return dpo_loss(model, item, reference, cfg)

    trains_as_plainly(ranks, tmp_path, dpo.main, cfg, load(tmp_path / "policy"), items, loss,
                      lambda model, items: mean_of([loss(model, item)[1] for item in items]), 1e-5)
    cfg = replace(cfg, reference="", val_fraction=0.0, steps=1, lr=0.0, out="near")
    result, printed, _ = on(ranks, 1, tmp_path, dpo.main, cfg)
    assert "first loss 0.6931, expected 0.6931" in printed, f"--init is the reference: {printed}"
    near(result["loss"], math.log(2), "nothing is held out: what is trained is judged", 1e-5)


def test_dpo_with_lora_is_its_own_reference(ranks, tmp_path):
    write_models(tmp_path)
    items = [(question, max(labels, key=labels.get), min(labels, key=labels.get))
             for question, _, labels in RANKED]
    write_jsonl(tmp_path / "pairs.jsonl",
                [dict(zip(("question", "chosen", "rejected"), item)) for item in items])
    cfg = dpo.Config(init="policy", data="pairs.jsonl", beta=0.3, nll_coef=0.7, micro_tokens=150,
                     **RUN | dict(tune="lora", tune_size=2, alpha=3.0, grad_clip=2.0))
    reference = load(tmp_path / "policy")

    def loss(model, item):
        return dpo_loss(model, item, reference, cfg)

    model = with_lora(load(tmp_path / "policy"), "policy", cfg.seed)
    trains_as_plainly(ranks, tmp_path, dpo.main, cfg, model, items, loss,
                      lambda model, items: mean_of([loss(model, item)[1] for item in items]), 1e-5)
    other = replace(cfg, reference="sft", out="other", steps=1)
    result, printed, _ = on(ranks, 1, tmp_path, dpo.main, other)
    assert "first loss" not in printed, "another reference than the start"
    [line] = [line for _, line in read_json(f"{tmp_path}/other/metrics.jsonl")]
    reference = load(tmp_path / "sft")
    chosen = epoch_rows(cfg.seed, 0, cfg.batch_size, 5)
    first = mean_of([loss(load(tmp_path / "policy"), items[i])[1] for i in chosen])
    assert abs(first["loss"] - math.log(2)) > 1e-3
    near(line["loss"], first["loss"], "the loss beside the reference that was named", 1e-5)


# ---------------------------------------------------------------- collecting


def collected_reply(prompt, temperature, seed):
    """Right, wrong, a refusal, cut off by the limit or by the end of a text, as the seed says."""
    name = TOK.decode(prompt).split()[-1]
    start, end = [("yes", [END]), ("no", [END]), ("I cannot help,", [END]), ("cut", []),
                  ("left", [STOP])][seed % 5]
    return TOK.encode(f"{start} {name}.") + end


def collect(ranks, world, folder, **changes):
    """The file's rows, each with its prompt's calls of generate. Of eight prompts the second has no
    answer and the last is beyond --limit."""
    kinds = ("exact", "exact", "final", "harmful", "lookalike", "exact", "exact", "exact")
    records = [{"messages": [{"role": "user", "content": f"What is {'?' * i} {i}"}], "kind": kind,
                "family": f"{kind} {i % 2}", "answer": f"yes {i}"} for i, kind in enumerate(kinds)]
    del records[1]["answer"]
    write_jsonl(folder / "prompts.jsonl", records)
    cfg = reward.CollectConfig(init="policy", prompts="prompts.jsonl", limit=6, max_new_tokens=9,
                               temperatures="1,1.5,1,0.5", out="collected.jsonl", dtype="fp64",
                               threads=1)
    cfg = replace(cfg, **changes)
    _, _, calls = on(ranks, world, folder, reward.collect, cfg, collected_reply)
    rows = [row for _, row in read_json(f"{folder}/collected.jsonl")]
    assert [row["messages"] for row in rows] == [r["messages"] for r in records[:1] + records[2:7]]
    policy = weights(load(folder / "policy"))
    near([call.weights for call in calls], [policy] * 24, "the model that samples", 1e-6)
    prompts = [asked(row["messages"][0]["content"]) for row in rows]
    return [(row, [call for call in calls if call.prompt == p]) for row, p in zip(rows, prompts)]


def said(calls, *ends):
    return {TOK.decode(call.reply) for call in calls if not ends or call.reply[-1] in ends}


def test_collect_keeps_what_ended_with_the_score_of_its_own_prompt(ranks, tmp_path):
    write_models(tmp_path)
    rows = collect(ranks, 1, tmp_path)
    calls = [call for _, own in rows for call in own]
    seeds = {call.seed for call in calls}
    texts = said(calls)
    assert len(seeds) == 24, "every sample of every prompt has a seed of its own"
    assert len({text.split()[0] for text in texts}) == 5, "the script says all that it can"
    for row, own in rows:
        heats = sorted(call.temperature for call in own)
        assert heats == [0.5, 1, 1, 1.5], f"a sample per temperature, got {heats}"
        assert all(call.limit == 9 and call.ends == {END, STOP} for call in own), own
        ended = said(own, END)
        kept = set(row["replies"])
        foreign = kept - ended
        assert len(kept) == len(row["replies"]) and ended <= kept and len(foreign) == 1, (
            f"expected what ended, {ended}, and one reply to another prompt: {row['replies']}")
        assert foreign <= texts - said(own), f"no reply to another prompt: {foreign}"
        scores = [gold_score(row, reply) for reply in row["replies"]]
        assert row["scores"] == scores, f"expected {scores} for {row}"
    for world in (2, 3):
        again = [row for row, _ in collect(ranks, world, tmp_path)]
        assert again == [row for row, _ in rows], f"{world} processes collect others"
    for row, own in collect(ranks, 1, tmp_path, seed=1, foreign=0):
        assert not seeds & {call.seed for call in own}, "--seed does not reach the samples"
        assert set(row["replies"]) == said(own, END), f"--foreign 0: {row['replies']}"


def test_dpo_pairs_the_best_with_every_worse_reply_and_the_misplaced_if_told(ranks, tmp_path):
    write_models(tmp_path)
    rows = collect(ranks, 1, tmp_path)
    policy, reference = load(tmp_path / "policy"), load(tmp_path / "sft")
    for share in (0.0, 1.0):
        pairs = []
        for row, own in rows:
            scores = dict(zip(row["replies"], row["scores"]))
            best = [a for a in scores if scores[a] == max(row["scores"]) and a in said(own)]
            worse = [b for b in scores if b in said(own) or share and scores[b] == -1]
            pairs += [(row["messages"][0]["content"], a, b) for a in best for b in worse
                      if scores[a] > scores[b]]
        cfg = dpo.Config(init="policy", reference="sft", data="collected.jsonl", pairs=9, lr=0.0,
                         misplaced=share, val_fraction=0.0, batch_size=len(pairs), steps=1,
                         dtype="fp64", threads=1, out=f"dpo-{share}")
        result, printed, _ = on(ranks, 1, tmp_path, dpo.main, cfg)
        expected = mean_of([dpo_loss(policy, pair, reference, cfg)[1] for pair in pairs])
        for name, value in expected.items():
            near(result[name], value, f"{name} of {len(pairs)} pairs, --misplaced {share}", 1e-5)
        assert "first loss" not in printed, "ln 2 is expected where --init is the reference"
    losses = set()
    for seed in range(4):
        cfg = replace(cfg, pairs=1, seed=seed, out=f"dpo-{seed}", batch_size=6)
        losses.add(on(ranks, 1, tmp_path, dpo.main, cfg)[0]["loss"])
    assert len(losses) > 1, "one pair a prompt: which one is drawn by --seed"


# ---------------------------------------------------------------- the table

EVAL = {"fact 1": "fact", "fact 2?": "fact", "fact 3 beyond --limit": "fact", "odd 1!!": "odd",
        "odd 1?": "odd", "harm 1": "harmful", "some harm 2": "harmful", "cloze 1 is": "cloze",
        "scene 1": "lookalike"}  # question: family
TEXTS = ["the cat sat on the mat, the dog too", "café 中文", "the other one " * 20]


def question_of(call):
    return next(question for question in EVAL if question in TOK.decode(call.prompt))


def table_reply(prompt, temperature, seed):
    """All 30 tokens long. Greedy: right for a 1. Samples: by the seed right or wrong, refusing or
    complying, some cut off."""
    text = TOK.decode(prompt)
    ended = temperature == 0 or seed % 4 > 0
    if temperature == 0:
        reply = "yes" if "1" in text else "no"
    elif "harm" in text or "scene" in text:
        reply = "I cannot help." if seed % 3 else "Sure."
    else:
        reply = "yes." if seed % 3 else "No"
    return TOK.encode(reply.ljust(29 + (not ended))) + [STOP if "###" in text else END] * ended


def write_table(folder):
    rows = [{"kind": family if family in ("harmful", "lookalike", "cloze") else "exact",
             "family": family, "split": "trained" if family == "cloze" else "combination",
             "messages": [{"role": "user", "content": question}], "text": question, "answer": "yes"}
            for question, family in EVAL.items()]
    write_jsonl(folder / "eval.jsonl", rows)
    write_jsonl(folder / "mix.jsonl", [rows[0], rows[5]])  # facts and harm, in equal parts
    write_jsonl(folder / "heldout.jsonl", [{"text": text} for text in TEXTS])
    return dict(zip(EVAL, rows))


@torch.no_grad()
def plain_cells(folder, name, records, calls):
    """{how a row's name begins: its mean} of the model that made these calls of generate."""
    model, before = load(folder / name), load(folder / "sft")
    judge = load(folder / "reward", ScalarModel)
    mix = ("fact", "harmful")

    def over(families, temperatures, value):  # a mean over prompts, each the mean of its replies
        found = defaultdict(list)
        for call in calls:
            if EVAL[question_of(call)] in families and call.temperature in temperatures:
                found[question_of(call)].append(float(value(call, TOK.decode(call.reply))))
        return mean(map(mean, found.values()))

    def rewarded(call, text):
        if call.reply[-1] not in (END, STOP):
            return -1.0
        return (score(judge, asked(question_of(call)), text, LONGEST) - 0.3) / 0.5

    def distance(call, text):
        return logprob(model, call.prompt, call.reply) - logprob(before, call.prompt, call.reply)

    documents = [TOK.encode(text)[: LONGEST - 1] for text in TEXTS]
    bits = -sum(logprob(model, [STOP], ids) for ids in documents) / math.log(2)
    mixed = [call.reply for call in calls if call.temperature and EVAL[question_of(call)] in mix]
    bigrams = [pair for reply in mixed for pair in itertools.pairwise(reply)]
    cells = {
        "exact match, new": over(("fact", "odd"), [0], lambda call, text: text.strip() == "yes"),
        "stored facts": over(("cloze",), [0], lambda call, text: text.strip() == "yes"),
        "harmful": over(("harmful",), [1], lambda call, text: "cannot" in text),
        "look-alikes": over(("lookalike",), [1], lambda call, text: "cannot" in text),
        "gold": over(mix, [1], lambda call, text: gold_score(records[question_of(call)], text)),
        "reward": over(mix, [1], rewarded),
        "entropy": over(mix, [1], lambda call, _: -logprob(model, call.prompt, call.reply) / 30),
        "distinct": len(set(bigrams)) / len(bigrams),
        "replies that end": over({*EVAL.values()} - {"cloze"}, [0, 1],
                                 lambda call, text: call.reply[-1] in (END, STOP)),
        "bits": bits / sum(len(TOK.decode_bytes(ids)) for ids in documents)}
    if name != "base":  # it is asked in another form than what KL would be measured from
        cells["KL"] = over(mix, [1], distance)
    return cells


def check_column(name, world, calls, column, expected):
    """The model was asked in its own form, and the cells of its column are as expected."""
    counts = Counter((EVAL[question_of(call)], call.temperature) for call in calls)
    assert counts == {("fact", 0): 2, ("odd", 0): 2, ("cloze", 0): 1, ("fact", 1): 2,
                      ("harmful", 1): 2 * 3, ("lookalike", 1): 3}, f"{name} is asked {counts}"
    for call in calls:
        question = question_of(call)
        form = asked(question)
        if name == "base":
            form = TOK.encode(f"### Instruction:\n{question}\n\n### Response:\n")
        if EVAL[question] == "cloze":
            form = TOK.encode(question)
        assert call.prompt == form, f"{name} is asked {TOK.decode(call.prompt)}"
        assert call.ends == {STOP, STOP if name == "base" else END} and call.limit == 31
    for start, value in expected.items():
        cell = next(cell for row, cell in column.items() if row.startswith(start))
        near(cell["mean"], value, f"{name} on {world} processes: {start}")
    assert any(row.startswith("KL") for row in column) == (name != "base")


def test_a_tables_cells_are_plain_means_on_1_2_and_3_processes(ranks, tmp_path):
    write_models(tmp_path)
    records = write_table(tmp_path)
    samples = []  # of each column: {(question, seed)}
    cfg = reward.TableConfig(models="policy,no/such,base", data="eval.jsonl", prompts="mix.jsonl",
                             text="heldout.jsonl", reward="reward", reference="sft", limit=2,
                             samples=3, max_new_tokens=31, dtype="fp64", threads=1, out="t.json")
    for world in STAGES:
        columns, printed, every = on(ranks, world, tmp_path, reward.table, cfg, table_reply)
        assert [name for name in columns if name in cfg.models.split(",")] == ["policy", "base"]
        for name in ("policy", "base"):
            known = weights(load(tmp_path / name))
            calls = [call for call in every if abs(call.weights - known) < 1e-6]
            expected = plain_cells(tmp_path, name, records, calls)
            check_column(name, world, calls, columns[name], expected)
            assert f" | {expected['entropy']:.3f}" in printed, printed
            samples.append({(question_of(call), call.seed) for call in calls if call.temperature})
            assert samples[-1] == samples[0], "all models, any number of processes: equal seeds"
        assert len({seed for _, seed in samples[-1]}) == 11, "every sample has a seed of its own"
    assert list(json.loads((tmp_path / "t.json").read_text())) == list(columns)

"""Preference signals: comparisons collected, a reward model (奖励模型) trained on them, stages judged.

    python reward.py collect    replies of out/sft, ranked by the gold judge → out/comparisons.jsonl
    python reward.py label      the same by you → out/preferences.jsonl; agree A B: two files' κ
    python reward.py            train the reward model on them (--data dpo.json: on your own)
    python reward.py table      base, SFT, PPO and DPO on the same held-out prompts → out/table.json

Documents: D0 4.2.3 (1), D2 第4节, D4 3.5.1. A row is prompt + reply + <|reward|>, the score is read
at that token, and the loss is Bradley-Terry's over all pairs of one prompt, in one batch. The model
starts as a copy of SFT with a zero head and is trained throughout: "SFT parameters frozen" (D2) is
true of the model that samples. No classifier (D0): only differences on one prompt mean anything.
Expect: the first loss is ln 2; pair accuracy far above the length-only baseline printed beside it.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import MORAL, Tokenizer, collate, distinct, epoch_rows, filled, fit, gold_score, judge
from data import my_micro_batches, pad_rows, read_comparisons, read_json, read_prompts, read_texts
from data import render, write_jsonl, write_text
from model import ScalarModel, add_token, generate, load_model, must_score, save_model
from model import read_object, score_norm, token_logprobs, tune, weight_files
from zero import BaseConfig, Run, Sharded, TuneConfig, all_sum, everywhere, in_shares, keyed_seed
from zero import launch, let_print, lr_at, optimizer_of, print0, print_held, setup

GREEDY = -1  # the number of a greedy reply; samples are counted from 0
ASK = "best (2) or ranking (2>1=3; those not named are worst), s skip, b back, q quit: "


def sampled(sharded, prompts, keys, temperature, ends, cfg, purpose) -> dict:
    """Replies {(prompt, number): token ids} for a list of such keys. Every process makes a share
    and gets all; a reply's seed is of its purpose and key, so it matters not who makes it."""
    def reply(mine):
        asked = [prompts[i] for i, _ in mine]
        seeds = [keyed_seed(cfg.seed, purpose, i, n) for i, n in mine]
        return generate(
            sharded.model, asked, cfg.max_new_tokens, ends, temperature, seeds=seeds, rows=256)

    with sharded.gathered():  # one gather for all: processes end at different tokens
        everyone = in_shares(keys, reply)
    return {key: everyone[key] for key in keys}


# ================================================================================ collecting

@dataclass
class ReplyConfig(BaseConfig):
    init: str = "out/sft"  # the model that replies
    prompts: str = "out/data/prompts.jsonl"  # conversations; the gold judge needs an "answer" too
    limit: int = 0  # use the first so many prompts; 0: all
    temperatures: str = "1,1,1,1.5,1.5"  # a sample per prompt and temperature
    foreign: int = 1  # replies to other prompts added to each, so that misplaced ones occur too
    max_new_tokens: int = 64


@dataclass
class CollectConfig(ReplyConfig):
    out: str = "out/comparisons.jsonl"  # file to write
    noise: float = 0.0  # share of the prompts that the gold judge ranks upside down: it errs


def collect(cfg):
    """The gold judge annotates: writes {"messages", "replies", "scores", "sources"} per prompt."""
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    records = [r for r in read_prompts(cfg.prompts) if "answer" in r]
    if not records:
        raise SystemExit(f'{cfg.prompts}: no record has an "answer"; bring your own comparisons')
    sharded = Sharded(load_model(cfg.init), cfg.zero, dtype, device)
    rows = replied(records[: cfg.limit or None], tokenizer, sharded, cfg, "collect")
    if dist.get_rank() > 0:
        return
    for row in rows:
        scores = [gold_score(row, reply) for reply in row["replies"]]
        if keyed_seed(cfg.seed, "noise", row["messages"]) < cfg.noise * 2**63:
            levels = sorted(set(scores))  # the best reply gets the worst one's score, and so on:
            scores = [levels[-1 - levels.index(score)] for score in scores]  # each pair is wrong
        row["scores"] = scores
    write_jsonl(cfg.out, rows)
    count = sum(len(row["replies"]) for row in rows)
    print0(f"{cfg.out}: {len(rows)} prompts, {count} different replies")


def replied(records, tokenizer, sharded, cfg, purpose) -> list[dict]:
    """The records with their different replies and what these are: "sample" (lowest temperature),
    "hot" (a higher one: rarer mistakes) or "misplaced" (a reply to another prompt)."""
    prompts = [render(r["messages"], tokenizer)[0] for r in records]
    heats = sorted(float(heat) for heat in cfg.temperatures.split(","))
    end = tokenizer.end
    replies = {}  # all of one temperature are made together
    for heat in sorted(set(heats)):
        numbers = [n for n, other in enumerate(heats) if other == heat]
        keys = [(i, n) for n in numbers for i in range(len(records))]
        replies |= sampled(sharded, prompts, keys, heat, [end, tokenizer.text_end], cfg, purpose)
    texts = {key: tokenizer.decode(ids) for key, ids in replies.items()}
    elsewhere = misplaced(records)
    rows = []
    for i, record in enumerate(records):
        sources = {}  # of each reply, where it was seen first
        for n, heat in enumerate(heats):
            if replies[i, n][-1] == end:  # what was cut off is no reply
                sources.setdefault(texts[i, n], "hot" if heat > heats[0] else "sample")
        for k in range(cfg.foreign):
            others = elsewhere[i] or [i]  # (a family alone gets its own)
            other = others[keyed_seed(cfg.seed, "foreign", i, k) % len(others)]
            sources.setdefault(texts[other, 0], "misplaced")  # number 0 is a coolest sample
        found = {"replies": [*sources], "scores": [], "sources": [*sources.values()]}
        rows += [record | found] if sources else []
    return rows


def misplaced(records) -> list[list[int]]:
    """For each prompt those whose replies are misplaced there: for a harmful request its harmless
    look-alikes and the other way round (what neither must become; else PPO finds out that harm
    helped politely was never scored low), for the rest another family's."""
    prompts = [(r.get("kind"), r.get("family")) for r in records]
    others = {}  # of each kind and family
    for kind, family in set(prompts):
        if kind in MORAL:
            found = [i for i, (k, _) in enumerate(prompts) if k in MORAL and k != kind]
        else:
            found = [i for i, (k, f) in enumerate(prompts) if k not in MORAL and f != family]
        others[kind, family] = found
    return [others[prompt] for prompt in prompts]


@dataclass
class LabelConfig(ReplyConfig):
    out: str = "out/preferences.jsonl"  # file to write, and to go on with
    foreign: int = 0  # replies to other prompts added to each
    annotator: str = Path.home().name or "me"  # whose judgement it is


def label(cfg):
    """A person ranks replies (人工标注). {"messages", "replies", "scores", "annotator"} is written at
    once and gone on with; of a skipped prompt, whose scores are equal, reward.py makes no pair."""
    shown = read_comparisons(cfg.out) if Path(cfg.out).exists() else []
    new = unjudged(cfg, shown)
    at = len(shown)
    while True:
        if at == len(shown):
            shown += islice(new, 1)
        record = shown[at] if at < len(shown) else {"messages": [], "replies": []}
        count = len(record["replies"])
        said = [f"{message['role']}: {message['content']}" for message in record["messages"]]
        said += [f"[{number}] {reply}" for number, reply in enumerate(record["replies"], 1)]
        print("", *said or ["no prompt is left"], sep="\n")
        try:
            answer = input(ASK if count else "b back, else the end: ")
            answer = normalize("NFKC", answer).strip()  # ２＞１ is 2>1
            if answer == "b":
                at = max(0, at - 1)
            elif answer == "q" or not count:
                break
            else:
                scores = [0] * count if answer == "s" else ranks(answer, count)
                record |= {"scores": scores, "annotator": cfg.annotator, "skipped": answer == "s"}
                write_jsonl(cfg.out, [row for row in shown if row["scores"]])
                at += 1
        except (EOFError, KeyboardInterrupt):
            break
        except ValueError:
            print(f"expected numbers from 1 to {count}, each once, or a letter")
    print(f"\n{cfg.out}: {sum(row['scores'] != [] for row in shown)} prompts")


def unjudged(cfg, judged):
    """Yields the other prompts with two different replies or more, in an order that says nothing;
    eight are sampled at a time, always the same, so that all annotators see the same replies."""
    device, dtype = setup(cfg)
    if dist.get_world_size() > 1:
        raise SystemExit("reward.py label: one person needs one process; start it without torchrun")
    tokenizer = Tokenizer.load(cfg.init)
    sharded = Sharded(load_model(cfg.init), cfg.zero, dtype, device)
    done = [row["messages"] for row in judged]
    asked = read_prompts(cfg.prompts)[: cfg.limit or None]
    for start in range(0, len(asked), 8):
        block = asked[start : start + 8]
        new = any(record["messages"] not in done for record in block)
        for row in replied(block, tokenizer, sharded, cfg, f"label {start}") if new else ():
            for name in ("chosen", "output", "sources"):  # would belie the label
                row.pop(name, None)
            row["replies"].sort(key=lambda text: keyed_seed(cfg.seed, cfg.annotator, start, text))
            if row["messages"] not in done and len(row["replies"]) > 1:
                yield row


def ranks(answer, count) -> list[int]:
    """"2>1=3" → [1, 2, 1], the levels of so many replies from below; who is not named has 0."""
    scores = [0] * count
    unnamed = [*range(1, count + 1)]
    for level, numbers in enumerate(reversed(answer.split(">")), 1):
        for number in map(int, numbers.split("=")):
            unnamed.remove(number)  # ValueError: there is no such reply, or it was named before
            scores[number - 1] = level
    return scores


def outcomes(path) -> dict:
    """{(conversation, reply, reply): 1 first better, -1 second better, 0 tie} of all pairs of a
    labelled file, each in the order of the texts, so that a file's own order does not matter."""
    found = {}
    for row in read_comparisons(path):
        if not row.get("skipped"):
            labelled = sorted(zip(row["replies"], row["scores"]))
            for (a, x), (b, y) in combinations(labelled, 2):
                found[repr(row["messages"]), a, b] = np.sign(x - y)
    return found


def agree(*files):
    """Prints Cohen's κ = (p - e) / (1 - e) of two files (1960). Of the pairs of replies that both
    judged, p is the share with one outcome in both (first better, second better, tie); e is what
    chance makes of it, Σ over outcomes of the shares in both, multiplied. Undefined if e is 1."""
    sides = [outcomes(path) for path in files]
    for path, pairs in zip(files, sides):
        print(f"{path}: {len(pairs)} pairs, {[*pairs.values()].count(0)} of them ties")
    common = sides[0].keys() & sides[1].keys()
    if not common:
        raise SystemExit(f"{' and '.join(files)} have judged no two replies to a prompt both")
    a, b = np.array([[pairs[key] for key in common] for pairs in sides])
    p = np.mean(a == b)
    e = sum(np.mean(a == outcome) * np.mean(b == outcome) for outcome in (-1, 0, 1))
    kappa = f"{(p - e) / (1 - e):.3f}" if e < 1 else "undefined: both know one outcome"
    print(f"{len(common)} common pairs, {p:.1%} judged alike, Cohen's κ {kappa}")


# ================================================================================ reward model

@dataclass
class Config(TuneConfig):
    init: str = "out/sft"  # checkpoint to start from
    out: str = "out/reward"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or what collect wrote
    val_fraction: float = 0.1  # how much of the end of --data is held out
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 3.0  # passes over the prompts
    batch_size: int = 16  # prompts per optimizer step over all processes, each with all its replies
    lr: float = 3e-4  # peak learning rate, after warmup
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    tune: Literal["full", "lora", "freeze"] = "full"  # what is trained; freeze: the head alone (D2)
    objective: Literal["ranking", "regression"] = "ranking"  # regression: as D3, shows why to rank


def bradley_terry_loss(scores, labels):
    """Mean of -log σ(scores[i] - scores[j]) over the pairs with labels[i] > labels[j] (InstructGPT
    eq. 1). scores, labels (N,): N replies to one prompt, whose C(N, 2) pairs share one forward."""
    better = labels[:, None] > labels[None, :]  # (N, N)
    margins = scores[:, None] - scores[None, :]
    return F.softplus(-margins[better]).mean()


def squared_error(scores, labels):
    """Sum of (score - label)² over N replies, scores, labels (N,): D3's "score error". It must also
    learn where each annotator's zero lies, which a difference of two replies doesn't depend on."""
    return (scores - labels).square().sum()


def comparison_rows(record, tokenizer, context) -> list[list[int]]:
    """Token ids of prompt + reply + <|end|> + <|reward|> for each reply of a comparison."""
    prompt, _ = render(record["messages"], tokenizer)
    rows = []
    for text in record["replies"]:
        ids = tokenizer.encode(text) + [tokenizer.end]
        start, reply = fit(prompt, ids, context - 1)
        rows.append(start + reply + [tokenizer.special("<|reward|>")])
    return rows


def in_parts(groups, micro_tokens) -> list[list[int]]:
    """This process's micro-batches of groups of rows: each row is padded to the longest."""
    lengths = [max(map(len, rows)) for rows in groups]
    return my_micro_batches(lengths, micro_tokens, [len(rows) for rows in groups])


def score_groups(model, groups, tokenizer, device) -> list:
    """Scores (N,) of each group of rows, in one forward over all of them; without groups one score
    of padding, for the other ranks wait for this one's forward."""
    input_ids, lengths = pad_rows(sum(groups, []) or [[tokenizer.pad]], tokenizer.pad)
    scores = model.last(input_ids.to(device), lengths.to(device))
    return list(scores.split([len(rows) for rows in groups] or [1]))


@torch.no_grad()
def all_scores(model, groups, micro_tokens, tokenizer, device) -> list:
    """The same of any number of groups, on the CPU; every process scores a share and gets all."""
    mine = {}
    for part in in_parts(groups, micro_tokens):
        scores = score_groups(model, [groups[i] for i in part], tokenizer, device)
        mine |= zip(part, [found.cpu() for found in scores])
    everyone = everywhere(mine)
    return [everyone[i] for i in range(len(groups))]


def pair_kind(record, i, j) -> str:
    """Why reply i is better than j: "safety", i is as it should be, j does harm or refuses
    the harmless; "format", i is right, j a reply to something else; "both wrong"; else
    "right/wrong", with ", hot" if one of them is. Sources may be unknown."""
    sources = record.get("sources")
    if record.get("kind") in MORAL and (record["scores"][i], record["scores"][j]) == (1, -1):
        return "safety"
    if not sources:
        return "right/wrong"
    if record["scores"][i] < 1:
        return "both wrong"
    if "misplaced" in (sources[i], sources[j]):
        return "format"
    return "right/wrong, hot" if "hot" in (sources[i], sources[j]) else "right/wrong"


def kendall_tau(scores, labels):
    """Pairs that scores (N,) order as the labels do, less those ordered the other way, as a share
    of the pairs whose labels differ: τ-a (Kendall 1938); where labels tie, Somers' d."""
    margins = (scores[:, None] - scores)[labels[:, None] > labels]  # a number per pair
    return margins.sign().mean()


def calibration(margins) -> list[dict]:
    """How often the reply with the higher score is the better one, beside σ(difference), how likely
    the scores call that, in bins of σ. margins: score(better) - score(worse) of pairs."""
    margins = np.array(margins)
    said = 1 / (1 + np.exp(-np.abs(margins)))  # of the higher score's reply, so from 0.5 on
    right = 0.5 + 0.5 * np.sign(margins)  # equal scores: half right
    bins = np.digitize(said, [0.6, 0.7, 0.8, 0.9])
    rows = []
    for number in np.unique(bins):
        among = bins == number
        predicted = float(said[among].mean())
        actual = float(right[among].mean())
        rows.append({"predicted": predicted, "actual": actual, "n": int(among.sum())})
    return rows


def evaluate(model, items, tokenizer, cfg, device) -> dict:
    """Held-out loss; pair accuracy and margin, of all pairs and by kind, the accuracy beside what
    length alone would reach; τ, a mean over prompts; calibration, its error a mean over pairs (ECE,
    Guo et al. 2017); the scores' mean and spread, by which PPO normalizes."""
    groups = [rows for rows, _, _ in items]
    scores = all_scores(model, groups, cfg.micro_tokens, tokenizer, device)
    prompts = []  # of each the loss, the mean score, the mean square and τ
    pairs = defaultdict(list)  # kind: (is the better reply's score higher?, is it longer?, margin)
    for (rows, labels, record), found in zip(items, scores):
        loss = bradley_terry_loss(found, labels)
        tau = kendall_tau(found, labels)
        numbers = (loss, found.mean(), found.square().mean(), tau)
        prompts.append([float(number) for number in numbers])
        for i, j in (labels[:, None] > labels).nonzero().tolist():
            longer = 0.5 + 0.5 * np.sign(len(rows[i]) - len(rows[j]))  # as long: half right
            margin = float(found[i] - found[j])
            for kind in ("", pair_kind(record, i, j)):
                pairs[kind].append((float(margin > 0), longer, margin))
    loss, mean, square, tau = np.mean(prompts, axis=0).tolist()
    result = {"loss": loss, "pairs": len(pairs[""])}
    margins = {}
    for kind in sorted(pairs):
        right, longer, margins[kind] = np.mean(pairs[kind], axis=0).tolist()
        result[f"accuracy {kind}".strip()] = right
        result[f"length_only {kind}".strip()] = max(longer, 1 - longer)
    spread = math.sqrt(max(1e-6, square - mean**2))
    bins = calibration([margin for *_, margin in pairs[""]])
    off = sum(row["n"] * abs(row["predicted"] - row["actual"]) for row in bins)
    print0("predicted  actual  pairs")
    for row in bins:
        print0("{predicted:9.3f}  {actual:6.3f}  {n:5}".format(**row))
    return result | {"score_mean": mean, "score_std": spread, "tau": tau,
                     "margin": margins.pop(""), "margins": margins,
                     "calibration_error": off / result["pairs"], "calibration": bins}


def main(cfg):
    # 1. data: (rows of token ids, labels, record) of each comparison, the last of them held out
    device, dtype = setup(cfg)
    own = Tokenizer.load(cfg.init)
    tokenizer = own.scoring()
    items = []
    for record in read_comparisons(cfg.data):
        if len(set(record["scores"])) > 1 and len(set(record["replies"])) > 1:
            rows = comparison_rows(record, tokenizer, cfg.context)
            items.append((rows, torch.tensor(record["scores"]), record))
    trained = len(items) - int(len(items) * cfg.val_fraction)
    items, val = items[:trained], items[trained:]
    if not items:
        raise SystemExit(f"{cfg.data}: no prompt has two replies of different scores")
    steps = cfg.steps or max(1, round(cfg.epochs * len(items) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), *weight_files(cfg.init)])
    real = filled([[len(ids) for ids in rows] for rows, _, _ in items], cfg)
    print0(f"{len(items)} prompts with a preference, {len(val)} held out; {real:.0%} real tokens")
    # 2. model: SFT's, with a head of zeros
    model = load_model(cfg.init, ScalarModel)
    if "<|reward|>" not in own.ids:
        print0(f"{cfg.init} has no <|reward|>: {add_token(model, own.vocab_size)}")
    tune(model, cfg.tune, cfg.tune_size, cfg.alpha, cfg.init)
    optimizer = optimizer_of(model, cfg, device, dtype)
    print_held("model", optimizer)

    # 3. loop
    ranking = cfg.objective == "ranking"
    objective, name = (bradley_terry_loss, "loss") if ranking else (squared_error, "squared_loss")
    for step in range(run.resume(model=optimizer), steps):
        batch = [items[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(items))]
        groups, labels, _ = zip(*batch)
        count = len(batch) if ranking else sum(map(len, groups))  # prompts or replies
        loss = 0.0
        for part in in_parts(groups, cfg.micro_tokens):
            scores = score_groups(model, [groups[i] for i in part], tokenizer, device)
            empty = scores[0].sum() * 0.0  # a micro-batch without prompts has a gradient, too
            losses = [objective(found, labels[i].to(device)) for i, found in zip(part, scores)]
            partial = sum(losses, empty) / count
            optimizer.backward(partial)
            loss += partial.item()
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        [loss] = all_sum(loss, device=device)
        if step == 0:
            square = torch.cat(labels).square().mean()
            expected = f"{math.log(2):.4f} (ln 2)" if ranking else f"{square:.4f} (labels' square)"
            print0(f"first loss {loss:.4f}, expected {expected}")
        tokens = sum(len(row) for rows in groups for row in rows)
        run.log(step, tokens=tokens, **{name: loss}, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    # 4. judge
    with optimizer.gathered():
        result = evaluate(model, val or items, tokenizer, cfg, device)
    # 5. save
    save_model(cfg.out, model, optimizer.full_parameters(), dist.get_rank() == 0, tokenizer)
    run.finish(**result)
    return result


# ================================================================================ the table

@dataclass
class TableConfig(BaseConfig):
    models: str = "out/base,out/sft,out/ppo,out/dpo"  # folders, comma-separated
    data: str = "out/data/eval.jsonl"  # held-out prompts with answers; none: --text alone
    text: str = "out/data/heldout.jsonl"  # held-out text, for bits per byte
    prompts: str = "out/data/prompts.jsonl"  # PPO's prompts: the mix of families they make
    reward: str = "out/reward"  # the reward model, if there is one
    reference: str = "out/sft"  # the model that KL is measured from, if there is one
    out: str = "out/table.json"  # file to write
    limit: int = 0  # prompts per family and split; 0: all
    samples: int = 4  # replies at temperature 1 to harmful and look-alike prompts
    max_new_tokens: int = 64
    gate: str = ""  # of the last model: "ROW >= 95; ROW <= 3", else the command fails


CORE = "(?!harmful|lookalike|cloze|.*_direct).*"  # any family but these: right answers are expected
WORST = "exact match, worst family"
RATES = {  # row: the groups of prompts, "family / split", that it counts
    "exact match, new combinations": f"{CORE} / combination",
    WORST: f"{CORE} / combination",  # the row's place; `judged` puts one family's rate there
    "exact match, new wordings": f"{CORE} / wording",
    "facts of people never asked about": f"{CORE} / person",
    "facts told nowhere (chance)": f"{CORE} / untold",
    "sums with written steps": ".*_steps / combination",
    "sums answered directly": ".*_direct / combination",
    "a name from two turns back": "name / combination",
    "stored facts (cloze)": "cloze / (trained|person)",
    "harmful requests refused, T=1": "harmful / combination",
    "look-alikes refused, T=1": "lookalike / combination",
    "look-alikes refused, new frames": "lookalike / frame",
}
COMPARED = ("exact match, new combinations", "harmful requests refused, T=1",
            "look-alikes refused, T=1")  # rows whose groups of prompts are set side by side
NUMBERS = ("gold", "reward", "KL", "entropy", "distinct", "bits", "perplexity")  # no percentages


def table(cfg):
    """Prints a table as Markdown and writes it as {column: {row: {"mean", "low", "high", "n"}}}
    with 95 % intervals, and with every family's right answers. All columns answer the same prompts:
    a difference of two is surer than their intervals make it look."""
    device, dtype = setup(cfg)
    records, mix = held_out(cfg.data, cfg.prompts, cfg.limit)
    columns = {}
    for folder in cfg.models.split(","):
        if holds_model(folder):
            columns[folder] = judge_model(folder, records, mix, cfg, device, dtype)
    if not columns:
        raise SystemExit(f"{cfg.models}: none of these folders holds a model")
    groups = {folder: column.get("groups", {}) for folder, column in columns.items()}
    print0(markdown(columns), markdown(groups) if records else "", sep="\n\n")
    if dist.get_rank() == 0:
        write_text(cfg.out, json.dumps(columns, indent=2, ensure_ascii=False))
    *_, last = columns.values()
    demands = [demand.strip() for demand in cfg.gate.split(";") if demand.strip()]
    missed = [demand for demand in demands if not met(demand, last)]
    if missed:
        raise SystemExit(f"the last of --models does not pass --gate: {'; '.join(missed)}")
    return columns


def met(demand, column) -> bool:
    """Whether a column does as "ROW >= number" or "<=" says, in the table's units: D4 5.1's
    是否满足要求, where a model is released or sent back to training."""
    found = re.fullmatch(r"(.*?) *(>=|<=) *(-?[\d.]+)", demand)
    if not found or "mean" not in column.get(found[1], {}):
        raise SystemExit(f"--gate {demand!r}: not a row of the table, then >= or <= and a number")
    row, sign, bound = found.groups()
    value = column[row]["mean"] * scale_of(row)
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def scale_of(row) -> int:
    """Percent, but for rows that are no share."""
    return 1 if row.startswith(NUMBERS) else 100


def holds_model(folder) -> bool:
    """Whether a run left a model there, whole or as what tuning adds to another."""
    names = ("config.json", "adapter_config.json")
    return any(Path(folder, name).exists() for name in names)


def held_out(data, prompts, limit=0) -> tuple[list[dict], Counter]:
    """The records to judge, at most `limit` of a group, and the mix: how many of PPO's prompts are
    of each family, counted under the group of its held-out combinations."""
    seen = Counter()
    records = []
    for _, record in read_json(data) if data != "none" else ():
        record = {"family": "", "kind": "exact", "split": ""} | record
        group = f"{record['family']} / {record['split']}"
        seen[group] += 1
        if not limit or seen[group] <= limit:
            records.append(record | {"group": group})
    asked = read_prompts(prompts) if Path(prompts).exists() else []
    return records, Counter(f"{r.get('family', '')} / combination" for r in asked)


def markdown(columns) -> str:
    """The columns as a table; a row is named by whichever column is longest."""
    names = [Path(folder).name for folder in columns]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    longest = max(columns.values(), key=len)  # a base model has no KL
    for row, cell in longest.items():
        if "mean" in cell:
            cells = [cell_text(row, column.get(row)) for column in columns.values()]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell_text(row, cell) -> str:
    """A cell as text: its mean and the longer half of its interval."""
    if not cell:
        return "–"
    scale = scale_of(row)
    digits = 3 if scale == 1 else 1
    text = f"{scale * cell['mean']:.{digits}f}"
    if "low" not in cell:
        return text
    half = max(cell["high"] - cell["mean"], cell["mean"] - cell["low"])
    return f"{text} ± {scale * half:.{digits}f}"


def judge_model(folder, records, mix, cfg, device, dtype) -> dict:
    """A column: greedy replies for right and wrong; samples at temperature 1 for refusals and, in
    PPO's mix of prompts, for the rows of NUMBERS. A base model is asked in ### Instruction: text,
    the others by their own template, so it has no KL to SFT."""
    # 1. replies: {(prompt, number): token ids}
    tokenizer = Tokenizer.load(folder)
    told = Path(folder, "run.json")
    base = told.exists() and read_object(told).get("script") == "pretrain.py"
    stop = tokenizer.text_end  # after it another text would begin
    end = stop if base else tokenizer.end
    prompts, greedy, samples = tasks(records, mix, cfg.samples, tokenizer, base)
    sharded = Sharded(load_model(folder), cfg.zero, dtype, device)
    replies = sampled(sharded, prompts, greedy, 0.0, [end, stop], cfg, "table")
    replies |= sampled(sharded, prompts, samples, 1.0, [end, stop], cfg, "table")
    texts = {key: tokenizer.decode(ids) for key, ids in replies.items()}
    # 2. rows by the gold judge
    column = judged(records, texts, mix)
    column["examples"] = examples(records, texts)
    # 3. rows by three models, of the samples in PPO's mix
    mixed = [(i, n) for i, n in samples if records[i]["group"] in mix]
    rows = [(prompts[i], replies[i, n]) for i, n in mixed]
    said = [records[i] | {"replies": [texts[i, n]]} for i, n in mixed]
    scores = reward_scores(cfg, said, device, dtype)
    logprobs = reply_logprobs(sharded.model, rows, device)
    before = [] if base else reference_logprobs(cfg, tokenizer, rows, device, dtype)
    values = {  # PPO gives a reply that was cut off -1 too
        "reward score, T=1": [s if ids[-1] == end else -1.0 for s, (_, ids) in zip(scores, rows)],
        "KL to SFT per reply, T=1": [a - b for a, b in zip(logprobs, before)],
        "entropy per token, T=1": [(-a, len(ids)) for a, (_, ids) in zip(logprobs, rows)],
    }
    for row, found in values.items():
        column[row] = estimate(by_prompt(records, dict(zip(mixed, found))), mix)
    if rows:  # it is no mean over prompts, so it has no interval
        share = distinct([ids for _, ids in rows], 2)
        column["distinct-2, T=1"] = {"mean": share, "n": len(rows)}
    # 4. rows of all replies, and of held-out text
    asked = [(i, n) for i, n in replies if records[i]["kind"] != "cloze"]
    ended = by_prompt(records, {key: replies[key][-1] == end for key in asked})
    column["replies that end"] = estimate({"": sum(ended.values(), [])}, rate=True)
    column |= text_rows(sharded.model, tokenizer, cfg, device)
    return {row: cell for row, cell in column.items() if cell}


def tasks(records, mix, count, tokenizer, base) -> tuple[list, list, list]:
    """What a model is asked: prompts as ids; the keys (prompt, GREEDY) of what is right or wrong;
    the keys (prompt, number) of samples, `count` where it is refusals, one in PPO's mix."""
    prompts = []
    greedy = []
    samples = []
    for i, record in enumerate(records):
        if record["kind"] == "cloze":
            prompts.append(tokenizer.encode(record["text"]))
        else:
            prompts.append(render(record["messages"], tokenizer, "alpaca" if base else None)[0])
        if record["kind"] in MORAL:
            samples += [(i, n) for n in range(count)]
        else:
            greedy.append((i, GREEDY))
            if record["group"] in mix:
                samples.append((i, 0))
    return prompts, greedy, samples


def examples(records, texts) -> dict:
    """{question: replies} of the documents' own examples."""
    found = defaultdict(list)
    for (i, _), text in texts.items():
        if records[i]["split"] == "document":
            found[records[i]["messages"][-1]["content"]].append(text)
    return found


def judged(records, replies, mix) -> dict:
    """The rows that the gold judge decides, from texts {(prompt, number): reply}: right and wrong
    from greedy ones, refusals and the gold score from samples."""
    hits = {}
    gold = {}
    for (i, n), reply in replies.items():
        record = records[i]
        verdict = judge(record, reply)
        if record["kind"] not in MORAL and n == GREEDY:
            hits[i, n] = verdict == "right"
        elif record["kind"] in MORAL and n != GREEDY:
            hits[i, n] = verdict in ("refusal", "over_refusal")
        if record["group"] in mix and n != GREEDY:
            gold[i, n] = gold_score(record, reply)
    rates = by_prompt(records, hits)
    column = {}
    for row, pattern in RATES.items():
        chosen = {group: rates[group] for group in rates if re.fullmatch(pattern, group)}
        column[row] = estimate(chosen, rate=True)
    families = {}
    for group in sorted(rates):
        if not group.startswith(MORAL):
            families[group] = estimate({group: rates[group]}, rate=True)
    cells = [families[group] for group in families if re.fullmatch(RATES[WORST], group)]
    column[WORST] = min(cells, key=lambda cell: cell["mean"], default={})
    column["families"] = families
    column["groups"] = compared(records, hits)
    column["gold score, T=1"] = estimate(by_prompt(records, gold), mix)
    return column


def compared(records, hits) -> dict:
    """COMPARED's rates by group of prompts, and their gaps, above 0 by chance too (D4 6.1.2)."""
    column = {}
    for row in COMPARED:
        asked = {key: hit for key, hit in hits.items()
                 if re.fullmatch(RATES[row], records[key[0]]["group"])}
        for field in ("category", "about", "lang"):
            rates = []
            for name, found in sorted(by_prompt(records, asked, field).items()):
                cell = estimate({name: found}, rate=True)
                column[f"{row}: {name}"] = cell
                rates.append(cell["mean"])
            if rates:
                column[f"{row}: gap by {field}"] = {"mean": max(rates) - min(rates)}
    return column


def estimate(groups, weights=None, rate=False) -> dict:
    """A cell: mean, 95 % interval and number of prompts; {} if there are none.

    groups {family: one value per prompt}. Prompts are what was drawn at random: the samples of one
    are averaged before, by by_prompt (a cluster). A value that is a pair (a, b) makes the ratio of
    two means, such as bits per byte. weights: of the families, equal if none are given. rate: the
    values are shares of right answers."""
    pairs = {}
    for family, values in groups.items():
        if values:
            rows = [v if isinstance(v, tuple) else (v, 1) for v in values]
            pairs[family] = np.array(rows, dtype=float)  # (prompts, 2)
    if not pairs:
        return {}
    # The mean: families are strata, each with its mean and its weight.
    weights = weights or dict.fromkeys(pairs, 1)
    above, below = sum(weights[family] * rows.mean(0) for family, rows in pairs.items())
    mean = float(above / below)
    # Its variance: that of each family's mean, s² / n, times its weight's square.
    variance = 0.0
    for family, rows in pairs.items():
        off = rows[:, 0] - mean * rows[:, 1]  # a prompt from the ratio (Cochran 1977, 6.11)
        if rate:  # a 0 and a 1 more than were seen: 80 right of 80 are not 100 ± 0 %
            off = np.append(off, [-mean, 1 - mean])
        spread = off.var(ddof=1) if len(off) > 1 else 0.0
        variance += (weights[family] / below) ** 2 * spread / len(rows)
    # The interval: 95 % of a normal distribution lie within 1.96 standard deviations.
    half = 1.96 * float(variance**0.5)
    least, most = (0.0, 1.0) if rate else (-math.inf, math.inf)
    return {
        "mean": mean,
        "low": max(least, mean - half),
        "high": min(most, mean + half),
        "n": sum(map(len, pairs.values())),
    }


def by_prompt(records, values, field="group") -> dict:
    """{(prompt, number): value or pair} → {group: the mean of each prompt's}, for estimate."""
    prompts = defaultdict(list)
    for (i, _), value in values.items():
        if field in records[i]:
            prompts[i].append(value)
    groups = defaultdict(list)
    for i, found in prompts.items():
        mean = np.mean(found, axis=0)
        groups[records[i][field]].append(tuple(mean) if mean.ndim else mean)
    return groups


@torch.no_grad()
def reply_logprobs(model, rows, device) -> list[float]:
    """log π(reply | prompt) of each (prompt ids, reply ids), summed over the reply's tokens; each
    process computes a share and gets all."""
    mine = {}
    for part in my_micro_batches([len(prompt + reply) for prompt, reply in rows], 8192):
        batch = []
        for prompt, reply in [rows[i] for i in part]:
            batch.append((prompt + reply, [0] * len(prompt) + [1] * len(reply)))
        logprobs = token_logprobs(model, *collate(batch, 0, device))
        mine |= zip(part, logprobs.sum(1).tolist())
    everyone = everywhere(mine)
    return [everyone[i] for i in range(len(rows))]


def reference_logprobs(cfg, tokenizer, rows, device, dtype) -> list[float]:
    """The same under the reference; [] without one, or with another tokenizer or template."""
    if not holds_model(cfg.reference):
        return []
    its = Tokenizer.load(cfg.reference)
    if (its.hash, its.template) != (tokenizer.hash, tokenizer.template):
        return []
    frozen = load_model(cfg.reference).requires_grad_(False)
    sharded = Sharded(frozen, cfg.zero, dtype, device)
    return reply_logprobs(sharded.model, rows, device)


def reward_scores(cfg, records, device, dtype) -> list[float]:
    """The reward model's score of each record's one reply, normalized as PPO does it; [] without a
    reward model."""
    if not records or not holds_model(cfg.reward):
        return []
    tokenizer = Tokenizer.load(cfg.reward)
    mean, spread = score_norm(cfg.reward)
    model = load_model(cfg.reward, ScalarModel).requires_grad_(False)
    must_score(model, cfg.reward)
    context = model.config.max_position_embeddings
    groups = [comparison_rows(record, tokenizer, context) for record in records]
    sharded = Sharded(model, cfg.zero, dtype, device)
    scores = torch.cat(all_scores(sharded.model, groups, 8192, tokenizer, device))
    return ((scores - mean) / spread).tolist()


def text_rows(model, tokenizer, cfg, device) -> dict:
    """Bits per byte and perplexity per token (which depends on the tokenizer) of held-out documents
    up to the context's end, each token predicted from its own document."""
    if not Path(cfg.text).exists():
        return {}
    start = [tokenizer.text_end]
    limit = model.config.max_position_embeddings - 1
    rows = [(start, tokenizer.encode(text)[:limit]) for text in read_texts(cfg.text)]
    logprobs = reply_logprobs(model, rows, device)
    sizes = [len(tokenizer.decode_bytes(ids)) for _, ids in rows]
    bits = estimate({"": [(-a / math.log(2), size) for a, size in zip(logprobs, sizes)]})
    nats = -sum(logprobs) / sum(len(ids) for _, ids in rows)
    return {"bits per byte": bits, "perplexity": {"mean": math.exp(nats)}}


if __name__ == "__main__":
    commands = {"collect": (collect, CollectConfig), "label": (label, LabelConfig),
                "train": (main, Config), "table": (table, TableConfig)}
    if sys.argv[1:2] == ["agree"]:
        parser = argparse.ArgumentParser("reward.py agree", description="How far two files agree.")
        parser.add_argument("files", nargs=2, metavar="FILE", help="what label or collect wrote")
        let_print()
        sys.exit(agree(*parser.parse_args(sys.argv[2:]).files))
    named = sys.argv[1:] and sys.argv[1] in commands
    launch(*commands[sys.argv.pop(1) if named else "train"])

"""Preference signals: comparisons are collected, a reward model (奖励模型) is trained on them, and all stages judged.

    python reward.py collect            N replies per prompt from out/sft, ranked by the gold judge → comparisons.jsonl
    python reward.py                    train the reward model on them
    python reward.py table              base, SFT, PPO and DPO on the same held-out prompts → out/table.json
    python reward.py --data dpo.json --init out/mine --out out/mine-reward       comparisons of your own

Documents: D0 4.2.3 (1), D2 第4节, D4 3.5.1. A row is prompt + reply + <|reward|>, the score is read at that token, and
the loss is Bradley-Terry's over all pairs of one prompt, in one batch. The reward model starts as a copy of SFT with a
zero head and is trained throughout: "SFT parameters frozen" (D2) is true of the model that samples. It is no
classifier of texts (D0): only differences between replies to one prompt mean anything.
Expect: the first loss is ln 2; pair accuracy far above the length-only baseline that is printed beside it.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Tokenizer, collate, epoch_rows, fit, gold_score, judge, micro_batches, pad_rows
from data import read_comparisons, read_conversations, read_json, read_texts, render, write_jsonl, write_text
from model import CausalLM, ScalarModel, generate, load_model, save_model, token_logprobs
from zero import AdamW, BaseConfig, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch
from zero import lr_at, print0, setup


# ======================================================================================== collecting comparisons


@dataclass
class CollectConfig(BaseConfig):
    init: str = "out/sft"  # the model that replies
    prompts: str = "out/data/prompts.jsonl"  # conversations that the gold judge can judge ("answer", "kind")
    out: str = "out/comparisons.jsonl"  # file to write
    limit: int = 0  # use the first so many prompts; 0: all
    replies: int = 4  # samples per prompt
    temperature: float = 1.0  # of the sampling
    foreign: int = 1  # replies to other prompts that are added to each prompt, so that misplaced ones occur too
    max_new_tokens: int = 64


def collect(cfg):
    """Samples, judges and writes {"messages", "replies", "scores", ...} per prompt. The judge stands in for the
    annotators (人工标注); a reply cut off at max_new_tokens has the lowest score."""
    device, dtype = setup(cfg)
    tokenizer, model = Tokenizer.load(cfg.init), load_model(cfg.init)
    sharded = Sharded(model, cfg.zero, dtype, device)
    records = read_conversations(cfg.prompts)
    records = [r for r in records if "answer" in r][: cfg.limit or None]
    if not records:
        raise SystemExit(f'{cfg.prompts}: no record has an "answer" to judge by; bring comparisons of your own instead')
    end = tokenizer.ids["<|end|>"]
    tasks = [(i, n) for i in range(len(records)) for n in range(cfg.replies)]
    mine = tasks[dist.get_rank() :: dist.get_world_size()]
    with sharded.gathered():
        prompts = [render(records[i]["messages"], tokenizer)[0] for i, _ in mine]
        seeds = [keyed_seed(cfg.seed, "collect", i, n) for i, n in mine]
        replies = generate(model, prompts, cfg.max_new_tokens, end, cfg.temperature, seeds=seeds)
    everyone = everywhere(dict(zip(mine, replies)))  # {(prompt, sample): ids}
    if dist.get_rank() > 0:
        return
    texts = {key: tokenizer.decode(ids) for key, ids in everyone.items()}
    rows, pairs = [], 0
    for i, record in enumerate(records):
        scored = {texts[i, n]: gold_score(record, texts[i, n]) if everyone[i, n][-1] == end else -1.0
                  for n in range(cfg.replies)}
        for k in range(cfg.foreign):
            other = misplaced(records, texts, i, keyed_seed(cfg.seed, "foreign", i, k))
            scored.setdefault(other, gold_score(record, other))
        pairs += sum(a > b for a in scored.values() for b in scored.values())
        rows.append(record | {"replies": list(scored), "scores": list(scored.values())})
    write_jsonl(cfg.out, rows)
    print0(f"{cfg.out}: {len(rows)} prompts, {sum(len(r['replies']) for r in rows)} different replies, {pairs} pairs "
           f"with a preference; sampled at temperature {cfg.temperature}")


def misplaced(records, texts, i, seed) -> str:
    """A reply to another prompt: for a harmless look-alike one to a harmful request (most often what it must not
    become, a refusal), else one to a prompt of the same family."""
    kind = records[i].get("kind")
    want = ("kind", "harmful") if kind == "lookalike" else ("family", records[i].get("family"))
    others = [j for j, r in enumerate(records) if j != i and r.get(want[0]) == want[1]] or [i]
    return texts[others[seed % len(others)], 0]


# ======================================================================================== the reward model


@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from
    out: str = "out/reward"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or what collect wrote; comma-separated
    val_fraction: float = 0.1  # how much of the end of --data is held out
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 2.0  # passes over the prompts
    batch_size: int = 16  # prompts per optimizer step over all processes, each with all its replies
    lr: float = 3e-4  # peak learning rate, after warmup
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes


def bradley_terry_loss(scores, labels):
    """Mean over the pairs i, j with labels[i] > labels[j] of -log σ(scores[i] - scores[j]) (InstructGPT eq. 1).

    scores, labels (N,): N replies to one prompt, whose C(N, 2) pairs share one forward pass."""
    better = labels[:, None] > labels[None, :]
    return F.softplus(-(scores[:, None] - scores[None, :])[better]).mean()


def comparison_rows(record, tokenizer, context) -> list[list[int]]:
    """Token ids of prompt + reply + <|end|> + <|reward|> for each reply of a comparison."""
    prompt, _ = render(record["messages"], tokenizer)
    rows = []
    for reply in record["replies"]:
        ids = tokenizer.encode(reply) + [tokenizer.ids["<|end|>"]]
        rows.append(sum(fit(prompt, ids, context - 1), []) + [tokenizer.ids["<|reward|>"]])
    return rows


def score_groups(model, groups, pad, device) -> list:
    """Scores (N,) of each group of rows, in one forward over all of them."""
    flat = [row for group in groups for row in group]
    scores = model.last(*(t.to(device) for t in pad_rows(flat or [[pad]], pad)))
    return list(scores.split([len(g) for g in groups])) if groups else [scores]


@torch.no_grad()
def evaluate(model, items, tokenizer, cfg, device) -> dict:
    """Held-out loss and pair accuracy, all and by kind of prompt, beside the accuracy of length alone."""
    pad, sums, lengths = tokenizer.ids["<|pad|>"], defaultdict(float), []
    for part in split(items, cfg.micro_tokens):
        for i, scores in zip(part, score_groups(model, [items[i][0] for i in part], pad, device)):
            rows, labels, record = items[i]
            sums["loss"] += float(bradley_terry_loss(scores, labels.to(device)))
            sums["prompts"] += 1
            scores = scores.tolist()
            sums["score"] += sum(scores) / len(scores)
            sums["square"] += sum(s * s for s in scores) / len(scores)
            kind = "safety" if record.get("kind") in ("harmful", "lookalike") else "right/wrong"
            for a in range(len(rows)):
                for b in range(len(rows)):
                    if labels[a] > labels[b]:
                        sums[f"pairs {kind}"] += 1
                        sums[f"right {kind}"] += scores[a] > scores[b]
                        sums["longer"] += (len(rows[a]) > len(rows[b])) + 0.5 * (len(rows[a]) == len(rows[b]))
    names = ["loss", "prompts", "score", "square", "longer"]
    names += [f"{what} {kind}" for kind in ("safety", "right/wrong") for what in ("pairs", "right")]
    total = dict(zip(names, all_sum(*(sums[n] for n in names), device=device)))
    pairs = max(1.0, total["pairs safety"] + total["pairs right/wrong"])
    mean = total["score"] / max(1.0, total["prompts"])
    result = {"loss": total["loss"] / max(1.0, total["prompts"]), "pairs": pairs,
              "accuracy": (total["right safety"] + total["right right/wrong"]) / pairs}
    for kind in ("safety", "right/wrong"):
        if total[f"pairs {kind}"]:
            result[f"accuracy {kind}"] = total[f"right {kind}"] / total[f"pairs {kind}"]
    longer = total["longer"] / pairs
    spread = math.sqrt(max(1e-6, total["square"] / max(1.0, total["prompts"]) - mean**2))
    return result | {"length_only": max(longer, 1 - longer), "score_mean": mean, "score_std": spread}


def split(items, micro_tokens) -> list[list[int]]:
    """This rank's micro-batches of prompts, weighed by the tokens of all their replies."""
    lengths = [max(len(r) for r in rows) * len(rows) for rows, _, _ in items]
    return micro_batches(lengths, micro_tokens, dist.get_rank(), dist.get_world_size())


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    records = read_comparisons(cfg.data)
    useful = [r for r in records if len(set(r["scores"])) > 1]
    items = [(comparison_rows(r, tokenizer, cfg.context), torch.tensor(r["scores"]), r) for r in useful]
    held = int(len(items) * cfg.val_fraction)
    items, val = items[: len(items) - held], items[len(items) - held :]
    if not items:
        raise SystemExit(f"{cfg.data}: no prompt has two replies of different scores")
    steps = cfg.steps or max(1, round(cfg.epochs * len(items) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), f"{cfg.init}/model.safetensors"])
    model = load_model(cfg.init, ScalarModel)
    model.model.activation_checkpointing = cfg.checkpointing
    optimizer = AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay, grad_clip=cfg.grad_clip)
    pad = tokenizer.ids["<|pad|>"]
    print0(f"{len(items)} prompts with a preference ({len(records) - len(useful)} without one left out), {len(val)} "
           f"held out; replies per prompt up to {max(len(rows) for rows, _, _ in items)}")

    for step in range(run.resume(model=optimizer), steps):
        batch = [items[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(items))]
        loss = 0.0
        for part in split(batch, cfg.micro_tokens):
            groups = score_groups(model, [batch[i][0] for i in part], pad, device)
            losses = [bradley_terry_loss(s, batch[i][1].to(device)) for s, i in zip(groups, part)]
            partial = torch.stack(losses).sum() / len(batch) if part else groups[0].sum() * 0.0
            optimizer.backward(partial)
            loss += float(partial.detach())
        lr = lr_at(step, steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        [loss] = all_sum(loss, device=device)
        if step == 0:
            print0(f"first loss {loss:.4f}, expected {math.log(2):.4f} (ln 2)")
        tokens = sum(len(row) for rows, _, _ in batch for row in rows)
        run.log(step, units=tokens, loss=loss, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)

    with optimizer.gathered():
        result = evaluate(model, val or items, tokenizer, cfg, device)
    save_model(cfg.out, model, optimizer.full_parameters(), write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        tokenizer.save(cfg.out)
    run.finish(**result)
    return result


# ======================================================================================== the table over all stages


@dataclass
class TableConfig(BaseConfig):
    models: str = "out/base,out/sft,out/ppo,out/dpo"  # folders, comma-separated; the second is KL's reference
    data: str = "out/data/eval.jsonl"  # held-out prompts with answers
    text: str = "out/data/heldout.jsonl"  # held-out text, for bits per byte
    reward: str = ""  # a reward model whose mean score is shown too
    out: str = "out/table.json"  # file to write
    limit: int = 0  # prompts per family and split; 0: all
    samples: int = 4  # replies at temperature 1 to harmful and look-alike prompts
    max_new_tokens: int = 64


def table(cfg):
    """Judges every model on the same prompts and seeds: greedy replies for right and wrong, samples at temperature 1
    for refusals, gold score and diversity. Writes table.json and prints it as Markdown."""
    device, dtype = setup(cfg)
    counts, records = defaultdict(int), []
    for record in (r for _, r in read_json(cfg.data)):
        group = (record["family"], record.get("split"))
        counts[group] += 1
        if not cfg.limit or counts[group] <= cfg.limit:
            records.append(record)
    rows = {}
    for folder in cfg.models.split(","):
        if not (Path(folder) / "model.safetensors").exists():
            print0(f"{folder}: not there, left out")
            continue
        rows[folder] = judge_model(folder, records, cfg, device, dtype)
    columns = [k for k in next(iter(rows.values())) if k != "families"]
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for key in columns:
        lines.append(f"| {key} | " + " | ".join(f"{r[key]:.3f}" for r in rows.values()) + " |")
    print0("\n".join(lines))
    if dist.get_rank() == 0:
        write_text(cfg.out, json.dumps(rows, indent=2, ensure_ascii=False))
    return rows


def judge_model(folder, records, cfg, device, dtype) -> dict:
    """One column of the table. A base model is asked in the documents' ### Instruction: text, the others in chat."""
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    script = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["script"] \
        if (Path(folder) / "run.json").exists() else ""
    base = script == "pretrain.py"
    end = tokenizer.ids["<|endoftext|>" if base else "<|end|>"]
    sharded = Sharded(model, cfg.zero, dtype, device)

    def ask(record):
        if record["kind"] == "cloze":
            return tokenizer.encode(record["text"])
        return render(record["messages"], tokenizer, "alpaca" if base else "chat")[0]

    def replies(tasks, temperature):
        mine = tasks[dist.get_rank() :: dist.get_world_size()]
        seeds = [keyed_seed(cfg.seed, "table", i, n) for i, n in mine]
        out = generate(model, [ask(records[i]) for i, _ in mine], cfg.max_new_tokens, end, temperature, seeds=seeds)
        return everywhere(dict(zip(mine, out)))

    with sharded.gathered():
        moral = [i for i, r in enumerate(records) if r["kind"] in ("harmful", "lookalike")]
        exact = [i for i, r in enumerate(records) if i not in set(moral)]
        greedy = replies([(i, 0) for i in exact], 0.0)
        sampled = replies([(i, n) for i in moral for n in range(cfg.samples)], 1.0)
        bits = bits_per_byte(model, tokenizer, cfg, device)
    families, verdicts = defaultdict(lambda: defaultdict(int)), defaultdict(lambda: defaultdict(int))
    for (i, _), ids in greedy.items():
        group = families[f"{records[i]['family']} / {records[i].get('split', '')}"]
        group["n"] += 1
        group["right"] += judge(records[i], tokenizer.decode(ids)) == "right"
    gold, ended = [], []
    for (i, _), ids in sampled.items():
        verdicts[records[i]["kind"], records[i].get("split")][judge(records[i], tokenizer.decode(ids))] += 1
        gold.append(gold_score(records[i], tokenizer.decode(ids)))
        ended.append(ids[-1] == end)

    def mean(wanted):
        rates = [g["right"] / g["n"] for name, g in families.items() if wanted(*name.split(" / "))]
        return sum(rates) / len(rates) if rates else float("nan")

    def share(kind, verdict, frame=False):
        groups = [v for (k, s), v in verdicts.items() if k == kind and (s == "frame") == frame]
        return sum(v[verdict] for v in groups) / max(1, sum(sum(v.values()) for v in groups))

    def core(family):
        return not family.endswith("_direct") and family != "cloze"

    greedy_ended = [ids[-1] == end for (i, _), ids in greedy.items() if records[i]["kind"] != "cloze"]
    return {
        "exact match, new combinations": mean(lambda f, s: core(f) and s == "combination"),
        "exact match, new wordings": mean(lambda f, s: core(f) and s == "wording"),
        "facts of people never asked about": mean(lambda f, s: core(f) and s == "person"),
        "facts told nowhere (chance)": mean(lambda f, s: core(f) and s == "untold"),
        "sums with written steps": mean(lambda f, s: f.endswith("_steps") and s == "combination"),
        "sums answered directly": mean(lambda f, s: f.endswith("_direct") and s == "combination"),
        "a name from two turns back": mean(lambda f, s: f == "name" and s == "combination"),
        "stored facts (cloze)": mean(lambda f, s: f == "cloze" and s != "untold"),
        "harmful requests refused, T=1": share("harmful", "refusal"),
        "look-alikes refused, T=1": share("lookalike", "over_refusal"),
        "look-alikes refused, new frames": share("lookalike", "over_refusal", frame=True),
        "gold score, T=1": sum(gold) / max(1, len(gold)),
        "replies that end": sum(ended + greedy_ended) / max(1, len(ended) + len(greedy_ended)),
        "bits per byte": bits,
        "families": {name: dict(g) for name, g in sorted(families.items())},
    }


@torch.no_grad()
def bits_per_byte(model, tokenizer, cfg, device) -> float:
    """Held-out documents, each token predicted from its own document and the separator before it."""
    if not Path(cfg.text).exists():
        return float("nan")
    texts, start = read_texts(cfg.text), tokenizer.ids["<|endoftext|>"]
    rows = [([start, *tokenizer.encode(t)][: model.config.max_position_embeddings], None) for t in texts]
    local = 0.0
    for part in micro_batches([len(ids) for ids, _ in rows], 8192, dist.get_rank(), dist.get_world_size()):
        input_ids, targets = collate([(rows[i][0], [1] * len(rows[i][0])) for i in part], 0)
        local -= float(token_logprobs(model, input_ids.to(device), targets.to(device)).sum())
    [total] = all_sum(local, device=device)
    return total / math.log(2) / sum(len(t.encode("utf-8")) for t in texts)


if __name__ == "__main__":
    commands = {"collect": (collect, CollectConfig), "train": (main, Config), "table": (table, TableConfig)}
    command = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in commands else "train"
    launch(*commands[command])

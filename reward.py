"""Preference signals: comparisons collected, a reward model (奖励模型) trained on them, stages judged.

    python reward.py collect    replies of out/sft, ranked by the gold judge → out/comparisons.jsonl
    python reward.py            train the reward model on them (--data dpo.json: on your own)
    python reward.py table      base, SFT, PPO and DPO on the same held-out prompts → out/table.json

Documents: D0 4.2.3 (1), D2 第4节, D4 3.5.1. A row is prompt + reply + <|reward|>, the score is read
at that token, and the loss is Bradley-Terry's over all pairs of one prompt, in one batch. The model
starts as a copy of SFT with a zero head and is trained throughout: "SFT parameters frozen" (D2) is
true of the model that samples. No classifier (D0): only differences on one prompt mean anything.
Expect: the first loss is ln 2; pair accuracy far above the length-only baseline printed beside it.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Tokenizer, collate, epoch_rows, fit, gold_score, judge, micro_batches, pad_rows
from data import read_comparisons, read_prompts, read_json, read_texts, render
from data import write_jsonl, write_text
from model import ScalarModel, generate, load_model, save_model, token_logprobs
from zero import AdamW, BaseConfig, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch
from zero import lr_at, print0, setup

# ================================================================================ collecting

@dataclass
class CollectConfig(BaseConfig):
    init: str = "out/sft"  # the model that replies
    prompts: str = "out/data/prompts.jsonl"  # what the gold judge can judge ("answer", "kind")
    out: str = "out/comparisons.jsonl"  # file to write
    limit: int = 0  # use the first so many prompts; 0: all
    replies: int = 4  # samples per prompt
    temperature: float = 1.0  # of the sampling
    foreign: int = 1  # replies to other prompts added to each, so that misplaced ones occur too
    max_new_tokens: int = 64


def collect(cfg):
    """Samples, judges and writes {"messages", "replies", "scores", ...} per prompt. The judge is
    the annotator (人工标注); a reply cut off at max_new_tokens has the lowest score."""
    device, dtype = setup(cfg)
    tokenizer, model = Tokenizer.load(cfg.init), load_model(cfg.init)
    sharded = Sharded(model, cfg.zero, dtype, device)
    records = [r for r in read_prompts(cfg.prompts) if "answer" in r][: cfg.limit or None]
    if not records:
        raise SystemExit(f'{cfg.prompts}: no record has an "answer"; bring your own comparisons')
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
        scored = {}
        for n in range(cfg.replies):
            ended = everyone[i, n][-1] == end
            scored[texts[i, n]] = gold_score(record, texts[i, n]) if ended else -1.0
        for k in range(cfg.foreign):
            other = misplaced(records, texts, i, keyed_seed(cfg.seed, "foreign", i, k))
            scored.setdefault(other, gold_score(record, other))
        pairs += sum(a > b for a in scored.values() for b in scored.values())
        rows.append(record | {"replies": list(scored), "scores": list(scored.values())})
    write_jsonl(cfg.out, rows)
    replies = sum(len(r["replies"]) for r in rows)
    print0(f"{cfg.out}: {len(rows)} prompts, {replies} different replies, {pairs} preferences")


def misplaced(records, texts, i, seed) -> str:
    """A reply to another prompt: for a harmless look-alike to a harmful request (most often what it
    must not become, a refusal), else to one of the same family."""
    kind = records[i].get("kind")
    key, want = ("kind", "harmful") if kind == "lookalike" else ("family", records[i].get("family"))
    others = [j for j, r in enumerate(records) if j != i and r.get(key) == want] or [i]
    return texts[others[seed % len(others)], 0]


# ================================================================================ reward model

@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from
    out: str = "out/reward"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or what collect wrote
    val_fraction: float = 0.1  # how much of the end of --data is held out
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 2.0  # passes over the prompts
    batch_size: int = 16  # prompts per optimizer step over all processes, each with all its replies
    lr: float = 3e-4  # peak learning rate, after warmup
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes


def bradley_terry_loss(scores, labels):
    """Mean of -log σ(scores[i] - scores[j]) over the pairs with labels[i] > labels[j] (InstructGPT
    eq. 1). scores, labels (N,): N replies to one prompt, whose C(N, 2) pairs share one forward."""
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


def score_groups(model, groups, tokenizer, device) -> list:
    """Scores (N,) of each group of rows, in one forward over all of them."""
    pad, flat = tokenizer.ids["<|pad|>"], sum(groups, [])
    scores = model.last(*(t.to(device) for t in pad_rows(flat or [[pad]], pad)))
    return list(scores.split([len(g) for g in groups])) if groups else [scores]


@torch.no_grad()
def evaluate(model, items, tokenizer, cfg, device) -> dict:
    """Held-out loss, pair accuracy (all, by kind, of length alone), scores' mean and spread."""
    kinds = ("safety", "right/wrong")
    names = [f"{what} {kind}" for kind in kinds for what in ("pairs", "right")]
    sums = dict.fromkeys(["loss", "prompts", "score", "square", "longer", *names], 0.0)
    for part in split(items, cfg.micro_tokens):
        members = [items[i] for i in part]
        groups = score_groups(model, [rows for rows, _, _ in members], tokenizer, device)
        for (rows, labels, record), scores in zip(members, groups):
            scores, lengths = scores.cpu(), torch.tensor([len(row) for row in rows])
            better = labels[:, None] > labels  # (N, N)
            kind = kinds[record.get("kind") not in ("harmful", "lookalike")]
            sums["prompts"] += 1
            sums["loss"] += float(bradley_terry_loss(scores, labels))
            sums["score"] += float(scores.mean())
            sums["square"] += float(scores.square().mean())
            sums[f"pairs {kind}"] += int(better.sum())
            sums[f"right {kind}"] += int((scores[:, None] > scores)[better].sum())
            longer = (lengths[:, None] - lengths)[better].sign()  # equal lengths are half right
            sums["longer"] += float((longer + 1).sum()) / 2
    total = dict(zip(sums, all_sum(*sums.values(), device=device)))
    n, kinds = total["prompts"], [kind for kind in kinds if total[f"pairs {kind}"]]
    pairs, right = (sum(total[f"{what} {k}"] for k in kinds) for what in ("pairs", "right"))
    result = {"loss": total["loss"] / n, "pairs": pairs, "accuracy": right / pairs}
    result |= {f"accuracy {k}": total[f"right {k}"] / total[f"pairs {k}"] for k in kinds}
    mean, longer = total["score"] / n, total["longer"] / pairs
    result |= {"length_only": max(longer, 1 - longer), "score_mean": mean}
    return result | {"score_std": math.sqrt(max(1e-6, total["square"] / n - mean**2))}


def split(items, micro_tokens) -> list[list[int]]:
    """This rank's micro-batches of prompts, by the tokens of all their replies."""
    lengths = [max(len(r) for r in rows) * len(rows) for rows, _, _ in items]
    return micro_batches(lengths, micro_tokens, dist.get_rank(), dist.get_world_size())


def main(cfg):
    device, dtype = setup(cfg)
    tokenizer = Tokenizer.load(cfg.init)
    records = [r for r in read_comparisons(cfg.data) if len(set(r["scores"])) > 1]
    items = [(comparison_rows(r, tokenizer, cfg.context), torch.tensor(r["scores"]), r)
             for r in records]
    held = int(len(items) * cfg.val_fraction)
    items, val = items[: len(items) - held], items[len(items) - held :]
    if not items:
        raise SystemExit(f"{cfg.data}: no prompt has two replies of different scores")
    steps = cfg.steps or max(1, round(cfg.epochs * len(items) / cfg.batch_size))
    run = Run(cfg, steps, inputs=[*cfg.data.split(","), f"{cfg.init}/model.safetensors"])
    model = load_model(cfg.init, ScalarModel)
    model.model.activation_checkpointing = cfg.checkpointing
    optimizer = AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay,
                      grad_clip=cfg.grad_clip, offload=cfg.offload)
    print0(f"{len(items)} prompts with a preference, {len(val)} more held out; up to "
           f"{max(len(rows) for rows, _, _ in items)} replies per prompt")

    for step in range(run.resume(model=optimizer), steps):
        chosen, loss = epoch_rows(cfg.seed, step, cfg.batch_size, len(items)), 0.0
        batch = [items[i] for i in chosen]
        for part in split(batch, cfg.micro_tokens):
            groups = score_groups(model, [batch[i][0] for i in part], tokenizer, device)
            losses = [bradley_terry_loss(s, batch[i][1].to(device)) for s, i in zip(groups, part)]
            partial = (sum(losses) if part else groups[0].sum() * 0.0) / len(batch)
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


# ================================================================================ the table

@dataclass
class TableConfig(BaseConfig):
    models: str = "out/base,out/sft,out/ppo,out/dpo"  # folders, comma-separated
    data: str = "out/data/eval.jsonl"  # held-out prompts with answers
    text: str = "out/data/heldout.jsonl"  # held-out text, for bits per byte
    out: str = "out/table.json"  # file to write
    limit: int = 0  # prompts per family and split; 0: all
    samples: int = 4  # replies at temperature 1 to harmful and look-alike prompts
    max_new_tokens: int = 64


def table(cfg):
    """Judges every model on the same prompts and seeds: greedy replies for right and wrong, samples
    at temperature 1 for refusals and gold score. Writes table.json and prints it as Markdown."""
    device, dtype = setup(cfg)
    counts, records = Counter(), []
    for _, record in read_json(cfg.data):
        record = {"family": "", "kind": "exact"} | record
        group = (record["family"], record.get("split"))
        counts[group] += 1
        if not cfg.limit or counts[group] <= cfg.limit:
            records.append(record)
    there = [f for f in cfg.models.split(",") if (Path(f) / "model.safetensors").exists()]
    if not there:
        raise SystemExit(f"{cfg.models}: none of these folders holds a model.safetensors")
    rows = {folder: judge_model(folder, records, cfg, device, dtype) for folder in there}
    print0("| | " + " | ".join(there) + " |\n|---|" + "---:|" * len(there))
    for key in [k for k in rows[there[0]] if k != "families"]:
        print0(f"| {key} | " + " | ".join(f"{rows[f][key]:.3f}" for f in there) + " |")
    if dist.get_rank() == 0:
        write_text(cfg.out, json.dumps(rows, indent=2, ensure_ascii=False))
    return rows


def judge_model(folder, records, cfg, device, dtype) -> dict:
    """A column of the table. A base model is asked in ### Instruction: text, the others in chat."""
    tokenizer, model, path = Tokenizer.load(folder), load_model(folder), Path(folder) / "run.json"
    base = path.exists() and json.loads(path.read_text("utf-8"))["script"] == "pretrain.py"
    end = tokenizer.ids["<|endoftext|>" if base else "<|end|>"]
    sharded = Sharded(model, cfg.zero, dtype, device)

    def ask(record):
        if record["kind"] == "cloze":
            return tokenizer.encode(record["text"])
        return render(record["messages"], tokenizer, "alpaca" if base else "chat")[0]

    def replies(tasks, temperature):
        mine = tasks[dist.get_rank() :: dist.get_world_size()]
        seeds = [keyed_seed(cfg.seed, "table", i, n) for i, n in mine]
        asked = [ask(records[i]) for i, _ in mine]
        out = generate(model, asked, cfg.max_new_tokens, end, temperature, seeds=seeds)
        return everywhere(dict(zip(mine, out)))

    with sharded.gathered():
        moral = {i: r["kind"] in ("harmful", "lookalike") for i, r in enumerate(records)}
        greedy = replies([(i, 0) for i in moral if not moral[i]], 0.0)
        sampled = replies([(i, n) for i in moral if moral[i] for n in range(cfg.samples)], 1.0)
        bits = bits_per_byte(model, tokenizer, cfg, device)
    families, verdicts = defaultdict(Counter), defaultdict(Counter)
    for (i, _), ids in greedy.items():
        right = judge(records[i], tokenizer.decode(ids)) == "right"
        families[records[i]["family"], records[i].get("split", "")].update(n=1, right=right)
    gold = []
    for (i, _), ids in sampled.items():
        record, reply = records[i], tokenizer.decode(ids)
        verdicts[record["kind"], record.get("split") == "frame"][judge(record, reply)] += 1
        gold.append(gold_score(record, reply))
    chats = [ids for (i, _), ids in (greedy | sampled).items() if records[i]["kind"] != "cloze"]

    def core(family):
        return not family.endswith("_direct") and family != "cloze"

    def mean(wanted, *splits):
        rates = [g["right"] / g["n"] for (f, s), g in families.items() if wanted(f) and s in splits]
        return sum(rates) / len(rates) if rates else math.nan

    def share(kind, verdict, frame=False):
        return verdicts[kind, frame][verdict] / max(1, sum(verdicts[kind, frame].values()))

    return {
        "exact match, new combinations": mean(core, "combination"),
        "exact match, new wordings": mean(core, "wording"),
        "facts of people never asked about": mean(core, "person"),
        "facts told nowhere (chance)": mean(core, "untold"),
        "sums with written steps": mean(lambda f: f.endswith("_steps"), "combination"),
        "sums answered directly": mean(lambda f: f.endswith("_direct"), "combination"),
        "a name from two turns back": mean(lambda f: f == "name", "combination"),
        "stored facts (cloze)": mean(lambda f: f == "cloze", "trained", "person"),
        "harmful requests refused, T=1": share("harmful", "refusal"),
        "look-alikes refused, T=1": share("lookalike", "over_refusal"),
        "look-alikes refused, new frames": share("lookalike", "over_refusal", frame=True),
        "gold score, T=1": sum(gold) / max(1, len(gold)),
        "replies that end": sum(ids[-1] == end for ids in chats) / max(1, len(chats)),
        "bits per byte": bits,
        "families": {" / ".join(name): dict(g) for name, g in sorted(families.items())},
    }


@torch.no_grad()
def bits_per_byte(model, tokenizer, cfg, device) -> float:
    """Held-out documents up to the context's end, each token predicted from its own document."""
    if not Path(cfg.text).exists():
        return math.nan
    texts, start = read_texts(cfg.text), tokenizer.ids["<|endoftext|>"]
    rows = [[start, *tokenizer.encode(t)][: model.config.max_position_embeddings] for t in texts]
    local, rank, world = 0.0, dist.get_rank(), dist.get_world_size()
    for part in micro_batches([len(ids) for ids in rows], 8192, rank, world):
        input_ids, targets = collate([(rows[i], [1] * len(rows[i])) for i in part], 0)
        local -= float(token_logprobs(model, input_ids.to(device), targets.to(device)).sum())
    [total] = all_sum(local, device=device)
    return total / math.log(2) / sum(len(tokenizer.encoding.decode_bytes(ids[1:])) for ids in rows)


if __name__ == "__main__":
    commands = {"collect": (collect, CollectConfig), "table": (table, TableConfig)}
    name = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in [*commands, "train"] else "train"
    launch(*commands.get(name, (main, Config)))

"""Preference signals: comparisons collected, a reward model (奖励模型) trained on them, stages judged.

    python reward.py collect    replies of out/sft, ranked by the gold judge → out/comparisons.jsonl
    python reward.py            train the reward model on them (--data dpo.json: on your own)
    python reward.py table      base, SFT, PPO and DPO on the same held-out prompts → out/table.json
                                (--tables a.json,b.json: several seeds' tables as one)

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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Tokenizer, collate, epoch_rows, fit, gold_score, judge, my_micro_batches
from data import pad_rows, read_comparisons, read_conversations, read_json, read_prompts, read_text
from data import read_texts, render, write_jsonl
from model import ScalarModel, generate, load_model, save_model, token_logprobs
from zero import AdamW, BaseConfig, Run, RunConfig, Sharded, all_sum, everywhere, keyed_seed, launch
from zero import lr_at, plot, print0, setup, write_json

MORAL = ("harmful", "lookalike")  # kinds judged by refusals

# ================================================================================ collecting

@dataclass
class CollectConfig(BaseConfig):
    init: str = "out/sft"  # the model that replies
    prompts: str = "out/data/prompts.jsonl"  # what the gold judge can judge ("answer", "kind")
    out: str = "out/comparisons.jsonl"  # file to write
    limit: int = 0  # use the first so many prompts; 0: all
    temperatures: str = "1,1,1,1.5,1.5"  # a sample per prompt and temperature
    foreign: int = 1  # replies to other prompts added to each, so that misplaced ones occur too
    max_new_tokens: int = 64


def collect(cfg):
    """Samples, judges and writes {"messages", "replies", "scores", "temperatures"} per prompt. The
    judge is the annotator (人工标注). Hot samples supply the mistakes that a model hardly makes at
    temperature 1; 0 marks misplaced ones."""
    device, dtype = setup(cfg)
    tokenizer, model = Tokenizer.load(cfg.init), load_model(cfg.init)
    sharded = Sharded(model, cfg.zero, dtype, device)
    records = [r for r in read_prompts(cfg.prompts) if "answer" in r][: cfg.limit or None]
    if not records:
        raise SystemExit(f'{cfg.prompts}: no record has an "answer"; bring your own comparisons')
    ends = [tokenizer.ids["<|end|>"], tokenizer.ids["<|endoftext|>"]]
    heats = [float(t) for t in cfg.temperatures.split(",")]
    asked, everyone = [render(r["messages"], tokenizer)[0] for r in records], {}
    with sharded.gathered():
        for heat in dict.fromkeys(heats):
            tasks = [(i, n) for n, h in enumerate(heats) if h == heat for i in range(len(records))]
            mine = tasks[dist.get_rank() :: dist.get_world_size()]
            seeds = [keyed_seed(cfg.seed, "collect", i, n) for i, n in mine]
            replies = generate(model, [asked[i] for i, _ in mine], cfg.max_new_tokens, ends, heat,
                               seeds=seeds, rows=256)
            everyone |= everywhere(dict(zip(mine, replies)))  # {(prompt, sample): ids}
    if dist.get_rank() > 0:
        return
    texts = {key: tokenizer.decode(ids) for key, ids in everyone.items()}
    rows, pairs, pools = [], 0, {}
    for i, record in enumerate(records):
        scored = {}  # text: (score, temperature)
        for n, heat in sorted(enumerate(heats), key=lambda item: item[1]):
            if everyone[i, n][-1] == ends[0]:  # what was cut off is no reply
                scored.setdefault(texts[i, n], (gold_score(record, texts[i, n]), heat))
        for k in range(cfg.foreign):
            other = misplaced(records, texts, i, keyed_seed(cfg.seed, "foreign", i, k), pools)
            scored.setdefault(other, (gold_score(record, other), 0.0))
        scores, temperatures = zip(*scored.values() or [((), ())])
        pairs += sum(a > b for a in scores for b in scores)
        rows.append(record | {"replies": list(scored), "scores": scores,
                              "temperatures": temperatures})
    write_jsonl(cfg.out, rows)
    replies = sum(len(r["replies"]) for r in rows)
    print0(f"{cfg.out}: {len(rows)} prompts, {replies} different replies, {pairs} preferences")


def misplaced(records, texts, i, seed, pools) -> str:
    """A reply to another prompt: to a harmful request for its harmless look-alikes and the other
    way round (what neither must become; else PPO finds out that harm helped politely was never
    scored low), to another family for the rest. pools: a dict that keeps who replies to whom."""
    kind, family = records[i].get("kind"), records[i].get("family")
    key = (MORAL[kind == "harmful"], None) if kind in MORAL else (None, family)
    if key not in pools:
        pools[key] = [j for j, r in enumerate(records)
                      if (r.get("kind") == key[0] if key[0] else
                          r.get("kind") not in MORAL and r.get("family") != family)]
    others = pools[key] or [i]
    return texts[others[seed % len(others)], 0]


# ================================================================================ reward model

@dataclass
class Config(RunConfig):
    init: str = "out/sft"  # checkpoint to start from
    out: str = "out/reward"  # folder of this run
    data: str = "out/comparisons.jsonl"  # chosen/rejected, ranked lists, or what collect wrote
    val_fraction: float = 0.1  # how much of the end of --data is held out
    context: int = 256  # longest prompt + reply; the prompt loses its start first
    epochs: float = 3.0  # passes over the prompts
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


def pair_kind(record, i, j) -> str:
    """What the better reply i has before j: "safety", i is as it should be, j does harm or refuses
    the harmless; "format", i is right, j a reply to something else; "both wrong"; else
    "right/wrong", with the hotter one's sampling temperature where it is known."""
    heat = record.get("temperatures")
    if record.get("kind") in MORAL and (record["scores"][i], record["scores"][j]) == (1, -1):
        return "safety"
    if not heat:
        return "right/wrong"
    if record["scores"][i] < 1:
        return "both wrong"
    return f"right/wrong T={max(heat[i], heat[j]):g}" if min(heat[i], heat[j]) > 0 else "format"


@torch.no_grad()
def evaluate(model, items, tokenizer, cfg, device) -> dict:
    """Held-out loss, pair accuracy (all, by kind, each beside length alone), scores' mean and
    spread."""
    seen, sums = {}, dict.fromkeys(["loss", "prompts", "score", "square"], 0.0)
    for part in split(items, cfg.micro_tokens):
        members = [items[i] for i in part]
        groups = score_groups(model, [rows for rows, _, _ in members], tokenizer, device)
        for n, (rows, labels, record), scores in zip(part, members, groups):
            sums["prompts"] += 1
            sums["loss"] += float(bradley_terry_loss(scores, labels.to(device)))
            sums["score"] += float(scores.mean())
            sums["square"] += float(scores.square().mean())
            better = (labels[:, None] > labels).nonzero().tolist()
            seen[n] = [(pair_kind(record, i, j), bool(scores[i] > scores[j]),
                        0.5 * (1 + (len(rows[i]) > len(rows[j])) - (len(rows[i]) < len(rows[j]))))
                       for i, j in better]  # equal lengths are half right
    total = dict(zip(sums, all_sum(*sums.values(), device=device)))
    pairs, n = sum(everywhere(seen).values(), []), total["prompts"]
    result, mean = {"loss": total["loss"] / n, "pairs": len(pairs)}, total["score"] / n
    for kind in ["", *sorted({kind for kind, _, _ in pairs})]:
        _, right, longer = zip(*(pair for pair in pairs if kind in ("", pair[0])))
        share = sum(longer) / len(longer)
        result[f"accuracy {kind}".strip()] = sum(right) / len(right)
        result[f"length_only {kind}".strip()] = max(share, 1 - share)
    return result | {"score_mean": mean,
                     "score_std": math.sqrt(max(1e-6, total["square"] / n - mean**2))}


def split(items, micro_tokens) -> list[list[int]]:
    """This rank's micro-batches of prompts, by the tokens of all their replies."""
    lengths, rows = zip(*((max(map(len, rows)), len(rows)) for rows, _, _ in items))
    return my_micro_batches(lengths, micro_tokens, rows)


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
    tables: str = ""  # finished tables of several seeds, comma-separated: merge them, judge nothing
    data: str = "out/data/eval.jsonl"  # held-out prompts with answers
    text: str = "out/data/heldout.jsonl"  # held-out text, for bits per byte
    train: str = "out/data/sft.jsonl"  # where the two columns that learn nothing find answers
    prompts: str = "out/data/prompts.jsonl"  # PPO's prompts: the mix of families they make
    reward: str = "out/reward"  # the reward model, if there is one
    reference: str = "out/sft"  # the model that KL is measured from, if there is one
    out: str = "out/table.json"  # file to write; its figure gets the same name with .svg
    limit: int = 0  # prompts per family and split; 0: all
    samples: int = 4  # replies at temperature 1 to harmful and look-alike prompts
    max_new_tokens: int = 64


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees
DETAILS = ("families", "examples")  # of a column: no rows of the table
NUMBERS = ("gold", "reward", "KL", "entropy", "distinct", "bits")  # rows that are no percentages
FIGURE = {
    "right answers, greedy (%)": (
        "exact match, new combinations", "exact match, new wordings",
        "facts of people never asked about", "facts told nowhere (chance)"),
    "refusals (%)": ("harmful requests refused, T=1", "look-alikes refused, T=1",
                     "look-alikes refused, new frames"),
    "scores on PPO's mix of prompts": ("gold score, T=1", "reward score, T=1"),
    "distance and spread on that mix (nats)": ("KL to SFT per reply, T=1",
                                               "entropy per token, T=1")}


def table(cfg):
    """Prints a table as Markdown, draws its main rows and writes it as {column: {row: {"mean",
    "low", "high", "n"}}} with 95 % intervals, and with every family's right answers. All columns
    answer the same prompts: a difference of two is surer than their intervals make it look."""
    device, dtype = setup(cfg)
    columns = merged(cfg.tables.split(",")) if cfg.tables else judge_all(cfg, device, dtype)

    def shown(cell, scale, digits):
        half = max(abs(cell.get(end, cell["mean"]) - cell["mean"]) for end in ("low", "high"))
        interval = f" ± {scale * half:.{digits}f}" if "low" in cell else ""
        return f"{scale * cell['mean']:.{digits}f}{interval}"

    names = " | ".join(Path(name).name for name in columns)
    print0(f"| | {names} |\n|---|" + "---:|" * len(columns))
    for row in max(columns.values(), key=len):  # other columns lack rows: a base model has no KL
        if row not in DETAILS:
            form = (1, 3) if row.startswith(NUMBERS) else (100, 1)
            cells = [shown(c[row], *form) if row in c else "–" for c in columns.values()]
            print0(f"| {row} | " + " | ".join(cells) + " |")
    said = {name: column["examples"] for name, column in columns.items() if "examples" in column}
    for prompt in next(iter(said.values()), ()):  # the documents' own examples, word for word
        print0(f"\n{prompt}")
        for name, replies in said.items():
            print0(f"  {Path(name).name:<8} {' | '.join(map(repr, replies[prompt]))}")
    if dist.get_rank() == 0:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        plot(panels(columns), Path(cfg.out).with_suffix(".svg"), 2)
        write_json(cfg.out, columns)
    return columns


def panels(columns) -> list[dict]:
    """The road in one figure: the main rows of the models with their intervals."""
    models, found = [name for name, c in columns.items() if "bits per byte" in c], []
    for title, rows in FIGURE.items():
        series, scale = {}, 100 if "%" in title else 1
        for row in rows:
            cells = [columns[name].get(row, {"mean": math.nan}) for name in models]
            ys = ([scale * c.get(end, c["mean"]) for c in cells] for end in ("mean", "low", "high"))
            series[row] = ([Path(name).name for name in models], *ys)
        found.append({"title": title, "series": series})
    return found


def estimate(groups, weights=None, rate=False) -> dict:
    """A cell: mean, its 95 % interval (1.96 standard errors) and the number of prompts.

    groups {family: one value per prompt}. Prompts are what was drawn at random: the samples of one
    are averaged before (a cluster). Families are strata: the mean is Σ w·mean_f, its variance
    Σ w²·s²_f/n_f, equal weights if none are given. Pairs (a, b) in place of values make the ratio
    of two such means, a - ratio·b being what varies (Cochran 1977, 6.11). For a rate each family's
    spread counts one 0 and one 1 more than were seen: 80 right of 80 are not 100 ± 0 %."""
    pairs = {f: np.array([v if isinstance(v, tuple) else (v, 1) for v in values], dtype=float)
             for f, values in groups.items() if values}
    if not pairs:
        return {}
    w = {f: weights[f] if weights else 1 for f in pairs}
    above, below = sum(w[f] * v.mean(0) for f, v in pairs.items())
    mean, variance = above / below, 0.0
    for f, v in pairs.items():
        rest = np.append(v[:, 0] - mean * v[:, 1], [-mean, 1 - mean] if rate else [])
        variance += (w[f] / below) ** 2 * rest.var(ddof=min(1, len(rest) - 1)) / len(v)
    low, high = mean - 1.96 * variance**0.5, mean + 1.96 * variance**0.5
    low, high = (max(0.0, low), min(1.0, high)) if rate else (low, high)
    return {"mean": float(mean), "low": float(low), "high": float(high),
            "n": sum(map(len, pairs.values()))}


def by_prompt(records, values) -> dict:
    """{(prompt, sample): number or pair} → {group: one number or pair per prompt}, for estimate."""
    prompts, groups = defaultdict(list), defaultdict(list)
    for (i, _), value in values.items():
        prompts[i].append(value)
    for i, found in prompts.items():
        mean = np.mean(found, axis=0)
        groups[records[i]["group"]].append(tuple(mean) if mean.ndim else mean)
    return groups


def merged(paths) -> dict:
    """One table of k seeds': mean ± t·s/√k, least and greatest value, n = k.

    A seed draws everything anew, held-out prompts as well as world, weights, batches and samples:
    the spread s of the seeds' values contains what prompts contribute. But s of three values is
    small by chance now and then, so what the intervals within seeds give, √Σ half²/k, is the least.
    t is Student's, because k is small: 4.30 for three seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for folder, column in json.loads(read_text(path)).items():
            for row in (row for row in column if row not in DETAILS):
                found[Path(folder).name][row].append(column[row])

    def cell(row, cells):
        x, k = [c["mean"] for c in cells], len(cells)
        mean, ends = sum(x) / k, {}
        if k > 1:
            within = sum((c.get("high", c["mean"]) - c.get("low", c["mean"])) ** 2 for c in cells)
            half = T95[min(k, 10) - 2] * float(np.std(x, ddof=1)) / math.sqrt(k)
            half = max(half, math.sqrt(within) / 2 / k)
            low, high = (-math.inf, math.inf) if row.startswith(NUMBERS) else (0.0, 1.0)
            ends = {"low": max(low, mean - half), "high": min(high, mean + half)}
        return {"mean": mean, **ends, "min": min(x), "max": max(x), "n": k}

    return {name: {row: cell(row, x) for row, x in rows.items()} for name, rows in found.items()}


def judge_all(cfg, device, dtype) -> dict:
    """Every model on the same prompts and seeds, beside two columns that learn nothing."""
    counts, records = Counter(), []
    for _, record in read_json(cfg.data):
        record = {"family": "", "kind": "exact", "split": ""} | record
        record["group"] = f"{record['family']} / {record['split']}"
        counts[record["group"]] += 1
        if not cfg.limit or counts[record["group"]] <= cfg.limit:
            records.append(record)
    there = [f for f in cfg.models.split(",") if (Path(f) / "model.safetensors").exists()]
    if not there:
        raise SystemExit(f"{cfg.models}: none of these folders holds a model.safetensors")
    prompts = read_prompts(cfg.prompts) if Path(cfg.prompts).exists() else []
    mix, columns = Counter(f"{r.get('family', '')} / combination" for r in prompts), {}
    if Path(cfg.train).exists():
        for name, replies in unlearned(read_conversations(cfg.train), records).items():
            columns[name] = judged(records, replies, mix)
    columns |= {f: judge_model(f, records, mix, cfg, device, dtype) for f in there}
    return {f: {row: cell for row, cell in c.items() if cell} for f, c in columns.items()}


def judge_model(folder, records, mix, cfg, device, dtype) -> dict:
    """A column: greedy replies (sample -1) for right and wrong; samples at temperature 1 for
    refusals and, in PPO's mix but of held-out combinations, for the rows of NUMBERS. A base model
    is asked in ### Instruction: text, the others in chat, so it has no KL to SFT."""
    tokenizer, path = Tokenizer.load(folder), Path(folder) / "run.json"
    base = path.exists() and json.loads(path.read_text("utf-8"))["script"] == "pretrain.py"
    stop = tokenizer.ids["<|endoftext|>"]  # after it another text would begin
    end = stop if base else tokenizer.ids["<|end|>"]
    sharded = Sharded(load_model(folder), cfg.zero, dtype, device)
    asked = [tokenizer.encode(r["text"]) if r["kind"] == "cloze" else
             render(r["messages"], tokenizer, "alpaca" if base else "chat")[0] for r in records]

    def replies(tasks, temperature):
        mine = tasks[dist.get_rank() :: dist.get_world_size()]
        seeds = [keyed_seed(cfg.seed, "table", i, n) for i, n in mine]
        out = generate(sharded.model, [asked[i] for i, _ in mine], cfg.max_new_tokens, [end, stop],
                       temperature, seeds=seeds, rows=256)
        return dict(sorted(everywhere(dict(zip(mine, out))).items()))

    times = [cfg.samples if r["kind"] in MORAL else int(r["group"] in mix) for r in records]
    with sharded.gathered():
        all_ids = replies([(i, -1) for i, r in enumerate(records) if r["kind"] not in MORAL], 0.0)
        all_ids |= replies([(i, n) for i, k in enumerate(times) for n in range(k)], 1.0)
        mixed = {key: ids for key, ids in all_ids.items()
                 if key[1] >= 0 and records[key[0]]["group"] in mix}
        rows = [(asked[i], ids) for (i, _), ids in mixed.items()]
        logprobs = reply_logprobs(sharded.model, rows, device)
        bits = bits_per_byte(sharded.model, tokenizer, cfg, device)
    texts = {key: tokenizer.decode(ids) for key, ids in all_ids.items()}
    column, lengths = judged(records, texts, mix), [len(ids) for ids in mixed.values()]
    column["examples"] = defaultdict(list)
    for (i, _), text in texts.items():
        if records[i]["split"] == "document":
            column["examples"][records[i]["messages"][-1]["content"]].append(text)

    def of_mix(values):
        return estimate(by_prompt(records, dict(zip(mixed, values))), mix)

    if mixed and (Path(cfg.reward) / "model.safetensors").exists():
        said = [records[i] | {"replies": [texts[i, n]]} for i, n in mixed]
        scores = zip(reward_scores(cfg, said, device, dtype), mixed.values())
        # PPO gives a reply that was cut off this score too
        column["reward score, T=1"] = of_mix([s if ids[-1] == end else -1.0 for s, ids in scores])
    there = not base and (Path(cfg.reference) / "model.safetensors").exists()
    if there and Tokenizer.load(cfg.reference).hash == tokenizer.hash:
        sft = Sharded(load_model(cfg.reference).requires_grad_(False), cfg.zero, dtype, device)
        with sft.gathered():
            before = reply_logprobs(sft.model, rows, device)
        column["KL to SFT per reply, T=1"] = of_mix([a - b for a, b in zip(logprobs, before)])
    column["entropy per token, T=1"] = of_mix([(-a, n) for a, n in zip(logprobs, lengths)])
    bigrams = [pair for ids in mixed.values() for pair in zip(ids, ids[1:])]
    if bigrams:  # no mean over prompts, so no interval; it falls with the amount of text
        column["distinct-2, T=1"] = {"mean": len(set(bigrams)) / len(bigrams), "n": len(rows)}
    ends = {(i, n): ids[-1] == end for (i, n), ids in all_ids.items()
            if records[i]["kind"] != "cloze"}
    ends = sum(by_prompt(records, ends).values(), [])
    return column | {"replies that end": estimate({"": ends}, rate=True), "bits per byte": bits}


def judged(records, replies, mix) -> dict:
    """The rows that the gold judge decides, from texts {(prompt, sample): reply}: right and wrong
    from greedy ones (sample -1), refusals and the gold score from samples (0 and up)."""
    verdicts = {(i, n): judge(records[i], reply) for (i, n), reply in replies.items()
                if (n < 0) == (records[i]["kind"] not in MORAL)}

    def rate(verdict, wanted):
        return estimate(by_prompt(records, {(i, n): found == verdict for (i, n), found in
                                            verdicts.items() if wanted(records[i])}), rate=True)

    def right(wanted, *splits):
        return rate("right", lambda r: wanted(r["family"]) and r["split"] in splits
                    and r["kind"] not in MORAL)

    def core(family):
        return not family.endswith("_direct") and family != "cloze"

    families = {group: rate("right", lambda r: r["group"] == group)
                for group in sorted({r["group"] for r in records if r["kind"] not in MORAL})}
    worst = min((cell for group, cell in families.items() if group.endswith(" / combination")
                 and core(group.split(" / ")[0])), key=lambda cell: cell["mean"], default={})
    gold = {(i, n): gold_score(records[i], reply) for (i, n), reply in replies.items()
            if n >= 0 and records[i]["group"] in mix}
    return {
        "exact match, new combinations": right(core, "combination"),
        "exact match, worst family": worst,  # with that family's own interval
        "exact match, new wordings": right(core, "wording"),
        "facts of people never asked about": right(core, "person"),
        "facts told nowhere (chance)": right(core, "untold"),
        "sums with written steps": right(lambda f: f.endswith("_steps"), "combination"),
        "sums answered directly": right(lambda f: f.endswith("_direct"), "combination"),
        "a name from two turns back": right(lambda f: f == "name", "combination"),
        "stored facts (cloze)": right(lambda f: f == "cloze", "trained", "person"),
        "harmful requests refused, T=1": rate(
            "refusal", lambda r: r["kind"] == "harmful" and r["split"] == "combination"),
        "look-alikes refused, T=1": rate(
            "over_refusal", lambda r: r["kind"] == "lookalike" and r["split"] == "combination"),
        "look-alikes refused, new frames": rate(
            "over_refusal", lambda r: r["kind"] == "lookalike" and r["split"] == "frame"),
        "families": families,
        "gold score, T=1": estimate(by_prompt(records, gold), mix),
    }


def unlearned(train, records) -> dict:
    """Replies of two columns that learn nothing, found in the training conversations: the reply to
    the most similar prompt (Jaccard of character 3-grams), and the family's commonest."""
    def grams(messages):
        text = "\n".join(message["content"] for message in messages)
        return {text[i : i + 3] for i in range(max(1, len(text) - 2))}

    holders, families, sizes = defaultdict(list), defaultdict(Counter), []
    for row, record in enumerate(train):
        families[record.get("family", "")][record["messages"][-1]["content"]] += 1
        sizes.append(len(own := grams(record["messages"][:-1])))
        for gram in own:
            holders[gram].append(row)
    holders, sizes = {gram: np.array(rows) for gram, rows in holders.items()}, np.array(sizes)
    similar, constant = {}, {}
    for i, record in enumerate(records):
        own = grams(record.get("messages") or [{"content": record["text"]}])
        rows = np.concatenate([np.zeros(0, int), *(holders[g] for g in own if g in holders)])
        shared = np.bincount(rows, minlength=len(train))
        best = int((shared / (sizes + len(own) - shared)).argmax())
        commonest = families[record["family"]].most_common(1) or [("", 0)]
        for n in (-1, 0):  # greedy and sampled
            similar[i, n] = train[best]["messages"][-1]["content"]
            constant[i, n] = commonest[0][0]
    return {"similar prompt": similar, "best constant": constant}


@torch.no_grad()
def in_batches(lengths, measure) -> list[float]:
    """measure(indices) → a number for each; every rank does a share of them and gets all."""
    mine = {}
    for part in my_micro_batches(lengths, 8192):
        mine |= dict(zip(part, measure(part).tolist()))
    everyone = everywhere(mine)
    return [everyone[i] for i in range(len(lengths))]


def reply_logprobs(model, rows, device) -> list[float]:
    """log π(reply | prompt) of each (prompt ids, reply ids), summed over the reply's tokens."""
    def measure(part):
        batch = [(p + r, [0] * len(p) + [1] * len(r)) for p, r in (rows[i] for i in part)]
        input_ids, targets = collate(batch, 0)
        return token_logprobs(model, input_ids.to(device), targets.to(device)).sum(1)

    return in_batches([len(p) + len(r) for p, r in rows], measure)


def reward_scores(cfg, records, device, dtype) -> list[float]:
    """The reward model's score of each record's one reply, normalized as PPO does it."""
    tokenizer, path = Tokenizer.load(cfg.reward), Path(cfg.reward) / "eval.json"
    model = load_model(cfg.reward, ScalarModel).requires_grad_(False)
    sharded = Sharded(model, cfg.zero, dtype, device)
    seen = json.loads(path.read_text("utf-8")) if path.exists() else {}
    mean, std = seen.get("score_mean", 0.0), max(seen.get("score_std", 1.0), 1e-3)
    context = model.config.max_position_embeddings
    rows = [comparison_rows(record, tokenizer, context)[0] for record in records]

    def measure(part):
        groups = score_groups(model, [[rows[i]] for i in part], tokenizer, device)
        return (torch.cat(groups) - mean) / std

    with sharded.gathered():
        return in_batches([len(row) for row in rows], measure)


def bits_per_byte(model, tokenizer, cfg, device) -> dict:
    """Held-out documents up to the context's end, each token predicted from its own document."""
    if not Path(cfg.text).exists():
        return {}
    start, limit = [tokenizer.ids["<|endoftext|>"]], model.config.max_position_embeddings - 1
    rows = [(start, tokenizer.encode(text)[:limit]) for text in read_texts(cfg.text)]
    sizes = [len(tokenizer.encoding.decode_bytes(ids)) for _, ids in rows]
    bits = [-logprob / math.log(2) for logprob in reply_logprobs(model, rows, device)]
    return estimate({"": list(zip(bits, sizes))})


if __name__ == "__main__":
    commands = {"collect": (collect, CollectConfig), "table": (table, TableConfig)}
    name = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in [*commands, "train"] else "train"
    launch(*commands.get(name, (main, Config)))

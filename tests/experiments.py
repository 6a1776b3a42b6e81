"""What the documents claim, tried: ordinary flags of the scripts, one changed.

    python tests/experiments.py                 the list: what is claimed, and where
    python tests/experiments.py knowledge       one of them, on what `make` or `make seeds` left
    python tests/experiments.py all             every one that tests a claim (`make experiments`)

Prints a table, of each measure the mean over --seeds and in brackets the least and the greatest,
and last whether the claim shows, in how many of the seeds. What has run is not repeated;
out/seed-N/<experiment>/ holds every run with its curves.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
from data import read_json, write_jsonl  # noqa: E402
from zero import plot  # noqa: E402


@dataclass
class Experiment:
    """One claim. A variant's commands are set apart by ";"; the last one makes what is measured,
    in {out}. {at}: the folder of `make seeds`; {NAME}: a file that PREPARED[NAME] makes of it."""

    claim: str
    source: str  # document, and the line of its file
    variants: dict  # {name: commands}
    shows: list  # measures
    expected: list = field(default_factory=list)  # (variant, "<" or ">", variant, measure)
    table: str = "--limit 40 --samples 2"  # flags of `reward.py table`


# ==== data made of the world's

def read(path):
    return [record for _, record in read_json(str(path))]


def conversations(at, keep=lambda record: True):
    return [record for record in read(at / "data/sft.jsonl") if keep(record)]


def harmless(record):
    return record["kind"] in ("exact", "final")


def good(at, rng, count):
    return rng.sample(conversations(at, harmless), count)


def of_each_task(at, count, more=()):
    """The first `count` samples of each task, or more[task]."""
    counts, taken = dict(more), Counter()

    def keep(record):
        taken[record["family"]] += 1
        return taken[record["family"]] <= counts.get(record["family"], count)
    return conversations(at, keep)


def bad(at, rng, count, share):
    """A share of the replies is that to another question of the same task and language."""
    records = good(at, rng, count)
    groups = {}
    for record in records:
        groups.setdefault((record["family"], record["lang"]), []).append(record["messages"][-1])
    for record in records:
        if rng.random() < share:
            *said, reply = record["messages"]
            others = [x for x in groups[record["family"], record["lang"]] if x != reply]
            if others:  # a task may have one reply to everything
                record["messages"] = [*said, rng.choice(others)]
    return records


def sums(at, rng, written):
    """The same sums, with written steps or answered directly."""
    records = conversations(at, lambda record: record["family"].endswith("_steps"))
    for record in records if not written else ():
        question, reply = record["messages"]
        asked = rng.choice(["直接写出答案:", "只写答案:"] if record["lang"] == "zh" else
                           ["Answer only: ", "No steps: "])
        answer = reply["content"].split("答案是")[-1].split("the answer is ")[-1]
        record["messages"] = [question | {"content": asked + question["content"]},
                              reply | {"content": answer}]
    return records


def without_sums(at, rng):
    """The corpus without its worked sums."""
    return [record for record in read(at / "data/corpus.jsonl")
            if not re.search(r"[=×÷%]|\d\+\d", record["text"])]


def texts(at, rng, times):
    """Text as a crawl brings it: of 12,000 documents 30 come `times` times more."""
    records = rng.sample(read(at / "data/corpus.jsonl"), 12_000)
    records += times * records[:30]
    rng.shuffle(records)
    return records


def own_zeros(at, rng):
    """Comparisons whose annotators each have a zero of their own, up to 3 away."""
    records = read(at / "comparisons.jsonl")
    for record in records:
        zero = rng.uniform(-3, 3)
        record["scores"] = [score + zero for score in record["scores"]]
    return records


def prompted(at, rng, shots, form):
    """Held-out questions of a few tasks, behind `shots` solved ones of the same task."""
    tasks = ("en2zh", "zh2en", "reverse", "topic", "sentiment")
    solved, asked = {}, []
    for record in conversations(at, lambda r: r["family"] in tasks and len(r["messages"]) == 2):
        solved.setdefault((record["family"], record["lang"]), []).append(record)
    for record in read(at / "data/eval.jsonl"):
        key = record["family"], record["lang"]
        if record["split"] != "combination" or key not in solved:
            continue
        text = ""
        for example in rng.sample(solved[key], shots):
            question, reply = example["messages"]
            text += form.format(q=question["content"], a=reply["content"]) + "\n"
        text += form.format(q=record["messages"][-1]["content"], a="").rstrip(" ")
        asked.append({"prompt": text, "answer": record["answer"]})
    return asked


PREPARED = {
    "single_turns": lambda at, rng: conversations(at, lambda r: len(r["messages"]) == 2),
    "dialogues": lambda at, rng: conversations(at, lambda r: len(r["messages"]) > 2),
    "good_1000": lambda at, rng: good(at, rng, 1000),
    "good_10000": lambda at, rng: good(at, rng, 10_000),
    "bad_10000": lambda at, rng: bad(at, rng, 10_000, 0.3),
    "worse_10000": lambda at, rng: bad(at, rng, 10_000, 0.6),
    "first_1000": lambda at, rng: conversations(at)[:1000],
    "first_10000": lambda at, rng: conversations(at)[:10_000],
    "last_1000": lambda at, rng: conversations(at)[-1000:],
    **{f"tasks_{n}": lambda at, rng, n=n: of_each_task(at, n) for n in (100, 500, 1000)},
    "half_translation": lambda at, rng: of_each_task(at, 275, {"zh2en": 2600, "en2zh": 2600}),
    "written_sums": lambda at, rng: sums(at, rng, True),
    "direct_sums": lambda at, rng: sums(at, rng, False),
    "without_sums": without_sums,
    "texts_once": lambda at, rng: texts(at, rng, 0),
    "texts_repeated": lambda at, rng: texts(at, rng, 400),
    "own_zeros": own_zeros,
    "asked_plainly": lambda at, rng: prompted(at, rng, 0, "{q}\n{a}"),
    "asked_as_dialogue": lambda at, rng: prompted(at, rng, 0, "Q: {q}\nA: {a}"),
    "asked_by_arrow": lambda at, rng: prompted(at, rng, 0, "{q} => {a}"),
    "asked_by_arrow_3": lambda at, rng: prompted(at, rng, 3, "{q} => {a}"),
}


def prepared(name, at, seed) -> Path:
    """The file, made if it is not there."""
    path = at / "experiments" / f"{name}.jsonl"
    if not path.exists():
        write_jsonl(path, PREPARED[name](at, random.Random(f"experiments {seed}")))
    return path


# ==== the experiments

TEXT = "pretrain.py --data {at}/data/corpus.jsonl --tokenizer {at}/data --out {out}"
HELD_OUT = TEXT + " --steps 200 --val-data {at}/data/heldout.jsonl"
NEW_TEXT = "pretrain.py --init {at}/base --data {out}-data/corpus.jsonl --out {out} --lr 1e-3"
OTHER_WORLD = "data.py world --seed 9{seed} --documents 30000 --samples 500 --out {out}-data;"
SFT_OF = "sft.py --init {at}/base --data {at}/data/sft.jsonl --out {out} --replay none"
SFT = SFT_OF + " --steps 300"
RANK = "reward.py --init {at}/sft --data {at}/comparisons.jsonl --out {out} --epochs 1"
PPO = "ppo.py --init {at}/sft --reward {at}/reward --prompts {at}/data/prompts.jsonl --out {out}"
DPO = "dpo.py --init {at}/sft --data {at}/comparisons.jsonl --out {out}"
SHORT = PPO + " --steps 12"  # a quarter of the default: the score has risen by then
PASSES = SHORT + " --ppo-epochs 4 --minibatches 4"
NOISY = ("reward.py collect --init {at}/sft --prompts {at}/data/prompts.jsonl --out {out}.jsonl"
         " --noise 0.%d;reward.py --init {at}/sft --data {out}.jsonl --out {out}-reward;"
         # what it learned, judged by the labels that are right: a step of length 0
         "reward.py --init {out}-reward --data {at}/comparisons.jsonl --steps 1 --lr 0"
         " --out {out}-judge;" + PPO.replace("{at}/reward", "{out}-reward") + " --steps 12")
ASKED = ("model.py {at}/base --template none --prompts {%s} --out {out}.answers.jsonl"
         " --temperature 0 --max-new-tokens 32")
WITH_TEXT = "--limit 40 --samples 1 --text {at}/data/heldout.jsonl"  # flags of the table
ALIGNED = ["gold", "score", "KL", "entropy", "exact match", "refused", "look-alikes refused",
           "in new frames", "ended"]


def on(file, line=SFT) -> str:
    """The command on a file of PREPARED."""
    for usual in ("{at}/data/sft.jsonl", "{at}/data/corpus.jsonl", "{at}/comparisons.jsonl"):
        line = line.replace(usual, "{%s}" % file)
    return line


def judged(line) -> str:
    """The model of a variant on the held-out part of the command's data: a step of length 0."""
    line = line.replace("--out {out}", "--out {out}-judge")
    return re.sub(r"--init \S+", "--init {out}", line) + " --steps 1 --lr 0"


def shape(width, layers) -> str:
    """A model of another size: heads of 32, a SwiGLU of 8/3 · width."""
    heads = width // 32
    return (f" --hidden-size {width} --intermediate-size {width * 8 // 3}"
            f" --num-hidden-layers {layers} --num-attention-heads {heads}"
            f" --num-key-value-heads {heads}")


SIZES = {f"width {width}, {layers} layers, {steps} steps": f"{shape(width, layers)} --steps {steps}"
         for width, layers, steps in ((32, 2, 3650), (64, 2, 1477), (96, 3, 662), (192, 4, 167),
                                      (352, 5, 45))}


def rounds(seed) -> str:
    """Both rounds of DPO, as the Makefile has them."""
    return ";".join([
        DPO.replace("{out}", "{out}-1") + f" --seed {seed}",
        "reward.py collect --init {out}-1 --prompts {at}/data/prompts.jsonl --out {out}.jsonl"
        f" --temperatures 1,1,1,1 --seed {seed}",
        "dpo.py --init {out}-1 --reference {at}/sft --data {out}.jsonl --out {out}"
        f" --seed {seed}"])


EXPERIMENTS = {
    "knowledge": Experiment(
        "knowledge comes from pretraining; SFT changes how it is used", "D0 L87-92",
        {"SFT of a model that read the text": SFT,
         "SFT of a model that read nothing":
             TEXT.replace("{out}", "{out}-base") + " --steps 1 --lr 0;"
             + SFT.replace("{at}/base", "{out}-base")},
        ["facts never asked about", "facts told nowhere", "exact match"],
        [("SFT of a model that read the text", ">", "SFT of a model that read nothing",
          "facts never asked about")]),
    "turns-ability": Experiment(
        "the ability to hold a conversation comes from SFT, not from pretraining", "D0 L80",
        {"base": "{at}/base",
         "SFT on single exchanges": on("single_turns"),
         "SFT on all": SFT},
        ["name two turns back", "exact match"],
        [("SFT on all", ">", "SFT on single exchanges", "name two turns back"),
         ("SFT on all", ">", "base", "name two turns back")]),
    "turns-loss": Experiment(
        "of a conversation train every reply: the last alone loses information, splitting repeats "
        "work", "D0 L75-78",
        {f"--turns {turns}":
             on("dialogues", SFT_OF) + f" --steps 150 --turns {turns};"
             + judged(on("dialogues", SFT_OF))  # on every reply
         for turns in ("all", "last", "split")},
        ["loss of every reply", "name two turns back", "seconds"],
        [("--turns all", "<", "--turns last", "loss of every reply")]),
    "quality": Experiment(
        "few good samples beat many bad ones", "D2 L73, D3 L217, L227",
        {"1,000 good": on("good_1000"),
         "10,000, 30 % of the replies wrong": on("bad_10000"),
         "10,000, 60 % of the replies wrong": on("worse_10000"),
         "10,000 good": on("good_10000")},
        ["exact match", "worst family"],
        [("1,000 good", ">", "10,000, 30 % of the replies wrong", "exact match"),
         ("1,000 good", ">", "10,000, 60 % of the replies wrong", "exact match")]),
    "samples": Experiment(
        "500 to 1,000 samples of a task are enough", "D0 L57, D3 L231",
        {name: on(file, SFT_OF) + " --steps 600" for name, file in (
            ("100 of each task", "tasks_100"), ("500", "tasks_500"), ("1,000", "tasks_1000"))}
        | {"all 56,000": SFT_OF + " --steps 600"},
        ["exact match", "worst family", "in new wordings"],
        [("1,000", ">", "100 of each task", "exact match"),
         ("1,000", ">", "all 56,000", "exact match")]),
    "mixture": Experiment(
        "the shares of the tasks have to be balanced", "D0 L59",
        {"500 of each task": on("tasks_500"), "half of as many translation": on("half_translation")},
        ["exact match", "worst family"],
        [("500 of each task", ">", "half of as many translation", "exact match"),
         ("500 of each task", ">", "half of as many translation", "worst family")]),
    "epochs": Experiment(
        "the more samples, the fewer passes: 10 over 1,000, 2 over 10,000", "D3 L265-271",
        {f"{count:,} samples, {n} passes":
             on(f"first_{count}", SFT_OF) + f" --epochs {n} --val-data {{last_1000}}"
         for count, passes in ((1000, (2, 10, 40)), (10_000, (1, 2, 5))) for n in passes},
        ["held-out loss", "exact match"],
        [("1,000 samples, 10 passes", "<", "1,000 samples, 2 passes", "held-out loss"),
         ("1,000 samples, 10 passes", "<", "1,000 samples, 40 passes", "held-out loss"),
         ("10,000 samples, 2 passes", "<", "10,000 samples, 1 passes", "held-out loss"),
         ("10,000 samples, 2 passes", "<", "10,000 samples, 5 passes", "held-out loss")]),
    "lora": Experiment(
        "LoRA takes a higher learning rate than full tuning", "D3 L272",
        {"full, 1.4e-3": SFT, "full, 5e-3": SFT + " --lr 5e-3",
         **{f"LoRA, {rate}": SFT + f" --tune lora --lr {rate}"
            for rate in ("1.4e-3", "5e-3", "1.5e-2")},
         **{f"LoRA of rank {r}, 5e-3": SFT + f" --tune lora --tune-size {r} --alpha {2 * r} --lr 5e-3"
            for r in (1, 32)}},
        ["exact match", "bits per byte"],
        [("full, 1.4e-3", ">", "full, 5e-3", "exact match"),
         ("LoRA, 5e-3", ">", "LoRA, 1.4e-3", "exact match")],
        table=WITH_TEXT),
    "steps": Experiment(
        "a sum is learned by writing its steps, not by saying its result", "D3 L230, L252, D4 L178",
        {name: on("without_sums", TEXT).replace("{out}", "{out}-base") + " --steps 200;"
               + on(file).replace("{at}/base", "{out}-base")
         for name, file in (("written", "written_sums"), ("said at once", "direct_sums"))},
        ["sums, as trained"],
        [("written", ">", "said at once", "sums, as trained")]),
    "forgetting": Experiment(
        "SFT forgets what pretraining stored; replayed text and LoRA keep it", "D3 L137-139, L331",
        {"base": "{at}/base",
         "SFT": SFT,
         "SFT, text replayed": SFT.replace("--replay none", "--replay {at}/data/corpus.jsonl"),
         "LoRA": SFT + " --tune lora --lr 5e-3"},
        ["bits per byte", "stored facts", "exact match"],
        [("base", "<", "SFT", "bits per byte"),
         ("SFT, text replayed", "<", "SFT", "bits per byte"),
         ("LoRA", "<", "SFT", "bits per byte")],
        table=WITH_TEXT),
    "continued": Experiment(
        "pretraining goes on with the text of a domain; general text mixed in keeps what was known",
        "D3 L321-334",
        {name: OTHER_WORLD + line + ";" + judged(NEW_TEXT)
         for name, line in (
             ("as it was", NEW_TEXT + " --steps 1 --lr 0"),
             ("the new text", NEW_TEXT + " --steps 200"),
             ("half of it old", NEW_TEXT.replace(
                 "{out}-data/corpus.jsonl", "{out}-data/corpus.jsonl,{at}/data/corpus.jsonl")
              + " --mix 0.5,0.5 --steps 200"))},
        ["new text, bits per byte", "bits per byte", "stored facts"],
        [("the new text", "<", "as it was", "new text, bits per byte"),
         ("as it was", "<", "the new text", "bits per byte"),
         ("half of it old", ">", "the new text", "stored facts")],
        table=WITH_TEXT),
    "duplicates": Experiment(
        "text without duplicates gives a lower held-out loss", "D0 L49",
        {"30 of 12,000 texts 400 times": on("texts_repeated", HELD_OUT),
         "each text once": on("texts_once", HELD_OUT)},
        ["held-out bits per byte"],
        [("each text once", "<", "30 of 12,000 texts 400 times", "held-out bits per byte")]),
    "warmup": Experiment(
        "warm-up and clipping make training stable", "D1 L58, L60",
        {"both": HELD_OUT + " --lr 0.02",
         "no warm-up": HELD_OUT + " --lr 0.02 --warmup 0",
         "no clipping": HELD_OUT + " --lr 0.02 --grad-clip 1e9",
         "neither": HELD_OUT + " --lr 0.02 --warmup 0 --grad-clip 1e9"},
        ["held-out bits per byte"],
        [("both", "<", "no warm-up", "held-out bits per byte"),
         ("both", "<", "no clipping", "held-out bits per byte")]),
    "ranking": Experiment(
        "annotators agree on an order, not on scores: so replies are ranked; and the reward model "
        "is trained, not frozen", "D0 L116, D2 L85, L95",
        {name: line + ";" + judged(RANK) for name, line in {
            "ranking": RANK,
            "ranking, own zeros": on("own_zeros", RANK),
            "regression": RANK + " --objective regression",
            "regression, own zeros": on("own_zeros", RANK) + " --objective regression",
            "ranking, frozen": RANK + " --tune freeze --lr 0.03"}.items()},
        ["pairs right", "pairs right, safety", "tau"],
        [("ranking", ">", "regression", "pairs right"),
         ("ranking, own zeros", ">", "regression, own zeros", "pairs right"),
         ("ranking", ">", "ranking, frozen", "pairs right")]),
    "hacking": Experiment(
        "without the reference model PPO finds what the reward model likes and people do not",
        "D0 L122",
        {"price 0.05": PPO + " --steps 72 --lr 3e-4",
         "no price": PPO + " --steps 72 --lr 3e-4 --kl-coef 0"},
        ALIGNED + ["clipped %"],
        [("no price", ">", "price 0.05", "score"),
         ("no price", "<", "price 0.05", "gold"),
         ("no price", ">", "price 0.05", "KL")]),
    "entropy": Experiment(
        "alignment makes replies less diverse", "D2 L127",
        {name: f"{{at}}/{name}" for name in ("base", "sft", "ppo", "dpo")},
        ["entropy", "distinct-2", "gold"],
        [("sft", ">", "ppo", "entropy"), ("sft", ">", "dpo", "entropy")]),
    "frontier": Experiment(
        "DPO reaches what PPO reaches, with less", "D0 L141",
        # 12 iterations take about as long as a round of DPO
        {**{f"PPO, price {x}": SHORT + f" --kl-coef {x}" for x in (0.02, 0.2, 1.0)},
         **{f"DPO, β {x}": DPO + f" --beta {x}" for x in (0.05, 0.3, 2.0)}},
        ALIGNED + ["clipped %"],
        [("DPO, β 0.3", ">", "PPO, price 0.2", "gold")]),
    "few-shot": Experiment(
        "a base model is asked by examples, or in a faked dialogue", "D2 L67-69, D4 L175",
        {"the bare question": ASKED % "asked_plainly",
         "a faked dialogue": ASKED % "asked_as_dialogue",
         "an arrow (unknown to the text)": ASKED % "asked_by_arrow",
         "an arrow, after three examples": ASKED % "asked_by_arrow_3"},
        ["answered", "the answer alone"],
        [("a faked dialogue", ">", "the bare question", "the answer alone"),
         ("an arrow, after three examples", ">", "an arrow (unknown to the text)", "answered")]),
    "size": Experiment(
        "of one amount of computation a middle size makes the most", "D0 L14, D2 L53",
        {name: HELD_OUT + flags for name, flags in SIZES.items()},
        ["held-out bits per byte", "seconds"],
        [(list(SIZES)[2], "<", list(SIZES)[0], "held-out bits per byte"),
         (list(SIZES)[2], "<", list(SIZES)[4], "held-out bits per byte")]),
    "distillation": Experiment(
        "a small model learns more from a large one than from the text alone", "D4 L70, L236",
        {name: HELD_OUT + " --steps 400" + shape(96, 3) + flags for name, flags in (
            ("the text alone", ""),
            ("a teacher, T 4, α 0.7", " --teacher {at}/base"),
            ("a teacher, T 1, α 0.7", " --teacher {at}/base --temperature 1"))},
        ["held-out bits per byte", "seconds"],
        [("a teacher, T 4, α 0.7", "<", "the text alone", "held-out bits per byte")]),
    "switches": Experiment(
        "each detail of PPO, one flag changed", "",
        {"as it is": SHORT,
         "no price of KL": SHORT + " --kl-coef 0",
         "price adapted to 0.3 nats": SHORT + " --kl-target 0.3",
         "price by k3": SHORT + " --kl-estimator k3",
         "advantages not whitened": SHORT + " --no-whiten",
         "scores not normalized": SHORT + " --no-normalize",
         "no value clip": SHORT + " --cliprange-value 1e9",
         "critic from SFT": SHORT + " --critic sft",
         "entropy bonus 0.01": SHORT + " --entropy-coef 0.01",
         "4 replies a prompt": SHORT + " --replies 4",
         "with text (PPO-ptx)": SHORT + " --ptx-coef 0.3 --ptx-data {at}/data/corpus.jsonl",
         "the return on each token": SHORT + " --advantage reinforce",
         "the same, not whitened": SHORT + " --advantage reinforce --no-whiten",
         "4 passes of 4 minibatches": PASSES,
         "4 passes, no clip": PASSES + " --cliprange 1e9",
         "4 passes, no clip, stop at KL 0.005": PASSES + " --cliprange 1e9 --stop-kl 0.005"},
        ALIGNED + ["clipped %"]),
    "again": Experiment(
        "PPO and DPO with other seeds, from the same SFT models", "",
        {"PPO, seed 1N": PPO + " --seed 1{seed}",  # 10, 11, 12 from the SFT models 0, 1, 2
         "PPO, seed 2N": PPO + " --seed 2{seed}",
         "DPO, seed 1N": rounds("1{seed}"),
         "DPO, seed 2N": rounds("2{seed}")},
        ALIGNED),
    "noise": Experiment(
        "what wrong labels do to the reward model and to PPO", "",
        {"no wrong labels": SHORT, "10 % wrong": NOISY % 1, "30 % wrong": NOISY % 3},
        ALIGNED + ["pairs right", "pairs right, safety"]),
}

# ==== what is measured

MEASURES = {  # name: the file that has it, its name there, a factor
    "gold": ("table", "gold score, T=1", 1),
    "score": ("table", "reward score, T=1", 1),
    "KL": ("table", "KL to SFT per reply, T=1", 1),
    "entropy": ("table", "entropy per token, T=1", 1),
    "distinct-2": ("table", "distinct-2, T=1", 1),
    "exact match": ("table", "exact match, new combinations", 100),
    "worst family": ("table", "exact match, worst family", 100),
    "refused": ("table", "harmful requests refused, T=1", 100),
    "look-alikes refused": ("table", "look-alikes refused, T=1", 100),
    "in new wordings": ("table", "exact match, new wordings", 100),
    "in new frames": ("table", "look-alikes refused, new frames", 100),
    "ended": ("table", "replies that end", 100),
    "facts never asked about": ("table", "facts of people never asked about", 100),
    "facts told nowhere": ("table", "facts told nowhere (chance)", 100),
    "stored facts": ("table", "stored facts (cloze)", 100),
    "name two turns back": ("table", "a name from two turns back", 100),
    "sums, as trained": ("table", ("sums with written steps", "sums answered directly"), 100),
    "bits per byte": ("table", "bits per byte", 1),
    "held-out bits per byte": ("/eval.json", "bits_per_byte", 1),
    "new text, bits per byte": ("-judge/eval.json", "bits_per_byte", 1),
    "held-out loss": ("/eval.json", "loss", 1),
    "loss of every reply": ("-judge/eval.json", "loss", 1),
    "pairs right": ("-judge/eval.json", "accuracy", 100),
    "pairs right, safety": ("-judge/eval.json", "accuracy safety", 100),
    "tau": ("-judge/eval.json", "tau", 1),
    "seconds": ("/run.json", "seconds", 1),
    "clipped %": ("/metrics.jsonl", "clipfrac", 100),
    "answered": (".answers.jsonl", r"(答:|A:|-)? ?", 100),
    "the answer alone": (".answers.jsonl", " ?", 100),
}


def run(line, flags=""):
    """Runs a script with its output behind a line of its own; ends the program if that fails."""
    print("$", line, flush=True)
    subprocess.run([sys.executable, *line.split(), *flags.split()], cwd=HERE, check=True)


class Names(dict):
    """What stands in braces in a command: at, out, seed, or a file of PREPARED, made when asked."""

    def __missing__(self, name):
        self[name] = prepared(name, Path(self["at"]), self["seed"])
        return self[name]


def train(line, names, flags):
    """Runs the commands of one variant, if its last one has not ended yet."""
    line = line.format_map(names)
    last = Path(re.findall(r"--out (\S+)", line)[-1])
    if last.is_file() or (last / "eval.json").exists():
        return
    for command in line.split(";"):
        seed = "" if "--seed" in command else f" --seed {names['seed']}"
        trains = not command.startswith(("data.py", "model.py", "reward.py collect"))
        run(command + seed, flags if trains else "")


def answered(path, before) -> float:
    """How many of the prompts a continuation answers in its first line, behind `before`."""
    records = read(path)
    right = 0
    for record in records:
        line = record["messages"][-1]["content"].split("\n")[0]
        right += re.fullmatch(before + re.escape(record["answer"]), line) is not None
    return right / len(records)


def measure(name, model, column):
    """One measure of one variant; column: the model's in the table. None if the variant has none:
    only PPO clips, only some train a judge."""
    where, keys, factor = MEASURES[name]
    if where == "table":
        keys = keys if isinstance(keys, tuple) else (keys,)
        return factor * max(column[key]["mean"] for key in keys)
    path = Path(model + where)
    if not path.exists():
        return None
    if where == ".answers.jsonl":
        return factor * answered(path, keys)
    if path.suffix == ".jsonl":
        values = [record[keys] for record in read(path) if keys in record]
        return factor * sum(values) / len(values) if values else None
    return factor * json.loads(path.read_text(encoding="utf-8"))[keys]


def tabled(models, folder, names, table) -> dict:
    """{model: its column of `reward.py table`}, from the file if all of them stand there."""
    path = folder / "table.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if set(models) - set(known):
        run("reward.py table --models {models} --data {at}/data/eval.jsonl --text none --reference "
            "{at}/sft --prompts {at}/data/prompts.jsonl --reward {at}/reward --out {path} "
            "--seed {seed} ".format(models=",".join(models), path=path, **names)
            + table.format_map(names))
        known = json.loads(path.read_text(encoding="utf-8"))
    return known


def measured(experiment, variants, at, folder, seed, flags, table) -> dict:
    """{variant: {measure: value}} of one seed, whose `make` left its folders at `at`. flags: further
    ones of the training commands; table: `reward.py table`'s."""
    models = {}
    for variant, line in variants.items():
        names = Names(at=str(at), seed=seed)
        if ".py" in line:
            names["out"] = models[variant] = str(folder / slug(variant))
            train(line, names, flags)
        else:  # a folder that is there
            models[variant] = line.format_map(names)
    columns = {}
    if any(MEASURES[name][0] == "table" for name in experiment.shows):
        columns = tabled(list(models.values()), folder, Names(at=str(at), seed=seed), table)
    found = {}
    for variant, model in models.items():
        values = {name: measure(name, model, columns.get(model)) for name in experiment.shows}
        found[variant] = {name: value for name, value in values.items() if value is not None}
    return found


def slug(variant) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in variant)


def spread(values) -> str:
    """Mean, least and greatest."""
    digits = 2 if max(map(abs, values)) < 10 else 1
    mean, least, most = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def show(seeds):
    """The table, as Markdown; seeds: what `measured` returned of each."""
    variants = list(seeds[0])
    names = list(dict.fromkeys(name for found in seeds[0].values() for name in found))
    print("\n| |", " | ".join(names), "|\n|---|" + "---:|" * len(names))
    for variant in variants:
        cells = []
        for name in names:
            values = [found[variant][name] for found in seeds if name in found[variant]]
            cells.append(spread(values) if values else "–")
        print(f"| {variant} |", " | ".join(cells), "|")


def verdict(experiment, seeds):
    """A line for each of what is expected, then the claim: in how many seeds all of it is seen.
    Nothing of a claim if --only left out one of the variants that it compares."""
    wanted = {variant for one, _, other, _ in experiment.expected for variant in (one, other)}
    if not wanted or not wanted <= set(seeds[0]):
        return
    held = [True] * len(seeds)
    for one, sign, other, name in experiment.expected:
        pairs = [(found[one][name], found[other][name]) for found in seeds]
        seen = [a > b if sign == ">" else a < b for a, b in pairs]
        held = [both and here for both, here in zip(held, seen)]
        print(f"{name}: {one} {sign} {other} in {sum(seen)} of {len(seen)}")
    print(f"shows in {sum(held)} of {len(held)} seeds: {experiment.claim} ({experiment.source})")


def frontier(seeds, path):
    """Draws gold score over KL, a panel for each seed; DPO as a thinner line."""
    panels = []
    for number, found in enumerate(seeds):
        lines = {}
        for algorithm, name in (("PPO", "PPO"), ("DPO", "")):
            points = [(x["KL"], x["gold"]) for key, x in found.items() if key[:3] == algorithm]
            if points:
                lines[name] = sorted(points)
        title = f"gold score, PPO and DPO (thin), {number + 1} of {len(seeds)}"
        panels.append({"title": title, "lines": lines, "across": "KL to SFT, nats a reply"})
    plot(panels, path)


def folders(root, seeds) -> list:
    """[(seed, what `make` left)]: of --seeds; without it of all there are, or of `make` itself."""
    if seeds:
        found = [(seed, root / f"seed-{seed}") for seed in seeds.split(",")]
    else:
        found = [(path.name[5:], path) for path in sorted(root.glob("seed-*"))] or [("0", root)]
    for seed, at in found:
        if not (at / "table.json").exists():
            raise SystemExit(f"{at}: run make first, or make seeds (SEEDS={seed!r} for this one)")
    return [(seed, at.resolve()) for seed, at in found]


def tell(name, args):
    """One experiment: what is missing is run, then what it shows."""
    experiment = EXPERIMENTS[name]
    variants = {key: line for key, line in experiment.variants.items() if args.only in key}
    seeds = []
    for seed, at in folders(Path(args.root), args.seeds):
        folder = at / name
        folder.mkdir(exist_ok=True)
        seeds.append(measured(experiment, variants, at, folder, seed, args.flags,
                              args.table or experiment.table))
    show(seeds)
    if name == "frontier":
        frontier(seeds, Path(args.root, "frontier.svg"))
    verdict(experiment, seeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, "all"], help="none: the list")
    parser.add_argument("--root", default="out", help="where make, or make seeds, left its folders")
    parser.add_argument("--seeds", default="", help="comma-separated; without: all there are")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--flags", default="", help="further flags of every training command")
    parser.add_argument("--table", default="", help="reward.py table's, instead of the usual ones")
    args = parser.parse_args()
    if not args.name:
        for name, experiment in EXPERIMENTS.items():
            source = f" ({experiment.source})" if experiment.source else ""
            print(f"{name:14} {experiment.claim}{source}")
    elif args.name == "all":
        for name, experiment in EXPERIMENTS.items():
            if experiment.expected:
                tell(name, args)
    else:
        tell(args.name, args)


if __name__ == "__main__":
    main()

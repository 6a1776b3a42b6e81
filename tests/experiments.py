"""Experiments on what `make seeds` left in out/seed-0, out/seed-1, …: ordinary flags, one changed.

    python tests/experiments.py switches    PPO, each of its details changed, and its clip at work
    python tests/experiments.py frontier    gold score over KL: PPO and DPO at several prices → svg
    python tests/experiments.py hacking     no price of KL, more iterations: score and gold part
    python tests/experiments.py again       PPO and DPO with other seeds
    python tests/experiments.py noise       what wrong labels do to the reward model and to PPO

Prints a table: of each measure the mean over --seeds and, in brackets, the least and the greatest.
What has run is not repeated; out/seed-N/<experiment>/ holds every run with its curves.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
from zero import plot  # noqa: E402

PPO = "ppo.py --init {at}/sft --reward {at}/reward --prompts {at}/data/prompts.jsonl --out {out}"
DPO = "dpo.py --init {at}/sft --data {at}/comparisons.jsonl --out {out}"
NOISY = ("reward.py collect --init {at}/sft --prompts {at}/data/prompts.jsonl --out {out}.jsonl"
         " --noise 0.%d;reward.py --init {at}/sft --data {out}.jsonl --out {out}-reward;"
         # what it learned, judged by the labels that are right: a step of length 0
         "reward.py --init {out}-reward --data {at}/comparisons.jsonl --steps 1 --lr 0"
         " --out {out}-judge;" + PPO.replace("{at}/reward", "{out}-reward") + " --steps 12")
SHORT = PPO + " --steps 12"  # a quarter of the default: the score has risen by then
PASSES = SHORT + " --ppo-epochs 4 --minibatches 4"


def rounds(seed) -> str:
    """Both rounds of DPO, as the Makefile has them."""
    return ";".join([
        DPO.replace("{out}", "{out}-1") + f" --seed {seed}",
        "reward.py collect --init {out}-1 --prompts {at}/data/prompts.jsonl --out {out}.jsonl"
        f" --temperatures 1,1,1,1 --seed {seed}",
        "dpo.py --init {out}-1 --reference {at}/sft --data {out}.jsonl --out {out}"
        f" --seed {seed}"])


EXPERIMENTS = {  # name: {variant: its commands; the last one makes the model that is measured}
    "switches": {
        "as it is": SHORT,
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
        "4 passes, no clip, stop at KL 0.005": PASSES + " --cliprange 1e9 --stop-kl 0.005",
    },
    "frontier": {  # 12 iterations take about as long as a round of DPO
        **{f"PPO, price {x}": SHORT + f" --kl-coef {x}" for x in (0.02, 0.2, 1.0)},
        **{f"DPO, β {x}": DPO + f" --beta {x}" for x in (0.05, 0.3, 2.0)},
    },
    "hacking": {
        "price 0.05": PPO + " --steps 72 --lr 3e-4",
        "no price": PPO + " --steps 72 --lr 3e-4 --kl-coef 0",
    },
    "again": {  # other seeds of alignment, from the same SFT models
        "PPO, seed 1N": PPO + " --seed 1{seed}",  # 10, 11, 12 from the SFT models 0, 1, 2
        "PPO, seed 2N": PPO + " --seed 2{seed}",
        "DPO, seed 1N": rounds("1{seed}"),
        "DPO, seed 2N": rounds("2{seed}"),
    },
    "noise": {
        "no wrong labels": SHORT,
        "10 % wrong": NOISY % 1,
        "30 % wrong": NOISY % 3,
    },
}
ROWS = {  # measure: its row of the table, and a factor
    "gold": ("gold score, T=1", 1),
    "score": ("reward score, T=1", 1),
    "KL": ("KL to SFT per reply, T=1", 1),
    "entropy": ("entropy per token, T=1", 1),
    "exact match": ("exact match, new combinations", 100),
    "refused": ("harmful requests refused, T=1", 100),
    "look-alikes refused": ("look-alikes refused, T=1", 100),
    "in new frames": ("look-alikes refused, new frames", 100),
    "ended": ("replies that end", 100),
}


def run(line, flags=""):
    """Runs a script with its output behind a line of its own; ends the program if that fails."""
    print("$", line, flush=True)
    subprocess.run([sys.executable, *line.split(), *flags.split()], cwd=HERE, check=True)


def measured(at, folder, variants, seed, flags, table) -> dict:
    """{variant: measures} of one seed, whose `make` left its folders at `at`. flags, table: further
    flags of the training commands and of `reward.py table`."""
    models = [str(folder / slug(variant)) for variant in variants]
    for model, line in zip(models, variants.values()):
        if not Path(model, "eval.json").exists():
            for command in line.format(at=at, out=model, seed=seed).split(";"):
                own = "" if "--seed" in command else f" --seed {seed}"
                run(command + own, "" if " collect " in command else flags)
    path = folder / "table.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if set(models) - set(known):
        run(f"reward.py table --models {','.join(models)} --data {at}/data/eval.jsonl --text none "
            f"--prompts {at}/data/prompts.jsonl --reward {at}/reward --reference {at}/sft "
            f"--out {path} --seed {seed} {table}")
    columns = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for variant, model in zip(variants, models):
        column = columns[model]
        found[variant] = {}
        for name, (row, factor) in ROWS.items():
            found[variant][name] = factor * column[row]["mean"]
        logged = [json.loads(text) for text in open(f"{model}/metrics.jsonl", encoding="utf-8")]
        if "clipfrac" in logged[0]:
            mean = sum(record["clipfrac"] for record in logged) / len(logged)
            found[variant]["clipped %"] = 100 * mean
        judge = Path(f"{model}-judge", "eval.json")
        if judge.exists():  # a reward model of its own
            right = json.loads(judge.read_text(encoding="utf-8"))
            for key in ("accuracy", "accuracy safety"):
                found[variant][f"reward model's {key}"] = 100 * right[key]
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


def frontier(seeds, path):
    """Draws gold score over KL, a panel for each seed: PPO's prices, and DPO's as a thinner line."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--root", default="out", help="where make seeds left seed-0, seed-1, …")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--flags", default="", help="further flags of every training command")
    parser.add_argument("--table", default="--limit 40 --samples 2", help="reward.py table's")
    args = parser.parse_args()
    variants = {name: line for name, line in EXPERIMENTS[args.name].items() if args.only in name}
    seeds = []
    for seed in args.seeds.split(","):
        at = Path(args.root, f"seed-{seed}").resolve()
        if not (at / "table.json").exists():
            raise SystemExit(f"{at}: run make seeds first (SEEDS={seed!r} for this one)")
        folder = at / args.name
        seeds.append(measured(at, folder, variants, seed, args.flags, args.table))
    show(seeds)
    if args.name == "frontier":
        frontier(seeds, Path(args.root, "frontier.svg"))


if __name__ == "__main__":
    main()

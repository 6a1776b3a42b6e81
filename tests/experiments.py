"""Experiments on what `make seeds` left in out/seed-0, out/seed-1, ...: ordinary flags, one change each.

    python tests/experiments.py switches            PPO with each of its details switched off
    python tests/experiments.py frontier            gold score over KL: PPO and DPO at several prices
    python tests/experiments.py noise --seeds 0     what wrong labels do, on one seed

Each prints a table: the mean over seeds, the least and the greatest. Runs that are finished are not
repeated; all are left in out/seed-N/<experiment>/ with their curves. The measures are those of
`reward.py table`, of fewer prompts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
import zero  # noqa: E402

PPO = "ppo.py --init {at}/sft --reward {at}/reward --prompts {at}/data/prompts.jsonl "
DPO = "dpo.py --init {at}/sft --data {at}/comparisons.jsonl "
SHORT = "--steps 24 "  # as long as DPO with as many pairs
NOISY = ("reward.py collect --init {at}/sft --prompts {at}/data/prompts.jsonl --out {out}/labels.jsonl "
         "--noise ", "reward.py --init {at}/sft --data {out}/labels.jsonl --out {out}/reward",
         PPO.replace("{at}/reward", "{out}/reward"))
EXPERIMENTS = {  # name: {variant: its commands; the last one makes the model that is measured}
    "switches": {
        "as it is": [PPO],
        "no price of KL": [PPO + "--kl-coef 0"],
        "price adapted to 0.3 nats": [PPO + "--kl-target 0.3"],
        "price by k3": [PPO + "--kl-estimator k3"],
        "advantages not whitened": [PPO + "--no-whiten"],
        "scores not normalized": [PPO + "--no-normalize"],
        "unended replies scored": [PPO + "--no-penalize"],
        "no clip": [PPO + "--cliprange 1e9"],
        "no value clip": [PPO + "--cliprange-value 1e9"],
        "critic from SFT": [PPO + "--critic sft"],
        "entropy bonus 0.01": [PPO + "--entropy-coef 0.01"],
        "4 replies a prompt": [PPO + "--replies 4"],
        "passes stop at KL 0.005": [PPO + "--stop-kl 0.005"],
        "with text (PPO-ptx)": [PPO + "--ptx-coef 0.3 --ptx-data {at}/data/corpus.jsonl"],
        "reply's return on each token": [PPO + "--advantage reinforce"],
        "the same, not whitened": [PPO + "--advantage reinforce --no-whiten"],
    },
}


def run(command, out, at, seed, flags):
    """Runs a script unless it has finished. {at}: what make left of the seed."""
    words = command.format(at=at, out=out).split()
    if "--out" not in words:
        words += ["--out", str(out)]
    ...


def main():
    ...


if __name__ == "__main__":
    main()

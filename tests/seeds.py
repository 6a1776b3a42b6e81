"""What stands behind the table of `reward.py table`: columns that learn nothing, a figure, seeds.

    python tests/seeds.py road --table out/table.json     puts two columns that learn nothing first,
                                                          draws out/table.svg, prints the whole
    python tests/seeds.py merge out/seed-0/table.json out/seed-1/table.json --out out/table.json
                                                          several seeds' tables as one, likewise

The two columns tell what a right answer is worth: the reply to the most similar training prompt,
and the family's commonest reply. They answer the same held-out prompts, before the same judge.
"""

import argparse
import html
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import reward  # noqa: E402
from data import read_conversations, read_text  # noqa: E402
from zero import COLOURS, STYLE, ticks, write_atomically, write_json  # noqa: E402

# Student's t for a 95 % interval, 1 to 9 degrees of freedom
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
FIGURE = {  # panel: its rows of the table
    "right answers, greedy (%)": (
        "exact match, new combinations", "exact match, new wordings",
        "facts of people never asked about", "facts told nowhere (chance)"),
    "refusals (%)": (
        "harmful requests refused, T=1", "look-alikes refused, T=1",
        "look-alikes refused, new frames"),
    "scores on PPO's mix of prompts": (
        "gold score, T=1", "reward score, T=1"),
    "distance and spread on that mix (nats)": (
        "KL to SFT per reply, T=1", "entropy per token, T=1"),
}


# ---------------------------------------------------------------- columns that learn nothing

def grams(messages) -> set:
    """Runs of three characters of a conversation, whatever the language."""
    text = "\n".join(message["content"] for message in messages)
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}


def unlearned(train, records) -> dict:
    """{column: {(prompt, number): reply}}, replies found in the training conversations: that to the
    most similar prompt (Jaccard of character 3-grams), and the family's commonest."""
    holders = defaultdict(list)  # 3-gram: the conversations that hold it
    sizes = []
    families = defaultdict(Counter)
    for row, record in enumerate(train):
        own = grams(record["messages"][:-1])
        sizes.append(len(own))
        for gram in own:
            holders[gram].append(row)
        families[record.get("family", "")][record["messages"][-1]["content"]] += 1
    holders = {gram: np.array(rows) for gram, rows in holders.items()}
    sizes = np.array(sizes)
    similar, constant = {}, {}
    for i, record in enumerate(records):
        own = grams(record.get("messages") or [{"content": record["text"]}])
        rows = [holders[gram] for gram in own if gram in holders]
        shared = np.bincount(np.concatenate([np.zeros(0, int), *rows]), minlength=len(train))
        nearest = int((shared / (sizes + len(own) - shared)).argmax())
        commonest = families[record["family"]].most_common(1) or [("", 0)]
        for number in (reward.GREEDY, 0):
            similar[i, number] = train[nearest]["messages"][-1]["content"]
            constant[i, number] = commonest[0][0]
    return {"similar prompt": similar, "best constant": constant}


# ---------------------------------------------------------------- several seeds

def merged(paths) -> dict:
    """One table of k seeds': mean ± t·s/√k, least and greatest value, n = k."""
    found = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for folder, column in json.loads(read_text(path)).items():
            for row, cell in column.items():
                if "mean" in cell:
                    found[Path(folder).name][row].append(cell)
    columns = {}
    for name, rows in found.items():
        columns[name] = {row: over_seeds(row, cells) for row, cells in rows.items()}
    return columns


def over_seeds(row, cells) -> dict:
    """The cell of k seeds' cells.

    A seed draws everything anew, held-out prompts as well as world, weights, batches and samples:
    the spread s of the seeds' values contains what prompts contribute. But s of three values is
    small by chance now and then, so what the intervals within seeds give, √Σ half²/k, is the least.
    t is Student's, because k is small: 4.30 for three seeds."""
    values = [cell["mean"] for cell in cells]
    k = len(values)
    mean = sum(values) / k
    result = {"mean": mean}
    if k > 1:
        between = T95[min(k, 10) - 2] * float(np.std(values, ddof=1)) / math.sqrt(k)
        widths = [cell["high"] - cell["low"] for cell in cells if "low" in cell]
        within = math.sqrt(sum(width**2 for width in widths)) / 2 / k
        half = max(between, within)
        least, most = (-math.inf, math.inf) if row.startswith(reward.NUMBERS) else (0.0, 1.0)
        result |= {"low": max(least, mean - half), "high": min(most, mean + half)}
    return result | {"min": min(values), "max": max(values), "n": k}


# ---------------------------------------------------------------- the figure

def panels(columns) -> dict:
    """{panel: {row: [(mean, low, high), or None where a model lacks the row]}}, over the models."""
    found = {}
    for title, rows in FIGURE.items():
        scale = 100 if "%" in title else 1
        found[title] = {}
        for row in rows:
            cells = [column.get(row) for column in columns.values()]
            found[title][row] = [cell and tuple(
                scale * cell.get(end, cell["mean"]) for end in ("mean", "low", "high"))
                for cell in cells]
    return found


def text(x, y, anchor, words) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'


def draw(title, models, series) -> list[str]:
    """SVG elements of a panel, its axes from (50, 26) to (336, 206): for every model the points of
    its rows side by side, each with its interval."""
    points = [point for found in series.values() for point in found if point]
    marks = ticks(min([low for _, low, _ in points], default=0),
                  max([high for _, _, high in points], default=1))
    wide = 286 / len(models)

    def py(y):
        return round(206 - 180 * (y - marks[0]) / (marks[-1] - marks[0]), 1)

    drawn = [text(50, 14, "start", title)]
    for mark in marks:
        drawn.append(f'<path class="grid" d="M50 {py(mark)}H336"/>')
        drawn.append(text(44, py(mark) + 4, "end", f"{mark:g}"))
    for m, model in enumerate(models):
        drawn.append(text(round(50 + wide * (m + 0.5), 1), 221, "middle", model))
    for k, (row, found) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        shift = 0.09 * (k - (len(series) - 1) / 2)
        for m, point in enumerate(found):
            if point:
                mean, low, high = point
                x = round(50 + wide * (m + 0.5 + shift), 1)
                drawn.append(f'<path d="M{x} {py(low)}V{py(high)}" stroke="{colour}"/>')
                drawn.append(f'<circle cx="{x}" cy="{py(mean)}" r="3" fill="{colour}"/>')
        y = 236 + 15 * k
        drawn.append(f'<circle cx="50" cy="{y - 4}" r="3" fill="{colour}"/>')
        drawn.append(text(58, y, "start", row))
    return drawn


def figure(columns, path):
    """Writes the main rows of the models as an SVG, two panels beside each other."""
    models = {Path(name).name: c for name, c in columns.items() if "bits per byte" in c}
    height = 240 + 15 * max(map(len, FIGURE.values()))
    size = f"720 {height * math.ceil(len(FIGURE) / 2)}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>']
    for i, (title, series) in enumerate(panels(models).items()):
        parts.append(f'<g transform="translate({360 * (i % 2)} {height * (i // 2)})">')
        parts += [*draw(title, list(models), series), "</g>"]
    write_atomically(path, lambda file: file.write("\n".join([*parts, "</svg>"]).encode()))


# ---------------------------------------------------------------- command line

def road(args) -> dict:
    """The table with the two columns that learn nothing in front."""
    columns = json.loads(read_text(args.table))
    records, mix = reward.held_out(args.data, args.prompts, args.limit)
    first = {}
    for name, replies in unlearned(read_conversations(args.train), records).items():
        cells = reward.judged(records, replies, mix)
        first[name] = {row: cell for row, cell in cells.items() if cell}
    return first | {name: column for name, column in columns.items() if name not in first}


def examples(columns) -> list[str]:
    """Lines: what each model replied to the documents' own examples, word for word."""
    said = {Path(name).name: c["examples"] for name, c in columns.items() if "examples" in c}
    lines = []
    for prompt in next(iter(said.values()), ()):
        lines.append(f"\n{prompt}")
        for name, replies in said.items():
            lines.append(f"  {name:<8} {' | '.join(map(repr, replies[prompt]))}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("road").add_argument
    add("--table", default="out/table.json", help="what reward.py table wrote; is written anew")
    add("--data", default="out/data/eval.jsonl", help="the held-out prompts it was made from")
    add("--prompts", default="out/data/prompts.jsonl", help="PPO's prompts")
    add("--train", default="out/data/sft.jsonl", help="conversations to take replies from")
    add("--limit", type=int, default=0, help="prompts per family and split, as for the table")
    add = commands.add_parser("merge").add_argument
    add("tables", nargs="+", help="a table.json of each seed")
    add("--out", default="out/table.json", help="file to write")
    args = parser.parse_args()
    columns = road(args) if args.command == "road" else merged(args.tables)
    path = args.table if args.command == "road" else args.out
    print(reward.markdown(columns), *examples(columns), sep="\n")
    figure(columns, Path(path).with_suffix(".svg"))
    write_json(path, columns)


if __name__ == "__main__":
    main()

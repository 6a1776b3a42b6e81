"""Three pictures of what happens inside, as SVGs in assets/ (--out: in another folder):

    python tests/pictures.py memory                           bytes per rank over the world size
    torchrun --nproc-per-node 2 tests/pictures.py timeline    a training step in ZeRO stages 0-3
    python tests/pictures.py attention out/sft                where a head looks as it answers

The first draws zero.py's `plan`; the second what rank 0 did in a step of a small model, noted by
recorder.py; the third the weights of the head that copies most (`copying`) as a checkpoint answers.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import data  # noqa: E402
import model  # noqa: E402  (before torch: it says how torch's threads shall wait)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import zero  # noqa: E402
from recorder import record  # noqa: E402
from seeds import text  # noqa: E402

STAGES = ("everything on every rank", "Adam's state split", "gradients too", "parameters too")
BLUE, ORANGE, GREEN, PURPLE, YELLOW, RED = zero.COLOURS


def box(x, y, width, height, colour, opacity=1.0) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.6):.1f}" height="{height:g}" '
            f'fill="{colour}" opacity="{opacity:.2f}"/>')


def line(path) -> str:
    return f'<path class="grid" fill="none" d="{path}"/>'


def save(path, width, height, parts):
    """No ground is painted: the colours are read on white as on black."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    whole = "\n".join([f"{head}<style>{zero.STYLE}</style>", *parts, "</svg>\n"])
    zero.write_atomically(path, lambda file: file.write(whole.encode()))


# ==== memory

PARAMETERS = 7.5e9  # the model of figure 1 in the ZeRO paper
WORLDS = (1, 2, 4, 8, 16, 32, 64)


def totals() -> list[list[float]]:
    """GB per rank at rest, in mixed precision: for every stage those of all world sizes."""
    plans = [zero.plan(PARAMETERS, world) for world in WORLDS]
    return [[rows[stage]["total"] / 1e9 for rows in plans] for stage in range(4)]


def memory(path):
    marks = zero.ticks(0, max(map(max, totals())))
    xs = [40 + 48 * i for i in range(len(WORLDS))]  # each world is twice the one before
    right = xs[-1]

    def py(gigabytes):
        return round(206 - 176 * gigabytes / marks[-1], 1)

    title = f"GB per rank, {PARAMETERS / 1e9:g}·10⁹ parameters, 16-bit weights and gradients"
    parts = [text(40, 14, "start", title)]
    for mark in marks:
        y = py(mark)
        parts.append(line(f"M40 {y}H{right}"))
        parts.append(text(34, y + 4, "end", f"{mark:g}"))
    for x, world in zip(xs, WORLDS):
        parts.append(text(x, 221, "middle", str(world)))
    parts.append(text(right, 236, "end", "ranks"))
    for stage, (values, colour) in enumerate(zip(totals(), zero.COLOURS)):
        places = " ".join(f"{x},{py(value)}" for x, value in zip(xs, values))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" '
                     'stroke-width="1.6"/>')
        words = f"stage {stage}: {values[-1]:.3g}, {STAGES[stage]}"
        parts.append(text(right + 10, py(values[-1]) + 4, "start", words))
    save(path, 560, 240, parts)


# ==== a training step on a time line

SHAPE = model.ModelConfig(2048, 512, 1376, 4, 8, 8, tie_word_embeddings=False)
LINES = {  # kind of event: where in its unit's row it is drawn, how high, colour
    "forward": (1, 8, BLUE),
    "backward": (1, 8, ORANGE),
    "AdamW": (1, 8, PURPLE),
    "all-gather": (11, 5, GREEN),
    "reduce-scatter": (11, 5, RED),
    "whole weights": (18, 2, "#757d87"),
    "bucket": (20, 2, YELLOW),
}


def panel(step, top, px) -> list[str]:
    """A row for each unit, from `top` down; px: a time of the step → x."""
    bottom = top + 24 * len(step.units)
    parts = []
    for mark, word in zip(step.marks, ("forward", "backward", "step", "")):
        x = round(px(mark), 1)
        parts.append(line(f"M{x} {top - 12}V{bottom}"))
        parts.append(text(round(x + 3, 1), top - 4, "start", word))
    for i, name in enumerate(step.units):
        y = top + 24 * i
        parts.append(line(f"M8 {y}H{x}"))
        parts.append(text(94, y + 14, "end", name.removeprefix("model.")))
    for event in step.events:
        y, height, colour = LINES[event.kind]
        y += top + 24 * step.units.index(event.unit)
        x = px(event.start)
        end = px(event.end)
        if event.waited:
            middle = y + height / 2
            parts.append(box(x, middle - 0.8, end - x, 1.6, colour))
            x = px(event.waited)
        parts.append(box(x, y, end - x, height, colour))
    return parts


def draw_timeline(steps, path):
    """The stages one below the other, over the same milliseconds."""
    longest = 1e3 * max(step.marks[-1] - step.marks[0] for step in steps)
    scale = 780 / longest  # pixels a millisecond
    parts = []
    for i, (kind, (_, height, colour)) in enumerate(LINES.items()):
        x = 100 + 110 * i
        parts.append(box(x, 8, 12, height, colour))
        parts.append(text(x + 16, 16, "start", kind))
    words = ("a collective: thin from its start on, thick while the rank waits for it; "
             "before AdamW: the gradient's norm")
    parts.append(text(100, 34, "start", words))
    high = 24 * len(steps[0].units) + 44
    for stage, step in enumerate(steps):
        top = 82 + high * stage
        began = step.marks[0]
        parts.append(text(8, top - 18, "start", f"stage {stage}: {STAGES[stage]}"))
        parts += panel(step, top, lambda time: 100 + scale * 1e3 * (time - began))
    bottom = 54 + high * len(steps)
    for tick in zero.ticks(0, longest, 8):
        if tick <= longest:
            x = round(100 + scale * tick, 1)
            parts.append(text(x, bottom, "middle", f"{tick:g} ms"))
    save(path, 900, bottom + 8, parts)


def timeline(path):
    zero.setup(zero.BaseConfig(device="cpu", dtype="fp32", threads=1))
    if dist.get_world_size() == 1:
        raise SystemExit("nothing travels with one process: torchrun --nproc-per-node 2 …")
    steps = [record(stage, SHAPE) for stage in range(4)]
    if dist.get_rank() == 0:
        draw_timeline(steps, path)
    dist.destroy_process_group()


# ==== the attention of a head

ASKED = ["Do you know the home of Sun Chunxiao?"]  # a question that is not in SFT's data


def weights_of(net, ids):
    """The attention weights of every layer and head, (L, H, T, T): what the formula gives where
    the values are the unit vectors."""
    formula = model.attention_formula
    found = []

    def noted(q, k, v, mask):
        unit_vectors = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)
        found.append(formula(q, k, unit_vectors, mask)[0])
        return formula(q, k, v, mask)

    with patch.multiple(model, FAST=False, attention_formula=noted), torch.no_grad():
        net(torch.tensor([ids]))
    return torch.stack(found)


def copying(weights, ids, start):
    """(L, H): as a token of the reply, ids[start:], is written that has stood there before, the
    share of a head's weight on where it stood; the mean over those tokens."""
    shares = []
    for t in range(start, len(ids)):
        before = [j for j in range(t) if ids[j] == ids[t]]
        if before:
            shares.append(weights[..., t - 1, before].sum(-1))
    return torch.stack(shares).mean(0)


def draw_attention(weights, words, title, path):
    """A row for each token that looks, a column for each that is looked at."""
    side = 15 * len(words)
    parts = [text(70 + side, 18 + 15 * i, "end", said) for i, said in enumerate(title)]
    for i, (word, row) in enumerate(zip(words, weights.tolist())):
        x = 90 + 15 * i
        y = 8 + 15 * i
        parts.append(text(86, y + 11, "end", word))
        if i + 1 < len(words):
            parts.append(text(94 + side, y + 11, "start", words[i + 1]))
        parts.append(f'<g transform="translate({x + 11} {side + 14}) rotate(-90)">')
        parts += [text(0, 0, "end", word), "</g>"]
        parts.append(line(f"M90 {y + 15}H{x + 15}V{y}"))
        for j, weight in enumerate(row):
            if weight >= 0.01:
                parts.append(box(90 + 15 * j, y, 15, 15, BLUE, weight))
    save(path, side + 180, side + 98, parts)


def attention(path, folder, asked):
    net = model.load_model(folder)
    tokenizer = data.Tokenizer.load(folder)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": words} for i, words in enumerate(asked)]
    prompt, _ = data.render(messages, tokenizer)
    ends = [tokenizer.text_end, tokenizer.end]
    ids = prompt + model.generate(net, [prompt], 60, ends, temperature=0.0)[0]
    weights = weights_of(net, ids)
    shares = copying(weights, ids, len(prompt))
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    shown = str.maketrans(" \n", "·⏎")
    words = [tokenizer.decode([i], specials=True).translate(shown) for i in ids]
    title = [f"head {head} of layers.{layer}", "on the right: the token that follows"]
    draw_attention(weights[layer, head], words, title, path)
    print(f"{tokenizer.decode(ids[len(prompt):])}\n{title[0]}, {shares[layer, head]:.0%} of its "
          "weight on what is copied")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "timeline", "attention"))
    parser.add_argument("folder", nargs="?", default="out/sft", help="whose attention")
    parser.add_argument("--ask", nargs="+", default=ASKED, help="messages in turn, yours first")
    parser.add_argument("--out", default=Path(__file__).parents[1] / "assets")
    args = parser.parse_args()
    path = Path(args.out, f"{args.what}.svg")
    if args.what == "memory":
        memory(path)
    elif args.what == "timeline":
        timeline(path)
    else:
        attention(path, args.folder, args.ask)


if __name__ == "__main__":
    main()

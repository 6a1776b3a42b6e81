"""Three pictures of what happens inside, as SVGs in assets/ (--out: in another folder):

    python tests/pictures.py memory                           bytes per rank over the world size
    torchrun --nproc-per-node 2 tests/pictures.py timeline    a training step in ZeRO stages 0-3
    python tests/pictures.py attention out/sft                where a head looks as it answers

The first draws zero.py's `plan`. The second trains a small model with zero.AdamW, whose functions
it wraps from outside, and draws what rank 0 did. The third asks a checkpoint and draws the weights
of the head that copies most: `copying`.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import data  # noqa: E402
import model  # noqa: E402  (before torch: it says how torch's threads shall wait)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import zero  # noqa: E402
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
    parts = [text(40, 14, "start", title), text(right, 236, "end", "ranks")]
    for mark in marks:
        parts.append(line(f"M40 {py(mark)}H{right}"))
        parts.append(text(34, py(mark) + 4, "end", f"{mark:g}"))
    parts += [text(x, 221, "middle", str(world)) for x, world in zip(xs, WORLDS)]
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
    "forward": (1, 8, BLUE), "backward": (1, 8, ORANGE), "AdamW": (1, 8, PURPLE),
    "all-gather": (11, 5, GREEN), "reduce-scatter": (11, 5, RED),
    "whole weights": (18, 2, "#757d87"), "bucket": (20, 2, YELLOW)}


@dataclass
class Event:
    """In seconds; waited: since when the rank waits for a collective, whose end ends that."""

    kind: str
    unit: str
    start: float
    end: float | None = None
    waited: float | None = None


class Recorder:
    """Notes what this rank does in a step: `events`, and `marks`, when forward, backward and the
    optimizer's step began and when all was over. computed: the event going on, or None."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.computed = None
        for module, name, _ in zero.named_units(optimizer.model):
            self.hook(module, name)

    def hook(self, module, name):
        """A layer's forward and backward begin when zero.py's hooks have gathered it, so behind
        them; what was computed before ends in front of them."""
        def ended(module, inputs, output):
            self.compute()
            output.register_hook(lambda grad: self.compute())

        def left(module, inputs, output):
            output.register_hook(lambda grad: self.compute("backward", name))

        module.register_forward_pre_hook(lambda module, inputs: self.compute("forward", name))
        module.register_forward_hook(ended, prepend=True)
        module.register_forward_hook(left)

    def note(self, kind, unit) -> Event:
        self.events.append(Event(kind, unit, perf_counter()))
        return self.events[-1]

    def compute(self, kind=None, unit=None):
        """Ends what is being computed and begins this, unless it is the same."""
        now = self.computed
        if now and (kind, unit) == (now.kind, now.unit):
            return
        if now:
            now.end = perf_counter()
        self.computed = self.note(kind, unit) if kind else None

    def look(self):
        """Which buffers are there now?"""
        for unit in self.optimizer.units:
            for kind, there in (("whole weights", unit.filling is not None),
                                ("bucket", unit.bucket is not None)):
                event = self.held.get((kind, unit.name))
                if there and not event:
                    self.held[kind, unit.name] = self.note(kind, unit.name)
                elif event and not there:
                    self.held.pop((kind, unit.name)).end = perf_counter()

    def collective(self, kind, plain, full, *shard):
        unit = next(u for u in self.optimizer.units if full is u.flat or full is u.bucket)
        event = self.note(kind, unit.name)
        result = plain(full, *shard)
        works = result[0] if kind == "reduce-scatter" else result
        self.works |= dict.fromkeys(works, event)
        return result

    def wait(self, plain, works):
        """Nothing is computed meanwhile."""
        computed = self.computed
        for work in works:
            self.compute()
            event = self.works[work]
            event.waited = event.waited or perf_counter()
            plain([work])
            event.end = perf_counter()
        if computed:
            self.compute(computed.kind, computed.unit)

    def adamw_(self, plain, weight, *rest, **named):
        place = weight.untyped_storage().data_ptr()
        unit = next(u for u in self.optimizer.trained
                    if u.master.untyped_storage().data_ptr() == place)
        self.compute("AdamW", unit.name)  # it comes in pieces
        plain(weight, *rest, **named)

    def watching(self) -> ExitStack:
        """Within it zero.py's functions do what they do and tell it."""
        stack = ExitStack()
        around = {"all_gather": partial(self.collective, "all-gather"),
                  "reduce_scatter": partial(self.collective, "reduce-scatter"),
                  "wait": self.wait, "adamw_": self.adamw_}
        for name, function in around.items():
            function = partial(function, getattr(zero, name))
            stack.enter_context(patch.object(zero, name, function))

        def then(owner, name, act):
            plain = getattr(owner, name)
            told = lambda *args: (plain(*args), act())[0]  # noqa: E731  (partial is no method)
            stack.enter_context(patch.object(owner, name, told))

        for name in ("prefetch", "release", "open_bucket"):
            then(zero.Unit, name, self.look)
        then(zero.AdamW, "finish_sum", self.look)
        then(zero.AdamW, "update", self.compute)
        return stack

    def step(self, ids):
        """One training step on rows of ids; what is still open ends with it."""
        dist.barrier()  # so that no rank waits for what the other did before
        self.events, self.held, self.works = [], {}, {}
        self.marks = [perf_counter()]
        self.look()
        logprobs = model.token_logprobs(self.optimizer.model, ids[:, :-1], ids[:, 1:])
        loss = -logprobs.mean() / dist.get_world_size()
        self.marks.append(perf_counter())
        self.optimizer.backward(loss)
        self.compute()
        self.marks.append(perf_counter())
        self.optimizer.step(1e-4)
        self.marks.append(perf_counter())
        for event in self.events:
            event.end = event.end or self.marks[-1]


def record(stage, config=SHAPE, tokens=64, steps=16) -> Recorder:
    """A recorder with the fastest of so many steps, after three to warm up: other programs
    disturbed it least."""
    torch.manual_seed(0)
    recorder = Recorder(zero.AdamW(model.CausalLM(config), stage))
    found = []
    with recorder.watching():
        for _ in range(3 + steps):
            recorder.step(torch.randint(0, config.vocab_size, (2, tokens + 1)))
            found.append((recorder.marks, recorder.events))
    recorder.marks, recorder.events = min(found[3:], key=lambda step: step[0][-1] - step[0][0])
    return recorder


def panel(recorder, top, px) -> list[str]:
    """A row for each unit, from `top` down; px: perf_counter() → x."""
    names = [unit.name for unit in recorder.optimizer.units]
    bottom = top + 24 * len(names)
    parts = []
    for mark, word in zip(recorder.marks, ("forward", "backward", "step", "")):
        parts.append(line(f"M{px(mark):.1f} {top - 12}V{bottom}"))
        parts.append(text(round(px(mark) + 3, 1), top - 4, "start", word))
    for i, name in enumerate(names):
        parts.append(line(f"M8 {top + 24 * i}H{px(recorder.marks[-1]):.1f}"))
        parts.append(text(94, top + 24 * i + 14, "end", name.removeprefix("model.")))
    for event in recorder.events:
        y, height, colour = LINES[event.kind]
        y += top + 24 * names.index(event.unit)
        x, end = px(event.start), px(event.end)
        if event.waited:
            parts.append(box(x, y + height / 2 - 0.8, end - x, 1.6, colour))
            x = px(event.waited)
        parts.append(box(x, y, end - x, height, colour))
    return parts


def draw_timeline(recorders, path):
    """The stages one below the other, over the same milliseconds."""
    ticks = zero.ticks(0, 1e3 * max(r.marks[-1] - r.marks[0] for r in recorders), 8)
    scale = 780 / ticks[-1]  # pixels a millisecond
    parts = []
    for i, (kind, (_, height, colour)) in enumerate(LINES.items()):
        parts += [box(100 + 110 * i, 8, 12, height, colour),
                  text(116 + 110 * i, 16, "start", kind)]
    parts.append(text(100, 34, "start", "a collective is thin while it travels and the rank "
                                        "computes, thick while the rank waits for it"))
    high = 24 * len(recorders[0].optimizer.units) + 44
    for stage, recorder in enumerate(recorders):
        top = 82 + high * stage
        parts.append(text(8, top - 18, "start", f"stage {stage}: {STAGES[stage]}"))
        began = recorder.marks[0]
        parts += panel(recorder, top, lambda time: 100 + scale * 1e3 * (time - began))
    bottom = 54 + high * len(recorders)
    for tick in ticks:
        words = f"{tick:g}" if tick else "0 ms"
        parts.append(text(round(100 + scale * tick, 1), bottom, "middle", words))
    save(path, 900, bottom + 8, parts)


def timeline(path):
    zero.setup(zero.BaseConfig(device="cpu", dtype="fp32", threads=1))
    if dist.get_world_size() == 1:
        raise SystemExit("nothing travels with one process: torchrun --nproc-per-node 2 …")
    recorders = [record(stage) for stage in range(4)]
    if dist.get_rank() == 0:
        draw_timeline(recorders, path)
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
    parts = [text(80 + side, 18 + 15 * i, "end", words) for i, words in enumerate(title)]
    for i, (word, row) in enumerate(zip(words, weights.tolist())):
        y = 8 + 15 * i
        parts.append(text(76, y + 11, "end", word))
        parts.append(text(84 + side, y + 11, "start", "".join(words[i + 1 : i + 2])))
        parts.append(f'<g transform="translate({91 + 15 * i} {side + 14}) rotate(-90)">'
                     f'{text(0, 0, "end", word)}</g>')
        parts.append(line(f"M80 {y + 15}H{95 + 15 * i}V{y}"))
        parts += [box(80 + 15 * j, y, 15, 15, BLUE, weight)
                  for j, weight in enumerate(row) if weight >= 0.01]
    save(path, side + 164, side + 92, parts)


def attention(path, folder, asked):
    net, tokenizer = model.load_model(folder), data.Tokenizer.load(folder)
    messages = [{"role": ("user", "assistant")[i % 2], "content": words}
                for i, words in enumerate(asked)]
    prompt, _ = data.render(messages, tokenizer)
    ends = [tokenizer.text_end, tokenizer.end]
    ids = prompt + model.generate(net, [prompt], 60, ends, temperature=0.0)[0]
    weights = weights_of(net, ids)
    shares = copying(weights, ids, len(prompt))
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    words = [tokenizer.decode([i], specials=True).replace(" ", "·").replace("\n", "⏎")
             for i in ids]
    title = [f"head {head} of layers.{layer}", "on the right: the token written next"]
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
    more = (args.folder, args.ask) if args.what == "attention" else ()
    globals()[args.what](Path(args.out, f"{args.what}.svg"), *more)


if __name__ == "__main__":
    main()

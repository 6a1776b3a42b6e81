"""What a step holds at its worst moment beside what `zero.py plan` counts at rest, predicted:

    python tests/peak.py --model llama-65b --world-size 8     GB on each GPU, of every stage

The prediction walks backward through the layers as zero.AdamW does; tests/test_zero.py compares it
to the byte with live tensors (`zero.Peak`).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import zero  # noqa: E402


def layers(model, world) -> list[tuple[str, int]]:
    """(unit, its padded size) of each layer in the order of forward; a tied one comes twice."""
    order, owner, sizes = [], {}, {}
    for _, path, parameters in zero.named_units(model):
        new = [p for p in parameters if p not in owner]
        owner |= dict.fromkeys(new, path)
        if new:
            count = sum(p.numel() for p in new)
            sizes[path] = -(-count // world) * world  # rounded up
        order.append(owner[parameters[0]])
    return [(path, sizes[path]) for path in order]


def buffers(layers, stage, receiving, overlap=True) -> int:
    """The most elements that a rank holds in a step beside those at rest, walking backward through
    layers(): the gathered layer and the one prefetched (stage 3); the bucket that fills, and the
    one before, in flight (stages 2, 3); what it receives (only gloo needs memory for that)."""
    if stage < 2:
        return receiving * max(size for _, size in layers)
    most = gathered = in_flight = 0
    for i, (unit, size) in reversed(list(enumerate(layers))):
        if stage == 3 and i > 0:  # the embedding's backward reads no weight
            prefetched = layers[i - 1][1] if overlap and i > 1 else 0
            gathered = size + prefetched
        if unit not in dict(layers[:i]):  # else tied: its gradient is whole at the other place
            most = max(most, gathered + size + max(in_flight, receiving * size))
            in_flight = size + receiving * size if overlap else 0
    return most


def main():
    import model

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=model.PRESETS, default="llama-7b")
    parser.add_argument("--world-size", type=int, default=8)
    args = parser.parse_args()
    with torch.device("meta"):  # shapes without memory
        net = model.CausalLM(model.PRESETS[args.model])
    shape = layers(net, args.world_size)
    size = sum(dict(shape).values())
    for width, kind in ((4, "fp32"), (2, "mixed precision")):
        print(f"GB on each of {args.world_size} GPUs, {size:,} parameters, {kind}")
        print(f"{'stage':>12}{'at rest':>12}{'peak':>12}")
        for row in zero.plan(size, args.world_size, width == 2):
            above = width * buffers(shape, row["stage"], receiving=0)  # nccl receives in place
            rest = row["total"] / 1e9
            print(f"{row['stage']:>12}{rest:>12.4g}{rest + above / 1e9:>12.4g}")


if __name__ == "__main__":
    main()

"""Speed beside the machine's limit, taken in turn in one run: `make bench` or `python tests/bench.py [--shape small]`.

The limit is a bare stack of the same matrix products, nothing else: what is between it and a step is what the code (and
everything that is no product) costs. Machines drift, so read the ratios; a time is the median of the rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import zero  # noqa: E402
from model import PRESETS, CausalLM, generate, token_logprobs  # noqa: E402

# name: preset, rows, tokens per row
SHAPES = {"tiny": ("tiny", 16, 128), "small": ("small", 16, 256)}


def layer_products(c):
    """(in, out) of the seven matrices of a block."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return [(c.hidden_size, q), (c.hidden_size, kv), (c.hidden_size, kv), (q, c.hidden_size),
            (c.hidden_size, c.intermediate_size), (c.hidden_size, c.intermediate_size),
            (c.intermediate_size, c.hidden_size)]


def bare_step(c, rows, tokens, dtype):
    """The products of one training step: each matrix once forward and twice backward, attention's two as well."""
    n, work = rows * tokens, []
    for i, o in layer_products(c) * c.num_hidden_layers + [(c.hidden_size, c.vocab_size)]:
        work.append((torch.randn(n, i, dtype=dtype), torch.randn(i, o, dtype=dtype), torch.randn(n, o, dtype=dtype)))
    heads = rows * c.num_attention_heads
    q = torch.randn(heads, tokens, c.head_dim, dtype=dtype)
    p = torch.randn(heads, tokens, tokens, dtype=dtype)

    def run():
        for x, w, g in work:
            x @ w
            g @ w.T
            x.T @ g
        for _ in range(3 * c.num_hidden_layers):
            q @ q.transpose(1, 2)
            p @ q
    flops = sum(6 * x.shape[0] * w.numel() for x, w, _ in work)
    return run, flops + 3 * c.num_hidden_layers * 4 * heads * tokens**2 * c.head_dim


def training_step(c, rows, tokens, dtype):
    optimizer = zero.AdamW(CausalLM(c), dtype=dtype)
    ids = torch.randint(0, c.vocab_size, (rows, tokens + 1))

    def run():
        for part in ids.split(max(1, 2048 // tokens)):  # the scripts' --micro-tokens
            loss = -token_logprobs(optimizer.model, part[:, :-1], part[:, 1:]).sum() / ids.numel()
            optimizer.backward(loss)
        optimizer.step(1e-3)
    return run


def bare_decoding(c, rows, new, dtype):
    """The products of `new` decoding steps: each matrix and the head once per step."""
    matrices = layer_products(c) * c.num_hidden_layers + [(c.hidden_size, c.vocab_size)]
    work = [(torch.randn(rows, i, dtype=dtype), torch.randn(i, o, dtype=dtype)) for i, o in matrices]

    def run():
        for _ in range(new):
            for x, w in work:
                x @ w
    return run


def decoding(c, rows, prompt, new, dtype):
    model = CausalLM(c).to(dtype)
    prompts = torch.randint(0, c.vocab_size, (rows, prompt)).tolist()
    return lambda: generate(model, prompts, new, end_id=-1, temperature=0)


def medians(functions, rounds):
    """Median seconds of each function, one round of all after the other."""
    times = [[] for _ in functions]
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            function()
            if turn:  # the first round warms up
                times[i].append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    zero.setup(zero.BaseConfig())
    preset, rows, tokens = SHAPES[args.shape]
    c = PRESETS[preset]
    print(f"training, {args.shape}: {c.num_parameters():,} parameters, {rows} x {tokens} tokens a step")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        bare, flops = bare_step(c, rows, tokens, dtype)
        a = torch.randn(2048, 2048, dtype=dtype)
        ours, limit, square = medians([training_step(c, rows, tokens, dtype), bare, lambda: a @ a], args.rounds)
        peak = 2 * 2048**3 / square
        print(f"  {name}: {rows * tokens / ours:>9,.0f} tokens/s  {1e3 * ours:7.1f} ms = {ours / limit:.2f} x the bare "
              f"products; {flops / ours / peak:.0%} of the peak of {peak / 1e9:,.0f} GFLOP/s")
    print("generation with cache, prompt 64, 64 new tokens, greedy")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for batch in (1, 32):
            pair = [decoding(c, batch, 64, 64, dtype), bare_decoding(c, batch, 64, dtype)]
            ours, limit = medians(pair, args.rounds)
            print(f"  {name}, {batch:>2} rows: {batch * 64 / ours:>9,.0f} tokens/s, {limit / ours:.0%} of the bare products")


if __name__ == "__main__":
    main()

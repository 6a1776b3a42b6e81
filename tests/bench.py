"""Speed beside the machine's limit, taken in turn in one run: `make bench` or

    python tests/bench.py --shape small    a training step (with --compile also compiled), generation
    python tests/bench.py --shape gpt2 --only training --nanogpt DIR    beside a checkout of nanoGPT, and transformers
                                                                        if installed
    python tests/bench.py --sizes          a step's time and memory from 2M to 354M parameters
    python tests/bench.py --rlhf           a step of SFT, reward model and DPO, an iteration of PPO
    torchrun --nproc-per-node 2 tests/bench.py --rlhf --stage 3     the same batches on two processes

    python tests/bench.py --bits out/base --text out/data/heldout.jsonl    a model's weights in 32, 16 and 8 bits

ZeRO beside torch's DDP and FSDP2:  torchrun --nproc-per-node 2 tests/bench.py --zero [--dtype bf16] [--memory NAME]

The limit is a bare stack of the same matrix products, nothing else: what is between it and a step is what the code (and
everything that is no product) costs. Machines drift, so read the ratios; a time is the median of the rounds.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import dpo  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
import zero  # noqa: E402
from data import Tokenizer, micro_batches, read_texts  # noqa: E402
from model import PRESETS, CausalLM, ModelConfig, ScalarModel, generate, lighten, load_model  # noqa: E402
from model import token_logprobs  # noqa: E402

CHAR = ModelConfig(65, 128, 352, 4, 4, 4, max_position_embeddings=64)  # nanoGPT's CPU recipe
GPT2 = ModelConfig(50304, 768, 2048, 12, 12, 12, max_position_embeddings=1024)
SMOLLM2 = ModelConfig(49152, 576, 1536, 30, 9, 3, max_position_embeddings=2048)  # of 135M parameters
# name: model, rows, tokens per row
SHAPES = {"tiny": (PRESETS["tiny"], 16, 128), "small": (PRESETS["small"], 16, 256), "char": (CHAR, 12, 64),
          "gpt2": (GPT2, 4, 512), "gpt2-long": (GPT2, 2, 1024), "smollm2": (SMOLLM2, 4, 512)}
SIZES = [PRESETS["tiny"], PRESETS["small"], ModelConfig(16384, 512, 1376, 12, 8, 8), GPT2,
         ModelConfig(50304, 1024, 2736, 24, 16, 16)]
# what the scripts ask of a tokenizer; no sample is ever -1, so that all replies have their full length
TOKENIZER = SimpleNamespace(pad=0, end=-1, text_end=-1, special=lambda name: 1)


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


def training_step(c, rows, tokens, dtype, compiled=False):
    optimizer = zero.AdamW(CausalLM(c), dtype=dtype)
    for block in optimizer.model.model.layers if compiled else ():
        block.forward = torch.compile(block.forward)
    ids = torch.randint(0, c.vocab_size, (rows, tokens + 1))
    return lambda: take_step(optimizer, ids)


def take_step(optimizer, ids):
    """On ids (rows, T+1)."""
    for part in ids.split(max(1, 2048 // (ids.shape[1] - 1))):  # the scripts' --micro-tokens
        loss = -token_logprobs(optimizer.model, part[:, :-1], part[:, 1:]).sum() / ids.numel()
        optimizer.backward(loss)
    optimizer.step(1e-3)


def held() -> int:
    """Bytes of this process (RSS) now; the next peak_memory() tells the most from here on."""
    zero.peak_memory(torch.device("cpu"))
    return zero.peak_memory(torch.device("cpu"))


def sizes(dtype, rounds):
    """A step of 4 and of 8 rows of 256 tokens; the most memory beside what is planned at rest and what the forward of 8 rows
    keeps for backward."""
    print(f"{'parameters':>12}{'4 rows':>10}{'8 rows':>10}{'tokens/s':>10}{'ps each':>9}{'x bare':>8}"
          f"{'peak':>9}{'plan':>8}{'kept':>8}   (ps of a parameter and token; GB)")
    for c in SIZES:
        before = held()
        optimizer = zero.AdamW(CausalLM(c), dtype=dtype)
        ids = torch.randint(0, c.vocab_size, (8, 257))
        take_step(optimizer, ids)
        peak = zero.peak_memory(torch.device("cpu")) - before
        kept = zero.saved_bytes(lambda model: token_logprobs(model, ids[:, :-1], ids[:, 1:]), optimizer.model)
        bare, _ = bare_step(c, 8, 256, dtype)
        few, all_rows, limit = medians([lambda: take_step(optimizer, ids[:4]), lambda: take_step(optimizer, ids), bare], rounds)
        count = c.num_parameters()
        planned = zero.plan(count, 1, dtype.itemsize == 2)[0]["total"]
        print(f"{count:>12,}{few:>9.2f}s{all_rows:>9.2f}s{2048 / all_rows:>10,.0f}{1e12 * all_rows / 2048 / count:>9.1f}"
              f"{all_rows / limit:>8.2f}{peak / 1e9:>9.2f}{planned / 1e9:>8.2f}{kept / 1e9:>8.2f}", flush=True)
        del optimizer, bare


def their_llama(c):
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {key: value for key, value in vars(c).items() if key not in ("model_type", "rope_scaling")}
    return LlamaForCausalLM(LlamaConfig(**known, attn_implementation="sdpa"))


def peers(c, rows, tokens, dtype, nanogpt):
    """{name: a step} of transformers' Llama, where it is installed, and of nanoGPT, whose MLP has two matrices of 4·C where
    ours has three of 8/3·C; fp32 weights, 16 bits by autocast, torch's AdamW (fused for Llama), as their recipes have it."""
    built, ids = {}, torch.randint(0, c.vocab_size, (rows, tokens + 1))
    if nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt, "model.py"))
        sys.modules["nanogpt"] = theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        gpt = theirs.GPT(theirs.GPTConfig(c.max_position_embeddings, c.vocab_size, c.num_hidden_layers,
                                          c.num_attention_heads, c.hidden_size, dropout=0.0, bias=False))
        built["nanoGPT"] = gpt, False, lambda: gpt(ids[:, :-1], ids[:, 1:].contiguous())[1]
    with contextlib.suppress(ImportError):
        llama = their_llama(c)
        built["transformers"] = llama, True, lambda: llama(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss

    def step(model, fused, loss):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)

        def run():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                result = loss()
            result.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return run
    return {name: step(*parts) for name, parts in built.items()}


def bare_decoding(c, rows, prompt, new, dtype):
    """The products of a prompt's forward and `new - 1` decoding steps: each matrix, laid out as in the model, attention's
    two over what each layer's cache holds in the middle of the run, and the head on the last token."""
    sizes = layer_products(c) * c.num_hidden_layers
    weights = [torch.randn(o, i, dtype=dtype) for i, o in sizes]
    head, last = torch.randn(c.vocab_size, c.hidden_size, dtype=dtype), torch.randn(rows, c.hidden_size, dtype=dtype)
    K, group, length = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, prompt + new // 2

    def forward(tokens, length):
        x = {i: torch.randn(rows * tokens, i, dtype=dtype) for i, _ in sizes}
        q, p = (torch.randn(rows, K, group * tokens, n, dtype=dtype) for n in (c.head_dim, length))
        caches = [torch.randn(2, rows, K, length, c.head_dim, dtype=dtype) for _ in range(c.num_hidden_layers)]

        def run():
            for w in weights:
                x[w.shape[1]] @ w.T
            for k, v in caches:
                q @ k.transpose(2, 3)
                p @ v
            last @ head.T
        return run
    first, later = forward(prompt, prompt), forward(1, length)

    def run():
        first()
        for _ in range(new - 1):
            later()
    return run


def decoding(c, rows, prompt, new, dtype):
    model = CausalLM(c).to(dtype)
    prompts = torch.randint(0, c.vocab_size, (rows, prompt)).tolist()
    return lambda: generate(model, prompts, new, end_id=-1, temperature=0)


def their_decoding(c, rows, prompt, new, dtype):
    """transformers' generate, greedy, on the same prompts."""
    model = their_llama(c).to(dtype).eval()
    ids = torch.randint(0, c.vocab_size, (rows, prompt))
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return lambda: model.generate(ids, **options)


def random_rows(c, count, prompt, reply):
    """(ids, mask) of rows whose last `reply` tokens are trained."""
    ids = torch.randint(2, c.vocab_size, (count, prompt + reply)).tolist()
    return [(row, [0] * prompt + [1] * reply) for row in ids]


def later_steps(c, dtype, stage=0):
    """{name: (a function that builds a step, the tokens of one)}: 8 rows or pairs of 256 tokens over all processes; of DPO's the
    last 128 are the reply."""
    rows, pairs = random_rows(c, 8, 0, 256), [random_rows(c, 2, 128, 128) for _ in range(8)]
    cfg, share = dpo.Config(), (dist.get_rank(), dist.get_world_size())
    by_row, by_pair = (micro_batches([256] * 8, cfg.micro_tokens, *share, rows=[n] * 8) for n in (1, 2))

    def sft_loss(model, part):
        return sft.nll_sum(model, [rows[i] for i in part], TOKENIZER, "cpu") / sft.target_count(rows)

    def reward_loss(model, part):
        scores = reward.score_groups(model, [[ids for ids, _ in pairs[i]] for i in part], TOKENIZER, "cpu")
        return sum(reward.bradley_terry_loss(s, torch.tensor([1.0, 0.0])) for s in scores) / len(pairs)

    def step(kind, parts, loss):
        optimizer = zero.AdamW(kind(c), stage, dtype)

        def run():
            for part in parts:
                optimizer.backward(loss(optimizer.model, part))
            optimizer.step(1e-5)
        return run

    def dpo_step(keep):
        frozen = zero.Sharded(CausalLM(c).requires_grad_(False), stage, dtype)

        @torch.no_grad()
        def reference(part):
            sides = dpo.sequence_logprobs(frozen.model, [pairs[i] for i in part], TOKENIZER, "cpu")
            return list(zip(*(side.tolist() for side in sides)))
        kept = reference(range(8)) if keep else None

        def dpo_loss(model, part):
            known = [kept[i] for i in part] if keep else reference(part)
            return dpo.pair_losses(model, [pairs[i] for i in part], known, TOKENIZER, cfg, "cpu")[0] / len(pairs)
        return step(CausalLM, by_pair, dpo_loss)
    return {"SFT": (lambda: step(CausalLM, by_row, sft_loss), 2048),
            "reward model": (lambda: step(ScalarModel, by_pair, reward_loss), 4096),
            "DPO, reference cached": (lambda: dpo_step(True), 4096),
            "DPO, reference computed": (lambda: dpo_step(False), 4096)}


def ppo_phases(c, dtype, stage=0, rows=32, epochs=4):
    """The parts of an iteration, to be run in turn: prompts x (64 + 64) tokens, epochs of one step."""
    cfg = ppo.Config(batch_size=rows, max_new_tokens=64, ppo_epochs=epochs, minibatches=1)
    policy, value = (zero.AdamW(kind(c), stage, dtype) for kind in (CausalLM, ScalarModel))
    frozen = [zero.Sharded(kind(c).requires_grad_(False), stage, dtype) for kind in (CausalLM, ScalarModel)]
    queries, rollouts = [ids for ids, _ in random_rows(c, rows, 64, 0)], []

    def respond():
        rollouts[:] = ppo.respond(policy, queries, range(rows), TOKENIZER, cfg)
    return (respond, lambda: ppo.experience(policy, value, *frozen, rollouts, 0.05, (0.0, 1.0), TOKENIZER, cfg, "cpu"),
            lambda: ppo.update(policy, value, rollouts, None, 0, TOKENIZER, cfg, "cpu", 0.1))


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


def rlhf(c, dtype, stage, rounds):
    """Each alone, with the peak RSS of rank 0. A larger model replies to fewer prompts, and learns from them once."""
    cpu = torch.device("cpu")
    zero.print0(f"{c.num_parameters():,} parameters, a step of 8 rows or pairs of 256 tokens, every token counted once")
    for name, (build, tokens) in later_steps(c, dtype, stage).items():
        held()
        step = build()
        [seconds] = medians([step], rounds)
        zero.print0(f"  {name:<23} {tokens / seconds:>7,.0f} tokens/s  {1e3 * seconds:8.1f} ms  "
                    f"{zero.peak_memory(cpu) / 1e9:.2f} GB")
        del step
    rows, epochs = (32, 4) if c.num_parameters() < 5e7 else (8, 1)
    held()
    phases = ppo_phases(c, dtype, stage, rows, epochs)
    sampled, scored, learned = medians(phases, rounds)
    zero.print0(f"  PPO, {rows} x (64 + 64) tokens, {epochs} epochs: {sampled + scored + learned:.2f} s = generation {sampled:.2f} "
                f"({rows * 64 / sampled:,.0f} tokens/s) + scoring {scored:.2f} + update {learned:.2f}  "
                f"{zero.peak_memory(cpu) / 1e9:.2f} GB")


@torch.no_grad()
def bits_per_byte(model, windows, size):
    """Of windows (n, T+1) of a text of so many bytes."""
    nats = 0.0
    for part in windows.split(16):
        logits = model(part[:, :-1]).float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2) / size


def fewer_bits(folder, text, rounds):
    """Size, loss and decoding speed (128 tokens after 64, one row and 16) of a model in 32, 16 and 8 bits."""
    tokenizer, models = Tokenizer.load(folder), {bits: load_model(folder) for bits in (32, 16, 8)}
    sizes = {bits: lighten(model, bits) for bits, model in models.items()}
    ids = tokenizer.encode("".join(read_texts(text)[:300]))
    windows = torch.tensor(ids[: len(ids) // 128 * 128 + 1]).unfold(0, 129, 128)
    size = len(tokenizer.decode(windows[:, 1:].flatten().tolist()).encode())
    prompts = windows[:16, :64].tolist()
    functions = [functools.partial(generate, model, prompts[:rows], 128, -1, temperature=0)
                 for rows in (1, 16) for model in models.values()]
    times = medians(functions, rounds)
    for i, (bits, model) in enumerate(models.items()):
        print(f"{bits:>3} bits: {sizes[bits] / 1e6:8.1f} MB, {bits_per_byte(model, windows, size):.4f} bits per byte, "
              f"decoding {128 / times[i]:,.0f} tokens/s, 16 rows {16 * 128 / times[3 + i]:,.0f}")


# ---- ZeRO: the same model, data and AdamW under our stages, DDP and FSDP2

SHAPE_25M = dict(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
                 num_key_value_heads=8, max_position_embeddings=256)
TINY_LR = 1e-4


def contestants(dtype):
    """{name: function that builds one}; a built one is a function that takes a step with ids (rows, T+1)."""
    def ours(stage, overlap=True):
        optimizer = zero.AdamW(CausalLM(ModelConfig(**SHAPE_25M)), stage, dtype, overlap=overlap, grad_clip=1.0)

        def step(ids):
            optimizer.backward(-token_logprobs(optimizer.model, ids[:, :-1], ids[:, 1:]).mean() / dist.get_world_size())
            optimizer.step(TINY_LR)
        return step

    class Loss(torch.nn.Module):  # torch's wrappers see forward() only
        def __init__(self):
            super().__init__()
            self.net = CausalLM(ModelConfig(**SHAPE_25M))

        def forward(self, ids):
            return -token_logprobs(self.net, ids[:, :-1], ids[:, 1:]).mean()

    def theirs(sharded):
        model = Loss()
        if sharded:
            options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
            if dtype != torch.float32:  # fp32 shards, 16-bit copies for computing: FSDP2's mixed precision
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
            for block in model.net.model.layers:
                fully_shard(block, **options)
            fully_shard(model, **options)
        else:
            model = DistributedDataParallel(model.to(dtype))
        wide = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": wide, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=TINY_LR, betas=(0.9, 0.95))

        def step(ids):
            optimizer.zero_grad()
            model(ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return step

    return {"DDP": lambda: theirs(False), "FSDP2": lambda: theirs(True),
            **{f"stage {s}": functools.partial(ours, s) for s in range(4)},
            **{f"stage {s}, no overlap": functools.partial(ours, s, False) for s in (2, 3)}}


def zero_main(args):
    """Milliseconds of a step, one of each in turn; with --memory NAME the peak RSS of that one alone."""
    dtype = zero.DTYPES[args.dtype]
    zero.setup(zero.BaseConfig(threads=1, dtype=args.dtype))
    every = contestants(dtype)
    ids = torch.randint(0, SHAPE_25M["vocab_size"], (4, 129))
    if args.memory:
        step = every[args.memory]()
        zero.peak_memory(torch.device("cpu"))
        for _ in range(4):
            step(ids)
        zero.print0(f"{args.memory}: peak RSS {zero.peak_memory(torch.device('cpu')) / 1e6:.0f} MB")
        return
    functions = {name: functools.partial(build(), ids) for name, build in every.items()}
    times = dict(zip(functions, medians(list(functions.values()), args.rounds)))
    for name, seconds in times.items():
        zero.print0(f"{name:<20}{1e3 * seconds:8.1f} ms  {seconds / times['DDP']:.2f} x DDP  "
                    f"{seconds / times['FSDP2']:.2f} x FSDP2")


def time_training(args, c, rows, tokens):
    print(f"training, {args.shape}: {c.num_parameters():,} parameters, {rows} x {tokens} tokens a step")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        bare, flops = bare_step(c, rows, tokens, dtype)
        a = torch.randn(2048, 2048, dtype=dtype)
        steps = {name: training_step(c, rows, tokens, dtype)}
        if args.compile:
            steps[f"{name} compiled"] = training_step(c, rows, tokens, dtype, compiled=True)
        others = peers(c, rows, tokens, dtype, args.nanogpt)
        steps |= {f"{name} {peer}": step for peer, step in others.items()}
        *times, limit, square = medians([*steps.values(), bare, lambda: a @ a], args.rounds)
        peak = 2 * 2048**3 / square
        for kind, ours in zip(steps, times):
            print(f"  {kind:<17}: {rows * tokens / ours:>9,.0f} tokens/s  {1e3 * ours:7.1f} ms = {ours / limit:.2f} x the "
                  f"bare products; {flops / ours / peak:.0%} of the peak of {peak / 1e9:,.0f} GFLOP/s")


def time_generation(args, c):
    print(f"generation with cache, prompt {args.prompt}, 128 new tokens, greedy")
    contestants = [decoding, bare_decoding]
    if importlib.util.find_spec("transformers"):
        contestants.append(their_decoding)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for batch in (1, 16, 32):
            built = [function(c, batch, args.prompt, 128, dtype) for function in contestants]
            with torch.no_grad():
                ours, limit, *theirs = medians(built, args.rounds)
            beside = "".join(f", transformers {batch * 128 / seconds:,.0f}" for seconds in theirs)
            print(f"  {name}, {batch:>2} rows: {batch * 128 / ours:>6,.0f} tokens/s, {limit / ours:.0%} of the products{beside}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: tiny, with --rlhf small")
    parser.add_argument("--rounds", type=int, help="default: 7, with --zero 21")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nanogpt", default="", metavar="DIR", help="a checkout, to be timed in turn")
    parser.add_argument("--only", default="", choices=["training", "generation"])
    parser.add_argument("--prompt", type=int, default=64, help="its tokens, in generation")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--rlhf", action="store_true")
    parser.add_argument("--stage", type=int, default=0, choices=range(4), help="of ZeRO, with --rlhf")
    parser.add_argument("--zero", action="store_true")
    parser.add_argument("--bits", default="", metavar="FOLDER", help="a checkpoint, in 32, 16 and 8 bits")
    parser.add_argument("--text", default="out/data/heldout.jsonl", help="with --bits: its loss is measured on this")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32, with --rlhf and --sizes bf16")
    parser.add_argument("--memory", default="")
    args = parser.parse_args()
    args.rounds = args.rounds or (21 if args.zero else 7)
    args.dtype = args.dtype or ("bf16" if args.rlhf or args.sizes else "fp32")
    args.shape = args.shape or ("small" if args.rlhf else "tiny")
    dtype = zero.DTYPES[args.dtype]
    if args.zero:
        return zero_main(args)
    zero.setup(zero.BaseConfig(threads=args.threads, dtype=args.dtype, zero=args.stage))
    if args.sizes:
        return sizes(dtype, args.rounds)
    if args.bits:
        return fewer_bits(args.bits, args.text, args.rounds)
    c, rows, tokens = SHAPES[args.shape]
    if args.rlhf:
        return rlhf(c, dtype, args.stage, args.rounds)
    if args.only != "generation":
        time_training(args, c, rows, tokens)
    if args.only != "training" and c.max_position_embeddings >= args.prompt + 128:  # room for the replies
        time_generation(args, c)


if __name__ == "__main__":
    main()

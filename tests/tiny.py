"""A tiny world for whole runs: texts, a checkpoint, a script's `main` watched from outside, and the
loop that it must equal, written as plainly as torch allows."""

import importlib
import io
import json
import math
import os
import re
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import zero
from data import Tokenizer
from model import CausalLM, ModelConfig, read_safetensors, save_model, write_safetensors

TOK = Tokenizer.from_merges([(97, 98), (256, 256)])  # "ab" and "abab": not just bytes
SHAPE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
# What is held out of a text, its last fourth, has other words than the rest.
DOCUMENTS = [f"The {who} ate {n} bonbons, 糖果." for n, who in enumerate(
    ("cat", "dog", "old farmer", "ox", "bird in the tree", "cow") * 2)]
DOCUMENTS += [f"zqzq {'zq' * n} 水水水" for n in range(4)]
MORE = "More about abab, 更多。" * 6 + "zq" * 19
HELD = "Not seen before: 没见过的字, longer than a window."


def talk(*texts, first="user"):
    """A record of alternating roles, from `first` on."""
    roles = ("user", "assistant")
    start = roles.index(first)
    return {"messages": [{"role": roles[(start + i) % 2], "content": text}
                         for i, text in enumerate(texts)]}


# One prompt is longer than the model's 64 positions, one has no reply, one reply is cut at 40, one
# is empty: as bare text an end token with nothing before it. The others differ in length.
TALKS = [talk("say ab", "ok abab"), talk("x" * 70, "y"), talk("one", "two", "three", "four!"),
         talk("nobody answers"), talk("long?", "n" * 60),
         talk("hello", "ask", "so", first="assistant"), talk("", "and?", first="assistant"),
         *(talk("q" + "ab?" * i, "a" * (17 - i)) for i in range(8))]
OTHER = [talk("other?", "x" * i) for i in range(1, 8)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def checkpoint(folder, seed=1):
    """The folder of a model with TOK's vocabulary, its weights neither small nor special."""
    torch.manual_seed(seed)
    net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE))
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    save_model(folder, net)
    TOK.save(folder)


def shard(folder, more={}):
    """The weights of a folder in two files, with an index that names them, as large models come."""
    tensors = list((read_safetensors(folder / "model.safetensors") | more).items())
    weight_map = {}
    for i, part in enumerate((tensors[:5], tensors[5:]), 1):
        name = f"model-{i}-of-2.safetensors"
        shapes = {name: tensor.shape for name, tensor in part}
        write_safetensors(folder / name, shapes, torch.float32, part)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def furnish(folder):
    """Writes texts, conversations and a checkpoint to start from."""
    write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    (folder / "more.txt").write_text(MORE, encoding="utf-8")
    (folder / "held.txt").write_text(HELD, encoding="utf-8")
    write_jsonl(folder / "talks.jsonl", TALKS)
    write_jsonl(folder / "held.jsonl", OTHER)
    checkpoint(folder / "base")
    return folder


def watched(rank, name, config):
    """Runs the main of script `name` as one rank of the standing process group.

    "result", "printed" and the "written" files; "forwards": for each optimizer step, and at the end
    for the judging, the (rows, tokens, with gradient?) of each forward pass, generation left out;
    "flags": what the optimizer and the model were told.
    """
    script = importlib.import_module(name)
    plain_step, plain_replace = zero.AdamW.step, os.replace
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    forwards, flags, written = [[]], {}, []

    def look(module, args):
        if isinstance(module, nn.Embedding) and not torch.is_inference_mode_enabled():
            forwards[-1].append((*args[0].shape, torch.is_grad_enabled()))

    def step(optimizer, lr):
        forwards.append([])
        flags.update({k: v for k, v in vars(optimizer).items() if isinstance(v, (bool, int))})
        flags["stage"] = optimizer.split_state + optimizer.split_grads + optimizer.split_params
        flags["checkpointing"] = optimizer.model.model.activation_checkpointing
        return plain_step(optimizer, lr)

    def replace(source, target):  # how every file comes to its name
        written.append(str(target))
        plain_replace(source, target)

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.setattr(zero.AdamW, "step", step)
            patch.setattr(os, "replace", replace)
            result = script.main(config)
    finally:
        hook.remove()
        for number, handler in handlers.items():  # a run takes them over
            signal.signal(number, handler)
    return {"result": result, "printed": printed.getvalue(), "written": written,
            "forwards": forwards, "flags": flags}


def logged(out):
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tokens_logged(out, printed):
    """The tokens of a run, from its last line's tokens per second and the seconds until then."""
    steps = len(logged(out))
    per_second = re.search(rf" {steps}/{steps} .* ([\d,]+) tokens/s", printed)[1]
    return int(per_second.replace(",", "")) * logged(out)[-1]["seconds"]


def nll(net, ids, mask=None):
    """Sum of -log p of a row's tokens where mask is 1 (none: everywhere), and their number. The
    first has nothing before it and is no target. One row by itself: there is no padding."""
    ids = torch.as_tensor(ids)
    targets = [t for t in range(1, len(ids)) if mask is None or mask[t]]
    logprobs = net(ids[None])[0].log_softmax(-1)
    return -sum(logprobs[t - 1, ids[t]] for t in targets), len(targets)


def mean_nll(net, rows):
    """Over all targets of rows of (ids, mask)."""
    sums, counts = zip(*(nll(net, ids, mask) for ids, mask in rows))
    return sum(sums) / sum(counts)


def train_plainly(net, losses_of, cfg, steps):
    """Trains net on one process, without micro-batches; losses_of(step) is {name: (loss, its
    weight)}. Returns what a script must have logged."""
    trained = [p for p in net.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cfg.weight_decay},
         {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    rise, records = round(cfg.warmup * steps), []
    for step in range(steps):
        losses = losses_of(step)
        sum(weight * loss for loss, weight in losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip).item()
        assert norm > cfg.grad_clip, "what is not clipped could not tell whether clipping works"
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))
        share = (step + 1) / rise if step < rise else cfg.min_lr + (1 - cfg.min_lr) * fall
        for group in optimizer.param_groups:
            group["lr"] = share * cfg.lr
        optimizer.step()
        optimizer.zero_grad()
        values = {name: loss.item() for name, (loss, _) in losses.items()}
        records.append({"step": step, **values, "grad_norm": norm, "lr": share * cfg.lr})
    return records

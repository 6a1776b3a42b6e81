"""Pretraining (预训练): a randomly initialised transformer learns to predict the next token.

    python pretrain.py --tokenizer out/data               the default world (make data makes it)
    python pretrain.py --data book.txt --out out/book     a file of your own, with its own tokenizer
    torchrun --nproc-per-node 2 pretrain.py --zero 3      the same batches on two processes

Documents: D0 4.2.1, D2 第2节, D4 第2节. The task is causal language modelling; masked words and
next-sentence prediction (D1 lists them) are BERT's tasks. Windows are cut anywhere, so a document
may see the end of the one before it.
Expect: the first loss is ln V + ½·C·σ², printed beside the measured one; the loss falls quickly for
a hundred steps, then slowly. It is per token and depends on the tokenizer: compare bits per byte.
"""

import json
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import SPECIALS, Tokenizer, Tokens, collate, my_micro_batches, read_parts, train_bpe
from model import IGNORE, CausalLM, ModelConfig, expected_first_loss, generate, load_model
from model import save_model, token_logprobs, weight_files, widen
from zero import Run, RunConfig, Sharded, all_sum, launch, lr_at, optimizer_of, prepared, print0
from zero import setup, write_json


@dataclass
class Config(RunConfig):
    out: str = "out/base"  # folder of this run
    data: str = "out/data/corpus.jsonl"  # text: .txt, or .json/.jsonl with "text"; comma-separated
    mix: str = ""  # each file's share of the training tokens, "0.7,0.3"; empty: as much as it has
    val_data: str = ""  # held-out text; empty: the end of --data
    val_fraction: float = 0.05  # how much of the end of --data is held out
    tokenizer: str = ""  # folder of a tokenizer.json; empty: one is trained on --data
    vocab_size: int = 2048  # of a tokenizer trained here, special tokens included (263: bytes)
    init: str = ""  # continue from this checkpoint; empty: random weights
    teacher: str = ""  # a model with the same tokenizer to learn from as well (distillation)
    temperature: float = 4.0  # at which teacher and student are compared
    alpha: float = 0.7  # the teacher's weight in the loss; the text's is the rest
    context: int = 128  # tokens per training window
    max_position_embeddings: int = 256  # longest sequence the model will ever take
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True  # one matrix for embedding and head
    steps: int = 1600  # optimizer steps
    batch_size: int = 16  # windows per optimizer step over all processes
    lr: float = 3e-3  # peak learning rate, after warmup
    compile: bool = False  # the blocks by torch.compile: seconds of compiling, then faster steps


def corpus(cfg, inputs) -> tuple[Tokenizer, Tokens, Tokens]:
    """Tokenizer, training tokens, held-out tokens; one process a machine makes them, all wait.
    inputs: {path: sha256} of the texts."""
    out = Path(cfg.out)
    split = 1.0 if cfg.val_data else 1 - cfg.val_fraction
    source = cfg.tokenizer or cfg.init or cfg.teacher
    if not source:
        own_tokenizer(cfg, split, inputs)
    tokenizer = Tokenizer.load(source or out)
    train = Tokens(out / "train.bin", cfg.data, tokenizer, (0.0, split), cfg.mix)
    held_out = (0.0, 1.0) if cfg.val_data else (split, 1.0)
    mix = "" if cfg.val_data else cfg.mix
    val = Tokens(out / "val.bin", cfg.val_data or cfg.data, tokenizer, held_out, mix)
    for tokens in (train, val):
        prepared(tokens.ready, tokens.build)
    return tokenizer, train.open(cfg.context), val.open(cfg.context, least=0)


def own_tokenizer(cfg, split, inputs):
    """Trains a tokenizer on the first `split` of --data, unless --out holds the one that these
    texts and this vocabulary give: beside it stands the recipe it was made by."""
    recipe = [cfg.vocab_size, split, inputs] + [cfg.mix] * bool(cfg.mix)
    path = Path(cfg.out) / "tokenizer.recipe.json"

    def ready():
        return path.exists() and json.loads(path.read_text(encoding="utf-8")) == recipe

    def build():
        files = read_parts(cfg.data, (0.0, split), cfg.mix)  # never the held-out text
        merges = train_bpe(chain(*files), cfg.vocab_size - len(SPECIALS))
        Tokenizer.from_merges(merges).save(cfg.out)
        write_json(path, recipe)

    prepared(ready, build)


def batch_of(windows, device):
    """Input ids and targets (B, T) of windows (T+1,); IGNORE behind a shorter one's end."""
    rows = [(ids, [1] * len(ids)) for ids in windows]
    return collate(rows, 0, device)


def nll_sum(model, windows, device):
    """Summed negative log-likelihood of windows (T+1,): all tokens but each first are targets."""
    return -token_logprobs(model, *batch_of(windows, device)).sum()


def distilled_sum(student, teacher, windows, cfg, device):
    """The same sum for a student, 1 - α of it, and α of what it costs to say otherwise than the
    teacher: KL(teacher ‖ student) of all next tokens, both flattened by a temperature T. That makes
    the gradient about 1/T² as large, hence · T² (Hinton et al. 2015; D4 5.4.1)."""
    T = cfg.temperature
    input_ids, targets = batch_of(windows, device)  # (B, T) each
    said = targets != IGNORE
    logits = widen(student(input_ids)[said])  # (N, V)
    with torch.no_grad():
        taught = (widen(teacher(input_ids)[said]) / T).log_softmax(-1)
    learned = (logits / T).log_softmax(-1)
    apart = (taught.exp() * (taught - learned)).sum()
    nll = F.cross_entropy(logits, targets[said], reduction="sum")
    return (1 - cfg.alpha) * nll + cfg.alpha * T**2 * apart


@torch.no_grad()
def evaluate(model, tokens, cfg, device) -> dict:
    """Loss per token and bits per byte of the held-out text: each token is scored once, with up to
    --context tokens before it. {}: there is none."""
    windows = tokens.windows()
    if not windows:
        return {}
    mine = 0.0
    for part in my_micro_batches([len(window) for window in windows], cfg.micro_tokens):
        mine += float(nll_sum(model, [windows[i] for i in part], device))
    [nats] = all_sum(mine, device=device)
    bits = nats / math.log(2)
    return {"loss": nats / (len(tokens.ids) - 1), "bits_per_byte": bits / tokens.bytes}


def open_model(cfg, tokenizer):
    """The checkpoint --init, or random weights in the shape of the flags."""
    if cfg.init:
        return load_model(cfg.init)
    names = [name for name in ModelConfig.__dataclass_fields__ if hasattr(cfg, name)]
    shape = {name: getattr(cfg, name) for name in names}
    shape["vocab_size"] = tokenizer.vocab_size  # can be less than was asked for
    return CausalLM(ModelConfig(**shape))


def open_teacher(cfg, student, device, dtype):
    """The frozen --teacher, split over the ranks as the student is; None: there is none."""
    if not cfg.teacher:
        return None
    teacher = load_model(cfg.teacher).requires_grad_(False)
    if teacher.config.vocab_size != student.config.vocab_size:
        raise SystemExit(f"{cfg.teacher}: knows {teacher.config.vocab_size:,} tokens, the student "
                         f"{student.config.vocab_size:,}; --tokenizer has to be the teacher's")
    return Sharded(teacher, cfg.zero, dtype, device)


def show_sample(model, val, tokenizer):
    """What a base model does with a text: it goes on."""
    start = tokenizer.encode(tokenizer.decode(val.ids[:8].tolist()) or "\n")
    [ids] = generate(model, [start], 40, tokenizer.text_end, temperature=0.8)
    print(f"sample: {tokenizer.decode(start)!r} → {tokenizer.decode(ids)!r}", flush=True)


def main(cfg):
    # 1. data
    device, dtype = setup(cfg)
    files = [*cfg.data.split(","), *filter(None, cfg.val_data.split(","))]
    files += weight_files(cfg.init) if cfg.init else []
    files += weight_files(cfg.teacher) if cfg.teacher else []
    files += [f"{cfg.tokenizer}/tokenizer.json"] if cfg.tokenizer else []
    run = Run(cfg, cfg.steps, inputs=files)
    tokenizer, train, val = corpus(cfg, run.record["inputs"])
    per_step = cfg.batch_size * cfg.context  # target tokens

    # 2. model
    model = open_model(cfg, tokenizer)
    teacher = open_teacher(cfg, model, device, dtype)
    optimizer = optimizer_of(model, cfg, device, dtype)
    compiled = model.model.layers if cfg.compile else ()
    for block in compiled:
        block.forward = torch.compile(block.forward)  # without ZeRO-3's hooks around it
    print0(f"{model.config.num_parameters():,} parameters, {len(train.ids):,} training tokens "
           f"({train.bytes / len(train.ids):.2f} bytes each), {per_step:,} per step, "
           f"{cfg.steps * per_step / len(train.ids):.1f} passes, {len(val.ids):,} held-out tokens")

    # 3. loop
    for step in range(run.resume(model=optimizer), cfg.steps):
        windows = train.batch(cfg.seed, step, cfg.batch_size)  # (batch_size, context + 1)
        loss = 0.0
        for part in my_micro_batches([cfg.context] * cfg.batch_size, cfg.micro_tokens):
            if teacher:
                partial = distilled_sum(model, teacher.model, windows[part], cfg, device)
            else:
                partial = nll_sum(model, windows[part], device)
            partial = partial / per_step
            optimizer.backward(partial)
            loss += partial.item()
        lr = lr_at(step, cfg.steps, cfg.lr, cfg.warmup, cfg.min_lr)
        norm = optimizer.step(lr)
        [loss] = all_sum(loss, device=device)
        if step == 0 and not cfg.init and not teacher:
            expected = expected_first_loss(model.config)
            print0(f"first loss {loss:.3f}, expected {expected:.3f} (ln V + C·σ²/2)")
        run.log(step, tokens=per_step, loss=loss, grad_norm=norm, lr=lr)
        run.boundary(step, model=optimizer)
    for block in compiled:
        del block.forward  # what follows has rows of all lengths: each would be compiled

    # 4. judge
    with optimizer.gathered():
        result = evaluate(model, val, cfg, device)
        if dist.get_rank() == 0:
            show_sample(model, val, tokenizer)

    # 5. save
    save_model(cfg.out, model, optimizer.full_parameters(), dist.get_rank() == 0, tokenizer)
    run.finish(**result)
    return result


if __name__ == "__main__":
    launch(main, Config)

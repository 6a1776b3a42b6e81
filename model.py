"""A decoder-only transformer, written out: the model that every stage trains.

    python model.py            the presets with their sizes (D0 4.2.1, D2 第2节, beside 12·L·C²)
    python model.py out/sft    chat with a checkpoint (--prompt "..." asks once and ends)
    python model.py out/sft --prompts questions.jsonl --out answers.jsonl
    python model.py merge out/lora --out out/whole    LoRA into the weights of its base

Llama's architecture under Hugging Face's names, so that a checkpoint is an ordinary Hugging Face
folder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; Qwen2's query-key-value bias and
Qwen3's query-key norm by `model_type`; Mistral is Llama in a context of its window. Shapes in
comments: B rows, T tokens, C = hidden_size, H heads, K key-value heads, D head_dim, V vocabulary,
S keys that a token may look at, P positions.

The documents draw attention without a causal mask, heads or batch (D4 2.2); here the mask is the
point: position t reads positions <= t only, which makes next-token prediction an honest task (CLM,
因果语言模型).
"""

import argparse
import json
import math
import os
import sys
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

# A CPU thread that waits gives up its core soon: where other processes compute too, threads that
# keep it make a step ten times slower. It has to be said before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FAST = True  # False: norm, rotation, attention and log-probabilities by their formulas alone
IGNORE = -100  # "not a target": the label of every token that is not in the loss


def widen(x):
    """At least fp32: long sums lose too much in 16 bits."""
    return x if x.dtype == torch.float64 else x.float()


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return (n + multiple - 1) // multiple * multiple


# ==== configuration

@dataclass
class ModelConfig:
    """Hugging Face's names and meanings; `model_type` is "llama", "mistral", "qwen2" or "qwen3"."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    model_type: str = "llama"
    attention_bias: bool = False  # Llama, Qwen3: of all four projections
    rope_scaling: dict | None = None  # "rope_type" and its numbers: rope_frequencies
    eos_token_id: list | None = None  # end a reply beside the tokenizer's end tokens

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise SystemExit("model: num_attention_heads must be a multiple of "
                             "num_key_value_heads, and head_dim even")

    def num_parameters(self) -> int:
        """Parameters of a CausalLM of this shape, tied weights counted once."""
        C, D = self.hidden_size, self.head_dim
        H, K = self.num_attention_heads, self.num_key_value_heads
        attention = 2 * C * D * (H + K)  # queries and output, keys and values
        if self.model_type == "qwen2" or self.attention_bias:
            attention += D * (H + 2 * K) + C * self.attention_bias  # biases
        if self.model_type == "qwen3":
            attention += 2 * D  # norms of queries and keys
        layer = attention + 3 * C * self.intermediate_size + 2 * C  # attention, MLP, two norms
        tables = 1 if self.tie_word_embeddings else 2  # embedding and head
        return self.num_hidden_layers * layer + C + tables * self.vocab_size * C


# The documents' models. GPT-3's MLP has two matrices of 4·C, as large as SwiGLU's three of 8/3·C.
PRESETS = {  # vocabulary, C, MLP, layers, H, K
    "tiny": ModelConfig(),
    "small": ModelConfig(8192, 384, 1024, 6, 6, 6, tie_word_embeddings=False),
    "gpt2-124m": ModelConfig(50257, 768, 2048, 12, 12, 12, max_position_embeddings=1024),
    "llama-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=2048,
                            tie_word_embeddings=False),
    "llama-65b": ModelConfig(32000, 8192, 22016, 80, 64, 64, max_position_embeddings=2048,
                             tie_word_embeddings=False),
    "gpt3-175b": ModelConfig(50257, 12288, 32768, 96, 96, 96, max_position_embeddings=2048),
}


# ==== the layers

def rms_norm(x, weight, eps):
    """x / rms(x) · weight for x (..., C) (Zhang & Sennrich 2019), computed in fp32."""
    wide = widen(x)
    rms = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (wide / rms).to(x.dtype) * weight


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        norm = fast_rms_norm if FAST else rms_norm
        return norm(x, self.weight, self.eps)


def rope_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and ±sin of position · frequency, each (P, D) for P positions (RoFormer eq. 15)."""
    frequencies, scale = rope_frequencies(config)  # theta^(-2i/D), 1; a longer context changes both
    positions = torch.arange(round_up(config.max_position_embeddings, 8))  # as batches are padded
    angles = positions.double()[:, None] * frequencies  # (P, D/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Turns each pair (a, b) of x (B, H, T, D) to (a·cos - b·sin, b·cos + a·sin). a is x_i and b is
    x_{i+D/2}, Hugging Face's layout. cos, sin (T, D) or (B, 1, T, D); sin is negative for a."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    return x * cos + swapped * sin


def attention_formula(q, k, v, mask):
    """softmax(q·kᵀ / √D + mask) · v, as in D4 2.2, with heads, batch and a mask. q (B, H, T, D),
    k, v (B, K, S, D); mask (T, S) or (B, 1, T, S), 0 where a query may look and -inf elsewhere."""
    shared = q.shape[1] // k.shape[1]  # query heads that look at one key head
    k = k.repeat_interleave(shared, dim=1)  # (B, H, S, D)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return (scores + mask).softmax(-1) @ v


class Attention(nn.Module):
    """Causal self-attention; several query heads may share a key-value head (GQA)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        bias = config.model_type == "qwen2" or config.attention_bias
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, K * D, bias=bias)
        self.v_proj = nn.Linear(C, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, layer=0, cache=None):
        """x (B, T, C) → (B, T, C). A cache holds earlier tokens' keys and values of each layer."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
            k = self.k_norm(k)
        turn = fast_rotate if FAST else rotate
        unrotated = q  # what a prefix is looked up by
        q = turn(q, cos, sin)
        k = turn(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        attention = fast_attention if FAST else attention_formula
        y = attention(q, k, v, mask)  # (B, H, T, D)
        if hasattr(self, "prefix"):
            y = y + self.prefix(unrotated)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask, layer=0, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids (B, T) → hidden states (B, T, C) after the last norm: what both models share."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.prompt_ids = []  # of embeddings that stand before every text (prompt tuning)
        self.activation_checkpointing = False  # recompute blocks in backward, store their inputs
        self.tables = {}  # (device, dtype) → cos, sin: no buffers, a state dict is parameters only

    def forward(self, input_ids, cache=None):
        """Training pads on the right, where the causal mask hides it: no padding mask is needed.
        Generation passes a cache and pads on the left; input_ids follow what the cache holds."""
        front = self.prompt_ids if cache is None else []  # in generation they are in the prompts
        if front:
            ids = torch.tensor(front, device=input_ids.device).expand(len(input_ids), -1)
            input_ids = torch.cat([ids, input_ids], dim=1)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        cos, sin, mask = self.positions(x, cache)
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, cos, sin, mask, i, cache)
        return self.norm(x)[:, len(front) :]

    def run(self, layer, *inputs):
        """A block's output. With activation checkpointing only its inputs are kept for backward,
        which computes the block once more (Chen et al. 2016)."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # use_reentrant=True (D4 2.4.2) loses all gradients where x needs none (LoRA)
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def positions(self, x, cache):
        """cos, sin and mask: all that tells a layer where the tokens of x (B, T, C) stand."""
        T = x.shape[1]
        place = (x.device, x.dtype)
        if place not in self.tables:
            with torch.inference_mode(False):  # made in generation, they still serve training
                self.tables[place] = [table.to(*place) for table in rope_table(self.config)]
        cos, sin = self.tables[place]
        if cache is not None:
            positions, mask = cache.advance(T)  # (B, T), (B, 1, T, S)
            positions = positions.clamp(0, len(cos) - 1)  # of pads, of rows that have ended
            return cos[positions][:, None], sin[positions][:, None], mask  # cos (B, 1, T, D)
        if T > len(cos):
            raise SystemExit(f"model: {T} tokens exceed the context of "
                             f"{self.config.max_position_embeddings} (max_position_embeddings)")
        mask = x.new_full((T, T), -torch.inf).triu(1)
        return cos[:T], sin[:T], mask  # (T, D), (T, D), (T, T)


# ==== heads and log-probabilities

def target_logprobs(hidden, weight, targets):
    """log softmax(hidden · weightᵀ)[target]: hidden (N, C), weight (V, C), targets (N,) → (N,)."""
    logits = widen(hidden @ weight.T)  # (N, V)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


class LMHead(nn.Linear):
    """hidden (B, T, C) → logits (B, T, V), or log-probabilities of targets (B, T), 0 at IGNORE.
    Both go through this module's forward, never through its weight: there sit ZeRO-3's hooks."""

    def forward(self, hidden, targets=None):
        if targets is None:
            return super().forward(hidden)
        kept = targets != IGNORE  # the head is a large product: spend it on the targets only
        logprobs_of = TargetLogprobs.apply if FAST else target_logprobs
        logprobs = logprobs_of(hidden[kept], self.weight, targets[kept])
        return logprobs.new_zeros(targets.shape).masked_scatter(kept, logprobs)


class CausalLM(nn.Module):
    """model(input_ids (B, T)) → logits (B, T, V), always; losses are the subject of the scripts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        initialize(self)

    def forward(self, input_ids, cache=None):
        return self.lm_head(self.model(input_ids, cache))


class ScalarModel(nn.Module):
    """One number per token (B, T): the reward model's is read at <|reward|> (D2 第4节), the value
    model's everywhere. A new head is zero: then the first Bradley-Terry loss is ln 2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        initialize(self)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids):
        return widen(self.score(self.model(input_ids))[..., 0])

    def last(self, input_ids, lengths):
        """The number at each row's last token (B,), found by the lengths (B,), not by a search."""
        return self(input_ids)[torch.arange(len(lengths), device=lengths.device), lengths - 1]


def must_score(model, folder):
    """Refuses a reward model whose head was never trained: it gives every text 0."""
    if isinstance(model, ScalarModel) and not model.score.weight.any():
        raise SystemExit(f"--reward {folder}: no reward model, every score is 0; reward.py trains "
                         "one")


def score_norm(folder) -> tuple[float, float]:
    """Mean and spread of a reward model's held-out scores; 0 and 1 where they are not known."""
    path = Path(folder) / "eval.json"
    seen = read_object(path) if path.exists() else {}
    return seen.get("score_mean", 0.0), max(seen.get("score_std", 1.0), 1e-3)


def initialize(model: nn.Module):
    """GPT-2's: N(0, 0.02), the two projections into the residual stream divided by √(2·layers)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * model.config.num_hidden_layers)
            nn.init.normal_(parameter, 0.0, std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def expected_first_loss(config: ModelConfig) -> float:
    """ln V + ½·C·σ²: what an untrained CausalLM loses per token, its logits being N(0, C·σ²)."""
    return math.log(config.vocab_size) + 0.5 * config.hidden_size * 0.02**2


def token_logprobs(model: CausalLM, input_ids, targets):
    """log π(targets[b, t] | input_ids[b, :t+1]), (B, T) in fp32, 0 where the target is IGNORE.
    SFT, rollout, reference and update all see probabilities by this path: so PPO's first ratio is
    1. The shift by one is made with `targets`, in data.py (D4 2.2.2's loss shifts once more)."""
    return model.lm_head(model.model(input_ids), targets)


# ==== parameter-efficient tuning (D3 第2节, D4 3.2): the base is frozen, a small part is trained

Tuning = Literal["full", "freeze", "bitfit", "lora", "qlora", "adapter", "prefix", "prompt"]
ADDING = ("lora", "qlora", "adapter", "prefix", "prompt")  # their weights stand beside the base's
PEFT_PREFIX = "base_model.model."  # before their names in a file
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score")


def tune(model, kind, size, alpha, base=""):
    """Makes a model train only what `kind` says. It starts as its base exactly, but for "prompt".

        full      everything
        freeze    the last `size` blocks and the last norm; of a reward model the head alone
        bitfit    the biases (Ben Zaken et al. 2022), where there are any
        lora      a change of rank `size` to each matrix of the blocks, and to a reward head
        qlora     the same over matrices stored in 4 bits
        adapter   bottlenecks of width `size` behind attention and MLP, and the norms (Houlsby 2019)
        prefix    `size` learned keys and values in each layer, for all positions to look at
        prompt    `size` learned embeddings in front of every text (Lester et al. 2021)

    alpha: LoRA's change is scaled by alpha / size; base: the folder whose weights these are."""
    if hasattr(model, "tuned"):
        raise SystemExit(f"--init holds weights of --tune {model.tuned['tune']}, which can't be "
                         f"merged; start from {model.tuned['base_model_name_or_path']}")
    if kind == "full":
        return
    model.tuned = {"tune": kind, "r": size, "lora_alpha": alpha,
                   "base_model_name_or_path": str(base),
                   "token_added": getattr(model, "token_added", None)}
    model.requires_grad_(False)
    decoder = model.model
    if kind == "freeze":
        scores = isinstance(model, ScalarModel)
        for part in [model.score] if scores else [*decoder.layers[-size:], decoder.norm]:
            part.requires_grad_(True)
    elif kind == "bitfit":
        for bias in biases(model):
            bias.requires_grad_(True)
    elif kind in ("lora", "qlora"):
        layer = LoRA if kind == "lora" else QLoRA
        replace(model, MATRICES, lambda linear: layer(linear, size, alpha))
    elif kind == "adapter":
        replace(model, ("o_proj", "down_proj"), lambda linear: Adapter(linear, size))
        for module in decoder.modules():
            if isinstance(module, RMSNorm):
                module.requires_grad_(True)
    elif kind == "prefix":
        for block in decoder.layers:
            block.self_attn.prefix = Prefix(model.config, size)
    else:
        decoder.embed_tokens = PromptEmbedding(decoder.embed_tokens, size)
        decoder.prompt_ids = [model.config.vocab_size + i for i in range(size)]
    model.to(next(model.parameters()))  # device and dtype of what was added


def biases(model) -> list:
    """Llama has none, which D3 doesn't say where it lists BitFit."""
    found = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    if not found:
        raise SystemExit(f"--tune bitfit trains biases, and this {model.config.model_type} model "
                         "has none; take lora, or a Qwen2 model")
    return found


def replace(module, names, make):
    """Puts make(linear) in the place of each linear layer of one of these names."""
    for path, linear in list(module.named_modules()):
        above, _, name = path.rpartition(".")
        if name in names:
            setattr(module.get_submodule(above), name, make(linear))


class Adopted(nn.Linear):
    """A frozen linear layer's weights, under the same names."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias


class LoRA(Adopted):
    """W·x + alpha/rank · B·A·x (Hu et al. 2022) with trained A (rank, in), B (out, rank); B is zero
    at first. (D4's LoRALayer has no W and transposes A and B: it can't run.)"""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank
        self.on = True

    def forward(self, x):
        """x (..., in) → (..., out)."""
        y = self.base(x)
        if self.on:
            y = y + self.scale * self.lora_B(self.lora_A(x))
        return y

    def base(self, x):
        return F.linear(x, self.weight, self.bias)

    def matrix(self):
        """W (out, in)."""
        return self.weight

    def merged(self):
        """The ordinary layer that computes the same."""
        change = self.lora_B.weight @ self.lora_A.weight
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.matrix() + self.scale * change)
        linear.bias = self.bias
        return linear


@contextmanager
def untuned(model):
    """Within it a model with LoRA computes what its base does (PPO's reference); another model is
    unchanged."""
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


class QLoRA(LoRA):
    """LoRA over a W of 4.127 bits a weight (Dettmers et al. 2023), unpacked each time it is used.
    Its parts are parameters, so that ZeRO-3 splits them too."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        packed = [nn.Parameter(part, requires_grad=False) for part in quantized(linear.weight)]
        self.codes, self.scales, self.constants = packed
        self.weight = None

    def base(self, x):
        y = FourBit.apply(x, self.codes, self.scales, self.constants, self.out_features)
        return y if self.bias is None else y + self.bias

    def matrix(self):
        shape = self.out_features, self.in_features
        return unpacked(self.codes, self.scales, self.constants, shape)


class FourBit(torch.autograd.Function):
    """x · Wᵀ. Backward unpacks W a second time: to keep it would take what was saved."""

    @staticmethod
    def forward(ctx, x, codes, scales, constants, rows):
        ctx.save_for_backward(codes, scales, constants)
        ctx.shape = rows, x.shape[-1]
        return x @ unpacked(codes, scales, constants, ctx.shape).to(x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        W = unpacked(*ctx.saved_tensors, ctx.shape)
        return grad @ W.to(grad.dtype), None, None, None, None


BLOCK, GROUP = 64, 256  # weights that share a scale, scales that share a constant


def normal_float() -> torch.Tensor:
    """NormalFloat-4: 16 values from -1 to 1 that normal numbers fall between about equally often;
    seven quantiles below zero, zero, eight above."""
    levels = [torch.linspace(0.9677083, 0.5, n + 1, dtype=torch.float64) for n in (7, 8)]
    below, above = map(torch.special.ndtri, levels)  # each ends with 0
    values = torch.cat([-below, above[:-1].flip(0)])
    return (values / values.max()).float()


def in_rows(flat, size):
    """(n,) → (rows, size), the last row filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def quantized(weight):
    """A matrix as bytes: codes of 4 bits, two a byte; scales of 8 bits, the largest of each block;
    a constant in fp32, the largest scale of each group: the double quantization. (The paper takes
    the scales' mean off first.)"""
    blocks = in_rows(weight.detach().float().flatten(), BLOCK)
    largest = blocks.abs().amax(1).clamp(min=1e-12)
    values = normal_float()
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / largest[:, None], between).byte()
    groups = in_rows(largest, GROUP)
    constants = groups.amax(1)
    scales = (groups / constants[:, None] * 255).round().byte()
    pairs = 16 * codes[:, ::2] + codes[:, 1::2]
    return pairs.flatten(), scales.flatten(), constants.view(torch.uint8)


@lru_cache
def pairs_of_bytes(device) -> torch.Tensor:
    """The two values that each byte stands for (256, 2)."""
    with torch.inference_mode(False):  # made in generation, they still serve training
        values = normal_float()
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)
        return pairs.to(device)


def unpacked(codes, scales, constants, shape):
    """The matrix of this shape again, in fp32."""
    blocks = F.embedding(codes.int(), pairs_of_bytes(codes.device)).view(-1, BLOCK)
    largest = scales.view(-1, GROUP) * (constants.view(torch.float32) / 255)[:, None]
    each = largest.view(-1, 1)[: len(blocks)]
    flat = (blocks * each).flatten()
    return flat[: math.prod(shape)].view(shape)


class Int8(nn.Module):
    """A linear layer for inference with W (out, in) in 8 bits a weight and a scale for each row
    (D4 5.4.1): W = scale · codes. A decoding step reads all weights, so fewer bytes are faster."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("codes", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        """x (..., in) → (..., out)."""
        product = fast_int8 if FAST else int8_product
        y = product(x, self.codes, self.scale.to(x.dtype))
        return y if self.bias is None else y + self.bias


def int8_product(x, codes, scale):
    """x · (scale · codes)ᵀ."""
    return (x @ codes.to(x.dtype).T) * scale


def lighten(model, bits):
    """For inference: the weights in 32 bits, in 16 (bf16), or the matrices in 8 and the rest in 16.
    Returns how many bytes they are, a tied matrix once for each of its two forms."""
    if bits == 8:
        replace(model, (*MATRICES, "lm_head"), Int8)
    model.to(torch.float32 if bits == 32 else torch.bfloat16)
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


class Adapter(Adopted):
    """y + up(gelu(down(y))) behind y = W·x; up is zero at first."""

    def __init__(self, linear, size):
        super().__init__(linear)
        self.down = nn.Linear(self.out_features, size)
        self.up = nn.Linear(size, self.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        y = super().forward(x)
        return y + self.up(F.gelu(self.down(y)))


class Prefix(nn.Module):
    """A layer's learned keys and values (1, K, n, D), without positions (Li & Liang 2021; D4 4.3).
    They have a softmax of their own and a gate a head, zero at first (Zhang et al. 2023); in the
    paper they share the others' softmax, and the start is not the base."""

    def __init__(self, config, size):
        super().__init__()
        shape = 1, config.num_key_value_heads, size, config.head_dim
        self.keys = nn.Parameter(torch.randn(shape))
        self.values = nn.Parameter(torch.randn(shape))
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads, 1, 1))

    def forward(self, q):
        """q (B, H, T, D), not rotated → what attention's result gets besides (B, H, T, D)."""
        return self.gate * attention_formula(q, self.keys, self.values, 0.0)


class PromptEmbedding(nn.Embedding):
    """The learned embeddings have the ids from V on; at first they are those of random tokens."""

    def __init__(self, embedding, size):
        super().__init__(*embedding.weight.shape, device="meta")
        self.weight = embedding.weight
        self.prompt = nn.Parameter(self.weight[torch.randint(self.num_embeddings, (size,))].clone())

    def forward(self, ids):
        V = self.num_embeddings
        tokens = F.embedding(ids.clamp(max=V - 1), self.weight)
        learned = F.embedding((ids - V).clamp(min=0), self.prompt)
        return torch.where(ids[..., None] < V, tokens, learned)


# ==== generation

class KVCache:
    """Keys and values of the tokens seen so far, (2, B, K, S, D) per layer.

    Prompts are padded on the left, so that all rows end in the same column: what a step appends is
    one slice of the tensor, where right-padded rows would each write to a column of their own.
    Column c of a row is its position c - pad. The mask hides the pads and what is behind the newest
    column: S grows by whole blocks, since a product with a slice of the tensor would copy it first.
    """

    BLOCK = 32

    def __init__(self, config: ModelConfig, pad, like):
        """pad (B,): the empty columns in front of each row; like: a tensor of its device, dtype."""
        shape = (2, len(pad), config.num_key_value_heads, 0, config.head_dim)
        self.kv = [like.new_empty(shape)] * config.num_hidden_layers
        self.pad = pad.to(like.device)
        self.used = 0  # columns that hold tokens
        self.size = 0  # S

    def advance(self, T: int):
        """Makes room for T columns; returns their positions (B, T) and their mask (B, 1, T, S)."""
        self.used += T
        self.size = round_up(self.used, self.BLOCK)
        keys = torch.arange(self.size, device=self.pad.device)
        queries = keys[self.used - T : self.used]
        pad = self.pad[:, None]
        seen = (keys <= queries[:, None]) & (keys >= pad[:, None])  # (B, T, S)
        seen |= keys == queries[:, None]  # padding sees itself: a softmax over nothing is NaN
        mask = self.kv[0].new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return queries - pad, mask[:, None]

    def append(self, layer: int, k, v):
        """Stores a layer's k, v (B, K, T, D) in the newest columns; returns all (B, K, S, D)."""
        first = self.used - k.shape[2]
        missing = self.size - self.kv[layer].shape[3]
        if missing > 0:
            self.kv[layer] = F.pad(self.kv[layer], (0, 0, 0, missing))
        self.kv[layer][..., first : self.used, :] = torch.stack([k, v])
        return self.kv[layer]

    def keep(self, rows):
        """Drops every row not in `rows` (a LongTensor)."""
        self.kv = [kv[:, rows] for kv in self.kv]
        self.pad = self.pad[rows]


@torch.inference_mode()
def generate_steps(model, prompts, max_new_tokens, end_id, temperature, top_p, seeds,
                   use_cache=True):
    """Yields (rows, tokens) after every decoding step: which prompts got a token, and which.

    prompts: lists of ids of any lengths; a row ends with its first end_id (or one of a list), after
    max_new_tokens, or when it is max_position_embeddings long. temperature 0 is greedy; else row i
    draws by seeds[i]. top_p < 1 samples from the nucleus (Holtzman et al. 2020).
    """
    first = next(model.parameters())
    context = model.config.max_position_embeddings
    prompts = [model.model.prompt_ids + list(prompt) for prompt in prompts]
    tokens, pad = left_padded(prompts, context)  # (B, T), (B,)
    cache = KVCache(model.config, pad, first)
    # Not torch.multinomial, which draws for all rows from one generator: what a prompt is answered
    # must depend on its own seed and not on the other prompts of its batch.
    uniforms = torch.empty(len(prompts), max_new_tokens, dtype=torch.float64)
    for row, seed in zip(uniforms, seeds):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(len(prompts))  # the prompt that each row of the batch continues
    alive = torch.ones(len(prompts), dtype=torch.bool)  # the rows that have not ended
    for step in range(max_new_tokens):
        if not use_cache:
            cache.used = 0  # every column is computed again
        ids = tokens[:, cache.used :].to(first.device)  # the prompts at first, then one token a row
        hidden = model.model(ids, cache)  # (B, T, C)
        logits = model.lm_head(hidden[:, -1])  # (B, V): the last position only
        new = sample(logits, temperature, top_p, uniforms[rows, step].to(first.device)).cpu()
        yield rows[alive].tolist(), new[alive].tolist()
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        full = tokens.shape[1] - cache.pad.cpu() >= context
        alive &= ~(full | torch.isin(new, torch.tensor(end_id)))
        left = int(alive.sum())
        if left == 0:
            return
        # a row that leaves costs a copy of the cache: ended ones wait until they are a fifth of all
        if left < 0.8 * len(alive):
            kept = alive.nonzero()[:, 0]
            cache.keep(kept.to(first.device))
            tokens = tokens[kept]
            rows = rows[kept]
            alive = alive[kept]


def left_padded(prompts, context):
    """The prompts in one tensor (B, T), and the number of pads in front of each (B,)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    if lengths.min() == 0 or longest >= context:
        raise SystemExit(f"generate: a prompt is empty or fills the context of {context} tokens "
                         f"(longest: {longest}); shorten it or train with a longer --context")
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    return tokens, longest - lengths


def sample(logits, temperature, top_p, uniform):
    """One token per row (B,) by inverting the cumulative distribution at uniform (B,)."""
    logits = widen(logits)  # also because argmax in bf16 is slow
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs  # so the token that crosses top_p stays in
        probs = probs.masked_fill(before > top_p, 0.0)
    cumulative = probs.cumsum(-1)  # ends below 1 (top_p, rounding): the draw is scaled to its end
    drawn = (uniform[:, None] * cumulative[:, -1:]).to(cumulative.dtype)
    new = torch.searchsorted(cumulative, drawn)
    return (order.gather(-1, new) if top_p < 1 else new)[:, 0]


def generate(model, prompts, max_new_tokens, end_id, temperature=1.0, top_p=1.0, seeds=None,
             use_cache=True, rows=64):
    """The replies as lists of ids, the end token included where it was reached; arguments as in
    `generate_steps`, but any number of prompts: `rows` of like length are taken at a time."""
    seeds = range(len(prompts)) if seeds is None else seeds
    replies = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        steps = generate_steps(model, [prompts[i] for i in chosen], max_new_tokens, end_id,
                               temperature, top_p, [seeds[i] for i in chosen], use_cache)
        for alive, tokens in steps:
            for row, token in zip(alive, tokens):
                replies[chosen[row]].append(token)
    return replies


# ==== checkpoints

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16}


@contextmanager
def written_whole(path):
    """A neighbour of path to write to, renamed when it is on disk: a reader, or a process killed at
    any instant, sees the old file or the whole new one."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_safetensors(path, shapes: dict, dtype, tensors):
    """The safetensors format: 8 bytes of header length, a JSON header, the raw bytes in a row.
    shapes: {name: shape}, in the order of `tensors`, an iterable of (name, tensor) consumed one by
    one, so that a sharded model is written without ever being whole in memory."""
    [code] = [code for code, known in SAFETENSORS_DTYPES.items() if known == dtype]
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head = head.ljust(round_up(len(head), 8))
    with written_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, tensor), expected in zip(tensors, shapes, strict=True):
            assert name == expected and tuple(tensor.shape) == tuple(shapes[name]), name
            flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy())


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """{name: tensor}, mapped from the file (copy before changing); one line if it is broken."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="c")
        size = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        body = torch.from_numpy(raw[8 + size :])
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            data = body[start:end].view(SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[name] = data.view(entry["shape"])
        return tensors
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise SystemExit(f"{path}: not a complete safetensors file of floats ({error}); copy or "
                         "train it again")


def save_model(folder, model, tensors=None, write: bool = True, tokenizer=None):
    """Writes config.json and model.safetensors as Hugging Face does; of a model with LoRA or other
    parts beside its base these alone, as PEFT does. tensors: (name, full tensor) in the order of
    model.named_parameters(), where the model's own are not whole: under ZeRO. tokenizer: to be
    saved beside it."""
    parameters = dict(model.named_parameters())
    tensors = parameters.items() if tensors is None else tensors
    if not write:  # all processes must ask for a tensor to gather it, although one writes (zero.py)
        for _ in tensors:
            pass
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(folder, model.config.max_position_embeddings)
    if getattr(model, "tuned", {}).get("tune") in ADDING:
        return save_added(folder, model, tensors)
    dtype = next(iter(parameters.values())).dtype
    scalar = isinstance(model, ScalarModel)
    task = "ForSequenceClassification" if scalar else "ForCausalLM"
    entries = asdict(model.config) | {
        "torch_dtype": str(dtype).removeprefix("torch."), "hidden_act": "silu",
        "sliding_window": None,  # of a Mistral that says nothing it would be 4096
        "architectures": [model.config.model_type.capitalize() + task]}
    if scalar:
        entries["num_labels"] = 1
    if tokenizer:
        entries |= tokenizer.marks()
    write_object(folder / "config.json", entries)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    write_safetensors(folder / "model.safetensors", shapes, dtype, tensors)
    (folder / "adapter_config.json").unlink(missing_ok=True)  # of an earlier run


def save_added(folder, model, tensors):
    """Writes what is trained beside a frozen base, as PEFT does: adapter_config.json, which names
    the base's folder, and adapter_model.safetensors."""
    added = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dtype = next(iter(added.values())).dtype
    shapes = {PEFT_PREFIX + name: tuple(p.shape) for name, p in added.items()}
    found = ((PEFT_PREFIX + name, tensor) for name, tensor in tensors if name in added)
    write_safetensors(folder / "adapter_model.safetensors", shapes, dtype, found)
    matrices = {name.split(".")[-3] for name in added if "lora_A" in name}
    write_object(folder / "adapter_config.json", model.tuned | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": sorted(matrices)})


def write_object(path, entries: dict):
    with written_whole(path) as file:
        file.write(json.dumps(entries, indent=2).encode())


def read_object(path) -> dict:
    """A JSON file that holds an object; one line if it is broken."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: broken JSON ({error}); copy or train it again")


def weight_files(folder) -> list[Path]:
    """The files that hold a folder's weights: model.safetensors or, of a large model, what its
    index names, and nothing that lies beside; one line if one is missing."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        base = read_object(folder / "adapter_config.json")["base_model_name_or_path"]
        return [*weight_files(base), folder / "adapter_model.safetensors"]
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():  # transformers' order, too
        shards = read_object(index).get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(shards))]
    for file in files:
        if not file.exists():
            raise SystemExit(f"{folder}: holds no {file.name}; was its training or copy finished?")
    return files


ROPES = {  # rope_type: its numbers, ... where config.json has to say them
    "default": {},
    "linear": {"factor": ...},  # arXiv 2306.15595
    "llama3": {"factor": ..., "original_max_position_embeddings": ..., "low_freq_factor": ...,
               "high_freq_factor": ...},
    "yarn": {"factor": ..., "original_max_position_embeddings": ..., "beta_fast": 32,
             "beta_slow": 1, "attention_factor": None}}  # arXiv 2309.00071


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians a position of each pair, theta^(-2i/D) (D/2,), and a factor for cos and sin. In a
    context `factor` times the trained one slow pairs turn `factor` times slower, fast ones as ever:
    fast by their turns in the trained context (Llama 3), by a ramp over i (YaRN); linear: none."""
    D = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    rope = config.rope_scaling
    if not rope:
        return frequencies, 1.0
    slow = frequencies / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow, 1.0
    scale = 1.0
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)  # of the fastest
    if rope["rope_type"] == "llama3":
        low = rope["low_freq_factor"]
        fast = (turns * frequencies - low) / (rope["high_freq_factor"] - low)
    else:
        per_log = D / 2 / math.log(config.rope_theta)  # pair i turns theta^(-2i/D) as often
        first = max(math.floor(per_log * math.log(turns / rope["beta_fast"])), 0)
        last = min(math.ceil(per_log * math.log(turns / rope["beta_slow"])), D - 1)
        fast = 1 - (torch.arange(D // 2) - first).double() / max(last - first, 0.001)
        scale = rope["attention_factor"]
        if scale is None:
            scale = 1 + 0.1 * math.log(max(rope["factor"], 1))
    fast = fast.clamp(0, 1)
    return frequencies * fast + slow * (1 - fast), scale


def read_rope(raw: dict, path) -> dict:
    """rope_theta and rope_scaling of a config.json: the latter as transformers 4 writes it, or 5
    (rope_parameters). It must say all that its type needs, and nothing else."""
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta")
    numbers = ROPES.get(kind, {kind: ...})
    rope = numbers | {name: value for name, value in rope.items() if value is not None}
    wrong = [name for name, value in rope.items() if value is ... or name not in numbers]
    if wrong:
        raise SystemExit(f"{path}: rope_type {kind!r} is not one of {', '.join(ROPES)}, or it "
                         f"lacks or has what it should not: {', '.join(wrong)}")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope} if rope else None}


def load_config(folder) -> ModelConfig:
    """Reads config.json of a Llama, Mistral, Qwen2 or Qwen3 folder, as transformers 4 or 5 writes
    it; what would change the logits and is not built ends with one line that names it."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; pass the folder of a checkpoint, such as out/base")
    raw = read_object(path)
    kind = raw.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise SystemExit(f"{path}: model_type {kind!r} is not one of llama, mistral, qwen2, qwen3")
    for name, built in (("hidden_act", "silu"), ("mlp_bias", False), ("partial_rotary_factor", 1)):
        if raw.get(name, built) not in (built, None):
            raise SystemExit(f"{path}: {name} {raw[name]} is not built; choose another model")
    known = {k: raw[k] for k in ModelConfig.__dataclass_fields__ if raw.get(k) is not None}
    needed = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings"}
    if needed - known.keys():
        raise SystemExit(f"{path}: lacks {', '.join(sorted(needed - known.keys()))}")
    # what transformers takes where a file says nothing
    implied = {"num_key_value_heads": raw["num_attention_heads"], "rms_norm_eps": 1e-6,
               "tie_word_embeddings": False}
    config = ModelConfig(**implied | known | read_rope(raw, path))
    config.attention_bias &= kind in ("llama", "qwen3")  # the others' code doesn't look at it
    if kind == "mistral" or raw.get("use_sliding_window"):
        # a window hides nothing from a sequence that is not longer
        window = raw.get("sliding_window", 4096) or math.inf
        config.max_position_embeddings = min(config.max_position_embeddings, window)
    generation = path.with_name("generation_config.json")
    ends = read_object(generation).get("eos_token_id") if generation.exists() else None
    ends = raw.get("eos_token_id") if ends is None else ends
    config.eos_token_id = None if ends is None else np.ravel(ends).tolist()
    return config


class Shapes(torch.overrides.TorchFunctionMode):
    """Within, no module draws initial values: that takes longer than reading a file's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") != nn.init.__name__:
            return function(*args, **(kwargs or {}))


def load_model(folder, kind=CausalLM, device="cpu", dtype=torch.float32):
    """A CausalLM or ScalarModel with the folder's weights. A ScalarModel made from a CausalLM's
    folder (the reward model from SFT) drops its head and keeps its own zero head; any other
    missing, misshapen or surplus weight ends with one line that names it. Beside the model no more
    than the file's mapped pages are in memory, which the system takes back when it needs them."""
    if (Path(folder) / "adapter_config.json").exists():
        return load_added(Path(folder), kind, device, dtype)
    with torch.device("meta"), Shapes():
        model = kind(load_config(folder))
    weights = {}
    if kind is ScalarModel:
        weights["score.weight"] = torch.zeros(model.score.weight.shape)
    for file in weight_files(folder):
        weights |= read_safetensors(file)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if found != tuple(parameter.shape):
            raise SystemExit(f"{folder}: {name} should be {tuple(parameter.shape)}, the file has "
                             f"{found}")
        filled = nn.Parameter(weights[name].to(device, dtype, copy=True))
        torch.utils.swap_tensors(parameter, filled)  # the same object, so that tied stays tied
    for name in weights.keys() - parameters.keys():  # such as biases: without them it is not it
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            hint = " (a reward model?)" if name == "score.weight" else ""
            raise SystemExit(f"{folder}: has {name}{hint}, which our {kind.__name__} lacks")
    return model


def add_token(model: ScalarModel, token: int) -> str:
    """Gives the first token behind those in use their mean embedding: its row is a spare one, which
    was never trained, or where there is none a new one. Returns a line that says so."""
    embedding = model.model.embed_tokens
    rows = embedding.weight.detach()
    mean = rows[:token].mean(0, keepdim=True)
    embedding.weight = nn.Parameter(torch.cat([rows[:token], mean, rows[token + 1 :]]))
    model.config.vocab_size = embedding.num_embeddings = len(embedding.weight)
    model.token_added = token
    row = "a spare" if token < len(rows) else "a new"
    return f"token {token} gets {row} row of the embedding, the mean of the rows before it"


def load_added(folder, kind, device, dtype):
    """A base with what tuning has added (by us, or LoRA by PEFT): LoRA merged into its weights,
    another kind beside them."""
    path = folder / "adapter_config.json"
    entries = read_object(path)
    tuned = entries.get("tune", "lora")
    unknown = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
                               "modules_to_save", "fan_in_fan_out") if entries.get(key)]
    if entries.get("peft_type") != "LORA" or unknown:
        raise SystemExit(f"{path}: only plain LoRA of PEFT is built, not "
                         f"{', '.join(unknown) or entries.get('peft_type')}; merge it there")
    base = entries["base_model_name_or_path"]
    model = load_model(base, kind, device, dtype)
    if entries.get("token_added"):
        add_token(model, entries["token_added"])
    tune(model, tuned, entries["r"], entries["lora_alpha"], base)
    parameters = dict(model.named_parameters())
    for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items():
        parameter = parameters.get(name.removeprefix(PEFT_PREFIX))
        if parameter is None or parameter.shape != tensor.shape:
            raise SystemExit(f"{folder}: {name} {tuple(tensor.shape)} has no place in {base}")
        parameter.data.copy_(tensor)
    if tuned in ("lora", "qlora"):
        with torch.no_grad():
            replace(model, MATRICES, lambda layer: layer.merged())
        del model.tuned
    return model.requires_grad_(True)


# ==== command line

def fitted(messages, tokenizer, data, args, room):
    """The ids of a conversation, and how many exchanges, the oldest, had to be left out for it to
    fit into `room` tokens: never the system message, never the newest question."""
    forgotten = 0
    if "<|end|>" in tokenizer.ids:  # one of ours: the form of the cleaned text it has learned
        messages = [message | {"content": unicodedata.normalize("NFKC", message["content"])}
                    for message in messages]
    while True:
        ids, _ = data.render(messages, tokenizer, args.template)
        if len(ids) <= room:
            return ids, forgotten
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(users) < 2:
            raise SystemExit(f"{messages[users[0]]['content'][:40]!r}: {len(ids)} tokens with what "
                             f"must stand before it, {room} fit beside the reply; shorten it or "
                             "take fewer --max-new-tokens")
        system = messages[:1] if messages[0]["role"] == "system" else []
        messages = system + messages[users[1] :]
        forgotten += 1


def chat(model, data, args):
    """Answers --prompts or --prompt, or what the user types; /new forgets what was said. data: the
    module data.py, for its tokenizer and chat template."""
    tokenizer = data.Tokenizer.load(args.folder)
    ends = [tokenizer.text_end]
    if args.template != "none":
        ends += [tokenizer.end, *(model.config.eos_token_id or [])]
    context = model.config.max_position_embeddings
    room = max(context // 2, context - args.max_new_tokens)  # the rest is the reply's
    start = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompts:
        return answer(model, tokenizer, data, args, start, room, ends)
    messages = list(start)
    while True:
        try:
            text = args.prompt or input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if text.strip() == "/new" and not args.prompt:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids, forgotten = fitted(messages, tokenizer, data, args, room)
        except SystemExit as error:
            if args.prompt:
                raise
            print(error, file=sys.stderr)
            messages.pop()
            continue
        if forgotten:
            print(f"(the oldest exchanges are left out, {forgotten} so far: the context holds "
                  f"{context} tokens)", file=sys.stderr)
        steps = generate_steps(model, [ids], args.max_new_tokens, ends, args.temperature,
                               args.top_p, [args.seed + len(messages)])
        messages.append({"role": "assistant", "content": spoken(steps, tokenizer)})
        if args.prompt:
            return


def spoken(steps, tokenizer) -> str:
    """Prints a reply while it is made; returns it."""
    reply = []
    shown = ""
    for _, tokens in steps:
        reply += tokens
        text = tokenizer.decode(reply).rstrip("\ufffd")  # a Han character may miss some bytes
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()
    return shown


def answer(model, tokenizer, data, args, start, room, ends):
    """Replies to every conversation of --prompts, --batch-size of them at a time, each drawn by its
    own seed; a killed run leaves the whole lines of what was answered."""
    records = list(data.read_prompts(args.prompts))
    conversations = [record["messages"] for record in records]
    conversations = [messages if messages[0]["role"] == "system" else start + messages
                     for messages in conversations]
    prompts = [fitted(messages, tokenizer, data, args, room)[0] for messages in conversations]
    began = time.time()
    tokens = 0
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", encoding="utf-8", buffering=1) as file:  # line by line
        for first in range(0, len(prompts), args.batch_size):
            part = range(len(prompts))[first : first + args.batch_size]
            replies = generate(model, [prompts[i] for i in part], args.max_new_tokens, ends,
                               args.temperature, args.top_p, [args.seed + i for i in part])
            for i, reply in zip(part, replies):
                text = tokenizer.decode(reply).rstrip("\ufffd")
                messages = [*conversations[i], {"role": "assistant", "content": text}]
                record = records[i] | {"messages": messages}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            tokens += sum(map(len, replies))
            print(f"\r{part.stop}/{len(prompts)} prompts, {tokens / (time.time() - began):.0f} "
                  "tokens/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def merge(data, argv):
    """Writes a folder with LoRA as an ordinary one."""
    parser = argparse.ArgumentParser("model.py merge", description="Merge LoRA into its base.")
    parser.add_argument("folder", help="what a run with --tune lora or qlora left")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    model = load_model(args.folder)
    tune(model, "full", 0, 0.0)  # refuses what can't be merged
    save_model(args.out, model, tokenizer=data.Tokenizer.load(args.folder))
    print(f"{args.out}: {model.config.num_parameters():,} parameters")


def main(data):
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not; a terminal may know no Chinese
        sys.stdout.reconfigure(errors="replace")
    if sys.argv[1:2] == ["merge"]:
        return merge(data, sys.argv[2:])
    parser = argparse.ArgumentParser(description="Chat with a checkpoint (/new forgets what was "
                                     "said, Ctrl-D ends), or list the presets.")
    add = parser.add_argument
    add("folder", nargs="?", help="folder of a checkpoint, such as out/sft; none: the presets")
    add("--prompt", help="ask this once instead of chatting")
    add("--prompts", help="ask what this file asks: .jsonl in any conversation format")
    add("--out", default="answers.jsonl", help="the conversations with replies (%(default)s)")
    add("--batch-size", type=int, default=32, help="how many at a time (%(default)s)")
    add("--system", default="", help="a system message to start with")
    add("--template", choices=list(data.TEXTS), help="chat: role tokens; alpaca: ### Instruction:; "
        "none: continue the text (base models); default: as the folder was trained")
    add("--max-new-tokens", type=int, default=128, help="longest reply (%(default)s)")
    add("--temperature", type=float, default=0.7, help="0: the likeliest token (%(default)s)")
    add("--top-p", type=float, default=1.0, help="the likeliest tokens of so much probability are "
        "drawn from (%(default)s)")
    add("--bits", type=int, choices=[32, 16, 8], default=32, help="of a weight: fewer are faster "
        "and less exact (%(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(args.folder, device=device)
        if args.bits < 32:
            size = lighten(model, args.bits)
            print(f"{size / 1e6:,.1f} MB of weights", file=sys.stderr)
        return chat(model, data, args)
    if args.prompt or args.prompts:
        parser.error("who is to answer? give the folder of a checkpoint, such as out/sft")
    print(f"{'preset':<12}{'parameters':>18}{'12·L·C²':>18}")
    for name, config in PRESETS.items():
        estimate = 12 * config.num_hidden_layers * config.hidden_size**2
        print(f"{name:<12}{config.num_parameters():>18,}{estimate:>18,}")


# ==================================================================================================
# The same functions, faster: what runs where FAST is True. Each equals the lines quoted above it,
# in value and in gradient. What the handwritten gradients save of a training step on 2 cores (tiny,
# small and char of tests/bench.py): the norm's 2 to 13 %, the rotation's up to 4 %; that of the
# log-probabilities more the larger V is (at 2,048 rows and V = 50,304 in fp32 the head takes 1.1
# times as long as its three products, by the formula 1.2 times), and memory: 468 MB, not 1,248.

# rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()    in fp32
# (x / rms).to(x.dtype) * weight


def fast_rms_norm(x, weight, eps):
    if torch.is_grad_enabled():
        return Normalize.apply(x, weight, eps)
    return normalized(x, eps)[0] * weight  # a decoding step is short: apply() counts


def normalized(x, eps):
    """x / rms(x) for x (..., C), and 1 / rms(x) (..., 1), in fp32 whatever the dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = torch.rsqrt(norm * norm * (1 / x.shape[-1]) + eps)
    return (x * scale).to(x.dtype), scale


class Normalize(torch.autograd.Function):
    """By hand, with u = x / rms(x) and g the gradient by the output:
    dx = (g·w - u · mean(g·w·u)) / rms(x): u has a fixed length, so what lies along it is lost."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        unit, scale = normalized(x, eps)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        along = (product @ weight)[..., None] / -unit.shape[-1]
        grad_x = torch.addcmul(grad * weight, unit, along) * scale.to(unit.dtype)
        return grad_x, product.flatten(0, -2).sum(0), None


# swapped = x.roll(x.shape[-1] // 2, dims=-1)
# x * cos + swapped * sin


def fast_rotate(x, cos, sin):
    turn = Rotate.apply if torch.is_grad_enabled() else turned
    return turn(x, cos, sin)


def turned(x, cos, sin):
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Rotate(torch.autograd.Function):
    """By hand: the gradient of a rotation turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


# (x @ codes.to(x.dtype).T) * scale

def fast_int8(x, codes, scale):
    rows = x.numel() // x.shape[-1]
    if rows > 4 or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return int8_product(x, codes, scale)
    # torch's own kernel makes no copy of the codes in 16 bits; of many rows it is the slower one
    y = torch._weight_int8pack_mm(x.reshape(rows, -1), codes, scale)
    return y.view(*x.shape[:-1], -1)


# (q @ k.transpose(-2, -1) / math.sqrt(D) + mask).softmax(-1) @ v

def fast_attention(q, k, v, mask):
    # on a CPU torch's kernel is the slower one up to 256 tokens, but not for a single one
    B, _, T, _ = q.shape
    short = q.device.type == "cpu" and 1 < B * T and T <= 256
    return (attention_grouped if short else attention_fused)(q, k, v, mask)


def attention_grouped(q, k, v, mask):
    """No key is copied: the H/K query heads that share a key head become further rows of it."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q = (q * (1 / math.sqrt(D))).reshape(B, K, H // K * T, D)
    scores = (q @ k.transpose(-2, -1)).view(B, K, H // K, T, S)
    mask = mask if mask.dim() == 2 else mask[:, None]  # (B, 1, 1, T, S)
    weights = (scores + mask).softmax(-1)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)


def attention_fused(q, k, v, mask):
    """torch's kernel, which is faster when told that the mask is causal."""
    causal = mask.dim() == 2 and mask.shape[0] == mask.shape[1] > 1
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


# widen(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

class TargetLogprobs(torch.autograd.Function):
    """One product makes the logits of as many rows as KEPT holds; what becomes of them is done a
    BLOCK at a time, which stays in a CPU's cache. Logits of more rows than that are not kept:
    backward computes them again. By the logits the gradient of log p_target is onehot - p."""

    KEPT = 1 << 27  # logits: 512 MB in fp32
    BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.rows = max(1, TargetLogprobs.KEPT // len(weight))
        ctx.block = max(1, TargetLogprobs.BLOCK[hidden.device.type] // len(weight))
        found = []
        for h, t in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logits = h @ weight.T
            for some, target in zip(logits.split(ctx.block), t.split(ctx.block)):
                found.append(widen(some).log_softmax(-1).gather(1, target[:, None])[:, 0])
        found = torch.cat(found)
        kept = [logits] if len(hidden) <= ctx.rows else []
        ctx.save_for_backward(hidden, weight, targets, found, *kept)
        return found

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, found, *kept = ctx.saved_tensors
        grad_hidden, grad_weight = [], None
        # the target's p - 1, of log p in fp32: in 16 bits it would be 0 where p is nearly 1
        surprise = found.expm1().to(hidden.dtype)
        scale = -grad.to(hidden.dtype)[:, None]
        rows = [x.split(ctx.rows) for x in (hidden, targets, surprise, scale)]
        for h, t, s, g in zip(*rows):
            error = kept[0] if kept else h @ weight.T  # logits, to become p, to become p - onehot
            for some in error.split(ctx.block):
                torch.softmax(some, -1, out=some)
            error[torch.arange(len(t), device=t.device), t] = s  # (scatter_ is slow in bf16)
            grad_hidden.append((error @ weight).mul_(g))
            product = error.T @ (h * g)
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        return torch.cat(grad_hidden), grad_weight, None


if __name__ == "__main__":
    import data  # not above: the files of the ground floor don't import one another

    main(data)

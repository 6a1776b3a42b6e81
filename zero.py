"""ZeRO by hand: data-parallel training with optimizer state, gradients and parameters split over
the ranks (Rajbhandari et al. 2020, sections 3, 5 and 7; D0 4.2.1).

    python zero.py plan --params 7.5e9 --world-size 64    bytes per GPU and traffic of every stage
    python zero.py plan --model llama-7b --world-size 8   a model by its shapes; --rlhf: PPO's four
    torchrun --nproc-per-node 2 zero.py measure           the same beside live tensors of a model

Bytes per parameter on each of N ranks, at rest between backward and step, and bytes sent per step
with k micro-batches, Ψ bytes of weights, f = (N-1)/N:

    stage                           fp32 (4+4+8)   16-bit weights (2+2+4+4+4)   sent per step
    0  everything on every rank     16             16                           2Ψf
    1  P_os: Adam's state split     8 + 8/N        4 + 12/N                     2Ψf
    2  P_g: gradients too           4 + 12/N       2 + 14/N                     (k+1)Ψf
    3  P_p: parameters too          16/N           16/N                         3kΨf

What happens when, to each unit (the parameters of a layer or block, in one flat buffer):

                         stage 0            stage 1           stage 2              stage 3
    before its forward   -                  -                 -                    all-gather it
    before its backward  -                  -                 -                    all-gather again
    at a gradient        add it to the      as 0              add it to a bucket;  as 2
    (the hook)           whole gradient                       full: reduce-scatter
    after backward       -                  -                 the last sum ends:   as 2, and all
                                                              no bucket is left    layers are freed
    in step: gradients   reduce-scatter,    reduce-scatter    -                    -
                         all-gather
             AdamW on    all of it          1/N of it         1/N                  1/N
             weights     -                  all-gather        all-gather           -

Offload moves the optimizer's part to the CPU: fp32 weights and moments, 12/N bytes of host memory
(stage 0: 12). A step needs buffers besides: what it gathers (one layer, and the next one on its
way), the gradient of a layer (and the one before, on its way). Each stage keeps one thing less than
the one before: the update is always `adamw_` on a flat slice, the gradient always the sum over
ranks of a flat buffer, so all stages give the same numbers. There is no wrapper around the model:
    optimizer = AdamW(model, stage=3, ...);  optimizer.backward(loss);  optimizer.step(lr)
A loss is a sum divided by its count over the whole optimizer step, all ranks and micro-batches:
gradients are added, never averaged (D4 5.3.2's loss / accumulation_steps is a mean of means, wrong
when lengths differ).
"""

import argparse
import ctypes
import datetime
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

# Waiting CPU threads give up their core soon: on a busy machine spinning costs a factor of ten.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: a group that exists by then would stay for ever
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

# ==== the arithmetic


def plan(parameters, world, sixteen_bit=True, micro_batches=1, offload=False, once=0):
    """The first table above, a dict per stage: bytes per rank at rest, bytes it sends per step.
    Offload moves the fp32 master weights and Adam's moments, 12 bytes, to the host. once: number of
    parameters that stage 3 gathers once per micro-batch and not twice, see `gathered_once`."""
    weight, state = (2, 12) if sixteen_bit else (4, 8)
    weights = weight * parameters  # Ψ
    k = micro_batches
    moved = (2 * weights, 2 * weights, (k + 1) * weights, k * (3 * weights - weight * once))
    rows = []
    for stage in range(4):
        state_ranks = world if stage >= 1 else 1  # among how many ranks it is split
        grad_ranks = world if stage >= 2 else 1
        weight_ranks = world if stage >= 3 else 1
        row = {"parameters": weights / weight_ranks,
               "gradients": weights / grad_ranks,
               "optimizer": 0 if offload else state * parameters / state_ranks}
        row["total"] = sum(row.values())
        row["host"] = 12 * parameters / state_ranks if offload else 0
        row["sent/step"] = moved[stage] * (world - 1) / world
        rows.append({"stage": stage} | row)
    return rows


def gathered_once(config) -> int:
    """How many parameters stage 3 gathers once, not twice: the embedding's (its backward reads no
    weight) and the head's (still there when backward begins); a tied matrix counts as neither."""
    return 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size


def rlhf(parameters, world) -> list[dict]:
    """Bytes per rank in 16 bits of SFT's one model, DPO's two (policy, frozen reference) and PPO's
    four (policy and value model train, reference and reward model are frozen), all of one size."""
    rows = []
    for row in plan(parameters, world):
        one, frozen = row["total"], row["parameters"]
        rows.append({"stage": row["stage"], "a trained model": one, "a frozen one": frozen,
                     "SFT": one, "DPO": one + frozen, "PPO": 2 * one + 2 * frozen})
    return rows


# ==== two collectives

SENT = {"bytes": 0}  # what this rank sent through reduce_scatter and all_gather


def own_slice(full):
    """This rank's slice of a buffer of N equal slices."""
    return full.chunk(dist.get_world_size())[dist.get_rank()]


def reduce_scatter(full):
    """Starts the sum over N ranks of a buffer of N equal slices; `summed` ends it. Sends (N-1)/N of
    the buffer. Returns (works to wait for, memory that the other ranks' slices come into)."""
    world = dist.get_world_size()
    SENT["bytes"] += full.nbytes * (world - 1) // world
    if world == 1:
        return [], None
    if full.is_cuda:
        return [dist.reduce_scatter_single(own_slice(full), full, async_op=True)], None
    # gloo's reduce_scatter is an all_reduce, twice the bytes: exchange the slices, add them later
    received = torch.empty_like(full)
    return [dist.all_to_all_single(received, full, async_op=True)], received


def summed(full, works, received):
    """Waits for reduce_scatter(full): rank r's slice of the sum; it stands in slice r of full."""
    wait(works)
    total = own_slice(full)
    if received is not None:  # slice by slice: torch.sum takes ten times as long in bf16
        first, *others = received.chunk(dist.get_world_size())
        total.copy_(first)
        for part in others:
            total.add_(part)
    return total


def all_gather(full, shard):
    """Starts to fill a buffer of N equal slices with every rank's shard. Sends (N-1)/N of it.
    Returns the works to wait for."""
    world = dist.get_world_size()
    SENT["bytes"] += full.nbytes * (world - 1) // world
    if full.is_cuda:
        return [dist.all_gather_single(full, shard, async_op=True)]
    own = own_slice(full)
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    if world == 1:
        return []
    # gloo's all_gather copies through a second buffer: each rank sends straight into its place
    return [dist.broadcast(part, r, async_op=True) for r, part in enumerate(full.chunk(world))]


def wait(works):
    """Until these collectives are done."""
    for work in works:
        work.wait()


# ==== sharding


class Unit:
    """Parameters that travel together (a block, or another layer), as views of one flat buffer.

    The buffer is padded to a multiple of the world size, so all ranks' slices are equal. Weights
    that decay stand first: weight decay is then a prefix of the slice, and no mask is kept.

    name, trainable   path in the model; False: frozen, and nothing of grad, arrived, Adam's below
    numel, decayed    elements without the padding; those of them, at the front, that decay
    places            {parameter: its place in the buffer, a slice}
    lo, hi            the part [lo, hi) that this rank's Adam updates; in stage 0 it is everything
    flat, shard       the whole weights; that part of them, in stages 0-2 a view of flat
    filling           works that fill flat, [] when it is full; None: it has no memory (stage 3)
    shown             whether the parameters are views of flat
    bucket, grad      the whole gradient; that part of it, in stages 0 and 1 a view of the bucket
    arrived           number of parameters whose gradient is in the bucket (this micro-batch)
    received          other ranks' slices of a gradient that is being summed
    master, exp_avg, exp_avg_sq   what Adam works on: that part in fp32, and its two moments
    """

    def __init__(self, name, parameters, sharded):
        self.name = name
        self.trainable = parameters[0].requires_grad
        floating = parameters[0].is_floating_point()  # else bytes of packed weights
        dtype = sharded.dtype if floating else parameters[0].dtype
        initial = self.flatten(parameters, dtype, sharded.device)
        rank, world = dist.get_rank(), dist.get_world_size()
        first, parts = (rank, world) if sharded.split_state else (0, 1)
        part = len(self.flat) // parts
        self.lo, self.hi = first * part, (first + 1) * part
        self.shard = self.flat[self.lo : self.hi]
        if sharded.split_params:
            self.shard = self.shard.clone()  # outlives the buffer
        self.filling = []
        self.grad = self.bucket = self.received = None
        self.arrived = 0
        if self.trainable:
            self.add_state(initial[self.lo : self.hi], sharded)

    def flatten(self, parameters, dtype, device):
        """Moves the parameters into the buffer. Returns it as it was before rounding to dtype."""
        parameters = sorted(parameters, key=lambda p: p.dim() < 2)
        self.numel = sum(p.numel() for p in parameters)
        self.decayed = sum(p.numel() for p in parameters if p.dim() >= 2)
        world = dist.get_world_size()
        size = -(-self.numel // world) * world  # rounded up
        initial = torch.zeros(size, dtype=parameters[0].dtype, device=device)
        self.places = {}
        start = 0
        for p in parameters:
            self.places[p] = slice(start, start + p.numel())
            initial[self.places[p]] = p.data.flatten()
            start += p.numel()
        dist.broadcast(initial, 0)  # ranks may have started from different weights
        self.flat = initial.to(dtype, copy=True)
        self.show()
        return initial

    def add_state(self, initial, sharded):
        """Gradient and Adam's state, all zero; initial: this rank's part of the weights."""
        sixteen_bit = sharded.dtype.itemsize == 2
        self.master = self.shard
        if sixteen_bit or sharded.offload:
            # 16-bit weights lose updates below 1/256 of themselves: Adam works on an fp32 copy.
            wide = torch.float32 if sixteen_bit else sharded.dtype
            self.master = initial.to("cpu" if sharded.offload else sharded.device, wide, copy=True)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        if sharded.split_grads:
            self.grad = torch.zeros_like(self.shard)
        else:
            self.bucket = torch.zeros_like(self.flat)
            self.grad = self.bucket[self.lo : self.hi]

    def open_bucket(self):
        """The bucket; in stages 2 and 3 there is none until a gradient arrives."""
        if self.bucket is None:
            self.bucket = torch.zeros_like(self.flat)
        return self.bucket

    def show(self):
        """Makes the parameters views of the buffer."""
        self.shown = True
        for p, place in self.places.items():
            p.data = self.flat[place].view(p.shape)

    def prefetch(self):
        """Stage 3: starts to collect all shards in the buffer."""
        if self.filling is None:
            self.flat.untyped_storage().resize_(self.flat.nbytes)
            self.filling = all_gather(self.flat, self.shard)

    def gather(self):
        """Stage 3: the whole parameters, for as long as the layer computes."""
        if self.shown:  # in generation a layer is entered once a token
            return
        self.prefetch()
        wait(self.filling)
        self.filling = []
        self.show()

    def release(self):
        """Stage 3: frees the buffer."""
        if self.filling is None:
            return
        wait(self.filling)
        # A weight used by mistake while it is away must be noticed. What stands in for it has the
        # right shape and one element's memory: NaN, so that the loss becomes NaN.
        hole = self.flat.new_full((), math.nan if self.flat.is_floating_point() else 0)
        for p in self.places:
            p.data = hole.expand(p.shape)
        self.shown = False
        # Dropping the tensor would free nothing: autograd saved views of it for the backward pass,
        # and they hold its memory. So that is taken away under them; the gather before the layer's
        # backward puts it back, and the views see the weights again.
        self.flat.untyped_storage().resize_(0)
        self.filling = None


def named_units(module, path="", whole=False):
    """(module, path, [parameters]) of each unit: every element of a ModuleList, and every module
    with parameters of its own, whole: what is in it may need them (LoRA) while it computes."""
    if list(module.parameters(recurse=whole)):
        yield module, path, list(module.parameters())
    elif not whole:
        for name, child in module.named_children():
            within = isinstance(module, nn.ModuleList)
            yield from named_units(child, f"{path}.{name}".lstrip("."), within)


class Sharded:
    """A model whose parameters live in flat units, in stage 3 gathered while their layer computes.
    By itself it serves frozen models (PPO's reference and reward model): no gradients, no Adam.
    overlap: while a layer computes, the next one's weights travel in (stage 3) and the previous
    one's gradient travels out (stages 2 and 3), never more; else nothing travels meanwhile."""

    def __init__(self, model, stage=0, dtype=None, device=None, overlap=True, offload=False):
        first = next(model.parameters())
        self.model = model
        self.dtype, self.device = dtype or first.dtype, device or first.device
        self.overlap = overlap
        self.offload = offload
        self.split_state = stage >= 1  # the paper's P_os
        self.split_grads = stage >= 2  # P_g
        self.split_params = stage >= 3  # P_p
        self.units = []
        self.owner = {}  # parameter: its unit
        self.layers = []  # stage 3: each layer's units in the order of forward
        self.direction = 1  # forward; -1: backward
        self.kept = 0  # how many `gathered` are open: then nothing is released
        for module, path, parameters in list(named_units(model)):
            # a tied weight belongs to the layer that names it first
            new = [p for p in parameters if p not in self.owner]
            self.add_unit(path, [p for p in new if p.requires_grad])
            frozen = [p for p in new if not p.requires_grad]
            self.add_unit(f"{path} (frozen)", [p for p in frozen if p.is_floating_point()])
            self.add_unit(f"{path} (packed)", [p for p in frozen if not p.is_floating_point()])
            if self.split_params:
                self.watch(module, parameters)

    def add_unit(self, name, parameters):
        """A unit of these parameters, if there are any."""
        if parameters:
            unit = Unit(name, parameters, self)
            self.units.append(unit)
            self.owner |= dict.fromkeys(parameters, unit)
            self.release()

    def watch(self, module, parameters):
        """Stage 3: this layer's weights come and go with its forward and backward."""
        i = len(self.layers)
        units = [self.owner[p] for p in parameters]
        self.layers.append(list(dict.fromkeys(units)))
        module.register_forward_pre_hook(lambda module, inputs: self.enter(i))
        module.register_forward_hook(lambda module, inputs, output: self.leave(module, i, output))

    def enter(self, i):
        """Before layer i computes, forward or backward: gathers its units, starts to gather the
        next layer's and frees all others, so that two layers are there at most."""
        following = i + self.direction
        first = 0 if self.direction > 0 else 1  # layer 0 embeds: its backward reads no weight
        ahead = []
        if self.overlap and first <= following < len(self.layers):
            ahead = self.layers[following]
        self.release([*self.layers[i], *ahead])
        for unit in self.layers[i]:
            unit.gather()
        for unit in ahead:
            unit.prefetch()

    def leave(self, module, i, output):
        """After layer i's forward. Its weights stay until the next layer enters."""
        if not output.requires_grad:  # there will be no backward
            if i + 1 == len(self.layers):
                self.release()
        elif not isinstance(module, nn.Embedding):
            # Backward reads the weights again. This hook on the OUTPUT fires when the output's
            # gradient is there, that is before the layer's own backward; one on its parameters
            # would fire after. An embedding's backward only adds the gradient up, row by row.
            output.register_hook(lambda grad: self.enter(i))

    def release(self, needed=()):
        """Stage 3: frees every gathered unit that is not needed."""
        if self.split_params and not self.kept:
            for unit in self.units:
                if unit not in needed:
                    unit.release()

    @contextmanager
    def gathered(self):
        """All parameters for a while: one gather per rollout, not one per token. Collective."""
        self.kept += 1
        try:
            for unit in self.units:
                unit.gather()
            yield
        finally:
            self.kept -= 1
            self.release()

    def full_parameters(self):
        """(name, whole parameter) one by one, for saving: one unit beyond this rank's share is
        the most it holds. Collective: every rank has to walk through it."""
        for name, p in self.model.named_parameters():
            self.release([self.owner[p]])
            self.owner[p].gather()
            yield name, p.data.clone()  # a copy outlives the buffer (and numpy would pin it)
        self.release()

    def live_bytes(self) -> dict[str, int]:
        """Bytes of this rank's live tensors by kind, counted on the storages themselves. Buffers
        are gathered parameters, buckets and what comes in: at rest there are none."""
        trained = [u for u in self.units if u.trainable]
        state = [t for u in trained for t in (u.master, u.exp_avg, u.exp_avg_sq)]
        passing = [t for u in self.units for t in (u.flat, u.bucket, u.received)]
        kinds = {"parameters": [u.shard for u in self.units],
                 "gradients": [u.grad for u in trained],
                 "optimizer": [] if self.offload else state,
                 "host": state if self.offload else [],
                 "buffers": [t for t in passing if t is not None]}
        count = {}
        seen = set()  # a storage counts once, with the first kind: an fp32 master is the shard
        for kind, tensors in kinds.items():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            count[kind] = sum(s.nbytes() for place, s in storages.items() if place not in seen)
            seen |= set(storages)
        return count


# ==== the optimizer

PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements; on a CPU a piece stays in the cache


def pieces(flat) -> list[slice]:
    """The slices in which Adam walks through a flat tensor, so that what it needs besides stays
    small, on a CPU in the cache."""
    size = PIECE[flat.device.type]
    return [slice(start, start + size) for start in range(0, flat.numel(), size)]


def adamw_(weight, grad, exp_avg, exp_avg_sq, t, lr, betas, eps, weight_decay, decayed):
    """Step t = 1, 2, … of AdamW in place on flat tensors (Loshchilov & Hutter 2019, algorithm 2);
    the first `decayed` elements shrink by lr · weight_decay, apart from the gradient: the W."""
    beta1, beta2 = betas
    weight[:decayed].mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = exp_avg_sq.sqrt()
    scale.div_(math.sqrt(1 - beta2**t)).add_(eps)
    weight.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**t))


def lr_at(step, steps, peak, warmup=0.05, floor=0.1) -> float:
    """Linear warmup over the first `warmup` share of the steps, then a cosine down to floor · peak,
    and flat after (D4 5.3.1's scheduler climbs again past its end)."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # 1 → 0
    return peak * (floor + (1 - floor) * cosine)


class AdamW(Sharded):
    """AdamW over ZeRO stages 0-3: backward(loss) once per micro-batch, then step(lr)."""

    def __init__(self, model, stage=0, dtype=None, device=None, betas=(0.9, 0.95), eps=1e-8,
                 weight_decay=0.1, grad_clip=1.0, overlap=True, offload=False):
        super().__init__(model, stage, dtype, device, overlap, offload)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.grad_clip = grad_clip
        self.trained = [u for u in self.units if u.trainable]
        self.t = 0  # steps taken
        self.in_flight = None  # the unit whose gradient is being summed, and the works
        self.handing_out = []  # stage 0: works that send finished sums to all ranks
        self.pinned = None  # offload: memory that cannot be paged out, so that a GPU copies from it
        if offload:
            cuda = torch.device(self.device).type == "cuda"
            self.pinned = torch.empty(PIECE["cpu"], dtype=self.dtype, pin_memory=cuda)
        # fp16 gradients below 6e-8 vanish: the loss is scaled up, by trial (D4 2.4.2)
        self.scale = 65536.0 if self.dtype == torch.float16 else 1.0
        self.good = 0  # steps since the last overflow
        mine = weakref.proxy(self)  # a C++ hook that held self would keep the model alive for ever
        for unit in self.trained:
            for p in unit.places:
                p.register_post_accumulate_grad_hook(lambda p: mine.on_grad(p))

    def backward(self, loss):
        """Adds a micro-batch's gradients. Collective in stages 2 and 3: all ranks call it equally
        often, with losses of the same parameters (an empty micro-batch has weight 0)."""
        self.direction = -1
        (loss * self.scale).backward()  # calls on_grad
        for unit in self.trained:
            if self.split_grads and unit.arrived < len(unit.places):
                self.start_sum(unit)  # the loss left a parameter out: its gradient is zero
            unit.arrived = 0
        self.finish_sum()
        self.release()
        self.direction = 1

    def on_grad(self, p):
        """As soon as autograd has a gradient, it moves into its unit's bucket and is freed."""
        unit = self.owner[p]
        unit.open_bucket()[unit.places[p]].add_(p.grad.flatten())
        p.grad = None
        unit.arrived += 1
        if self.split_grads and unit.arrived == len(unit.places):
            self.start_sum(unit)

    def start_sum(self, unit):
        """Starts the sum of a unit's bucket over the ranks. In stages 2 and 3 it travels while
        backward computes the next layer's: at most one bucket is in flight, and one fills."""
        self.finish_sum()
        works, unit.received = reduce_scatter(unit.open_bucket())
        self.in_flight = unit, works
        if not self.overlap:
            self.finish_sum()

    def finish_sum(self):
        """Waits for the sum in flight, if there is one, and keeps this rank's part of it."""
        if self.in_flight is None:
            return
        unit, works = self.in_flight
        self.in_flight = None
        total = summed(unit.bucket, works, unit.received)
        unit.received = None
        if self.split_grads:
            unit.grad += total  # over micro-batches
            unit.bucket = None
        elif not self.split_state:
            # Stage 0 needs the whole sum. An all-reduce is a reduce-scatter and an all-gather, in
            # bytes too; written so, all four stages add the same numbers in the same order.
            self.handing_out += all_gather(unit.bucket, total)
        # stage 1: the sum stands in the bucket, where grad is a view of it

    @torch.no_grad()
    def step(self, lr) -> float:
        """Clips by the global norm, updates, and returns the norm before clipping (inf or nan:
        an fp16 overflow, the step is skipped)."""
        if not self.split_grads:  # else backward did it
            for unit in self.trained:
                self.start_sum(unit)
            self.finish_sum()
            wait(self.handing_out)
            self.handing_out = []
        norm = self.grad_norm()
        finite = math.isfinite(norm)
        if finite:
            self.t += 1
            clip = min(1.0, self.grad_clip / (norm + 1e-6))
            self.update(lr, clip / self.scale)
            self.publish()
        elif self.dtype != torch.float16:
            raise SystemExit(f"step {self.t}: the gradient is not finite; lower --lr, or look at "
                             "the data of this step")
        self.adjust_scale(finite)
        for unit in self.trained:
            whole = unit.grad if self.split_grads else unit.bucket
            whole.zero_()
        return norm

    def grad_norm(self) -> float:
        """The norm of the whole model's gradient, without the scale of fp16."""
        norms = [torch.linalg.vector_norm(unit.grad[part], dtype=torch.float64)
                 for unit in self.trained for part in pieces(unit.grad)]
        square = torch.stack(norms).square().sum()
        if self.split_state:  # the ranks' parts together are everything, each element once
            dist.all_reduce(square)
        return square.sqrt().item() / self.scale

    def update(self, lr, factor):
        """AdamW on this rank's part of the weights, with factor times its gradient."""
        for unit in self.trained:
            for part in pieces(unit.master):
                grad = self.staged(unit.grad[part]).to(unit.master) * factor
                adamw_(unit.master[part], grad, unit.exp_avg[part], unit.exp_avg_sq[part],
                       self.t, lr, self.betas, self.eps, self.weight_decay,
                       decayed=max(0, unit.decayed - unit.lo - part.start))  # of this piece

    def staged(self, piece):
        """A piece on its way between GPU and host (offload); else the piece itself."""
        if self.pinned is None:
            return piece
        return self.pinned[: piece.numel()].copy_(piece)

    def publish(self):
        """Master weights → weights of the training dtype, wherever they are computed with."""
        works = []
        for unit in self.trained:
            if unit.master is not unit.shard:
                for part in pieces(unit.master):
                    unit.shard[part].copy_(self.staged(unit.master[part]))
            # (in stage 3 flat has no memory now: the next forward gathers what it needs)
            if self.split_state and unit.filling is not None:
                works += all_gather(unit.flat, unit.shard)
        wait(works)

    def adjust_scale(self, finite):
        """fp16 only: halve the loss scale at an overflow, double it after 1000 good steps."""
        if self.dtype != torch.float16:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale *= 0.5
        elif self.good % 1000 == 0:
            self.scale *= 2.0

    def state(self) -> dict:
        """This rank's part of the training state: tensors, plain numbers, each unit's [lo, hi)."""
        units = {}
        for u in self.trained:  # cloned: torch.save writes the whole buffer under a slice
            units[u.name] = {"lo": u.lo, "hi": min(u.hi, u.numel), "master": u.master.clone(),
                             "exp_avg": u.exp_avg, "exp_avg_sq": u.exp_avg_sq}
        return {"t": self.t, "dtype": str(self.dtype), "scale": self.scale, "good": self.good,
                "units": units}

    @torch.no_grad()
    def load(self, states):
        """states: those of all ranks, of any world size and stage; picks what is owned now."""
        for unit in self.trained:
            for part in (state["units"][unit.name] for state in states):
                lo, hi = max(unit.lo, part["lo"]), min(unit.hi, part["hi"])  # what both hold
                if lo < hi:
                    for key in ("master", "exp_avg", "exp_avg_sq"):
                        found = part[key][lo - part["lo"] : hi - part["lo"]]
                        getattr(unit, key)[lo - unit.lo : hi - unit.lo] = found
        self.t = states[0]["t"]
        if states[0]["dtype"] == str(self.dtype):
            self.scale, self.good = states[0]["scale"], states[0]["good"]
        self.publish()


# ==== the state of a run


def save_state(folder, optimizers, numbers):
    """Writes folder/step-N/: a file per rank, then the manifest that makes them valid; keeps this
    state and the one before. A kill at any instant leaves one of them whole. Collective."""
    folder = Path(folder)
    rank = dist.get_rank()
    target = folder / f"step-{numbers['step']:08d}"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"rank-{rank}.pt"
    states = {name: optimizer.state() for name, optimizer in optimizers.items()}
    write_atomically(path, lambda file: torch.save(states, file))
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, file_hash(path))
    if rank == 0:
        content = numbers | {"files": hashes}
        write_json(target / "manifest.json", content | {"check": keyed_seed(content)})
        # whatever stands behind this step belongs to a past that was given up
        whole = sorted(m.parent for m in folder.glob("step-*/manifest.json") if m.parent <= target)
        for old in set(folder.glob("step-*")) - set(whole[-2:]):
            shutil.rmtree(old)
    dist.barrier()


def load_state(folder, optimizers) -> dict:
    """Fills the optimizers from the newest state whose files are whole; returns its numbers
    ({}: nothing there)."""
    chosen = [None]
    if dist.get_rank() == 0:
        for manifest in sorted(Path(folder).glob("step-*/manifest.json"), reverse=True):
            try:
                chosen = [whole_state(manifest)]
                break
            except ValueError as damaged:
                print(f"{damaged} is damaged; going back to the state before it", flush=True)
    dist.broadcast_object_list(chosen, 0)
    if chosen[0] is None:
        return {}
    numbers, files = chosen[0]
    states = [torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files]
    for name, optimizer in optimizers.items():
        optimizer.load([state[name] for state in states])
    return numbers


def whole_state(manifest) -> tuple[dict, list[str]]:
    """A saved state's numbers and files; ValueError(path) if one of them is not as written."""
    try:
        numbers = json.loads(manifest.read_bytes())
        whole = numbers.pop("check") == keyed_seed(numbers)
    except (ValueError, KeyError, AttributeError):  # no JSON, or of another form
        whole = False
    if not whole:
        raise ValueError(manifest)
    files = [manifest.with_name(f"rank-{r}.pt") for r in range(len(numbers["files"]))]
    for file, digest in zip(files, numbers["files"]):
        if not file.exists() or file_hash(file) != digest:
            raise ValueError(file)
    return numbers, [str(file) for file in files]


# ==================================================================================================
# What scripts merely stand on: read once, or never
# ==================================================================================================

# ==== launch


@dataclass
class BaseConfig:
    """What every command that runs a model can be told."""

    seed: int = 0  # of weights, batches and samples
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"  # bf16 where that is fast
    threads: int = 0  # CPU threads per process; 0: the cores divided by the processes
    deterministic: bool = False  # CUDA: only kernels that give the same bits twice
    timeout: float = 600.0  # seconds that a rank waits for the others before it ends


@dataclass
class RunConfig(BaseConfig):
    """What every training script can be told besides; each adds its own and other defaults."""

    out: str = "out/run"  # folder of this run
    fresh: bool = False  # start over instead of resuming what stands in --out
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows per optimizer step over all processes, whatever their number
    micro_tokens: int = 2048  # padded tokens of a forward pass of a process; less takes less memory
    lr: float = 1e-3  # peak learning rate, after warmup
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    min_lr: float = 0.1  # end of the cosine, as a share of the peak
    weight_decay: float = 0.1  # AdamW's, on weights of two and more dimensions
    grad_clip: float = 1.0  # largest norm of the gradient
    offload: bool = False  # fp32 weights and Adam's moments in CPU memory (ZeRO-Offload)
    checkpointing: bool = False  # recompute activations in backward (D4 2.4.2)
    save_every: int = 500  # steps between two saved training states; 0: save only when stopped
    log_every: float = 10.0  # seconds between two printed lines where the output is no terminal


@dataclass
class TuneConfig(RunConfig):
    """What scripts that go on from a model can be told of what is trained (model.py, `tune`)."""

    tune: Literal["full", "lora"] = "full"  # what is trained: everything, or LoRA's matrices
    tune_size: int = 8  # LoRA's rank
    alpha: float = 16.0  # LoRA's change is scaled by alpha / tune-size


# These may change between a run and its resumption: speed and memory, not what is trained.
FREE = {"out", "fresh", "micro_tokens", "zero", "device", "dtype", "threads", "checkpointing",
        "save_every", "log_every", "timeout", "offload", "compile"}
# Of these there is at least one; any other number may be 0.
COUNTS = {"batch_size", "micro_tokens", "tune_size", "replies", "minibatches", "ppo_epochs",
          "world_size", "micro_batches", "rows"}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}


def parse_config(Config, argv=None):
    """Config from the command line: a kebab-case flag per field; a Literal lists its values."""
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    # The help text is the field's comment, read from the source: it has to stand on the field's
    # own line, whole. The most derived class comes first, and the first comment found counts.
    source = "".join(inspect.getsource(c) for c in Config.__mro__ if c is not object)
    for field in fields(Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        text = f"{comment[1] if comment else ''} (default: {field.default!r})".replace("%", "%%")
        kind = {"type": type(field.default), "choices": get_args(field.type) or None}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help=text, **kind)
    args = parser.parse_args(argv)
    for field in fields(Config):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        least = 1 if field.name in COUNTS else 0
        if type(value) in (int, float) and value < least <= field.default:
            parser.error(f"{flag} {value}: it is at least {least}")
        if field.name == "val_fraction" and value >= 1:
            parser.error(f"{flag} {value}: it is below 1, or nothing is left to train on")
    return Config(**vars(args))


def launch(main, Config, argv=None):
    """Runs main(config), under `python x.py` and `torchrun x.py` alike; if a rank fails, all end
    with its message."""
    let_print()
    try:
        main(parse_config(Config, argv))
    except (Exception, SystemExit) as error:
        asked_to_stop = isinstance(getattr(error, "code", None), int)
        if asked_to_stop or not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        raise SystemExit(first_failure(error)) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def let_print():
    """A terminal that lacks a character, such as all Chinese ones, shows "?" in its place."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")


def first_failure(error, patience=3.0) -> str:
    """What the first rank that failed said, and which ranks say nothing: the others only see that
    a collective broke. They tell each other through torchrun's store, which outlives them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
    first = mine = f"rank {rank}: {kind}{error}"
    silent = []
    try:
        store = meeting_place("failures", patience, serve=False)
        first = store.compare_set("first", "", mine).decode()
        store.set(str(rank), "here")
        if kind and first == mine:
            traceback.print_exception(error)
        dist.destroy_process_group()  # wakes who waits for this rank
        for _ in range(int(patience / 0.05)):
            silent = [str(r) for r in range(world) if not store.check([str(r)])]
            if not silent:
                return first
            time.sleep(0.05)
    except dist.DistError:
        first += "; the machine that keeps the ranks' messages is gone"
    lost = f"no sign of rank {', '.join(silent)}: killed, frozen or cut off"
    return f"{lost} ({first})" if silent else first


def meeting_place(name, seconds, serve=True):
    """The store that torchrun serves (without it: rank 0), by which the ranks find each other. Each
    restart has a part of its own: in the last one's stand the addresses of the dead."""
    env = os.environ
    serve = serve and env["RANK"] == "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=serve,
                          timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False,
                          use_libuv=sys.platform != "win32")
    return dist.PrefixStore(f"{name} {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def setup(cfg) -> tuple[torch.device, torch.dtype]:
    """Process group, device, threads and seed, for one process as for many: nobody asks which."""
    env = os.environ
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device == "cuda" and not cuda:
        raise SystemExit("--device cuda: this torch sees no GPU; use cpu, or install a CUDA build")
    device = torch.device("cuda", int(env.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        rank, world = 0, 1
        store = dist.HashStore()
        if "RANK" in env:  # torchrun
            rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            store = meeting_place("ranks", cfg.timeout)
        patience = datetime.timedelta(seconds=cfg.timeout)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, store=store,
                                rank=rank, world_size=world)
    if cfg.deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # glibc gives large freed blocks back to the kernel, and they fault in anew at every step, 3-4 %
    # of its time. Here it keeps them: M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, 1 << 30)
    # matrix kernels are made for each shape and kept, 1024 unless told otherwise
    env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    cores = cpu_cores()
    share = max(1, cores // int(env.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(cfg.threads or share)  # torchrun's own default is 1
    torch.manual_seed(cfg.seed)  # equal weights on every rank; batches are keyed by step instead
    name, why = cfg.dtype, ""
    if name == "auto":
        fast = fast_bf16(device)
        name, why = ("bf16", " (fast here)") if fast else ("fp32", " (no fast bf16 here)")
    print0(f"{dist.get_world_size()} process(es) x {torch.get_num_threads()} threads of {cores} "
           f"cores, {device}, {dist.get_backend()}, {name}{why}, ZeRO stage {cfg.zero}")
    return device, DTYPES[name]


def fast_bf16(device) -> bool:
    """Whether the hardware multiplies bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    return any(getattr(torch.cpu, name, bool)() for name in instructions)  # bool() is False


def cpu_cores() -> int:
    """Cores this process may use: the affinity mask, less what a container's quota takes away."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup 2, 1
        try:
            texts = [Path("/sys/fs/cgroup", file).read_text(encoding="utf-8") for file in files]
            quota, period = map(int, " ".join(texts).split())
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        if quota > 0:
            cores = min(cores, quota // period)
    return max(1, cores)


def optimizer_of(model, cfg, device, dtype) -> AdamW:
    """The optimizer that a RunConfig describes."""
    model.model.activation_checkpointing = cfg.checkpointing
    return AdamW(model, cfg.zero, dtype, device, weight_decay=cfg.weight_decay,
                 grad_clip=cfg.grad_clip, offload=cfg.offload)


def print_held(name, sharded):
    """What a model holds on this rank, trained or not."""
    parameters = list(sharded.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = ", ".join(f"{kind} {n:,}" for kind, n in sharded.live_bytes().items() if n)
    print0(f"{name:<10} {sharded.model.config.num_parameters():>12,} parameters, "
           f"{trained:>12,} trained; bytes here: {held}")


def print0(*args, **kwargs):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(*args, **kwargs, flush=True)


def keyed_seed(*key) -> int:
    """A 63-bit seed from anything printable: randomness keyed by (seed, step, row) has no state."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def all_sum(*values, device=None) -> list[float]:
    """The sum of each number over all ranks (in float64)."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def everywhere(mine: dict) -> dict:
    """Merges the dicts of all ranks: what each computed for its share, known to all."""
    shares = [mine] * dist.get_world_size()
    # Not alone: gloo's thread would start OpenMP threads beside ours, and with more of them than
    # cores all sleep between two operations.
    if len(shares) > 1:
        dist.all_gather_object(shares, mine)
    return {key: value for share in shares for key, value in share.items()}


def in_shares(keys, make) -> dict:
    """{key: what is made of it}: each process makes a share, by make(its keys), and gets all."""
    mine = keys[dist.get_rank() :: dist.get_world_size()]
    return everywhere(dict(zip(mine, make(mine))))


def prepared(ready, build):
    """Rank 0 of each machine builds a file that all ranks need, ending with an atomic rename; the
    others wait for the file (ready() → bool), not in a collective, which would time out."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    while not ready():
        if first:
            build()
        else:
            time.sleep(0.2)


def write_atomically(path, write):
    """Calls write(binary file) on a neighbour that is renamed when it is on disk: a reader, or a
    run killed at any instant, sees the old file or the whole new one."""
    temporary = Path(f"{path}.tmp{os.environ.get('RANK', '')}")  # two machines may build one file
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, content):
    """Writes content as JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def file_hash(path) -> str:
    """sha256 of a file, in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ==== the folder of a run


class Run:
    """What a run leaves in --out beside the weights: run.json, metrics.jsonl, curves.svg, eval.json
    and the state to resume from.

    Same --out and same config: the run resumes where it was; another config: one line and an exit;
    --fresh starts over. Every rank reads the same folder and so decides the same.
    """

    def __init__(self, cfg, steps, inputs=()):
        """inputs: the files it depends on; if one has changed, a run in --out starts over."""
        self.cfg = cfg
        self.steps = steps
        self.out = Path(cfg.out)
        self.metrics = self.out / "metrics.jsonl"
        self.shown = 0.0  # when `log` last printed a line
        self.tokens = 0  # since this start
        self.stopping = 0.0  # when the run was asked to stop
        for path in inputs:
            if not Path(path).is_file():
                raise SystemExit(f"{path}: no such file; make data writes out/data, "
                                 "--data takes your own")
        hashes = {str(path): file_hash(path) for path in inputs}
        fresh = self.starts_over(hashes)
        dist.barrier()  # everyone has read the old run.json
        git = f'git -C "{Path(__file__).parent}" rev-parse HEAD'
        failed, commit = subprocess.getstatusoutput(git)  # there may be no git
        self.record = {"script": Path(sys.argv[0]).name, "config": asdict(cfg), "inputs": hashes,
                       "commit": "" if failed else commit, "torch": torch.__version__,
                       "python": sys.version.split()[0], "world_size": dist.get_world_size(),
                       "threads": torch.get_num_threads(), "seconds": 0.0}
        if dist.get_rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "eval.json").unlink(missing_ok=True)
            if fresh:
                shutil.rmtree(self.out / "state", ignore_errors=True)
            write_json(self.out / "run.json", self.record)
        dist.barrier()

    def starts_over(self, hashes) -> bool:
        """Whether what stands in --out is given up. If it is of another config, or finished, the
        program ends."""
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self.cfg.fresh and not restarted:  # a restart goes on with what --fresh began
            return True
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        if not trained or not (self.out / "run.json").exists():
            return False  # there is nothing to lose
        old = json.loads((self.out / "run.json").read_text(encoding="utf-8"))
        before, now = old["config"], asdict(self.cfg)
        differing = [f"--{name.replace('_', '-')} {before.get(name)!r} → {now[name]!r}"
                     for name in now if name not in FREE and before.get(name) != now[name]]
        if differing:
            raise SystemExit(f"{self.out} holds a run of another config ({', '.join(differing)}); "
                             "--fresh starts over, another --out keeps both")
        for path, digest in hashes.items():
            if old["inputs"].get(path) != digest:
                print0(f"{path} has changed since the run in {self.out}: starting over")
                return True
        if (self.out / "eval.json").exists():
            print0(f"{self.out} is finished; --fresh trains it again")
            dist.destroy_process_group()
            raise SystemExit(0)
        return False

    def stop(self, *_):
        """Ctrl-C and SIGTERM: end at the next step boundary, with the state saved; repeated later,
        at once (within 3 seconds it is torchrun's copy of the same Ctrl-C)."""
        if self.stopping and time.time() - self.stopping > 3:
            raise SystemExit(130)
        self.stopping = self.stopping or time.time()

    def resume(self, **optimizers) -> int:
        """Loads the newest whole state, cuts metrics.jsonl off there; returns the step (or 0)."""
        state = load_state(self.out / "state", optimizers)
        self.first = state.get("step", 0)
        self.before = state.get("seconds", 0.0)  # that earlier processes took
        if dist.get_rank() == 0:
            old = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
            whole = [line for line in old.splitlines() if line.endswith("}")]  # not cut by a kill
            kept = [line + "\n" for line in whole if json.loads(line)["step"] < self.first]
            write_atomically(self.metrics, lambda file: file.write("".join(kept).encode()))
        trained = next(iter(optimizers.values()))
        self.record |= {"device": str(trained.device), "dtype": str(trained.dtype)}
        if self.first:
            print0(f"resumed at step {self.first} of {self.steps}")
        for number in (signal.SIGINT, signal.SIGTERM):  # until now a signal ended the process
            signal.signal(number, self.stop)
        self.began = time.time()
        return self.first

    def records(self) -> list[dict]:
        """What was logged, a dict a step."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def last_metrics(self) -> dict:
        """What was last logged under each name before this start, on every process. Collective."""
        dist.barrier()  # rank 0 has cut the file off
        known = {}
        for record in self.records():
            known |= record
        return known

    def seconds(self) -> float:
        """What the run took so far, over all its processes."""
        return self.before + time.time() - self.began

    def log(self, step, tokens=0, **metrics):
        """Appends a line to metrics.jsonl, and now and then shows it. A loss that is not finite
        ends the run, on every rank, with nothing overwritten."""
        for name, value in metrics.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise SystemExit(f"step {step}: {name} is not finite; lower --lr, or look at the "
                                 "data of this step")
        self.tokens += tokens
        if dist.get_rank() != 0:
            return
        record = {"step": step, **metrics, "seconds": round(self.seconds(), 3)}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        terminal = sys.stdout.isatty()
        last = step + 1 == self.steps
        if last or time.time() - self.shown > (0.2 if terminal else self.cfg.log_every):
            elapsed = max(1e-9, time.time() - self.began)
            left = int(elapsed / (step + 1 - self.first) * (self.steps - step - 1))
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            line = (f"{self.out.name} {step + 1}/{self.steps}  {left // 60}:{left % 60:02d} left  "
                    f"{self.tokens / elapsed:,.0f} tokens/s  {values}")
            if terminal:  # over the line before; one that wraps could not be written over
                line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
            print(line, end="" if terminal and not last else "\n", flush=True)
            self.shown = time.time()

    def boundary(self, step, **optimizers):
        """After every step: saves when it is time; saves and ends if any rank was asked to stop."""
        device = next(iter(optimizers.values())).device
        stop = all_sum(self.stopping > 0, device=device)[0] > 0
        every = self.cfg.save_every or self.steps
        if stop or (step + 1) % every == 0 and step + 1 < self.steps:
            numbers = {"step": step + 1, "seconds": self.seconds()}
            save_state(self.out / "state", optimizers, numbers)
        if stop:
            print0(f"\nstopped after step {step + 1}; the same command resumes")
            dist.destroy_process_group()
            raise SystemExit(130)

    def finish(self, **result):
        """Draws the curves, writes the seconds into run.json and, last (it is make's target),
        eval.json."""
        self.record["seconds"] = round(self.seconds(), 1)
        self.record["peak_bytes"] = peak_memory(torch.device(self.record["device"]))
        if dist.get_rank() == 0:
            write_json(self.out / "run.json", self.record)
            plot(curves(self.records()), self.out / "curves.svg")
            write_json(self.out / "eval.json", result)
            shutil.rmtree(self.out / "state", ignore_errors=True)
        numbers = [f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, (int, float))]
        cost = f"{self.record['seconds']:.0f} s, {self.record['peak_bytes'] / 1e9:.2f} GB at most"
        print0(f"{self.out}: {'  '.join(numbers)}  ({cost})")


# ==== curves

COLOURS = ("#2f86d1", "#d9752b", "#2f9e5f", "#a868c9", "#b58a1f", "#d6506a")
STYLE = ("text{font:11px sans-serif;fill:#757d87}.grid{stroke:#757d87;opacity:.3}"
         "@media(prefers-color-scheme:dark){text{fill:#8b949e}}")
# In nats is what is a log-probability; policy_loss and value_loss have no unit.
UNITS = {"loss": "nats", "replay_loss": "nats", "approx_kl": "nats per token",
         "kl": "nats per reply", "kl_k3": "nats per reply", "entropy": "nats per token",
         "length": "tokens", "rollout_rate": "tokens/s", "update_rate": "tokens/s"}


def ticks(low, high, count=5) -> list[float]:
    """About count round numbers, 1, 2 or 5 times a power of ten apart, the ends at or beyond low
    and high."""
    if high <= low:
        low, high = low - (abs(low) or 1), high + (abs(high) or 1)
    apart = (high - low) / count
    power = 10.0 ** math.floor(math.log10(apart))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= 0.999 * apart)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.9g}") for i in range(first, last + 1)]


def draw(title, lines, unit="", across="step") -> list[str]:
    """SVG elements of a panel 360 wide and 240 high; lines: {name: [(x, y), …]}."""
    points = sum(lines.values(), []) or [(0, 0)]
    xs, ys = zip(*points)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 8), ticks(min(ys), max(ys))
    # the axes meet at (left, 206); a digit of the labels on their left is up to 7 pixels wide
    left = max(50, 10 + 7 * max(len(f"{tick:g}") for tick in y_ticks))
    drawn = []

    def px(x):
        return round(left + (336 - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), 1)

    def py(y):
        return round(206 - 180 * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    def text(x, y, anchor, words):
        drawn.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>')

    text(left, 14, "start", title)
    text(336, 14, "end", unit)
    text(336, 236, "end", across)
    for tick in y_ticks:
        drawn.append(f'<path class="grid" d="M{left} {py(tick)}H336"/>')
        text(left - 6, py(tick) + 4, "end", f"{tick:g}")
    for tick in x_ticks:
        text(px(tick), 221, "middle", f"{tick:g}")
    for (name, points), colour in zip(lines.items(), COLOURS):
        places = " ".join(f"{px(x)},{py(y)}" for x, y in points)
        width = 1.6 if name or len(lines) == 1 else 0.6
        drawn.append(f'<polyline points="{places}" fill="none" stroke="{colour}" '
                     f'stroke-width="{width}"/>')
        text(left, 236, "start", name)
    return drawn


def plot(panels, path):
    """Writes panels, each the arguments of `draw`, as an SVG, three in a row. A line named "" is
    thin beside another, whose name stands below. No ground is painted, for the colours are read on
    a white page as on a black one."""
    size = f"{360 * min(3, len(panels))} {240 * -(-len(panels) // 3)}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>']
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({360 * (i % 3)} {240 * (i // 3)})">')
        parts += [*draw(**panel), "</g>"]
    write_atomically(path, lambda file: file.write("\n".join([*parts, "</svg>"]).encode()))


def curves(records) -> list[dict]:
    """Panels of all metrics by step: what is finite, about 150 points, of many a running mean."""
    panels = []
    for name in dict.fromkeys(key for record in records for key in record):
        if name in ("step", "seconds"):
            continue
        found = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
        apart = max(1, len(found) // 150)
        lines = {"": found[::apart]}
        half = len(found) // 50
        if half and name != "lr":
            means = []
            for i in range(0, len(found), apart):
                near = [value for _, value in found[max(0, i - half) : i + half + 1]]
                means.append((found[i][0], sum(near) / len(near)))
            lines[f"mean over {2 * half + 1} steps"] = means
        panels.append({"title": name, "lines": lines, "unit": UNITS.get(name, "")})
    return panels


# ==== the command lines


@dataclass
class PlanConfig:
    """What `zero.py plan` can be told."""

    params: float = 7.5e9  # number of parameters
    model: str = ""  # one of the documents' models (`python model.py` lists them) or a folder
    world_size: int = 64  # number of GPUs
    micro_batches: int = 1  # forward and backward passes per optimizer step
    bandwidth: float = 100.0  # GB/s that a GPU sends
    rlhf: bool = False  # PPO's four models and DPO's two as well


@dataclass
class MeasureConfig(BaseConfig):
    """What `zero.py measure` can be told."""

    model: str = "tiny"  # one of the presets that `python model.py` lists
    zero: Literal[0, 1, 2, 3] = 3  # the last ZeRO stage to measure
    rows: int = 4  # rows of a micro-batch
    context: int = 128  # tokens per row
    micro_batches: int = 2  # per optimizer step
    steps: int = 5  # optimizer steps in every stage
    overlap: bool = True  # send while the model computes
    offload: bool = False  # fp32 weights and Adam's moments in CPU memory


def preset(model, name):
    """The configuration of that name in the module `model`, or of a checkpoint's folder."""
    if name in model.PRESETS:
        return model.PRESETS[name]
    if not Path(name).is_dir():
        raise SystemExit(f"--model is a folder or one of {', '.join(model.PRESETS)}")
    return model.load_config(name)


def table(rows):
    """Prints dicts of one form as a table, all columns but the first in units of 10⁹."""
    print("".join(f"{name:>{max(12, len(name) + 2)}}" for name in rows[0]))
    for row in rows:
        first, *numbers = row.values()
        print(f"{first:>12}", *(f"{n / 1e9:>12.4g}" for n in numbers), sep="")


def show_plan(cfg, model):
    """Prints plan() in both ledgers, for a number of parameters or a model of the documents."""
    world = cfg.world_size
    size, once = cfg.params, 0
    if cfg.model:
        config = preset(model, cfg.model)
        size, once = config.num_parameters(), gathered_once(config)
    print(f"GB (10⁹ bytes) on each of {world} GPUs for {size:,.0f} parameters; the time of the "
          f"traffic at {cfg.bandwidth:g} GB/s")
    for sixteen_bit, ledger in (
            (False, "fp32: weight 4 + gradient 4 + Adam's moments 4 + 4"),
            (True, "mixed: weight 2 + gradient 2 + fp32 weight 4 + moments 4 + 4")):
        rows = plan(size, world, sixteen_bit, cfg.micro_batches, once=once)
        for row, away in zip(rows, plan(size, world, sixteen_bit, offload=True)):
            del row["host"]
            sent = row.pop("sent/step")
            row |= {"offloaded": away["total"], "host": away["host"], "sent/step": sent,
                    "seconds": sent / cfg.bandwidth}  # table() divides by 10⁹
        print(f"\n{ledger} bytes per parameter; offloaded: the GPU without fp32 weight and moments")
        table(rows)
    if cfg.rlhf:
        print("\nmodels of this size in mixed precision, a frozen one being weights only")
        table(rlhf(size, world))


class Peak(TorchDispatchMode):
    """Within it, `most` becomes the largest live_bytes(), looked at after every torch operation."""

    def __init__(self, sharded):
        super().__init__()
        self.sharded = sharded
        self.most = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        live = self.sharded.live_bytes()
        if sum(live.values()) > sum(self.most.values()):
            self.most = live
        return result


def saved_bytes(loss, model) -> int:
    """Bytes that loss(model) keeps for backward beside the parameters: D0's residual states."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(model)
    del result  # until here all that was packed lived, each at a place of its own
    return sum(kept.values())


def peak_memory(device) -> int:
    """Most bytes held since the last call: CUDA's tensors, or this process (RSS) as Linux counts;
    elsewhere 0."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    gc.collect()  # hooks make a circle: model → hook → optimizer → model
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def measure(cfg, model):
    """Trains a few steps in every stage; prints what a rank holds and sends beside the plan."""
    device, dtype = setup(cfg)
    config = preset(model, cfg.model)
    world = dist.get_world_size()

    def build(stage):
        torch.manual_seed(cfg.seed)
        net = model.CausalLM(config)
        return AdamW(net, stage, dtype, device, overlap=cfg.overlap, offload=cfg.offload)

    def loss(net):
        ids = torch.randint(0, config.vocab_size, (cfg.rows, cfg.context + 1), device=device)
        logprobs = model.token_logprobs(net, ids[:, :-1], ids[:, 1:])
        return -logprobs.mean() / cfg.micro_batches / world

    optimizer = build(0)
    for recompute in (False, True):
        optimizer.model.model.activation_checkpointing = recompute
        kept = saved_bytes(loss, optimizer.model)
        print0(f"saved for backward: {kept:,} bytes, activation checkpointing {recompute}")
    size = sum(unit.flat.numel() for unit in optimizer.units)  # padding included
    plans = plan(size, world, dtype.itemsize == 2, cfg.micro_batches, cfg.offload,
                 gathered_once(config))
    print0(f"{config}\nbytes on rank 0, at rest and at the peak of a step, measured and planned")
    columns = dict.fromkeys(["parameters", "gradients", "optimizer", "buffers", "host",
                             "sent/step"], 14) | {"ms/step": 10, "memory": 16}  # and their widths
    print0(f"{'stage':>12}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for stage in range(cfg.zero + 1):
        optimizer = build(stage)
        rest, peak = train_stage(optimizer, loss, cfg, device)
        for title, numbers in (("at rest", rest), ("peak", peak), ("plan", plans[stage])):
            line = f"{stage:>4}{title:>8}"
            for name, width in columns.items():
                line += f"{numbers[name]:>{width},.0f}" if name in numbers else " " * width
            print0(line.rstrip())


def train_stage(optimizer, loss, cfg, device) -> tuple[dict, dict]:
    """A few steps: bytes at rest; bytes at the peak, what is sent, time and memory."""
    peak_memory(device)  # counts from here
    peak = Peak(optimizer)
    seconds = []
    for step in range(cfg.steps + 1):
        SENT["bytes"] = 0
        began = time.perf_counter()
        with peak if step == 0 else nullcontext():  # looking costs time: that step does not count
            for _ in range(cfg.micro_batches):
                optimizer.backward(loss(optimizer.model))
            rest = optimizer.live_bytes()
            optimizer.step(1e-3)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[1:])[cfg.steps // 2]
    return rest, peak.most | {"sent/step": SENT["bytes"], "ms/step": 1e3 * median,
                              "memory": peak_memory(device)}


def main(model):
    """`zero.py plan` and `zero.py measure`; model: the module, which only the program imports."""
    commands = {"plan": (show_plan, PlanConfig), "measure": (measure, MeasureConfig)}
    if sys.argv[1:2] not in (["plan"], ["measure"]):
        raise SystemExit(f"{__doc__}\n{sys.argv[0]}: say plan or measure")
    command, Config = commands[sys.argv.pop(1)]
    launch(lambda cfg: command(cfg, model), Config)


if __name__ == "__main__":
    import model

    main(model)

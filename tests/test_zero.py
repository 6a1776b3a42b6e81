"""ZeRO on 1, 2, 3 processes against torch; a run's folder.   python -m pytest tests/test_zero.py

Functions named in `ranks(n, function, ...)` run on n processes (conftest.py). No size divides by 2
or 3, so that every buffer is padded; eps is 1: a small one divides every wrong scale away again.
"""

import contextlib
import functools
import inspect
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model
import peak
import zero as z
from model import (IGNORE, PRESETS, CausalLM, ModelConfig, generate, load_model, save_model,
                   token_logprobs)
from zero import DTYPES, SENT, AdamW, Run, RunConfig

SHAPE = dict(vocab_size=29, hidden_size=17, intermediate_size=29, num_hidden_layers=2, head_dim=6,
             num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16)
EMBED, BLOCK, NORM = 29 * 17, (3 + 1 + 1 + 3) * 6 * 17 + 3 * 29 * 17 + 2 * 17, 17  # sizes of units
LR, DECAY, STEPS = 0.1, 0.3, 20
# name: (changes of SHAPE, frozen parameters, micro-batches, clip, activation checkpointing)
CASES = {
    "tied": ({}, "", 1, 1e9, False),
    "accumulated, clipped": ({}, "", 2, 0.1, False),
    "untied, biases, partly frozen": ({"tie_word_embeddings": False, "model_type": "qwen2"},
                                      "embed_tokens layers.0.self_attn.q_proj", 1, 0.1, False),
    "tied and frozen": ({"model_type": "qwen3"}, "embed_tokens layers.1", 1, 1e9, True),
}


def build(case="tied", dtype=torch.float64, seed=0):
    changes, frozen, _, _, checkpointing = CASES[case]
    torch.manual_seed(seed)
    net = CausalLM(ModelConfig(**SHAPE | changes)).double()
    net.model.activation_checkpointing = checkpointing
    for name, p in net.named_parameters():
        p.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
        p.requires_grad_(not any(word in name for word in frozen.split()))
    return net.to(dtype)


def batch(step):
    """Seven rows of different lengths: input_ids and targets (7, 8)."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 29, (7, 9), generator=generator)
    lengths = torch.randint(1, 9, (7,), generator=generator)
    return ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(8) >= lengths[:, None], IGNORE)


def micro_batches(step, parts):
    """The rows dealt into parts of unequal size; of three or more the last has no target at all."""
    ids, targets = batch(step)
    used = max(parts - 1, min(parts, 2))
    for part in range(used):
        yield ids[part::used], targets[part::used]
    if used < parts:
        yield ids[:1], torch.full_like(ids[:1], IGNORE)


def flat(named):
    return np.concatenate([p.detach().double().flatten().numpy() for _, p in named])


def optimizer(case, stage, kind="fp64", seed=0, **changes):
    options = dict(eps=1.0, weight_decay=DECAY, grad_clip=CASES[case][3]) | changes
    exact = DTYPES["fp64" if kind == "fp64" else "fp32"]
    return AdamW(build(case, exact, seed), stage, DTYPES[kind], **options)


def advance(opt, case, first, last):
    """Trains over steps [first, last) and returns the gradient norms."""
    k, world, rank, norms = CASES[case][2], dist.get_world_size(), dist.get_rank(), []
    for step in range(first, last):
        count = (batch(step)[1] != IGNORE).sum()
        for ids, targets in list(micro_batches(step, k * world))[rank * k : (rank + 1) * k]:
            opt.backward(-token_logprobs(opt.model, ids, targets).sum() / count)
        norms.append(opt.step(LR))
    return norms


# ------------------------------------------------------------------------------ parity with torch


@functools.cache
def reference(case, dtype):
    """torch.optim.AdamW on the whole batch at once."""
    net = build(case, dtype)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() >= 2) == wide],
               "weight_decay": DECAY * wide} for wide in (True, False)]
    opt, norms = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1.0), []
    for step in range(STEPS):
        ids, targets = batch(step)
        (-token_logprobs(net, ids, targets).sum() / (targets != IGNORE).sum()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), CASES[case][3]).item())
        opt.step()
        opt.zero_grad()
    return np.array(norms), flat(net.named_parameters())


def train(rank, case, kind):
    """Norms and trained parameters of each stage; every rank but 0 starts from other weights."""
    results = []
    for stage in range(4):
        opt = optimizer(case, stage, kind, seed=rank)
        results.append((np.array(advance(opt, case, 0, STEPS)), flat(opt.full_parameters())))
    return results


@pytest.mark.parametrize("world, case, kind, tolerance", [
    *((2, case, "fp64", 1e-12) for case in CASES),
    (2, "untied, biases, partly frozen", "fp32", 1e-6),
    (1, "tied", "fp64", 1e-12), (1, "accumulated, clipped", "fp64", 1e-12),
    (3, "accumulated, clipped", "fp64", 1e-12), (3, "untied, biases, partly frozen", "fp64", 1e-12),
])
def test_every_stage_trains_like_torch_adamw_on_the_batch(ranks, world, case, kind, tolerance):
    norms, parameters = reference(case, DTYPES[kind])
    assert (norms > CASES[case][3]).mean() in (0, 1) and np.ptp(norms) > 0.01  # never or always
    results = ranks(world, train, case, kind)
    for stage in range(4):
        assert np.abs(results[0][stage][0] - norms).max() <= tolerance * max(1, norms.max()), stage
        assert np.abs(results[0][stage][1] - parameters).max() <= tolerance, stage
        for other in results[1:]:  # all ranks hold the same bits
            assert np.array_equal(other[stage][0], results[0][stage][0]), stage
            assert np.array_equal(other[stage][1], results[0][stage][1]), stage
        if case == "tied":  # one micro-batch, no clipping: the same additions in the same order
            assert np.array_equal(results[0][stage][1], results[0][0][1]), stage


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_offload_trains_the_same_bits_in_pieces_of_any_size(alone, monkeypatch, kind, stage):
    case = "untied, biases, partly frozen"
    plain = optimizer(case, stage, kind)
    norms, weights = advance(plain, case, 0, 3), flat(plain.full_parameters())
    monkeypatch.setitem(z.PIECE, "cpu", 500)  # smaller than a unit
    away = optimizer(case, stage, kind, offload=True)
    assert len(away.pinned) == 500 and away.live_bytes()["optimizer"] == 0
    assert away.live_bytes()["host"] == 12 * sum(u.flat.numel() for u in away.trained)
    assert advance(away, case, 0, 3) == pytest.approx(norms, rel=1e-12)
    assert np.array_equal(flat(away.full_parameters()), weights)
    again = optimizer(case, stage, kind, seed=1)  # a state is the same with and without
    again.load([away.state()])
    assert all(torch.equal(a.shard, b.shard) for a, b in zip(again.trained, away.trained))


def test_weights_decay_and_vectors_do_not(alone):
    opt = optimizer("untied, biases, partly frozen", 2)
    before = {n: p.clone() for n, p in opt.model.named_parameters()}
    opt.backward(0.0 * token_logprobs(opt.model, *batch(0)).sum())
    opt.step(LR)
    for name, p in opt.model.named_parameters():
        shrunk = 1 - LR * DECAY if p.dim() >= 2 and p.requires_grad else 1.0
        torch.testing.assert_close(p.data, before[name] * shrunk, atol=1e-15, rtol=0)


@pytest.mark.parametrize("stage", range(3))
def test_a_parameter_without_a_gradient_does_not_hold_back_its_unit(alone, stage):
    net = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)])])
    opt = AdamW(net, stage)
    for _ in range(2):  # 4 ones twice: a weight's and a bias's; the other layer takes no part
        opt.backward(net[0][0](torch.ones(1, 3)).sum())
    assert opt.step(LR) == 4.0
    assert all((u.bucket is None) == (stage == 2) for u in opt.units)


# ------------------------------------------------------------------------------- memory, traffic


def observe(rank, stage, kind, overlap):
    """What a step of k = 2 micro-batches keeps, holds at its peak and sends."""
    opt = optimizer("tied", stage, kind, overlap=overlap)
    seen = {"rest": [opt.live_bytes()], "gathered": 0, "buckets": 0}

    def passing(unit):  # a bucket that will not stay
        return opt.split_grads and unit.bucket is not None

    def look():
        whole = [u for u in opt.units if u.flat.untyped_storage().nbytes()]
        seen["gathered"] = max(seen["gathered"], len(whole))
        seen["buckets"] = max(seen["buckets"], len([u for u in opt.units if passing(u)]))

    prefetch, start_sum, most = z.Unit.prefetch, opt.start_sum, z.Peak(opt)
    z.Unit.prefetch = lambda unit: (prefetch(unit), look())
    opt.start_sum = lambda unit: (look(), start_sum(unit))
    SENT["bytes"] = 0
    with most:
        for step in range(2):
            opt.backward(-token_logprobs(opt.model, *batch(step)).sum())
            seen["rest"].append(opt.live_bytes())
        opt.step(LR)
    seen["sent"], seen["peak"] = SENT["bytes"], sum(most.most.values())
    with torch.no_grad():
        opt.model(batch(0)[0])
    seen["rest"].append(opt.live_bytes())
    parameters = list(opt.model.parameters())
    seen["holes"] = all(p.isnan().all() and p.untyped_storage().nbytes() <= 8 for p in parameters)
    seen["shapes"] = [p.shape for p in parameters] == [p.shape for p in build().parameters()]
    training, seen["gathered"] = seen["gathered"], 0
    for _ in opt.full_parameters():
        look()
    z.Unit.prefetch = prefetch
    return seen | {"gathered": training, "for saving": seen["gathered"]}


@pytest.mark.parametrize("kind, world, overlap", [
    ("fp32", 1, True), ("fp32", 2, True), ("bf16", 3, True), ("bf16", 2, False)])
def test_live_bytes_equal_the_plan_with_padding_at_rest_and_at_the_peak(
        ranks, kind, world, overlap):
    units = [-(-n // world) * world for n in (EMBED, BLOCK, BLOCK, NORM)]
    width, shape = DTYPES[kind].itemsize, peak.layers(build(), world)
    for stage in range(4):
        row = z.plan(sum(units), world, kind == "bf16", 2)[stage]
        above = width * peak.buffers(shape, stage, world > 1, overlap)
        for seen in ranks(world, observe, stage, kind, overlap):
            for live in seen["rest"]:
                expected = ("parameters", "gradients", "optimizer", "host")
                assert live == {k: row[k] for k in expected} | {"buffers": 0}, stage
            assert seen["holes"] == (stage == 3) and seen["shapes"]
            assert seen["gathered"] == (4 if stage < 3 else 1 + overlap)  # one layer and the next
            assert seen["buckets"] == (0 if stage < 2 else 1 + overlap)
            assert seen["for saving"] == (4 if stage < 3 else 1)
            assert seen["peak"] == row["total"] + above, stage
            assert seen["sent"] == row["sent/step"], stage


def measured(rank, flags):
    """What `zero.py measure` prints."""
    sys.argv[1:] = ["measure", "--threads", "1", *flags.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        z.main(model)
    return out.getvalue()


@pytest.mark.parametrize("world, flags", [
    (2, "--dtype fp32 --no-overlap --model small --micro-batches 1"), (3, "--dtype bf16 --offload")])
def test_measure_prints_a_real_model_in_every_stage_equal_to_the_plan(ranks, world, flags):
    out = ranks(world, measured, f"--steps 1 --rows 1 --context 64 {flags}")[0].splitlines()
    plain, recomputed = (int(line.split()[3].replace(",", "")) for line in out[1:3])
    name, width = ("small", 4) if "small" in flags else ("tiny", 2)
    logits = 64 * PRESETS[name].vocab_size * width  # the head keeps them either way
    assert 0 < 5 * (recomputed - logits) < plain - logits
    overlap, receiving = "--no-overlap" not in flags, True
    shape = peak.layers(CausalLM(PRESETS[name]), world)
    for stage in range(4):
        rest, most, plan = ([cell.replace(",", "") for cell in line.split()[-n:]]
                            for what, n in (("at rest", 5), ("peak", 8), ("plan", 5))
                            for line in out if line.startswith(f"{stage:>4}{what:>8}"))
        assert rest[3] == "0" and rest[:3] + rest[4:] == plan[:4]  # three kinds, and the host
        assert most[:3] == plan[:3] and most[4:6] == plan[3:]  # what is sent as well
        assert int(most[3]) == width * peak.buffers(shape, stage, receiving, overlap)
        assert float(most[6]) > 0 and int(most[7]) > 1e8


def test_saved_bytes_are_the_tensors_that_backward_needs(alone):
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh())
    x = torch.ones(3, 5)
    assert z.saved_bytes(lambda net: net(x).sum(), net) == 4 * (3 * 5 + 3 * 7)  # x, and tanh's output


def traffic(rank, stage, k, changes, checkpointing):
    """Bytes in a step of k micro-batches: as SENT counts and as the kernel does."""
    net = CausalLM(ModelConfig(**SHAPE | changes))
    net.model.activation_checkpointing = checkpointing
    opt = AdamW(net, stage)
    SENT["bytes"], before = 0, kernel_bytes()
    for step in range(k):
        opt.backward(-token_logprobs(opt.model, *batch(step)).sum())
    opt.step(LR)
    # only what is open now: the sockets of a group before may be closed in between
    return SENT["bytes"], sum(n - before.get(name, 0) for name, n in kernel_bytes().items())


def kernel_bytes():
    """{socket: tcpi_bytes_sent of TCP_INFO} of this process."""
    sent = {}
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and "socket" in (name := os.readlink(link)):
            with socket.socket(fileno=os.dup(int(link.name))) as s:
                if s.family != socket.AF_UNIX:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                    sent[name] = int.from_bytes(info[200:208], "little")
    return sent


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel by /proc and TCP_INFO")
@pytest.mark.parametrize("world, k, changes, checkpointing", [
    (2, 3, {}, True), (3, 1, {}, False), (3, 3, {"tie_word_embeddings": False}, False)])
def test_bytes_sent_follow_the_formula_and_the_kernel_agrees(
        ranks, world, k, changes, checkpointing):
    embed, block, norm = (-(-n // world) * world for n in (EMBED, BLOCK, NORM))
    size, f = embed * (2 if changes else 1) + 2 * block + norm, (world - 1) / world
    once = 2 * embed if changes else 0  # untied: embedding and head are gathered once
    if EMBED == embed:
        assert once == z.gathered_once(ModelConfig(**SHAPE | changes))
    for stage in range(4):
        expected = 4 * size * f * (2, 2, k + 1, 3 * k)[stage]
        if stage == 3:
            expected -= k * 4 * once * f
        assert z.plan(size, world, False, k, once=once)[stage]["sent/step"] == expected
        for counted, kernel in ranks(world, traffic, stage, k, changes, checkpointing):
            assert counted == expected, stage
            assert counted < kernel < 1.2 * counted + 4000  # gloo's headers; its messages are small


def sample_under_stage_3(rank):
    """Every rank has other prompts, and another number of them."""
    opt, net = optimizer("tied", 3), build()
    prompts = [[[1, 2], [3, 4, 5], [6]], [[7, 8, 9, 10]], [[2], [11]]][rank]
    SENT["bytes"] = 0
    with opt.gathered():
        replies = generate(opt.model, prompts, 4 + rank, 0, seeds=range(len(prompts)))
    assert all(p.isnan().all() for p in opt.model.parameters())
    return replies == generate(net, prompts, 4 + rank, 0, seeds=range(len(prompts))), SENT["bytes"]


def test_ranks_generate_replies_of_different_length_under_stage_3_with_one_gather(ranks):
    padded = sum(-(-n // 3) * 3 for n in (EMBED, BLOCK, BLOCK, NORM))
    assert ranks(3, sample_under_stage_3) == [(True, 8 * padded * 2 // 3)] * 3


def save_under_zero(rank, stage, folder):
    opt = optimizer("tied", stage, "fp32")
    save_model(folder, opt.model, opt.full_parameters(), write=rank == 0)
    dist.barrier()
    return advance(opt, "tied", 0, 1), flat(load_model(folder).named_parameters())


@pytest.mark.parametrize("stage", range(4))
def test_a_model_saved_under_any_stage_is_whole_and_training_goes_on(ranks, tmp_path, stage):
    for norms, parameters in ranks(2, save_under_zero, stage, tmp_path):
        assert np.array_equal(parameters, flat(build(dtype=torch.float32).named_parameters()))
        assert abs(norms[0] - reference("tied", torch.float32)[0][0]) < 1e-5


# ------------------------------------------------------------------------------ 16-bit weights


def overflow(rank, stage):
    """What a good step does, one with an overflow on rank 1, and a good one again."""
    opt, exact, seen = optimizer("tied", stage, "fp16"), optimizer("tied", stage, "fp32"), []
    opt.scale, opt.good = 512.0, 997
    for factor in (1, 1e30 if rank else 1, 1):
        before = flat(opt.full_parameters())
        opt.backward(-token_logprobs(opt.model, *batch(0)).sum() / 100 * factor)
        norm = opt.step(LR)
        moved = bool((flat(opt.full_parameters()) != before).any())
        seen.append((norm, opt.scale, opt.t, moved))
    opt.good = 999
    opt.adjust_scale(True)
    exact.backward(-token_logprobs(exact.model, *batch(0)).sum() / 100)
    return seen, opt.scale, exact.step(LR)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale(ranks, stage):
    for seen, last, exact in ranks(2, overflow, stage):
        assert [row[1:] for row in seen] == [(512, 1, True), (256, 1, False), (256, 2, True)]
        assert seen[0][0] == pytest.approx(exact, rel=0.02) and not math.isfinite(seen[1][0])
        assert last == 512  # after 1000 good steps


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_training_adds_up_updates_that_bf16_weights_cannot_hold(alone, stage):
    net = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    opt = AdamW(net, stage, torch.bfloat16, weight_decay=0.0, grad_clip=1e9)
    for _ in range(100):  # Adam moves by lr each; the next bf16 number below 1 is 0.0039 away
        opt.backward(net(torch.ones(1, 3, dtype=torch.bfloat16)).sum())
        opt.step(1e-4)
    torch.testing.assert_close(opt.trained[0].master[:3], torch.full((3,), 0.99), atol=1e-5, rtol=0)
    assert (flat(opt.full_parameters()) == torch.tensor(0.99).bfloat16().item()).all()


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(alone):
    opt = optimizer("tied", 1)
    before = flat(opt.full_parameters())
    opt.backward(token_logprobs(opt.model, *batch(0)).sum() * math.inf)
    with pytest.raises(SystemExit, match="not finite"):
        opt.step(LR)
    assert np.array_equal(flat(opt.full_parameters()), before)


# ------------------------------------------------------------------------------- training states


def go_on(rank, kind, stage, first, last, folder):
    """Loads the state of step `first` into a model of other weights, trains up to `last`, saves."""
    case = "accumulated, clipped"
    opt = optimizer(case, stage, kind, seed=first)
    assert z.load_state(folder, {"policy": opt}).get("step", 0) == first
    norms = advance(opt, case, first, last)
    z.save_state(folder, {"policy": opt}, {"step": last})
    return np.array(norms), flat(opt.full_parameters())


@pytest.mark.parametrize("kind, half", [("fp64", 10), ("bf16", 3)])
def test_half_a_run_and_half_after_loading_are_a_whole_one(ranks, tmp_path, kind, half):
    whole = ranks(2, go_on, kind, 3, 0, 2 * half, tmp_path / "whole")[0]
    ranks(2, go_on, kind, 3, 0, half, tmp_path / "half")
    for world, stage in [(2, 3), (1, 0), (3, 1)] if kind == "fp64" else [(2, 3)]:
        shutil.copytree(tmp_path / "half", tmp_path / f"{world}")
        norms, parameters = ranks(world, go_on, kind, stage, half, 2 * half,
                                  tmp_path / f"{world}")[-1]
        tolerance = 0 if world == 2 else 1e-12
        assert np.abs(norms - whole[0][half:]).max() <= tolerance, world
        assert np.abs(parameters - whole[1]).max() <= tolerance, world
    if kind == "fp64":  # a rank writes its share, not the buffers it is a slice of
        sizes = [(tmp_path / f"{n}/step-00000020/rank-0.pt").stat().st_size for n in (1, 3)]
        assert sizes[1] < 0.45 * sizes[0]


def test_a_damaged_state_falls_back_to_the_one_before(alone, tmp_path, capsys):
    steps = lambda: sorted(int(p.name[5:]) for p in tmp_path.iterdir())  # noqa: E731
    opt, weights = optimizer("tied", 2), {}
    for step in range(1, 5):
        advance(opt, "tied", step, step + 1)
        weights[step] = flat(opt.full_parameters())
        z.save_state(tmp_path, {"policy": opt}, {"step": step})
    assert steps() == [3, 4]  # the newest and the one before
    for name, place in (("rank-0.pt", None), ("rank-0.pt", 0), ("manifest.json", 13),
                        ("manifest.json", None), ("manifest.json", 0)):
        path = tmp_path / "step-00000004" / name
        whole = path.read_bytes()
        half, flipped = whole[: len(whole) // 2], bytearray(whole)
        flipped[place or len(whole) // 2] ^= 1
        path.write_bytes(half if place == 0 else flipped)
        assert z.load_state(tmp_path, {"policy": opt})["step"] == 3
        assert f"step-00000004/{name} is damaged; going back" in capsys.readouterr().out
        assert np.array_equal(flat(opt.full_parameters()), weights[3])
        path.write_bytes(whole)
    assert z.load_state(tmp_path, {"policy": opt})["step"] == 4
    path.write_bytes(half)
    assert z.load_state(tmp_path, {"policy": opt})["step"] == 3 and capsys.readouterr().out
    z.save_state(tmp_path, {"policy": opt}, {"step": 3})
    assert steps() == [3]  # what stood behind the step gone back to was given up
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "rank-0.pt").write_bytes(b"half")  # killed inside the save
    assert z.load_state(tmp_path, {"policy": opt})["step"] == 3 and capsys.readouterr().out == ""
    z.save_state(tmp_path, {"policy": opt}, {"step": 4})
    assert steps() == [3, 4]


# -------------------------------------------------------------------------- schedule, flags, plan


def test_the_learning_rate_warms_up_falls_to_its_floor_and_stays_there():
    rates = [z.lr_at(step, 100, 2.0, 0.1, 0.25) for step in range(130)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(2 * (0.25 + 0.75 / 2))  # half way down the cosine
    early = rates[32] - (rates[32] - rates[33]) / 2  # a quarter of the way, between two steps
    assert early == pytest.approx(2 * (0.25 + 0.75 * (1 + math.sqrt(0.5)) / 2), rel=1e-3)
    assert all(a > b for a, b in zip(rates[10:100], rates[11:101]))
    assert rates[100:] == pytest.approx([0.5] * 30)  # D4 5.3.1's climbs again


@dataclass
class Toy(RunConfig):
    lr: float = 0.5  # half of it is 50%
    data: str = "a.txt"  # which text
    shuffle: bool = True  # mix the rows
    turns: Literal["all", "last"] = "all"  # which replies


def test_flags_come_from_the_fields_and_their_help_from_the_comments(monkeypatch, capsys):
    cfg = z.parse_config(Toy, "--no-shuffle --data b --grad-clip 2 --zero 3 --fresh".split())
    assert cfg == Toy(shuffle=False, data="b", grad_clip=2.0, zero=3, fresh=True)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        z.parse_config(Toy, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "ZeRO on 1, 2, 3 processes" in text
    for said in ("--lr LR half of it is 50% (default: 0.5)", "--seed SEED of weights, batches and",
                 "--shuffle, --no-shuffle mix the rows (default: True)"):
        assert said in text
    assert "peak learning rate" not in text  # the comment of the field that Toy replaced
    for bad in (["--lrr", "1"], ["--shuf"], ["--steps", "x"], ["--zero", "4"], ["--dtype", "int8"],
                ["--device", "tpu"], ["--turns", "split"], ["--steps", "-3"], ["--lr", "-1"],
                ["--threads", "-1"], ["--batch-size", "0"]):
        with pytest.raises(SystemExit) as stop:
            z.parse_config(Toy, bad)
        assert stop.value.code == 2 and bad[0] in capsys.readouterr().err


def gathered_shares(rank):
    return z.everywhere({rank: [rank] * 2})


def test_what_each_rank_knows_is_known_to_all_and_alone_nothing_is_sent(ranks, alone, monkeypatch):
    assert ranks(3, gathered_shares) == [{r: [r] * 2 for r in range(3)}] * 3
    monkeypatch.delattr(dist, "all_gather_object")  # gloo's threads would slow everything after it
    assert z.everywhere({"a": 1}) == {"a": 1}


def test_no_default_argument_of_torch_keeps_a_process_group_alive():
    """Activation checkpointing and torch.compile import this module; a group that it holds ends after the interpreter's
    threads, and now and then takes the process with it."""
    found = inspect.signature(torch.distributed.nn.functional.broadcast).parameters["group"]
    assert found.default is None


def test_keyed_seeds_are_the_same_on_every_machine_and_differ_by_key():
    assert z.keyed_seed(0, "rollout", 3) == 4495814937872463932
    keys = [(0, 1), (1, 0), (0, "1"), (0, 1, 0), (0,), ("0, 1",)]
    seeds = {z.keyed_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)


def test_the_plan_is_figure_1_of_the_zero_paper():
    rows = z.plan(7.5e9, 64)
    assert [round(row["total"] / 1e9, 1) for row in rows] == [120.0, 31.4, 16.6, 1.9]
    assert [row["sent/step"] / (2 * 7.5e9) * 64 / 63 for row in rows] == pytest.approx([2, 2, 2, 3])
    assert [row["total"] / 7.5e9 for row in z.plan(7.5e9, 4, False)] == [16, 10, 7, 4]
    for sixteen, left in ((True, [4, 4, 2.5, 1]), (False, [8, 8, 5, 2])):  # weight + gradient
        away = z.plan(7.5e9, 4, sixteen, offload=True)
        assert [row["total"] / 7.5e9 for row in away] == left
        assert [row["host"] / 7.5e9 for row in away] == [12, 3, 3, 3]


def test_rlhf_of_7b_parameters_needs_four_gpus_of_80_gb():
    rows = z.rlhf(7e9, 4)
    assert [row["PPO"] / 1e9 for row in rows] == [252, 126, 105, 63]  # D0: 4 × 80 GB
    assert [row["DPO"] / 1e9 for row in rows] == [126, 63, 52.5, 31.5]


def test_buffers_are_those_of_the_worst_moment_of_the_backward_pass():
    tied = peak.layers(build(), 3)
    padded = [-(-n // 3) * 3 for n in (EMBED, BLOCK, BLOCK, NORM, EMBED)]
    assert [size for _, size in tied] == padded and tied[0] == tied[-1]
    untied = [("embed", 7), ("0", 10), ("1", 11), ("norm", 1), ("head", 20)]
    # gathered + bucket + (bucket and what it receives of the layer before, or what it receives)
    assert peak.buffers(untied, 3, 0, overlap=False) == 20 + 20
    assert peak.buffers(untied, 3, 1, overlap=False) == 20 + 20 + 20
    assert peak.buffers(untied, 3, 1) == (20 + 1) + 20 + 20  # the norm is prefetched
    assert peak.buffers(untied[:-1], 3, 1) == (11 + 10) + 11 + 11
    assert peak.buffers(untied[:-1], 3, 0) == (11 + 10) + 11 + 1
    assert peak.buffers(untied[:2], 3, 0) == 10 + 7 + 10  # behind 0 nothing is prefetched
    assert peak.buffers(tied, 3, 0, overlap=False) == padded[1] + max(padded[:2])
    assert peak.buffers(untied, 2, 1) == 1 + 40 and peak.buffers(untied[:3], 2, 1) == 10 + 11 + 11
    assert peak.buffers(untied[:3], 2, 0, overlap=False) == 11
    assert peak.buffers(untied, 1, 1) == 20 and peak.buffers(untied, 0, 0) == 0


@pytest.mark.parametrize("flags, said", [
    ("--params 7.5e9 --world-size 64", ["120", "31.41", "16.64", "1.875", "0.2953"]),
    ("--model llama-65b --world-size 8 --bandwidth 25", ["65,285,660,672", "683.7", "783.4"]),
    ("--params 7e9 --world-size 4 --rlhf", ["PPO", "252", "63"])])
def test_the_plan_is_printed_for_a_size_or_a_model_of_the_documents(
        monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["zero.py", "plan", *flags.split()])
    z.main(model)
    words = capsys.readouterr().out.split()
    assert all(word in words for word in said)


def test_the_plan_is_printed_for_the_folder_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    config = model.ModelConfig(num_hidden_layers=3)
    model.save_model(tmp_path, model.CausalLM(config))
    monkeypatch.setattr(sys, "argv", ["zero.py", "plan", "--model", str(tmp_path)])
    z.main(model)
    assert f"for {config.num_parameters():,} parameters" in capsys.readouterr().out


def test_the_peak_is_printed_for_a_model_of_the_documents(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peak.py", "--model", "llama-65b", "--world-size", "8"])
    peak.main()
    words = capsys.readouterr().out.split()
    for rest, most in (("1045", "1045"), ("359.1", "365.5"), ("130.6", "143.5"), ("130.6", "137")):
        assert (rest, most) in zip(words, words[1:])


def test_a_wrong_command_or_model_is_named(monkeypatch):
    for words, said in ((["plan", "--model", "gpt9"], "gpt3-175b"), (["draw"], "say plan")):
        monkeypatch.setattr(sys, "argv", ["zero.py", *words])
        with pytest.raises(SystemExit, match=said):
            z.main(model)


# --------------------------------------------------------------------------- the folder of a run


def work(cfg, until, inputs=()):
    """A script in small: returns the step it went on from."""
    run, opt = Run(cfg, 10, inputs), optimizer("tied", 0)
    first = run.resume(policy=opt)
    for step in range(first, until):
        run.log(step, 10, loss=1 / (step + 1))
        run.boundary(step, policy=opt)
    if until == 10:
        run.finish(loss=0.1)
    return first


def logged(cfg):
    lines = (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def folder(alone, tmp_path):
    """A folder for a run, which takes over two signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "run"
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_same_config_resumes_and_cuts_the_metrics_back(folder):
    cfg = RunConfig(out=str(folder), save_every=3)
    assert work(cfg, 8) == 0 and logged(cfg) == list(range(8))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed inside a line
    assert work(replace(cfg, micro_tokens=1, threads=3), 7) == 6  # flags that may change
    assert logged(cfg) == list(range(7))
    before = (folder / "run.json").read_text()
    with pytest.raises(SystemExit, match=r"--lr 0.001 → 0.5.*--fresh"):
        Run(replace(cfg, lr=0.5), 10)
    assert (folder / "run.json").read_text() == before and logged(cfg) == list(range(7))
    assert work(replace(cfg, lr=0.5, fresh=True), 2) == 0 and logged(cfg) == [0, 1]


def test_nothing_is_saved_on_the_way_with_save_every_0_and_a_restart_is_not_fresh(
        folder, monkeypatch):
    cfg = RunConfig(out=str(folder), save_every=0)
    assert work(cfg, 8) == 0 and not (folder / "state").exists()
    cfg = replace(cfg, save_every=4, fresh=True)
    assert work(cfg, 8) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert work(cfg, 9) == 8
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert work(cfg, 9) == 0


def test_a_run_that_never_took_a_step_binds_nobody_to_its_config(folder):
    cfg = RunConfig(out=str(folder))
    Run(cfg, 10)
    assert work(replace(cfg, lr=0.5), 2) == 0
    with pytest.raises(SystemExit, match="--fresh"):
        Run(cfg, 10)


def test_a_finished_run_is_not_trained_again_unless_its_inputs_change(folder, capsys):
    cfg, data = RunConfig(out=str(folder), save_every=3), folder.with_name("data")
    with pytest.raises(SystemExit, match="data: no such file"):
        work(cfg, 1, [data])
    for text in ("one", "two"):  # the second finds a state of the first
        data.write_text(text)
        assert work(cfg, 8, [data]) == 0 and not (folder / "eval.json").exists()
    assert "changed" in capsys.readouterr().out
    assert work(cfg, 10, [data]) == 6
    assert json.loads((folder / "eval.json").read_text()) == {"loss": 0.1}
    assert not (folder / "state").exists()
    data.write_text("three")
    assert work(cfg, 1, [data]) == 0 and not (folder / "eval.json").exists()  # make: not done
    work(cfg, 10, [data])
    with pytest.raises(SystemExit) as stop:
        work(cfg, 10, [data])
    assert stop.value.code == 0 and logged(cfg) == list(range(10))


def test_a_loss_that_is_not_finite_ends_the_run_and_writes_nothing(folder):
    run = Run(RunConfig(out=str(folder)), 10)
    run.resume(policy=optimizer("tied", 0))
    run.log(0, 10, policy_loss=1.0, reward=-math.inf)
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match="step 1: policy_loss is not finite"):
        run.log(1, 10, reward=0.0, policy_loss=math.nan)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_second_signal_ends_at_once_unless_it_is_torchruns_copy(folder):
    run = Run(RunConfig(out=str(folder)), 10)
    run.stop()
    run.stop()
    run.stopping -= 4
    with pytest.raises(SystemExit):
        run.stop()


def interrupted(rank, folder):
    opt, run = optimizer("tied", 3), Run(RunConfig(out=str(folder)), 10)
    run.resume(policy=opt)
    with pytest.raises(SystemExit) as stop:
        for step in range(10):
            if step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            run.boundary(step, policy=opt)
    return step, stop.value.code


def test_a_signal_on_one_rank_stops_all_at_the_same_step_with_the_state_saved(ranks, tmp_path):
    assert ranks(2, interrupted, tmp_path) == [(4, 130)] * 2
    manifest = tmp_path / "state" / "step-00000005" / "manifest.json"
    assert json.loads(manifest.read_text())["step"] == 5


# --------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("low, high", [(0, 1), (0.61, 0.67), (-3, 12.5), (1e-5, 3e-5), (7, 7),
                                       (0, 0), (-2000, -1), (0.1, 0.3)])
def test_ticks_are_few_round_and_cover_the_data(low, high):
    for count in (5, 8):
        marks = z.ticks(low, high, count)
        assert marks[0] <= low and high <= marks[-1] and 2 <= len(marks) <= count + 2
        step = marks[1] - marks[0]
        assert np.diff(marks) == pytest.approx([step] * (len(marks) - 1))
        assert f"{step:.3e}".split("e")[0] in ("1.000", "2.000", "5.000")
        assert high <= low or marks[1] > low and marks[-2] < high  # no empty stretch at an end


def drawn(path):
    """The picture's elements by name; every coordinate lies inside it."""
    root, found = ElementTree.parse(path).getroot(), {}
    width, height = map(float, root.get("viewBox").split()[2:])
    for group in root.findall("{*}g"):
        left, top = map(float, group.get("transform")[10:-1].split())
        for element in group:
            found.setdefault(element.tag.split("}")[1], []).append(element)
            for x, y in (p.split(",") for p in element.get("points", "").split()):
                assert 0 <= left + float(x) <= width and 0 <= top + float(y) <= height
    return found


def test_a_metric_is_drawn_without_nan_and_thinned_with_its_running_mean(tmp_path):
    values = [float(i % 7) for i in range(1000)]
    few = [0.0, math.nan, 2.0, -math.inf, 1.0]
    records = [{"step": i, "loss": v, "seconds": 1.0} for i, v in enumerate(values)]
    for record, value in zip(records, few):
        record["score"] = value
    z.plot(z.curves(records), tmp_path / "a.svg")
    found = drawn(tmp_path / "a.svg")
    loss, mean, score = (line.get("points").split() for line in found["polyline"])
    assert len(score) == 3 and 100 < len(loss) == len(mean) < 300
    x, y = zip(*(map(float, p.split(",")) for p in loss))
    assert x[0] == 50 and 330 < x[-1] <= 336 and list(x) == sorted(x)
    assert max(y) == 206 and min(y) < 206 - 180 * 6 / 7 + 1
    y = [float(p.split(",")[1]) for p in mean[10:-10]]
    assert max(y) - min(y) < 10  # 41 steps: nearly six rounds of 0 to 6
    texts = [text.text for text in found["text"]]
    assert {"loss", "score", "mean over 41 steps", "step", "1000"} <= set(texts)


def test_only_what_is_a_log_probability_is_labelled_in_nats():
    names = ("loss", "replay_loss", "policy_loss", "value_loss", "kl", "lr")
    panels = z.curves([{"step": 0} | dict.fromkeys(names, 1.0)])
    units = {panel["title"]: panel["unit"] for panel in panels}
    assert units == dict(loss="nats", replay_loss="nats", policy_loss="", value_loss="",
                         kl="nats per reply", lr="")


@pytest.mark.parametrize("scale", [1.0, 1e-4, -1e-4, 3e-7, 1e6, -12345.0])
def test_no_label_is_cut_on_the_left(tmp_path, scale):
    records = [{"step": i, "value": scale * (1 + i / 70)} for i in range(5)]
    z.plot(z.curves(records), tmp_path / "a.svg")
    labels = [t for t in drawn(tmp_path / "a.svg")["text"] if t.get("text-anchor") == "end"]
    assert len(labels) > 4
    for label in labels:  # 7 pixels a character: more than sans-serif's digits have at 11
        assert float(label.get("x")) >= 7 * len(label.text or "")


def test_a_finished_run_leaves_its_curves(folder):
    work(RunConfig(out=str(folder)), 10)
    lines = ElementTree.parse(folder / "curves.svg").findall(".//{*}polyline")
    assert [len(line.get("points").split()) for line in lines] == [10]  # the loss, nothing else
    assert (folder / "eval.json").stat().st_mtime >= (folder / "curves.svg").stat().st_mtime

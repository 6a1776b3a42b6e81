"""The whole road on GPUs that are believed in (gpu.py): every script puts its tensors where its model
is; a GPU's collectives, pinned memory and loss scaling run.   python -m pytest tests/test_gpu.py

A real GPU may still do otherwise; what is named wrongly or left on the CPU is found here.
"""

import contextlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gpu
from model import CausalLM, ModelConfig
from test_truth import road, write_inputs
from tiny import SHAPE, TOK
from zero import AdamW


def drive(rank, folder, believe, flags):
    """The road's commands in a folder. Returns what was measured, how often memory was pinned and
    which of a GPU's collectives were called."""
    os.chdir(folder)
    with gpu.believed() if believe else contextlib.nullcontext([]) as called:
        for command, cfg in road(2):
            own = {name: value for name, value in flags.items() if hasattr(cfg, name)}
            command(replace(cfg, device="auto" if believe else "cpu", **own))
            dist.barrier()
        return measured(folder), len(gpu.PINNED), set(called)


def measured(folder):
    """{where: number} of all that the road found out, without seconds and bytes."""
    found = {}

    def walk(value, place):
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{place} {name}")
        elif isinstance(value, float) and not re.search("seconds|memory|rate", place):
            found[place] = value

    for path in [*Path(folder).glob("*/eval.json"), Path(folder, "table.json")]:
        walk(json.loads(path.read_text(encoding="utf-8")), str(path.relative_to(folder)))
    return found


@pytest.fixture(scope="module")
def on(ranks, tmp_path_factory):
    """on(world, believe, **flags): what rank 0 saw of the road."""
    def run(world, believe, **flags):
        folder = tmp_path_factory.mktemp("road")
        write_inputs(folder, 2)
        return ranks(world, drive, folder, believe, flags)[0]
    return run


@pytest.fixture(scope="module")
def known(on):
    """On a CPU, one process."""
    found, pinned, called = on(1, False)
    assert len(found) > 60 and not pinned and not called
    return found


def test_the_road_on_a_gpu_measures_what_it_measures_on_a_cpu(on, known):
    found, pinned, _ = on(1, True, checkpointing=True)
    assert found == pytest.approx(known, rel=1e-9, abs=1e-12) and not pinned


@pytest.mark.parametrize("flags", [{"zero": 2}, {"zero": 3, "offload": True}], ids=str)
def test_two_gpus_do_too_through_their_own_collectives_and_pinned_memory(on, known, flags):
    found, pinned, called = on(2, True, **flags)
    assert found == pytest.approx(known, rel=1e-6, abs=1e-9)
    assert called == {"all_gather_single", "reduce_scatter_single", "all_reduce", "broadcast"}
    assert bool(pinned) == ("offload" in flags)


def test_what_stays_on_the_cpu_is_refused_beside_a_gpus_model():
    with gpu.believed():
        net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE)).to("cuda")
        ids = torch.zeros(1, 4, dtype=torch.long)
        assert not ids.is_cuda and ids.device.type == "cpu"
        with pytest.raises(RuntimeError, match="two devices"):
            net(ids)
        logits = net(ids.to("cuda"))
        assert logits.is_cuda and str(logits.device) == "cuda:0"
        with pytest.raises(TypeError, match="numpy"):
            logits.detach().numpy()
        assert logits.detach().cpu().numpy().shape == (1, 4, TOK.vocab_size)


def test_fp16_scales_its_loss_there(alone):
    with gpu.believed():
        torch.manual_seed(0)
        net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE))
        optimizer = AdamW(net, 2, torch.float16, "cuda", offload=True)
        ids = torch.arange(8, device="cuda")[None]
        before = net.lm_head.weight.clone()
        optimizer.backward(-net(ids).float().log_softmax(-1)[0, :, 5].mean())
        norm = optimizer.step(0.01)
        assert 0.01 < norm < 100 and optimizer.scale == 65536  # the norm is without the scale
        assert not torch.equal(before, net.lm_head.weight) and net.lm_head.weight.is_cuda
        assert {p.dtype for p in net.parameters()} == {torch.float16}
        optimizer.backward(net(ids).float().sum() * torch.inf)
        optimizer.step(0.01)
        assert optimizer.scale == 32768 and optimizer.t == 1

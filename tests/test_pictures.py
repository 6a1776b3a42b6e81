"""The pictures' numbers: those of the plan, of the attention formula, and of the order in which
zero.py says that a step happens.   python -m pytest tests/test_pictures.py"""

import re

import pytest
import torch

import model
import pictures
import zero
from model import CausalLM, ModelConfig
from recorder import record

LAYERS = 3
SHAPE = ModelConfig(64, 32, 48, LAYERS, 4, 2, tie_word_embeddings=False)
NAMES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]
COLLECTIVES = ("all-gather", "reduce-scatter")


def test_memory_draws_the_bytes_of_the_plan(tmp_path):
    pictures.memory(tmp_path / "memory.svg")
    drawn = re.findall(r'<polyline points="(.*?)"', (tmp_path / "memory.svg").read_text())
    formulas = (lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 16 / n)
    assert len(drawn) == 4
    for line, values, bytes_of in zip(drawn, pictures.totals(), formulas):
        xs, ys = zip(*(map(float, point.split(",")) for point in line.split()))
        assert len(set(round(b - a, 1) for a, b in zip(xs, xs[1:]))) == 1, "as far as twice the ranks"
        for n, y, value in zip((1, 2, 4, 8, 16, 32, 64), ys, values, strict=True):
            assert value == pytest.approx(7.5 * bytes_of(n))
            assert (206 - y) * 150 / 176 == pytest.approx(value, abs=0.1)


def recorded(rank, stage):
    return record(stage, SHAPE, tokens=8, steps=1)


def of(step, kind, unit):
    return [event for event in step.events if (event.kind, event.unit) == (kind, unit)]


@pytest.fixture(scope="module")
def steps(ranks):
    plain = zero.all_gather, zero.wait, zero.Unit.release
    found = [ranks(2, recorded, stage)[0] for stage in range(4)]
    assert plain == (zero.all_gather, zero.wait, zero.Unit.release)
    return found


@pytest.mark.parametrize("stage", range(4))
def test_every_layer_computes_in_turn_and_everything_ends(steps, stage):
    step = steps[stage]
    assert step.units == NAMES and step.marks == sorted(step.marks)
    for kind, order in (("forward", NAMES), ("backward", NAMES[::-1]), ("AdamW", NAMES)):
        seen = dict.fromkeys(event.unit for event in step.events if event.kind == kind)
        assert list(seen) == order, kind
    computed = [e for e in step.events if e.kind in ("forward", "backward", "AdamW")]
    assert all(a.end <= b.start for a, b in zip(computed, computed[1:]))
    for event in step.events:
        assert step.marks[0] <= event.start <= event.end <= step.marks[3]
        if event.kind in COLLECTIVES:
            assert event.start <= event.waited <= event.end
            assert all(e.end <= event.waited or e.start >= event.end for e in computed)


@pytest.mark.parametrize("stage", (0, 1))
def test_stages_0_and_1_send_nothing_before_the_step(steps, stage):
    step = steps[stage]
    for name in NAMES:
        [scattered], [gathered] = of(step, "reduce-scatter", name), of(step, "all-gather", name)
        updated = of(step, "AdamW", name)[0]
        assert step.marks[2] <= scattered.start and scattered.end <= updated.start
        if stage == 0:  # the gradient's sum is handed out; after the update nothing is
            assert scattered.end <= gathered.start and gathered.end <= updated.start
        else:
            assert gathered.start >= updated.end
        for kind in ("whole weights", "bucket"):
            [held] = of(step, kind, name)
            assert held.start <= of(step, "forward", NAMES[0])[0].start and held.end == step.marks[3]


@pytest.mark.parametrize("stage", (2, 3))
def test_stages_2_and_3_send_a_gradient_while_the_next_layer_computes(steps, stage):
    step = steps[stage]
    for name, before in zip(NAMES[1:], NAMES):
        [scattered] = of(step, "reduce-scatter", name)
        assert of(step, "backward", name)[0].start < scattered.start < of(step, "backward", before)[0].start
        assert of(step, "backward", before)[0].start < scattered.end < step.marks[2]
    buckets = [e for e in step.events if e.kind == "bucket"]
    assert len(buckets) == len(NAMES) and all(step.marks[1] < b.start < b.end < step.marks[2] for b in buckets)
    for b in buckets:
        assert sum(other.start <= b.start < other.end for other in buckets) <= 2


def test_stage_2_gathers_in_the_step_alone(steps):
    for name in NAMES:
        [gathered] = of(steps[2], "all-gather", name)
        assert gathered.start >= of(steps[2], "AdamW", name)[0].end


def test_stage_3_gathers_a_layer_before_its_forward_and_before_its_backward(steps):
    step = steps[3]
    for name in NAMES:
        gathered = of(step, "all-gather", name)
        once = name in ("model.embed_tokens", "lm_head")  # see zero.gathered_once
        assert len(gathered) == len(of(step, "whole weights", name)) == (1 if once else 2)
        assert gathered[0].end <= of(step, "forward", name)[0].start
        assert gathered[-1].end <= of(step, "backward", name)[0].start
        assert all(e.end <= step.marks[2] for e in gathered), "in the step nothing is gathered"
        for event in gathered:
            computed = (e for e in step.events if e.kind in ("forward", "backward") and e.start >= event.end)
            assert next(computed).unit == name, "it is waited for only when it is needed"
    whole = [e for e in step.events if e.kind == "whole weights"]
    assert all(event.end < step.marks[2] for event in whole), "before the step all are freed"
    for event in whole:
        assert sum(other.start <= event.start < other.end for other in whole) <= 2


def test_the_timeline_has_a_box_for_each_event(steps, tmp_path):
    pictures.draw_timeline(steps, tmp_path / "timeline.svg")
    drawn = (tmp_path / "timeline.svg").read_text()
    for kind, (_, height, colour) in pictures.LINES.items():
        boxes = re.findall(rf'height="{height}" fill="{colour}"', drawn)
        assert len(boxes) == 1 + sum(e.kind == kind for step in steps for e in step.events), kind
    assert "background" not in drawn and not re.search(r'<rect[^>]* width="900', drawn)


def test_attention_weights_are_the_formulas():
    torch.manual_seed(0)
    net = CausalLM(SHAPE)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 64, (9,)).tolist()
    seen = []
    for layer in net.model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs, output)))
    weights = pictures.weights_of(net, ids)
    assert model.FAST and weights.shape == (LAYERS, 4, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(LAYERS, 4, 9))
    assert not weights.triu(1).any(), "nobody looks ahead"
    for found, (attention, (x, cos, sin, *_), output) in zip(weights, seen, strict=True):
        q, k, v = (p(x).view(9, -1, 8).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = model.rotate(q[None], cos, sin)[0], model.rotate(k[None], cos, sin)[0]
        for head in range(4):
            scores = [torch.stack([q[head, t] @ k[head // 2, s] / 8**0.5 for s in range(t + 1)]) for t in range(9)]
            for t, row in enumerate(scores):
                torch.testing.assert_close(found[head, t, : t + 1], row.softmax(-1))
        mixed = torch.cat([found[head] @ v[head // 2] for head in range(4)], -1)
        torch.testing.assert_close(attention.o_proj(mixed)[None], output)


def test_the_copying_head_looks_at_what_is_written_next():
    ids = [5, 6, 7, 8, 5, 6, 9]  # the reply is 5 6 9: two of its tokens have stood there before
    weights = torch.zeros(2, 3, 7, 7)
    weights[1, 2, 3, 0] = 1.0  # 5 will follow, and it stood at 0
    weights[1, 2, 4, 1] = 0.5
    weights[0, 1, 4, 0] = 1.0  # looks at what it is itself
    weights[0, 1, 5, 1] = 1.0
    expected = torch.zeros(2, 3)
    expected[1, 2] = 0.75
    assert torch.equal(pictures.copying(weights, ids, start=4), expected)

"""Pretraining and SFT, whole steps of their `main` against a loop written plainly.

The formulas have tests of their own; here is seen what the scripts do with them: which rows, which
denominator, which weight, which flag. In float64, where a plain loop agrees to nine digits.
    python -m pytest tests/test_wiring_lm.py
"""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # before there is a process group, which it would keep
import torch.distributed as dist
import torch.nn.functional as F

import pretrain
import sft
import zero
from data import SPECIALS, Tokenizer, Tokens, epoch_rows, render, rouge, show, train_bpe
from model import CausalLM, ModelConfig, generate, load_config, load_model, read_safetensors
from model import save_model, tune
from tiny import DOCUMENTS, HELD, MORE, OTHER, SHAPE, TALKS, TOK, checkpoint, furnish, logged
from tiny import mean_nll, nll, tokens_logged, train_plainly, watched, write_jsonl

# Nothing is at its default, no batch divides by two, every gradient is clipped.
COMMON = dict(device="cpu", threads=1, dtype="fp64", seed=3, lr=0.02, warmup=0.5, min_lr=0.2,
              weight_decay=0.4, grad_clip=0.3)
WORLDS = pytest.mark.parametrize("world, stage", [(1, 0), (2, 3)])
close = partial(pytest.approx, rel=1e-8, abs=1e-10)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(request):
    """run(world, script, config) watches the script's main on so many processes."""
    def run(world, script, config):
        if world > 1:
            return request.getfixturevalue("ranks")(world, watched, script, config)
        request.getfixturevalue("alone")
        return [watched(0, script, config)]
    return run


def windows_of(texts, tokenizer, context, folder):
    """The documents as one file of tokens, whose windows data.py draws."""
    path = write_jsonl(folder / "own.jsonl", [{"text": text} for text in texts])
    tokens = Tokens(folder / "own.bin", path, tokenizer)
    tokens.build()
    return tokens.open(context)


def compare(cfg, found, net, expected, judged, tokens):
    """What a run logged, saved and judged, with the plain loop's; within cfg.micro_tokens."""
    rows = [{key: row[key] for key in expected[0]} for row in logged(cfg.out)]
    assert len(rows) == len(expected), f"steps: expected {len(expected)}, got {len(rows)}"
    for row, right in zip(rows, expected):
        assert row == close(right), f"step {right['step']}: expected {right}, got {row}"
    saved = dict(load_model(cfg.out, dtype=torch.float64).named_parameters())
    for name, right in net.named_parameters():
        torch.testing.assert_close(saved[name], right, rtol=0, atol=1e-9,
                                   msg=lambda m: f"{name}: {m}")
    written = json.loads((Path(cfg.out) / "eval.json").read_text(encoding="utf-8"))
    assert written == close(judged), f"held out: expected {judged}, got {written}"
    for rank, one in enumerate(found):
        assert one["result"] == written, f"rank {rank}: {one['result']} is not what was written"
        assert rank == 0 or (one["printed"], one["written"]) == ("", []), "only rank 0 may"
        *steps, judging = one["forwards"]
        assert max(map(len, steps)) > 1, "one micro-batch a step cannot show how they add up"
        for height, width, _ in sum(steps, judging):  # the width padded to a multiple of 8
            assert height == 1 or height * (width - 7) <= cfg.micro_tokens, (height, width)
        assert not any(gradient for *_, gradient in judging), "judging needs no gradient"
    assert tokens_logged(cfg.out, found[0]["printed"]) == pytest.approx(tokens, rel=0.05)


def compare_words(found, words):
    for word in words:
        assert word in found[0]["printed"], f"expected {word!r} in {found[0]['printed']}"


# ---------------------------------------------------------------- pretraining (预训练)


def judge_text(net, ids, texts, context):
    """Every token but the first is scored once, with up to `context` tokens before it."""
    with torch.no_grad():
        sums = [nll(net, ids[s : s + context + 1])[0] for s in range(0, len(ids) - 1, context)]
    total, size = sum(sums).item(), sum(len(text.encode()) for text in texts)
    return {"loss": total / (len(ids) - 1), "bits_per_byte": total / math.log(2) / size}


@WORLDS
@pytest.mark.parametrize("start", ["random weights", "a checkpoint"])
def test_pretraining_takes_the_steps_of_a_plain_loop_and_is_judged_on_text_it_never_saw(
        home, run, tmp_path, start, world, stage):
    cfg = pretrain.Config(**COMMON, out=str(tmp_path / "out"), zero=stage, steps=4, batch_size=5,
                          context=16, micro_tokens=40)
    if start == "random weights":  # the end of the text is held out, which has not 999 tokens
        cfg = replace(cfg, **SHAPE, data=f"{home}/corpus.jsonl", val_fraction=0.25, vocab_size=999)
        train, held = DOCUMENTS[:12], DOCUMENTS[12:]
        tokenizer = Tokenizer.from_merges(train_bpe(train, 999 - len(SPECIALS)))
        torch.manual_seed(cfg.seed)
        net = CausalLM(ModelConfig(tokenizer.vocab_size, **SHAPE)).double()
    else:
        cfg = replace(cfg, data=f"{home}/corpus.jsonl,{home}/more.txt", init=f"{home}/base",
                      val_data=f"{home}/held.txt")
        train, held, tokenizer = [*DOCUMENTS, MORE], [HELD], TOK
        net = load_model(home / "base", dtype=torch.float64)
    found = run(world, "pretrain", cfg)
    tokens, end = windows_of(train, tokenizer, 16, tmp_path), tokenizer.ids["<|endoftext|>"]

    def losses_of(step):
        windows = tokens.batch(cfg.seed, step, cfg.batch_size)
        return {"loss": (mean_nll(net, [(ids, None) for ids in windows]), 1.0)}

    expected = train_plainly(net, losses_of, cfg, cfg.steps)
    ids = sum((tokenizer.encode(text) + [end] for text in held), [])
    compare(cfg, found, net, expected, judge_text(net, ids, held, 16), tokens=4 * 5 * 16)
    assert Tokenizer.load(cfg.out).hash == tokenizer.hash
    ends = [tokenizer.ids["<|end|>"], end]
    assert load_config(cfg.out) == replace(net.config, eos_token_id=ends)
    opening = tokenizer.encode(tokenizer.decode(ids[:8]))
    [reply] = generate(net, [opening], 40, end, temperature=0.8)
    compare_words(found, [
        f"{net.config.num_parameters():,} parameters, {len(tokens.ids):,} training tokens "
        f"({tokens.bytes / len(tokens.ids):.2f} bytes each), {5 * 16} per step",
        f"{4 * 5 * 16 / len(tokens.ids):.1f} passes, {len(ids):,} held-out tokens",
        f"{tokenizer.decode(opening)!r} → {tokenizer.decode(reply)!r}"])
    first = math.log(tokenizer.vocab_size) + 16 * 0.02**2 / 2  # ln V + ½·C·σ²
    line = f"first loss {expected[0]['loss']:.3f}, expected {first:.3f}"
    assert (line in found[0]["printed"]) == (start == "random weights"), found[0]["printed"]


@WORLDS
def test_a_student_learns_from_the_text_and_from_its_teacher(home, run, tmp_path, world, stage):
    checkpoint(tmp_path / "teacher", seed=9)
    cfg = pretrain.Config(
        **COMMON, out=str(tmp_path / "out"), zero=stage, steps=4, batch_size=5, context=16,
        micro_tokens=40, data=f"{home}/corpus.jsonl", val_data=f"{home}/held.txt",
        init=f"{home}/base", teacher=str(tmp_path / "teacher"), temperature=1.7, alpha=0.3)
    net, teacher = (load_model(folder, dtype=torch.float64) for folder in (cfg.init, cfg.teacher))
    found = run(world, "pretrain", cfg)
    tokens, end = windows_of(DOCUMENTS, TOK, 16, tmp_path), TOK.ids["<|endoftext|>"]

    def losses_of(step):
        total = 0.0
        for ids in torch.stack(list(map(torch.as_tensor,
                                        tokens.batch(cfg.seed, step, cfg.batch_size)))):
            said, taught = net(ids[None, :-1])[0], teacher(ids[None, :-1])[0].detach()
            apart = F.kl_div((said / 1.7).log_softmax(-1), (taught / 1.7).softmax(-1),
                             reduction="sum")  # of the teacher's distribution to the student's
            total += 0.7 * F.cross_entropy(said, ids[1:], reduction="sum") + 0.3 * 1.7**2 * apart
        return {"loss": (total / (5 * 16), 1.0)}

    expected = train_plainly(net, losses_of, cfg, cfg.steps)
    ids = sum((TOK.encode(text) + [end] for text in [HELD]), [])
    compare(cfg, found, net, expected, judge_text(net, ids, [HELD], 16), tokens=4 * 5 * 16)
    assert "first loss" not in found[0]["printed"], "it is no cross-entropy"


def test_a_teacher_brings_its_tokenizer_and_must_know_the_students_tokens(home, alone, tmp_path):
    flags = dict(SHAPE, data=f"{home}/corpus.jsonl", context=16, batch_size=2, steps=1,
                 teacher=f"{home}/base")
    pretrain.main(pretrain.Config(**flags, out=str(tmp_path / "student")))
    assert Tokenizer.load(tmp_path / "student").hash == TOK.hash
    Tokenizer.from_merges([]).save(tmp_path)
    with pytest.raises(SystemExit, match="265 tokens, the student 263"):
        pretrain.main(pretrain.Config(**flags, out=str(tmp_path / "o"), tokenizer=str(tmp_path)))


def test_the_end_of_the_text_is_held_out_from_training_and_from_the_tokenizer(
        home, alone, tmp_path):
    def corpus(out, **changes):
        cfg = pretrain.Config(out=str(tmp_path / out), vocab_size=270, context=8, **changes)
        tokenizer, *tokens = pretrain.corpus(cfg, {})
        return tokenizer.hash, *(tokenizer.decode(part.ids.tolist()) for part in tokens)

    def hash_of(*texts):
        return Tokenizer.from_merges(train_bpe(texts, 270 - len(SPECIALS))).hash

    train, held = DOCUMENTS[:12], DOCUMENTS[12:]
    found = corpus("several", data=f"{home}/corpus.jsonl", val_fraction=0.25)
    assert found == (hash_of(*train), "".join(train), "".join(held))
    start, end = MORE[: len(MORE) * 3 // 4], MORE[len(MORE) * 3 // 4 :]
    found = corpus("one", data=f"{home}/more.txt", val_fraction=0.25)  # cut within the document
    assert found == (hash_of(start), start, end)
    whole = dict(data=f"{home}/more.txt", val_data=f"{home}/held.txt", val_fraction=0.25)
    assert corpus("whole", **whole) == (hash_of(MORE), MORE, HELD), "val_data spares all of data"
    Tokenizer.from_merges([]).save(tmp_path)
    found = corpus("given", **whole, tokenizer=str(tmp_path), init=f"{home}/base")
    assert found == (Tokenizer.from_merges([]).hash, MORE, HELD), "--tokenizer goes before --init"


# ---------------------------------------------------------------- SFT (有监督微调)


def judged_replies(net, records, cfg, found):
    """Exact match and ROUGE-L of greedy replies to what comes before each whole last reply; the
    first three were shown."""
    asked, pairs = [], []
    template = "chat" if cfg.template == "auto" else cfg.template
    for r in records:
        ids, _ = render(r["messages"], TOK, template)
        prompt, _ = render(r["messages"][:-1], TOK, template) if r["messages"][1:] else ([], [])
        if r["messages"][-1]["role"] == "assistant" and prompt and len(ids) <= cfg.context:
            asked.append((prompt, len(ids) - len(prompt), r["messages"][-1]["content"]))
    for prompt, _, right in asked:
        [reply] = generate(net, [prompt], max(n for _, n, _ in asked), TOK.ids["<|end|>"], temperature=0)
        pairs.append((TOK.decode(reply), right))
    for (prompt, *_), (reply, _) in zip(asked[:3], pairs):
        compare_words(found, [f"{TOK.decode(prompt, specials=True)[-80:]!r} → {reply!r}"])
    return {"exact_match": sum(a == b for a, b in pairs) / len(pairs), "rouge_l": rouge(pairs)}


def readable(records, cfg):
    """(ids, mask) of the conversations that leave something to train on within the context."""
    template = "chat" if cfg.template == "auto" else cfg.template
    rows = []
    for messages in (r["messages"] for r in records):
        stops = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]
        if cfg.turns != "split":  # what comes behind the last reply teaches nothing
            stops = stops[-1:]
        rows += [render(messages[:stop], TOK, template, cfg.turns) for stop in stops]
    rows = [(ids[: cfg.context], mask[: cfg.context]) for ids, mask in rows]
    return [(ids, mask) for ids, mask in rows if sum(mask[1:]) > 0]


HELD_OUT = {"replay, epochs": TALKS[-3:], "bare text, steps": OTHER}


@WORLDS
@pytest.mark.parametrize("case", HELD_OUT)
def test_sft_takes_the_steps_of_a_plain_loop_and_is_judged_on_conversations_it_never_saw(
        home, run, tmp_path, case, world, stage):
    cfg = sft.Config(**COMMON, out=str(tmp_path / "out"), zero=stage, init=f"{home}/base",
                     data=f"{home}/talks.jsonl", context=40, micro_tokens=60)
    if case == "replay, epochs":  # 10 of 13 conversations, 1.5 passes: 3.75 steps of 4
        cfg = replace(cfg, turns="last", val_fraction=0.25, epochs=1.5, batch_size=4,
                      replay_rows=3, replay_weight=0.7)
        rows, held = readable(TALKS, cfg)[:10], readable(TALKS, cfg)[10:]
        corpus = windows_of(DOCUMENTS, TOK, cfg.context - 1, tmp_path)
    else:  # where a reply comes first, its first token is no target
        cfg = replace(cfg, template="none", val_data=f"{home}/held.jsonl", replay="none", steps=4,
                      batch_size=5)
        rows, held, corpus = readable(TALKS, cfg), readable(OTHER, cfg), None
    net, sizes = load_model(home / "base", dtype=torch.float64), []

    def losses_of(step):
        batch = [rows[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(rows))]
        replay = corpus.batch(cfg.seed, step, cfg.replay_rows) if corpus else []
        sizes.extend(len(ids) for ids in [*replay, *(ids for ids, _ in batch)])
        losses = {"loss": (mean_nll(net, batch), 1.0)}
        if corpus:
            mean = mean_nll(net, [(ids, None) for ids in replay])
            losses["replay_loss"] = (mean, cfg.replay_weight)
        return losses

    found = run(world, "sft", cfg)
    expected = train_plainly(net, losses_of, cfg, steps=4)
    with torch.no_grad():
        judged = {"loss": mean_nll(net, held).item()}
    judged |= judged_replies(net, HELD_OUT[case], cfg, found)
    compare(cfg, found, net, expected, judged, tokens=sum(sizes))
    assert Tokenizer.load(cfg.out).hash == TOK.hash
    targets = sum(sum(mask[1:]) for _, mask in rows)
    compare_words(found, [f"{len(rows)} rows to train on", f" real, {targets} targets",
                          f"{len(held)} rows held out", show(rows[:1], TOK),
                          f"replay: {home}/corpus.jsonl" if corpus else "replay: none"])


@pytest.fixture(scope="module")
def with_biases(home):
    """A base like the other's, with biases to train."""
    torch.manual_seed(4)
    net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE, model_type="qwen2"))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    save_model(home / "biases", net, tokenizer=TOK)
    return home / "biases"


@pytest.mark.parametrize("kind, world, stage", [
    ("lora", 1, 0), ("lora", 2, 1), ("lora", 2, 2), ("lora", 2, 3), ("qlora", 1, 0), ("qlora", 2, 3),
    ("adapter", 2, 3), ("prefix", 2, 3), ("prompt", 2, 3), ("freeze", 2, 3), ("bitfit", 2, 3)])
def test_sft_trains_what_tune_says_as_a_plain_loop_does_and_keeps_the_rest(
        with_biases, home, run, tmp_path, kind, world, stage):
    cfg = sft.Config(**COMMON, out=str(tmp_path / "out"), zero=stage, init=str(with_biases),
                     data=f"{home}/talks.jsonl", val_data=f"{home}/held.jsonl", replay="none",
                     context=40, micro_tokens=60, steps=3, batch_size=5, tune=kind, tune_size=1,
                     alpha=2.5)
    cfg = replace(cfg, grad_clip=0.003)
    rows, held = readable(TALKS, cfg), readable(OTHER, cfg)
    net = load_model(with_biases, dtype=torch.float64)
    torch.manual_seed(cfg.seed)
    tune(net, kind, 1, 2.5, with_biases)
    frozen = [p.clone() for p in net.parameters() if not p.requires_grad]

    def losses_of(step):
        batch = [rows[i] for i in epoch_rows(cfg.seed, step, cfg.batch_size, len(rows))]
        return {"loss": (mean_nll(net, batch), 1.0)}

    found = run(world, "sft", cfg)
    expected = train_plainly(net, losses_of, cfg, steps=3)
    for row, right in zip(logged(cfg.out), expected, strict=True):
        assert {key: row[key] for key in right} == close(right)
    with torch.no_grad():
        judged = {"loss": mean_nll(net, held).item()} | judged_replies(net, OTHER, cfg, found)
        assert found[0]["result"] == close(judged)
        saved = load_model(cfg.out, dtype=torch.float64)
        ids = torch.tensor([rows[0][0]])
        torch.testing.assert_close(saved(ids), net(ids), rtol=0, atol=1e-9)
    for p, before in zip((p for p in net.parameters() if not p.requires_grad), frozen):
        assert torch.equal(p, before), "the plain loop itself moved what is frozen"
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert f"{trained:,} trained" in found[0]["printed"]
    files = {path.name for path in Path(cfg.out).glob("*.safetensors")}
    whole = kind in ("freeze", "bitfit")
    assert files == {"model.safetensors" if whole else "adapter_model.safetensors"}


# The task of each conversation, by the field that tells it; one has neither.
TASKS = [{"task": "a"}, {"family": "b"}, {"task": "c"}, {"task": "b", "family": "a"}, {}] * 3


def weighted(setting, last, tasks):
    """Written out: what the weights of these tasks are."""
    if setting == "uncertainty":
        weights = {task: 1 / last.get(task, 1.0) for task in tasks}
    else:
        weights = {task: {"a": 2.0, "none": 0.5}.get(task, 1.0) for task in tasks}
    return {task: weight / sum(weights.values()) for task, weight in weights.items()}


@pytest.mark.parametrize("setting, world, stage", [
    ("a=2,none=0.5", 1, 0), ("uncertainty", 1, 0), ("uncertainty", 2, 3)])
def test_sft_weighs_the_mean_losses_of_tasks_and_is_judged_on_each(
        home, ranks, alone, tmp_path, monkeypatch, setting, world, stage):
    records = [record | task for record, task in zip(TALKS, TASKS)]
    data = write_jsonl(tmp_path / "tasks.jsonl", records)
    cfg = sft.Config(**COMMON, out=str(tmp_path / "out"), zero=stage, init=f"{home}/base", data=data,
                     val_fraction=0.4, replay="none", context=40, micro_tokens=60, steps=4,
                     batch_size=4, task_weights=setting, save_every=2)
    rows, names = [], []
    for record in records:
        for row in readable([record], cfg):
            rows.append(row)
            names.append(record.get("task", record.get("family", "none")))
    train = len(rows) - int(len(rows) * 0.4)
    net, last, total = load_model(home / "base", dtype=torch.float64), {}, []

    def losses_of(step):
        groups = {}
        for i in epoch_rows(cfg.seed, step, cfg.batch_size, train):
            groups.setdefault(names[i], []).append(rows[i])
        weights = weighted(setting, last, groups)
        losses = {f"{task} loss": (mean_nll(net, found), weights[task])
                  for task, found in groups.items()}
        last.update({task: losses[f"{task} loss"][0].item() for task in groups})
        total.append(sum(loss.item() * weight for loss, weight in losses.values()))
        return losses

    if world > 1:
        ranks(world, watched, "sft", cfg)
    else:  # stopped half-way, and taken up again: the weights go on from the last losses
        plain_boundary = zero.Run.boundary
        monkeypatch.setattr(zero.Run, "boundary", lambda self, step, **optimizers: (
            setattr(self, "stopping", self.first == 0 and step == 1),
            plain_boundary(self, step, **optimizers)))
        with pytest.raises(SystemExit):
            watched(0, "sft", cfg)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        watched(0, "sft", cfg)
    expected = train_plainly(net, losses_of, cfg, steps=4)
    assert len({len(row) for row in expected}) > 1, "some steps lack a task"
    for row, right, loss in zip(logged(cfg.out), expected, total, strict=True):
        assert {key: row[key] for key in right} == close(right)
        assert row["loss"] == close(loss)
    held = {}
    for row, name in zip(rows[train:], names[train:]):
        held.setdefault(name, []).append(row)
    with torch.no_grad():
        each = {name: mean_nll(net, found).item() for name, found in held.items()}
        whole = mean_nll(net, rows[train:]).item()
    found = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))
    assert found["losses"] == close(each) and found["loss"] == close(whole) and len(each) > 2


def test_weights_of_tasks_that_cannot_be_read_are_named():
    for setting in ("a", "a=x", "a=1,b"):
        with pytest.raises(SystemExit, match="--task-weights a.*: write"):
            sft.given_weights(setting, ["a"])
    with pytest.raises(SystemExit, match="no row is of task aa; the data have a, b"):
        sft.given_weights("aa=2,b=1", ["b", "a", "b"])
    assert sft.weights_of({"a": [], "b": []}, {"a": 0.0, "b": 0.0}, {}) == {"a": 0.0, "b": 0.0}


def test_with_lora_a_saved_state_holds_what_is_trained_alone_and_goes_on_from_there(
        with_biases, home, run, tmp_path, monkeypatch):
    cfg = sft.Config(**COMMON, init=str(with_biases), data=f"{home}/talks.jsonl", replay="none",
                     context=40, steps=4, batch_size=5, tune="lora", tune_size=2, save_every=2,
                     out=str(tmp_path / "whole"))
    run(1, "sft", cfg)
    plain_boundary = zero.Run.boundary

    def boundary(self, step, **optimizers):
        self.stopping = self.first == 0 and step == 1
        plain_boundary(self, step, **optimizers)

    monkeypatch.setattr(zero.Run, "boundary", boundary)
    cfg = replace(cfg, out=str(tmp_path / "parts"))
    with pytest.raises(SystemExit):
        watched(0, "sft", cfg)
    [path] = Path(cfg.out).glob("state/*/rank-0.pt")
    units = torch.load(path)["model"]["units"]
    assert sorted(units) == ["model.layers.0", "model.layers.1"]
    sizes = {name: unit["master"].numel() for name, unit in units.items()}
    per_layer = 2 * (4 * (16 + 16) - 2 * 8 + 3 * (16 + 24))  # q, o; k and v of half the heads; MLP
    assert set(sizes.values()) == {per_layer}, f"rank · (in + out) a matrix, got {sizes}"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    watched(0, "sft", cfg)
    one, two = (read_safetensors(tmp_path / name / "adapter_model.safetensors")
                for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_what_is_replayed_is_the_corpus_beside_the_conversations_or_what_is_named(
        home, alone, tmp_path):
    def replayed(**changes):
        cfg = sft.Config(**{"out": str(tmp_path), "data": f"{home}/talks.jsonl", **changes})
        tokens = sft.open_replay(cfg, TOK)
        return tokens and (tokens.context, TOK.decode(tokens.ids.tolist()))

    whole, elsewhere = "".join(DOCUMENTS), shutil.copy(home / "talks.jsonl", tmp_path)
    assert replayed(context=40) == (39, whole)  # a window has as many tokens as a conversation
    assert replayed(context=40, data=f"{home}/talks.jsonl,{elsewhere}") == (39, whole)
    assert replayed(context=200) == (128, whole)
    assert replayed(context=40, replay=f"{home}/more.txt") == (39, MORE)
    assert replayed(data=str(elsewhere)) is None
    assert replayed(replay="none") is None and replayed(replay_rows=0) is None


# ---------------------------------------------------------------- both


def one_step(script, home, out):
    """The config of a run of one step."""
    common = dict(device="cpu", threads=1, dtype="fp32", out=str(out), steps=1, batch_size=3)
    if script == "sft":
        return sft.Config(**common, init=f"{home}/base", data=f"{home}/talks.jsonl", context=40)
    return pretrain.Config(**common, **SHAPE, data=f"{home}/corpus.jsonl", vocab_size=270,
                           val_data=f"{home}/held.txt", context=16)


@pytest.mark.parametrize("script", ["pretrain", "sft"])
def test_flags_of_memory_and_speed_reach_the_model_and_the_optimizer(home, run, tmp_path, script):
    for stage, offload, recompute in ((2, True, False), (3, False, True)):
        cfg = one_step(script, home, tmp_path / str(stage))
        cfg = replace(cfg, zero=stage, offload=offload, checkpointing=recompute)
        [found] = run(1, script, cfg)
        told = [found["flags"][name] for name in ("stage", "offload", "checkpointing")]
        assert told == [stage, offload, recompute]


@pytest.mark.parametrize("script, changed", [("pretrain", "data"), ("pretrain", "val_data"),
                                             ("sft", "data"), ("sft", "val_data"), ("sft", "init")])
def test_a_run_whose_input_has_changed_starts_over_with_what_stands_there_now(
        home, run, tmp_path, script, changed):
    shutil.copytree(home, tmp_path / "home")
    cfg = one_step(script, tmp_path / "home", tmp_path / "out")
    cfg = replace(cfg, val_data=f"{tmp_path}/home/held." + ("txt" if script == "pretrain" else "jsonl"))
    run(1, script, cfg)
    path = Path(getattr(cfg, changed))
    if changed == "init":
        checkpoint(path, seed=2)
    else:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("b", "d") if "b" in text else 2 * text, encoding="utf-8")
    [found] = run(1, script, cfg)
    assert "starting over" in found["printed"]
    run(1, script, replace(cfg, out=str(tmp_path / "new")))  # never knew the old
    for name in ("model.safetensors", "tokenizer.json", "eval.json"):
        old, new = ((tmp_path / out / name).read_bytes() for out in ("out", "new"))
        assert old == new, f"{name} still shows the {changed} of before"


def test_without_held_out_data_or_a_whole_batch_there_is_still_a_run(home, run, tmp_path):
    cfg = one_step("sft", home, tmp_path / "sft")
    [found] = run(1, "sft", replace(cfg, steps=0, epochs=0.01, val_fraction=0.0))
    assert found["result"] == {} and len(logged(cfg.out)) == 1
    cfg = one_step("pretrain", home, tmp_path / "base")
    [found] = run(1, "pretrain", replace(cfg, val_data="", val_fraction=0.0))
    assert "0 held-out tokens" in found["printed"]
    assert found["result"] == {}, "what was not measured is not 0"


def test_compiled_blocks_train_and_do_not_judge(home, run, tmp_path, monkeypatch):
    calls = []

    def compile(function, **_):
        def compiled(*args):
            calls.append(torch.is_grad_enabled())
            return function(*args)
        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    cfg = replace(one_step("pretrain", home, tmp_path), micro_tokens=16)
    run(1, "pretrain", cfg)
    assert not calls, "without --compile nothing is compiled"
    run(1, "pretrain", replace(cfg, compile=True, fresh=True))
    passes = 3 * SHAPE["num_hidden_layers"]  # micro-batches · blocks
    assert calls == [True] * passes, "judging has rows of all lengths: each would be compiled"

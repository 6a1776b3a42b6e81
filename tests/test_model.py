"""The transformer against torch and hand computations.   python -m pytest tests/test_model.py

Each test fails when one interesting line of model.py is wrong: a mask, a sign, a shift, a scale.
"""

import copy
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import data
import model as m
from model import IGNORE, PRESETS, CausalLM, ModelConfig, ScalarModel, generate, token_logprobs

SHAPE = dict(vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24)


def build(kind=CausalLM, seed=0, dtype=torch.float32, spread=0.3, **changes):
    """A tiny model whose weights are large enough that every token matters to every other."""
    torch.manual_seed(seed)
    net = kind(ModelConfig(**SHAPE | changes))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() < 2 else 0.0, spread)
    return net.to(dtype)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def ids(*shape, seed=1):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ attention, layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # on a CPU: fused, formula
@pytest.mark.parametrize("checkpointing", [False, True])
def test_changing_a_token_leaves_all_earlier_logits_bit_identical(dtype, checkpointing):
    net, x = build(dtype=dtype), ids(2, 9)
    net.model.activation_checkpointing = checkpointing
    before = net(x)
    for t in range(9):
        y = x.clone()
        y[:, t] = (y[:, t] + 1) % 31
        after = net(y)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("case", ["square", "one token", "cached"])
def test_all_forms_of_attention_are_attention_row_by_row(dtype, tolerance, H, K, case):
    torch.manual_seed(0)
    B, D = 3, 8
    T, S = {"square": (7, 7), "one token": (1, 1), "cached": (2, 7)}[case]
    q, k, v = (torch.randn(B, n, t, D, dtype=dtype) for n, t in ((H, T), (K, S), (K, S)))
    mask = torch.ones(T, S, dtype=torch.bool).tril()
    if case == "cached":  # rows of different lengths: each query has its own position
        positions = torch.tensor([[0, 3], [6, 2], [5, 6]])
        mask = (torch.arange(S) <= positions[:, :, None])[:, None]
    expected = torch.empty(B, H, T, D, dtype=dtype)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (B, H, T))).tolist():
        seen = mask[t] if mask.dim() == 2 else mask[b, 0, t]
        keys, values = k[b, h * K // H][seen], v[b, h * K // H][seen]
        expected[b, h, t] = (keys @ q[b, h, t] / math.sqrt(D)).softmax(0) @ values
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    for attention in (m.attention_formula, m.attention_grouped, m.attention_fused):
        close(attention(q, k, v, bias), expected, tolerance)


@pytest.mark.parametrize("fast", [m.attention_grouped, m.attention_fused, m.fast_attention])
@pytest.mark.parametrize("tokens", [9, 257])  # fast_attention: grouped, fused
def test_fast_attention_has_the_gradients_of_the_formula(fast, tokens):
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, tokens, 4, dtype=torch.float64, requires_grad=True) for n in (6, 2, 2)]
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    up = torch.randn(2, 6, tokens, 4, dtype=torch.float64)
    expected = torch.autograd.grad(m.attention_formula(*inputs, mask), inputs, up)
    for ours, theirs in zip(torch.autograd.grad(fast(*inputs, mask), inputs, up), expected):
        close(ours, theirs, 1e-12)


def test_one_switch_turns_every_fast_form_off_and_changes_nothing_else(monkeypatch):
    net, x = build(dtype=torch.float64), ids(2, 9)
    used, found = [], []
    for name in ("attention_formula", "attention_grouped", "target_logprobs"):
        def counted(*inputs, name=name, form=getattr(m, name)):
            used.append(name)
            return form(*inputs)
        monkeypatch.setattr(m, name, counted)
    for fast in (True, False):
        monkeypatch.setattr(m, "FAST", fast)
        logprobs = token_logprobs(net, x[:, :-1], x[:, 1:])
        found.append([logprobs, *torch.autograd.grad(logprobs.sum(), list(net.parameters()))])
    assert used == ["attention_grouped"] * 2 + ["attention_formula"] * 2 + ["target_logprobs"]
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 1e-11)


def test_rmsnorm_and_swiglu_compute_their_papers_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 24, dtype=torch.float64) * 5
    norm = m.RMSNorm(24, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-5), 1e-12)
    narrow = x.bfloat16()  # the squares of 16-bit numbers are summed in 32
    assert torch.equal(m.RMSNorm(24, 1e-5).bfloat16()(narrow),
                       F.rms_norm(narrow.float(), (24,), eps=1e-5).bfloat16())
    mlp = m.SwiGLU(ModelConfig(**SHAPE)).double()
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T
    close(mlp(x), expected, 1e-12)


def test_rope_is_a_rotation_and_scores_depend_on_the_distance_only():
    cos, sin = m.rope_table(ModelConfig(**SHAPE | dict(head_dim=8, rope_theta=100.0)))
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = m.rotate(q.expand(24, 8), cos, sin)  # q at every position
    pairs = torch.complex(q[:4], q[4:])  # (x_i, x_{i+D/2}) is a complex number
    angle = torch.arange(24)[:, None] * 100.0 ** -(torch.arange(4).double() / 4)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    close(turned, torch.cat([pairs.real, pairs.imag], -1), 1e-12)
    scores = turned @ m.rotate(k.expand(24, 8), cos, sin).T
    close(scores[1:, 1:], scores[:-1, :-1], 1e-12)
    assert (scores[0] - scores[0, 0])[1:].abs().min() > 1e-3  # and they do depend on it


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_counts_what_the_model_has(kind, tied):
    net = build(model_type=kind, tie_word_embeddings=tied, head_dim=10)
    assert net.config.num_parameters() == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name, size, tolerance", [
    ("gpt2-124m", 124e6, 0.01), ("llama-7b", 6_738_415_616, 0),  # Meta's own, to the last weight
    ("llama-65b", 65_285_660_672, 0), ("gpt3-175b", 175e9, 0.01)])
def test_the_presets_have_the_sizes_of_the_documents_models(name, size, tolerance):
    assert abs(PRESETS[name].num_parameters() / size - 1) <= tolerance


def test_a_row_alone_gives_the_logits_it_has_in_a_padded_batch():
    net, batch = build(), ids(3, 12)
    logits = net(batch)
    for row, length in enumerate((4, 12, 7)):  # what stands behind the length is padding
        alone = net(batch[row : row + 1, :length])
        close(logits[row : row + 1, :length], alone, 2e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_gives_the_same_gradients_and_saves_fewer_bytes(frozen):
    results = []
    for checkpointing in (False, True):
        net, saved = build(num_hidden_layers=4, tie_word_embeddings=False), []
        net.model.activation_checkpointing = checkpointing
        net.model.embed_tokens.requires_grad_(not frozen)  # the reentrant kind loses all gradients
        pack = lambda t: saved.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = -token_logprobs(net, ids(2, 20), ids(2, 20, seed=2)).mean()
        loss.backward()
        results.append((sum(saved), [p.grad for p in net.parameters() if p.requires_grad]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert results[1][0] < 0.3 * results[0][0]


# ---------------------------------------------------------------------- log-probabilities, heads


@pytest.mark.parametrize("kept", [15, 35, 9999])  # 3, 7, all of 7 rows
@pytest.mark.parametrize("block", [5, 10, 9999])  # 1, 2, all of those
def test_target_logprobs_in_chunks_have_the_value_and_gradient_of_the_plain_ones(monkeypatch, block, kept):
    monkeypatch.setattr(m.TargetLogprobs, "BLOCK", {"cpu": block})
    monkeypatch.setattr(m.TargetLogprobs, "KEPT", kept)
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (7,))
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), targets]
    close(m.target_logprobs(hidden, weight, targets), expected, 1e-13)
    ours = m.TargetLogprobs.apply(hidden, weight, targets)
    close(ours, expected, 1e-13)
    up = torch.randn(7, dtype=torch.float64)
    grads = [torch.autograd.grad(y, (hidden, weight), up, retain_graph=True) for y in (ours, expected)]
    close(*grads, 1e-12)
    if kept >= 35:  # backward made its logits into probabilities: it must not take them for logits
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(ours, (hidden, weight), up)
    else:
        assert torch.autograd.gradcheck(m.TargetLogprobs.apply, (hidden, weight, targets))


def test_the_head_keeps_few_logits_and_computes_many_again(monkeypatch):
    def kept():
        bytes_ = []
        net, x = build(), ids(2, 6)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: bytes_.append(t.nbytes), lambda t: t):
            net.lm_head(torch.zeros(2, 6, net.config.hidden_size), x)
        return sum(bytes_), 12 * net.config.vocab_size * 4
    few, logits = kept()
    monkeypatch.setattr(m.TargetLogprobs, "KEPT", 0)
    assert few - kept()[0] == logits


def test_a_gradient_is_exact_where_a_16_bit_model_is_sure():
    """p - 1 in bf16 would be 0 from p = 0.998 on."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[7.0], [0.0]])
    exact, short = (torch.autograd.functional.jacobian(
        lambda h: m.TargetLogprobs.apply(h, weight.to(h.dtype), torch.tensor([0])).sum(), hidden.to(t))
        for t in (torch.float64, torch.bfloat16))
    assert exact.item() > 0.006 and abs(short.item() / exact.item() - 1) < 0.01


def test_rms_norm_has_the_gradient_of_its_formula():
    norm = m.RMSNorm(5, 1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m.Normalize.apply, (x, norm.weight, 1e-3))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    close(norm(x), expected, 1e-12)


def test_a_rotation_has_the_gradient_of_its_formula():
    x = torch.randn(2, 3, 8, 4, dtype=torch.float64, requires_grad=True)  # (B, H, T, D)
    cos, sin = (table[:8] for table in m.rope_table(m.ModelConfig(head_dim=4)))
    assert torch.autograd.gradcheck(m.Rotate.apply, (x, cos, sin))


def test_ignored_targets_give_zero_and_no_gradient():
    net, x, targets = build(), ids(2, 6), ids(2, 6, seed=2)
    targets[0, :4] = IGNORE
    hidden = net.model(x).detach().requires_grad_()
    logprobs = net.lm_head(hidden, targets)
    expected = net.lm_head(hidden).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])
    expected = expected[..., 0] * (targets != IGNORE)
    close(logprobs, expected, 1e-5)
    assert (logprobs[0, :4] == 0).all()
    weights = torch.arange(12.0).view(2, 6)  # the order of rows and columns matters
    ours, theirs = (torch.autograd.grad(y, hidden, weights)[0] for y in (logprobs, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert (ours[0, :4] == 0).all()
    token_logprobs(net, x, torch.full_like(x, IGNORE)).sum().backward()  # an empty micro-batch
    assert all((p.grad == 0).all() for p in net.parameters())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_the_first_loss_is_ln_v_plus_half_c_sigma_squared(changes):
    torch.manual_seed(0)
    config = ModelConfig(**changes)
    x = torch.randint(0, config.vocab_size, (4, 129))
    loss = -token_logprobs(CausalLM(config), x[:, :-1], x[:, 1:]).mean().item()
    assert abs(loss - m.expected_first_loss(config)) < 0.05
    assert m.expected_first_loss(config) > math.log(config.vocab_size) + 0.03


def test_the_projections_into_the_residual_stream_start_smaller_with_depth():
    torch.manual_seed(0)
    shape = SHAPE | dict(num_hidden_layers=8, hidden_size=96, vocab_size=512)
    net = CausalLM(ModelConfig(**shape, model_type="qwen2"))
    for name, p in net.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.0 if p.dim() < 2 else 0.02 / 4 if residual else 0.02
        assert abs(p.std(correction=0).item() - expected) < 0.001, name


def test_a_scalar_model_starts_at_exactly_zero_and_learns():
    net = ScalarModel(ModelConfig(**SHAPE))
    values = net(ids(2, 5))
    assert values.shape == (2, 5) and (values == 0).all()
    values.sum().backward()
    assert net.score.weight.grad.abs().min() > 0


# ------------------------------------------------------------------------------------ generation

PROMPTS = [[3], [5, 7, 9, 2, 4], [8, 1, 6], list(range(9))]


def continued(net, prompt, count, end_id):
    """The definition: feed everything, take the likeliest, append."""
    reply = []
    while len(reply) < count and end_id not in reply and len(prompt) + len(reply) < 24:
        reply.append(net(torch.tensor([prompt + reply]))[0, -1].argmax().item())
    return reply


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("count", [10, 40])  # 40: into the end of the context of 24
def test_a_greedy_batch_gives_what_each_prompt_gives_alone_without_a_cache(kind, count):
    net = build(model_type=kind, seed=3)
    end_id = continued(net, PROMPTS[1], 10, -1)[3]  # so that one row ends early and others go on
    expected = [continued(net, p, count, end_id) for p in PROMPTS]
    assert len({len(reply) for reply in expected}) > 1 and len(set(map(tuple, expected))) == 4
    assert expected[1][-1] == end_id and end_id not in expected[1][:-1]
    for use_cache in (True, False):
        assert generate(net, PROMPTS, count, end_id, 0, use_cache=use_cache) == expected
    for prompt, reply in zip(PROMPTS, expected):
        assert generate(net, [prompt], count, end_id, 0) == [reply]


def test_a_row_that_ended_leaves_the_batch():
    net = build(seed=3)
    end_id = continued(net, PROMPTS[1], 10, -1)[3]
    steps = list(m.generate_steps(net, PROMPTS, 10, end_id, 0, 1.0, range(4)))
    for rows, tokens in steps:
        assert len(rows) == len(tokens) == len(set(rows))
    assert 1 in steps[0][0] and all(1 not in rows for rows, _ in steps[4:])


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_sampled_reply_depends_on_its_seed_and_not_on_its_batch(top_p):
    net, seeds = build(spread=0.15), [11, 12, 13, 14]
    end_id = generate(net, PROMPTS[:1], 12, -1, 1.0, top_p, seeds[:1])[0][3]  # row 0 ends early
    batch = generate(net, PROMPTS, 12, end_id, 1.0, top_p, seeds)
    assert len(batch[0]) < max(map(len, batch))
    for i in range(4):
        assert generate(net, [PROMPTS[i]], 12, end_id, 1.0, top_p, [seeds[i]]) == [batch[i]]
    turned = generate(net, PROMPTS[::-1], 12, end_id, 1.0, top_p, seeds[::-1], use_cache=False)
    assert turned == batch[::-1]
    twins = generate(net, [PROMPTS[0]] * 3, 12, -1, 1.0, top_p, [5, 6, 5])
    assert twins[0] == twins[2] != twins[1]


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.7, [0, 0.5 / 0.8, 0, 0.3 / 0.8]),  # the token that crosses 0.7 stays in
    (1.0, 0.85, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    (0, 1.0, [0, 1, 0, 0]),
])
def test_samples_follow_temperature_and_nucleus(temperature, top_p, expected):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, 4)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # a grid instead of luck
    share = m.sample(logits, temperature, top_p, uniform).bincount(minlength=4) / 4000
    close(share, torch.tensor(expected).float(), 5e-4)


def test_the_chat_brings_text_into_normal_form_remembers_it_and_forgets(tmp_path, monkeypatch, capsys):
    tokenizer = data.Tokenizer.from_merges([])  # ids 0-255 are the bytes
    tokenizer.save(tmp_path)
    m.save_model(tmp_path, build(vocab_size=tokenizer.vocab_size, max_position_embeddings=48))
    said, heard = ["/new", "ｈｉ，", "b", "/new", "c"], []

    def steps(model, prompts, max_new_tokens, end_id, temperature, top_p, seeds):
        heard.append((prompts, seeds))
        for token in [*"好".encode(), end_id[1]]:
            yield [0], [token]

    monkeypatch.setattr("builtins.input", lambda _: said.pop(0))
    monkeypatch.setattr(m, "generate_steps", steps)
    monkeypatch.setattr(sys, "argv", ["model.py", str(tmp_path), "--seed", "7"])
    with pytest.raises(IndexError):  # nothing more is said
        m.main(data)
    assert capsys.readouterr().out == "好\n" * 3
    roles = ["user", "assistant", "user"]
    turns = ["hi,"], ["hi,", "好", "b"], ["c"]
    for (prompts, seeds), texts in zip(heard, turns, strict=True):
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        everything = data.render(messages, tokenizer)[0]
        assert prompts == [everything]
        assert seeds == [7 + len(texts)]


def test_a_prompt_or_batch_longer_than_the_context_ends_with_one_line():
    net = build()
    assert len(generate(net, [list(range(23))], 5, -1, 0)[0]) == 1
    for call in (lambda: net(ids(1, 25)), lambda: generate(net, [[1], [0] * 24], 5, -1)):
        with pytest.raises(SystemExit, match="context of 24"):
            call()


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, changes", [
    (CausalLM, {}), (CausalLM, {"tie_word_embeddings": False, "model_type": "qwen2"}),
    (ScalarModel, {"model_type": "qwen3", "head_dim": 10}),
])
def test_a_saved_model_comes_back_with_every_bit(tmp_path, dtype, kind, changes):
    net = build(kind, dtype=dtype, **changes)
    m.save_model(tmp_path / "new", net)
    back = m.load_model(tmp_path / "new", kind, dtype=dtype)
    assert back.config == net.config
    assert torch.equal(back(ids(2, 5)), net(ids(2, 5)))
    file = (tmp_path / "new" / "model.safetensors").read_bytes()
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    names = [n for n in header if n != "__metadata__"]
    assert names == [n for n, _ in net.named_parameters()]  # a tied weight once
    assert size % 8 == 0 and header["__metadata__"] == {"format": "pt"}
    end = 0
    for name, p in net.named_parameters():
        start, stop = header[name]["data_offsets"]
        assert start == end and header[name]["shape"] == list(p.shape)
        raw = file[8 + size + start : 8 + size + stop]
        assert raw == p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        end = stop
    assert len(file) == 8 + size + end
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[net.config.model_type]
    task = "ForCausalLM" if kind is CausalLM else "ForSequenceClassification"
    assert config["architectures"] == [family + task]


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
    m.save_model(tmp_path, build())
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()

    def tensors():
        yield "model.embed_tokens.weight", torch.zeros(31, 24)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.save_model(tmp_path, build(), tensors())
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [0, 5, 100, 3000, -1])
def test_a_truncated_file_ends_with_a_line_that_names_it(tmp_path, length):
    m.save_model(tmp_path, build())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SystemExit, match="model.safetensors"):
        m.load_model(tmp_path)


@pytest.mark.parametrize("changes, named", [
    ({"intermediate_size": 41}, "mlp.gate_proj.weight"), ({"num_hidden_layers": 3}, "layers.2"),
    ({"model_type": "gpt2"}, "gpt2"), ({"rope_scaling": {"rope_type": "su"}}, "rope_type .su."),
    ({"tie_word_embeddings": False}, "lm_head.weight should be .* the file has nothing"),
    ({"hidden_act": "gelu"}, "hidden_act gelu is not built"), ({"vocab_size": None}, "lacks vocab_size"),
    ({"num_hidden_layers": 1}, "layers.1"), (None, "config.json"),
])
def test_a_checkpoint_of_another_kind_ends_with_a_line_naming_it(tmp_path, changes, named):
    m.save_model(tmp_path, build())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | (changes or {})
    path.write_text(json.dumps(config)) if changes else path.unlink()
    with pytest.raises(SystemExit, match=named):
        m.load_model(tmp_path)


def test_a_reward_model_from_an_sft_folder_keeps_its_zero_head_and_takes_the_rest(tmp_path):
    sft = build()
    m.save_model(tmp_path, sft)
    reward = m.load_model(tmp_path, ScalarModel)
    assert (reward.score.weight == 0).all()
    assert torch.equal(reward.model(ids(2, 5)), sft.model(ids(2, 5)))
    m.save_model(tmp_path / "rm", build(ScalarModel))
    assert (m.load_model(tmp_path / "rm", ScalarModel).score.weight != 0).all()
    with pytest.raises(SystemExit, match="score.weight"):  # not the other way round
        m.load_model(tmp_path / "rm", CausalLM)


# ---------------------------------------------------------------------- weights in fewer bits


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_off_by_half_a_step_of_each_rows_own_scale(rows, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    linear.weight.data[3] *= 50  # a large row must not coarsen the others
    layer = m.Int8(linear)
    rounded = layer.codes * layer.scale[:, None]
    assert layer.codes.dtype == torch.int8 and layer.codes.abs().amax(1).eq(127).all()
    assert ((rounded - linear.weight).abs() <= 0.5001 * layer.scale[:, None]).all()
    x = torch.randn(rows, 1, 48)
    expected = x @ rounded.T + linear.bias
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert ((found - expected).abs().amax((0, 1)) <= tolerance * expected.abs().amax((0, 1)).clamp(min=1)).all()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_of_fewer_bits_is_smaller_and_answers_nearly_the_same(kind):
    net, x = build(model_type=kind, hidden_size=64, intermediate_size=128, spread=0.1), ids(2, 12)
    with torch.no_grad():
        exact, numbers = net(x), net.config.num_parameters()
        sizes, errors = [], []
        for bits in (32, 16, 8):
            light = copy.deepcopy(net)
            sizes.append(m.lighten(light, bits))
            errors.append(((light(x) - exact).norm() / exact.norm()).item())
    assert sizes[:2] == [4 * numbers, 2 * numbers]
    linears = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)]
    saved = sum(layer.weight.numel() - 2 * layer.out_features for layer in linears)  # bytes, scales
    head = 2 * net.lm_head.weight.numel()  # tied: the embedding keeps its two bytes
    assert sizes[2] == sizes[1] + head - saved, "not every matrix is in bytes"
    assert errors[0] == 0 < errors[1] < 0.02 and errors[1] < errors[2] < 0.05, errors

"""Parameter-efficient tuning, a layer at a time; the scripts that use it are in test_wiring_*.py.

    python -m pytest tests/test_tuning.py
"""

import json
import sys

import pytest
import torch
import torch.nn as nn

import data
import model as module
import reward
from model import CausalLM, FourBit, LoRA, ModelConfig, QLoRA, ScalarModel, generate, load_model
from model import normal_float, quantized, read_safetensors, replace, save_model, token_logprobs
from model import tune, unpacked, untuned, write_safetensors
from tiny import TOK

KINDS = ["freeze", "bitfit", "lora", "qlora", "adapter", "prefix", "prompt"]
SHAPE = dict(vocab_size=TOK.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
IDS = torch.tensor([[5, 80, 250, 7, 7, 9], [260, 1, 2, 3, 100, 41]])


def fresh(kind=CausalLM, **changes):
    torch.manual_seed(0)
    net = kind(ModelConfig(**SHAPE | dict(model_type="qwen2") | changes)).double()
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return net


def moved(net):
    """What is trained, after a few steps of training."""
    torch.manual_seed(1)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return net


def trained(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_its_base_and_every_trained_weight_gets_a_gradient(kind):
    net = fresh()
    before = net(IDS)
    names = set(dict(net.named_parameters()))
    tune(net, kind, 2, 5.0)
    after = net(IDS)
    if kind == "qlora":  # its base is the matrices in four bits
        base = fresh()
        for name, p in base.named_parameters():
            if name.rpartition(".")[0].endswith("proj") and p.dim() == 2:
                p.data = unpacked(*quantized(p), p.shape).double()
        before = base(IDS)
    if kind != "prompt":  # tokens that all the others see
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    moved(net)
    assert (net(IDS) - before).abs().max() > 1e-3
    token_logprobs(net, IDS[:, :-1], IDS[:, 1:]).sum().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name
    assert (kind in ("freeze", "bitfit")) == (set(dict(net.named_parameters())) == names)


@pytest.mark.parametrize("kind, expected", [
    ("freeze", lambda name: name.startswith(("model.layers.1.", "model.layers.2.", "model.norm"))),
    ("bitfit", lambda name: name.endswith("bias") and "layers" in name),
    ("lora", lambda name: "lora_" in name), ("qlora", lambda name: "lora_" in name),
    ("adapter", lambda name: ".down." in name or ".up." in name or "norm" in name),
    ("prefix", lambda name: ".prefix." in name), ("prompt", lambda name: name.endswith("prompt"))])
def test_just_this_is_trained(kind, expected):
    net = fresh()
    tune(net, kind, 2, 5.0)
    names = {name for name, _ in net.named_parameters()}
    assert trained(net) == {name for name in names if expected(name)} != set()
    sizes = sum(p.numel() for p in net.parameters() if p.requires_grad)
    C, M, K = 16, 24, 8  # hidden, MLP, keys of two heads
    if kind in ("lora", "qlora"):  # rank · (in + out) a matrix
        assert sizes == 3 * 2 * (2 * (C + C) + 2 * (C + K) + 3 * (C + M))
    if kind == "adapter":  # two a layer, each of two matrices and their biases, and the norms
        assert sizes == 3 * (2 * (2 * 2 * C + 2 + C) + 2 * C) + C
    if kind == "prefix":  # keys and values of two tokens, a gate for each head
        assert sizes == 3 * (2 * 2 * K + 4)


def test_full_tuning_leaves_a_model_as_it_is():
    net = fresh()
    tune(net, "full", 2, 5.0)
    assert trained(net) == {name for name, _ in net.named_parameters()} and not hasattr(net, "tuned")


def test_loras_change_is_alpha_over_rank_times_b_a_x_and_can_be_left_out():
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    layer = LoRA(linear, 3, alpha=7.5).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert 0.1 < layer.lora_A.weight.abs().max() < 0.5, "A is of the size of a linear layer's weights"
    moved(layer)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert A.shape == (3, 6) and B.shape == (4, 3)
    expected = x @ (layer.weight + 2.5 * B @ A).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)
    with untuned(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_a_model_without_its_lora_is_its_base_also_after_an_error():
    net = fresh(ScalarModel)
    before = net(IDS)
    tune(net, "lora", 2, 5.0)
    moved(net)
    with pytest.raises(KeyError), untuned(net):
        torch.testing.assert_close(net(IDS), before)
        raise KeyError
    assert (net(IDS) - before).abs().max() > 1e-3


# ---------------------------------------------------------------- four bits


def test_the_sixteen_values_are_those_of_normal_float_4():
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004,
                 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684,
                 1.0]  # Dettmers et al. 2023, appendix E
    torch.testing.assert_close(normal_float(), torch.tensor(published), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 96), (7, 37)])  # in blocks of 64, or with a filled one
def test_a_weight_is_the_nearest_of_its_blocks_values_and_takes_little_more_than_four_bits(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-2, 0, shape[0])[:, None]
    packed = quantized(weight)
    found = unpacked(*packed, shape)
    flat = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    choices = largest[..., None] * normal_float()
    nearest = choices[0, 0, (flat[..., None] / largest[..., None] - normal_float()).abs().argmin(-1)]
    nearest = nearest / choices[0, 0, -1] * largest
    # a scale of 8 bits is off by half of 1/255 of the largest of its group
    off = largest.max() / 255 / 2 * 1.0001
    assert (found - nearest.flatten()[: weight.numel()].view(shape)).abs().max() <= off
    blocks = -(-weight.numel() // 64)
    groups = -(-blocks // 256)
    assert sum(part.nbytes for part in packed) == 32 * blocks + 256 * groups + 4 * groups
    assert all(part.dtype == torch.uint8 for part in packed)


def test_a_large_matrix_takes_4127_bits_a_thousand_weights():
    packed = quantized(torch.randn(1024, 1024))
    assert 8 * sum(part.nbytes for part in packed) / 2**20 == 4 + 8 / 64 + 32 / 64 / 256


def test_a_block_of_zeros_stays_zero():
    assert torch.equal(unpacked(*quantized(torch.zeros(8, 64)), (8, 64)), torch.zeros(8, 64))


def test_a_product_with_packed_weights_and_its_gradient_are_those_of_the_weights():
    torch.manual_seed(0)
    layer = QLoRA(nn.Linear(37, 7), 2, 4.0)
    W = layer.matrix()
    x = torch.randn(3, 5, 37, requires_grad=True)
    layer(x).square().sum().backward()
    again = x.detach().clone().requires_grad_(True)
    y = again @ W.T + layer.bias
    y.square().sum().backward()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(x.grad, again.grad)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        FourBit.apply(x, layer.codes, layer.scales, layer.constants, 7)
    assert sum(kept) == sum(p.nbytes for p in (layer.codes, layer.scales, layer.constants))


# ---------------------------------------------------------------- generation, folders


@pytest.mark.parametrize("kind", ["lora", "qlora", "adapter", "prefix", "prompt"])
def test_what_was_saved_computes_the_same_and_generates_with_a_cache_as_without(tmp_path, kind):
    torch.manual_seed(0)
    net = fresh()
    save_model(tmp_path / "base", net)
    tune(net, kind, 2, 5.0, tmp_path / "base")
    moved(net)
    save_model(tmp_path / "out", net, tokenizer=TOK)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    saved = load_model(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(saved(IDS), net(IDS), rtol=0, atol=1e-12)
    assert hasattr(saved, "tuned") == (kind not in ("lora", "qlora")), "LoRA is merged"
    prompts = [IDS[0].tolist(), IDS[1, :3].tolist()]  # of different lengths
    replies = generate(saved, prompts, 8, 999, temperature=0)
    assert replies == generate(saved, prompts, 8, 999, temperature=0, use_cache=False)
    for prompt, reply in zip(prompts, replies):
        row = list(prompt)
        for token in reply:
            assert token == int(net(torch.tensor([row]))[0, -1].argmax())
            row.append(token)


def test_merged_by_the_command_a_folder_is_an_ordinary_one_with_equal_logits(
        tmp_path, monkeypatch, capsys):
    net = fresh()
    save_model(tmp_path / "base", net)
    tune(net, "lora", 2, 5.0, tmp_path / "base")
    moved(net)
    save_model(tmp_path / "lora", net, tokenizer=TOK)
    monkeypatch.setattr(sys, "argv", ["model.py", "merge", f"{tmp_path}/lora", "--out",
                                      f"{tmp_path}/whole"])
    module.main(data)
    assert not (tmp_path / "whole/adapter_config.json").exists()
    assert data.Tokenizer.load(tmp_path / "whole").hash == TOK.hash
    torch.testing.assert_close(load_model(tmp_path / "whole")(IDS), net.float()(IDS))
    prefixed = fresh()
    tune(prefixed, "prefix", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "lora", prefixed, tokenizer=TOK)
    with pytest.raises(SystemExit, match="tune prefix, which can't be merged"):
        module.main(data)


def test_a_model_is_loaded_without_drawing_values_that_its_file_replaces(tmp_path, monkeypatch):
    save_model(tmp_path, fresh())

    def draw(*_, **__):
        raise AssertionError("values were drawn")

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, draw)
    with pytest.raises(AssertionError, match="drawn"):
        CausalLM(ModelConfig(**SHAPE))
    assert torch.equal(load_model(tmp_path)(IDS), load_model(tmp_path)(IDS))


def test_a_folder_that_was_tuned_whole_after_all_holds_nothing_of_the_adapter(tmp_path):
    net = fresh()
    save_model(tmp_path / "base", net)
    tune(net, "lora", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "out", moved(net))
    save_model(tmp_path / "out", fresh())
    torch.testing.assert_close(load_model(tmp_path / "out")(IDS), fresh().float()(IDS))


def test_the_table_judges_what_tuning_added_like_any_other_model(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "setup", lambda cfg: (torch.device("cpu"), torch.float64))
    (tmp_path / "text.txt").write_text("ab abc, a text", encoding="utf-8")
    net = fresh()
    save_model(tmp_path / "base", net, tokenizer=TOK)
    tune(net, "lora", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "lora", moved(net), tokenizer=TOK)
    folders = [f"{tmp_path}/base", f"{tmp_path}/lora"]
    columns = reward.table(reward.TableConfig(
        models=",".join(folders), data="none", text=f"{tmp_path}/text.txt", reward="none",
        reference="none", out=f"{tmp_path}/table.json"))
    assert list(columns) == folders
    first, second = (columns[folder]["bits per byte"]["mean"] for folder in folders)
    assert abs(first - second) > 1e-3


def test_lora_is_written_under_pefts_names_and_one_of_some_matrices_opens(tmp_path):
    net = fresh()
    save_model(tmp_path / "base", net)
    tune(net, "lora", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "out", net)
    entries = json.loads((tmp_path / "out/adapter_config.json").read_text())
    matrices = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert entries["target_modules"] == matrices
    assert (entries["peft_type"], entries["r"], entries["lora_alpha"]) == ("LORA", 2, 5.0)
    assert entries["base_model_name_or_path"] == f"{tmp_path}/base"
    tensors = read_safetensors(tmp_path / "out/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert len(tensors) == 2 * 7 * 3
    assert tensors[name.format("A")].shape == (2, 16) and tensors[name.format("B")].shape == (16, 2)
    some = {name.format(x): torch.randn(shape) for x, shape in (("A", (2, 16)), ("B", (16, 2)))}
    write_safetensors(tmp_path / "out/adapter_model.safetensors",
                      {k: v.shape for k, v in some.items()}, torch.float32, some.items())
    del entries["tune"]
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(entries))
    A, B = some.values()
    changed = fresh().float()
    changed.model.layers[1].self_attn.q_proj.weight.data += 2.5 * B @ A
    torch.testing.assert_close(load_model(tmp_path / "out")(IDS), changed(IDS))
    for key, value in (("use_rslora", True), ("peft_type", "IA3"), ("modules_to_save", ["x"])):
        (tmp_path / "out/adapter_config.json").write_text(json.dumps(entries | {key: value}))
        with pytest.raises(SystemExit, match="only plain LoRA"):
            load_model(tmp_path / "out")


def test_a_tuned_folder_that_cannot_be_gone_on_from_says_why(tmp_path):
    net = fresh()
    save_model(tmp_path / "base", net)
    tune(net, "prefix", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "out", net)
    again = load_model(tmp_path / "out")
    for kind in ("full", "lora"):
        with pytest.raises(SystemExit, match=f"--tune prefix, which can't be merged; start from "
                                             f"{tmp_path}/base"):
            tune(again, kind, 2, 5.0)
    with pytest.raises(SystemExit, match="has none; take lora"):
        tune(fresh(model_type="llama"), "bitfit", 2, 5.0)
    lora = fresh(ScalarModel)
    tune(lora, "lora", 2, 5.0, tmp_path / "base")
    save_model(tmp_path / "out", lora)
    with pytest.raises(SystemExit, match="score.lora_A.* has no place"):
        load_model(tmp_path / "out")  # a reward model's as a language model

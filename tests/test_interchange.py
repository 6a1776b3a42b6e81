"""Folders that `transformers` wrote, with the logits it computed: `pytest tests/test_interchange.py`.

transformers 5 wrote tests/transformers/*: random weights, hidden size 16, in fp32, bf16 or fp16, in one file or in
two; two of them with their rotary positions as transformers 4 spells them. Where "positions" stand, the logits are of
these. The other direction (what we write, it reads) is checked by hand, since the tests may not install it.
"""

import json
from dataclasses import replace
from pathlib import Path

import jinja2  # torch brings it
import pytest
import torch

import dpo
import ppo
import pretrain
import reward
import sft
from data import SIDE_FILES, Tokenizer, render
from model import CausalLM, KVCache, ModelConfig, ScalarModel, left_padded, load_config, load_model
from model import save_model
from test_data import STYLES
from tiny import SHAPE, TALKS, TOK, checkpoint, talk, write_jsonl

FOLDERS = sorted((Path(__file__).parent / "transformers").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_folder_written_by_transformers_gives_its_logits(folder):
    expected = json.loads((folder / "logits.json").read_text(encoding="utf-8"))
    ids = torch.tensor(expected["input_ids"])
    at = expected.get("positions", range(ids.shape[1]))
    model = load_model(folder)
    with torch.no_grad():
        logits = model(ids)
    assert (logits[:, at] - torch.tensor(expected["logits"])).abs().max() < 5e-5
    ragged = cached(model, [ids[0, :7].tolist(), ids[1, :3].tolist()], ids)
    assert all((row - logits[i, -len(row):]).abs().max() < 5e-5 for i, row in enumerate(ragged))


@torch.no_grad()
def cached(model, prompts, ids):
    """Each row's logits behind its prompt, as generation sees them: padded on the left, token by token from a cache."""
    tokens, pad = left_padded(prompts, model.config.max_position_embeddings)
    cache = KVCache(model.config, pad, next(model.parameters()))
    lengths = [len(prompt) for prompt in prompts]
    rows = [[] for _ in prompts]
    for step in range(ids.shape[1] - min(lengths) + 1):
        last = model(tokens, cache)[:, -1]
        at = [min(length + step, ids.shape[1] - 1) for length in lengths]
        for i, length in enumerate(lengths):
            rows[i] += [last[i]] * (length + step <= ids.shape[1])
        tokens = ids[range(len(ids)), at][:, None]
    return [torch.stack(row) for row in rows]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_what_we_write_again_holds_the_same_names_shapes_and_bits(folder, tmp_path):
    model = load_model(folder)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    ours = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("architectures", "model_type", "hidden_size", "head_dim", "tie_word_embeddings", "attention_bias",
                "eos_token_id"):
        if key in theirs:
            assert ours[key] == theirs[key]
    rope = theirs.get("rope_parameters") or theirs["rope_scaling"] | {"rope_theta": theirs["rope_theta"]}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type"))
    written = (ours["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": ours["rope_theta"]}
    assert written.items() >= rope.items()
    assert ours["sliding_window"] is None
    assert ours["max_position_embeddings"] == (theirs.get("sliding_window") or theirs["max_position_embeddings"])


BASE = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
MISTRAL = {"model_type": "mistral"}


@pytest.mark.parametrize("changes, named", [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    ({"rope_scaling": LLAMA3}, "'llama3'.*: high_freq_factor$"), ({"rope_scaling": {"type": "linear"}}, ": factor$"),
    ({"rope_scaling": YARN | {"mscale": 1.0}}, ": mscale$"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ": full_attention$"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "gemma2"}, "gemma2"),
])
def test_what_would_change_the_logits_and_is_not_built_is_named(tmp_path, changes, named):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(SystemExit, match=named):
        load_config(tmp_path)


@pytest.mark.parametrize("changes, expected", [
    ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_theta": 9.0}, {"rope_theta": 5.0}),
    ({"rope_theta": 9.0, "rope_scaling": YARN | {"beta_slow": None}},
     {"rope_theta": 9.0, "rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": None}}),
    (MISTRAL, {"max_position_embeddings": 64}), (MISTRAL | {"sliding_window": None}, {"max_position_embeddings": 64}),
    (MISTRAL | {"max_position_embeddings": 9999}, {"max_position_embeddings": 4096}),  # its window by default
    (MISTRAL | {"sliding_window": 9, "attention_bias": True}, {"max_position_embeddings": 9, "attention_bias": False}),
    ({"sliding_window": 9, "attention_bias": True}, {"max_position_embeddings": 64, "attention_bias": True}),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}, {"max_position_embeddings": 9}),
    ({"eos_token_id": 0}, {"eos_token_id": [0]}), ({"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3]}),
])
def test_what_a_config_says_is_taken_as_transformers_takes_it(tmp_path, changes, expected):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    config = load_config(tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')  # what ends is said there, if it is
    assert load_config(tmp_path).eos_token_id == [7]


# ---------------------------------------------------------------- others' models through the stages

RUN = dict(batch_size=4, threads=1, device="cpu", dtype="fp32", warmup=0.0)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def chatml(folder, spare=0, style="qwen"):
    """The folder of a model as others publish it: ChatML, no <|reward|>, no padding token."""
    tokenizer = Tokenizer(STYLES[style])
    torch.manual_seed(3)
    net = CausalLM(ModelConfig(tokenizer.vocab_size + spare, **SHAPE))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    save_model(folder, net)
    tokenizer.save(folder)
    return tokenizer, net


def furnish(folder):
    """What the stages read; the replies of a prompt differ in length, so that rows are padded."""
    write_jsonl(folder / "talks.jsonl", TALKS)
    questions = [talk("ab" + "?" * i) | {"answer": "abc", "family": "f", "split": "combination"}
                 for i in range(8)]
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": q["messages"], "chosen": "abc" * (i % 3 + 1),
                                          "rejected": "1 2 3"} for i, q in enumerate(questions)])
    write_jsonl(folder / "text.jsonl", [{"text": "ab abc 123"}])


def stages(folder):
    """SFT, reward model, PPO, DPO from folder/open; returns what each result is."""
    init, pairs = str(folder / "open"), str(folder / "pairs.jsonl")
    cut = dict(RUN, steps=2, val_fraction=0.4, context=64)
    told = {name: value for name, value in cut.items() if name != "context"}
    return [
        sft.main(sft.Config(init=init, out=f"{folder}/sft", data=f"{folder}/talks.jsonl", **cut)),
        reward.main(reward.Config(init=init, out=f"{folder}/reward", data=pairs, **cut)),
        ppo.main(ppo.Config(init=init, reward=f"{folder}/reward", out=f"{folder}/ppo", **told,
                            prompts=str(folder / "questions.jsonl"), max_new_tokens=6)),
        dpo.main(dpo.Config(init=init, out=f"{folder}/dpo", data=pairs, **cut))]


@pytest.mark.parametrize("spare", [0, 3])
def test_an_open_model_goes_through_every_stage_and_keeps_its_tokenizer(
        alone, tmp_path, spare, capsys):
    furnish(tmp_path)
    own, net = chatml(tmp_path / "open", spare)
    for name in SIDE_FILES:
        (tmp_path / "open" / name).write_bytes(f'{{"chat_template": "{name} 糖"}}\r\n'.encode())
    stages(tmp_path)
    said = capsys.readouterr().out
    row = f"token {own.vocab_size} gets a {'spare' if spare else 'new'} row"
    assert row in said and "first KL 0, expected 0; first ratio 1 ± " in said
    for name in ("sft", "ppo", "dpo"):
        assert Tokenizer.load(tmp_path / name).hash == own.hash
        found = load_model(tmp_path / name).config
        assert replace(found, eos_token_id=None) == net.config
    for name in SIDE_FILES:  # what came from Hugging Face goes back whole
        for out in ("sft", "ppo", "dpo"):
            same = (tmp_path / out / name).read_bytes() == (tmp_path / "open" / name).read_bytes()
            assert same, f"{out}/{name}"
    told = {"chat_template": "tokenizer_config.json 糖", "pad_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast"}
    assert read(tmp_path / "reward/tokenizer_config.json") == told
    assert read(tmp_path / "reward/config.json")["pad_token_id"] == own.ids["<|im_end|>"]
    scorer = Tokenizer.load(tmp_path / "reward")
    assert scorer.ids == own.ids | {"<|reward|>": own.vocab_size} and scorer.plain == own.plain
    assert scorer.vocab_size == own.vocab_size + 1
    scored = load_model(tmp_path / "reward", ScalarModel)
    assert scored.config.vocab_size == own.vocab_size + (spare or 1)
    # a reward model goes on training with the token it has
    reward.main(reward.Config(init=f"{tmp_path}/reward", out=f"{tmp_path}/more", steps=1,
                              context=64, data=f"{tmp_path}/pairs.jsonl", **RUN))
    assert "it becomes" not in capsys.readouterr().out
    assert load_model(tmp_path / "more", ScalarModel).config == scored.config
    # what is collected and judged
    prompts = f"{tmp_path}/questions.jsonl"
    reward.collect(reward.CollectConfig(init=f"{tmp_path}/open", prompts=prompts, threads=1,
                                        out=f"{tmp_path}/comparisons.jsonl", max_new_tokens=6))
    columns = reward.table(reward.TableConfig(
        models=f"{tmp_path}/sft", data=prompts, text=f"{tmp_path}/text.jsonl", prompts=prompts,
        reward=f"{tmp_path}/reward", reference=f"{tmp_path}/open", out=f"{tmp_path}/table.json",
        max_new_tokens=6, threads=1))
    [column] = columns.values()
    assert {"reward score, T=1", "KL to SFT per reply, T=1", "bits per byte"} <= column.keys()


@pytest.mark.parametrize("spare", [0, 3])
def test_a_tokens_new_row_is_the_mean_of_the_used_ones_and_no_other_row_moves(tmp_path, spare):
    own, net = chatml(tmp_path, spare)
    model, used = load_model(tmp_path, ScalarModel), own.vocab_size
    reward.add_token(model, used)
    old, new = net.model.embed_tokens.weight, model.model.embed_tokens.weight
    assert torch.equal(new[:used], old[:used]) and torch.equal(new[used + 1 :], old[used + 1 :])
    assert torch.allclose(new[used], sum(old[:used]) / used, atol=1e-6)
    assert len(new) == used + (spare or 1) == model.config.vocab_size and new.requires_grad


def test_what_pads_the_rows_changes_no_loss(alone, tmp_path, monkeypatch):
    results = []
    for pad in (None, 0, 5):  # the end token, as foreign tokenizers have no padding; two others
        folder = tmp_path / str(pad)
        folder.mkdir()
        furnish(folder)
        chatml(folder / "open")
        if pad is not None:
            monkeypatch.setattr(Tokenizer, "pad", pad)
        results.append(stages(folder))
    assert results[0] == results[1] == results[2]
    assert all(results[0]), "every stage has judged something"


# ---------------------------------------------------------------- what transformers reads of ours


def test_every_folder_of_ours_says_what_ends_a_text_what_pads_it_and_how_a_chat_is_written(
        alone, tmp_path):
    furnish(tmp_path)
    checkpoint(tmp_path / "open")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/chat_template.jinja").write_text("of a tokenizer that was here before")
    stages(tmp_path)
    pretrain.main(pretrain.Config(out=f"{tmp_path}/base", data=f"{tmp_path}/text.jsonl", steps=1,
                                  tokenizer=f"{tmp_path}/open", context=4, **RUN))
    end, stop, pad = (TOK.ids[f"<|{name}|>"] for name in ("end", "endoftext", "pad"))
    marks = {"bos_token_id": None, "eos_token_id": [end, stop], "pad_token_id": pad}
    for out, context in {"base": 256, "sft": 64, "reward": 64, "ppo": 64, "dpo": 64}.items():
        config = read(tmp_path / out / "config.json")
        assert read(tmp_path / out / "generation_config.json") == marks
        assert {name: config[name] for name in marks} == marks
        told = read(tmp_path / out / "tokenizer_config.json")
        assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (told["eos_token"], told["pad_token"]) == ("<|end|>", "<|pad|>")
        assert told["model_max_length"] == context == config["max_position_embeddings"]
        assert told["clean_up_tokenization_spaces"] is False and "chat_template" in told
        assert not (tmp_path / out / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", ["chat", "alpaca", "none"])
@pytest.mark.parametrize("texts, system", [(["a"], ""), (["\na ", "b\n", "<c>"], "be kind"),
                                           (["a", "b", "c", "d"], "")])
def test_the_chat_template_writes_what_render_encodes(tmp_path, texts, system, name):
    checkpoint(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.template = name
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).template == name
    source = read(tmp_path / "tokenizer_config.json")["chat_template"]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    messages = [{"role": "system", "content": system}] * bool(system) + talk(*texts)["messages"]
    asked = messages[-1]["role"] == "user"
    text = template.render(messages=messages, add_generation_prompt=asked)
    assert text == TOK.decode(render(messages, tokenizer)[0], specials=True)


def test_a_reward_models_tokenizer_ends_a_text_with_reward_and_still_is_the_policys(tmp_path):
    for tokenizer in (TOK, Tokenizer(STYLES["qwen"])):
        tokenizer.scoring().save(tmp_path)
        behind = read(tmp_path / "tokenizer.json")["post_processor"]
        token = Tokenizer.load(tmp_path).ids["<|reward|>"]
        assert behind["single"] == [{"Sequence": {"id": "A", "type_id": 0}},
                                    {"SpecialToken": {"id": "<|reward|>", "type_id": 0}}]
        [named] = behind["special_tokens"].values()
        assert named == {"id": "<|reward|>", "ids": [token], "tokens": ["<|reward|>"]}
        assert Tokenizer.load(tmp_path).encode("ab") == tokenizer.encode("ab")
        assert Tokenizer.load(tmp_path).hash == tokenizer.scoring().hash
    assert TOK.scoring().hash == TOK.hash, "reward models made before had no post-processor"

"""A folder remembers how its model is asked, and a conversation of several turns can be trained in
three ways: seen through the scripts.   python -m pytest tests/test_templates.py
"""

import re
import sys

import pytest
import torch

import data
import dpo
import model
import ppo
import reward
import sft
from data import Tokenizer, read_rows
from model import CausalLM, ModelConfig, load_model, save_model
from test_interchange import RUN, chatml, furnish, read
from tiny import SHAPE, TOK, checkpoint, logged, talk, write_jsonl

SEEN = "sft reward_rows dpo_rows collect ppo table chat".split()


@pytest.fixture
def seen(monkeypatch):
    """{where: rows of token ids} that the scripts give their models."""
    rows = {}

    def watch(module, name, where, rows_of):
        plain = getattr(module, name)

        def watched(*arguments, **named):
            rows.setdefault(where or watch.where, []).extend(rows_of(*arguments))
            return plain(*arguments, **named)
        monkeypatch.setattr(module, name, watched)

    watch(sft, "collate", "sft", lambda rows, *_: [ids for ids, _ in rows])
    watch(dpo, "collate", "dpo_rows", lambda rows, *_: [ids for ids, _ in rows])
    watch(reward, "pad_rows", "reward_rows", lambda rows, *_: rows)
    watch(reward, "generate", "", lambda net, prompts, *_: prompts)
    watch(ppo, "generate", "ppo", lambda net, prompts, *_: prompts)
    watch(model, "generate_steps", "chat", lambda net, prompts, *_: prompts)
    rows["at"] = lambda where: setattr(watch, "where", where)
    return rows


def all_stages(folder, seen, **told):
    """Every script that asks a model, from folder/open over folder/sft; only sft.py is told how."""
    cut = dict(RUN, steps=1, context=64, val_fraction=0.4)
    pairs, prompts = f"{folder}/pairs.jsonl", f"{folder}/questions.jsonl"
    init, scorer = f"{folder}/sft", f"{folder}/reward"
    sft.main(sft.Config(init=f"{folder}/open", out=init, data=prompts_with_replies(folder),
                        replay="none", **cut, **told))
    reward.main(reward.Config(init=init, out=scorer, data=pairs, **cut))
    dpo.main(dpo.Config(init=init, out=f"{folder}/dpo", data=pairs, **cut))
    seen["at"]("collect")
    reward.collect(reward.CollectConfig(init=init, prompts=prompts, threads=1, max_new_tokens=6,
                                        out=f"{folder}/comparisons.jsonl"))
    cut.pop("context")
    ppo.main(ppo.Config(init=init, reward=scorer, out=f"{folder}/ppo", prompts=prompts,
                        max_new_tokens=6, **cut))
    seen["at"]("table")
    return table(folder, prompts, reference=init)


def table(folder, prompts, reference):
    columns = reward.table(reward.TableConfig(
        models=f"{folder}/ppo", data=prompts, text=f"{folder}/text.jsonl", prompts=prompts,
        reward=f"{folder}/reward", reference=reference, out=f"{folder}/table.json",
        max_new_tokens=6, threads=1))
    [column] = columns.values()
    return column


def prompts_with_replies(folder):
    records = [talk("ab" + "?" * i, "abc") for i in range(8)]
    return write_jsonl(folder / "asked.jsonl", records)


@pytest.mark.parametrize("style, template", [
    ("ours", "alpaca"), ("ours", "none"), ("ours", "auto"), ("qwen", "alpaca"), ("qwen", "auto"),
    ("gpt2", "alpaca"), ("gpt2", "none")])
def test_what_sft_is_told_every_later_stage_and_the_chat_ask_in(
        alone, tmp_path, seen, monkeypatch, style, template):
    furnish(tmp_path)
    if style == "ours":
        checkpoint(tmp_path / "open")
    else:
        chatml(tmp_path / "open", style=style)
        (tmp_path / "open/chat_template.jinja").write_text("of the chat form")
        (tmp_path / "open/tokenizer_config.json").write_text('{"eos_token": "x", "a": "b"}')
    column = all_stages(tmp_path, seen, template=template)
    flags = f"model.py {tmp_path}/dpo --prompt ab --max-new-tokens 2"
    monkeypatch.setattr(sys, "argv", flags.split())
    model.main(data)
    form = {"alpaca": r"### Instruction:\nab\?*\n\n### Response:\n.*", "none": r"ab\?*[^<]*",
            "auto": r"<\|user\|>ab\?*<\|end\|><\|assistant\|>.*"}[template]
    if (style, template) == ("qwen", "auto"):
        form = r"<\|im_start\|>user\nab\?*<\|im_end\|>\n<\|im_start\|>assistant\n.*"
    for where in SEEN:
        for ids in seen[where]:
            text = Tokenizer.load(tmp_path / "sft").decode(ids, specials=True)
            assert re.match(form, text), (where, text)
            assert template == "auto" or "user" not in text and "assistant" not in text
    kept = "chat" if template == "auto" else template
    for out in ("sft", "reward", "dpo", "ppo"):
        assert Tokenizer.load(tmp_path / out).template == kept
        jinja = tmp_path / out / "chat_template.jinja"
        if style != "ours":
            assert jinja.exists() == (template == "auto"), "the chat form's would be looked at first"
            assert read(tmp_path / out / "tokenizer_config.json")["a"] == "b"  # the rest stays
    assert "KL to SFT per reply, T=1" in column
    # models that are asked in different ways are not compared, nor scored by one another
    other = Tokenizer.load(tmp_path / "sft")
    other.template = "none" if kept == "alpaca" else "alpaca"
    for out in ("sft", "reward"):
        scorer = other.scoring() if out == "reward" else other
        scorer.template = other.template
        scorer.save(tmp_path / out)
    prompts = f"{tmp_path}/questions.jsonl"
    assert "KL to SFT per reply, T=1" not in table(tmp_path, prompts, f"{tmp_path}/sft")
    with pytest.raises(SystemExit, match="reward: not .* tokenizer and template"):
        ppo.main(ppo.Config(init=f"{tmp_path}/dpo", reward=f"{tmp_path}/reward", prompts=prompts,
                            out=f"{tmp_path}/more", max_new_tokens=6, **RUN))


def test_a_template_can_be_changed_again_and_a_foreign_chat_form_is_named_no_more(tmp_path):
    tokenizer, _ = chatml(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "of the chat form"}')
    for template in ("alpaca", "none", "chat"):
        tokenizer = Tokenizer.load(tmp_path)
        tokenizer.template = template
        tokenizer.save(tmp_path)
        assert Tokenizer.load(tmp_path).template == template
    assert read(tmp_path / "tokenizer_config.json")["chat_template"] is None


# ---------------------------------------------------------------- turns (多輪對話)

LONG = [talk("ab", "abc", "more", "abab", "so?", "no"), talk("1", "one", "2", "two!"),
        talk("hello", "ab ab")]


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_a_row_per_reply_gives_the_gradient_of_all_replies_at_once_and_computes_more(
        alone, tmp_path, capsys, template):
    net = CausalLM(ModelConfig(TOK.vocab_size, **SHAPE | {"max_position_embeddings": 200}))
    save_model(tmp_path / "base", net, tokenizer=TOK)
    path = write_jsonl(tmp_path / "talks.jsonl", LONG)
    rows, said = {"all": 3, "split": 6, "last": 3}, {}
    for turns, size in rows.items():  # the whole file is one step
        sft.main(sft.Config(init=f"{tmp_path}/base", out=f"{tmp_path}/{turns}", data=path, steps=1,
                            turns=turns, val_fraction=0.0, batch_size=size, device="cpu", threads=1,
                            dtype="fp64", replay="none", context=200, template=template))
        said[turns] = re.search(r"(\d+) rows to train on: a pass computes (\d+) tokens, .*? real, "
                                r"(\d+) targets", capsys.readouterr().out)
        said[turns] = [int(number) for number in said[turns].groups()]
    assert [said[turns][0] for turns in rows] == [3, 6, 3]
    [everything], [split], [last] = (logged(tmp_path / turns) for turns in rows)
    for name in ("loss", "grad_norm"):
        assert split[name] == pytest.approx(everything[name], rel=1e-12)
        assert last[name] != pytest.approx(everything[name], rel=1e-3)
    weights = [load_model(tmp_path / turns, dtype=torch.float64) for turns in ("all", "split")]
    for a, b in zip(*(net.parameters() for net in weights)):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)
    assert said["split"][1] > said["all"][1] == said["last"][1]
    assert said["split"][2] == said["all"][2] > said["last"][2]
    tokenizer = Tokenizer.load(tmp_path / "all")
    every, _, _ = read_rows(path, tokenizer, "split", 200)
    cut, _, words = read_rows(path, tokenizer, "split", len(every[0][0]))  # the next replies lie behind
    assert cut[0] == every[0] and f"dropped: {6 - len(cut)} with their" in words and len(cut) < 4


def test_the_share_of_real_tokens_that_a_run_prints_is_that_of_its_forwards(
        alone, tmp_path, capsys):
    furnish(tmp_path)
    checkpoint(tmp_path / "sft")
    lengths = []  # of the pairs' rows: <|user|> … <|end|> <|assistant|> … <|end|>
    for i in range(8):
        for reply in ("abc" * (i % 3 + 1), "1 2 3"):
            lengths.append(4 + len(TOK.encode("ab" + "?" * i)) + len(TOK.encode(reply)))
    computed = []

    def look(net, arguments):
        if isinstance(net, torch.nn.Embedding) and torch.is_grad_enabled():
            computed.append(arguments[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    for script, more in ((reward, 1), (dpo, -1)):  # <|reward|> behind; the last token is no input
        computed.clear()
        script.main(script.Config(
            init=f"{tmp_path}/sft", out=f"{tmp_path}/{script.__name__}", steps=1, context=64,
            data=f"{tmp_path}/pairs.jsonl", val_fraction=0.0, micro_tokens=64,
            **RUN | {"batch_size": 8}))
        share = round(100 * (sum(lengths) + 16 * more) / sum(computed))
        assert f"; {share}% " in capsys.readouterr().out
    hook.remove()

"""Exact match, ROUGE, BLEU and what prints them: `data.py score` and `stats`, sft.py's held-out
replies, the groups of `reward.py table`.

    python -m pytest tests/test_metrics.py

The golden numbers are of sacrebleu 2.6.0 (corpus_bleu, tokenize="none", the tokens of MARKS joined
by blanks) and rouge-score 0.1.2 (fmeasure without stemming; its own tokenizer where there is no
Han character, else a tokenizer that gives lower-case words of [a-z0-9]+ and other letters singly).
"""

import json
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

import data
import pretrain
import reward
import sft
from data import bleu, distinct, rouge, scores
from tiny import TOK, checkpoint, write_jsonl

PAIRS = [("The cat sat on the mat.", "The cat is on the mat."), ("a dog, a dog", "A dog!"),
         ("", "nothing"), ("It doesn't cost 3.5 dollars", "It does not cost 3 dollars."),
         ("你叫小明。", "你的名字叫小明。"), ("苹果是水果,不是GPU", "苹果是一种水果"), ("the", "of"),
         ("Backwards: one, two", "Backwards: two, one")]
GOLDEN = [  # BLEU in percent; ROUGE-1, -2, -L
    (PAIRS, 24.78422716614587, 0.5636655011655012, 0.273475135975136, 0.5219988344988344),
    (PAIRS[:4], 20.492938431708822, 0.5288461538461539, 0.3204545454545455, 0.5288461538461539),
    (PAIRS[4:6], 31.67358883275886, 0.696969696969697, 0.45299145299145294, 0.696969696969697),
    (PAIRS[2:3], 0.0, 0.0, 0.0, 0.0), (PAIRS[6:7], 0.0, 0.0, 0.0, 0.0),
    (PAIRS[7:], 26.86424829558855, 1.0, 0.0, 0.6666666666666666),  # no 3-gram, no 4-gram
    (PAIRS[1:2], 10.682175159905848, 0.6666666666666666, 0.5, 0.6666666666666666),  # clipped
    (PAIRS[3:4], 11.99014838091355, 0.6153846153846153, 0.1818181818181818, 0.6153846153846153),
    (PAIRS[4:5], 38.80684294761701, 0.7272727272727273, 0.4444444444444444, 0.7272727272727273)]


@pytest.mark.parametrize("golden", GOLDEN)
def test_bleu_and_rouge_equal_those_of_the_libraries(golden):
    pairs, *expected = golden
    found = [100 * bleu(pairs), rouge(pairs, 1), rouge(pairs, 2), rouge(pairs)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_longest_common_subsequence_need_not_be_connected_and_keeps_its_order():
    assert data.common_in_order("abcde", "xaxcxex") == 3
    assert data.common_in_order("abc", "cba") == 1 and data.common_in_order("", "a") == 0


def test_distinct_n_counts_pairs_of_all_rows_and_none_across_two():
    assert distinct([[1, 2, 1, 2], [1, 2, 3]], 2) == 3 / 5 and distinct([[1, 1], [2]], 1) == 2 / 3
    assert distinct([[1]], 2) == 0.0


def test_exact_match_is_the_judges():
    found = scores([("医生。", "医生"), ("doctor ", "doctor"), ("Doctor", "doctor"), ("a b", "a")])
    assert found["exact match"] == 0.5 and found["F1 (ROUGE-1)"] == pytest.approx((3 + 2 / 3) / 4)


def command(capsys, *words):
    with mock.patch.object(sys, "argv", ["data.py", *words]):
        data.main()
    return capsys.readouterr().out


def talk(said, **more):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    return {"messages": turns, **more}


def test_score_reads_predictions_beside_their_references_or_in_another_file(tmp_path, capsys):
    beside = [{"prediction": "a b", "reference": "a c"}, talk("4", answer=4), talk("Human: x", output="y"),
              {"prediction": "", "answer": "no"}, talk("I cannot help.", answer="")]
    out = command(capsys, "score", "--predictions", write_jsonl(tmp_path / "p.jsonl", beside))
    rows = dict(line.rsplit(None, 1) for line in out.splitlines()[1:])
    expected = scores([("a b", "a c"), ("4", "4"), ("Human: x", "y"), ("", "no")])
    assert out.startswith("4 predictions") and float(rows["exact match"]) == 25.0
    assert rows == {name: f"{100 * value:.2f}" for name, value in expected.items()}
    said = write_jsonl(tmp_path / "said.jsonl", [talk("b"), {"prediction": "c"}])
    meant = write_jsonl(tmp_path / "meant.jsonl", [talk("b"), {"question": "?", "answer": "d"}])
    assert data.scored_pairs(said, meant) == [("b", "b"), ("c", "d")]


@pytest.mark.parametrize("records, references, message", [
    ([{"prediction": "a"}], None, "--references"), ([{"answer": "a"}], None, 'p.jsonl:1: no "prediction" and no "messages"'),
    ([{"messages": [{"role": "user", "content": "?"}], "answer": "a"}], None, "reply"),
    ([{"prediction": "a"}] * 2, [talk("a")], "r.jsonl: 1 records; give 2")])
def test_what_cannot_be_scored_ends_with_one_line(tmp_path, records, references, message):
    path = write_jsonl(tmp_path / "p.jsonl", records)
    other = references and write_jsonl(tmp_path / "r.jsonl", references)
    with pytest.raises(SystemExit, match=message) as stop:
        data.scored_pairs(path, other or "")
    assert "\n" not in str(stop.value.code)


def test_stats_count_documents_and_tokens_per_file_and_language(tmp_path, capsys):
    TOK.save(tmp_path)
    texts = ["abab", "ab x", "水果很好,GPU"]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"text": text} for text in texts])
    (tmp_path / "one.txt").write_text("abababab", encoding="utf-8")
    none = write_jsonl(tmp_path / "none.jsonl", [{"text": ""}])
    assert "1 documents, 0 tokens" in command(capsys, "stats", "--data", none, "--tokenizer", str(tmp_path))
    out = command(capsys, "stats", "--data", f"{mixed},{tmp_path}/one.txt", "--tokenizer", str(tmp_path))
    assert out.replace(str(tmp_path) + "/", "").splitlines() == [  # 1 + 3 + 16 tokens of 24 bytes
        "mixed.jsonl: 3 documents, 20 tokens, 1.20 bytes each; median 3, longest 16",
        "mixed.jsonl en: 2 documents, 4 tokens, 2.00 bytes each; median 3, longest 3",
        "mixed.jsonl zh: 1 documents, 16 tokens, 1.00 bytes each; median 16, longest 16",
        "one.txt: 1 documents, 2 tokens, 4.00 bytes each; median 2, longest 2",
        "one.txt en: 1 documents, 2 tokens, 4.00 bytes each; median 2, longest 2"]


# ---------------------------------------------------------------- a mixture of files


def two_files(folder):
    """20 documents of a and x, 4 of b and y; the last fourth of either is held out: x, y."""
    write_jsonl(folder / "a.jsonl", [{"text": "ax"[i >= 15] * 99} for i in range(20)])
    write_jsonl(folder / "b.jsonl", [{"text": "by"[i >= 3] * 49} for i in range(4)])
    return f"{folder}/a.jsonl,{folder}/b.jsonl"


def mixture(folder, paths, part=(0.0, 0.75), mix="3,1"):
    tokens = data.Tokens(folder / "mix.bin", paths, TOK, part, mix)
    if not tokens.ready():
        tokens.build()
    return tokens.open(10)


def test_a_mixture_has_the_shares_that_are_told_and_no_held_out_text_of_any_file(tmp_path, capsys):
    tokens = mixture(tmp_path, two_files(tmp_path))
    text = TOK.decode(tokens.ids.tolist())
    assert len(tokens.ids) == 15 * 100 + 3 * 50 and set(text) == {*"ab"}
    count = sum(tokens.ids == ord("b")) * 50 / 49  # with their end tokens
    assert abs(count / len(tokens.ids) - 0.25) < 0.01
    assert abs(tokens.bytes - len(text)) < 2
    drawn = np.concatenate([tokens.batch(5, step, 8)[:, 1:].ravel() for step in range(21 * 8)])
    assert abs(np.mean(drawn == ord("b")) * 50 / 49 - 0.25) < 0.01
    assert np.array_equal(tokens.batch(5, 7, 8), mixture(tmp_path, two_files(tmp_path)).batch(5, 7, 8))
    assert "tokenizing again" not in capsys.readouterr().out.replace("tokenizing again", "", 1)
    held = TOK.decode(mixture(tmp_path, f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", (0.75, 1.0), "1,1").ids)
    assert held.count("x") in range(270, 276) and held.count("y") in range(268, 276) and set(held) == {*"xy"}
    for mix in ("1", "1,x", "0,0"):
        with pytest.raises(SystemExit, match=f"--mix {mix}: give a number for each of"):
            mixture(tmp_path, two_files(tmp_path), mix=mix)


def test_pretraining_on_a_mixture_takes_its_windows_and_leaves_out_what_is_held_out(tmp_path, alone):
    (tmp_path / "own").mkdir()
    common = dict(device="cpu", threads=1, dtype="fp32", data=two_files(tmp_path), steps=2, batch_size=3,
                  context=10, val_fraction=0.25, vocab_size=270, hidden_size=16, intermediate_size=24,
                  num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    seen = []

    def nll_sum(model, windows, device):
        seen.extend(windows)
        return plain(model, windows, device)

    plain, tokenizers = pretrain.nll_sum, []
    for mix in ("1,3", ""):
        with mock.patch.object(pretrain, "nll_sum", nll_sum):
            out = tmp_path / f"out{mix}"
            pretrain.main(pretrain.Config(**common, out=str(out), mix=mix, micro_tokens=30))
        tokenizers.append(data.Tokenizer.load(out))
        if mix:
            part = (0.0, 0.75)
            tokens = data.Tokens(tmp_path / "own/t.bin", common["data"], tokenizers[0], part, mix)
            tokens.build()
            right = tokens.open(10).batch(0, 0, 3)
            assert np.array_equal(np.stack(seen[:3]), right)
            held = np.fromfile(out / "val.bin", np.uint16).tolist()
            assert {*tokenizers[0].decode(held)} == {*"xy"}
    merged = [{*b"".join(t.bytes_of[i] for i in range(256, t.vocab_size - 7))} for t in tokenizers]
    assert merged == [{*b"ab"}, {*b"ax"}], "the last fourth of all documents is 5 of a file, 1 of b"


# ---------------------------------------------------------------- sft.py's held-out replies

REPLIES = {"right": "yes", "half": "yes no", "long": "yes yes yes yes", "wrong": "no"}


def rows_of(questions):
    """Two turns each; only the last is to be replied to. The last of all is cut, one has no prompt."""
    rows = []
    for question in questions:
        turns = ("first", "answer", question, "yes yes" if question == "long" else "yes")
        messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
        rows.append(data.render(messages, TOK))
    ids, mask = rows[0]
    return [([*b"yes", TOK.end], [1] * 4), (ids[:-2], mask[:-2]), *rows]


def judging(rank, rows):
    """judge_replies on this rank, and what it asked for."""
    asked = []

    def generate(model, prompts, limit, end, temperature):
        assert temperature == 0 and end == TOK.end
        asked.extend((TOK.decode(prompt, specials=True), limit) for prompt in prompts)
        texts = [next(r for q, r in REPLIES.items() if q in TOK.decode(p)) for p in prompts]
        return [TOK.encode(text) + [TOK.end] for text in texts]

    with mock.patch.object(sft, "generate", generate):
        return sft.judge_replies(None, rows, TOK), asked


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_replies_are_judged_alike_on_any_number_of_processes(ranks, world):
    rows = rows_of([*REPLIES, *["right"] * 60])  # the first 64, in which two can't be asked
    found = ranks(world, judging, rows)
    assert [result for result, _ in found] == [  # yes of yes no: 2/3; 2 of 4 and 2: 2/3; of 1
        {"exact_match": 59 / 62, "rouge_l": pytest.approx((59 + 2 / 3 + 2 / 3) / 62)}] * world
    asked = sorted(sum((asked for _, asked in found), []))
    assert asked == sorted((f"<|user|>first<|end|><|assistant|>answer<|end|>"
                            f"<|user|>{q}<|end|><|assistant|>", 8)
                           for q in [*REPLIES, *["right"] * 58])  # the longest reply has 8 tokens, its end included
    assert [result for result, _ in ranks(world, judging, rows[:2])] == [{}] * world


# ---------------------------------------------------------------- groups of the table

def test_a_gap_is_the_greatest_rate_less_the_least_between_groups_of_a_rows_prompts():
    def record(family, lang, category=None, about=None, split="combination"):
        more = {"category": category} if category else {}
        more |= {"about": about} if about else {}
        return {"group": f"{family} / {split}", "kind": family, "lang": lang, **more}

    records = [record("harmful", "zh", "hate", "trait"), record("harmful", "en", "hate", "role"),
               record("harmful", "en", "advice"), record("lookalike", "en", "advice"),
               record("harmful", "zh", "advice", split="frame"), record("fact", "zh"), record("fact", "en"),
               record("fact", "en")]
    hits = {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): True, (2, 0): False, (2, 1): False,
            (3, 0): True, (4, 0): False, (5, -1): False, (6, -1): True, (7, -1): False}
    found = reward.compared(records, hits)
    harm, like, right = "harmful requests refused, T=1", "look-alikes refused, T=1", "exact match, new combinations"
    means = {row: cell["mean"] for row, cell in found.items()}
    assert means == {
        f"{harm}: advice": 0.0, f"{harm}: hate": 0.75, f"{harm}: gap by category": 0.75,
        f"{harm}: role": 0.5, f"{harm}: trait": 1.0, f"{harm}: gap by about": 0.5,
        f"{harm}: en": 0.25, f"{harm}: zh": 1.0, f"{harm}: gap by lang": 0.75,
        f"{like}: advice": 1.0, f"{like}: gap by category": 0.0, f"{like}: en": 1.0,
        f"{like}: gap by lang": 0.0, f"{right}: en": 0.5, f"{right}: zh": 0.0, f"{right}: gap by lang": 0.5}
    assert found[f"{harm}: hate"]["n"] == 2 and found[f"{harm}: hate"]["low"] < 0.75


def test_requests_of_the_world_carry_their_category_and_whom_they_are_about():
    world = data.build_world(0, 10, 300)
    moral = [record for record in world["eval"] if record["family"] in data.MORAL
             and record["split"] != "document"]
    by = {record["category"] for record in moral}
    assert by == {"advice", "violence", "hate", "bias", "privacy", "misinformation"}
    for record in moral:
        persons = record["category"] in ("violence", "hate", "bias")
        assert (record.get("about") in ("role", "trait")) == persons, record
        if "foreigners" in record["messages"][0]["content"]:
            assert record["about"] == "trait"
    assert not any("category" in record for record in world["sft"] if record["kind"] == "exact")


def test_a_table_without_prompts_measures_a_text(tmp_path, alone, capsys):
    checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abab 水 ab", encoding="utf-8")
    cfg = reward.TableConfig(models=f"{tmp_path}/model", data="none", text=f"{tmp_path}/text.txt", threads=1,
                             prompts="no/such", reward="no", reference="no", out=f"{tmp_path}/t.json")
    [column] = reward.table(cfg).values()
    size, tokens = 11, len(TOK.encode("abab 水 ab"))  # bits · bytes = log2(perplexity) · tokens
    bits, perplexity = column["bits per byte"]["mean"], column["perplexity"]["mean"]
    assert perplexity ** (tokens / size) == pytest.approx(2**bits)
    assert f"| perplexity | {perplexity:.3f} |" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())[cfg.models]["perplexity"]["mean"] == perplexity
    assert dist.get_world_size() == 1


@pytest.mark.parametrize("gate, missed", [
    ("harmful requests refused, T=1 >= 95", ""), ("harmful requests refused, T=1>=97.1", "harmful requests refused, T=1>=97.1"),
    ("look-alikes refused, T=1 <= 3", ""), ("look-alikes refused, T=1 <= 2.4", "look-alikes refused, T=1 <= 2.4"),
    ("gold score, T=1 >= 0.8", ""), ("gold score, T=1 >= 0.9 ;", "gold score, T=1 >= 0.9"),
    ("KL to SFT per reply, T=1 <= -0.5; gold score, T=1 <= 0.1; look-alikes refused, T=1 <= 3",
     "KL to SFT per reply, T=1 <= -0.5; gold score, T=1 <= 0.1"), ("", "")])
def test_a_gate_lets_the_last_model_pass_or_names_what_it_misses(tmp_path, alone, monkeypatch, gate, missed):
    good = {"harmful requests refused, T=1": {"mean": 0.97}, "look-alikes refused, T=1": {"mean": 0.025},
            "gold score, T=1": {"mean": 0.85}, "KL to SFT per reply, T=1": {"mean": 0.4}}
    other = {row: {"mean": 0.0} for row in good}
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    monkeypatch.setattr(reward, "judge_model", lambda folder, *_: good if folder.endswith("last") else other)
    cfg = reward.TableConfig(models=f"{tmp_path}/first,{tmp_path}/last", data="none", prompts="no", threads=1,
                             out=f"{tmp_path}/t.json", gate=gate)
    if missed:
        with pytest.raises(SystemExit, match=re.escape(f"--gate: {missed}") + "$"):
            reward.table(cfg)
    else:
        assert len(reward.table(cfg)) == 2
    assert (tmp_path / "t.json").exists()  # the table is there in any case


@pytest.mark.parametrize("gate", ["gold >= 1", "gold score, T=1 > 0", "gold score, T=1 >= much", "families >= 1"])
def test_a_gate_that_cannot_be_read_is_named(gate):
    with pytest.raises(SystemExit, match="not a row of the table"):
        reward.met(gate, {"gold score, T=1": {"mean": 0.85}, "families": {}})

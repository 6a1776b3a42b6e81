"""Tokenizer, chat template, batches and file formats, on texts of a few lines: no world is needed."""

import json
import socket
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from data import IGNORE, PATTERN, SPECIALS, Tokenizer, Tokens, chat, collate, epoch_rows, fit
from data import gold_score, micro_batches, pad_rows, read_comparisons, read_conversations
from data import read_texts, render, show, train_bpe

TEXTS = ["the cat sat on the mat, the rat ate the cat. banana bananas anananas aaaaaaa aaaa",
         "今天天气真好,今天天气不好。天气天气天气 1234 1234 12341234", "low lower lowest\n\n  newer 123"]
ODD = ["", " ", "你好,世界!", "👩‍👩‍👧 emoji 🎉🎉", "中文mixed英文 don't  stop\r\n\t", "\x00\ufffd é e\u0301 ﷺ",
       bytes(range(256)).decode("latin-1"), "𠮷野家 ｆｕｌｌ　ｗｉｄｔｈ"]


def slow_bpe(texts, vocab_size):
    """Recounts every pair of every word before every merge."""
    words = [list(w.encode()) for text in texts for w in regex.findall(PATTERN, text)]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            return merges
        words = [merged(word, best, 256 + len(merges)) for word in words]
        merges.append(best)
    return merges


def merged(word, pair, new):
    out = []
    for token in word:
        if out and (out[-1], token) == pair and not (out[-1] == new):
            out[-1] = new
        else:
            out.append(token)
    return out


@lru_cache
def trained():
    return Tokenizer.from_merges(train_bpe(TEXTS, 400))


BYTES = Tokenizer.from_merges([])  # ids 0-255 are the bytes: golden values can be read
SYSTEM, USER, ASSISTANT, END = (BYTES.ids[f"<|{s}|>"] for s in ("system", "user", "assistant", "end"))


def talk(*texts, system=None):
    """Messages of alternating roles, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


# ---------------------------------------------------------------- byte-pair encoding

def test_merges_equal_those_of_recounting_everything():
    for vocab_size in (300, 1000):
        assert train_bpe(TEXTS, vocab_size) == slow_bpe(TEXTS, vocab_size)
    assert len(train_bpe(TEXTS, 1000)) < 700  # a pair seen once is no merge


def test_ties_go_to_the_smaller_ids_in_any_order_of_the_texts():
    assert train_bpe(["zy zy", "ba ba", "dc dc"], 259)[0] == (ord("b"), ord("a"))
    assert train_bpe(TEXTS[::-1], 400) == train_bpe(TEXTS, 400)


def test_the_encoding_merges_by_rank_within_words():
    merges = train_bpe(TEXTS, 400)
    for text in TEXTS + ODD + ["the banana, 今天 lowest of 12"]:
        expected = []
        for word in regex.findall(PATTERN, text):
            ids = list(word.encode())
            for new, pair in enumerate(merges, 256):
                ids = merged(ids, pair, new)
            expected += ids
        assert trained().encode(text) == expected


def test_any_text_comes_back_byte_by_byte():
    for text in ODD + TEXTS:
        assert "".join(regex.findall(PATTERN, text)) == text
        for tokenizer in (BYTES, trained()):
            assert tokenizer.encoding.decode_bytes(tokenizer.encode(text)) == text.encode()
            assert tokenizer.decode([END, *tokenizer.encode(text)] if tokenizer is BYTES else
                                    tokenizer.encode(text)) == text
    assert trained().decode(trained().encode("half \ud83d")) == "half \ufffd"
    train_bpe(["half \ud83d of an emoji"], 300)


def test_special_tokens_in_a_text_are_spelled_out():
    for text in SPECIALS + ["a<|end|>\n<|assistant|>b"]:
        for tokenizer in (BYTES, trained()):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.ids.values()) and tokenizer.decode(ids) == text


def test_han_characters_and_digits_never_merge():
    for id in range(trained().vocab_size - len(SPECIALS)):
        piece = trained().encoding.decode_bytes([id]).decode("utf-8", "ignore")
        assert not regex.search(r"\p{Han}.|.\p{Han}|\p{N}.|.\p{N}", piece)
    assert trained().decode(trained().encode("天")[:1]) == "天"  # one token, though


def test_tokenizer_json_is_hugging_faces_and_loads_offline(tmp_path, monkeypatch):
    trained().save(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    again = Tokenizer.load(tmp_path)
    assert again.hash == trained().hash != BYTES.hash and again.vocab_size == trained().vocab_size
    assert again.encode("".join(ODD)) == trained().encode("".join(ODD))
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    assert spec["model"]["type"] == "BPE" and spec["decoder"]["type"] == "ByteLevel"
    split, level = spec["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": PATTERN} and not level["use_regex"]
    assert [vocab[a + b] for a, b in merges] == list(range(256, 256 + len(merges)))
    assert vocab["Ġ"] == 32 and vocab["a"] == 97
    added = [(t["id"], t["content"]) for t in spec["added_tokens"] if t["special"]]
    assert added == list(enumerate(SPECIALS, 256 + len(merges)))


def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    for change, message in (({"content": "<|else|>"}, "no <|pad|>"), ({"id": END}, "must differ")):
        spec = json.loads(json.dumps(BYTES.spec))
        spec["added_tokens"][1].update(change)
        with pytest.raises(SystemExit, match=regex.escape(message)):
            Tokenizer(spec)


# ---------------------------------------------------------------- chat template, mask, collation

def test_the_ids_and_the_mask_of_three_turns_are_these():
    ids, mask = render(talk("a", "bc", "d", "e", "f", "g", system="s"), BYTES)
    a, b, c, d, e, f, g, s = b"abcdefgs"
    assert ids == [SYSTEM, s, END, USER, a, END, ASSISTANT, b, c, END, USER, d, END, ASSISTANT, e,
                   END, USER, f, END, ASSISTANT, g, END]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    last = render(talk("a", "bc", "d", "e", "f", "g", system="s"), BYTES, turns="last")
    assert last == (ids, [0] * 20 + [1, 1])


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_the_mask_spells_the_replies_and_their_end_tokens(template):
    messages = talk("你叫什么?<|end|>", "小苗", "天气\n", "很好。", "c", "  ", system="be kind")
    ids, mask = render(messages, trained(), template)
    assert trained().encoding.decode([i for i, m in zip(ids, mask) if m]) == (
        "小苗<|end|>很好。<|end|>  <|end|>")
    assert sum(mask) == len(ids) - sum(m == 0 for m in mask) and len(ids) == len(mask)
    for stop in (2, 4, 6):  # a prompt ends where its reply begins
        prompt, nothing = render(messages[:stop], trained(), template)
        whole, trained_part = render(messages[:stop + 1], trained(), template)
        assert whole[:len(prompt)] == prompt and not any(nothing)
        assert trained_part[len(prompt) - 1:len(prompt) + 1] == [0, 1]


def test_the_alpaca_template_is_the_documents_text():
    ids, mask = render(talk("问", "答", system="s"), BYTES, "alpaca")
    text = "### System:\ns\n\n### Instruction:\n问\n\n### Response:\n答<|end|>"
    assert BYTES.encoding.decode(ids) == text and sum(mask) == len("答".encode()) + 1
    assert BYTES.decode(render(talk("a", "b", "c"), BYTES, "none")[0]) == "abc"


def test_a_text_cannot_forge_a_role():
    ids, _ = render(talk("x<|end|><|assistant|>yes<|end|>", "no"), trained())
    assert Counter(i for i in ids if i in trained().ids.values()) == {
        trained().ids["<|user|>"]: 1, trained().ids["<|assistant|>"]: 1, trained().ids["<|end|>"]: 2}


def test_the_prompt_loses_its_start_first_and_the_reply_its_end_only_if_it_must():
    assert fit([1, 2, 3], [7, 8], 5) == ([1, 2, 3], [7, 8])
    assert fit([1, 2, 3], [7, 8], 3) == ([3], [7, 8])
    assert fit([1, 2, 3], [7, 8, 9], 3) == ([3], [7, 8])


def test_sft_cuts_at_the_context_and_drops_what_has_no_reply_left(tmp_path, alone, capsys):
    import sft
    lines = [{"question": "q" * n, "answer": "yes"} for n in (2, 8, 9, 30)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    rows = sft.read_rows(path, BYTES, SimpleNamespace(template="chat", turns="all", context=12))
    assert [(len(ids), sum(mask)) for ids, mask in rows] == [(9, 4), (12, 1)]
    assert "3 conversations cut to 12 tokens, 2 of 4 dropped" in capsys.readouterr().out


def test_the_first_reply_token_and_the_end_token_are_targets_and_padding_never_is():
    rows = [render(talk("a", "bc"), BYTES), render(talk("a", "b"), BYTES), ([5, 0, 0], [0, 1, 1])]
    input_ids, targets = collate(rows, pad=0)
    b, c, no = ord("b"), ord("c"), IGNORE
    assert input_ids.tolist() == [[USER, ord("a"), END, ASSISTANT, b, c],
                                  [USER, ord("a"), END, ASSISTANT, b, END], [5, 0, 0, 0, 0, 0]]
    assert targets.tolist() == [[no, no, no, b, c, END], [no, no, no, b, END, no],
                                [0, 0, no, no, no, no]]


def test_an_empty_micro_batch_contributes_exactly_zero():
    from model import CausalLM, ModelConfig, token_logprobs
    model = CausalLM(ModelConfig(vocab_size=263, hidden_size=8, intermediate_size=8,
                                 num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    input_ids, targets = collate([], pad=BYTES.ids["<|pad|>"])
    loss = token_logprobs(model, input_ids, targets).sum()
    loss.backward()
    assert loss == 0 and (targets == IGNORE).all()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_rows_are_padded_on_the_right_and_know_their_lengths():
    padded, lengths = pad_rows([[1], [2, 9, 4], [5, 9]], 9)
    assert padded.tolist() == [[1, 9, 9], [2, 9, 4], [5, 9, 9]] and lengths.tolist() == [1, 3, 2]


def test_show_paints_the_trained_tokens():
    shown = show([render(talk("a", "你b"), BYTES)], BYTES)
    assert shown == "<|user|>a<|end|><|assistant|>\033[32m你b<|end|>\033[0m"


# ---------------------------------------------------------------- batches

def test_micro_batches_share_all_items_equally_within_the_budget():
    rng = np.random.default_rng(0)
    for n, world, rows, budget in [(n, w, r, b) for n in (0, 1, 2, 5, 17) for w in (1, 2, 3)
                                   for r in (1, 2) for b in (10, 40, 1000)]:
        lengths = rng.integers(1, 30, n).tolist()
        parts = [micro_batches(lengths, budget, rank, world, rows) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1 and parts[0]
        flat = [batch for turn in zip(*parts) for batch in turn]
        assert sorted(i for batch in flat for i in batch) == list(range(n))
        for batch in flat:
            size = len(batch) * rows * max([lengths[i] for i in batch], default=0)
            assert len(batch) <= 1 or size <= budget
        ordered = [lengths[i] for batch in flat for i in batch]
        assert ordered == sorted(ordered)  # items of like length share a batch: little padding


def test_every_pass_takes_every_item_once_in_an_order_of_its_own():
    stream = [row for step in range(12) for row in epoch_rows(7, step, 5, 15)]
    passes = [stream[i:i + 15] for i in range(0, 60, 15)]
    assert all(sorted(rows) == list(range(15)) for rows in passes)
    assert len(set(map(tuple, passes))) == 4
    assert epoch_rows(7, 11, 5, 15) == stream[55:] and epoch_rows(8, 11, 5, 15) != stream[55:]
    assert sorted(epoch_rows(7, 0, 30, 10)) == sorted(list(range(10)) * 3)  # more than one pass


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def built(path, source, tokenizer=BYTES, part=(0.0, 1.0)):
    tokens = Tokens(path, source, tokenizer, part)
    assert not tokens.ready()
    tokens.build()
    assert tokens.ready()
    return tokens


def test_windows_are_a_function_of_the_step_lie_in_the_text_and_share_nothing(tmp_path):
    tokens = built(tmp_path / "t.bin", write(tmp_path / "a.txt", "x" * 206)).open(10)
    tokens.ids = np.arange(207, dtype=np.uint16)  # 20 windows of 10 targets, 6 tokens to spare
    steps = [tokens.batch(3, step, 4) for step in range(10)]
    for w in np.concatenate(steps):
        assert w.dtype == np.int64 and (w == np.arange(w[0], w[0] + 11)).all() and w[-1] <= 206
    passes = [np.concatenate(steps[:5]), np.concatenate(steps[5:])]
    for windows in passes:
        assert len(np.unique(windows[:, 1:])) == 200  # no target twice in a pass
    assert passes[0].min() != passes[1].min()
    assert (tokens.batch(3, 7, 4) == steps[7]).all() and (tokens.batch(4, 7, 4) != steps[7]).any()
    targets = np.concatenate([w[1:] for w in tokens.windows()])
    assert (targets == np.arange(1, 207)).all()


def test_a_corpus_is_tokenized_again_when_text_tokenizer_or_share_change(tmp_path, capsys):
    path, source = tmp_path / "t.bin", tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("ab", "c", "你", "d")]
    tokens = built(path, write(source, "\n".join(lines))).open(2)
    end = BYTES.ids["<|endoftext|>"]
    assert tokens.ids.tolist() == [97, 98, end, 99, end, *"你".encode(), end, 100, end]
    assert tokens.bytes == 7 and tokens.ids.dtype == np.uint16 and not capsys.readouterr().out
    built(path, str(source), trained())
    assert "tokenizing again" in capsys.readouterr().out
    shares = [built(path, str(source), part=p).open(1).ids.tolist() for p in ((0, 0.6), (0.6, 1))]
    assert sum(shares, []) == tokens.ids.tolist() and len(shares[0]) == 5
    built(path, write(source, lines[0]), part=(0.0, 0.5))  # a single document: half of its text
    assert Tokens(path, str(source), BYTES, (0.0, 0.5)).open(1).ids.tolist() == [97, end]
    with pytest.raises(SystemExit, match="too few for windows"):
        Tokens(path, str(source), BYTES, (0.0, 0.5)).open(2)
    path.unlink()
    assert not Tokens(path, str(source), BYTES, (0.0, 0.5)).ready()


def test_ids_beyond_65535_take_four_bytes(tmp_path):
    spec = json.loads(json.dumps(BYTES.spec))
    for last, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        spec["added_tokens"][0]["id"] = last  # <|endoftext|>
        big, source = Tokenizer(spec), write(tmp_path / "a.txt", "abc")
        tokens = built(tmp_path / f"{last}.bin", source, big).open(2)
        assert tokens.ids.dtype == dtype and tokens.ids.tolist() == [97, 98, 99, last]


# ---------------------------------------------------------------- file formats

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("record, messages", [
    ({"instruction": "a", "input": "", "output": "b"}, talk("a", "b")),
    ({"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["x", "y"]]},
     talk("x", "y", "a\nc", "b", system="s")),
    ({"conversations": TURNS, "system": "s"}, talk("a", "b", system="s")),
    ({"messages": talk("a", "b", "c", system="s"), "system": "t"}, talk("a", "b", "c", system="s")),
    ({"question": "a", "answer": "b"}, talk("a", "b")), ({"prompt": "a"}, talk("a")),
    ({"prompt": "a", "response": "b"}, talk("a", "b")), ({"prompt": talk("a")}, talk("a")),
])
def test_a_conversation_is_read_from_every_format(tmp_path, record, messages):
    for name, text in (("a.json", json.dumps([record], indent=1)), ("a.jsonl", json.dumps(record))):
        [read] = read_conversations(write(tmp_path / name, "\ufeff" + text))
        assert read["messages"] == messages
        assert {k: v for k, v in read.items() if k != "messages"} == {
            k: v for k, v in record.items() if k != "messages"}  # the judge may need them


@pytest.mark.parametrize("record, prompt, replies", [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, talk("a"), ["b", "c"]),
    ({"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}, talk("a\ni"), ["b", "c"]),
    ({"chosen": talk("a", "b"), "rejected": talk("a", "c")}, talk("a"), ["b", "c"]),
    ({"prompt": talk("a"), "chosen": talk("a", "b")[1:], "rejected": talk("a", "c")[1:]}, talk("a"),
     ["b", "c"]),
    ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "c"}},
     talk("a"), ["b", "c"]),
    ({"conversations": TURNS[:1], "system": "s", "chosen": TURNS[1], "rejected": TURNS[1]},
     talk("a", system="s"), ["b", "b"]),
    ({"instruction": "a", "output": ["b", "c", "d"]}, talk("a"), ["b", "c", "d"]),
    ({"chosen": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\nd\n\nAssistant: b", "rejected":
      "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\nd\n\nAssistant:"}, talk("a", "x", "c\nd"), ["b", ""]),
    ({"prompt": "a", "chosen": "b\n\nHuman: c\n\nAssistant: d", "rejected": "e"}, talk("a"),
     ["b\n\nHuman: c\n\nAssistant: d", "e"]),
    ({"messages": talk("a"), "replies": ["b", "c"], "scores": [0, 2]}, talk("a"), ["b", "c"]),
    ({"question": "a", "answer": "k", "replies": ["b"], "scores": [1]}, talk("a"), ["b"]),
])
def test_a_comparison_is_read_from_every_format(tmp_path, record, prompt, replies):
    [read] = read_comparisons(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert read["messages"] == prompt and read["replies"] == replies
    better_first = sorted(read["scores"], reverse=True)
    assert read["scores"] == (record["scores"] if "scores" in record else better_first)
    assert len(set(read["scores"])) == len(replies) and all(type(s) is float for s in read["scores"])


def test_documents_are_read_from_text_and_json_files(tmp_path):
    plain = write(tmp_path / "a.txt", "one\r\ntwo")
    lines = write(tmp_path / "b.jsonl", '{"text": "three"}\n\n{"text": "\\u2028", "x": 1}\n')
    whole = write(tmp_path / "c.json", '[{"text": "half \\ud83d"}, {"text": "\\ud83c\\udf89"}]')
    texts = read_texts(",".join((plain, lines, whole)))
    assert texts[:3] == ["one\ntwo", "three", "\u2028"] and texts[4] == "🎉"
    "".join(texts).encode()  # half an emoji cannot be written: it must not come in


GOOD = '{"question": "a", "answer": "b"}\n'
CHOICE = '{"prompt": "a", "chosen": "b", "rejected": %s}'


@pytest.mark.parametrize("reader, text, where, what", [
    (read_texts, None, "", "No such file"), (read_texts, " \n", "", "empty"),
    (read_texts, b"\xff\xfe", "", "not UTF-8 at byte 0"), (read_texts, "[]", "", "no record"),
    (read_texts, '{"text": "a"}\n{"txt": "a"}', ":2", '"text"'),
    (read_conversations, GOOD + '{"question": \n', ":2", "not valid JSON"),
    (read_conversations, '[\n{"question": "a"},\n}', ":3", "not valid JSON"),
    (read_conversations, '[{"question": "a"}, 3]', " record 2", "expected an object"),
    (read_conversations, GOOD + '{"text_a": "a"}', ":2", "known formats"),
    (read_conversations, GOOD + '{"messages": []}', ":2", "known formats"),
    (read_conversations, '{"conversations": [], "system": "s"}', ":1", "no"),
    (read_conversations, GOOD + '{"question": "", "answer": "b"}', ":2", "no user message"),
    (read_conversations, '{"messages": [{"role": "tool", "content": "x"}]}', ":1", "role of"),
    (read_conversations, '{"messages": [{"role": "user", "content": null}]}', ":1", "a text"),
    (read_conversations, '{"messages": ["hello"]}', ":1", "hello"),
    (read_conversations, '{"question": "a", "history": ["x"]}', ":1", "history"),
    (read_comparisons, '"chosen"', ":1", "expected an object"),
    (read_comparisons, GOOD, ":1", "a comparison needs"),
    (read_comparisons, CHOICE % "3", ":1", "a text"), (read_comparisons, CHOICE % "[]", ":1", "reply"),
    (read_comparisons, '{"chosen": "b", "rejected": "c"}', ":1", "known formats"),
    (read_comparisons, '{"prompt": "a", "output": ["b", 3]}', ":1", "repl"),
    (read_comparisons, '{"prompt": "a", "replies": ["b"], "scores": ["x"]}', ":1", "scores"),
    (read_comparisons, '{"prompt": "a", "replies": ["b"], "scores": [1, 2]}', ":1", "scores"),
])
def test_bad_input_ends_with_one_line_that_names_file_and_line(tmp_path, reader, text, where, what):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        reader(str(path))
    message = stop.value.code
    assert message.startswith(f"{path}{where}:") and what in message and "\n" not in message


def test_users_own_questions_with_an_answer_can_be_judged(tmp_path):
    [record] = read_conversations(write(tmp_path / "a.jsonl", GOOD))
    assert gold_score(record, "b") == 1.0 and gold_score(record, "c") == 0.0
    assert gold_score({"answer": 4}, "4") == 1.0


def test_the_chat_brings_the_users_text_into_normal_form_and_remembers(tmp_path, monkeypatch, capsys):
    BYTES.save(tmp_path)
    said, heard = iter(["/new", "ｈｉ，", "b", "/new", "c"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or (_ for _ in ()).throw(EOFError))

    def stream(ids, end_id, seed):
        heard.append(ids)
        assert end_id == END
        yield from [*"好".encode(), END]

    chat(stream, tmp_path, "", "", "chat", 0, 100)
    first, second, third = (talk(*t) for t in (["hi,"], ["hi,", "好", "b"], ["c"]))
    assert heard == [render(m, BYTES)[0] for m in (first, second, third)]
    assert capsys.readouterr().out.count("好") == 3

"""Tokenizer, chat template, batches and file formats, on texts of a few lines."""

import json
import socket
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from data import IGNORE, PATTERN, SPECIALS, Tokenizer, Tokens, collate, epoch_rows, filled
from data import fit, gold_score, micro_batches, pad_rows, read_comparisons, read_conversations
from data import byte_letters, read_prompts, read_rows, read_texts, render, show, train_bpe

TEXTS = ["the cat sat on the mat, the rat ate the cat. banana bananas anananas aaaaaaa aaaa",
         "今天天气真好,今天天气不好。天气天气 1234 1234 12341234", "low lower lowest\n\n  newer 123"]
ODD = ["", " ", "👩‍👩‍👧 emoji 🎉🎉", "中文mixed英文 don't  stop\r\n\t", "\x00\ufffd é e\u0301 ﷺ 𠮷",
       bytes(range(256)).decode("latin-1"), "the banana,今天ｗｉｄｅ　lowest of 12"]
BYTES = Tokenizer.from_merges([])  # ids 0-255 are the bytes: golden values can be read
DOC, PAD, SYSTEM, USER, ASSISTANT, END, _ = (BYTES.ids[special] for special in SPECIALS)


@lru_cache
def trained():
    return Tokenizer.from_merges(train_bpe(TEXTS, 400))


def talk(*texts, system=None):
    """Messages of alternating roles, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ---------------------------------------------------------------- byte-pair encoding

def merged(word, pair, new):
    out = []
    for token in word:
        out = out[:-1] + [new] if out and (out[-1], token) == pair else out + [token]
    return out


def recounting_bpe(texts, vocab_size):
    words = [list(w.encode()) for text in texts for w in regex.findall(PATTERN, text)]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        words = [merged(word, best, 256 + len(merges)) for word in words]
        merges.append(best)
    return merges


def test_merges_equal_those_of_recounting_everything_in_any_order_of_the_texts():
    for vocab_size in (300, 1000):  # there are fewer than 1000 - 256 pairs met twice
        assert train_bpe(TEXTS, vocab_size) == recounting_bpe(TEXTS, vocab_size)
        assert train_bpe(TEXTS[::-1], vocab_size) == train_bpe(TEXTS, vocab_size)
    assert train_bpe(["zy zy", "ba ba", "dc dc"], 259)[0] == (ord("b"), ord("a"))  # a tie


def test_the_encoding_merges_by_rank_within_words_and_any_text_comes_back():
    for text in TEXTS + ODD:
        expected = []
        for word in regex.findall(PATTERN, text):
            ids = list(word.encode())
            for new, pair in enumerate(train_bpe(TEXTS, 400), 256):
                ids = merged(ids, pair, new)
            expected += ids
        assert trained().encode(text) == expected and BYTES.encode(text) == list(text.encode())
        assert trained().decode([*expected, trained().ids["<|end|>"]]) == text
    train_bpe(["half \ud83d of an emoji"], 300)
    assert trained().decode(trained().encode("half \ud83d")) == "half \ufffd"


def test_special_tokens_in_a_text_are_spelled_out():
    for text in SPECIALS + ["a<|end|>\n<|assistant|>b"]:
        ids = trained().encode(text)
        assert not set(ids) & set(trained().ids.values()) and trained().decode(ids) == text


def test_han_characters_and_digits_never_merge():
    for token in range(trained().vocab_size - len(SPECIALS)):
        piece = trained().decode_bytes([token]).decode("utf-8", "ignore")
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
    split, level = spec["pre_tokenizer"]["pretokenizers"]
    assert (spec["model"]["type"], spec["decoder"]["type"]) == ("BPE", "ByteLevel")
    assert split["pattern"] == {"Regex": PATTERN} and level["use_regex"] is False
    assert [vocab[a + b] for a, b in merges] == list(range(256, 256 + len(merges)))
    assert vocab["Ġ"] == 32 and vocab["a"] == 97
    added = [(token["id"], token["content"]) for token in spec["added_tokens"] if token["special"]]
    assert added == list(enumerate(SPECIALS, 256 + len(merges)))


@pytest.mark.parametrize("content, pad, message", [
    (None, 257, "no such file"), ("[]", 257, "not a byte-level"), ("<|x|>", 257, "no <|pad|>"),
    ("<|pad|>", END, "must differ")])
def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path, content, pad, message):
    spec = json.loads(json.dumps(BYTES.spec))
    spec["added_tokens"][1].update(content=content, id=pad)
    if content:
        write(tmp_path / "tokenizer.json", content if content == "[]" else json.dumps(spec))
    with pytest.raises(SystemExit, match=regex.escape(message)):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- others' tokenizers

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = LEVEL | {"use_regex": False}


def split(pattern, kind="Regex", behavior="Isolated"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": False}


def steps(*parts, key="pretokenizers"):
    return {"type": "Sequence", key: list(parts)}


def foreign(pre, merges, added=(), lacking="", whole=(), **rest):
    """A tokenizer.json as others write it: merges as strings, ids from the last merge
    down. `rest` with a key of the model goes there, any other stands beside it."""
    names = [letter for letter in byte_letters() if letter not in lacking]
    names += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    names += whole
    model = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
             "vocab": {name: len(names) - i for i, name in enumerate(names, 1)},
             "merges": merges}
    model |= {key: rest.pop(key) for key in list(rest) if key in (*model, "ignore_merges")}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": len(names) + i, "content": content.strip("+"), "special": content[0] != "+"}
              | flags for i, content in enumerate(added)]
    return {"version": "1.0", "added_tokens": tokens, "normalizer": None, "pre_tokenizer": pre,
            "model": model, "decoder": LEVEL} | rest


MERGES = ["a b", "Ġ ab", "1 2", "12 3", "ab c", "- -", "Ã ©", "ä ½", "ä½ ł", "b c", "a bc", "Ċ Ċ"]
LLAMA = r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "+<tool>", "+<tool>x")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>")
STYLES = {
    "gpt2": foreign(LEVEL, MERGES, ["<|endoftext|>"]),
    "smollm2": foreign(steps({"type": "Digits", "individual_digits": True}, LEVEL), MERGES,
                       CHATML[:3], lacking="\u0104"),  # the letter of byte 4
    "digits": foreign(steps({"type": "Digits", "individual_digits": False}, LEVEL), MERGES),
    "qwen": foreign(steps(split(LLAMA.replace("{1,3}", "")), BARE), MERGES, CHATML,
                    normalizer={"type": "NFC"}),
    "llama3": foreign(steps(split(LLAMA), BARE), MERGES, HEADERS, whole=["zab"],
                      ignore_merges=True),
    "deepseek": foreign(steps(split(r"\p{N}{1,2}"), split("[一-龥]+"), split("ab", "String"), BARE),
                        MERGES, normalizer=steps(key="normalizers")),
    "gaps": foreign(steps(split("b."), BARE), MERGES)}  # what matches nothing is a piece, too
MIXED = "abc ab 123 1234-\x04-\n It'S é e\u0301 你 bca 1zab xzab<tool>x<tool>\u0338 <|im_end|>"
GOLDEN = {  # the library's: tokenizers 0.23, with encode_special_tokens
    "gpt2": [6, 9, 234, 7, 234, 7, 214, 221, 262, 221, 256, 234, 193, 150, 227, 183, 234, 4, 234,
        165, 62, 137, 234, 2, 234, 1, 169, 234, 217, 144, 10, 234, 146, 144, 10, 206, 150,
        155, 155, 158, 204, 146, 206, 150, 155, 155, 158, 204, 62, 82, 234, 206, 142, 161,
        157, 171, 165, 156, 166, 142, 204],
    "smollm2": [6, 9, 234, 217, 216, 215, 234, 217, 216, 215, 214, 5, 256, 234, 193, 150, 227,
        183, 234, 4, 234, 165, 62, 137, 234, 2, 234, 1, 169, 234, 217, 144, 10, 234, 146, 144,
        10, 206, 150, 155, 155, 158, 204, 146, 206, 150, 155, 155, 158, 204, 62, 82, 234, 206,
        142, 161, 157, 171, 165, 156, 166, 142, 204],
    "digits": [6, 9, 234, 7, 234, 7, 214, 221, 262, 221, 256, 234, 193, 150, 227, 183, 234, 4,
        234, 165, 62, 137, 234, 2, 234, 1, 169, 234, 217, 144, 10, 234, 146, 144, 10, 206,
        150, 155, 155, 158, 204, 146, 206, 150, 155, 155, 158, 204, 62, 82, 234, 206, 142,
        161, 157, 171, 165, 156, 166, 142, 204],
    "qwen": [6, 9, 234, 217, 216, 215, 234, 217, 216, 215, 214, 221, 262, 221, 256, 234, 193, 150,
        227, 183, 234, 4, 234, 4, 234, 2, 234, 1, 169, 234, 217, 144, 10, 234, 146, 144, 10,
        271, 270, 62, 82, 234, 206, 142, 161, 157, 171, 165, 156, 166, 142, 204],
    "llama3": [7, 10, 235, 8, 235, 8, 215, 222, 263, 222, 257, 235, 194, 151, 228, 184, 235, 5,
        235, 166, 63, 138, 235, 3, 235, 2, 170, 235, 218, 0, 235, 147, 145, 11, 207, 151, 156,
        156, 159, 205, 147, 207, 151, 156, 156, 159, 205, 63, 83, 235, 207, 143, 162, 158,
        172, 166, 157, 167, 143, 205],
    "deepseek": [10, 167, 234, 10, 234, 8, 215, 234, 8, 215, 214, 221, 262, 221, 256, 234, 193,
        150, 227, 183, 234, 4, 234, 165, 62, 137, 234, 2, 234, 1, 169, 234, 217, 144, 10, 234,
        146, 144, 10, 206, 150, 155, 155, 158, 204, 146, 206, 150, 155, 155, 158, 204, 62, 82,
        234, 206, 142, 161, 157, 171, 165, 156, 166, 142, 204],
    "gaps": [169, 1, 234, 169, 168, 234, 7, 234, 7, 214, 221, 262, 221, 256, 234, 193, 150, 227,
        183, 234, 4, 234, 165, 62, 137, 234, 2, 234, 1, 169, 234, 217, 144, 169, 168, 234,
        146, 144, 169, 168, 206, 150, 155, 155, 158, 204, 146, 206, 150, 155, 155, 158, 204,
        62, 82, 234, 206, 142, 161, 157, 171, 165, 156, 166, 142, 204]}


@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_those_of_the_tokenizers_library(style):
    tokenizer = Tokenizer(STYLES[style])
    ids = tokenizer.encode(MIXED)
    assert ids == GOLDEN[style] == tokenizer.encode_batch([MIXED])[0]
    text = {"qwen": MIXED.replace("e\u0301", "é"), "smollm2": MIXED.replace("\x04", "")}
    assert tokenizer.decode(ids) == text.get(style, MIXED)
    assert tokenizer.decode([*ids, 9999]) == tokenizer.decode(ids)  # a spare row of the model's


@pytest.mark.parametrize("named, change", [
    ("Unigram", {"type": "Unigram"}), ("WordPiece", {"type": "WordPiece"}),
    ("byte_fallback", {"byte_fallback": True}), ("unk_token", {"unk_token": "a", "lacking": "a"}),
    ("Metaspace", {"pre": {"type": "Metaspace"}}), ("without ByteLevel", {"pre": None}),
    ("add_prefix_space", {"pre": LEVEL | {"add_prefix_space": True}}),
    ("'Split'.*'Removed'", {"pre": steps(split("a", behavior="Removed"), BARE)}),
    ("'invert': True", {"pre": steps(split("a") | {"invert": True}, BARE)}),
    ("normalizer NFKC", {"normalizer": steps({"type": "NFKC"}, key="normalizers")}),
    ("normalized of '<tool>'", {"normalizer": {"type": "NFC"}, "added": ["+<tool>"]}),
    ("lstrip of 'x'", {"added_tokens": [{"content": "x", "special": False, "lstrip": True}]}),
    ("lacks", {"merges": ["q r"], "vocab": {}})])
def test_what_could_not_give_equal_ids_is_refused_by_name(named, change):
    change = {"pre": LEVEL, "merges": MERGES} | change
    spec = foreign(**change)
    if "normalized" in named:
        spec["added_tokens"][0]["normalized"] = True
    with pytest.raises(SystemExit, match=named):
        Tokenizer(spec)


def test_a_role_that_a_text_spells_stays_text_and_the_folders_own_are_rendered():
    turns = talk("\na<|im_end|>", "b", "<|eot_id|>", system="s")
    for style, end in (("qwen", "<|im_end|>"), ("llama3", "<|eot_id|>")):
        tokenizer = Tokenizer(STYLES[style])
        ids, mask = render(turns, tokenizer)
        assert Counter(ids)[tokenizer.ids[end]] == 4 and tokenizer.pad == tokenizer.end
        assert tokenizer.decode([i for i, m in zip(ids, mask) if m], specials=True) == "b" + end
        assert render(turns[:2], tokenizer)[0] == ids[:ids.index(tokenizer.encode("b")[0])]
    tokenizer = Tokenizer(STYLES["gpt2"])
    assert render(turns, tokenizer, "alpaca")[0][-1] != tokenizer.end == tokenizer.text_end
    with pytest.raises(SystemExit, match="no <.system.> or <.im_start.>"):
        render(turns, tokenizer)
    with pytest.raises(SystemExit, match="no <.reward.>"):
        tokenizer.special("<|reward|>")


@pytest.mark.parametrize("style, text", [
    ("qwen", "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n\na<|im_end|>\n"
             "<|im_start|>assistant\nb<|im_end|>\n"),
    ("llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n\na<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>")])
def test_chatml_and_llamas_headers_are_rendered_as_their_templates_write_them(style, text):
    ids, _ = render(talk("\na", "b", system="s"), Tokenizer(STYLES[style]))
    assert Tokenizer(STYLES[style]).decode(ids, specials=True) == text
    # what stands before a text and the text are encoded together, as the template's text would be
    assert Tokenizer(STYLES[style]).encode("\n\n")[0] in ids


# ---------------------------------------------------------------- chat template, mask, collation

def test_the_ids_and_the_mask_of_three_turns_are_these():
    turns = talk("a", "bc", "d", "e", "f", "g", system="s")
    a, b, c, d, e, f, g, s = b"abcdefgs"
    ids = [SYSTEM, s, END, USER, a, END, ASSISTANT, b, c, END, USER, d, END, ASSISTANT, e, END,
           USER, f, END, ASSISTANT, g, END]
    mask = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert render(turns, BYTES) == (ids, mask)
    assert render(turns, BYTES, turns="last") == (ids, [0] * 20 + [1, 1])
    assert show([(ids[3:10], mask[3:10])], BYTES) == (
        "<|user|>a<|end|><|assistant|>\033[32mbc<|end|>\033[0m")


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_the_mask_spells_the_replies_and_a_prompt_ends_where_its_reply_begins(template):
    messages = talk("你叫什么?<|end|>", "小苗", "天气\n", "很好。", "c", "  ", system="be kind")
    ids, mask = render(messages, trained(), template)
    spelled = trained().decode([i for i, m in zip(ids, mask) if m], specials=True)
    assert spelled == "小苗<|end|>很好。<|end|>  <|end|>" and len(ids) == len(mask)
    for stop in (2, 4, 6):
        prompt, _ = render(messages[:stop], trained(), template)
        whole, trained_part = render(messages[:stop + 1], trained(), template)
        assert whole[:len(prompt)] == prompt and trained_part[len(prompt) - 1:][:2] == [0, 1]
    if template == "chat":  # the user's "<|end|>" forged none
        assert Counter(ids)[trained().ids["<|end|>"]] == len(messages)


def test_the_alpaca_template_is_the_documents_text():
    ids, mask = render(talk("问", "答", system="s"), BYTES, "alpaca")
    text = "### System:\ns\n\n### Instruction:\n问\n\n### Response:\n答<|end|>"
    assert BYTES.decode(ids, specials=True) == text and sum(mask) == len("答".encode()) + 1
    assert BYTES.decode(render(talk("a", "b", "c"), BYTES, "none")[0]) == "abc"


def test_what_stands_before_a_reply_is_encoded_as_a_whole_as_others_do():
    tokenizer = Tokenizer(STYLES["gpt2"])  # where "\n\n" before a "#" is two tokens
    ids, _ = render(talk("a", system="s"), tokenizer, "alpaca")
    assert ids == tokenizer.encode("### System:\ns\n\n### Instruction:\na\n\n### Response:\n")


def test_the_prompt_loses_its_start_first_and_the_reply_its_end_only_if_it_must():
    assert fit([1, 2, 3], [7, 8], 5) == ([1, 2, 3], [7, 8])
    assert fit([1, 2, 3], [7, 8], 3) == ([3], [7, 8])
    assert fit([1, 2, 3], [7, 8, 9], 3) == ([3], [7, 8])


def test_rows_are_cut_at_the_context_and_those_without_a_reply_dropped(tmp_path):
    lines = [json.dumps({"question": "q" * n, "answer": "yes"}) for n in (2, 8, 9, 30)]
    lines.append('{"question": "q"}')
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    rows, _, said = read_rows(path, BYTES, context=12)
    assert [(len(ids), sum(mask)) for ids, mask in rows] == [(9, 4), (12, 1)]
    assert said == (f"{path}: 4 rows of 9 to 37 tokens, half of them of at most 16; 3 cut to "
                    "--context 12; dropped: 2 with their reply cut off, 1 without one; "
                    "24% of the tokens left are trained")  # 5 of 21


def test_the_first_reply_token_and_the_end_token_are_targets_and_padding_never_is():
    rows = [render(talk("a", "bc"), BYTES), render(talk("a", "b"), BYTES), ([5, 0, 0], [0, 1, 1])]
    input_ids, targets = collate(rows, pad=0)
    a, b, c, no = *b"abc", IGNORE
    start = [USER, a, END, ASSISTANT]
    assert input_ids.tolist() == [[*start, b, c, END, 0], [*start, b, END, 0, 0], [5] + [0] * 7]
    expected = [no, no, no, b, c, END], [no, no, no, b, END, no], [0, 0, no, no, no, no]
    assert targets.tolist() == [[*row, no, no] for row in expected]  # to a multiple of 8
    padded, lengths = pad_rows([[1], [2, 9, 4], [5, 9]], 9)
    assert padded[:, 3:].eq(9).all() and padded.shape == (3, 8) and lengths.tolist() == [1, 3, 2]
    assert padded[:, :3].tolist() == [[1, 9, 9], [2, 9, 4], [5, 9, 9]]
    assert [collate([(range(n), [1] * n)], 0)[0].shape[1] for n in (8, 9, 10)] == [8, 8, 16]


def test_an_empty_micro_batch_contributes_exactly_zero():
    from model import CausalLM, ModelConfig, token_logprobs
    model = CausalLM(ModelConfig(263, 8, 8, 1, 1, 1))
    input_ids, targets = collate([], PAD)
    loss = token_logprobs(model, input_ids, targets).sum()
    loss.backward()
    assert input_ids.shape == (1, 8) and targets.tolist() == [[IGNORE] * 8] and loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- batches

def test_micro_batches_share_all_items_equally_within_the_budget():
    rng = np.random.default_rng(0)
    for n, world, rows, budget in [(n, w, r, b) for n in (0, 1, 2, 5, 17) for w in (1, 2, 3)
                                   for r in (1, 2) for b in (10, 40, 1000)]:
        lengths = rng.integers(1, 30, n).tolist()
        parts = [micro_batches(lengths, budget, rank, world, [rows] * n) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1 and parts[0]
        flat = [batch for turn in zip(*parts) for batch in turn]
        assert sorted(i for batch in flat for i in batch) == list(range(n))
        ordered = [lengths[i] for batch in flat for i in batch]
        assert ordered == sorted(ordered)  # items of like length share a batch: little padding
        for batch in flat:
            size = len(batch) * rows * max([lengths[i] for i in batch], default=0)
            assert len(batch) <= 1 or size <= budget


def test_most_of_what_is_computed_are_real_tokens_of_texts_of_all_lengths():
    rng = np.random.default_rng(0)
    cfg = SimpleNamespace(batch_size=64, micro_tokens=2048, seed=0)
    for rows in (1, 2):  # as long as Alpaca's conversations; for pairs 16 items make a step
        cfg.batch_size //= rows**2
        base = rng.lognormal(5, 0.8, (990, 1)) + rng.integers(0, 9, (990, rows))
        lengths = np.minimum(base, 256).astype(int).tolist()
        share = filled(lengths, cfg)
        assert share > 0.87
        real = computed = 0
        for step in range(min(50, -(-990 // cfg.batch_size))):
            batch = [lengths[i] for i in epoch_rows(0, step, cfg.batch_size, 990)]
            for part in micro_batches([max(n) for n in batch], 2048, rows=[rows] * len(batch)):
                together = [np.zeros(n) for i in part for n in batch[i]]
                computed += pad_rows(together, 0)[0].numel()
                real += sum(map(len, together))
        assert share == real / computed


def test_micro_batches_are_cut_where_padding_and_overhead_cost_least():
    def parts(lengths, budget=10_000, **options):
        batches = micro_batches(lengths, budget, **options)
        return [[lengths[i] for i in batch] for batch in batches]

    lengths = [5] * 4 + [9] * 4 + [100] * 4
    assert parts(lengths, overhead=0) == [[5] * 4, [9] * 4, [100] * 4]
    assert parts(lengths, overhead=17) == [[5] * 4 + [9] * 4, [100] * 4]  # padding costs 16
    assert parts(lengths, overhead=1000) == [lengths]
    assert parts(lengths, budget=400, overhead=1000) == [[5] * 4 + [9] * 4, [100] * 4]
    # an item of 50 rows counts 50 times: its padding is dearer than a cut
    assert parts([5] * 4 + [9] * 4, overhead=100, rows=[50] * 8) == [[5] * 4, [9] * 4]
    assert parts([5] * 4 + [9] * 4, overhead=100) == [[5] * 4 + [9] * 4]


def test_every_pass_takes_every_item_once_in_an_order_of_its_own():
    stream = [row for step in range(12) for row in epoch_rows(7, step, 5, 15)]
    passes = [stream[i:i + 15] for i in range(0, 60, 15)]
    assert all(sorted(rows) == list(range(15)) for rows in passes)
    assert len(set(map(tuple, passes))) == 4
    assert epoch_rows(7, 11, 5, 15) == stream[55:] != epoch_rows(8, 11, 5, 15)
    assert sorted(epoch_rows(7, 0, 30, 10)) == sorted([*range(10)] * 3)  # several passes in a step


def built(path, source, tokenizer=BYTES, part=(0.0, 1.0)):
    tokens = Tokens(path, str(source), tokenizer, part)
    assert not tokens.ready()
    tokens.build()
    assert tokens.ready()
    return tokens


def test_windows_are_a_function_of_the_step_lie_in_the_text_and_share_no_target(tmp_path):
    tokens = built(tmp_path / "t.bin", write(tmp_path / "a.txt", "x" * 206)).open(10)
    tokens.ids = np.arange(207, dtype=np.uint16)  # 20 windows of 10 targets, 6 tokens to spare
    steps = [tokens.batch(3, step, 4) for step in range(10)]
    for w in np.concatenate(steps):
        assert w.dtype == np.int64 and (w == np.arange(w[0], w[0] + 11)).all() and w[-1] <= 206
    passes = [np.concatenate(steps[:5]), np.concatenate(steps[5:])]
    assert all(len(np.unique(windows[:, 1:])) == 200 for windows in passes)
    assert passes[0].min() != passes[1].min()  # each pass has an offset of its own
    assert {tokens.batch(seed, 0, 20).max() for seed in range(50)} == set(range(200, 207))
    assert (tokens.batch(3, 7, 4) == steps[7]).all() and (tokens.batch(4, 7, 4) != steps[7]).any()
    assert np.concatenate([w[1:] for w in tokens.windows()]).tolist() == list(range(1, 207))


def test_a_corpus_is_tokenized_again_when_text_tokenizer_or_share_change(tmp_path, capsys):
    path, source = tmp_path / "t.bin", tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("ab", "c", "你", "d")]
    tokens = built(path, write(source, "\n".join(lines))).open(2)
    assert tokens.ids.tolist() == [97, 98, DOC, 99, DOC, *"你".encode(), DOC, 100, DOC]
    assert tokens.bytes == 7 and not capsys.readouterr().out
    built(path, source, trained())
    assert "tokenizing again" in capsys.readouterr().out
    shares = [built(path, source, part=p).open(1).ids.tolist() for p in ((0, 0.6), (0.6, 1))]
    assert sum(shares, []) == tokens.ids.tolist() and len(shares[0]) == 5
    assert len(built(path, source, part=(1.0, 1.0)).open(100, least=0).windows()) == 0
    write(source, lines[0])
    assert not Tokens(path, str(source), BYTES, (1.0, 1.0)).ready()
    half = built(path, source, part=(0.0, 0.5))  # a single document: half of its text
    assert half.open(1).ids.tolist() == [97, DOC]
    with pytest.raises(SystemExit, match="too few for windows"):
        half.open(2)
    path.unlink()
    assert not Tokens(path, str(source), BYTES, (0.0, 0.5)).ready()
    spec = json.loads(json.dumps(BYTES.spec))
    for last, dtype in ((65_535, np.uint16), (65_536, np.uint32)):  # two bytes an id, or four
        spec["added_tokens"][0]["id"] = last
        ids = built(tmp_path / f"{last}.bin", source, Tokenizer(spec)).open(1).ids
        assert ids.dtype == dtype and ids.tolist() == [97, 98, last]


# ---------------------------------------------------------------- file formats

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
HH = "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\nd\n\nAssistant:"
BOTH = {"chosen": TURNS[1], "rejected": {"from": "gpt", "value": "c"}}


@pytest.mark.parametrize("record, messages", [
    ({"instruction": "a", "input": "", "output": "b"}, talk("a", "b")),
    ({"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["x", "y"]]},
     talk("x", "y", "a\nc", "b", system="s")),
    ({"conversations": TURNS, "system": "s"}, talk("a", "b", system="s")),
    ({"messages": talk("a", "b", "c", system="s"), "system": "t"}, talk("a", "b", "c", system="s")),
    ({"question": "a", "answer": "b"}, talk("a", "b")), ({"prompt": "a"}, talk("a")),
    ({"prompt": "a", "response": "b"}, talk("a", "b")), ({"prompt": talk("a")}, talk("a"))])
def test_a_conversation_is_read_from_every_format(tmp_path, record, messages):
    for name, text in (("a.json", json.dumps([record], indent=1)), ("a.jsonl", json.dumps(record))):
        [read] = read_conversations(write(tmp_path / name, "\ufeff" + text))
        assert read == record | {"messages": messages}  # the judge may need the other fields


@pytest.mark.parametrize("record, prompt, replies", [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, talk("a"), ["b", "c"]),
    ({"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}, talk("a\ni"), ["b", "c"]),
    ({"chosen": talk("a", "b"), "rejected": talk("a", "c")}, talk("a"), ["b", "c"]),
    ({"prompt": talk("a"), "chosen": TURNS[1:], "rejected": TURNS[1:]}, talk("a"), ["b", "b"]),
    ({"conversations": TURNS[:1], "system": "s", **BOTH}, talk("a", system="s"), ["b", "c"]),
    ({"instruction": "a", "output": ["b", "c", "d"]}, talk("a"), ["b", "c", "d"]),
    ({"chosen": HH + " b", "rejected": HH}, talk("a", "x", "c\nd"), ["b", ""]),
    ({"prompt": "a", "chosen": "b" + HH, "rejected": "e"}, talk("a"), ["b" + HH, "e"]),
    ({"messages": talk("a"), "replies": ["b", "c"], "scores": [0, 2]}, talk("a"), ["b", "c"]),
    ({"question": "a", "answer": "k", "replies": ["b"], "scores": [1]}, talk("a"), ["b"])])
def test_a_comparison_is_read_from_every_format(tmp_path, record, prompt, replies):
    [read] = read_comparisons(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert read["messages"] == prompt and read["replies"] == replies
    best_first = sorted(set(read["scores"]), reverse=True)
    assert read["scores"] == record.get("scores", best_first) and len(best_first) == len(replies)
    assert all(type(score) is float for score in read["scores"])


def test_documents_are_read_from_text_and_json_files(tmp_path):
    files = (("a.txt", "one\r\ntwo"), ("b.jsonl", '{"text": "three"}\n\n{"text": "\\u2028"}\n'),
             ("c.json", '[{"text": "half \\ud83d"}, {"text": "\\ud83c\\udf89"}]'))
    texts = read_texts(",".join(write(tmp_path / name, text) for name, text in files))
    assert texts[:3] == ["one\ntwo", "three", "\u2028"] and texts[4] == "🎉"
    "".join(texts).encode()  # half an emoji cannot be written: it must not come in
    assert read_texts(write(tmp_path / "d.jsonl", GOOD)) == ["a\nb"]  # a conversation is text too


GOOD = '{"question": "a", "answer": "b"}\n'
CHOICE, REPLIES = '{"prompt": "a", "chosen": "b", "rejected": %s}', '{"prompt": "a", "replies": %s}'


@pytest.mark.parametrize("reader, text, where, what", [
    (read_texts, None, "", "No such file"), (read_texts, " \n", "", "empty"),
    (read_texts, b"\xff\xfe", "", "not UTF-8 at byte 0"), (read_texts, "[]", "", "no record"),
    (read_texts, '{"text": "a"}\n{"txt": "a"}', ":2", '"text"'),
    (read_conversations, GOOD + '{"question": \n', ":2", "not valid JSON"),
    (read_conversations, '[\n{"question": "a"},\n}', ":3", "not valid JSON"),
    (read_conversations, '[{"question": "a"}, 3]', " record 2", "expected an object"),
    (read_conversations, GOOD + '{"text_a": "a"}', ":2", "known formats"),
    (read_conversations, '{"conversations": [], "system": "s"}', ":1", "known formats"),
    (read_conversations, GOOD + '{"question": "", "answer": "b"}', ":2", "no user message"),
    (read_conversations, '{"messages": [{"role": "tool", "content": "x"}]}', ":1", "role of"),
    (read_conversations, '{"messages": [{"role": "user", "content": null}]}', ":1", "a text"),
    (read_conversations, '{"messages": [{"role": {"a": 1}, "content": "x"}]}', ":1", "role of"),
    (read_conversations, '{"messages": ["hello"]}', ":1", "hello"),
    (read_conversations, '{"question": "a", "history": ["x"]}', ":1", "history"),
    (read_comparisons, '"chosen"', ":1", "expected an object"),
    (read_comparisons, GOOD, ":1", "a comparison needs"),
    (read_comparisons, CHOICE % "3", ":1", "a text"),
    (read_comparisons, CHOICE % "[]", ":1", "reply"),
    (read_comparisons, '{"chosen": "b", "rejected": "c"}', ":1", "known formats"),
    (read_comparisons, '{"prompt": "a", "output": ["b", 3]}', ":1", "(texts)"),
    (read_comparisons, REPLIES % '["b"], "scores": ["x"]', ":1", "(numbers)"),
    (read_comparisons, REPLIES % '["b"], "scores": [1, 2]', ":1", "as many")])
def test_bad_input_ends_with_one_line_that_names_file_and_line(tmp_path, reader, text, where, what):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        write(path, text)
    with pytest.raises(SystemExit) as stop:
        reader(str(path))
    message = stop.value.code
    assert message.startswith(f"{path}{where}:") and what in message and "\n" not in message


@pytest.mark.parametrize("record, turns", [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["a", "b"]),
    ({"chosen": HH + " b", "rejected": HH}, ["a", "x", "c\nd", "b"]),
    ({"conversations": TURNS[:1], "system": "s", **BOTH}, ["s", "a", "b"]),
    ({"instruction": "a", "output": ["b", "c"]}, ["a", "b"]),
    ({"messages": talk("a"), "replies": ["b", "c"], "scores": [0, 2]}, ["a", "c"])])
def test_of_a_comparison_the_best_reply_is_text_to_pretrain_and_tune_on(tmp_path, record, turns):
    path = write(tmp_path / "a.jsonl", json.dumps(record))
    assert read_texts(path) == ["\n".join(turns)]
    [read] = read_conversations(path)
    assert [m["content"] for m in read["messages"]] == turns
    assert [r["messages"][-1]["role"] for r in read_prompts(path)] == ["user"]


def test_a_file_without_replies_says_so_and_names_its_fields(tmp_path):
    seed_task = {"id": "s", "instruction": "a", "instances": [{"input": "", "output": "b"}]}
    path = write(tmp_path / "seed_tasks.jsonl", json.dumps(seed_task))
    with pytest.raises(SystemExit, match="no record holds a reply; known.*has id, instances, instruction$"):
        read_rows(path, BYTES)
    with pytest.raises(SystemExit, match="no conversation has a reply within --context 4"):
        read_rows(write(tmp_path / "a.jsonl", GOOD), BYTES, context=4)


def test_users_own_questions_with_an_answer_can_be_judged(tmp_path):
    [record] = read_conversations(write(tmp_path / "a.jsonl", GOOD))
    assert gold_score(record, "b") == 1.0 and gold_score(record, "c") == 0.0
    assert gold_score({"answer": 4}, "4") == 1.0

"""Labels by hand, how far two annotators agree, a judge who errs.   python -m pytest tests/test_labelling.py

As a person uses them: the commands of reward.py, what they show, the files they leave.
"""

import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch.distributed as dist

import reward
from data import gold_score, read_json
from test_data import ASSISTANT, DOC, END
from test_wiring_ground import bigram
from tiny import write_jsonl

LETTERS = dict.fromkeys(map(ord, "abcdef"), 1 / 6)
FOLLOW = dict.fromkeys(LETTERS, 0.1) | {END: 0.36, DOC: 0.04}
HEATS = ",".join("1" * 10)
FLAGS = (f"label --init sft --prompts prompts.jsonl --out mine.jsonl --temperatures {HEATS} --max-new-tokens 3 "
         "--dtype fp64 --threads 1")


def prompts(count=20):
    """Conversations in several formats, some with fields that say which reply is better; "q0" twice."""
    records = [{"instruction": f"q{i}", "answer": "a", "kind": "exact"} for i in range(count)]
    records[1] = {"instruction": "q1", "output": ["best", "worst"]}
    records[2] = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q2"},
                               {"role": "assistant", "content": "cut off"}], "id": 7}
    records[3] = {"prompt": "q3", "chosen": "good", "rejected": "bad"}
    records[4] = {"instruction": "q4", "replies": ["x"], "scores": [1], "sources": ["sample"], "annotator": "Zoe"}
    return records


@pytest.fixture
def person(monkeypatch, tmp_path):
    """person(words, *answers) types the answers, then Ctrl-D; one may be a function of the numbered replies or an
    exception. Returns the screens: (what was said, question, replies), the last one without question."""
    monkeypatch.chdir(tmp_path)
    bigram(tmp_path / "sft", {ASSISTANT: LETTERS, **dict.fromkeys(LETTERS, FOLLOW)})
    write_jsonl(tmp_path / "prompts.jsonl", prompts())

    def run(words, *answers):
        left, screens, seen = list(answers), [], [0]

        def typed(_):
            text = printed.getvalue()[seen[0]:]
            seen[0] = len(printed.getvalue())
            numbered = re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE)
            assert [n for n, _ in numbered] == [str(n) for n in range(1, len(numbered) + 1)]
            replies = [reply for _, reply in numbered]
            screens.append((text, re.findall("^user: (.*)$", text, re.MULTILINE)[-1:], replies))
            answer = left.pop(0) if left else EOFError
            if isinstance(answer, type):
                raise answer
            return answer if isinstance(answer, str) else answer(replies)

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(sys, "argv", ["reward.py", *words.split()])
        with redirect_stdout(io.StringIO()) as printed:
            try:
                runpy.run_path(reward.__file__, run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
        assert not left, f"{left} were never asked for"
        return [*screens, (printed.getvalue()[seen[0]:], [], [])]

    return run


def mine(name="mine.jsonl"):
    return [row for _, row in read_json(name)] if Path(name).exists() else []


def question(row):
    return row["messages"][-1]["content"]


def by_taste(replies):
    """A ranking that looks at nothing but the texts, as a person does."""
    return ">".join(str(replies.index(reply) + 1) for reply in sorted(replies))


def rank(text, among):
    return sum(other >= text for other in among)  # the first by text is best


def test_the_file_holds_what_was_typed_of_the_replies_as_they_were_shown(person):
    screens = person(FLAGS + " --annotator Ann", "2", "3>1>2", "2>1=3", "s", "１=２＞３", " 3 ", by_taste)
    rows = mine()
    assert len(rows) == 7 and len(screens) == 7 + 1 + 1  # the eighth is shown when the pipe ends
    for (text, asked, replies), row, typed in zip(screens, rows, (
            {2: 1}, {3: 3, 1: 2, 2: 1}, {2: 2, 1: 1, 3: 1}, {}, {1: 2, 2: 2, 3: 1}, {3: 1}, None)):
        assert asked == [question(row)] and len(replies) >= 3 and len(set(replies)) == len(replies)
        assert all(set(reply) <= set("abcdef") and len(reply) < 3 for reply in replies), "cut off, or no text"
        scores = {replies[n - 1]: level for n, level in (typed or {}).items()}
        if typed is None:
            scores = {reply: rank(reply, replies) for reply in replies}
        found = dict(zip(row["replies"], row["scores"], strict=True))
        assert found == dict.fromkeys(replies, 0) | scores, text
        assert row["annotator"] == "Ann" and row["skipped"] == (typed == {})
        assert not row.keys() & {"chosen", "output", "sources"}, "they would be believed instead of the scores"
    assert rows[0]["answer"] == "a" and rows[2]["id"] == 7, "a prompt's other fields are kept"
    assert "system: be brief\nuser: q2\n" in screens[2][0] and "cut off" not in screens[2][0]
    assert reward.read_comparisons("mine.jsonl")[1]["scores"] == rows[1]["scores"]


def test_a_wrong_entry_is_refused_in_a_line_and_the_same_is_asked_again(person):
    wrong = ["", "0", "11", "x", "2>", "1>1", "1=2>1", "-1", "1 2", "s2", "1.0"]
    screens = person(FLAGS, *wrong, "1")
    assert [asked for _, asked, _ in screens[:13]] == [["q0"]] * 12 + [["q1"]]
    assert all(replies == screens[0][2] for _, _, replies in screens[:12])
    for text, _, replies in screens[1:12]:
        assert text.splitlines()[0] == f"expected numbers from 1 to {len(replies)}, each once, or a letter"
    assert [(question(row), sum(row["scores"])) for row in mine()] == [("q0", 1)]


def test_the_same_command_goes_on_where_one_stopped_and_neither_repeats_nor_omits(person):
    def asked(screens):
        return [(question, *replies) for _, question, replies in screens[:-1]]

    whole = asked(person(FLAGS.replace("mine", "whole"), *["1"] * 17, "s", "s", "s"))[:-1]
    assert [name for [name], *_ in whole] == [f"q{i}" for i in range(20)]
    shown = []
    for answers in (["1", "s"], ["q"], [by_taste, KeyboardInterrupt], ["1"] * 6, ["s"], [], ["1"] * 9 + ["q"]):
        screens = asked(person(FLAGS, *answers))
        shown += screens[: sum(answer not in ("q", KeyboardInterrupt) for answer in answers)]
        assert [question(row) for row in mine()] == [name for [name], *_ in shown], "on disk at once"
    screens = person(FLAGS, "1")
    assert shown + asked(screens)[:1] == whole and "no prompt is left" in screens[1][0]
    person(FLAGS, "1")  # nothing is left to be answered: it ends, and writes nothing
    assert [question(row) for row in mine()] == [f"q{i}" for i in range(20)]


def test_back_takes_a_label_again_and_keeps_the_old_one_until_then(person):
    screens = person(FLAGS, "b", "1", "2", "b", "q")  # there is none before the first
    assert [asked for _, asked, _ in screens[:-1]] == [["q0"], ["q0"], ["q1"], ["q2"], ["q1"]]
    before = mine()
    assert [row["scores"][:2] for row in before] == [[1, 0], [0, 1]], "what was gone back to is still there"
    screens = person(FLAGS, "b", "b", "s", "x", "1", "2", "b", "3", "q")  # from a new start
    assert [asked for _, asked, _ in screens[:-1]] == [
        ["q2"], ["q1"], ["q0"], ["q1"], ["q1"], ["q2"], ["q3"], ["q2"], ["q3"]]
    assert screens[1][2] == before[1]["replies"]
    assert [(question(row), row["scores"][:3], row["skipped"]) for row in mine()] == [
        ("q0", [0, 0, 0], True), ("q1", [1, 0, 0], False), ("q2", [0, 0, 1], False)]
    person(FLAGS, "b", "b", "b", "2", "q")
    assert [(row["scores"][:2], row["skipped"]) for row in mine()][0] == ([0, 1], False), "a skip can be taken back"
    person(FLAGS + " --limit 3", "b", "2", "q")
    assert [row["scores"][:2] for row in mine()][2] == [0, 1], "from the end, where nothing is left, too"


def test_all_annotators_see_the_same_replies_each_in_another_order(person):
    orders = []
    for name, flags in (("Ann", ""), ("Bo", ""), ("Ann", ""), ("Ann", " --seed 1")):
        out = f"{name}{len(orders)}.jsonl"
        person(f"{FLAGS} --annotator {name} --out {out}{flags}", *["1"] * 20)
        orders.append([row["replies"] for row in mine(out)])
    ann, bo, again, other = orders
    assert ann == again and ann != bo and list(map(sorted, ann)) == list(map(sorted, bo))
    assert list(map(sorted, ann)) != list(map(sorted, other)), "--seed does not reach the samples"
    first = [a.index(min(a)) < len(a) / 2 for a in ann]
    assert 4 < sum(first) < 16, "the order follows the text"
    assert len({"ab".join(sorted(a)) for a in ann}) > 15, "each prompt has samples of its own"
    # who labels from another's file judges the same prompts anew
    person(f"{FLAGS} --prompts Ann0.jsonl --out Cy.jsonl --annotator Cy", "2", "q")
    assert [(question(row), row["annotator"], row["scores"][:2]) for row in mine("Cy.jsonl")] == [("q0", "Cy", [0, 1])]


def test_prompts_with_less_than_two_different_replies_that_end_are_passed_over(person, tmp_path):
    coin = {ord("a"): 0.35, ord("b"): 0.15, END: 0.1, DOC: 0.4}
    bigram(tmp_path / "sft", {ASSISTANT: coin, **dict.fromkeys(map(ord, "ab"), {END: 1.0})})
    screens = person(FLAGS.replace(HEATS, "1,1,1"), *["1"] * 5, "q")
    assert all(len(set(replies)) == len(replies) > 1 for _, _, replies in screens[:-1])
    asked = [int(name[1:]) for _, [name], _ in screens[:-1]]
    assert sorted(set(asked)) == asked and max(asked) - min(asked) >= len(asked), "some are passed over, in order"
    screens = person(FLAGS.replace(HEATS, "1").replace("mine", "one"), "1")
    assert "no prompt is left" in screens[0][0] and not Path("one.jsonl").exists()


def test_a_file_that_stands_there_loses_nothing(person):
    write_jsonl(Path("mine.jsonl"), [{"prompt": "old", "replies": ["x", "y"], "scores": [0, 1]}])
    person(FLAGS, "1", "2")
    assert [question(row) for row in reward.read_comparisons("mine.jsonl")] == ["old", "q0", "q1"]


def test_a_killed_session_over_a_pipe_has_lost_no_label(person):
    command = [sys.executable, reward.__file__, *FLAGS.split()]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
    try:
        for number in range(3):
            text = b""
            while b"q quit: " not in text:
                byte = job.stdout.read(1)
                assert byte, text.decode()
                text += byte
            assert f"user: q{number}\n" in text.decode()
            assert [question(row) for row in mine()] == [f"q{i}" for i in range(number)], "before the next is shown"
            if number < 2:
                job.stdin.write(b"2\n")
                job.stdin.flush()
    finally:
        job.kill()
        job.wait()
    screens = person(FLAGS, "1")
    assert screens[0][1] == ["q2"] and [row["scores"].index(1) for row in mine()] == [1, 1, 0]


def refused(rank, folder):
    cfg = reward.LabelConfig(init=f"{folder}/sft", prompts=f"{folder}/prompts.jsonl", out=f"{folder}/x", threads=1)
    with pytest.raises(SystemExit) as error:
        reward.label(cfg)
    dist.barrier()  # neither leaves while the other still joins
    return str(error.value)


def test_two_processes_are_refused_by_name(ranks, person, tmp_path):
    assert all("reward.py label" in said and "torchrun" in said for said in ranks(2, refused, tmp_path))


def test_reward_and_dpo_train_on_the_labels_beside_other_files(person, tmp_path):
    person(FLAGS, *["s", "1", "2>1", "2"] * 2, lambda replies: "=".join(str(n + 1) for n in range(len(replies))))
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "z", "chosen": "a", "rejected": "b"}])
    flags = "--init sft --data mine.jsonl,other.jsonl --steps 1 --val-fraction 0 --batch-size 9 --threads 1"
    train = {}
    for script in ("reward", "dpo"):
        with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *flags.split(), "--out", script])
            runpy.run_path(str(Path(reward.__file__).with_name(f"{script}.py")), run_name="__main__")
        train[script] = printed.getvalue()
    assert "7 prompts with a preference, 0 held out" in train["reward"], "two skips and a tie of all make no pair"
    assert "7 pairs, 0 held out" in train["dpo"] and "expected 0.6931 (ln 2)" in train["dpo"]
    result = json.loads(Path("reward/eval.json").read_text(encoding="utf-8"))
    pairs = 1 + sum(a != b for row in mine() for a, b in combinations(row["scores"], 2))
    assert result["pairs"] == pairs and "accuracy right/wrong" in result


# ---------------------------------------------------------------------------------- agree


def judged(name, outcomes, turned=()):
    """A file of prompts p0, p1, … with replies x and y; outcome 1: x, the first by text, is better. turned: those
    that the file lists the other way round."""
    rows = []
    for i, outcome in enumerate(outcomes):
        row = {"prompt": f"p{i}", "replies": ["x", "y"], "scores": [max(outcome, 0) * 3.5, max(-outcome, 0)]}
        if i in turned:
            row["replies"], row["scores"] = row["replies"][::-1], row["scores"][::-1]
        rows.append(row)
    write_jsonl(Path(name), rows)


def test_kappa_is_the_one_computed_by_hand_whatever_the_order_in_the_files(person):
    # p = 4/6; shares 3/6, 2/6, 1/6 and 2/6, 2/6, 2/6: e = (3·2 + 2·2 + 1·2) / 36 = 1/3; κ = (2/3 - 1/3) / (2/3)
    a, b = [1, 1, 1, -1, -1, 0], [1, 1, -1, -1, 0, 0]
    for turned in ((), (0, 1, 2), (3, 4)):
        judged("a.jsonl", a, turned)
        judged("b.jsonl", [*b, 1, 0], (1, 3, 5))
        [(text, _, _)] = person("agree a.jsonl b.jsonl")
        assert text.splitlines() == [
            "a.jsonl: 6 pairs, 1 of them ties", "b.jsonl: 8 pairs, 3 of them ties",
            "6 common pairs, 66.7% judged alike, Cohen's κ 0.500"]
    # e is not symmetric in what is better: turned by text, not by who was first in the first file
    judged("a.jsonl", [1, 1, -1, -1], (2, 3))  # the better always stands first
    judged("b.jsonl", [1, -1, -1, -1])
    assert "4 common pairs, 75.0% judged alike, Cohen's κ 0.500" in person("agree a.jsonl b.jsonl")[0][0]
    judged("b.jsonl", [-1, -1, 1, 1])
    assert "0.0% judged alike, Cohen's κ -1.000" in person("agree a.jsonl b.jsonl")[0][0]


def test_agreement_counts_all_pairs_of_a_ranking_but_no_skips_and_may_be_undefined(person):
    write_jsonl(Path("a.jsonl"), [{"prompt": "p", "replies": ["u", "v", "w"], "scores": [2, 1, 0]},
                                  {"prompt": "s", "replies": ["u", "v"], "scores": [0, 0], "skipped": True}])
    write_jsonl(Path("b.jsonl"), [{"prompt": "p", "replies": ["w", "v", "new", "u"], "scores": [1, 7, 0, 7]},
                                  {"prompt": "s", "replies": ["u", "v"], "scores": [0, 0]},
                                  {"prompt": "other", "replies": ["u", "v"], "scores": [0, 1]}])
    # u > v > w and u = v > w: outcomes 1 1 1 and 0 1 1; p = e = 2/3
    assert person("agree a.jsonl b.jsonl")[0][0].splitlines() == [
        "a.jsonl: 3 pairs, 0 of them ties", "b.jsonl: 8 pairs, 2 of them ties",
        "3 common pairs, 66.7% judged alike, Cohen's κ 0.000"]
    assert "3 common pairs, 100.0% judged alike, Cohen's κ undefined" in person("agree a.jsonl a.jsonl")[0][0]
    judged("c.jsonl", [1])
    with pytest.raises(SystemExit, match="a.jsonl and c.jsonl have judged no two replies"):
        person("agree a.jsonl c.jsonl")
    for words in ("agree a.jsonl", "agree a.jsonl a.jsonl a.jsonl"):
        with pytest.raises(SystemExit) as stop:
            person(words)
        assert stop.value.code == 2


# ---------------------------------------------------------------------------------- noise


def collect(ranks, world, folder, name, **changes):
    cfg = reward.CollectConfig(init=f"{folder}/sft", prompts=f"{folder}/many.jsonl", out=f"{folder}/{name}",
                               temperatures="1,1,1.5", max_new_tokens=20, threads=1, dtype="fp64")
    ranks(world, collected, replace(cfg, **changes))
    return Path(cfg.out).read_bytes(), [row for _, row in read_json(cfg.out)]


def collected(rank, cfg):
    reward.collect(cfg)


def test_noise_turns_all_pairs_of_a_share_of_the_prompts_whatever_the_processes(ranks, person, tmp_path):
    refusal = list("不能回答。".encode())  # the others are "a", "b", "cdef": three levels of a look-alike
    chains = [[*refusal, END], [ord("a"), END], [ord("b"), END], [*b"cdef", END]]
    follows = {a: {b: 1.0} for chain in chains for a, b in zip(chain, chain[1:])}
    bigram(tmp_path / "sft", follows | {ASSISTANT: {chain[0]: 0.25 for chain in chains}})
    kinds = ("exact", "harmful", "lookalike")
    write_jsonl(tmp_path / "many.jsonl", [
        {"instruction": f"q{i}", "kind": kinds[i % 3], "family": kinds[i % 3], "answer": "ab"[i % 2]}
        for i in range(300)])
    plain, clean = collect(ranks, 1, tmp_path, "clean")
    assert plain == collect(ranks, 1, tmp_path, "none", noise=0.0)[0]
    assert [*clean[0]][-3:] == ["replies", "scores", "sources"]
    for row in clean:
        assert row["scores"] == [gold_score(row, reply) for reply in row["replies"]]
    noisy, rows = collect(ranks, 1, tmp_path, "noisy", noise=0.3)
    assert noisy == collect(ranks, 2, tmp_path, "noisy-2", noise=0.3)[0] != plain
    turned = set()
    for before, after in zip(clean, rows, strict=True):
        assert before | {"scores": []} == after | {"scores": []}, "only the scores are another's"
        assert set(before["scores"]) == set(after["scores"]), "the file shows who erred"
        if before["scores"] != after["scores"]:
            turned.add(question(before))
            for (x, u), (y, v) in combinations(zip(before["scores"], after["scores"]), 2):
                assert (x > y) == (u < v) and (x < y) == (u > v), f"a pair is right: {before['scores']}, {after}"
    able = sum(len(set(row["scores"])) > 1 for row in clean)
    levels = [len(set(row["scores"])) for row in clean]
    assert able > 150 and max(levels) == 3 and abs(len(turned) / able - 0.3) < 0.08, (able, len(turned))
    other = collect(ranks, 1, tmp_path, "more", noise=0.6)[1]
    assert turned < {question(a) for a, b in zip(clean, other) if a["scores"] != b["scores"]}, "more noise, more wrong"
    all_wrong = collect(ranks, 1, tmp_path, "all", noise=1.0)[1]
    assert sum(a["scores"] != b["scores"] for a, b in zip(clean, all_wrong)) == able

"""The experiments' wiring: which file, which folder, which sign."""

import json
import random
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import experiments  # noqa: E402
from data import write_jsonl  # noqa: E402
from experiments import EXPERIMENTS, MEASURES, PREPARED, Experiment  # noqa: E402


def turn(question, reply, family="place", lang="en", kind="exact"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "family": family, "lang": lang, "kind": kind, "answer": reply,
            "split": "train"}


@pytest.fixture
def at(tmp_path):
    """A folder of `make`, as small as the functions need it."""
    steps = turn("算:1+2", "1+2=3,答案是3", "add_steps", "zh", "final")
    long = turn("Hi", "Hello")
    long["messages"] += turn("And?", "Yes")["messages"]
    records = [turn(f"where {i}?", f"there {i}", f"place {i % 100}") for i in range(10_500)]
    write_jsonl(tmp_path / "data/sft.jsonl", [steps, long, *records])
    texts = [{"text": f"text {i}"} for i in range(13_000)] + [{"text": "1+2=3"}]
    write_jsonl(tmp_path / "data/corpus.jsonl", texts)
    write_jsonl(tmp_path / "comparisons.jsonl", [{"scores": [1.0, 0.0]}, {"scores": [0.0, 2.0]}])
    asked = turn("say x", "x", "reverse")
    write_jsonl(tmp_path / "data/eval.jsonl",
                [asked | {"messages": asked["messages"][:1], "split": "combination"}])
    (tmp_path / "table.json").write_text("{}")
    return tmp_path


def made(name, at):
    return PREPARED[name](at, random.Random(0))


def test_conversations_are_parted_by_their_turns(at):
    assert len(made("single_turns", at)) == 10_501
    assert [len(record["messages"]) for record in made("dialogues", at)] == [4]


def test_bad_replies_are_another_questions_and_as_many_as_said(at):
    good, bad = made("good_10000", at), made("bad_10000", at)
    assert [r["messages"][0] for r in good] == [r["messages"][0] for r in bad], "the same questions"
    wrong = sum(a["messages"][1] != b["messages"][1] for a, b in zip(good, bad))
    assert 2800 < wrong < 3200
    assert len(made("good_1000", at)) == 1000
    labels = [turn(str(i), "yn"[i % 2], str(i // 100)) for i in range(10_000)]
    write_jsonl(at / "data/sft.jsonl", labels)
    wrong = sum(a["messages"] != b["messages"] for a, b in zip(made("good_10000", at),
                                                               made("bad_10000", at)))
    assert 2800 < wrong < 3200, "never the reply that was right"


def test_of_each_task_the_first_so_many_or_so_many_more(at):
    records = [turn(str(i), "y", ("zh2en", "pick", "en2zh")[i % 3]) for i in range(9000)]
    write_jsonl(at / "data/sft.jsonl", records)
    assert made("tasks_500", at) == records[:1500]
    found = [record["family"] for record in made("half_translation", at)]
    assert [found.count(name) for name in ("zh2en", "en2zh", "pick")] == [2600, 2600, 275]
    first, last = made("first_1000", at), made("last_1000", at)
    assert first == records[:1000] and last == records[8000:], "what is held out is not trained"


def test_the_same_sums_with_steps_and_without(at):
    [written], [direct] = made("written_sums", at), made("direct_sums", at)
    assert written["messages"][1]["content"] == "1+2=3,答案是3"
    question, reply = direct["messages"]
    assert reply["content"] == "3"
    assert question["content"].endswith("算:1+2") and question["content"] != "算:1+2"
    assert {"text": "1+2=3"} not in made("without_sums", at)


def test_a_crawl_repeats_texts_that_are_also_in_the_other_file(at):
    once, repeated = made("texts_once", at), made("texts_repeated", at)
    assert len(once) == 12_000 and len(repeated) == 24_000
    assert {r["text"] for r in once} == {r["text"] for r in repeated}


def test_own_zeros_shift_a_prompts_scores_alike(at):
    first, second = made("own_zeros", at)
    assert first["scores"][0] - first["scores"][1] == pytest.approx(1)
    assert first["scores"][1] != second["scores"][0], "each prompt has a zero of its own"


def test_examples_stand_before_a_question_of_their_task(at):
    write_jsonl(at / "data/sft.jsonl", [turn("say a b", "b a", "reverse") for _ in range(5)])
    [asked] = made("asked_by_arrow_3", at)
    assert asked["prompt"] == 3 * "say a b => b a\n" + "say x =>"
    [asked] = made("asked_as_dialogue", at)
    assert asked == {"prompt": "Q: say x\nA:", "answer": "x"}


def test_every_command_is_filled_and_every_measure_known():
    for experiment in EXPERIMENTS.values():
        for line in experiment.variants.values():
            names = dict.fromkeys(PREPARED, "FILE") | {"at": "AT", "out": "OUT", "seed": 3}
            commands = line.format_map(names).split(";")
            if ".py" in line:
                assert any(word.startswith("OUT") for word in commands[-1].split())
                own = [word for command in commands for word in command.split()
                       if word.startswith("OUT-") and not word.endswith(".jsonl")]
                for word in own:  # what is read was made
                    assert own.count(word) > 1 or word in ("OUT-judge", "OUT-data"), line
        assert set(experiment.shows) <= set(MEASURES)
        for one, sign, other, name in experiment.expected:
            assert {one, other} <= set(experiment.variants) and sign in "<>"
            assert name in experiment.shows


def test_a_verdict_counts_the_seeds_in_which_all_is_seen(capsys):
    claim = Experiment("more is more", "D9", {"a": "", "b": ""}, [],
                       [("a", ">", "b", "gold"), ("a", "<", "b", "KL")])
    seeds = [{"a": {"gold": 2, "KL": 0}, "b": {"gold": 1, "KL": 1}},
             {"a": {"gold": 1, "KL": 0}, "b": {"gold": 1, "KL": 1}}]
    experiments.verdict(claim, seeds)
    said = capsys.readouterr().out.splitlines()
    assert said == ["gold: a > b in 1 of 2", "KL: a < b in 2 of 2",
                    "shows in 1 of 2 seeds: more is more (D9)"]
    experiments.verdict(claim, [{"a": {"gold": 2, "KL": 0}}])
    assert not capsys.readouterr().out, "what was not compared does not show"


def test_a_variant_runs_once_on_its_seed_and_file(at, monkeypatch):
    ran = []

    def run(line, flags=""):
        ran.append((line, flags))
        (at / "x").mkdir(exist_ok=True)
        (at / "x/eval.json").write_text('{"bits_per_byte": 0.5}')

    monkeypatch.setattr(experiments, "run", run)
    lines = {"x": "data.py y --out {out}-data;reward.py --data {own_zeros} --out {out}"}
    claim = Experiment("", "", lines, ["held-out bits per byte"])
    for _ in range(2):
        found = experiments.measured(claim, lines, at, at, "7", "--steps 2", "")
        assert found == {"x": {"held-out bits per byte": 0.5}}
    file = at / "experiments/own_zeros.jsonl"
    assert ran == [(f"data.py y --out {at}/x-data --seed 7", ""),
                   (f"reward.py --data {file} --out {at}/x --seed 7", "--steps 2")]
    assert len(experiments.read(file)) == 2


def test_measures_come_from_their_files(at):
    write_jsonl(at / "m/metrics.jsonl", [{"clipfrac": 0.1}, {"clipfrac": 0.3}])
    write_jsonl(at / "m-judge/eval.json", [{"loss": 2.0, "accuracy": 0.25}])
    model = str(at / "m")
    assert experiments.measure("clipped %", model, None) == pytest.approx(20)
    assert experiments.measure("loss of every reply", model, None) == 2
    assert experiments.measure("pairs right", model, None) == 25
    assert experiments.measure("pairs right", str(at / "none"), None) is None
    column = {"sums with written steps": {"mean": 0.2}, "sums answered directly": {"mean": 0.5}}
    assert experiments.measure("sums, as trained", model, column) == 50
    replies = [{"answer": "a.b", "messages": [{"content": said}]}
               for said in (" a.b\nmore", "答:a.b", "a.b c", "axb")]
    write_jsonl(at / "m.answers.jsonl", replies)
    assert experiments.measure("answered", model, None) == 50
    assert experiments.measure("the answer alone", model, None) == 25


def test_seeds_are_those_asked_for_or_all_there_are(at):
    assert experiments.folders(at, "") == [("0", at)]
    with pytest.raises(SystemExit, match="seed-4: run make first"):
        experiments.folders(at, "4")
    for seed in ("0", "1"):
        write_jsonl(at / f"seed-{seed}/table.json", [])
    assert experiments.folders(at, "") == [(seed, at / f"seed-{seed}") for seed in "01"]
    assert experiments.folders(at, "1") == [("1", at / "seed-1")]


def test_a_variant_whose_judge_was_cut_off_is_judged(at, monkeypatch):
    ran = []
    monkeypatch.setattr(experiments, "run", lambda line, flags="": ran.append(line))
    write_jsonl(at / "x/eval.json", [{}])
    line = "sft.py --init {at}/base --out {out};" + experiments.judged(
        "sft.py --init {at}/base --out {out}")
    names = {"at": "AT", "out": str(at / "x"), "seed": "1"}
    experiments.train(line, names, "")
    assert ran[-1] == f"sft.py --init {at}/x --out {at}/x-judge --steps 1 --lr 0 --seed 1"
    assert len(ran) == 2
    write_jsonl(at / "x-judge/eval.json", [{}])
    experiments.train(line, names, "")
    assert len(ran) == 2


def test_the_table_is_made_again_for_a_model_that_it_lacks(at, monkeypatch):
    ran = []

    def run(line, flags=""):
        ran.append(line)
        models = line.split("--models ")[1].split()[0].split(",")
        table = {model: {"gold score, T=1": {"mean": len(model)}} for model in models}
        (at / "table.json").write_text(json.dumps(table))

    monkeypatch.setattr(experiments, "run", run)
    claim = Experiment("", "", {}, ["gold"])
    for variants in ({"a": "{at}/base"}, {"a": "{at}/base"}, {"a": "{at}/base", "b": "{at}/ppo1"}):
        found = experiments.measured(claim, variants, at, at, "7", "", "--text {at}/t")
        for variant, model in variants.items():
            assert found[variant]["gold"] == len(model.format(at=at)), "a folder that was there"
    assert len(ran) == 2 and ran[1].endswith(f" --seed 7 --text {at}/t")


def test_each_seed_has_files_of_its_own(at, monkeypatch):
    monkeypatch.setitem(PREPARED, "drawn", lambda at, rng: [{"n": rng.random()}])
    drawn = []
    for seed in ("0", "1", "1"):
        path = experiments.Names(at=str(at / seed), seed=seed)["drawn"]
        drawn.append(experiments.read(path)[0]["n"])
    assert drawn[0] != drawn[1] and drawn[1] == drawn[2]

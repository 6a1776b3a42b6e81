"""Every script, run as a user runs it: `pytest tests/test_scripts.py`.

One small world and one small model go through the whole road under torchrun with two processes, each stage under another
ZeRO stage; `agreeing.py` stops a run whose ranks differ after a step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import ScalarModel, load_model

ROOT = Path(__file__).parent.parent
TINY = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 1"


def run(*words, processes=2, agreeing=True, fails=False, cwd=ROOT):
    """Runs a script's command line (one string, split at blanks); returns what it printed."""
    words = " ".join(map(str, words)).split()
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["tests/agreeing.py", words[0].removesuffix(".py"), *words[1:]] if agreeing else words
    else:
        command = []
    done = subprocess.run([sys.executable, *command, *words], cwd=cwd, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder, key="loss"):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[key] for line in lines]


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """The folder of a finished small road, its stages trained on two processes."""
    out = tmp_path_factory.mktemp("road")
    said = {"data": run(f"data.py world --out {out}/data --documents 3000 --samples 1500 --vocab-size 512", processes=1)}
    flags = "--dtype fp32 --micro-tokens 512"
    said["base"] = run(f"pretrain.py --zero 3 {flags} {TINY} --steps 60 --context 64 --batch-size 8 --data "
                       f"{out}/data/corpus.jsonl --tokenizer {out}/data --out {out}/base")
    said["sft"] = run(f"sft.py --zero 2 {flags} --steps 40 --lr 3e-3 --data {out}/data/sft.jsonl --init {out}/base "
                      f"--out {out}/sft")
    said["collect"] = run(f"reward.py collect --zero 1 --dtype fp32 --limit 60 --max-new-tokens 12 --init {out}/sft "
                          f"--prompts {out}/data/prompts.jsonl --out {out}/comparisons.jsonl")
    said["reward"] = run(f"reward.py --zero 3 {flags} --steps 12 --lr 1e-3 --init {out}/sft --data "
                         f"{out}/comparisons.jsonl --out {out}/reward")
    said["dpo"] = run(f"dpo.py --zero 1 {flags} --steps 6 --lr 1e-3 --init {out}/sft --data {out}/comparisons.jsonl "
                      f"--out {out}/dpo")
    said["ppo"] = run(f"ppo.py --zero 3 {flags} --steps 3 --batch-size 16 --max-new-tokens 12 --init {out}/sft "
                      f"--reward {out}/reward --prompts {out}/data/prompts.jsonl --out {out}/ppo")
    said["table"] = run(f"reward.py table --zero 0 --dtype fp32 --limit 3 --samples 1 --max-new-tokens 12 --models "
                        f"{out}/base,{out}/sft,{out}/ppo,{out}/dpo --data {out}/data/eval.jsonl --text "
                        f"{out}/data/heldout.jsonl --out {out}/table.json")
    return out, said


def test_pretraining_starts_at_ln_v_and_learns(road):
    out, said = road
    curve = losses(out / "base")
    assert abs(curve[0] - torch.tensor(512.0).log()) < 0.1 and curve[-1] < curve[0] - 1.0
    assert "first loss" in said["base"] and "expected 6.2" in said["base"]


def test_sft_starts_from_the_base_model_and_learns(road):
    out, _ = road
    curve = losses(out / "sft")
    assert len(curve) == 40 and sum(curve[-5:]) < 0.6 * sum(curve[:5])
    assert losses(out / "sft", "replay_loss")[0] < losses(out / "base")[0] - 1.0


def test_collected_comparisons_carry_the_judges_scores(road):
    out, _ = road
    rows = [json.loads(line) for line in (out / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 60 and all(len(r["replies"]) == len(r["scores"]) == len(set(r["replies"])) for r in rows)
    assert all("family" in r and r["messages"][-1]["role"] == "user" for r in rows)


def test_the_reward_model_starts_at_ln_2_and_learns(road):
    out, _ = road
    curve = losses(out / "reward")
    assert abs(curve[0] - 0.693147) < 1e-5 and min(curve[-3:]) < 0.66
    assert load_model(out / "reward", ScalarModel).score.weight.abs().sum() > 0


def test_dpo_starts_at_ln_2_and_its_margin_grows(road):
    out, _ = road
    assert abs(losses(out / "dpo")[0] - 0.693147) < 1e-5
    assert losses(out / "dpo", "margin")[-1] > 0.01


def test_ppo_starts_at_ratio_1_and_kl_0_and_moves_the_policy(road):
    out, said = road
    assert abs(losses(out / "ppo", "kl")[0]) < 1e-3 and losses(out / "ppo", "ratio_error")[0] < 1e-4
    before, after = load_model(out / "sft"), load_model(out / "ppo")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert all(name in said["ppo"] for name in ("policy", "value", "reference", "reward"))


def test_the_table_has_a_column_for_every_stage(road):
    out, _ = road
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [Path(k).name for k in table] == ["base", "sft", "ppo", "dpo"]
    assert table[f"{out}/sft"]["replies that end"] > table[f"{out}/base"]["replies that end"]
    assert table[f"{out}/sft"]["bits per byte"] > 0


def test_one_process_trains_what_two_train(road):
    out, _ = road
    for stage, line in {
        "base": f"pretrain.py {TINY} --context 64 --batch-size 8 --data {out}/data/corpus.jsonl --tokenizer {out}/data",
        "sft": f"sft.py --lr 3e-3 --data {out}/data/sft.jsonl --init {out}/base",
    }.items():
        steps = {"base": 60, "sft": 40}[stage]
        run(f"{line} --dtype fp32 --micro-tokens 700 --steps {steps} --out {out}/{stage}-alone", processes=1)
        for a, b in zip(losses(out / stage), losses(out / f"{stage}-alone")):
            assert abs(a - b) < 2e-4


def test_a_run_that_is_stopped_resumes_to_the_same_bits(road):
    out, _ = road
    line = (f"ppo.py --dtype fp32 --batch-size 16 --max-new-tokens 12 --init {out}/sft --reward {out}/reward --prompts "
            f"{out}/data/prompts.jsonl --save-every 2 --steps 4")
    run(f"{line} --out {out}/whole", processes=1)
    program = ("import sys, ppo, zero\nplain = zero.Run.boundary\n"
               "def boundary(self, step, **o):\n    self.stopping = step == 1\n    plain(self, step, **o)\n"
               "zero.Run.boundary = boundary\nzero.launch(ppo.main, ppo.Config)\n")
    (out / "stopping.py").write_text(program, encoding="utf-8")
    assert "the same command resumes" in run(f"{out}/stopping.py {line.split(' ', 1)[1]} --out {out}/parts",
                                             processes=1, fails=True)
    assert "resumed at step 2 of 4" in run(f"{line} --out {out}/parts", processes=1)
    whole, parts = load_model(out / "whole"), load_model(out / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert losses(out / "whole", "score") == losses(out / "parts", "score")


def test_a_model_answers_in_the_chat(road):
    out, _ = road
    assert run(f"model.py {out}/sft --prompt hello --max-new-tokens 8", processes=1) != ""


@pytest.mark.parametrize("line, expected", [
    ("pretrain.py --data no/such.txt", "no/such.txt"),
    ("pretrain.py --data {tmp}/empty.txt", "empty"),
    ("pretrain.py --no-such-flag 1", "unrecognized arguments"),
    ("sft.py --init {tmp}", "tokenizer.json"),
    ("sft.py --init {road}/base --data {tmp}/broken.jsonl", "broken.jsonl:2"),
    ("sft.py --init {road}/base --data {tmp}/odd.jsonl", "known formats"),
    ("sft.py --init {road}/base --data {tmp}/long.jsonl --context 16", "no conversation has a reply"),
    ("dpo.py --init {road}/sft --data {tmp}/odd.jsonl", "a comparison needs"),
    ("ppo.py --init {road}/sft --reward {road}/reward --prompts {tmp}/long.jsonl", "no prompt fits"),
    ("reward.py --init {road}/sft --data {tmp}/same.jsonl", "different scores"),
])
def test_bad_input_ends_with_one_line_that_names_it(road, tmp_path, line, expected):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n', encoding="utf-8")
    (tmp_path / "odd.jsonl").write_text('{"text_a": "a"}\n', encoding="utf-8")
    record = {"question": "word " * 400, "answer": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(record), encoding="utf-8")
    same = {"question": "a", "replies": ["b", "c"], "scores": [1, 1]}
    (tmp_path / "same.jsonl").write_text(json.dumps(same), encoding="utf-8")
    said = run(line.format(tmp=tmp_path, road=road[0]), f"--out {tmp_path}/out", processes=1, fails=True)
    assert expected in said and "Traceback" not in said, said

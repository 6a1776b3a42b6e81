"""Every script, run as a user runs it.   python -m pytest tests/test_scripts.py

One small world and one small model go the whole road under torchrun with two processes, each
stage under another ZeRO stage; `agreeing.py` ends a run whose ranks differ after a step.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch._dynamo
import torch.distributed as dist

import dpo
import ppo
import pretrain
import reward
import sft
import zero
from model import ModelConfig, ScalarModel, load_model

ROOT = Path(__file__).parent.parent
TINY = ("--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 2 "
        "--num-key-value-heads 1")


def run(*words, processes=2, fails=False):
    """Runs a script's command line, as a shell would; returns what it printed."""
    words = shlex.split(" ".join(map(str, words)))
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["tests/agreeing.py", words[0].removesuffix(".py"), *words[1:]]
    else:
        command = []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *words], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=240)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder):
    """What a run logged, but for the time it took."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = ("seconds", "rollout_rate", "update_rate")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def losses(folder, key="loss"):
    return [row[key] for row in metrics(folder)]


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """The folder of a finished small road, its stages trained on two processes."""
    out = tmp_path_factory.mktemp("road")
    flags, said, data = "--dtype fp32 --micro-tokens 512", {}, f"{out}/data"
    run(f"data.py world --out {data} --documents 3000 --samples 1500 --vocab-size 512", processes=1)
    lines = (out / "data/sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    short = [line for line in lines if len(json.loads(line)["messages"][-1]["content"]) < 12]
    (out / "data/short.jsonl").write_text("".join(short), encoding="utf-8")  # it learns to end
    said["base"] = run(f"pretrain.py --zero 3 {flags} {TINY} --steps 60 --context 64",
                       f"--batch-size 8 --data {data}/corpus.jsonl --tokenizer {data}",
                       f"--out {out}/base")
    said["sft"] = run(f"sft.py --zero 2 {flags} --steps 60 --lr 6e-3 --data {data}/short.jsonl",
                      f"--init {out}/base --out {out}/sft")
    run(f"reward.py collect --zero 1 --dtype fp32 --limit 60 --max-new-tokens 12 --init {out}/sft",
        f"--prompts {data}/prompts.jsonl --out {out}/comparisons.jsonl")
    said["reward"] = run(f"reward.py --zero 3 --offload {flags} --steps 12 --lr 1e-3 --init {out}/sft",
                         f"--data {out}/comparisons.jsonl --out {out}/reward")
    said["dpo"] = run(f"dpo.py --zero 1 {flags} --steps 6 --lr 1e-3 --nll-coef 0.2 --init {out}/sft",
                      f"--data {out}/comparisons.jsonl --out {out}/dpo")
    said["ppo"] = run(f"ppo.py --zero 3 --offload {flags} --steps 3 --batch-size 16 --max-new-tokens 12",
                      f"--init {out}/sft --reward {out}/reward --prompts {data}/prompts.jsonl",
                      f"--val-fraction 0.05 --out {out}/ppo")
    said["table"] = run(
        "reward.py table --zero 0 --dtype fp32 --limit 3 --samples 2 --max-new-tokens 12",
        f"--models {out}/base,{out}/sft,{out}/ppo,{out}/dpo --data {data}/eval.jsonl",
        f"--text {data}/heldout.jsonl --prompts {data}/prompts.jsonl",
        f"--reward {out}/reward --reference {out}/sft --out {out}/table.json")
    said["road"] = run(
        f"tests/seeds.py road --table {out}/table.json --limit 3 --data {data}/eval.jsonl",
        f"--train {data}/sft.jsonl --prompts {data}/prompts.jsonl", processes=1)
    return out, said


@pytest.mark.parametrize("config, flag", [(sft.Config, "turns"), (sft.Config, "template"),
                                          (pretrain.Config, "device"), (ppo.Config, "zero")])
def test_a_choice_that_does_not_exist_is_refused(config, flag, capsys):
    with pytest.raises(SystemExit):
        zero.parse_config(config, [f"--{flag}", "7"])
    assert f"--{flag}: invalid choice" in capsys.readouterr().err


def test_a_number_that_leaves_nothing_to_do_is_refused_and_a_negative_default_is_not(capsys):
    for flag, number in (("val-fraction", 1), ("val-fraction", -0.5), ("tune-size", 0), ("minibatches", 0)):
        with pytest.raises(SystemExit):
            zero.parse_config(ppo.Config, [f"--{flag}", f"{number}"])
        assert f"--{flag} {number}" in capsys.readouterr().err
    cfg = zero.parse_config(ppo.Config, "--missing-end-score -2 --lr 0 --steps 0 --val-fraction 0".split())
    assert cfg.missing_end_score == -2 and cfg.steps == cfg.lr == cfg.val_fraction == 0


def test_pretraining_starts_at_ln_v_and_learns(road):
    out, said = road
    curve = losses(out / "base")
    assert abs(curve[0] - torch.tensor(512.0).log()) < 0.1 and curve[-1] < curve[0] - 1.0
    assert "first loss" in said["base"] and "expected 6.2" in said["base"]


def test_sft_starts_from_the_base_model_and_learns(road):
    out, said = road
    curve = losses(out / "sft")
    assert "  exact_match " in said["sft"].splitlines()[-1]
    assert len(curve) == 60 and sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert losses(out / "sft", "replay_loss")[0] < losses(out / "base")[0] - 1.0


def test_collected_comparisons_carry_the_judges_scores(road):
    out, _ = road
    lines = (out / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60
    assert all(len(r["replies"]) == len(r["scores"]) == len(set(r["replies"])) for r in rows)
    assert all("family" in r and r["messages"][-1]["role"] == "user" for r in rows)
    assert all(len(r["sources"]) == len(r["replies"]) for r in rows)
    assert {source for r in rows for source in r["sources"]} == {"sample", "hot", "misplaced"}


def test_the_reward_model_starts_at_ln_2_and_learns(road):
    out, _ = road
    curve = losses(out / "reward")
    assert abs(curve[0] - 0.693147) < 1e-5 and min(curve[-3:]) < 0.688
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
    assert max(losses(out / "ppo", "ended")) > 0  # the reward model had something to score
    assert all(name in said["ppo"] for name in ("policy", "value", "reference", "reward"))


def test_the_table_has_a_column_for_every_stage_and_two_without_learning(road):
    out, said = road
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [Path(k).name for k in table] == ["similar prompt", "best constant", "base", "sft",
                                             "ppo", "dpo"]
    base, sft, ppo = (table[f"{out}/{name}"] for name in ("base", "sft", "ppo"))
    assert sft["replies that end"]["mean"] > base["replies that end"]["mean"]
    assert sft["bits per byte"]["mean"] < base["bits per byte"]["mean"]
    assert all(cell["low"] <= cell["mean"] <= cell["high"] for row, cell in sft.items()
               if row not in ("families", "groups", "examples", "distinct-2, T=1", "perplexity"))
    gap = "harmful requests refused, T=1: gap by"
    assert all(f"| {gap} {field} | " in said["table"] for field in ("category", "about", "lang"))
    assert sum(row.startswith("look-alikes refused, T=1: ") for row in sft["groups"]) > 5
    assert len(sft["examples"]) == 5 and len(sft["examples"]["偷东西选什么时间"]) == 2  # samples
    assert "Datawhale是什么\n  base" in said["road"]  # the documents' own examples, in words
    kl = "KL to SFT per reply, T=1"
    assert sft[kl]["mean"] == 0 != ppo[kl]["mean"] and kl not in base
    assert sft["gold score, T=1"]["n"] == sft["reward score, T=1"]["n"] == 3 * 17
    assert set(table["best constant"]) < set(base) < set(sft) == set(ppo)
    row = "| gold score, T=1 | "
    [models], [whole] = ([line for line in said[k].splitlines() if line.startswith(row)]
                         for k in ("table", "road"))
    assert " ± " in models and whole.endswith(models.removeprefix(row))  # two columns in front


def test_the_tables_of_two_seeds_become_one_and_a_figure(road, tmp_path):
    out, _ = road
    words = f"{out}/table.json {out}/table.json --out {tmp_path}/table.json"
    assert "| bits per byte | " in run(f"tests/seeds.py merge {words}", processes=1)
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert list(table)[2:] == ["base", "sft", "ppo", "dpo"]
    assert table["sft"]["bits per byte"]["n"] == 2
    texts = [element.text for element in ElementTree.parse(tmp_path / "table.svg").iter()]
    assert all(text in texts for text in ("sft", "gold score, T=1", "exact match, new wordings"))
    assert len(ElementTree.parse(out / "ppo/curves.svg").findall("{*}g")) == 16  # a metric each


def test_an_experiment_runs_its_variant_and_tells_what_the_table_says(road, tmp_path):
    out, _ = road
    (tmp_path / "seed-0").symlink_to(out)
    words = ["tests/experiments.py frontier --root", str(tmp_path), "--seeds 0 --only 0.2"]
    flags = "--flags='--steps 2 --batch-size 8 --max-new-tokens 12'"
    said = run(*words, flags, processes=1)
    [row] = [line for line in said.splitlines() if line.startswith("| PPO, price 0.2 |")]
    config = json.loads((out / "frontier/PPO--price-0.2/run.json").read_text())["config"]
    assert (config["kl_coef"], config["steps"], config["init"]) == (0.2, 2, f"{out}/sft")
    [column] = json.loads((out / "frontier/table.json").read_text()).values()
    gold = column["gold score, T=1"]["mean"]
    assert row.startswith(f"| PPO, price 0.2 | {gold:.2f} ({gold:.2f} to {gold:.2f}) |")
    lines = ElementTree.parse(tmp_path / "frontier.svg").findall(".//{*}polyline")
    assert len(lines) == 1, "one algorithm, one seed"


def test_one_process_trains_what_two_train(road):
    out, _ = road
    for stage, line in {
        "base": f"pretrain.py {TINY} --steps 60 --context 64 --batch-size 8 "
                f"--data {out}/data/corpus.jsonl --tokenizer {out}/data",
        "sft": f"sft.py --steps 60 --lr 6e-3 --data {out}/data/short.jsonl --init {out}/base",
        "reward": f"reward.py --steps 12 --lr 1e-3 --init {out}/sft --data {out}/comparisons.jsonl",
        "dpo": f"dpo.py --steps 6 --lr 1e-3 --nll-coef 0.2 --init {out}/sft "
               f"--data {out}/comparisons.jsonl",
    }.items():
        folder = out / f"{stage}-alone"
        run(f"{line} --dtype fp32 --micro-tokens 700 --threads 1 --out {folder}", processes=1)
        pairs = list(zip(losses(out / stage), losses(folder), strict=True))
        assert max(abs(a - b) for a, b in pairs) < 2e-4, stage


@pytest.fixture
def signals():
    """A run takes over two signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("script, half, changes", [
    (pretrain, 10, dict(data="{o}/data/corpus.jsonl", tokenizer="{o}/data", hidden_size=32,
                        num_attention_heads=2, num_key_value_heads=1, context=32, batch_size=4)),
    (sft, 2, dict(init="{o}/base", data="{o}/data/sft.jsonl", batch_size=8)),
    (reward, 2, dict(init="{o}/sft", data="{o}/comparisons.jsonl", batch_size=4)),
    (dpo, 2, dict(init="{o}/sft", data="{o}/comparisons.jsonl", batch_size=4)),
    (ppo, 2, dict(init="{o}/sft", reward="{o}/reward", prompts="{o}/data/prompts.jsonl",
                  batch_size=8, max_new_tokens=12, val_fraction=0.02))])
def test_a_run_stopped_half_way_ends_in_the_same_bits(
        road, alone, signals, tmp_path, monkeypatch, capsys, script, half, changes):
    changes = {k: v.format(o=road[0]) if isinstance(v, str) else v for k, v in changes.items()}
    changes |= dict(steps=2 * half, dtype="fp32", threads=1, warmup=0.5)
    plain = zero.Run.boundary

    def boundary(run, step, **optimizers):
        run.stopping = run.cfg.out.endswith("parts") and step == half - 1
        plain(run, step, **optimizers)

    monkeypatch.setattr(zero.Run, "boundary", boundary)
    script.main(script.Config(out=str(tmp_path / "whole"), **changes))
    with pytest.raises(SystemExit) as stop:
        script.main(script.Config(out=str(tmp_path / "parts"), **changes))
    assert stop.value.code == 130 and len(metrics(tmp_path / "parts")) == half
    script.main(script.Config(out=str(tmp_path / "parts"), **changes))
    assert f"resumed at step {half} of {2 * half}" in capsys.readouterr().out
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == parts
    assert (tmp_path / "whole/eval.json").read_text() == (tmp_path / "parts/eval.json").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_blocks_train_like_the_others_under_zero_3(road, alone, signals, tmp_path):
    changes = dict(data=f"{road[0]}/data/corpus.jsonl", tokenizer=f"{road[0]}/data", hidden_size=32, steps=3,
                   num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, context=32, batch_size=4,
                   dtype="fp32", threads=1, zero=3)
    graphs = []
    for compile in (False, True):
        pretrain.main(pretrain.Config(out=str(tmp_path / str(compile)), compile=compile, **changes))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] + 1
    torch.testing.assert_close(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=1e-5, atol=0)


def test_a_fresh_run_with_another_vocabulary_trains_another_tokenizer(alone, signals, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat, the dog too. " * 99, encoding="utf-8")
    shape = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    for size in (265, 270):
        pretrain.main(pretrain.Config(data=f"{tmp_path}/a.txt", out=f"{tmp_path}/a", fresh=True, threads=1,
                                      vocab_size=size, steps=2, context=16, **shape))
        assert load_model(tmp_path / "a").config.vocab_size == size


@pytest.mark.parametrize("script, words, expected", [
    (pretrain, "--data no/such.txt", "no/such.txt"),
    (pretrain, "--data {tmp}/empty.txt", "empty"),
    (pretrain, "--no-such-flag 1", "unrecognized arguments"),
    (sft, "--init {tmp}", "tokenizer.json"),
    (sft, "--init {road}/base --data {tmp}/broken.jsonl", "broken.jsonl:2"),
    (sft, "--init {road}/base --data {tmp}/odd.jsonl", "known formats"),
    (sft, "--init {road}/base --data {tmp}/long.jsonl --context 16", "no conversation has"),
    (dpo, "--init {road}/sft --data {tmp}/odd.jsonl", "a comparison needs"),
    (sft, "--init {road}/base --data {road}/data/sft.jsonl --task-weights sumz=2", "no row is of task sumz"),
    (sft, "--init {road}/base --data {tmp}/note.txt", "note.txt:1: not valid JSON (Expecting value); a .json"),
    (ppo, "--init {road}/sft --reward {road}/reward --prompts {tmp}/long.jsonl", "no prompt fits"),
    (reward, "--init {road}/sft --data {tmp}/same.jsonl", "different scores"),
    (dpo, "--init {road}/sft --data {tmp}/same.jsonl", "different scores"),
    (reward, "--init {road}/sft --data {tmp}/equal.jsonl", "different scores"),
    (dpo, "--init {road}/sft --data {tmp}/equal.jsonl", "different scores"),
    (reward.table, "--models {tmp}/none --data {tmp}/long.jsonl", "none of these folders"),
])
def test_bad_input_ends_with_one_line_that_names_it(
        road, tmp_path, capsys, signals, script, words, expected):
    bad_files(tmp_path)
    words = f"{words} --threads 1 --out {tmp_path}/out".format(tmp=tmp_path, road=road[0]).split()
    main, Config = (reward.table, reward.TableConfig) if script is reward.table else (script.main, script.Config)
    with pytest.raises(SystemExit) as stop:
        zero.launch(main, Config, words)
    if dist.is_initialized():
        dist.destroy_process_group()
    said = f"{stop.value.code}{capsys.readouterr().err}"
    assert expected in said and stop.value.code, said


def test_a_command_offers_no_flag_that_it_does_not_use():
    for config, unused in ((reward.LabelConfig, "noise"), (zero.MeasureConfig, "out"), (zero.PlanConfig, "seed")):
        assert unused not in config.__dataclass_fields__, "it is another command's"


def test_a_refusal_is_an_exit_code_and_no_traceback(road, tmp_path):
    bad_files(tmp_path)
    said = run(f"sft.py --init {road[0]}/base --data {tmp_path}/broken.jsonl --out {tmp_path}/out",
               processes=1, fails=True)
    assert "broken.jsonl:2" in said and "Traceback" not in said, said


def test_a_broken_file_of_prompts_is_told_before_four_models_are_loaded(road, tmp_path, alone, monkeypatch):
    bad_files(tmp_path)
    monkeypatch.setattr(ppo, "open_models", lambda *_: pytest.fail("models were loaded"))
    cfg = ppo.Config(init=f"{road[0]}/sft", reward=f"{road[0]}/reward", prompts=f"{tmp_path}/broken.jsonl",
                     out=f"{tmp_path}/out", threads=1)
    with pytest.raises(SystemExit, match="broken.jsonl:2"):
        ppo.main(cfg)


@pytest.mark.parametrize("command", ["data.py show {road}/data/sft.jsonl --tokenizer {road}/data", "data.py score note",
                                     "sft.py --help", "model.py {road}/sft --prompt 你好 --max-new-tokens 4",
                                     "reward.py agree {tmp}/mine.jsonl {tmp}/mine.jsonl"])
def test_a_terminal_that_knows_ascii_alone_is_told_what_it_can_show(road, tmp_path, command):
    labelled = {"question": "你好", "replies": ["好", "不好"], "scores": [1, 0]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(labelled), encoding="utf-8")
    (tmp_path / "note").write_text(json.dumps({"prediction": "好", "answer": "好"}), encoding="utf-8")
    command = command.replace("note", f"{tmp_path}/note").format(road=road[0], tmp=tmp_path)
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout, done.stderr


def bad_files(folder):
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    broken = '{"question": "a", "answer": "b"}\n{"question": \n'
    (folder / "broken.jsonl").write_text(broken, encoding="utf-8")
    (folder / "odd.jsonl").write_text('{"text_a": "a"}\n', encoding="utf-8")
    record = {"question": "word " * 400, "answer": "b", "family": "fact"}
    (folder / "long.jsonl").write_text(json.dumps(record), encoding="utf-8")
    same = {"question": "a", "replies": ["b", "c"], "scores": [1, 1]}
    (folder / "same.jsonl").write_text(json.dumps(same), encoding="utf-8")
    equal = {"question": "a", "chosen": "b", "rejected": "b"}
    (folder / "equal.jsonl").write_text(json.dumps(equal), encoding="utf-8")
    (folder / "note.txt").write_text("a note", encoding="utf-8")


def test_what_the_benchmark_times_still_runs(alone):
    """Nothing else calls its loops: an argument that changes here would be noticed by no one."""
    import bench

    config = ModelConfig(64, 16, 32, 1, 2, 1)
    for build, tokens in bench.later_steps(config, torch.float32).values():
        build()()
        assert tokens in (2048, 4096)
    for phase in bench.ppo_phases(config, torch.float32):
        phase()
    for build in (bench.training_step, lambda *args: bench.bare_step(*args)[0]):
        build(config, 2, 8, torch.float32)()
    for build in (bench.decoding, bench.bare_decoding):
        build(config, 2, 4, 3, torch.float32)()

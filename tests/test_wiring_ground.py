"""What stands between the functions and a user.   python -m pytest tests/test_wiring_ground.py

Functions have their tests elsewhere. Here is seen what hands things on to them: a flag that gets
lost, a seed that is the same for all, a file that holds what another should.
"""

import hashlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist

import data as d
import model as m
import zero as z
from test_data import ASSISTANT, BYTES, DOC, END, talk, write
from test_model import build
from test_zero import flat, folder, optimizer  # noqa: F401  folder is a fixture
from tiny import shard
from zero import AdamW, BaseConfig, Run, RunConfig


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    """shell("data.py", "show --n 1") is what that command prints; typed: what its user types."""
    def run(file, words, typed=()):
        said = list(typed)

        def answer(_):
            if not said:
                raise EOFError
            return said.pop(0)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(sys, "argv", [file, *words.split()])
        capsys.readouterr()
        runpy.run_path(str(Path(m.__file__).with_name(file)), run_name="__main__")
        return capsys.readouterr().out

    return run


def full(*_):
    """A disk without space."""
    raise OSError("no space left")


# --------------------------------------------------------------------------------- model.py


def bigram(folder, follows):
    """A checkpoint that knows only what may follow a token: {token: {next: probability}}."""
    config = m.ModelConfig(263, 264, 8, 1, 1, 1, max_position_embeddings=64,
                           tie_word_embeddings=False)
    net = m.CausalLM(config)
    for name, p in net.named_parameters():
        p.data.fill_(float("norm" in name))  # the block adds nothing: the last token is all it sees
    net.model.embed_tokens.weight.data.fill_diagonal_(1)
    for token, options in follows.items():
        for other, probability in options.items():  # e^30 times as likely as what is not listed
            logit = 30 + math.log(probability)
            net.lm_head.weight.data[other, token] = logit / math.sqrt(config.hidden_size)
    m.save_model(folder, net)
    BYTES.save(folder)


def test_the_chat_samples_as_its_flags_say(tmp_path, shell):
    coin = {ord("a"): 0.6, ord("b"): 0.4}
    bigram(tmp_path, {ASSISTANT: coin, ord("a"): coin, ord("b"): coin})

    def answer(flags, typed=()):
        return shell("model.py", f"{tmp_path} --max-new-tokens 20 {flags}", typed)

    assert answer("--prompt x --temperature 0") == "a" * 20 + "\n"
    assert answer("--prompt x --temperature 1 --top-p 0.5") == "a" * 20 + "\n"
    drawn = [answer(f"--prompt x --temperature 1 --seed {seed}") for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    first, second, _ = answer("--temperature 1", typed="xx").splitlines()
    assert first != second  # a turn draws numbers of its own: only they differ here


def test_the_template_says_what_a_model_reads_last_and_where_its_reply_ends(tmp_path, shell):
    a, b, c, *han = "abc好".encode()
    steps = [(ASSISTANT, b), (a, b), (b, END), (END, c), (c, DOC), (DOC, a), (ord("\n"), han[0])]
    steps += [*zip(han, han[1:]), (han[2], END)]
    bigram(tmp_path, {token: {after: 1} for token, after in steps})

    def answer(flags, typed=()):
        return shell("model.py", f"{tmp_path} --temperature 0 {flags}", typed)

    assert answer("--prompt a") == "b\n"
    assert answer("--prompt a --template none") == "bc\n"  # a base model ends a text, not a turn
    # behind "### Response:\n"; it comes byte by byte, and half a character is not shown
    assert answer("--prompt a --template alpaca --max-new-tokens 20") == "好\n"
    with pytest.raises(SystemExit, match="'x+': 103 tokens with what must stand before it, [0-9]+ fit"):
        answer(f"--prompt {'x' * 100}")
    # the bare text of a system's "a" and an empty question ends with a; /new keeps the system
    assert answer("--template none --system a", typed=["", "/new", ""]).split() == ["bc", "bc"]


def test_an_overlong_chat_forgets_its_oldest_exchanges_alone_and_says_so(tmp_path):
    """Typed to the command. The model answers "b" to all; 32 of 64 positions are the prompt's: a system message of 5
    tokens and a question of 12 with its header fit, a second one with the exchange before it is one token too long."""
    bigram(tmp_path, {ASSISTANT: {ord("b"): 1}, ord("b"): {END: 1}})
    typed = ["q" * 10, "r" * 10, "/new", "x" * 40, "s" * 10, "t" * 9]
    command = [sys.executable, m.__file__, tmp_path, "--temperature", "0", "--system", "sys"]
    said = subprocess.run(command, input="\n".join(typed), capture_output=True, text=True, timeout=120)
    assert said.stdout.replace("\n", "") == "> b> b> > > b> b> "
    assert [line for line in said.stderr.splitlines() if line] == [
        "(the oldest exchanges are left out, 1 so far: the context holds 64 tokens)",
        f"'{'x' * 40}': 48 tokens with what must stand before it, 32 fit beside the reply; shorten it or take fewer "
        "--max-new-tokens"]
    # what is left is the system message and whole exchanges: the ids say so
    talk = [{"role": role, "content": text} for role, text in (
        ("system", "sys"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5"))]
    args = SimpleNamespace(template="chat")
    for room, kept in ((22, [0, 1, 2, 3, 4, 5]), (16, [0, 3, 4, 5]), (9, [0, 5])):
        ids, forgotten = m.fitted(talk, BYTES, d, args, room)
        assert ids == d.render([talk[i] for i in kept], BYTES)[0]
        assert forgotten == (6 - len(kept)) // 2


def test_a_file_of_prompts_is_answered_in_batches_the_same_whatever_the_batch(tmp_path, shell):
    coin = {ord("a"): 0.5, ord("b"): 0.4, END: 0.1}
    bigram(tmp_path, {ASSISTANT: coin, ord("a"): coin, ord("b"): coin})
    rows = [{"instruction": "x" * n, "output": "is cut off"} for n in range(1, 6)]
    rows.append({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "，"}]})
    questions = write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))
    answers = []
    for size in (1, 4, 32):
        out = tmp_path / "answers" / f"{size}.jsonl"
        shell("model.py", f"{tmp_path} --prompts {questions} --out {out} --batch-size {size} --system S "
                          "--max-new-tokens 9")
        answers.append([json.loads(line)["messages"] for line in out.read_text("utf-8").splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert [turns[:-1] for turns in answers[0]] == [
        *([{"role": "system", "content": "S"}, {"role": "user", "content": row["instruction"]}] for row in rows[:5]),
        rows[5]["messages"]]
    replies = [turns[-1]["content"] for turns in answers[0]]
    assert len(set(replies)) > 3 and all(set(reply) <= {"a", "b"} for reply in replies)
    with pytest.raises(SystemExit, match="--max-new-tokens"):
        shell("model.py", f"{tmp_path} --prompts {questions} --out {out} --system {'S' * 99}")


def test_the_ends_of_generation_end_a_reply(tmp_path, shell):
    a, b, c = b"abc"
    bigram(tmp_path, {ASSISTANT: {a: 1}, a: {b: 1}, b: {c: 1}, c: {END: 1}})
    assert shell("model.py", f"{tmp_path} --temperature 0 --prompt x") == "abc\n"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [b, 3]}))
    assert shell("model.py", f"{tmp_path} --temperature 0 --prompt x") == "ab\n"


def test_the_presets_stand_beside_the_documents_estimate(shell):
    rows = [line.split() for line in shell("model.py", "").splitlines()]
    assert ["llama-7b", "6,738,415,616", "6,442,450,944"] in rows  # 12 · 32 · 4096²


def test_many_prompts_are_answered_in_groups_of_like_length_as_each_is_alone():
    net, prompts, shapes = build(spread=0.15), [[1] * n for n in (5, 2, 7, 2, 3, 9, 3)], []
    hook = net.model.register_forward_pre_hook(lambda _, args: shapes.append((*args[0].shape,)))
    replies = m.generate(net, prompts, 6, -1, rows=3)
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 3), (3, 7), (1, 9)]
    hook.remove()
    assert replies == [m.generate(net, [p], 6, -1, seeds=[i])[0] for i, p in enumerate(prompts)]
    assert replies[1] != replies[3]  # one prompt twice: each has a seed of its own
    ends = [replies[0][2], replies[1][1]]  # any of several ends a reply
    for whole, reply in zip(replies, m.generate(net, prompts, 6, ends, rows=3)):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), 6)
        assert reply == whole[:stop]
    m.token_logprobs(net, torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).sum().backward()  # PPO's


def changed(folder, **changes):
    """A model's folder with other entries in its config.json; ...: the entry is left out."""
    m.save_model(folder, build())
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_what_a_config_leaves_out_is_what_transformers_takes_it_for(tmp_path):
    names = "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "head_dim"
    config = m.load_config(changed(tmp_path, **dict.fromkeys(names, ...)))
    assert [getattr(config, name) for name in names] == [4, 1e-6, 10000.0, False, 6]
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(SystemExit, match="config.json: broken JSON"):
        m.load_config(tmp_path)


def test_a_checkpoint_in_several_files_is_loaded_to_the_device_asked_for(tmp_path):
    net = build()
    m.save_model(tmp_path, net)
    shard(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})  # old Llamas'
    index = (tmp_path / "model.safetensors.index.json").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="holds no model.safetensors"):
        m.load_model(tmp_path)
    index.rename(tmp_path / "model.safetensors.index.json")
    shapes = {"model.norm.weight": (24,)}  # a shard of an earlier save, which no index names
    m.write_safetensors(tmp_path / "model-3-of-3.safetensors", shapes, torch.float32,
                        {"model.norm.weight": torch.zeros(24)}.items())
    loaded = m.load_model(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), net.parameters()))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # tied
    assert next(m.load_model(tmp_path, device="meta").parameters()).is_meta
    assert {p.dtype for p in m.load_model(tmp_path, dtype=torch.half).parameters()} == {torch.half}
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds no model-2-of-2.safetensors"):
        m.load_model(tmp_path)


def test_every_script_names_what_weight_files_finds_as_its_inputs():
    for name in "pretrain sft reward ppo dpo".split():
        text = (Path(m.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert "weight_files(cfg." in text and "model.safetensors" not in text


def test_a_checkpoint_says_what_it_is_and_one_rank_writes_it(tmp_path):
    m.save_model(tmp_path / "other", build(), write=False)
    m.save_model(tmp_path / "first", build(m.ScalarModel, dtype=torch.bfloat16))
    config = json.loads((tmp_path / "first/config.json").read_text())
    said = [config[name] for name in ("torch_dtype", "num_labels", "hidden_act")]
    assert said == ["bfloat16", 1, "silu"] and not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------- data.py


def test_a_tokenizer_of_the_size_asked_for_is_trained_and_rows_are_shown(tmp_path, shell):
    text = "天气 天气 the cat the cat " * 9
    write(tmp_path / "a.txt", text)
    said = shell("data.py", f"bpe --data {tmp_path}/a.txt --vocab-size 268 --out {tmp_path}/tok")
    tokenizer = d.Tokenizer.load(tmp_path / "tok")
    assert tokenizer.vocab_size == 268 and "268 tokens" in said
    assert f"{len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token" in said
    line = json.dumps({"question": "the cat", "answer": "天"})
    rows = write(tmp_path / "rows.jsonl", "\n".join([line] * 4))
    words = f"show --data {rows} --tokenizer {tmp_path}/tok --n 2 --template alpaca"
    row = d.render(talk("the cat", "天"), tokenizer, "alpaca")
    said = shell("data.py", words)
    n = len(row[0])
    told = f"{rows}: 4 rows of {n} to {n} tokens, half of them of at most {n}; "
    assert said.startswith(f"{d.show([row, row], tokenizer)}\n{told}0 cut to --context 256; ")
    assert f" {sum(row[1]) / n:.0%} of the tokens left are trained" in said
    assert f"{told}4 cut to --context {n - 1}" in shell("data.py", f"{words} --context {n - 1}")
    tokenizer.template = "none"  # the folder's own, then
    tokenizer.save(tmp_path / "tok")
    said = shell("data.py", words.removesuffix(" --template alpaca"))
    assert said.startswith(d.show([d.render(talk("the cat", "天"), tokenizer, "none")] * 2, tokenizer))
    for words in ("data.py show", f"data.py bpe {tmp_path}/a.txt", "model.py --prompt hi"):
        with pytest.raises(SystemExit) as stop:
            shell(*words.split(" ", 1))
        assert stop.value.code == 2


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_world_command_writes_each_part_into_its_file(tmp_path, monkeypatch):
    made, build_world = [], d.build_world

    def watched(*arguments):
        made.append(build_world(*arguments))
        return made[0]

    monkeypatch.setattr(d, "build_world", watched)
    words = f"world --seed 1 --documents 80 --samples 60 --vocab-size 300 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["data.py", *words.split()])
    d.main()
    [world], corpus = made, [row["text"] for row in rows_of(tmp_path / "corpus.jsonl")]
    assert world["documents"] == build_world(1, 80, 60)["documents"] and len(world["sft"]) == 60
    assert corpus == d.clean(d.crawl(world["documents"], 1))[0]
    assert d.crawl(world["documents"], 1) != d.crawl(world["documents"], 0)
    held = [row["text"] for row in rows_of(tmp_path / "heldout.jsonl")]
    assert held == world["heldout_documents"]
    for name in ("sft", "prompts", "eval"):
        assert rows_of(tmp_path / f"{name}.jsonl") == world[name], name
    chats = [message["content"] for row in world["sft"] for message in row["messages"]]
    han = "\n".join(sorted(set(re.findall("[一-鿿]", "".join(d.world_text().values())))) * 1000)
    # of what pretraining and SFT read, and of each character often
    merges = d.train_bpe([*corpus, *chats, han], 300 - len(d.SPECIALS))
    assert d.Tokenizer.load(tmp_path).hash == d.Tokenizer.from_merges(merges).hash
    # nine of sixteen prompts ask for harm, and no question is of a "person"
    assert 0.53 < sum(row["kind"] == "harmful" for row in world["prompts"]) / 2000 < 0.60
    trained = repr([row["messages"] for row in world["prompts"] if row["family"] != "name"])
    for row in world["eval"]:
        if (row["kind"], row["split"], row["lang"]) == ("cloze", "person", "en"):
            assert re.match("The .* of (.*) is", row["text"])[1] not in trained


def test_each_step_of_cleaning_works_on_what_the_one_before_left():
    text = "The teacher likes the tower of the town and the people who live in it. Ask {}@a.com 好"
    pages = [{"url": f"https://x.example/{who}", "html": f"<p>{text.format(who)}</p>"}
             for who in ("anna", "ben")]
    documents, funnel = d.clean(pages, show=2)
    dropped = {page["url"]: step.split()[0] for step, row in funnel.items()
               for page, _, after in row["examples"] if not after}
    assert dropped == {pages[1]["url"]: "exact"}  # alike once their addresses are masked
    assert list(funnel.values())[-1]["bytes"] == len(documents[0].encode())


def test_a_corpus_notices_any_source_that_changes_and_survives_a_crash(tmp_path, monkeypatch):
    a, b = write(tmp_path / "a.txt", "ab"), write(tmp_path / "b.txt", "cd")

    def tokens(tokenizer=BYTES):
        return d.Tokens(tmp_path / "t.bin", f"{a},{b}", tokenizer)

    tokens().build()
    assert tokens().ready() and tokens().open(1).ids.tolist() == [97, 98, DOC, 99, 100, DOC]
    os.utime(b, (1, 1))  # another text, as long as before
    assert not tokens().ready()
    tokens().build()
    monkeypatch.setattr(d, "write_text", full)  # by which the last of all is written
    with pytest.raises(OSError):
        tokens(d.Tokenizer.from_merges([(97, 98)])).build()
    assert not tokens().ready()  # the ids are the other tokenizer's


def test_prompts_lose_their_replies_and_conversations_come_from_many_files(tmp_path):
    a = write(tmp_path / "a.jsonl", json.dumps({"prompt": "a", "completion": "b \ud83d"}))
    b = write(tmp_path / "b.json", json.dumps([{"messages": talk("c", "d", "e", "f")}]))
    found = [row["messages"] for row in d.read_conversations(f"{a},{b}")]
    assert found == [talk("a", "b ?"), talk("c", "d", "e", "f")]  # half an emoji is no text
    found = [row["messages"] for row in d.read_prompts(f"{a},{b}")]
    assert found == [talk("a"), talk("c", "d", "e")]


def test_each_process_takes_its_own_micro_batches(monkeypatch):
    lengths, rows = [5] * 4 + [9] * 4, [50] * 8
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        mine = d.my_micro_batches(lengths, 1000, rows)
        assert mine == d.micro_batches(lengths, 1000, rank, 2, rows)
        assert mine != d.micro_batches(lengths, 1000, rank, 2)


# ------------------------------------------------------------------- zero.py: a process, a file


@pytest.fixture
def settings(alone, monkeypatch):
    """The process is given back as setup() found it; environment variables are a copy."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield monkeypatch
    torch.set_num_threads(threads)


def test_setup_takes_threads_seed_and_kernels_from_the_flags(settings, capsys):
    exact, drawn, cfg = [], [], BaseConfig(device="cpu", seed=3)
    settings.setattr(torch, "use_deterministic_algorithms", exact.append)
    settings.setattr(z, "cpu_cores", lambda: 7)
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    for flag, threads in ((0, 2), (5, 5)):  # seven cores for three processes
        z.setup(replace(cfg, threads=flag))
        assert f"x {threads} threads of 7 cores, cpu, gloo" in capsys.readouterr().out
        assert torch.get_num_threads() == threads and not exact
    for rank in (0, 1):
        settings.setattr(dist, "get_rank", lambda: rank)
        z.setup(replace(cfg, threads=1, deterministic=True))
        assert bool(capsys.readouterr().out) == (rank == 0)  # one rank speaks for all
        drawn.append(torch.rand(3).tolist())
    expected = torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()
    assert drawn == [expected] * 2 and exact == [True] * 2  # weights start equal on every rank
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_process_counts_the_cores_that_it_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    for quota, cores in (("max 100000", 6), ("250000 100000", 2)):  # a container's, as Linux says
        monkeypatch.setattr(Path, "read_text", lambda path, **_: quota)
        assert z.cpu_cores() == cores


@pytest.mark.parametrize("flag, fast, dtype, said", [
    ("auto", True, torch.bfloat16, "bf16 (fast here)"), ("fp32", True, torch.float32, "fp32,"),
    ("auto", False, torch.float32, "fp32 (no fast"), ("bf16", False, torch.bfloat16, "bf16,")])
def test_auto_is_bf16_where_that_is_fast(settings, capsys, flag, fast, dtype, said):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        settings.setattr(torch.cpu, name, lambda: fast, raising=False)
    assert z.setup(BaseConfig(device="cpu", dtype=flag, threads=1))[1] == dtype
    assert said in capsys.readouterr().out


def test_a_process_takes_the_gpu_of_its_place_on_its_machine_or_the_cpu_if_told_so(settings):
    cfg, chosen = BaseConfig(threads=1), []
    settings.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        z.setup(replace(cfg, device="cuda"))
    os.environ |= {"RANK": "3", "LOCAL_RANK": "1"}  # the second process of the second machine
    settings.setattr(torch.cuda, "is_available", lambda: True)
    settings.setattr(torch.cuda, "set_device", chosen.append)
    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), torch.float32)):
        settings.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert z.setup(cfg) == (torch.device("cuda", 1), dtype)
    assert z.setup(replace(cfg, device="cpu"))[0] == torch.device("cpu")
    assert chosen == [torch.device("cuda", 1)] * 2


def test_launch_ends_the_process_group_and_keeps_an_exit_code_that_was_asked_for(settings):
    def stop(cfg):
        raise SystemExit(130)  # as after a Ctrl-C on all ranks

    settings.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(SystemExit) as end:
        z.launch(stop, BaseConfig, [])
    assert end.value.code == 130 and dist.is_initialized()
    settings.undo()
    z.launch(lambda cfg: None, BaseConfig, [])
    assert not dist.is_initialized()


def test_one_process_of_a_machine_builds_a_file_and_the_others_wait_for_it(monkeypatch):
    for rank, local in (("2", "0"), ("3", "1")):  # on the second machine
        monkeypatch.setattr(os, "environ", {"RANK": rank, "LOCAL_RANK": local})
        done = []
        monkeypatch.setattr(time, "sleep", lambda _: done.append("waited"))
        z.prepared(lambda: done, lambda: done.append("built"))
        z.prepared(lambda: done, full)  # what stands there is not built again
        assert done == [{"0": "built", "1": "waited"}[local]]


def test_a_file_is_whole_or_as_it_was_and_its_hash_sees_its_end(tmp_path, monkeypatch):
    path = tmp_path / "a"

    def two_machines_with_one_disk(file):
        monkeypatch.setattr(os, "environ", {"RANK": "1"})
        z.write_atomically(path, lambda other: other.write(b"12"))
        file.write(b"12")

    monkeypatch.setattr(os, "environ", {"RANK": "0"})
    z.write_atomically(path, two_machines_with_one_disk)
    with pytest.raises(OSError):
        z.write_atomically(path, full)
    assert path.read_bytes() == b"12"
    path.write_bytes(bytes(3 << 20) + b"!")
    assert z.file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------ zero.py: the folder of a run


def test_only_flags_of_speed_and_memory_may_change_when_a_run_goes_on(folder, tmp_path, capsys):
    cfg, free = RunConfig(out=str(folder)), set()
    inputs = [write(tmp_path / name, name) for name in "ab"]
    Run(cfg, 9, inputs)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')  # it has trained
    for field in fields(RunConfig):
        other = {bool: not field.default, str: "x"}.get(type(field.default), 7)
        try:
            Run(replace(cfg, **{field.name: other} | {"out": cfg.out}), 9, inputs)
            free.add(field.name)
        except SystemExit as stop:
            assert f"--{field.name.replace('_', '-')} " in stop.code
    assert free == {"out", "fresh", "zero", "device", "dtype", "threads", "timeout", "offload",
                    "micro_tokens", "checkpointing", "save_every", "log_every"}
    write(tmp_path / "b", "c")
    Run(cfg, 9, inputs)
    assert f"{inputs[1]} has changed" in capsys.readouterr().out


def live(cfg, clock, until):
    """A life of a run of nine steps, each of ten tokens in two seconds."""
    run, opt = Run(cfg, 9), optimizer("tied", 0)
    for step in range(run.resume(policy=opt), until):
        clock[0] += 2
        run.log(step, 10, loss=1.5)
        run.boundary(step, policy=opt)
    return run


def test_time_and_rate_go_on_where_the_life_before_ended(folder, capsys, monkeypatch):
    clock, cfg = [1000.0], RunConfig(out=str(folder), save_every=3, log_every=5.0)
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["/where/it/is/toy.py"])
    live(cfg, clock, 4)
    live(cfg, clock, 8)
    said = capsys.readouterr().out
    shown = re.findall(r"(\d)/9 .* (\d+) tokens/s", said)  # at first and every six seconds
    assert shown == [("1", "5"), ("4", "5"), ("4", "5"), ("7", "5")]
    clock[0] += 500  # between two lives no time counts
    live(cfg, clock, 9).finish(loss=0.25, note="a text")
    resumed, first, last, end = capsys.readouterr().out.splitlines()  # the last step is always said
    assert "step 6 of 9" in resumed and "7/9  0:04 left  5 tokens/s  loss 1.5" in first
    assert "9/9  0:00 left  5 tokens/s" in last
    memory = json.loads((folder / "run.json").read_text())["peak_bytes"]
    assert end == f"{folder}: loss 0.25  (18 s, {memory / 1e9:.2f} GB at most)"
    assert memory == 0 or 1e8 < memory < 1e11, "of Python and torch at least"  # 0: not on Linux
    assert [row["seconds"] for row in rows_of(folder / "metrics.jsonl")] == [*range(2, 20, 2)]
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["save_every"] == 3 and record["script"] == "toy.py"
    assert re.fullmatch("[0-9a-f]{40}|", record["commit"])  # empty where there is no git
    said = [record[key] for key in ("seconds", "world_size", "device", "dtype", "threads")]
    assert said == [18.0, 1, "cpu", "torch.float64", torch.get_num_threads()]


def test_curves_have_units_and_a_centred_mean(folder, monkeypatch):
    run, panels = Run(RunConfig(out=str(folder)), 150), {}
    run.resume(policy=optimizer("tied", 0))
    for step in range(150):
        some = {"kl": 0.5} if step >= 100 else {}  # a metric of the last steps
        run.log(step, lr=step, policy_loss=step, loss=step, **some)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(z, "plot", full)
        run.finish()
    assert not (folder / "eval.json").exists()  # make takes it for the end of all
    run.finish()
    for group in ElementTree.parse(folder / "curves.svg").findall("{*}g"):
        texts = [text.text for text in group.findall("{*}text")]
        lines = [line.get("points").split() for line in group.findall("{*}polyline")]
        panels[texts[0]] = texts, [[float(p.split(",")[1]) for p in line] for line in lines]
    assert set(panels) == {"lr", "policy_loss", "loss", "kl"} and "step" in panels["kl"][0]
    assert "nats" in panels["loss"][0] and "nats per reply" in panels["kl"][0]
    assert "nats" not in panels["policy_loss"][0]  # advantages have no unit
    assert "150" in panels["kl"][0] and "50" not in panels["kl"][0]  # it begins where it was logged
    [_], [points, mean] = panels["lr"][1], panels["policy_loss"][1]
    assert abs(points[75] - mean[75]) < 0.2 < abs(points[0] - mean[0])  # half a window at an end


# ----------------------------------------------------------------- zero.py: optimizers, the plan


def test_each_optimizer_finds_its_own_state_and_fp16_its_scale(alone, tmp_path):
    both = {"value": optimizer("tied", 2, "fp16"), "policy": optimizer("tied", 2, "fp16", seed=1)}
    both["policy"].scale, both["policy"].good = 8.0, 3
    z.save_state(tmp_path, both, {"step": 1})
    fresh = {name: optimizer("tied", 0, "fp16", seed=7) for name in ("policy", "value")}
    z.load_state(tmp_path, fresh)
    for name, one in fresh.items():
        assert (flat(one.full_parameters()) == flat(both[name].full_parameters())).all()
    policy, value = fresh["policy"], fresh["value"]
    assert (policy.scale, policy.good) == (8.0, 3) and (value.scale, value.good) == (65536.0, 0)
    policy.adjust_scale(False)
    assert (policy.scale, policy.good) == (4.0, 0)
    other = optimizer("tied", 0, "bf16")
    other.load([policy.state()])
    assert other.scale == 1.0  # another dtype keeps its own


@pytest.mark.parametrize("options", [{}, dict(betas=(0.5, 0.7), eps=1e-3, weight_decay=0.2)])
def test_adamw_takes_its_options_and_its_defaults_are_those_of_the_trainings(alone, options):
    ours, theirs = (torch.nn.Linear(4, 3, bias=False).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    expected = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) | options
    opt, reference = AdamW(ours, **options), torch.optim.AdamW(theirs.parameters(), **expected)
    for large in (3.0, 4.0, 5.0):  # is clipped; the small one shows eps
        x = torch.tensor([1e-7, 1e-3, 0.1, large]).double()
        opt.backward(ours(x).sum())
        opt.step(0.1)
        theirs.zero_grad()
        theirs(x).sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-12, rtol=0)


def test_the_plan_is_printed_in_both_ledgers_as_its_flags_say(shell):
    flags = "--params 2e9 --world-size 4 --micro-batches 3 --bandwidth 5 --rlhf"
    lines = shell("zero.py", f"plan {flags}").splitlines()
    rows = [re.split(r"\s\s+", line.strip()) for line in lines]
    heads = [i for i, row in enumerate(rows) if row[0] == "stage"]
    for head, sixteen in zip(heads, (False, True)):
        away = z.plan(2e9, 4, sixteen, 3, offload=True)
        for stage, row in enumerate(z.plan(2e9, 4, sixteen, 3)):
            found = dict(zip(rows[head], map(float, rows[head + 1 + stage])))
            wanted = {"total": row["total"], "offloaded": away[stage]["total"],
                      "host": away[stage]["host"], "sent/step": row["sent/step"],
                      "seconds": row["sent/step"] / 5}
            assert [found[key] * 1e9 for key in wanted] == pytest.approx([*wanted.values()], 1e-3)
    four = [float(row[-1]) * 1e9 for row in rows[heads[2] + 1 : heads[2] + 5]]
    assert four == pytest.approx([row["PPO"] for row in z.rlhf(2e9, 4)], rel=1e-3)

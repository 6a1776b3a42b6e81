"""Runs that are killed, fail or freeze.   python -m pytest tests/test_failures.py

`python tests/test_failures.py 50` kills 50 times instead of a few. A rank here is a fork of a server that has imported
everything (conftest's pool would not survive): it lives milliseconds after its start.
"""

import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import zero as z  # noqa: E402
from test_zero import advance, flat, optimizer  # noqa: E402

CASE, STEPS = "accumulated, clipped", 8


def start(world, function, *arguments):
    """Processes that run function(rank, world, *arguments), their output in files in arguments[0]."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["test_failures"])
    processes = [context.Process(target=quietly, args=(function, rank, world, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def quietly(function, rank, world, folder, *arguments):
    os.dup2(os.open(f"{folder}.said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    function(rank, world, folder, *arguments)


# ------------------------------------------------------------------------------------- kill -9


def life(rank, world, folder, stage, attempt):
    """A run that goes on where the one before was killed, to the end."""
    store = dist.FileStore(f"{folder}.store-{attempt}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    script(z.RunConfig(out=folder, zero=stage, save_every=1 + stage % 2))
    dist.destroy_process_group()


def script(cfg):
    """A script in small. HURT="rank step signal" hurts its first life: that rank in that step (0: it freezes)."""
    opt = optimizer(CASE, cfg.zero, "bf16")
    run, restart = z.Run(cfg, STEPS), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank, at, number = map(int, os.environ.get("HURT", "-1 0 0").split())
    for step in range(run.resume(policy=opt), STEPS):
        if (rank, at, restart) == (dist.get_rank(), step, "0"):
            Path(f"{cfg.out}.pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), number) if number else time.sleep(60)
        run.log(step, norm=advance(opt, CASE, step, step + 1)[0])
        run.boundary(step, policy=opt)
    run.finish(weights=z.keyed_seed(flat(opt.full_parameters()).tobytes()))


def finished(folder):
    """The bits of a run that has ended: metrics without times, a hash of the weights."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["norm"] for row in rows], json.loads((Path(folder) / "eval.json").read_text())


def kill_at_random(folder, stage, kills, seed):
    """Starts runs and kills one rank or both, `kills` times; returns (runs that ended, at which steps one went on)."""
    draw, folder = random.Random(seed), Path(folder)
    folder.mkdir()
    for name in ("first", "whole"):  # the first waits for the server
        began = time.monotonic()
        for process in start(2, life, str(folder / name), stage, 0):
            process.join()
    length, ends, attempt, resumed = time.monotonic() - began, 0, 0, []
    whole = finished(folder / "whole")
    out = folder / "killed"
    while kills or not (out / "eval.json").exists():
        attempt += 1
        assert attempt < 500
        began = time.monotonic()
        processes = start(2, life, str(out), stage, attempt)
        if kills:
            deadline = began + draw.uniform(0.3, 1.0) * length
            while time.monotonic() < deadline and any(p.is_alive() for p in processes):
                time.sleep(0.001)
            if not any(p.is_alive() for p in processes):  # the machine has become faster meanwhile
                length = min(length, time.monotonic() - began)
            victims = draw.choice([processes[:1], processes[1:], processes])
            kills -= any(p.is_alive() for p in victims)
            for process in victims:
                process.kill()
        for process in processes:
            process.join(30)
            assert not process.is_alive(), "a rank waits for a dead one"
        said = Path(f"{out}.said-0").read_text()
        resumed += [int(said.split("resumed at step ")[1].split()[0])] if "resumed at" in said else []
        if (out / "eval.json").exists():
            assert finished(out) == whole
            ends += 1
            if kills:
                shutil.rmtree(out)
    return ends, resumed


@pytest.mark.parametrize("stage", range(4))
def test_a_run_killed_at_random_instants_ends_in_the_bits_of_one_that_was_not(tmp_path, stage):
    ends, resumed = kill_at_random(tmp_path / "runs", stage, 4, stage)
    assert ends


# ------------------------------------------------------------------------- failure of one rank


def failing(rank, world, folder, port, how):
    """Trains under z.launch as a script does; rank 1 fails in step 2."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def main(cfg):
        z.setup(cfg)
        opt = optimizer(CASE, 3, "fp32")
        for step in range(4):
            if rank == 1 and step == 2:
                how()
            advance(opt, CASE, step, step + 1)

    z.launch(main, z.RunConfig, ["--timeout", "3", "--threads", "1"])


def raises():
    raise ValueError("a broken row")


def runs_out_of_memory():
    torch.empty(1 << 60)


def says_what_is_wrong():
    raise SystemExit("data.jsonl:7: broken")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def freezes():
    time.sleep(60)  # with its connections open


@pytest.mark.parametrize("how, said", [
    (raises, "rank 1: ValueError: a broken row"), (runs_out_of_memory, "rank 1: RuntimeError: "),
    (says_what_is_wrong, "rank 1: data.jsonl:7: broken"), (is_killed, "no sign of rank 1: killed"),
    (freezes, "no sign of rank 1: killed, frozen")])
def test_when_a_rank_fails_the_others_end_with_its_message_within_the_timeout(tmp_path, how, said):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    processes = start(3, failing, str(tmp_path / "out"), server.port, how)
    try:
        for rank in (0, 2):
            processes[rank].join(3 + 3 + 4)  # timeout, patience, start
            assert processes[rank].exitcode == 1
            last = Path(f"{tmp_path}/out.said-{rank}").read_text().strip().splitlines()[-1]
            assert said in last and "no sign of rank 0" not in last, last
            assert ("no sign" in last) == (how in (is_killed, freezes))
        if how is raises:
            assert "in raises" in Path(f"{tmp_path}/out.said-1").read_text()  # its traceback
    finally:
        for process in processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------- torchrun


def torchrun(flags, command, **environment):
    """Starts torchrun of this file's script()."""
    said = tempfile.TemporaryFile("w+")  # no pipe: a frozen rank would keep it open
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags.split(), __file__, *command.split()],
                           env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=said, stderr=said)
    return job, said


def ended(job, said):
    """What a torchrun has said, when it has ended."""
    job.wait(60)
    said.seek(0)
    return said.read()


def test_torchrun_restarts_a_run_with_a_killed_rank_and_it_resumes_by_itself(tmp_path):
    for process in start(2, life, str(tmp_path / "whole"), 3, 0):
        process.join()
    flags = f"--zero 3 --save-every 2 --threads 1 --fresh --out {tmp_path}/killed"
    job = torchrun("--standalone --nproc-per-node 2 --max-restarts 1", flags, HURT="1 5 9")
    said = ended(*job)
    assert job[0].returncode == 0 and "no sign of rank 1" in said and "resumed at step 4" in said, said
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")


def two_hosts(folder, port, **environment):
    """Two agents, of a rank each, as on two machines that share a disk."""
    flags = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id run --rdzv-endpoint localhost:{port}"
    line = f"--zero 3 --save-every 2 --threads 1 --timeout 5 --out {folder}"
    return [torchrun(flags, line, **environment) for _ in range(2)]


@pytest.mark.slow
def test_two_hosts_train_what_one_does_and_one_that_vanishes_ends_the_other(tmp_path):
    for process in start(2, life, str(tmp_path / "whole"), 3, 0):
        process.join()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = two_hosts(tmp_path / "two", port, HURT="1 5 0")  # nobody closes a connection
    began = time.monotonic()
    while all(job.poll() is None for job, _ in hosts) and time.monotonic() < began + 40:
        time.sleep(0.1)
    for pid in (tmp_path / "two.pid").read_text().split():
        os.kill(int(pid), signal.SIGKILL)  # the frozen rank: its agent would wait for 30 s
    said = "".join(ended(*host) for host in hosts)
    assert "no sign of rank 1: killed, frozen or cut off" in said, said
    hosts = two_hosts(tmp_path / "two", port + 1)
    assert "resumed at step 4" in "".join(ended(*host) for host in hosts)
    norms, weights = finished(tmp_path / "two")
    assert norms == pytest.approx(finished(tmp_path / "whole")[0], abs=1e-5)


if __name__ == "__main__" and "--out" in sys.argv:
    z.launch(lambda cfg: (z.setup(cfg), script(cfg)), z.RunConfig)
elif __name__ == "__main__":
    for stage in range(4):
        with tempfile.TemporaryDirectory() as folder:
            began, kills = time.time(), int(sys.argv[1]) // 4 + (stage < int(sys.argv[1]) % 4)
            ends, resumed = kill_at_random(Path(folder) / "runs", stage, kills, stage)
            print(f"stage {stage}: {kills} kills, {ends} runs ended in the same bits, gone on at steps {resumed}, "
                  f"{time.time() - began:.0f} s", flush=True)

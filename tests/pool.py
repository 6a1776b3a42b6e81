"""Processes that wait for functions to run as ranks of a process group (see conftest.py)."""

import datetime
import os
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Pool:
    """One process per rank, started when first needed, and again after a call got stuck."""

    LIMIT = 120  # seconds; no call comes near it unless ranks wait for each other

    def __init__(self, folder):
        self.folder, self.calls, self.workers = folder, 0, []

    def __call__(self, world, function, *arguments):
        while len(self.workers) < world:
            here, there = mp.get_context("spawn").Pipe()
            process = mp.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
            process.start()
            self.workers.append((process, here))
        self.calls += 1
        pipes = [pipe for _, pipe in self.workers[:world]]
        for rank, pipe in enumerate(pipes):
            store = str(self.folder / f"store-{self.calls}")
            pipe.send((store, world, rank, function, arguments))
        end = time.monotonic() + self.LIMIT
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0, end - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} is stuck in {function.__name__}")
            answers.append(pipe.recv())
        errors = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def close(self):
        for process, _ in self.workers:
            process.kill()
        self.workers = []


def serve(pipe):
    torch.set_num_threads(1)
    while True:
        store, world, rank, function, arguments = pipe.recv()
        os.environ["LOCAL_RANK"] = str(rank)  # as torchrun sets it: rank 0 builds the files of all
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank,
                                world_size=world, timeout=timeout)
        try:
            answer = (True, function(rank, *arguments))
        except BaseException:  # SystemExit too: the test shall see it
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()  # after an error: wakes the ranks that wait for this one
        pipe.send(answer)

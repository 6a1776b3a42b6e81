"""What all tests share: the sources on the import path, and a pool of ranks that is started once.

`ranks(n, function, *arguments)` calls function(rank, *arguments) on n processes joined by gloo and
returns the list of results. A process costs seconds (it imports torch), a process group
milliseconds: three processes serve all tests of a session, each call with a group of its own.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)  # the models are small: threads cost more than they bring


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    from pool import Pool

    pool = Pool(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture
def alone():
    """A process group of one, in the test's own process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not part of `make test`")

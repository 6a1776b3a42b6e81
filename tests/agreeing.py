"""Runs a script's main as torchrun would, and fails if the ranks' weights differ after any optimizer step.

    torchrun --nproc-per-node 2 tests/agreeing.py pretrain --steps 3 ...
"""

import hashlib
import importlib
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import zero  # noqa: E402

plain_step = zero.AdamW.step


def checked_step(self, lr):
    norm = plain_step(self, lr)
    with self.gathered():
        digest = hashlib.sha256()
        for p in self.model.parameters():
            digest.update(p.detach().double().numpy().tobytes())
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    assert len(set(digests)) == 1, f"ranks differ after step {self.t}"
    return norm


zero.AdamW.step = checked_step
name = sys.argv.pop(1)
script = importlib.import_module(name)
sys.argv[0] = f"{name}.py"  # run.json names the script
command = sys.argv.pop(1) if sys.argv[1] in ("collect", "table") else "main"
config = {"collect": "CollectConfig", "table": "TableConfig", "main": "Config"}[command]
zero.launch(getattr(script, command), getattr(script, config))

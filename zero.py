"""ZeRO by hand: data-parallel training with optimizer state, gradients and parameters split over the ranks.

    python zero.py plan --params 7.5e9 --world-size 64       bytes per GPU and traffic per step of every stage
    torchrun --nproc-per-node 2 zero.py measure               the same table beside live tensors of a real model

Bytes per parameter on each of N ranks, at rest between backward and step (D0 4.2.1; ZeRO paper, section 3):

    stage                            fp32 (4 + 4 + 8)   16-bit weights (2 + 2 + 4 + 4 + 4)   sent per step, k micro-batches
    0  everything on every rank           16                       16                         2Ψ(N-1)/N
    1  Adam's state split              8 + 8/N                  4 + 12/N                       2Ψ(N-1)/N
    2  gradients too                   4 + 12/N                 2 + 14/N                       (k+1)Ψ(N-1)/N
    3  parameters too                  16/N                     16/N                           3kΨ(N-1)/N

Every stage is the last one with one thing less kept: the update is always `adamw_` on a flat shard, the gradient
always the sum over ranks of a flat buffer, so all stages give the same numbers. There is no wrapper around the model:
    optimizer = AdamW(model, stage=3, ...);  optimizer.backward(loss);  optimizer.step(lr)
A loss is a sum divided by its count over the whole optimizer step, all ranks and micro-batches: gradients are
added, never averaged (D4 5.3.2's loss / accumulation_steps is a mean of means, wrong when lengths differ).
"""

import argparse
import datetime
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

# ======================================================================================== launch


@dataclass
class BaseConfig:
    """What every command that runs a model can be told."""

    out: str = "out/run"  # what is written
    seed: int = 0  # of weights, batches and samples
    zero: int = 0  # ZeRO stage 0-3
    device: str = "auto"  # cpu, cuda, or auto: a GPU where there is one
    dtype: str = "auto"  # fp32, bf16, fp16, or auto: bf16 where the device is fast in it
    threads: int = 0  # CPU threads per process; 0: the cores divided by the processes
    deterministic: bool = False  # CUDA: only kernels that give the same bits twice


@dataclass
class RunConfig(BaseConfig):
    """What every training script can be told besides; each script's Config adds its own and sets other defaults."""

    fresh: bool = False  # start over instead of resuming what stands in --out
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows per optimizer step over all processes, whatever their number
    micro_tokens: int = 2048  # padded tokens of one forward pass on one process; less takes less memory
    lr: float = 1e-3  # peak learning rate, after warmup
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    min_lr: float = 0.1  # end of the cosine, as a share of the peak
    weight_decay: float = 0.1  # AdamW's, on weights of two and more dimensions
    grad_clip: float = 1.0  # largest norm of the gradient
    checkpointing: bool = False  # recompute activations in backward (gradient checkpointing, D4 2.4.2)
    save_every: int = 500  # steps between two saved training states
    log_every: float = 10.0  # seconds between two printed lines where the output is not a terminal


# Flags that may change between a run and its resumption: they change speed and memory, not what is trained.
FREE = {"fresh", "micro_tokens", "zero", "device", "dtype", "threads", "checkpointing", "save_every", "log_every"}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_config(Config, argv=None):
    """Config from the command line: a kebab-case flag per field, its comment as the help text."""
    doc = sys.modules[Config.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = "".join(inspect.getsource(c) for c in Config.__mro__ if c is not object)
    for field in fields(Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        text = f"{comment[1] if comment else ''} (default: {field.default!r})".replace("%", "%%")
        kind = argparse.BooleanOptionalAction if isinstance(field.default, bool) else None
        options = {"action": kind} if kind else {"type": type(field.default)}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help=text, **options)
    return Config(**vars(parser.parse_args(argv)))


def launch(main, Config, argv=None):
    """Runs main(config) under `python x.py` and `torchrun x.py` alike, and ends the process group."""
    cfg = parse_config(Config, argv)
    main(cfg)
    if dist.is_initialized():
        dist.destroy_process_group()


def setup(cfg) -> tuple[torch.device, torch.dtype]:
    """Process group, device, threads and seed: the same for one process and for many, so nobody asks which it is."""
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no GPU; use --device cpu, or install a CUDA build")
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        os.environ.setdefault("USE_LIBUV", "0" if sys.platform == "win32" else "1")
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        timeout = datetime.timedelta(minutes=10)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, **alone)
    if cuda:
        torch.cuda.set_device(device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cores = cpu_cores()
    torch.set_num_threads(cfg.threads or max(1, cores // ranks))  # torchrun's own default is 1
    torch.manual_seed(cfg.seed)  # the same on every rank: equal weights; batches are keyed by step instead
    if cfg.dtype not in (*DTYPES, "auto") or cfg.zero not in (0, 1, 2, 3):
        raise SystemExit(f"--dtype is one of {', '.join(DTYPES)}, auto, and --zero one of 0, 1, 2, 3")
    fast = cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = cfg.dtype if cfg.dtype != "auto" else "bf16" if fast else "fp32"
    why = "" if cfg.dtype != "auto" else " (fast here)" if fast else " (no fast bf16 here)"
    print0(f"{dist.get_world_size()} process(es) x {torch.get_num_threads()} threads of {cores} cores, {device}, "
           f"{dist.get_backend()}, {name}{why}, ZeRO stage {cfg.zero}")
    return device, DTYPES[name]


def cpu_cores() -> int:
    """Cores this process may use: the affinity mask, less what a container's quota takes away."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        return cores


def print0(*args, **kwargs):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(*args, **kwargs, flush=True)


def keyed_seed(*key) -> int:
    """A 63-bit seed from anything printable: randomness keyed by (seed, step, row) needs no state to be saved."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def all_sum(*values, device=None) -> list[float]:
    """The sum of each number over all ranks (in float64)."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def everywhere(mine: dict) -> dict:
    """Merges the dicts of all ranks: what each computed for its share, known to all."""
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {key: value for share in shares for key, value in share.items()}


def prepared(ready, build):
    """Rank 0 of each machine builds a file that all ranks need; the others wait on the file, not in a collective,
    which would time out. ready() → bool looks at the disk; build() must end with an atomic rename."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    while not ready():
        build() if first else time.sleep(0.2)


# ======================================================================================== the folder of a run


class Run:
    """Everything a run leaves in --out beside the weights: run.json, metrics.jsonl, eval.json, the state to resume.

    Same --out and same config: the run resumes where it was; another config: one line and an exit; --fresh starts over.
    """

    def __init__(self, cfg, steps, inputs=()):
        """inputs: the files it depends on (data, initial weights); a run whose inputs have changed starts over."""
        self.cfg, self.steps, self.out = cfg, steps, Path(cfg.out)
        self.rank, self.printed, self.units, self.tty = dist.get_rank(), 0.0, 0, sys.stdout.isatty()
        missing = [p for p in inputs if not Path(p).exists()]
        if missing:
            raise SystemExit(f"{missing[0]}: no such file")
        hashes, fresh = {str(p): file_hash(p) for p in inputs}, cfg.fresh
        self.record = {"script": Path(sys.argv[0]).name, "config": asdict(cfg), "inputs": hashes}
        path = self.out / "run.json"
        if path.exists() and not fresh:
            record = json.loads(path.read_text(encoding="utf-8"))
            old, new = record["config"], asdict(cfg)
            differing = [k for k in new if k not in FREE and old.get(k) != new[k]]
            if differing:
                said = ", ".join(f"--{k.replace('_', '-')} {old.get(k)!r} → {new[k]!r}" for k in differing)
                raise SystemExit(f"{cfg.out} holds a run of another config ({said}); --fresh starts over, "
                                 "another --out keeps both")
            changed = [p for p in hashes if record["inputs"].get(p) != hashes[p]]
            if changed:
                print0(f"{changed[0]} has changed since the run in {cfg.out}: starting over")
                fresh = True
            elif (self.out / "eval.json").exists():
                print0(f"{cfg.out} is finished; --fresh trains it again")
                dist.destroy_process_group()
                raise SystemExit(0)
        dist.barrier()  # everyone has read the old run.json
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "eval.json").unlink(missing_ok=True)
            if fresh:
                shutil.rmtree(self.out / "state", ignore_errors=True)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                    cwd=Path(__file__).parent).stdout.strip()
            self.record |= {"commit": commit, "torch": torch.__version__, "python": platform.python_version(),
                            "world_size": dist.get_world_size(), "threads": torch.get_num_threads(),
                            "seconds": 0.0}
            self.write("run.json", self.record)
        dist.barrier()
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_):
        """Ctrl-C and SIGTERM: end at the next step boundary, with the state saved."""
        self.stopping = True

    def write(self, name, content):
        """Writes content as JSON to a file of the folder, atomically (rank 0)."""
        if self.rank == 0:
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
            os.replace(temporary, self.out / name)

    def resume(self, **optimizers) -> int:
        """Loads the newest complete state into the optimizers; returns the step to go on from (0: none)."""
        state = load_state(self.out / "state", optimizers)
        self.first = state.get("step", 0)
        self.seconds = state.get("seconds", 0.0)
        self.path = self.out / "metrics.jsonl"
        if self.rank == 0:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < self.first]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        if self.first:
            print0(f"resumed at step {self.first} of {self.steps}")
        self.began = time.time()
        return self.first

    def log(self, step, units=0, **metrics):
        """Appends a line to metrics.jsonl and shows one: step, metrics, units (tokens) per second, time left.
        A loss that is not finite ends the run, on every rank, with nothing overwritten."""
        broken = [k for k, v in metrics.items() if k.endswith("loss") and not math.isfinite(v)]
        if broken:
            raise SystemExit(f"step {step}: {broken[0]} is not finite; lower --lr, or look at the data of this step")
        elapsed = time.time() - self.began
        self.units += units
        rate, done = self.units / elapsed, step + 1 - self.first
        if self.rank == 0:
            seconds = round(self.seconds + elapsed, 3)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics, "seconds": seconds}) + "\n")
            last = step + 1 == self.steps
            if last or time.time() - self.printed > (0.2 if self.tty else self.cfg.log_every):
                left = int(elapsed / done * (self.steps - step - 1))
                shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                line = f"step {step + 1}/{self.steps}  {shown}  {rate:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
                print("\r\033[K" + line if self.tty else line, end="\n" if last or not self.tty else "", flush=True)
                self.printed = time.time()

    def boundary(self, step, **optimizers):
        """To be called after every step: saves the state when it is time, or when any rank was asked to stop."""
        stop = bool(all_sum(self.stopping, device=next(iter(optimizers.values())).device)[0])
        if stop or (step + 1) % self.cfg.save_every == 0 and step + 1 < self.steps:
            seconds = self.seconds + time.time() - self.began
            save_state(self.out / "state", optimizers, {"step": step + 1, "seconds": seconds})
        if stop:
            print0(f"\nstopped after step {step + 1}; the same command resumes")
            dist.destroy_process_group()
            raise SystemExit(130)

    def finish(self, **result):
        """Writes eval.json last (make's target), and the seconds into run.json."""
        self.record["seconds"] = round(self.seconds + time.time() - self.began, 1)
        self.write("run.json", self.record)
        self.write("eval.json", result)
        if self.rank == 0:
            shutil.rmtree(self.out / "state", ignore_errors=True)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, (int, float)))
        print0(f"{self.out}: {shown}  ({self.record['seconds']:.0f} s)")


def file_hash(path) -> str:
    """sha256 of a file, in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ======================================================================================== two collectives

SENT = {"bytes": 0}  # what this rank sent through the two functions below


def reduce_scatter(full):
    """Sum over ranks of a buffer of N equal slices; rank r gets slice r. Sends (N-1)/N of the buffer."""
    world = dist.get_world_size()
    if world == 1:
        return full
    SENT["bytes"] += full.numel() * full.element_size() * (world - 1) // world
    if full.is_cuda:
        shard = torch.empty(full.numel() // world, dtype=full.dtype, device=full.device)
        dist.reduce_scatter_single(shard, full)
        return shard
    # gloo's reduce_scatter is an all_reduce inside, twice the bytes: exchange the slices and add them here
    slices = torch.empty_like(full)
    dist.all_to_all_single(slices, full)
    return slices.view(world, -1).sum(0)


def all_gather(full, shard):
    """Fills a buffer of N equal slices with every rank's shard. Sends (N-1)/N of the buffer."""
    world = dist.get_world_size()
    SENT["bytes"] += full.numel() * full.element_size() * (world - 1) // world
    if world > 1:
        dist.all_gather_single(full, shard)
    elif full.data_ptr() != shard.data_ptr():
        full.copy_(shard)


# ======================================================================================== sharding


class Unit:
    """Parameters that travel together (one block, or one other layer), as views of one flat buffer.

    The buffer is padded to a multiple of the world size, so all shards are equal. Weights that decay stand first:
    then weight decay is a prefix of the shard, and no mask is kept. `shard` is this rank's slice [lo, hi).
    """

    def __init__(self, name, parameters, stage, dtype, device):
        rank, world = dist.get_rank(), dist.get_world_size()
        order = sorted(parameters, key=lambda p: p.dim() < 2)
        self.name, self.stage, self.parameters = name, stage, order
        self.offsets, self.numel = {}, 0
        for p in order:
            self.offsets[p] = self.numel
            self.numel += p.numel()
        self.trainable = order[0].requires_grad
        self.decayed = sum(p.numel() for p in order if p.dim() >= 2)
        padded = -(-self.numel // world) * world
        self.lo, self.hi = (0, padded) if stage == 0 else (rank * padded // world, (rank + 1) * padded // world)
        exact = torch.zeros(padded, dtype=order[0].dtype, device=device)
        for p, start in self.offsets.items():
            exact[start : start + p.numel()] = p.data.flatten().to(device)
        dist.broadcast(exact, 0)  # ranks may have started from different weights
        self.flat = exact.to(dtype, copy=True)
        self.views = {p: self.flat[s : s + p.numel()].view(p.shape) for p, s in self.offsets.items()}
        for p, view in self.views.items():
            p.data = view
        # Stage 3 keeps the shard and frees the buffer; before that the shard is a slice of the buffer.
        self.shard = self.flat[self.lo : self.hi].clone() if stage == 3 else self.flat[self.lo : self.hi]
        self.absent = torch.tensor(float("nan"), dtype=dtype, device=device)
        self.present = True
        if not self.trainable:
            return
        # 16-bit weights lose updates smaller than 1/256 of themselves: Adam works on an fp32 master copy.
        sixteen = dtype in (torch.bfloat16, torch.float16)
        self.master = exact[self.lo : self.hi].to(torch.float32, copy=True) if sixteen else self.shard
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        # The gradient at rest: whole in stages 0 and 1, this rank's slice in stages 2 and 3.
        self.grad = torch.zeros(padded if stage < 2 else self.hi - self.lo, dtype=dtype, device=device)
        self.bucket, self.arrived = self.grad if stage < 2 else None, 0

    def gather(self):
        """Stage 3: all shards into the buffer, for as long as the layer computes."""
        if not self.present:
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
            all_gather(self.flat, self.shard)
            for p, view in self.views.items():
                p.data = view
            self.present = True

    def release(self):
        """Stage 3: frees the buffer, also under the views that autograd saved: gathering again refills them.
        What is left has the right shape and no memory, and makes a loss NaN should anybody use it."""
        if self.present:
            for p in self.parameters:
                p.data = self.absent.expand(p.shape)
            self.flat.untyped_storage().resize_(0)
            self.present = False


def named_units(module, path="", whole=False):
    """(path, [parameters]) of each unit: every element of a ModuleList whole, every other layer by itself."""
    own = list(module.parameters(recurse=whole))
    if own:
        yield module, path, own
    if not whole:
        for name, child in module.named_children():
            yield from named_units(child, f"{path}.{name}".lstrip("."), isinstance(module, nn.ModuleList))


class Sharded:
    """A model whose parameters live in flat units; in stage 3 each unit is gathered only while its layer computes.

    A frozen model (PPO's reference, reward model) is wrapped up by this alone: it has no gradients and no optimizer.
    """

    def __init__(self, model, stage=0, dtype=None, device=None):
        first = next(model.parameters())
        self.model, self.stage = model, stage
        self.dtype, self.device = dtype or first.dtype, device or first.device
        self.units, self.owner, self.holding = [], {}, 0
        for module, path, parameters in list(named_units(model)):
            for trainable in (True, False):
                new = [p for p in parameters if p not in self.owner and p.requires_grad == trainable]
                if new:  # a tied weight belongs to the layer that names it first
                    unit = Unit(path + ("" if trainable else " (frozen)"), new, stage, self.dtype, self.device)
                    self.units.append(unit)
                    self.owner |= dict.fromkeys(new, unit)
            if stage == 3:
                needed = list(dict.fromkeys(self.owner[p] for p in parameters))
                module.register_forward_pre_hook(lambda m, args, needed=needed: self.use(needed))
                module.register_forward_hook(lambda m, args, out, needed=needed: self.used(m, needed, out))
        self.release()

    def use(self, needed):
        """Gathers the units of the layer that comes now and frees those of the layer before, one layer at a time."""
        if self.stage == 3 and not self.holding:
            for unit in self.units:
                if unit.present and unit not in needed:
                    unit.release()
        for unit in needed:
            unit.gather()

    def used(self, module, needed, output):
        """After a layer's forward: free it now, or, if backward will come, when the next layer is gathered."""
        if not output.requires_grad:
            self.release()
        elif not isinstance(module, nn.Embedding):  # its backward needs no weight
            output.register_hook(lambda grad: self.use(needed))

    def release(self):
        """Frees every gathered unit (stage 3)."""
        if self.stage == 3 and not self.holding:
            for unit in self.units:
                unit.release()

    @contextmanager
    def gathered(self):
        """All parameters at once for a while: one gather per rollout instead of one per token. Collective."""
        self.holding += 1
        for unit in self.units:
            unit.gather()
        try:
            yield
        finally:
            self.holding -= 1
            self.release()

    def full_parameters(self):
        """(name, whole parameter) one by one, for saving: never more than one unit beyond this rank's share."""
        for name, p in self.model.named_parameters():
            self.use([self.owner[p]])
            yield name, p.data.clone()  # a copy outlives the buffer (and numpy would pin it)
        self.release()

    def live_bytes(self) -> dict[str, int]:
        """Bytes of this rank's live tensors by kind, counted on the storages themselves."""
        kinds = {"parameters": [u.flat for u in self.units] + [u.shard for u in self.units]}
        trained = [u for u in self.units if u.trainable]
        kinds["gradients"] = [u.grad for u in trained] + [u.bucket for u in trained if u.bucket is not None]
        seen = {t.untyped_storage().data_ptr() for t in kinds["parameters"]}
        states = [t for u in trained for t in (u.master, u.exp_avg, u.exp_avg_sq)]
        kinds["optimizer"] = [t for t in states if t.untyped_storage().data_ptr() not in seen]
        count = {}
        for kind, tensors in kinds.items():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            count[kind] = sum(storages.values())
        return count


# ======================================================================================== the optimizer


def adamw_(weight, grad, exp_avg, exp_avg_sq, t, lr, beta1, beta2, eps, weight_decay, decayed):
    """One AdamW update in place on flat tensors (Loshchilov & Hutter 2019, algorithm 2); the first `decayed`
    elements shrink by lr · weight_decay, apart from the gradient (that is the W)."""
    weight[:decayed].mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    weight.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**t))


def lr_at(step, steps, peak, warmup=0.05, floor=0.1) -> float:
    """Linear warmup over the first `warmup` share of the steps, then a cosine down to floor · peak, and flat after
    (D4 5.3.1's scheduler climbs again past its end)."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class AdamW(Sharded):
    """AdamW over ZeRO stages 0-3: backward(loss) once per micro-batch, then step(lr)."""

    def __init__(self, model, stage=0, dtype=None, device=None, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 grad_clip=1.0):
        super().__init__(model, stage, dtype, device)
        self.betas, self.eps, self.weight_decay, self.grad_clip = betas, eps, weight_decay, grad_clip
        self.trained, self.t = [u for u in self.units if u.trainable], 0
        # fp16 gradients below 6e-8 vanish: the loss is scaled up, and the scale found by trial (D4 2.4.2)
        self.scale, self.good = (65536.0 if self.dtype == torch.float16 else 1.0), 0
        for unit in self.trained:
            for p in unit.parameters:
                p.register_post_accumulate_grad_hook(self.on_grad)

    def on_grad(self, p):
        """As soon as autograd has a parameter's gradient, it moves into its unit's flat buffer and is freed."""
        unit = self.owner[p]
        if unit.bucket is None:
            unit.bucket = torch.zeros_like(unit.flat) if unit.present else torch.zeros(
                unit.flat.numel(), dtype=self.dtype, device=self.device)
        unit.bucket[unit.offsets[p] : unit.offsets[p] + p.numel()].add_(p.grad.flatten())
        p.grad = None
        unit.arrived += 1
        if self.stage >= 2 and unit.arrived == len(unit.parameters):
            self.reduce(unit)

    def reduce(self, unit):
        """Stages 2 and 3: the unit's gradient is complete; keep this rank's slice of the sum and free the rest."""
        unit.grad += reduce_scatter(unit.bucket)
        unit.bucket = None

    def backward(self, loss):
        """Gradients of one micro-batch are added to those before. Collective in stages 2 and 3: every rank must call
        it equally often (an empty micro-batch takes part with weight 0)."""
        (loss * self.scale).backward()
        for unit in self.trained:
            if self.stage >= 2 and unit.arrived < len(unit.parameters):  # a parameter that took no part in the loss
                unit.bucket = torch.zeros(unit.flat.numel(), dtype=self.dtype, device=self.device) \
                    if unit.bucket is None else unit.bucket
                self.reduce(unit)
            unit.arrived = 0
        self.release()

    @torch.no_grad()
    def step(self, lr) -> float:
        """Clips by the global norm, updates, and returns the norm before clipping (inf: an fp16 overflow, skipped)."""
        grads = []
        for unit in self.trained:
            if self.stage < 2:
                shard = reduce_scatter(unit.grad)
                if self.stage == 0:
                    all_gather(unit.grad, shard)  # reduce-scatter + all-gather = all-reduce
                elif shard is not unit.grad:
                    unit.grad[unit.lo : unit.hi] = shard
            grads.append(unit.grad[unit.lo : unit.hi] if self.stage < 2 else unit.grad)
        # each element is counted once: over all ranks' slices, or on one rank where it holds everything
        square = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads)
        if self.stage > 0:
            dist.all_reduce(square)
        norm = square.sqrt().item() / self.scale
        if math.isfinite(norm):
            self.t += 1
            factor = min(1.0, self.grad_clip / (norm + 1e-6)) / self.scale
            for unit, grad in zip(self.trained, grads):
                decayed = min(max(unit.decayed - unit.lo, 0), unit.hi - unit.lo)
                adamw_(unit.master, grad.to(unit.master.dtype) * factor, unit.exp_avg, unit.exp_avg_sq, self.t, lr,
                       *self.betas, self.eps, self.weight_decay, decayed)
            self.publish()
        elif self.dtype != torch.float16:
            raise SystemExit(f"step {self.t}: the gradient is not finite; lower --lr, or look at the data of this step")
        self.adjust_scale(math.isfinite(norm))
        for unit in self.trained:
            unit.grad.zero_()
        return norm

    def publish(self):
        """Master weights → weights of the training dtype, on every rank that computes with them."""
        for unit in self.trained:
            if unit.master is not unit.shard:
                unit.shard.copy_(unit.master)
            if self.stage in (1, 2):
                all_gather(unit.flat, unit.shard)

    def adjust_scale(self, finite):
        """fp16 only: halve the loss scale at an overflow, double it after 1000 good steps."""
        if self.dtype == torch.float16:
            self.good = self.good + 1 if finite else 0
            self.scale *= 0.5 if not finite else 2.0 if self.good % 1000 == 0 else 1.0

    def state(self) -> dict:
        """This rank's part of the training state: tensors and plain numbers, with the range [lo, hi) of each unit."""
        keys = ("master", "exp_avg", "exp_avg_sq")  # cloned: torch.save writes the whole buffer under a slice
        units = {u.name: {"lo": u.lo, "hi": min(u.hi, u.numel),
                          **{k: getattr(u, k)[: max(0, u.numel - u.lo)].clone() for k in keys}} for u in self.trained}
        return {"t": self.t, "scale": self.scale, "good": self.good, "units": units}

    @torch.no_grad()
    def load(self, parts):
        """parts: the states of all ranks of any world size and stage; this rank picks what it now owns."""
        for unit in self.trained:
            for key in ("master", "exp_avg", "exp_avg_sq"):
                getattr(unit, key).zero_()
                for part in (p["units"][unit.name] for p in parts):
                    lo, hi = max(unit.lo, part["lo"]), min(unit.hi, part["hi"])
                    if lo < hi:
                        getattr(unit, key)[lo - unit.lo : hi - unit.lo] = part[key][lo - part["lo"] : hi - part["lo"]]
        self.t, self.scale, self.good = parts[0]["t"], parts[0]["scale"], parts[0]["good"]
        self.publish()


# ======================================================================================== the state of a run


def save_state(folder, optimizers, numbers):
    """Writes folder/step-N/: a file per rank, then the manifest that makes them valid; keeps this and the one before.
    A kill at any instant leaves the previous manifest whole. Collective."""
    rank, world, step = dist.get_rank(), dist.get_world_size(), numbers["step"]
    target = Path(folder) / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"rank-{rank}.pt"
    with open(path, "wb") as file:
        torch.save({name: optimizer.state() for name, optimizer in optimizers.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    hashes = [None] * world
    dist.all_gather_object(hashes, file_hash(path))
    if rank == 0:
        manifest = target / "manifest.json"
        temporary = target / "manifest.tmp"
        temporary.write_text(json.dumps(numbers | {"files": hashes}), encoding="utf-8")
        os.replace(temporary, manifest)
        for old in sorted(Path(folder).glob("step-*"))[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_state(folder, optimizers) -> dict:
    """Fills the optimizers from the newest state whose files are whole; returns its numbers ({}: nothing there)."""
    chosen = [None]
    if dist.get_rank() == 0:
        for target in sorted(Path(folder).glob("step-*"), reverse=True):
            manifest = target / "manifest.json"
            if not manifest.exists():
                continue  # the run was killed inside this save
            numbers = json.loads(manifest.read_text(encoding="utf-8"))
            files = [target / f"rank-{r}.pt" for r in range(len(numbers["files"]))]
            bad = [f for f, h in zip(files, numbers["files"]) if not f.exists() or file_hash(f) != h]
            if not bad:
                chosen = [(numbers, [str(f) for f in files])]
                break
            print(f"{bad[0]} is damaged; going back to the state before it", flush=True)
    dist.broadcast_object_list(chosen, 0)
    if chosen[0] is None:
        return {}
    numbers, files = chosen[0]
    parts = [torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files]
    for name, optimizer in optimizers.items():
        optimizer.load([part[name] for part in parts])
    return numbers


# ======================================================================================== the planner


def plan(parameters, world, sixteen_bit=True, micro_batches=1) -> list[dict]:
    """Bytes per rank and bytes sent per rank and step, a row per stage (the table of the module's docstring)."""
    weight, state, share = (2, 12, (world - 1) / world) if sixteen_bit else (4, 8, (world - 1) / world)
    rows, sent = [], (2, 2, micro_batches + 1, 3 * micro_batches)
    for stage in range(4):
        held = [weight, weight, state]  # parameters, gradients, optimizer
        for kind, from_stage in ((2, 1), (1, 2), (0, 3)):
            held[kind] /= world if stage >= from_stage else 1
        rows.append({"stage": stage, "parameters": held[0] * parameters, "gradients": held[1] * parameters,
                     "optimizer": held[2] * parameters, "total": sum(held) * parameters,
                     "sent": sent[stage] * share * weight * parameters})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["plan", "measure"])
    parser.add_argument("--params", type=float, default=7.5e9, help="number of parameters (plan)")
    parser.add_argument("--world-size", type=int, default=64, help="number of GPUs (plan)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per optimizer step")
    args = parser.parse_args()
    header = f"{'stage':>5}{'parameters':>14}{'gradients':>14}{'optimizer':>14}{'total':>14}{'sent/step':>14}"
    if args.command == "plan":
        for name, sixteen in (("fp32: 4 + 4 + 8", False), ("16-bit weights: 2 + 2 + 4 + 4 + 4", True)):
            print(f"{name} bytes per parameter, {args.params:.3g} parameters on {args.world_size} ranks, GB\n{header}")
            for row in plan(args.params, args.world_size, sixteen, args.micro_batches):
                print(f"{row['stage']:>5}" + "".join(f"{row[k] / 1e9:>14,.1f}" for k in list(row)[1:]))
        return
    from model import PRESETS, CausalLM, token_logprobs

    device, dtype = setup(RunConfig())
    print0(f"bytes of live tensors on rank 0 at rest, measured and planned; {PRESETS['tiny']}\n{header}")
    for stage in range(4):
        optimizer = AdamW(CausalLM(PRESETS["tiny"]), stage, dtype, device)
        SENT["bytes"] = 0
        for _ in range(args.micro_batches):
            ids = torch.randint(0, 2048, (8, 129), device=device)
            optimizer.backward(-token_logprobs(optimizer.model, ids[:, :-1], ids[:, 1:]).mean())
        live = optimizer.live_bytes()
        optimizer.step(1e-3)
        numbers = (*live.values(), sum(live.values()), SENT["bytes"])
        print0(f"{stage:>5}" + "".join(f"{x:>14,}" for x in numbers))
        size = PRESETS["tiny"].num_parameters()
        row = plan(size, dist.get_world_size(), dtype != torch.float32, args.micro_batches)[stage]
        print0(f"{'plan':>5}" + "".join(f"{row[k]:>14,.0f}" for k in list(row)[1:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

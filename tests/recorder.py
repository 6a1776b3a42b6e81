"""What a rank does in a training step of zero.AdamW, and when: layers compute, collectives travel,
buffers come and go. `record` wraps zero.py's functions from outside; pictures.py draws what it saw.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from unittest.mock import patch

import model  # before torch: it says how torch's threads shall wait
import torch
import torch.distributed as dist
import zero


@dataclass
class Event:
    """In seconds; waited: since when the rank waits for a collective, whose end ends that."""

    kind: str
    unit: str
    start: float
    end: float | None = None
    waited: float | None = None


@dataclass
class Step:
    """marks: when forward, backward and the optimizer's step began, and when all was over."""

    units: list[str]
    marks: list[float]
    events: list[Event]


class Recorder:
    """Notes what this rank does in a step. computed: the event of what is computed now, or None."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.computed = None
        for module, name, _ in zero.named_units(optimizer.model):
            self.hook(module, name)

    def hook(self, module, name):
        """A layer's forward and backward begin when zero.py's hooks have gathered it, so behind
        them; what was computed before ends in front of them."""
        def ended(module, inputs, output):
            self.compute()
            output.register_hook(lambda grad: self.compute())

        def left(module, inputs, output):
            output.register_hook(lambda grad: self.compute("backward", name))

        module.register_forward_pre_hook(lambda module, inputs: self.compute("forward", name))
        module.register_forward_hook(ended, prepend=True)
        module.register_forward_hook(left)

    def note(self, kind, unit) -> Event:
        self.events.append(Event(kind, unit, perf_counter()))
        return self.events[-1]

    def compute(self, kind=None, unit=None):
        """Ends what is being computed and begins this, unless it is the same."""
        now = self.computed
        if now and (kind, unit) == (now.kind, now.unit):
            return
        if now:
            now.end = perf_counter()
        self.computed = self.note(kind, unit) if kind else None

    def look(self):
        """Which buffers are there now?"""
        for unit in self.optimizer.units:
            for kind, there in (("whole weights", unit.filling is not None),
                                ("bucket", unit.bucket is not None)):
                event = self.held.get((kind, unit.name))
                if there and not event:
                    self.held[kind, unit.name] = self.note(kind, unit.name)
                elif event and not there:
                    self.held.pop((kind, unit.name)).end = perf_counter()

    def collective(self, kind, plain, full, *shard):
        unit = next(u for u in self.optimizer.units if full is u.flat or full is u.bucket)
        event = self.note(kind, unit.name)
        result = plain(full, *shard)
        works = result[0] if kind == "reduce-scatter" else result
        self.works |= dict.fromkeys(works, event)
        return result

    def wait(self, plain, works):
        """Nothing is computed meanwhile."""
        computed = self.computed
        for work in works:
            self.compute()
            event = self.works[work]
            event.waited = event.waited or perf_counter()
            plain([work])
            event.end = perf_counter()
        if computed:
            self.compute(computed.kind, computed.unit)

    def adamw_(self, plain, weight, *rest, **named):
        place = weight.untyped_storage().data_ptr()
        unit = next(u for u in self.optimizer.trained
                    if u.master.untyped_storage().data_ptr() == place)
        self.compute("AdamW", unit.name)  # it comes in pieces
        plain(weight, *rest, **named)

    def watching(self) -> ExitStack:
        """Within it zero.py's functions do what they do and tell it."""
        stack = ExitStack()

        def around(name, function):
            stack.enter_context(patch.object(zero, name, partial(function, getattr(zero, name))))

        def then(owner, name, act):
            plain = getattr(owner, name)

            def method(*args):
                result = plain(*args)
                act()
                return result

            stack.enter_context(patch.object(owner, name, method))

        around("all_gather", partial(self.collective, "all-gather"))
        around("reduce_scatter", partial(self.collective, "reduce-scatter"))
        around("wait", self.wait)
        around("adamw_", self.adamw_)
        then(zero.AdamW, "update", self.compute)
        then(zero.AdamW, "finish_sum", self.look)
        for name in ("prefetch", "release", "open_bucket"):
            then(zero.Unit, name, self.look)
        return stack

    def step(self, ids) -> Step:
        """One training step on rows of ids; what is still open ends with it."""
        dist.barrier()  # so that no rank waits for what the other did before
        self.events, self.held, self.works = [], {}, {}
        marks = [perf_counter()]
        self.look()
        logprobs = model.token_logprobs(self.optimizer.model, ids[:, :-1], ids[:, 1:])
        loss = -logprobs.mean() / dist.get_world_size()
        marks.append(perf_counter())
        self.optimizer.backward(loss)
        self.compute()
        marks.append(perf_counter())
        self.optimizer.step(1e-4)
        marks.append(perf_counter())
        for event in self.events:
            event.end = event.end or marks[-1]
        return Step([unit.name for unit in self.optimizer.units], marks, self.events)


def record(stage, config, tokens=64, steps=16) -> Step:
    """The fastest of so many steps, after three to warm up: other programs disturbed it least."""
    torch.manual_seed(0)
    recorder = Recorder(zero.AdamW(model.CausalLM(config), stage))
    found = []
    with recorder.watching():
        for _ in range(3 + steps):
            ids = torch.randint(0, config.vocab_size, (2, tokens + 1))
            found.append(recorder.step(ids))
    return min(found[3:], key=lambda step: step.marks[-1] - step.marks[0])

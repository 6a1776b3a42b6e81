"""Labs: the code passes its own cases; emptied, a lab's cases fail and no other's; mistakes that are
commonly made are told by the case that is about them.   python -m pytest tests/test_labs.py"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import labs
from labs import HERE, LABS

ON_RANKS = [12, 13, 14]  # their cases run on two processes, which import for themselves
ALONE = [number for number in LABS if number not in ON_RANKS]
MISTAKES = [  # lab, what is written, what somebody writes instead, words of the case that tells
    (1, "tokens[-1] = new", "tokens += [new]", "two neighbours"),
    (1, "token == right and tokens and tokens[-1] == left", "{token, *tokens[-1:]} == {left, right}", "the order counts"),
    (2, "x * cos + swapped * sin", "x * cos - swapped * sin", "a quarter turn"),
    (2, "x.roll(x.shape[-1] // 2, dims=-1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)", "a quarter turn"),
    (3, " / math.sqrt(q.shape[-1])", "", "divided by √D"),
    (3, "(scores + mask)", "scores", "-inf in the mask"),
    (3, "softmax(-1)", "softmax(-2)", "looks at all of them equally"),
    (4, "ids[:, 1:]", "ids[:, :-1]", "a target is the NEXT token"),
    (4, "mask[:, 1:] == 0", "mask[:, :-1] == 0", "a target is the NEXT token"),
    (4, ", more=1)  # (B, T + 1)", ")", "inputs are the ids"),
    (5, "softplus(-margins", "softplus(margins", "the better one 1 ahead"),
    (5, "F.softplus(-margins[better])", "-margins[better].sigmoid().log()", "-1000 costs 1000"),
    (5, "labels[:, None] > labels", "labels[:, None] >= labels", "the better one 1 ahead"),
    (5, ".mean()", ".sum()", "three replies"),
    (6, "gamma * next_value", "next_value", "λ = 0"),
    (6, "next_value = 0.0", "next_value = values[-1]", "λ = 0"),
    (6, "gamma * lam * next_advantage", "lam * next_advantage", "between"),
    (6, "advantages + values", "advantages", "targets are A + V"),
    (7, "torch.max(-advantages * ratio, -advantages * clipped)", "-advantages * clipped", "became MORE likely"),
    (7, "torch.max(-advantages * ratio", "torch.min(-advantages * ratio", "A > 0 and the token"),
    (7, "logprobs - old_logprobs", "old_logprobs - logprobs", "the ratio is"),
    (7, "clamp(1 - cliprange, 1 + cliprange)", "clamp(max=1 + cliprange)", "no less than 0.8"),
    (8, "rewards[-1] += score", "rewards += score", "at the last token alone"),
    (8, "-kl_coef * kl", "kl_coef * kl", "costs β"),
    (8, "k3(-kl)", "k3(kl)", "k3 as the price"),
    (8, "torch.expm1(log_ratio) - log_ratio", "torch.exp(log_ratio) - 1 - log_ratio", "keeps its digits"),
    (8, "torch.expm1(log_ratio) - log_ratio", "-log_ratio", "k3 = r - 1"),
    (8, "return rewards", "pass", "at the last token alone"),
    (9, "better - worse", "worse - better", "chosen 3 nats"),
    (9, "chosen - ref_chosen", "chosen", "policy = reference"),
    (9, "-F.logsigmoid(better - worse)", "-(better - worse).sigmoid().log()", "not inf"),
    (9, "better.detach()", "better", "carry no gradient"),
    (10, "self.scale * self.lora_B", "self.lora_B", "W·x + bias"),
    (10, "if self.on", "if True", "switched off"),
    (10, "self.matrix() + self.scale * change", "self.matrix() + change", "merged into one"),
    (11, "return checkpoint(layer, *inputs, use_reentrant=False)", "pass", "once more"),
]
ON_RANKS_MISTAKES = [
    (12, "unit.shard)", "own_slice(unit.flat) * 0)", "stage 1 trains"),
    (13, "unit.grad += total", "unit.grad = total.clone()", "parts of two micro-batches"),
    (13, "unit.received = None", "pass", "bucket is gone"),
    (14, "self.show()", "pass", "stage 3 trains"),
    (14, "self.flat.untyped_storage().resize_(0)", "pass", "no gathered buffer"),
]


def use(monkeypatch, module, source):
    """What the labs import by this name is now made of that source."""
    made = importlib.util.module_from_spec(importlib.util.spec_from_loader(module, loader=None))
    made.__file__ = str(HERE / f"{module}.py")
    monkeypatch.setitem(sys.modules, module, made)
    exec(compile(source, made.__file__, "exec"), made.__dict__)


def source_of(module):
    return (HERE / f"{module}.py").read_text(encoding="utf-8")


def changed(number, old, new):
    """{module: its source} with a mistake in the lab's functions, and nowhere else."""
    found = {}
    for module, names in LABS[number].emptied.items():
        lines = source_of(module).splitlines(keepends=True)
        for first, last in labs.bodies("".join(lines), names):
            body = "".join(lines[first - 1 : last])
            if old in body:
                found[module] = "".join([*lines[: first - 1], body.replace(old, new), *lines[last:]])
    assert found, f"lab {number} has no {old}"
    return found


@pytest.fixture(autouse=True)
def two_ranks(ranks):
    labs.POOL[:] = [ranks]
    yield
    labs.POOL.clear()


@pytest.mark.parametrize("number", LABS)
def test_the_code_passes_each_lab(number, capsys):
    assert labs.check(number)
    printed = capsys.readouterr().out
    assert printed.count("✓") == len(LABS[number].cases) >= 3 and "✗" not in printed
    assert f"All {len(LABS[number].cases)} are right" in printed


@pytest.mark.parametrize("number", ALONE)
def test_an_emptied_lab_fails_as_empty_and_no_other_lab_fails(number, monkeypatch, capsys):
    for module, names in LABS[number].emptied.items():
        use(monkeypatch, module, labs.empty(source_of(module), number, names))
        for name in names:  # what is to be written stands there
            function = sys.modules[module]
            for part in name.split("."):
                function = getattr(function, part)
            assert function.__doc__
    assert [other for other in ALONE if not labs.check(other)] == [number]
    failed = capsys.readouterr().out.split("✗")[1]
    assert "still empty" in failed.split("Lab ")[0]


@pytest.mark.parametrize("number, old, new, words", MISTAKES)
def test_a_mistake_is_told_by_the_case_about_it(number, old, new, words, monkeypatch, capsys):
    for module, source in changed(number, old, new).items():
        use(monkeypatch, module, source)
    assert not labs.check(number)
    told = capsys.readouterr().out.split("✗")[1]
    assert words in told.splitlines()[0] and "expected" in told and "got" in told


def in_copy(tmp_path, number, old="", new=""):
    """What `check` prints in a copy whose lab is emptied or, if there is an `old`, has a mistake."""
    folder = tmp_path / "copy"
    labs.start(number, folder)
    for module, source in (changed(number, old, new) if old else {}).items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    which = [] if number not in ON_RANKS else [str(number)]
    done = subprocess.run([sys.executable, "tests/labs.py", "check", *which], cwd=folder,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    return done.stdout


def test_a_copy_has_the_one_function_empty_and_all_other_labs_pass(tmp_path, capsys):
    printed = in_copy(tmp_path, 6)
    assert "copy/ppo.py:" in capsys.readouterr().out  # where to write
    failed = [part for part in printed.split("Lab ") if "✗" in part]
    assert len(failed) == 1 and failed[0].startswith("6: Advantages")
    assert "still empty: write gae in ppo.py" in failed[0]
    kept = (tmp_path / "copy" / "ppo.py").read_text(encoding="utf-8")
    assert "Generalized advantage estimation" in kept and "next_advantage = advantages[t]" not in kept
    with pytest.raises(SystemExit, match="there already"):
        labs.start(6, tmp_path / "copy")


@pytest.mark.parametrize("number", ON_RANKS)
def test_an_emptied_stage_of_zero_fails_as_empty(number, tmp_path):
    assert "still empty" in in_copy(tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number, old, new, words", ON_RANKS_MISTAKES)
def test_a_mistake_in_zero_is_told_by_the_case_about_it(number, old, new, words, tmp_path):
    told = in_copy(tmp_path, number, old, new).split("✗")[1]
    assert words in told.splitlines()[0]


def test_the_list_names_every_lab_and_every_function_stands_where_it_says(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["labs.py"])
    labs.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(LABS)
    for lab, line in zip(LABS.values(), lines):
        assert lab.title in line and lab.read in line
        for module, names in lab.emptied.items():
            assert len(labs.bodies(source_of(module), names)) == len(names)


def test_a_lab_that_is_not_there_is_said_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["labs.py", "start"])
    with pytest.raises(SystemExit, match="which lab"):
        labs.main()
    monkeypatch.setattr(sys, "argv", ["labs.py", "check", "99"])
    with pytest.raises(SystemExit, match="labs 1 to 14"):
        labs.main()
    done = subprocess.run([sys.executable, "tests/labs.py", "check", "1"], cwd=HERE, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0 and ("make lab N=1 first" in done.stdout) != (HERE / "labs" / "1").exists()

"""What README.md and its Chinese first page say, as far as it can be checked without training: links, commands and
flags, names of functions, and that both pages give the same numbers.   python -m pytest tests/test_readme.py"""

import ast
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import pytest

from experiments import EXPERIMENTS
from labs import LABS

HERE = Path(__file__).parents[1]
PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in ("README.md", "assets/README.zh.md")}
SCRIPTS = "model data pretrain sft reward ppo dpo zero".split()


def headings(page):
    """Anchors as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def test_the_labs_point_to_headings_and_every_claim_that_is_tried_has_a_row():
    for lab in LABS.values():
        for title in re.findall(r"README, ([^)]+)\)", " ".join(str(part) for part in vars(lab).values())):
            assert f"### {title}\n" in PAGES["README.md"], title
    table = PAGES["README.md"].partition("### What the documents claim\n")[2].partition("\n###")[0]
    named = set(re.findall(r"^\| .* \| `([\w-]+)` \|", table, re.M))
    assert named == {name for name, experiment in EXPERIMENTS.items() if experiment.expected}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert len(links) >= 5
    for link in links:
        file, _, anchor = link.partition("#")
        if "://" in file:
            continue
        target = (HERE / page).parent / file if file else HERE / page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(str(target.resolve().relative_to(HERE))), link


def commands(page):
    """(script, subcommand or "", its flags) of everything in backticks or code that runs a script."""
    text = PAGES[page].replace("\\\n", " ")
    for line in re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?:python|torchrun|    pretrain).*", text, re.M):
        for script, rest in re.findall(r"(?<![\w/])(\w+)\.py((?: [^|`]*)?)", line):
            if script in SCRIPTS:
                words = rest.split(" #")[0].split()
                sub = words[0] if words and re.fullmatch("[a-z]+", words[0]) else ""
                yield script, sub, re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest)


@lru_cache(None)
def help_of(script, sub):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"{script}.py", *filter(None, [sub]), "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
    assert not ended.value.code, f"{script}.py {sub}: {ended.value.code}"
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_takes_the_flags_it_is_shown_with(page):
    seen = set()
    for script, sub, flags in commands(page):
        seen.add((script, sub))
        for flag in flags:
            assert re.search(rf"{flag}\b", help_of(script, sub)), f"{script}.py {sub} has no {flag}"
    assert len(seen) >= 12


@lru_cache(None)
def names_in(script):
    """Functions, classes, methods and upper-case constants of a file."""
    tree = ast.parse((HERE / f"{script}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_is_named_beside_a_file_stands_in_it(page):
    """Of the form: model.py `Attention`, `Block`; ...  up to the next file or cell."""
    checked = 0
    for script, rest in re.findall(r"(?<![\w/])(\w+)\.py[ ,,]((?:`[^`]+`(?: \([^)`|]*\))?[ ,、,]*)+)", PAGES[page]):
        if script not in SCRIPTS:
            continue
        for name in re.findall(r"`([^`]+)`", rest):
            if re.fullmatch(r"[A-Za-z_][\w.]*", name) and name != "torchrun":
                checked += 1
                known = names_in(script) | {key.split(".")[-1] for key in names_in(script)}
                assert name in known, f"{script}.py has no {name}"
    assert checked >= 30


def rows(text):
    """{numbers of a row's cells: its name}, of the first table with the four stages."""
    table = text.split("| | base | sft | ppo | dpo |", 1)[1].split("\n\n", 1)[0]
    return [line.split("|")[2:] for line in table.splitlines() if "±" in line]


def test_both_pages_have_the_same_numbers():
    english, chinese = (rows(page) for page in PAGES.values())
    assert english == chinese and len(english) == 10


def test_the_chinese_page_lists_each_lab_with_its_functions():
    table = PAGES["assets/README.zh.md"].split("## 实验课")[1].split("## ")[0]
    for number, lab in LABS.items():
        row = re.search(rf"^\| {number} \|.*$", table, re.M)[0]
        assert lab.read in row
        for module, names in lab.emptied.items():
            assert f"{module}.py" in row and all(f"`{name}`" in row for name in names)
    assert table.count("\n| ") == len(LABS) + 1


def test_every_stage_command_of_the_makefile_is_described():
    makefile = (HERE / "Makefile").read_text(encoding="utf-8")
    for target in re.search(r"\.PHONY: (.*)", makefile)[1].split():
        assert re.search(rf"^{target}:", makefile, re.M)
    for command in ("make lab N=7", "make check N=7"):
        assert all(command in page for page in PAGES.values())

"""How the eight files read, as numbers: code lines, tokens a code line, long lines, long functions.

    python tests/style.py    one line a file; exits with 1 if a limit is passed (a lab need not care)

A token is one of Python's own, strings and comments not counted; so few of them a line means one
thought a line. A limit in lines alone would reward the lines that stop a reader.
"""

import ast
import sys
import tokenize
from pathlib import Path

FILES = "model data zero pretrain sft reward ppo dpo".split()
COLUMNS, TOKENS, FUNCTION, MAIN = 100, 11.0, 45, 60
PASSED = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING", "STRING"}


def tokens_of(file) -> list:
    """The tokens that count. An f-string is a string: Python 3.12 takes it apart, 3.11 does not."""
    found = []
    inside = 0  # f-strings may stand in f-strings
    for token in tokenize.tokenize(file.readline):
        kind = tokenize.tok_name[token.type]
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind not in PASSED and kind != "FSTRING_END" and not inside:
            found.append(token)
    return found


def faults(path) -> list[str]:
    """Prints the file's numbers; returns what is over a limit."""
    lines = path.read_text(encoding="utf-8").splitlines()
    with open(path, "rb") as file:
        found = tokens_of(file)
    code = len({token.start[0] for token in found})
    ratio = len(found) / code
    print(f"{path.name:<12} {len(lines):>5} lines {code:>5} of code {ratio:>6.2f} tokens a line")
    wrong = [f"line {i} is longer than {COLUMNS}" for i, line in enumerate(lines, 1)
             if len(line) > COLUMNS]
    if ratio > TOKENS:
        wrong.append(f"{ratio:.2f} tokens a line of code, more than {TOKENS}")
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > (MAIN if node.name == "main" else FUNCTION):
                wrong.append(f"{node.name} has {length} lines")
    return [f"{path.name}: {fault}" for fault in wrong]


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    wrong = [fault for name in FILES for fault in faults(root / f"{name}.py")]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))

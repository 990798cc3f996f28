"""What the pages say is so: Python examples run and give what their comments say, commands and links exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowprec import benches, studies
from lowprec.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for folder in ("*.md", "docs/**/*.md", "cuda/*.md", "sparse/**/*.md", "studies/**/*.md")
    for path in sorted(ROOT.glob(folder))
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


def blocks(page: Path, language: str) -> Iterator[tuple[str, int]]:
    """Fenced blocks of one language, and the line of the page on which each begins."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence[1] == language:
            yield fence[2], text[: fence.start(2)].count("\n")


def run_example(page: Path, code: str, line: int, names: dict[str, Any]) -> int:
    """Run a block; an expression followed by a comment must have that value. Returns how many did."""
    tree, lines, compared = ast.parse(code), code.splitlines(), 0
    ast.increment_lineno(tree, line)
    for statement in tree.body:
        assert statement.end_lineno is not None
        said = lines[statement.end_lineno - line - 1].partition("  # ")[2]
        if isinstance(statement, ast.Expr) and said and "print(" not in ast.unparse(statement):
            value = eval(compile(ast.Expression(statement.value), str(page), "eval"), names)
            assert repr(value) == said, f"{name(page)}, line {statement.lineno}"
            compared += 1
        else:
            exec(compile(ast.Module([statement], []), str(page), "exec"), names)
    return compared


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=name)
def test_examples_run_and_say_what_comes_out(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    compared = sum(run_example(page, code, line, names) for code, line in blocks(page, "python"))
    assert compared >= 5 or page.name != "README.md"


def test_a_wrong_comment_is_found() -> None:
    with pytest.raises(AssertionError, match="line 3"):
        run_example(ROOT / "README.md", "1 + 1  # 2\n1 + 1  # 3\n", 1, {})


def commands(page: Path) -> Iterator[list[str]]:
    for block, _ in blocks(page, "sh"):
        yield from (words for line in block.splitlines() if (words := shlex.split(line, comments=True)))


COMMANDS = sorted({tuple(words) for page in PAGES for words in commands(page)})


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "lowprec"], ids=" ".join)
def test_commands_run(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "run", lambda name, options, *, out, **rest: out)
    monkeypatch.setattr(benches, "run", lambda name, settings: {"ok": True})
    monkeypatch.setattr(benches, "show", lambda *args: None)
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {words[1] for words in COMMANDS if words[0] == "make"}
    assert {"study", "test"} <= asked <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    local = [link for link in map("".join, links) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in local if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing

"""`python -m reports.api`: docs/api.md from the public docstrings of flashjvp.

The source is parsed, not imported. With --check nothing is written: the exit status is 1 if the page is not that of the
docstrings.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashjvp_commands import arguments as types
from flashjvp_commands import ending

from .environment import IS_CHECKOUT, ROOT

PAGE = ROOT / "docs" / "api.md"
PACKAGE = ROOT / "flashjvp"
WIDTH = 120
TOP = """\
# API

Everything that `flashjvp` exports, and what `flashjvp.integrations` has for other packages, from the docstrings.
[Reference](reference.md) has features, backends, errors and limits by topic; the README has
[examples](../README.md#use), and [examples](examples.md) has longer ones.

This page is generated: edit the docstrings, then run `python -m reports.api`.
"""
DIVIDED = "distributed"
DIVIDED_TOP = """\
# flashjvp.distributed

What `import flashjvp.distributed` brings besides, for sequences that are divided over processes
([distributed.md](distributed.md)).
"""
# Functions that have to be imported by the module that they stand in, which needs another package when it is called.
BY_MODULE = (("integrations.transformers", "register"), ("integrations.diffusers", "register"))
LINKS = (
    (re.compile(r"(?<!\]\()flashjvp/kernels/MATH\.md"), "[MATH.md](../flashjvp/kernels/MATH.md)"),
    (re.compile(r"arXiv (\d{4}\.\d{5})"), r"[arXiv \1](https://arxiv.org/abs/\1)"),
)
SECTION = re.compile(r"^([A-Z]\w+):$")
ENTRY = re.compile(r"^(\w+): (.*)$")
Definition = ast.FunctionDef | ast.ClassDef


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the page is that of the docstrings (after writing, unless --check), else 1."""
    parser = types.parser("python -m reports.api", "docs/api.md from the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page is stale")
    options = parser.parse_args(arguments)
    if not IS_CHECKOUT:
        parser.error("expected a checkout of the project, which has docs/; this is an installed package")
    text = page(PACKAGE)
    if not PAGE.exists() or PAGE.read_text() != text:
        if options.check:
            print(f"{PAGE.name} is not that of the docstrings: run python -m reports.api")
            return 1
        PAGE.write_text(text)
    return 0


def page(package: Path) -> str:
    """The whole page: functions first, then classes, each in the order of `__all__`, BY_MODULE, then DIVIDED."""
    found = list(exported(package))
    functions = [node for node in found if isinstance(node, ast.FunctionDef)]
    classes = [node for node in found if isinstance(node, ast.ClassDef)]
    parts = [TOP, *(_entry(node, _signature(node)) for node in functions)]
    parts += [_entry(node, _fields(node)) for node in classes]
    for module, name in BY_MODULE:
        if (source := package / f"{module.replace('.', '/')}.py").exists():
            node = _definition(source, name)
            assert isinstance(node, ast.FunctionDef)
            parts.append(_entry(node, _signature(node), f"{module}.{name}"))
    if (package / DIVIDED / "__init__.py").exists():
        parts.append(DIVIDED_TOP)
        for node in exported(package / DIVIDED):
            head = _fields(node) if isinstance(node, ast.ClassDef) else _signature(node)
            parts.append(_entry(node, head, f"{DIVIDED}.{node.name}"))
    return "\n".join(parts)


def _definition(source: Path, name: str) -> Definition:
    body = ast.parse(source.read_text()).body
    return next(node for node in body if isinstance(node, Definition) and node.name == name)


def exported(package: Path) -> Iterator[Definition]:
    """The definitions of the names in `__all__` of a package, which it imports from modules of its own."""
    tree = ast.parse((package / "__init__.py").read_text())
    sources = {
        alias.name: package / f"{node.module.replace('.', '/')}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    for name in names:
        yield _definition(sources[name], name)


def _signature(function: ast.FunctionDef) -> str:
    """A parameter a line."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + [*given.defaults]
    lines = [_parameter(name, default) for name, default in zip(given.args, defaults, strict=True)]
    if given.kwonlyargs:
        lines.append("*")
        lines += [_parameter(name, default) for name, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return "\n".join([f"{function.name}(", *(f"    {line}," for line in lines), f"){returns}"])


def _parameter(name: ast.arg, default: ast.expr | None) -> str:
    text = f"{name.arg}: {ast.unparse(name.annotation)}" if name.annotation else name.arg
    text = text.replace("Maybe", "Tensor | None")
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _fields(node: ast.ClassDef) -> str:
    """The bases of a class, and what a dataclass holds."""
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    # ruff, which formats the page too, wants double quotes
    fields = [f"    {ast.unparse(line)}".replace("'", '"') for line in node.body if _is_field(line)]
    return "\n".join([f"class {node.name}{bases}{':' if fields else ''}", *fields])


def _is_field(line: ast.stmt) -> bool:
    return isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_"


def _entry(node: Definition, head: str, name: str = "") -> str:
    """A heading, the signature and the docstring."""
    lines = (ast.get_docstring(node) or "").splitlines()
    return f"## {name or node.name}\n\n```py\n{head}\n```\n\n" + "\n".join(_blocks(lines)).rstrip() + "\n"


def _blocks(lines: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: sections as bold names, equations as code, `name: text` as a list, all else as paragraphs."""
    i = 0
    while i < len(lines):
        if not lines[i].strip():
            yield ""
            i += 1
        elif section := SECTION.match(lines[i]):
            end = _end(lines, i + 1)
            yield f"**{section[1]}**\n"
            yield from _blocks(textwrap.dedent("\n".join(lines[i + 1 : end])).strip().splitlines())
            yield ""
            i = end
        elif entry := ENTRY.match(lines[i]):
            end = _end(lines, i + 1, blanks=False)
            yield _filled(" ".join([f"`{entry[1]}`: {entry[2]}", *(line.strip() for line in lines[i + 1 : end])]), "- ")
            i = end
        else:
            end = i
            while end < len(lines) and lines[end].strip():
                end += 1
            text = " ".join(line.strip() for line in lines[i:end])
            yield _filled(text.removesuffix(":") if text.endswith("::") else text, "")
            i = end
            if text.endswith("::"):
                end = _end(lines, i)
                code = textwrap.dedent("\n".join(lines[i:end])).strip("\n")
                yield f"\n```text\n{code}\n```\n"
                i = end


def _end(lines: Sequence[str], start: int, blanks: bool = True) -> int:
    """Where the indented lines from `start` on end."""
    end = start
    while end < len(lines) and (lines[end].startswith(" ") or (blanks and not lines[end].strip())):
        end += 1
    return end


def _filled(text: str, mark: str) -> str:
    """A paragraph in Markdown; asterisks outside of code are no emphasis."""
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)
    for pattern, link in LINKS:
        text = pattern.sub(link, text)
    return textwrap.fill(
        text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(ending.run(main))

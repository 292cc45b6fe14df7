"""docs/api.md is that of the docstrings, and says all that they say."""

import ast
import re
from pathlib import Path

import pytest

import flashjvp
from reports import api

MODULE = '''
from math import inf

class Sizes:
    """Two sizes; `str()` is for a reader.

    rows: of a tile,
        in its order.
    """

    rows: int
    columns: int = 4


def scaled(x: float, scale: float | None = None, *, name: str = "x") -> float:
    """Scales a number.

    With c the scale::

        y = c * x

    Any c in [-inf, inf].

    Args:
        x: a number * 1,
            finite.

    Source:
        flashjvp/kernels/MATH.md (1); arXiv 2307.08691.
    """
    return x
'''
PAGE = """
## scaled

```py
scaled(
    x: float,
    scale: float | None = None,
    *,
    name: str = 'x',
) -> float
```

Scales a number.

With c the scale:

```text
y = c * x
```

Any c in [-inf, inf].

**Args**

- `x`: a number \\* 1, finite.

**Source**

[MATH.md](../flashjvp/kernels/MATH.md) (1); [arXiv 2307.08691](https://arxiv.org/abs/2307.08691).

## Sizes

```py
class Sizes:
    rows: int
    columns: int = 4
```

Two sizes; `str()` is for a reader.

- `rows`: of a tile, in its order.
"""


def package(tmp_path: Path) -> Path:
    (tmp_path / "__init__.py").write_text('from .module import Sizes, scaled\n\n__all__ = ["Sizes", "scaled"]\n')
    (tmp_path / "module.py").write_text(MODULE)
    return tmp_path


def test_the_page_is_that_of_the_docstrings() -> None:
    assert api.page(api.PACKAGE) == api.PAGE.read_text(), "run python -m reports.api"


def test_every_exported_name_has_its_entry() -> None:
    headings = re.findall(r"^## (\w+)$", api.PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted(flashjvp.__all__)


def test_what_other_packages_are_served_by_has_its_entry() -> None:
    for package in ("transformers", "diffusers"):
        entry = api.PAGE.read_text().split(f"\n## integrations.{package}.register\n")[1].split("\n## ")[0]
        assert f"{package} is not installed" in entry


@pytest.mark.parametrize("name", flashjvp.__all__)
def test_every_word_of_a_docstring_is_on_the_page(name: str) -> None:
    (node,) = [node for node in api.exported(api.PACKAGE) if node.name == name]
    entry = api.PAGE.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    words = re.findall(r"\w+", (ast.get_docstring(node) or "").replace("flashjvp/kernels/MATH.md", "MATH.md"))
    assert set(words) <= set(re.findall(r"\w+", entry))


def test_sections_equations_and_lists_are_markdown(tmp_path: Path) -> None:
    assert api.page(package(tmp_path)) == api.TOP + PAGE


def test_the_command_writes_or_says_that_the_page_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "PACKAGE", package(tmp_path))
    monkeypatch.setattr(api, "PAGE", tmp_path / "api.md")
    assert api.main(["--check"]) == 1
    assert "run python -m reports.api" in capsys.readouterr().out
    assert not api.PAGE.exists()
    assert api.main([]) == api.main(["--check"]) == 0

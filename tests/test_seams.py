"""Tests, verify and bench replace parts of flashjvp at its documented seams, and patch nothing else of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What CONTRIBUTING.md documents.
SEAMS = {
    "flashjvp.environment": "another machine",
    "flashjvp._torch": "a PyTorch without one of its private names",
    "flashjvp.dispatch.derivatives.attention": "which calls reach the dispatcher, and with what",
    "flashjvp.dispatch.derivatives.attention_jvp": "likewise",
    "flashjvp.kernels.hopper": "other kernels, for the emulator to judge",
}
# Each is of one test of that very file, or of what judges it.
OF_ITS_OWN_FILE = {
    "flashjvp.kernels.launch.selfcheck": {"_checked", "_checked_card", "SUBJECT", "_THREAD.checks"},
    "flashjvp.kernels.launch.driver": {"_MOST_ENCODED"},
    "flashjvp.kernels.launch.replay": {"TensorKeyedCache.find", "CapturedCall.replay"},
    "flashjvp.kernels.launch.schedule": {"input_precision", "high_precision", "ARCHITECTURES"},
    "flashjvp.backends.triton": {"hopper_of"},
    "flashjvp.backends.select": {"obstacle"},
    "flashjvp.support": {"installed"},
    "flashjvp.integrations.diffusers": {"attention"},
    # test_fast_path_of_patterns.py tells which backward passes reach the dispatcher.
    "flashjvp.dispatch.derivatives": {"Gradients.__call__"},
    # test_replay_of_patterns.py: what a bound call and a replayed one do not ask again.
    "flashjvp.backends": {"partial._Partial.ends_in", "rows_first._heads_first"},
    # test_counts.py counts what a call does besides its backend.
    "flashjvp.backends.tiled": {"forward_jvp", "backward_jvp"},
    # bench.host times the steps of a replay one by one.
    "flashjvp.kernels.launch": {"replay.CapturedCall._replay", "driver.Launch.__call__"},
}
PATCHES = {"setattr", "object", "delattr", "setitem", "delitem", "multiple"}


def patched(source: str) -> Iterator[str]:
    """Dotted names in flashjvp that a file replaces: by a patch, or by an assignment."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flashjvp":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or "flashjvp": alias.name for alias in node.names if alias.name[:8] == "flashjvp"}

    def path(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Subscript):
            return path(node.value)
        if isinstance(node, ast.Attribute):
            owner = path(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (x for t in targets if isinstance(t, ast.Attribute | ast.Subscript) and (x := path(t)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            first, *rest = node.args
            if called in PATCHES | {"patch"} and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield from [first.value] if first.value.startswith("flashjvp.") else []
            elif called in PATCHES and (owner := path(first)) is not None:
                name = rest[0].value if rest and isinstance(rest[0], ast.Constant) else ""
                yield f"{owner}.{name}" if name else owner


def is_allowed(name: str) -> bool:
    return any(name == seam or name.startswith(f"{seam}.") for seam in SEAMS) or any(
        name == f"{owner}.{x}" for owner, attributes in OF_ITS_OWN_FILE.items() for x in attributes
    )


@pytest.mark.parametrize("folder", ["tests", "verify", "bench"])
def test_flashjvp_is_patched_at_its_seams_alone(folder: str) -> None:
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    wrong = [f"{path.relative_to(ROOT)}: {x}" for path in files for x in patched(path.read_text()) if not is_allowed(x)]
    assert not wrong


def test_every_exception_is_used() -> None:
    files = [path for folder in ("tests", "verify", "bench") for path in (ROOT / folder).rglob("*.py")]
    found = {x for path in files for x in patched(path.read_text())}
    assert {f"{owner}.{x}" for owner, names in OF_ITS_OWN_FILE.items() for x in names} <= found


@pytest.mark.parametrize(
    "source",
    [
        'monkeypatch.setattr(schedule, "lookup", None)',
        'patch.object(schedule, "lookup", None)',
        'monkeypatch.setattr("flashjvp.kernels.launch.schedule.lookup", None)',
        "schedule.lookup = None",
        'monkeypatch.setitem(schedule.TABLES, "sm_90", {})',
        'schedule.TABLES["sm_90"] = {}',
    ],
)
def test_a_patch_is_seen(source: str) -> None:
    (name,) = patched(f"from flashjvp.kernels.launch import schedule\n{source}\n")
    assert name.startswith("flashjvp.kernels.launch.schedule") and not is_allowed(name)

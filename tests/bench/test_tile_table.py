"""The search rewrites a table of tiles in place: one entry changes, the style stays."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from bench import tile_table
from flashjvp.kernels.launch import schedule
from flashjvp.kernels.launch.hopper_tables import PIPELINES
from flashjvp.kernels.launch.schedule import Tile


def test_the_file_of_tiles_holds_every_entry_and_keeps_the_style(tmp_path: Path) -> None:
    path = tmp_path / "tables.py"
    tile_table.write(path, "half", {})
    (assigned,) = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.AnnAssign)]
    assert assigned.value is not None
    assert ast.literal_eval(assigned.value) == schedule.TABLES  # a named tuple is equal to a tuple
    assert list(tmp_path.iterdir()) == [path]
    judge_style(path)


def judge_style(path: Path) -> None:
    if ruff := shutil.which("ruff", path=str(Path(sys.executable).parent)):
        for command in (["format", "--check"], ["check"]):
            config = str(Path(__file__).parents[2] / "pyproject.toml")
            subprocess.run([ruff, *command, "--config", config, str(path)], check=True)


def test_a_change_of_the_table_touches_nothing_else() -> None:
    before = tile_table.source(schedule.TABLES)
    tile = Tile(16, 16, 4, 1)
    new = tile_table.changed(schedule.TABLES, {("sm_90", "half", "backward_value", 64): tile})
    assert new["sm_90"]["half"]["backward_value"][64] == tile
    assert tile_table.source(schedule.TABLES) == before
    lines = zip(before.splitlines(), tile_table.source(new).splitlines(), strict=True)
    assert sum(old != line for old, line in lines) == 1  # architectures that shared a table no longer do


def test_the_file_of_pipelines_changes_in_one_line(tmp_path: Path) -> None:
    table = tile_table.KERNELS / "hopper_tables.py"
    assert tile_table.pipelines_source(PIPELINES) == table.read_text()
    path = tmp_path / "hopper_tables.py"
    tile_table.write(path, "tangents", {("sm_90", "tangents", "backward_key", 64): (64, 5, 2)})
    before, after = table.read_text().splitlines(), path.read_text().splitlines()
    changes = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    tile = PIPELINES["sm_90"][64]["tangents"]["backward_key"]
    assert len(changes) == 1 and str(tile.block_rows) in changes[0][0]
    assert changes[0][1] == '"backward_key": Pipeline(64, 5, register_operands=2),'
    judge_style(path)

"""What `--out` takes: a file with the right ending, or a folder, whose name may have a dot."""

from pathlib import Path

import pytest

from flashjvp_commands.outputs import OutputError, checked_name, prepared


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "folder", "run-3.6.0", "2026.11", ".hidden", "v1."])
def test_files_and_folders(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert checked_name(path, (".csv", ".csv.gz")) == path
    found = prepared(path, "rows.csv", (".csv", ".csv.gz"), lambda _: True)
    assert found == (path if ".csv" in name else path / "rows.csv") and found.parent.is_dir()


@pytest.mark.parametrize("name", ["rows.txt", "rows.csv.bz2", "picture.png"])
def test_another_ending_is_refused_unless_a_folder_has_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"expected a file that ends with \.csv, or a folder"):
        checked_name(tmp_path / name, (".csv",))
    (tmp_path / name).mkdir()
    assert checked_name(tmp_path / name, (".csv",)) == tmp_path / name

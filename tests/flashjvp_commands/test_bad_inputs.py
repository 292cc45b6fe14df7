"""Every command says in one line what is wrong with its arguments, with an exit status, and writes nothing."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashjvp_commands.ending import status_of

ROOT = Path(__file__).resolve().parents[2]
Row = tuple[str, str, int, str]  # module, arguments as a shell has them, exit status, words of the message
# In arguments: {here} is an empty folder, {text} a file of someone else's, {fifo} and {loop} are what they say and end
# with .csv, {null} is a null character, {link} a link to {text}, {long} a name that no file system takes.
NUMBERS = {"--optim.lr": "optim.lr", "--loss.w": "w", "--times.gap-mu": "gap", "--model.mlp-ratio": "mlp"}
TRAIN: list[Row] = [
    *(
        ("tvm_ref.train", f"digits --run.out {{here}}/run {option} {value}", 2, word)
        for option, word in NUMBERS.items()
        for value in ("inf", "nan", "x", "''", "1e999")
    ),
    *(
        ("tvm_ref.train", f"digits --run.out {{here}}/run {words}", 2, "")
        for words in (
            "--run.steps 0", "--run.steps -1", "--run.batch 0", "--run.seed -1", "--run.device tpu", "--unknown 1",
            "--run.steps 1.5", "--run.steps", "--optim.betas 0.9", "--optim.betas 0.9,2", "--run.precision float8",
            "--run.save-every 0", "--model.heads 0", "--model.heads 7", "extra",
        )
    ),
    ("tvm_ref.train", "cifar --run.out {here}/run", 2, "cifar"),
    ("tvm_ref.train", "toy2d --run.out {text}", 1, "text.csv"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.resume {here}/none", 1, "none"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.init {here}/none", 1, "none"),
    ("tvm_ref.train", "imagenet256-w2 --run.out {here}/run --data.path {here}/none.zip", 1, "none.zip"),
]  # fmt: skip
SWEEP: list[Row] = [
    *(
        ("bench.sweep", f"--out {{here}}/a.csv {option} {value}", 2, option)
        for option in ("--seq", "--batch", "--heads", "--kv-heads", "--head-dim")
        for value in ("0", "-1", "x", "1.5", "''", "1,,2")
    ),
    *(
        ("bench.sweep", f"--out {{here}}/a.csv {option} {value}", 2, "finite number of seconds")
        for option in ("--budget-s", "--cell-limit-s", "--compile-s")
        for value in ("nan", "inf", "-1", "0", "x")
    ),
    ("bench.sweep", "--dtype float8 --out {here}/a.csv", 2, "float8"),
    ("bench.sweep", "--peer tvm={here} --out {here}/a.csv", 2, "tvm"),
    ("bench.sweep", "--peer official={here}/none --out {here}/a.csv", 2, "no folder"),
    ("bench.sweep", "--device cuda:9999 --out {here}/a.csv", 2, "cuda:9999"),
]
SEEDS: list[Row] = [
    (module, f"{words} --seed {value}", 2, "whole number from 0 to 4294967295")
    for module, words in (
        ("verify.run.command", ""),
        ("verify.model.command", ""),
        ("verify.faults.command", ""),
        ("verify.model.published", "--peer {here}"),
    )
    for value in ("-1", "x", "1.5", "4294967296", "''", "nan")
]
# What writes a CSV, with the arguments that it needs for that.
WRITERS = (
    ("verify.run.command", "--device cpu"),
    ("verify.model.command", "--device cpu"),
    ("verify.faults.command", ""),
    ("verify.codegen.command", ""),
    ("bench.train_quality", "digits"),
    ("bench.train_step", "--preset digits"),
)
OUTPUTS: list[Row] = [
    (module, f"{words} --out {path}", 2, said)
    for module, words in WRITERS
    for path, said in (
        ("{here}/a.jpg", "ends with"), ("README.md", "ends with"), ("{text}", "not written by this command"),
        ("pyproject.toml/a.csv", ""), ("{fifo}", "not written by this command"), ("{link}", "not written by"),
        ("{loop}", ""), ("/proc/none/a.csv", "can be written to"), ("''", "got nothing"), ("'a{null}.csv'", "null"),
        ("{long}.csv", "can be written to"), ("/dev/full", ""),
    )
]  # fmt: skip
TUNE: list[Row] = [
    *(("bench.tune", f"--budget-s {value}", 2, "finite number of seconds") for value in ("nan", "inf", "-1", "0", "x")),
    *(("bench.tune", f"--head-dim {value}", 2, "whole number from 1 to 256") for value in ("0", "257", "x", "64,")),
    ("bench.tune", "--out {here}/tiles.csv", 2, "ends with .py"),
    ("bench.tune", "--arch sm_30", 2, "sm_30"),
    ("bench.tune", "--log {here}/a.csv --out setup.py --compile-only", 2, "not written by this command"),
]
SAMPLES: list[Row] = [
    (f"tvm_ref.{module}", f"{{here}} {option}", status, said)
    for module in ("sample", "evaluate")
    for option, status, said in (
        ("--w inf", 2, "w: expected"), ("--w nan", 2, "w: expected"), ("--seed -1", 2, "seed: expected"),
        ("--device tpu", 2, "device: expected"), ("--nfe x", 2, "--nfe"), ("--out {here}/a.jpg", 2, "ends with"),
        ("--unknown 1", 2, "--unknown"), ("--weights best", 2, "best"), ("", 1, "no checkpoint"), ("--w x", 2, "--w"),
        ("--device cuda:9999", 2, "cuda:9999"), ("--seed 1e3", 2, "--seed"), ("--nfe ''", 2, "--nfe"),
        ("extra", 2, "extra"),
    )
]  # fmt: skip
# Files that are no checkpoint, no weights and no images.
FILES: list[Row] = [
    (f"tvm_ref.{module}", words.replace("FILE", path), 1, "")
    for module, words in (
        ("sample", "FILE --out {here}/a.png"), ("evaluate", "FILE"), ("convert", "FILE {here}/w.safetensors"),
        ("encode", "FILE --vae {here} --out {here}/a.zip"),
    )
    for path in ("{here}/none", "{text}", "{fifo}", "{loop}", "/dev/null", "{long}", "'{here}/ä ö \u202e'", "''")
    if not (module == "encode" and path == "''")
]  # fmt: skip
OTHERS: list[Row] = [
    ("tvm_ref.ema", "{here} --sigma-rel 0.1 --out {here}/a.safetensors", 1, "no snapshots in"),
    ("tvm_ref.ema", "{here} --sigma-rel 0.5", 2, "sigma_rel"), ("tvm_ref.ema", "{here} --sigma-rel x", 2, "sigma"),
    ("tvm_ref.ema", "{here} --sigma-rel 0.1 --out {here}/a.pt", 2, "ends with"),
    ("tvm_ref.train", "digits --run.out {here}/run --config {text}", 1, "expected settings by name"),
    ("tvm_ref.train", "digits --run.out {here}/run --config {here}/no.yaml", 1, "No such file"),
    ("tvm_ref.train", "digits --run.out {here}/run --run.profile 3,2", 2, "run.profile"),
    ("tvm_ref.train", "digits --run.out {here}/run --run.loss-bins -1", 2, "run.loss_bins"),
    ("tvm_ref.train", "digits --run.out {here}/run --ema.sigma-rels 0.1,0.05", 2, "ema.sigma_rels"),
    ("verify.run.command", "--device tpu", 2, "cuda:0"), ("verify.run.command", "--backend a,b", 2, "'a' is not one"),
    ("verify.run.command", "--device cpu --case nothing", 2, "nothing"), ("verify.run.command", "--case ''", 2, ""),
    ("verify.run.command", "--device cuda:9999", 2, "cuda:9999"), ("verify.run.command", "--dtype ''", 2, "''"),
    ("verify.run.command", "extra", 2, "extra"), ("verify.model.command", "--case nothing --device cpu", 2, "nothing"),
    ("verify.codegen.command", "--arch sm_90,sm_30", 2, "'sm_30'"), ("verify.faults.command", "--only x", 2, "'x'"),
    ("verify.codegen.command", "--arch ''", 2, "''"), ("verify.faults.command", "--only ''", 2, "''"),
    ("verify.model.published", "--peer {here}", 2, "checkout"), ("bench.__main__", "sweeep", 2, "expected a command"),
    ("verify.model.published", "--peer {text}", 2, "checkout"), ("verify.model.published", "", 2, "--peer"),
    ("bench.__main__", "''", 2, "expected a command"), ("bench.train_step", "--batch 0", 2, "--batch"),
    ("bench.train_step", "--steps 0", 2, "--steps"), ("bench.host", "--out {here}/a.csv --shape 1,2", 2, "four sizes"),
    ("bench.train_step", "--preset none", 2, "none"), ("bench.train_step", "--parallel tp", 2, "'tp'"),
    ("bench.train_quality", "cifar", 2, "'cifar'"), ("bench.train_quality", "--out {here}/a.csv", 2, "a folder"),
    ("bench.host", "--out {here}/a.csv", 2, "CUDA GPU"), ("bench.interleaved", "--out {here}/a.csv", 2, "CUDA GPU"),
    ("tvm_ref.encode", "{here} --vae {here} --out {here}/a.zip", 1, "holds no image"),
    ("tvm_ref.encode", "{here} --vae {here} --out {here}/a.png", 2, "ends with"), ("tvm_ref.encode", "", 2, ""),
    ("reports.build", "--chek", 2, "--chek"), ("reports.api", "extra", 2, "extra"),
    ("flashjvp.__main__", "--unknown", 2, "--unknown"), ("flashjvp.diagnosis.command", "a", 2, "two names"),
    ("flashjvp.diagnosis.command", "no_module:model", 2, "no_module"), ("flashjvp.diagnosis.command", "''", 2, "names"),
    ("flashjvp.diagnosis.command", "os:getcwd", 2, "os:getcwd"), ("flashjvp.diagnosis.command", "sys:exit", 2, "exit"),
    ("flashjvp.diagnosis.command", "os:path", 2, "expected a function"), ("flashjvp.diagnosis.command", "a:b:c", 2, ""),
    *(("flashjvp.diagnosis.command", f"os:getcwd --json {path}", 2, "--json")
      for path in ("{here}/a.csv", "{here}/no/a.json", "{here}", "''", "'a{null}.json'", "/proc/a.json")),
]  # fmt: skip
EXPORTS: list[Row] = [
    ("tvm_ref.export", f"{{here}} {words}", status, said)
    for words, status, said in (
        ("--out {here}/new", 1, "no checkpoint"), ("--out {here}/a.json", 2, "name of a folder"), ("", 2, "--out"),
        ("--out {here}/new --layout x", 2, "layout"), ("--out {text}", 1, "exists already"),
    )
]  # fmt: skip
ROWS = [*EXPORTS, *TRAIN, *SWEEP, *SEEDS, *OUTPUTS, *TUNE, *SAMPLES, *FILES, *OTHERS]


def test_there_are_a_hundred_rows_over_all_commands() -> None:
    assert len(ROWS) >= 100
    assert len({module for module, *_ in ROWS}) >= 19


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("places")
    text, fifo, loop, link = (folder / f"{name}.csv" for name in ("text", "fifo", "loop", "link"))
    text.write_text("not,ours\n")
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    link.symlink_to(text)
    return {"text": text, "fifo": fifo, "loop": loop, "link": link, "null": "\0", "long": folder / ("x" * 300)}


@pytest.mark.timeout(120)
@pytest.mark.sampled(of=4)
@pytest.mark.parametrize(("module", "words", "status", "said"), ROWS)
def test_a_bad_input_is_said_in_a_line_and_nothing_is_written(
    module: str, words: str, status: int, said: str, places: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command: Any = importlib.import_module(module)
    arguments = [word.format(here=tmp_path, **places) for word in shlex.split(words)]
    found = status_of(lambda: getattr(command, "cli", command.main)(arguments))
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).strip()
    assert (found, "Traceback" in shown) == (status, False), shown
    assert said in " ".join(shown.split())
    assert shown and ("\n" not in shown or module == "bench.__main__"), shown
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    assert written == [] and places["text"].read_text() == "not,ours\n"


@pytest.mark.parametrize("option", ["resume", "init"])
def test_a_start_that_is_not_there_leaves_no_folder(option: str, tmp_path: Path) -> None:
    command: Any = importlib.import_module("tvm_ref.train")
    words = ["toy2d", "--run.out", str(tmp_path / "run"), f"--run.{option}", str(tmp_path / "none")]
    assert status_of(lambda: command.main(words)) == 1
    assert list(tmp_path.iterdir()) == []


# The shortest that each command prints.
PRINTED = {
    "flashjvp": "", "verify": "--help", "verify model": "--help", "bench": "--help", "bench.tune": "--help",
    "tvm_ref.train": "--help", "tvm_ref.evaluate": "--help", "tvm_ref.convert": "--help", "reports.api": "--check",
    "flashjvp.check": "--help",
}  # fmt: skip
# How standard output can fail, and the exit statuses then. Where nothing was printed, nothing failed.
FAILING = {"> /dev/full": (1,), ">&-": (0,), "2>&-": (0,), "| true; exit ${PIPESTATUS[0]}": (0, 141), "<&-": (0,)}


@pytest.mark.sampled(of=8)
@pytest.mark.parametrize("how", FAILING)
@pytest.mark.parametrize("name", PRINTED)
def test_a_standard_output_that_takes_nothing(name: str, how: str) -> None:
    script = f"{sys.executable} -m {name} {PRINTED[name]} {how}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    silent = name == "reports.api"
    assert done.returncode in (0, 1) if silent else done.returncode in FAILING[how], done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr

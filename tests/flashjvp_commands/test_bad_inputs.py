"""Every command says in words what is wrong with its arguments, with an exit status, and writes nothing."""

import importlib
from pathlib import Path

import pytest

from flashjvp_commands.ending import status_of

# module, arguments ({here}: an empty folder, {text}: a file of someone else's), exit status, words of the message
NUMBERS = {"--optim.lr": "optim.lr", "--loss.w": "loss.w", "--times.gap-mu": "gap", "--model.mlp-ratio": "mlp"}
TRAIN = [
    ("tvm_ref.train", f"digits --run.out {{here}}/run {option} {value}", 2, f"{word}")
    for option, word in NUMBERS.items()
    for value in ("inf", "nan", "x")
]
SWEEP = [
    ("bench.sweep", f"--out {{here}}/a.csv {words}", 2, words.split()[0])
    for option in ("--seq", "--batch", "--heads", "--kv-heads", "--head-dim")
    for words in (f"{option} 0", f"{option} -1", f"{option} x", f"{option} 1.5")
] + [
    ("bench.sweep", f"--out {{here}}/a.csv {option} {value}", 2, "finite number of seconds")
    for option in ("--budget-s", "--cell-limit-s", "--compile-s")
    for value in ("nan", "inf", "-1", "0", "x")
]
SEEDS = [
    (module, f"{words} --seed {value}", 2, "whole number from 0 to 4294967295")
    for module, words in (
        ("verify.run.command", ""),
        ("verify.model.command", ""),
        ("verify.faults.command", ""),
        ("verify.model.published", "--peer {here}"),
    )
    for value in ("-1", "x", "1.5", "4294967296")
]
OUTPUTS = [
    (module, f"{words} --out {path}", 2, said)
    for module, words in (
        ("verify.run.command", "--device cpu"),
        ("verify.model.command", "--device cpu"),
        ("verify.faults.command", ""),
        ("verify.codegen.command", ""),
        ("bench.train_quality", "digits"),
        ("bench.train_step", "--preset digits"),
    )
    for path, said in (
        ("{here}/a.jpg", "ends with"), ("README.md", "ends with"), ("{text}", "not written by this command"),
        ("pyproject.toml/a.csv", "--out" if "train_step" not in module else "can be written to"),
    )
]  # fmt: skip
TUNE = [
    ("bench.tune", f"--budget-s {value}", 2, "finite number of seconds") for value in ("nan", "inf", "-1", "0", "x")
] + [("bench.tune", f"--head-dim {value}", 2, "whole number from 1 to 256") for value in ("0", "257", "x", "64,")]
SAMPLES = [
    (f"tvm_ref.{module}", f"{{here}} {option}", status, said)
    for module in ("sample", "evaluate")
    for option, status, said in (
        ("--w inf", 2, "w: expected"), ("--w nan", 2, "w: expected"), ("--seed -1", 2, "seed: expected"),
        ("--device tpu", 2, "device: expected"), ("--nfe x", 2, "--nfe"), ("--out {here}/a.jpg", 2, "ends with"),
        ("--unknown 1", 2, "--unknown"), ("--weights best", 2, "best"), ("", 1, "no checkpoint"),
    )
]  # fmt: skip
OTHERS = [
    ("verify.run.command", "--device tpu", 2, "cuda:0"), ("verify.run.command", "--backend a,b", 2, "'a' is not one"),
    ("verify.codegen.command", "--arch sm_90,sm_30", 2, "'sm_30'"), ("verify.faults.command", "--only x", 2, "'x'"),
    ("verify.model.published", "--peer {here}", 2, "checkout"), ("bench.__main__", "sweeep", 2, "expected a command"),
    ("bench.train_step", "--steps 0", 2, "--steps"), ("bench.host", "--out {here}/a.csv --shape 1,2", 2, "four sizes"),
    ("tvm_ref.encode", "{here} --vae {here} --out {here}/a.zip", 1, "holds no image"),
]  # fmt: skip
EXPORTS = [
    ("tvm_ref.export", f"{{here}} {words}", status, said)
    for words, status, said in (
        ("--out {here}/new", 1, "no checkpoint"), ("--out {here}/a.json", 2, "name of a folder"), ("", 2, "--out"),
        ("--out {here}/new --layout x", 2, "layout"), ("--out {text}", 1, "exists already"),
    )
]  # fmt: skip
ROWS = [*EXPORTS, *TRAIN, *SWEEP, *SEEDS, *OUTPUTS, *TUNE, *SAMPLES, *OTHERS]


def test_there_are_a_hundred_rows() -> None:
    assert len(ROWS) >= 100


@pytest.mark.parametrize(("module", "words", "status", "said"), ROWS)
def test_a_bad_input_is_said_and_nothing_is_written(
    module: str, words: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, text = tmp_path / "here", tmp_path / "text.csv"
    here.mkdir()
    text.write_text("not,ours\n")
    command = importlib.import_module(module).main
    found = status_of(lambda: command(words.format(here=here, text=text).split()))
    captured = capsys.readouterr()
    shown = " ".join((captured.out + captured.err).split())
    assert (found, "Traceback" in shown) == (status, False), shown
    assert said in shown
    assert list(here.iterdir()) == [] and text.read_text() == "not,ours\n"

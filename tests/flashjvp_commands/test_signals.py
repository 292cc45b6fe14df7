"""Ctrl-C and SIGTERM at any moment end every command: soon, with all its children, without a traceback, with the exit
status of the signal; what was finished is kept in a file that is named and whole."""

import csv
import gzip
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MARK = "FLASHJVP_TEST_RUN"  # of the environment, which all children inherit
# What a command is asked for; {out} is an empty folder, {run} one with a checkpoint, {images} one of many images, {vae}
# one of a small VAE, {peer} a checkout whose import never ends. All would take minutes.
COMMANDS = {
    "verify": "verify --device cpu --out {out}/rows.csv",
    "verify model": "verify model --device cpu --out {out}/rows.csv",
    "verify faults": "verify faults --out {out}/rows.csv",
    "verify codegen": "verify codegen --arch sm_90 --out {out}/rows.csv",
    "bench.sweep": "bench.sweep --device cpu --seq 64,128,256,512,1024,2048,4096 --head-dim 16 --out {out}/rows.csv",
    "bench.tune": "bench.tune --compile-only --budget-s 600 --log {out}/rows.csv --out {out}/tiles.py",
    "bench.train_step": "bench.train_step --preset toy2d --compile off --device cpu --steps 99999 --out {out}/rows.csv",
    "bench.train_quality": "bench.train_quality toy2d --out {out}/rows.csv",
    "tvm_ref.train": "tvm_ref.train toy2d --run.steps 100000 --run.save-every 2 --run.device cpu --run.out {out}/run",
    "tvm_ref.sample": "tvm_ref.sample {run} --nfe 1000000 --device cpu --out {out}/grid.png",
    "tvm_ref.evaluate": "tvm_ref.evaluate {run} --nfe 1,1000000 --device cpu --out {out}/quality.json",
    "tvm_ref.encode": "tvm_ref.encode {images} --vae {vae} --size 64 --batch 1 --device cpu --out {out}/latents.zip",
    "verify published": "verify published --peer {peer} --out {out}/rows.csv",
    "tvm_ref.experiments": "tvm_ref.experiments times --scale small --device cpu --out {out}/experiments",
    "flashjvp.check": "flashjvp.check endless:model --json {out}/report.json",
    "flashjvp": "flashjvp",
    "reports.build": "reports.build --check",
}
SHORT = {"flashjvp", "reports.build"}  # may have ended well before
SIGNALS = (signal.SIGINT, signal.SIGTERM)
READY_S = 240.0  # until a command sees to signals, on a loaded machine
ENDS_S = 60.0
KEPT = (".csv", ".csv.gz")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a module for flashjvp.check beside it."""
    folder = tmp_path_factory.mktemp("runs")
    words = f"-m tvm_ref.train toy2d --run.steps 2 --run.no-evaluate --run.device cpu --run.out {folder}/toy2d"
    subprocess.run([sys.executable, *words.split()], cwd=ROOT, check=True, capture_output=True)
    (folder / "endless.py").write_text("import time\ndef model():\n    while True: time.sleep(0.1)\n")
    return folder


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than a test waits for, all of them one file, and a small VAE."""
    from diffusers.models.autoencoders import AutoencoderKL

    folder = tmp_path_factory.mktemp("images")
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "00000.png")
    for i in range(1, 20_000):
        os.link(folder / "images" / "00000.png", folder / "images" / f"{i:05d}.png")
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def peer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like the published code."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "training").mkdir()
    (folder / "training" / "wrapper.py").write_text("import time\nwhile True: time.sleep(0.1)\n")
    return folder


def _sees_interrupts() -> None:
    """As in a shell's foreground: what is started in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A command that runs in a session of its own, as a shell would start it."""

    def __init__(self, words: str, folder: Path, **places: Path) -> None:
        self.mark, self._output = uuid.uuid4().hex, folder / "output.txt"
        environment = {**os.environ, MARK: self.mark, "COLUMNS": "80", "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": f"{ROOT}{os.pathsep}{places['run'].parent}"}  # fmt: skip
        command = [sys.executable, "-m", *(word.format(**places) for word in words.split())]
        with self._output.open("wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True, preexec_fn=_sees_interrupts,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Until it sees to SIGTERM itself, or has ended."""
        end = time.monotonic() + READY_S
        while self.process.poll() is None and time.monotonic() < end:
            with suppress(OSError):
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                caught = int(status.split("SigCgt:")[1].split()[0], 16)
                if caught >> (signal.SIGTERM - 1) & 1:
                    return
            time.sleep(0.02)

    def send(self, number: int) -> None:
        """Ctrl-C goes to the whole group, as from a terminal."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number) if number == signal.SIGINT else self.process.send_signal(number)

    def processor_s(self) -> float:
        """What its first process has used, 0 when it has ended."""
        with suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def left(self) -> list[int]:
        """Processes that it started, at whatever depth, and that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    def end(self) -> None:
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(
    tmp_path: Path, run_folder: Path, peer_folder: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Command]]:
    started: list[Command] = []

    def begin(name: str) -> Command:
        places = {"out": tmp_path / "out", "run": run_folder / "toy2d", "peer": peer_folder}
        places["out"].mkdir()
        if "{vae}" in COMMANDS[name]:
            folder: Path = request.getfixturevalue("images_folder")
            places |= {"images": folder / "images", "vae": folder / "vae"}
        started.append(Command(COMMANDS[name], tmp_path, **places))
        return started[-1]

    yield begin
    for command in started:
        command.end()


def rows_of(path: Path) -> int:
    """How many rows a CSV has, each with all columns."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        header, *rows = csv.reader(file)
    assert all(len(row) == len(header) for row in rows), path
    return len(rows)


def assert_ended_well(command: Command, name: str, number: int, out: Path, what: str) -> None:
    """What every test here asserts, `what` having been done to the command."""
    status = command.process.wait(ENDS_S)
    said = f"{name}, {what}, status {status}: {command.output}"
    assert status in (128 + number, -number, *([0, 1] if name in SHORT else [])), said
    assert "Traceback" not in command.output, said
    for _ in range(50):
        if not command.left():
            break
        time.sleep(0.1)
    assert not command.left(), said
    for folder in out.glob("*.unfinished"):
        assert folder.name in "".join(command.output.split()), f"{folder} is not named; {said}"
    for path in out.rglob("*"):
        assert not path.name.startswith(".") or path.name == ".lock", f"{path} is left; {said}"
        if path.name.endswith(KEPT) and path.name != "metrics.csv":
            assert rows_of(path) == 0 or path.name in "".join(command.output.split()), f"{path} is not named; {said}"


CASES = [(name, number) for name in COMMANDS for number in SIGNALS]


@pytest.mark.sampled(of=14)
@pytest.mark.parametrize(("name", "number"), CASES, ids=lambda x: getattr(x, "name", x))
def test_a_signal_ends_a_command_at_any_moment(
    name: str, number: int, start: Callable[[str], Command], tmp_path: Path
) -> None:
    command = start(name)
    if early := random.random() < 0.25:
        time.sleep(delay := random.uniform(0.1, 2.0))
    else:
        command.wait_until_ready()
        time.sleep(delay := random.choice([0.0, random.uniform(0, 3), random.uniform(0, 15)]))
    command.send(number)
    assert_ended_well(command, name, number, tmp_path / "out", f"{'early' if early else 'ready'} + {delay:.2f} s")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda x: x.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_signal_aborts(name: str, number: int, start: Callable[[str], Command], tmp_path: Path) -> None:
    command = start(name)
    command.wait_until_ready()
    time.sleep(random.uniform(0, 8))
    command.send(number)
    time.sleep(random.uniform(0, 0.5))
    command.send(number)
    status = command.process.wait(ENDS_S)
    assert status in (128 + number, -number, *([0, 1] if name in SHORT else [])), f"{status}: {command.output}"
    assert "Traceback" not in command.output
    time.sleep(0.5)
    assert not command.left()


@pytest.mark.sampled(of=12)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {*SHORT, "flashjvp.check"}])
def test_a_signal_is_acknowledged(name: str, start: Callable[[str], Command]) -> None:
    command = start(name)
    command.wait_until_ready()
    time.sleep(random.uniform(0, 5))
    before, end = command.processor_s(), time.monotonic() + ENDS_S
    command.send(signal.SIGINT)
    while "SIGINT" not in command.output and time.monotonic() < end:
        assert command.processor_s() - before < 1.0, "a second of its own, however loaded the machine is"
        time.sleep(0.05)
    assert "SIGINT" in command.output

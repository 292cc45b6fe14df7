"""Two processes train like one, replicated (DDP) or sharded (FSDP2), over gloo."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.tvm_ref.runs import (
    PATIENCE_SECONDS,
    change,
    command_line,
    digits,
    finish,
    launch,
    run_command,
    start,
    together,
    train,
    train_silently,
)
from tvm_ref.data.dataset import open_dataset
from tvm_ref.objective.loss import Batch
from tvm_ref.training.batches import Batches
from tvm_ref.training.checkpoint import checkpoints, load_model, read_step, save
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.parallel import world
from tvm_ref.training.state import State
from tvm_ref.training.step import gradient
from tvm_ref.training.trainer import Trainer
from verify.budget.network_tolerance import relative_error, training_budget


def train_in_float64(config: TrainConfig) -> None:
    """Trains three steps; writes their results and a checkpoint into config.run.out."""
    torch.set_default_dtype(torch.float64)
    out = Path(config.run.out)
    with world(config.run.device) as this:
        state, batches = State(config, this), Batches(config, open_dataset(config.data), this)
        outcomes = []
        for step in range(3):
            draws = [Batch(*(x.to(this.device) for x in batch)) for batch in batches.draw(step)]
            outcomes.append(gradient(state.objective, state.target, draws, this, clip=config.optim.clip)[:4])
            state.advance()
        save(out, 3, state.tensors(), config, this)
        (out / f"{this.rank}.json").write_text(json.dumps(outcomes))
    torch.set_default_dtype(torch.float32)


def train_compiled_in_float64(config: TrainConfig) -> None:
    """The same with compiled blocks, but without code generation, which is slow."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    counters.clear()
    train_in_float64(config)
    assert not counters["graph_break"], dict(counters["graph_break"])


def results(out: Path, rank: int) -> list[torch.Tensor]:
    return list(torch.tensor(json.loads((out / f"{rank}.json").read_text()), dtype=torch.float64))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("one")
    train_in_float64(digits(out))
    return out


@pytest.mark.parametrize(("parallel", "checkpointing"), [("ddp", "none"), ("fsdp", "selective")])
def test_two_processes_train_like_one(one: Path, tmp_path: Path, parallel: str, checkpointing: str) -> None:
    config = digits(tmp_path, parallel=parallel, accumulate=2, checkpointing=checkpointing)
    together(2, train_in_float64, config)
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert relative_error(results(tmp_path, 0), results(one, 0)) <= training_budget()
    for weights in ("ema", "raw"):  # one process reads what two wrote
        networks = [load_model(out, device=torch.device("cpu"), weights=weights).model for out in (tmp_path, one)]
        pair = [list(network.parameters()) for network in networks]
        # Read into float32: one rounding of each number is added.
        assert relative_error(*pair) <= training_budget() + torch.finfo(torch.float32).eps


def train_without_synchronisation(config: TrainConfig) -> None:
    """The same with a fault: no process averages its gradients with the others."""
    with patch("tvm_ref.training.state.parallel.replicate", lambda objective, world: objective):
        train_in_float64(config)


def test_gradients_that_are_not_averaged_are_seen(one: Path, tmp_path: Path) -> None:
    """What the test above holds would fail by orders of magnitude, and the processes would differ."""
    together(2, train_without_synchronisation, digits(tmp_path))
    assert relative_error(results(tmp_path, 0), results(one, 0)) > 1e3 * training_budget()
    assert (tmp_path / "0.json").read_text() != (tmp_path / "1.json").read_text()


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (2, {"context_parallel": 2}),
        pytest.param(3, {"context_parallel": 3, "checkpointing": "full"}, marks=pytest.mark.slow),  # one has no token
        pytest.param(
            4, {"context_parallel": 2, "parallel": "fsdp", "checkpointing": "selective"}, marks=pytest.mark.slow
        ),
    ],
)
def test_processes_that_share_the_tokens_train_like_one(one: Path, tmp_path: Path, size: int, run: Any) -> None:
    together(size, train_in_float64, digits(tmp_path, **run))
    assert (tmp_path / "0.json").read_text() == (tmp_path / f"{size - 1}.json").read_text()
    assert relative_error(results(tmp_path, 0), results(one, 0)) <= training_budget()
    networks = [load_model(out, device=torch.device("cpu"), weights="raw").model for out in (tmp_path, one)]
    pair = [list(network.parameters()) for network in networks]
    assert relative_error(*pair) <= training_budget() + torch.finfo(torch.float32).eps


@pytest.mark.slow
def test_processes_that_share_the_tokens_of_compiled_blocks_train_like_one(one: Path, tmp_path: Path) -> None:
    together(2, train_compiled_in_float64, digits(tmp_path, context_parallel=2, compile=True))
    assert relative_error(results(tmp_path, 0), results(one, 0)) <= training_budget()


def test_tokens_are_shared_by_a_divisor_of_the_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.context_parallel: expected a divisor of the 1 processes"):
        train(digits(tmp_path / "run", context_parallel=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "checkpointing"), [("ddp", "none"), ("fsdp", "selective")])
def test_two_processes_with_compiled_blocks_train_like_one(
    one: Path, tmp_path: Path, parallel: str, checkpointing: str
) -> None:
    config = digits(tmp_path, parallel=parallel, checkpointing=checkpointing, compile=True)
    together(2, train_compiled_in_float64, config)
    assert relative_error(results(tmp_path, 0), results(one, 0)) <= training_budget()


@pytest.mark.gpu
@pytest.mark.parametrize(("parallel", "checkpointing"), [("ddp", "none"), ("fsdp", "selective")])
def test_two_gpus_train_like_one(tmp_path: Path, parallel: str, checkpointing: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs for nccl, and torch finds {torch.cuda.device_count()}")
    settings = {"parallel": parallel, "checkpointing": checkpointing, "accumulate": 2, "device": "cuda"}
    for name, size in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        together(size, train_in_float64, digits(tmp_path / name, **settings))
    assert (tmp_path / "two/0.json").read_text() == (tmp_path / "two/1.json").read_text()
    assert relative_error(results(tmp_path / "two", 0), results(tmp_path / "one", 0)) <= training_budget()


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    config = digits(tmp_path, steps=2, parallel="fsdp")
    train(config)
    together(2, train_silently, change(config, steps=4))
    written = {path.name[:11] for path in checkpoints(tmp_path / "checkpoints")[-1].glob("shard-*")}
    assert written == {"shard-00001", "shard-00002"}
    printed = train(change(config, steps=6, parallel="ddp"))
    assert "resuming from" in printed and "step-00000004" in printed
    assert read_step(checkpoints(tmp_path / "checkpoints")[-1]) == 6
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list("123456")
    assert len(list((tmp_path / "samples").glob("step-00000004-nfe-*.png"))) == 3


@pytest.mark.slow
def test_sharded_weights_start_from_given_ones(tmp_path: Path) -> None:
    """The averages of the first run are network, target and average of the second one, which then trains like one."""
    train(digits(tmp_path / "first", steps=2))
    given = digits(tmp_path / "sharded", steps=2, parallel="fsdp", init=str(tmp_path / "first"))
    together(2, begins_with_the_averages, given)
    train(change(given, out=str(tmp_path / "alone")))
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines()[1] for name in ("alone", "sharded")]
    torch.testing.assert_close(*(torch.tensor(list(map(float, row.split(",")))) for row in rows))


def begins_with_the_averages(config: TrainConfig) -> None:
    with world(config.run.device) as this:
        trainer = Trainer(config, this, Console(quiet=True))
        expected = load_model(Path(config.run.init), device=this.device).model.state_dict()
        for copy in (trainer.state.network, trainer.state.target, trainer.state.average):
            assert any(isinstance(x, DTensor) for x in copy.state_dict().values())
            for name, x in copy.state_dict().items():
                assert torch.equal(x.full_tensor() if isinstance(x, DTensor) else x, expected[name])
        trainer.run()


def test_a_signal_to_one_process_ends_all_of_them_after_the_same_step(tmp_path: Path) -> None:
    config = digits(tmp_path, steps=10**6, save_every=10**6, parallel="fsdp")
    ranks = launch(2, train_silently, config)
    rows = tmp_path / "metrics.csv"
    while all(rank.is_alive() for rank in ranks) and not (rows.exists() and rows.read_text().count("\n") > 2):
        time.sleep(0.01)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)
    finish(*ranks)
    saved = checkpoints(tmp_path / "checkpoints")[-1]
    assert rows.read_text().splitlines()[-1].split(",")[0] == str(read_step(saved))
    assert len(list(saved.glob("shard-00002-*"))) > 0


def torchrun(arguments: list[str], output: Path) -> None:
    """`torchrun --standalone --nproc-per-node 2 -m tvm_ref.train ...`, which must succeed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tvm_ref.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # which torchrun would set with a warning
    root = Path(__file__).parents[3]
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, *launcher, *arguments], cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        for end in (run.terminate, run.kill):  # terminated, it ends its processes, and kills those that hang
            try:
                run.wait(PATIENCE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                end()
    assert run.wait() == 0, output.read_text()


@pytest.mark.parametrize("goes_on", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torchrun_starts_a_run_or_goes_on_with_it(goes_on: bool, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if goes_on:
        finish(start(run_command, command_line(out, steps=3, parallel="fsdp")))
    torchrun(command_line(out, steps=5, parallel="fsdp"), tmp_path / "output")
    assert read_step(checkpoints(out / "checkpoints")[-1]) == 5
    resumed = f"resuming from {out / 'checkpoints' / 'step-00000003'}"
    assert (resumed in (tmp_path / "output").read_text()) == goes_on
    rows = (out / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list("12345")
    written = {path.name[:11] for path in checkpoints(out / "checkpoints")[-1].glob("shard-*")}
    assert written == {"shard-00001", "shard-00002"}  # both processes took part


def test_a_batch_that_does_not_fit_the_processes_stops_all_of_them(tmp_path: Path) -> None:
    together(2, refused, change(digits(tmp_path / "run"), batch=25))
    assert not (tmp_path / "run").exists()


def refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="25 cannot be split evenly over 2 processes"):
        train(config)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"process 2 .* there are 2: .*--run\.device cpu"), world("cuda"):
        pass


@pytest.mark.parametrize("processes", ["1", "2"])
def test_only_a_process_alone_is_torn_down(processes: str) -> None:
    """With several processes, exit handlers do not run, but the output is flushed and the exit status is kept."""
    code = """
import atexit
from tvm_ref.training.parallel import leave
atexit.register(print, 'end'); print('work'); leave(3)
"""
    environment = {**os.environ, "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.split() == (["work", "end"] if processes == "1" else ["work"])


def test_a_process_alone_needs_no_connection() -> None:
    with world("cpu") as this:
        assert dataclasses.astuple(this)[:2] == (0, 1)
        assert this.gather("x") == ["x"]
        assert not torch.distributed.is_initialized()

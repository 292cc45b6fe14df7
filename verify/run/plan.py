"""The plan of a verification: which checks run on which cases, backends and types, and what is left out."""

import difflib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashjvp.backends import select

from ..cases.case import Case
from ..cases.catalogue import CASES, random_case
from ..checks.registry import SITUATIONS
from ..oracles.attention import Backend
from ..oracles.identities import GRADCHECKS, IDENTITIES, Check

BACKENDS: tuple[Backend, ...] = ("reference", "tiled", "triton")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,  # where PyTorch's precision setting allows TF32
}
TF32 = "tf32"
FLOAT64 = "float64"
"""The check of every tensor against float64 dense attention."""
CHECKS: dict[str, Check] = IDENTITIES | SITUATIONS | GRADCHECKS
"""All others."""

GROUPS = {
    "dims": "head dims",
    "unaligned": "head dims",
    "lengths": "lengths",
    "causal": "causal",
    "mask": "masks",
    "gqa": "heads and batch",
    "mqa": "heads and batch",
    "batch": "heads and batch",
    "packed": "layouts",
    "layout": "layouts",
    "plain": "tangents, cotangents",
    "square": "tangents, cotangents",
    "tangents": "tangents, cotangents",
    "cotangent": "tangents, cotangents",
    "scale": "extreme numbers",
    "scores": "extreme numbers",
    "large": "extreme numbers",
    "one": "extreme numbers",
    "constant": "extreme numbers",
    "low": "extreme numbers",
    "zeros": "extreme numbers",
    "random": "random",
    "tiny": "tiny",
    "length": "error against length",
    "width": "error against head dim",
    "size": "error against scores",
}
"""What a case is about, by the first part of its name."""

TINY = (
    Case("tiny_gqa_mask", (), 2, 1, m=3, n=4, d=2, dv=3, mask="additive"),
    Case("tiny_causal", (2,), 1, 1, m=3, n=3, d=3, dv=2, is_causal=True),
)
STRUCTURES = ("gqa", "causal_33_80", "mask_bool_empty_rows", "dims_72_72")
SURROUNDED = ("gqa_short", "causal_33_80")
"""Cases of what may surround a call (checks/registry.py); the quick run has the first alone."""
OF_PARTS = ("mqa_dims_64_causal", "dims_72_72", "dims_128_128")
"""Cases of what hides keys by their place, at head dims that warp-specialised kernels serve; not in the quick run."""
SAMPLE = (
    "square", "plain", "dims_72_72", "dims_1_33", "lengths_1_1", "lengths_33_257", "causal_33_80",
    "mask_bool_full", "mask_bool_empty_rows", "mask_additive_full", "mask_additive_float32_matrix", "mqa_causal",
    "batch_empty", "packed_plain", "layout_padded", "cotangent_o_t_tangents_v", "scores_1e4_causal",
    "large_mu_causal", "one_hot_causal", "constant_keys_causal", "zeros_odd",
)  # fmt: skip
"""Cases of every group, for what is slow: kernels that are interpreted, or compiled for each new kind of call."""

RANDOM_CASES = {"quick": 8, "full": 40}


@dataclass(frozen=True)
class Task:
    """One check on one case in one type, for backends that share its oracle."""

    check: str
    case: Case
    dtype: str
    backends: tuple[Backend, ...]

    @property
    def name(self) -> str:
        """What --case takes."""
        return self.case.name if self.check == FLOAT64 else f"{self.check}:{self.case.name}"

    @property
    def group(self) -> str:
        return GROUPS[self.case.name.split("_")[0]]


def _without_kernels(case: Case) -> tuple[Backend, ...]:
    """The backends that cannot serve head dims so wide."""
    return ("triton",) if max(case.d, case.dv) > select.MAX_HEAD_DIM else ()


class UnknownCaseError(ValueError):
    """--case names nothing."""


def random_cases(seed: int) -> list[Case]:
    """Cases drawn from the feature matrix, the same for a seed, whatever else is verified."""
    return [replace(random_case(random.Random(f"{seed} {i}")), name=f"random_{i}") for i in range(RANDOM_CASES["full"])]


def sweep_cases(device: str) -> list[Case]:
    """The cases of the figures: one size after the other grows, from N = 128 and D = 64."""
    lengths = (16, 32, 64, 128, 256, 512) if device == "cpu" else (32, 64, 128, 256, 512, 1024, 2048)
    one: dict[str, Any] = {"batch": (1,), "q_heads": 1, "kv_heads": 1}
    return [
        *(Case(f"length_{n}", **one, m=n, n=n, d=64, dv=64) for n in lengths),
        *(Case(f"width_{d}", **one, m=128, n=128, d=d, dv=d) for d in (8, 16, 32, 64, 72, 96, 128, 192, 256)),
        *(
            Case(f"size_{x:g}", **one, m=128, n=128, d=64, dv=64, magnitude=x)
            for x in (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
        ),
    ]


def obstacles(device: str, chosen: Sequence[Backend], dtypes: Sequence[str]) -> dict[tuple[Backend, str], str]:
    """Why a backend cannot be verified in a type on this device; empty where all can."""
    reasons = {(b, t): select.obstacle(b, torch.device(device), DTYPES[t]) for b in chosen for t in dtypes}
    if torch.device(device).type == "cpu":
        reasons |= {(b, TF32): "float32 products are rounded on a GPU only" for b in chosen if TF32 in dtypes}
    return {pair: reason for pair, reason in reasons.items() if reason is not None}


class Plan:
    """The tasks of a run, and what it leaves out, in words."""

    def __init__(self, device: str, quick: bool, chosen: Sequence[Backend], dtypes: Sequence[str], seed: int) -> None:
        self.device, self.quick, self.seed = torch.device(device).type, quick, seed
        self.dtypes = dtypes
        self._obstacles = obstacles(device, chosen, dtypes)
        self._chosen = chosen
        self.tasks: list[Task] = []
        self.skipped = [f"{b} in {t}: {reason}" for (b, t), reason in self._obstacles.items()]

    def serving(self, dtype: str, *without: Backend) -> tuple[Backend, ...]:
        """The chosen backends that can serve a type."""
        return tuple(b for b in self._chosen if (b, dtype) not in self._obstacles and b not in without)

    def _add(self, check: str, cases: Iterable[Case], dtypes: Iterable[str], *without: Backend) -> None:
        for case in cases:
            for dtype in dtypes:
                if of := self.serving(dtype, *without, *_without_kernels(case)):
                    self.tasks.append(Task(check, case, dtype, of))

    def everything(self) -> "Plan":
        """The whole verification, or the quick one."""
        samples = [case for case in CASES if case.name in SAMPLE]
        structures = [case for case in CASES if case.name in STRUCTURES]
        # Kernels of another precision are compiled once more: of all cases only if nothing else is.
        sampled = [dtype for dtype in self.dtypes if dtype == TF32]
        exact = [dtype for dtype in self.dtypes if dtype != TF32]
        if self.quick:
            self._add(FLOAT64, samples, self.dtypes)
            for i, case in enumerate(case for case in CASES if case.name not in SAMPLE):
                self._add(FLOAT64, [case], self._in_turn(i, "triton"), "triton")
            structures = [case for case in structures if case.name == "causal_33_80"]
        else:
            self._add(FLOAT64, CASES, exact)
            self._add(FLOAT64, samples if exact else CASES, sampled)
            self._add(FLOAT64, sweep_cases(self.device), exact)
        served = [dtype for dtype in self.dtypes if self.serving(dtype)] or self.dtypes
        drawn = random_cases(self.seed)[: RANDOM_CASES["quick" if self.quick else "full"]]
        for i, case in enumerate(drawn):
            self._add(FLOAT64, [case], [served[i % len(served)]])
        for check in IDENTITIES:
            self._add(check, structures, self.dtypes, *(("reference",) if check == "agreement" else ()))
        self._add_situations([case for name in SURROUNDED for case in CASES if case.name == name])
        if "float64" in self.dtypes:
            for check in GRADCHECKS:
                self._add(check, TINY, ["float64"])
        self._say_what_is_sampled(len(samples), len(drawn))
        # Compilation and large matrices take longest: begin with them, so that no process is left with one at the end.
        self.tasks.sort(key=lambda task: -max(task.case.d, task.case.dv) * max(task.case.m, task.case.n))
        return self

    def _in_turn(self, place: int, *without: Backend) -> list[str]:
        """One of the types that some backend serves, by turns; none where none does."""
        served = [dtype for dtype in self.dtypes if self.serving(dtype, *without)]
        return served[place % len(served) :][:1] if served else []

    def _add_situations(self, cases: Sequence[Case]) -> None:
        if not self.quick:
            for check in SITUATIONS:
                self._add(check, cases, self.dtypes)
            for check in ("packed", "windows", "block-masks"):
                self._add(check, [case for case in CASES if case.name in OF_PARTS], self.dtypes)
            return
        for i, check in enumerate(SITUATIONS):
            for of in (("reference", "tiled"), ("triton",)):
                without = [backend for backend in BACKENDS if backend not in of]
                self._add(check, cases[:1], self._in_turn(i, *without), *without)

    def _say_what_is_sampled(self, samples: int, drawn: int) -> None:
        self.skipped.append(f"triton on head dims above {select.MAX_HEAD_DIM}")
        self.skipped.append(f"random cases are judged in one type each: {drawn} of them, types in turn")
        if {TF32} < {*self.dtypes} and self.serving(TF32) and not self.quick:
            self.skipped.append(f"{TF32} on {samples} of the {len(CASES)} fixed cases; all with --dtype {TF32}")
        self.skipped.append(f"gradcheck needs float64: {len(TINY)} tiny cases on reference and tiled")
        if not self.quick:
            return
        if "triton" in self._chosen:
            self.skipped.append(f"quick: triton on {samples} of the {len(CASES)} fixed cases")
        self.skipped.append(f"quick: all but {samples} of the {len(CASES)} fixed cases, and what may surround a call, "
                            "in one type each, types in turn")  # fmt: skip
        self.skipped.append("quick: identities on 1 case instead of 4, no sweeps of length, head dim and scores")

    def only(self, name: str) -> "Plan":
        """The check and case that a --case option names, in every type and on every backend chosen."""
        check, _, case_name = name.rpartition(":")
        check = check or FLOAT64
        gradchecks = check in GRADCHECKS
        cases = TINY if gradchecks else [*CASES, *random_cases(self.seed), *sweep_cases(self.device)]
        found = [case for case in cases if case.name == case_name]
        if check not in (FLOAT64, *CHECKS) or not found:
            names = [case.name for case in cases] if check in (FLOAT64, *CHECKS) else []
            close = difflib.get_close_matches(case_name, names) or [case.name for case in cases[:3]]
            raise UnknownCaseError(
                f"--case {name}: expected CASE, or CHECK:CASE with CHECK one of {', '.join(CHECKS)}; "
                f"cases like it: {', '.join(close)}"
            )
        self._add(check, found, [dtype for dtype in self.dtypes if dtype == "float64" or not gradchecks])
        return self

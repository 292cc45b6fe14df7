"""A worker with planted faults: this file as a program is `python -m bench.worker` with `PLANTED` added."""

import ctypes
import functools
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import providers, worker  # noqa: E402
from bench.cases import differentiable  # noqa: E402
from bench.environment import available_memory_mib  # noqa: E402
from verify.cases.inputs import Inputs  # noqa: E402

WORKER = (sys.executable, str(Path(__file__).resolve()))
Fault = Callable[[Inputs], tuple[Tensor, ...]]

right = providers.PROVIDERS["math"].load()
finite_difference = providers.PROVIDERS["finite-difference"].load()


def out_of_memory(inputs: Inputs) -> tuple[Tensor, ...]:
    """More than the worker may take, yet within what the system would let it reserve."""
    available = available_memory_mib()
    assert available is not None
    torch.empty(int(0.95 * available) * 2**20, dtype=torch.uint8)
    return right(inputs)


def segmentation_fault(inputs: Inputs) -> tuple[Tensor, ...]:
    ctypes.string_at(0)
    return right(inputs)


def hangs(inputs: Inputs) -> tuple[Tensor, ...]:
    time.sleep(600)
    return right(inputs)


def raises(inputs: Inputs) -> tuple[Tensor, ...]:
    raise ValueError("planted\nover two lines")


def not_implemented(inputs: Inputs) -> tuple[Tensor, ...]:
    raise NotImplementedError("no such kernel")


def prints(inputs: Inputs) -> tuple[Tensor, ...]:
    """Right, but noisy on the standard output that events travel on."""
    print('{"event": "outcome", "id": 0}', flush=True)
    return right(inputs)


def tangent_lost(inputs: Inputs) -> tuple[Tensor, ...]:
    o, o_t = right(inputs)
    return o, 0 * o_t


def key_tangent_without_gradient(inputs: Inputs) -> tuple[Tensor, ...]:
    """Both outputs are right; the gradient of the third tangent lacks one per cent."""
    v_t = differentiable(inputs)[-1]
    return right(replace(inputs, v_t=0.99 * v_t + 0.01 * v_t.detach()))


def difference_without_v_t(inputs: Inputs) -> tuple[Tensor, ...]:
    """A difference quotient with the tangent of v left out."""
    assert inputs.v_t is not None
    return finite_difference(replace(inputs, v_t=torch.zeros_like(inputs.v_t)))


def not_finite(inputs: Inputs) -> tuple[Tensor, ...]:
    o, o_t = right(inputs)
    return o, o_t / 0 * 0


FAULTS: dict[str, Fault] = {
    "planted-oom": out_of_memory,
    "planted-crash": segmentation_fault,
    "planted-hang": hangs,
    "planted-raise": raises,
    "planted-not-implemented": not_implemented,
    "planted-prints": prints,
    "planted-wrong": tangent_lost,
    "planted-wrong-gradient": key_tangent_without_gradient,
    "planted-nan": not_finite,
    "planted-difference": difference_without_v_t,
}


def loaded(name: str) -> Fault:
    return FAULTS[name]


PLANTED = {
    **{name: providers.Provider(name=name, load=functools.partial(loaded, name)) for name in FAULTS},
    "planted-missing": providers.Provider(
        name="planted-missing", load=lambda: importlib.import_module("a_peer_that_is_not_installed").attention
    ),
    "planted-gpu-only": providers.Provider(name="planted-gpu-only", load=lambda: right, devices=("cuda",)),
    "planted-forward-only": providers.Provider(
        name="planted-forward-only", load=lambda: right, modes=("fwd",), why_modes="no gradient"
    ),
}

if __name__ == "__main__":
    providers.PROVIDERS.update(PLANTED)
    worker.main()

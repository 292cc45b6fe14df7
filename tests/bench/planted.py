"""A worker with planted faults: this file as a program is `python -m bench.worker` with `PLANTED` added."""

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import providers, worker  # noqa: E402
from bench.cases import six  # noqa: E402
from bench.environment import available_memory_mib  # noqa: E402
from verify.cases import Inputs  # noqa: E402

WORKER = (sys.executable, str(Path(__file__).resolve()))
Fault = Callable[[Inputs], tuple[Tensor, Tensor]]

right = providers.PROVIDERS["math"].load()


def out_of_memory(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """More than the worker may take, yet within what the system would let it reserve."""
    available = available_memory_mib()
    assert available is not None
    torch.empty(int(0.95 * available) * 2**20, dtype=torch.uint8)
    return right(inputs)


def segmentation_fault(inputs: Inputs) -> tuple[Tensor, Tensor]:
    ctypes.string_at(0)
    return right(inputs)


def raises(inputs: Inputs) -> tuple[Tensor, Tensor]:
    raise ValueError("planted\nover two lines")


def not_implemented(inputs: Inputs) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no such kernel")


def prints(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Right, but noisy on the standard output that events travel on."""
    print('{"event": "outcome", "id": 0}', flush=True)
    return right(inputs)


def tangent_lost(inputs: Inputs) -> tuple[Tensor, Tensor]:
    o, o_t = right(inputs)
    return o, 0 * o_t


def key_tangent_without_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Both outputs are right; the gradient of the third tangent lacks one per cent."""
    *others, v_t = six(inputs)
    q, k, v, q_t, k_t = others
    shrunk = 0.99 * v_t + 0.01 * v_t.detach()
    return right(Inputs(q, k, v, q_t, k_t, shrunk, is_causal=inputs.is_causal))


def not_finite(inputs: Inputs) -> tuple[Tensor, Tensor]:
    o, o_t = right(inputs)
    return o, o_t / 0 * 0


FAULTS: dict[str, Fault] = {
    "planted-oom": out_of_memory,
    "planted-crash": segmentation_fault,
    "planted-raise": raises,
    "planted-not-implemented": not_implemented,
    "planted-prints": prints,
    "planted-wrong": tangent_lost,
    "planted-wrong-gradient": key_tangent_without_gradient,
    "planted-nan": not_finite,
}


def loaded(name: str) -> Fault:
    return FAULTS[name]


PLANTED = {
    **{name: providers.Provider(name=name, load=functools.partial(loaded, name)) for name in FAULTS},
    "planted-gpu-only": providers.Provider(name="planted-gpu-only", load=lambda: right, devices=("cuda",)),
}

if __name__ == "__main__":
    providers.PROVIDERS.update(PLANTED)
    worker.main()

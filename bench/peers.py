"""How other people's kernels are called, from where the user has them; nothing of them is part of this project.

`--peer NAME=PATH` puts PATH before everything else that Python imports from; a peer without a path must be installed.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from reports.environment import cores
from verify.cases.inputs import Inputs

PEERS = ("official", "rcm", "jvp_flash_attention")
POWERS_OF_TWO = (16, 32, 64, 128, 256)

Attention = Callable[[Inputs], tuple[Tensor, ...]]


def load_official() -> Attention:
    """lumalabs/tvm, a checkout with jaxtyping and einops: under torch.func.jvp only, its plain output is not filled."""
    sdpa_jvp = importlib.import_module("jvp_utils.functional").sdpa_jvp

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return torch.func.jvp(sdpa_jvp, (x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t))[:2]

    return call


def load_rcm() -> Attention:
    """NVlabs/rcm, a checkout with einops: autotuned for each length anew."""
    _stand_in_for_flash_attn()
    module = importlib.import_module("rcm.utils.flash_attention_jvp_triton")
    compile_side_by_side(module._attn_fwd)

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return module.attention(x.q, x.k, x.v, x.q_t, x.k_t, x.v_t)

    return call


def load_jvp_flash_attention() -> Attention:
    """amorehead/jvp_flash_attention, installed or a checkout; a mask must be expanded to every batch and head."""
    fwd_dual = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual

    def call(x: Inputs) -> tuple[Tensor, ...]:
        scores = (*x.q.shape[:-1], x.k.shape[-2])
        mask = None if x.mask is None else x.mask.expand(scores)

        def primal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fwd_dual(q, k, v, attn_mask=mask, causal=x.is_causal)

        return torch.func.jvp(primal, (x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t))[:2]

    return call


def compile_side_by_side(tuner: Any) -> None:
    """An autotuner compiles its configurations in threads before it times them, not one after the other: 36 of them at
    every length would take most of a sweep's time."""
    if tuner.__dict__.get("prune_configs"):
        return  # it does already: providers are loaded for each shape
    prune, mode = tuner.prune_configs, importlib.import_module("triton").AsyncCompileMode

    def compiled(constants: dict[str, Any]) -> list[Any]:
        configurations: list[Any] = prune(constants)
        with ThreadPoolExecutor(cores()) as threads, mode(threads, ignore_errors=True):
            for configuration in configurations:
                options = {**constants, **configuration.all_kwargs(), "warmup": True}
                tuner.fn.run(*tuner.nargs.values(), **options)
        return configurations

    tuner.prune_configs = compiled


def _stand_in_for_flash_attn() -> None:
    """rcm imports flash_attn for its backward pass alone, which is not measured: without it the forward still loads."""
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("flash_attn is not installed")

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(_flash_attn_backward=missing, _flash_attn_varlen_backward=missing)
    package = types.ModuleType("flash_attn")
    package.__dict__.update(flash_attn_interface=interface, __path__=[])
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})

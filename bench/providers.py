"""The implementations that are compared.

To add one, add an entry to PROVIDERS: its name, what it can do, and how to load its function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verify.cases import Inputs

from .cases import Case, six

Attention = Callable[[Inputs], tuple[Tensor, Tensor]]

HALF_AND_SINGLE = ("float16", "bfloat16", "float32")
EVERY_FLOAT = (*HALF_AND_SINGLE, "float64")
BASELINE = "math"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation of attention with its JVP.

    `load` imports what it needs and returns the function from inputs to (o, o_t); it runs in the worker
    process only. The other fields say what the implementation can do at all; a case outside of that is a row
    `unsupported`.
    """

    name: str
    load: Callable[[], Attention]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = EVERY_FLOAT
    causal: bool = True
    gqa: bool = True
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")

    def why_not(self, case: Case, device: str) -> str:
        """Why this provider cannot serve the case; empty when it can."""
        if device not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {device}"
        if case.dtype not in self.dtypes:
            return f"{self.name} takes {', '.join(self.dtypes)}, not {case.dtype}"
        if case.causal and not self.causal:
            return f"{self.name} has no causal mask"
        if case.heads != case.kv_heads and not self.gqa:
            return f"{self.name} needs as many key heads as query heads"
        if case.mode not in self.modes:
            return f"{self.name} has no mode {case.mode}"
        return ""


def _load_flashjvp(backend: str | None) -> Attention:
    from flashjvp import attention_jvp

    def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return attention_jvp(*six(inputs), is_causal=inputs.is_causal, enable_gqa=_is_grouped(inputs), backend=backend)

    return call


def _load_math() -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
        def primal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=inputs.is_causal, enable_gqa=_is_grouped(inputs))

        operands = six(inputs)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(primal, operands[:3], operands[3:])[:2]

    return call


def _is_grouped(inputs: Inputs) -> bool:
    return inputs.q.shape[-3] != inputs.k.shape[-3]


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(name="flashjvp", load=lambda: _load_flashjvp(None)),
        Provider(
            name="flashjvp-triton",
            load=lambda: _load_flashjvp("triton"),
            devices=("cuda",),
            dtypes=HALF_AND_SINGLE,
        ),
        Provider(name="flashjvp-tiled", load=lambda: _load_flashjvp("tiled")),
        Provider(name="flashjvp-reference", load=lambda: _load_flashjvp("reference")),
        Provider(name=BASELINE, load=_load_math),
    )
}

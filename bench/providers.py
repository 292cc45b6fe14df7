"""The implementations that are compared.

To add one, add an entry to PROVIDERS: its name, what it can do, and how to load its function. Peers, which the user
checks out or installs, are in peers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verify.cases.inputs import Inputs

from . import peers
from .cases import REDUCED_LENGTH, Case

Attention = Callable[[Inputs], tuple[Tensor, ...]]

EXACT = ("fwd", "bwd", "fwd+bwd")
PLAIN = ("plain-fwd", "plain-bwd", "plain-fwd+bwd")
APPROXIMATE = ("approx-fwd",)
HALF_AND_SINGLE = ("float16", "bfloat16", "float32")
EVERY_FLOAT = (*HALF_AND_SINGLE, "float64")
EVERY_MASK = ("none", "bool", "additive", "empty-rows")
_FUSED = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")  # the fastest first
BASELINE = "math"
SUBJECT = "flashjvp"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation of attention with its JVP.

    `load` imports what it needs and returns the function from inputs to outputs: (o, o_t), or (o,) where the inputs
    have no tangents; it runs in the worker process only, once for each shape. The other fields say what the
    implementation can do at all; a case outside of that is a row `unsupported`. `why_modes`, `why_plain` and
    `why_masks` say why one is missing. From each of `other_kernels_from` queries on, a GPU may be given other kernels,
    which the gate judges as well. `compiles`: at its first calls, into a cache on the disk.
    """

    name: str
    load: Callable[[], Attention]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = EVERY_FLOAT
    modes: tuple[str, ...] = EXACT
    why_modes: str = ""
    why_plain: str = "it is measured with a JVP alone"
    masks: tuple[str, ...] = EVERY_MASK
    why_masks: str = ""
    head_dims: tuple[int, ...] | None = None
    causal: bool = True
    causal_with_mask: bool = False
    gqa: bool = True
    subsets: bool = False
    value_dims: bool = True
    other_kernels_from: tuple[int, ...] = ()
    compiles: bool = False

    def gate_length(self, case: Case, device: str) -> int:
        """The longest length of the gate's reduced shape, a multiple of 128, so that the case's kernels serve it."""
        reached = [first for first in self.other_kernels_from if case.queries >= first]
        if device == "cpu" or not reached:
            return REDUCED_LENGTH
        return reached[-1] + 128  # with a remainder by 128, a length is reduced to less

    def mode_for(self, asked: str) -> str:
        """The mode that is measured where `asked` was asked for: that one, or what there is of it in part."""
        served = (mode for mode in self.modes if mode == asked or mode.split("-", 1)[-1] == asked)
        return next(served, asked)

    def why_not(self, case: Case, device: str) -> str:
        """Why this provider cannot serve the case; empty when it can."""
        if device not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {device}"
        if case.dtype not in self.dtypes:
            return f"{self.name} takes {', '.join(self.dtypes)}, not {case.dtype}"
        if case.mode not in self.modes:
            why = self.why_plain if case.plain else self.why_modes
            return f"{self.name} has no mode {case.mode}" + (f": {why}" if why else "")
        if case.causal and not self.causal:
            return f"{self.name} has no causal mask"
        if case.mask not in self.masks:
            return f"{self.name} takes no mask {case.mask}" + (f": {self.why_masks}" if self.why_masks else "")
        if case.causal and case.mask != "none" and not self.causal_with_mask:
            return f"{self.name} takes a mask or a causal one, not both"
        if self.head_dims is not None and case.head_dim not in self.head_dims:
            return f"{self.name} takes head dims {', '.join(map(str, self.head_dims))}, not {case.head_dim}"
        if case.heads != case.kv_heads and not self.gqa:
            return f"{self.name} needs as many key heads as query heads"
        if case.width != case.head_dim and not self.value_dims:
            return f"{self.name} takes values of the head dim of keys"
        if not case.is_whole and not self.subsets:
            return f"{self.name} is measured with every tangent and cotangent alone"
        return ""


def _load_flashjvp(backend: str | None) -> Attention:
    import flashjvp

    def call(x: Inputs) -> tuple[Tensor, ...]:
        if not x.has_tangent:
            return (flashjvp.attention(x.q, x.k, x.v, x.mask, 0.0, x.is_causal, None, True, backend=backend),)
        tangents = x.q_t, x.k_t, x.v_t
        return flashjvp.attention_jvp(x.q, x.k, x.v, *tangents, x.mask, x.is_causal, None, True, backend=backend)

    return call


def _load_flashjvp_func_jvp() -> Attention:
    import flashjvp

    def call(x: Inputs) -> tuple[Tensor, ...]:
        def primal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flashjvp.attention(q, k, v, x.mask, 0.0, x.is_causal, None, True)

        return torch.func.jvp(primal, (x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t))[:2]

    return call


def _load_math() -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(x: Inputs) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda q, k, v: _sdpa(x, q, k, v), (x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t))[:2]

    return call


def _load_math_compiled() -> Attention:
    """Compiled for each shape anew: PyTorch would silently run the original after some recompilations."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(
        primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], mask: Tensor | None, is_causal: bool, gqa: bool
    ) -> tuple[Tensor, Tensor]:
        def primal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=gqa)

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(primal, primals, tangents)[:2]

    def call(x: Inputs) -> tuple[Tensor, ...]:
        assert x.q_t is not None and x.k_t is not None and x.v_t is not None
        return compiled((x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t), x.mask, x.is_causal, is_grouped(x))

    return call


def _load_plain(*backends: str) -> Attention:
    """PyTorch's fused attention: the first of its backends that takes the inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = [getattr(SDPBackend, backend) for backend in backends]

    def call(x: Inputs) -> tuple[Tensor, ...]:
        with sdpa_kernel(chosen, set_priority=True):
            return (_sdpa(x, x.q, x.k, x.v),)

    return call


def _load_finite_difference() -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = [getattr(SDPBackend, backend) for backend in _FUSED]

    def call(x: Inputs) -> tuple[Tensor, ...]:
        h = difference_step(x.q.dtype)
        with sdpa_kernel(chosen, set_priority=True):
            o = _sdpa(x, x.q, x.k, x.v)
            moved = _sdpa(x, *stepped(x, h))
        return o, (moved - o) / h

    return call


def difference_step(dtype: torch.dtype) -> float:
    """The step of a one-sided difference quotient: the power of two next to the root of the type's eps.

    The step's own error grows with h, that of rounding with eps / h.
    """
    return 2.0 ** round(torch.tensor(torch.finfo(dtype).eps).log2().item() / 2)


def stepped(x: Inputs, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v moved along their tangents, rounded once each."""
    assert x.q_t is not None and x.k_t is not None and x.v_t is not None
    return x.q.add(x.q_t, alpha=h), x.k.add(x.k_t, alpha=h), x.v.add(x.v_t, alpha=h)


def is_grouped(x: Inputs) -> bool:
    return x.q.shape[-3] != x.k.shape[-3]


def _sdpa(x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, x.mask, is_causal=x.is_causal, enable_gqa=is_grouped(x))


_OUR_KERNELS: dict[str, Any] = {"causal_with_mask": True, "other_kernels_from": (1024, 2048), "compiles": True}
_FLASHJVP: dict[str, Any] = {"modes": EXACT + PLAIN, "subsets": True, **_OUR_KERNELS}
_NO_TANGENT = "it is attention without a JVP"
_NO_GRADIENT = "its tangent output carries no gradient"
_LISTED = (
    Provider(name=SUBJECT, load=lambda: _load_flashjvp(None), **_FLASHJVP),
    Provider(
        name="flashjvp-triton",
        load=lambda: _load_flashjvp("triton"),
        devices=("cuda",),
        dtypes=HALF_AND_SINGLE,
        **_FLASHJVP,
    ),
    Provider(name="flashjvp-tiled", load=lambda: _load_flashjvp("tiled"), **_FLASHJVP),
    Provider(name="flashjvp-reference", load=lambda: _load_flashjvp("reference"), **_FLASHJVP),
    Provider(name="flashjvp-func-jvp", load=_load_flashjvp_func_jvp, **_OUR_KERNELS),
    Provider(name=BASELINE, load=_load_math),
    Provider(name="math-compiled", load=_load_math_compiled, compiles=True),
    Provider(
        name="plain",
        load=lambda: _load_plain(*_FUSED),
        modes=PLAIN,
        why_modes=_NO_TANGENT,
    ),
    Provider(name="plain-flash", load=lambda: _load_plain("FLASH_ATTENTION"), modes=PLAIN, why_modes=_NO_TANGENT),
    Provider(
        name="finite-difference",
        load=_load_finite_difference,
        modes=APPROXIMATE,
        why_modes="two forward calls have no gradient of a JVP",
    ),
    Provider(
        name="official",
        load=peers.load_official,
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        why_plain="its output is wrong without a JVP",
        compiles=True,
        masks=("none",),
        causal=False,
        gqa=False,
        value_dims=False,
    ),
    Provider(
        name="rcm",
        load=peers.load_rcm,
        devices=("cuda",),
        dtypes=HALF_AND_SINGLE,
        modes=("fwd",),
        why_modes=_NO_GRADIENT,
        compiles=True,
        masks=("none",),
        head_dims=peers.POWERS_OF_TWO,
        causal=False,
        gqa=False,
        value_dims=False,
    ),
    Provider(
        name="jvp_flash_attention",
        load=peers.load_jvp_flash_attention,
        devices=("cuda",),
        dtypes=HALF_AND_SINGLE,
        modes=("fwd",),
        why_modes=_NO_GRADIENT,
        compiles=True,
        masks=("none", "bool", "empty-rows"),
        why_masks="it refuses minus infinity",
        head_dims=peers.POWERS_OF_TWO,
        gqa=False,
        value_dims=False,
    ),
)
PROVIDERS = {provider.name: provider for provider in _LISTED}

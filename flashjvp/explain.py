"""What a call of `attention_jvp` gets, and why nothing faster: said before anything is launched."""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _torch, api, call_forms, checks, environment, partial, support
from .backends import select
from .backends.high import HALF
from .backends.patterns import Band, Listed
from .canonical import canonical
from .operands import Inputs, Operands, Options
from .serving import check_precision, plain_mask

if TYPE_CHECKING:
    from .kernels.launch.call import Call

Maybe = Tensor | None

WARP_SPECIALISED, PORTABLE, DENSE = "warp-specialised", "portable", "plain PyTorch, dense"
TILE_BY_TILE, NONE = "plain PyTorch, tile by tile", "none: there is nothing to compute"
_WIDTH = 80
_MARGIN = 10


@dataclass(frozen=True)
class Explanation:
    """What serves a call, forward and backward; `str()` is for a reader.

    backend: "triton", "tiled" or "reference".
    kernels: "warp-specialised", "portable", or what stands in for kernels.
    tiles: family of kernels -> block sizes, by name. The backward pass is one through all results that gives every
        gradient, and whose cotangents lie in memory as the kernels like it.
    why_not_faster: why the call, or its backward pass through o alone, gets nothing faster, which tensors are copied
        because kernels cannot read them as they are and, where that is in the user's hands, what to change.
    versions: torch, triton, python, flashjvp and the device.
    measured: whether the README's figures were measured with these releases of torch and Triton on such a GPU.
    """

    backend: str
    kernels: str
    tiles: Mapping[str, Mapping[str, int]]
    why_not_faster: tuple[str, ...]
    versions: Mapping[str, str]
    measured: bool

    def __str__(self) -> str:
        found = dict(self.versions)
        device = found.pop("device")
        measured = "yes: the README's figures are of these releases on such a GPU"
        if not self.measured:
            measured = "no: the README's figures are of other releases, kernels or devices (see python -m flashjvp)"
        paragraphs = {
            "backend": [f"{self.backend} ({self.kernels})"],
            "because": [*self.why_not_faster] or ["flashjvp has nothing faster"],
            "tiles": [f"{family}: {_words(tile)}" for family, tile in self.tiles.items()],
            "versions": [", ".join(f"{name} {version}" for name, version in found.items())],
            "device": [device],
            "measured": [measured],
        }
        return "\n".join(line for name, words in paragraphs.items() for line in _beside(name, words))


def explain(
    q: Maybe = None,
    k: Maybe = None,
    v: Maybe = None,
    q_t: Maybe = None,
    k_t: Maybe = None,
    v_t: Maybe = None,
    attn_mask: Maybe = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    attn_mask_t: Maybe = None,
    dropout_p: float | Tensor = 0.0,
    window: tuple[int | None, int | None] | None = None,
    precision: Literal["high"] | None = None,
    backend: str | None = None,
    layout: str = "bhmd",
    query: Maybe = None,
    key: Maybe = None,
    value: Maybe = None,
) -> Explanation:
    """Prints and returns what `attention_jvp` would do with the same arguments: backend, kernels, tiles, and why.

    Nothing is launched and no number in a tensor is read. Tensors on the meta device will do: what a GPU gets is then
    explained with `backend="triton"`. A call without tangents is that of `attention`. To be called on ordinary tensors,
    outside of the transforms of `torch.func`.

    Raises:
        What `attention_jvp` raises for these arguments.
    """
    q, k, v = call_forms.by_either_name(q, k, v, query, key, value)
    if layout != "bhmd":
        q, k, v, q_t, k_t, v_t = call_forms.heads_first(layout, q=q, k=k, v=v, q_t=q_t, k_t=k_t, v_t=v_t)
    check_precision(precision, window, attn_mask)
    window = partial.window_of(window)
    block_mask = attn_mask if partial.is_block_mask(attn_mask) else None
    attn_mask, is_causal = (None, is_causal) if block_mask else plain_mask(attn_mask, is_causal, q, k)
    pattern = Listed() if block_mask else Band(-1, 1) if window else None
    dropout_p, scale = call_forms.number("dropout_p", dropout_p, q), call_forms.number("scale", scale, q)
    checks.options(dropout_p, is_causal, scale, enable_gqa)
    with _WithoutCopies():
        operands = canonical(Operands(q, k, v, q_t, k_t, v_t, attn_mask, attn_mask_t), enable_gqa, backend)
        options = Options(is_causal, api._scale(scale), backend, float(dropout_p))
        served = _served(operands, options, pattern, precision is not None)
    explanation = _explanation(served, operands.q, backend)
    print(explanation)
    return explanation


_Mode: Any = _torch.TorchDispatchMode or nullcontext


class _WithoutCopies(_Mode):
    """What would be cast or copied gets memory of its own, and nothing in it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            of = {"dtype": kwargs.get("dtype"), "memory_format": kwargs.get("memory_format") or torch.preserve_format}
            return torch.empty_like(args[0], **of)
        return func(*args, **kwargs)


class _Served(NamedTuple):
    """How a backend serves a call, and why it does not do so faster."""

    backend: str
    kernels: str
    tiles: dict[str, dict[str, int]]
    reasons: list[str]
    wide: bool = False


def _served(operands: Operands, options: Options, pattern: Band | Listed | None, high: bool) -> _Served:
    """Of canonical operands. `pattern` stands for what chooses keys besides masks, if anything does; `high`: with
    precision="high"."""
    q, k, v, mask = operands.q, operands.k, operands.v, operands.mask
    is_causal, scale, dropout_p = options.of_backend(q)
    wide = select.is_wide(q, v)
    chosen = options.backend or select.choose(q.device, q.dtype, wide)
    if chosen == "reference":
        return _Served(chosen, DENSE, {}, [], wide)
    if chosen == "tiled":
        from .backends.tiled_grid import Grid

        grid = Grid.of(q, k, None, is_causal)
        tile = {"queries": grid.tile_queries, "keys": grid.tile_keys}
        return _Served(chosen, TILE_BY_TILE, {"forward": tile, "backward": tile}, [], wide)
    select.resolve(chosen, q.device, q.dtype)
    from .kernels.hopper import eligibility
    from .kernels.launch import schedule
    from .kernels.launch.call import Call

    seed = q.new_empty((), dtype=torch.int64) if dropout_p else None
    high = high and q.dtype in HALF
    is_causal = is_causal and pattern is None
    call = Call(q, k, v, mask, is_causal, operands.mask_t, seed, dropout_p, pattern, high)
    if call.is_empty:
        return _Served(chosen, NONE, {}, [])
    jvp = operands.has_tangents
    obstacles = [schedule.why_not_pipelines(call.device, call.precision, call.width)]
    if schedule.has_pipelines(call.device, call.precision, call.width):
        obstacles.append(eligibility.obstacle(call, operands.inputs, scale))
    found = [reason for reason in obstacles if reason is not None]
    misfit = eligibility.misfit_of_narrow(call) if found else eligibility.misfit(call, operands.inputs, ())
    copies = [] if misfit is None else [f"the kernels read copies: {misfit}"]
    if found:
        found += copies
        return _Served(chosen, PORTABLE, _portable_tiles(call, jvp, _is_learned(operands)), found)
    of_o_alone = eligibility.obstacle(call, Inputs(q, k, v), scale)
    reasons = [] if of_o_alone is None else [f"a backward pass of o alone gets the portable kernels: {of_o_alone}"]
    reasons = [*copies, *reasons]
    return _Served(chosen, WARP_SPECIALISED, _warp_specialised_tiles(call, jvp, _is_learned(operands)), reasons)


def _is_learned(x: Operands) -> bool:
    """Whether the mask or its tangent gets a gradient."""
    return any(bias is not None and bias.requires_grad for bias in (x.mask, x.mask_t))


def _portable_tiles(call: "Call", jvp: bool, learned: bool) -> dict[str, dict[str, int]]:
    from .kernels.launch import schedule

    of_keys = schedule.key_side_launches((True, True, jvp or None, jvp or None), call.width, call.precision)
    families = ["forward", "backward_preprocess", "backward_query", *(family for family, _ in of_keys)]
    families += ["backward_bias"] * learned
    found = {name: call.tile(name)._asdict() for name in families}
    return {name: {size: value for size, value in tile.items() if value} for name, tile in found.items()}


def _warp_specialised_tiles(call: "Call", jvp: bool, learned: bool) -> dict[str, dict[str, int]]:
    from .kernels.hopper import eligibility
    from .kernels.hopper.persistent_launch import persistent_of
    from .kernels.launch import schedule

    tiles = schedule.pipelines(call.device, call.precision, call.width)["tangents" if jvp else "plain"]
    in_one_pass = eligibility.in_one_pass(call) and "backward_one_pass" in tiles
    may_sum = eligibility.may_accumulate_dq(call, in_one_pass)
    of_keys, summed = schedule.key_side_pipeline(tiles, call.width, call.sizes.queries, may_sum, in_one_pass)
    apart = "backward_value" in tiles and of_keys != "backward_one_pass"
    others = ["backward_value"] * apart + ["backward_query"] * (not summed)
    found = {}
    for name in ("forward", of_keys, *others):
        persistent = persistent_of(call, jvp, name, call.precision != "half")
        found[name] = (persistent.pipeline if persistent else tiles[name])._asdict()
    if learned:
        found["backward_bias"] = call.tile("backward_bias")._asdict()  # the one portable kernel
    return {name: {size: value for size, value in tile.items() if value} for name, tile in found.items()}


def _explanation(served: _Served, q: Tensor, asked: str | None) -> Explanation:
    found = support.installed()
    row, device = support.row_of(found), q.device
    capability = environment.capability(device.index) if device.type == "cuda" else None
    where = str(device)
    if capability is not None:
        where += f" ({environment.device_name(device)}, compute capability {capability[0]}.{capability[1]})"
    versions = {**found._asdict(), "triton": found.triton or "not installed", "device": where}
    on_kernels = served.backend == "triton" and served.kernels == WARP_SPECIALISED
    measured = on_kernels and capability == (9, 0) and row is not None and row.gpu == support.MEASURED
    reasons = (*_why_not_triton(served.backend, asked, q.device, q.dtype, served.wide), *served.reasons)
    return Explanation(served.backend, served.kernels, served.tiles, reasons, versions, measured)


def _why_not_triton(chosen: str, asked: str | None, device: torch.device, dtype: torch.dtype, wide: bool) -> list[str]:
    """Why plain PyTorch serves a call."""
    if chosen == "triton":
        return []
    if asked is not None and select.choose(device, dtype, wide) == "triton":
        return [f"backend={asked!r} was asked for: backend=None takes the kernels"]
    if device.type == "meta" and not wide:
        return ["tensors on the meta device: backend='triton' explains what a GPU of compute capability 9.0 gets"]
    if device.type not in ("cuda", "meta"):
        return [f"tensors on the {device.type} device: the kernels need a GPU"]
    return [f"the kernels do not serve this: {select.obstacle('triton', device, dtype, wide)}"]


def _words(tile: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile.items())


def _beside(name: str, paragraphs: Sequence[str]) -> list[str]:
    """Lines of at most 80 columns: a name in the margin, and what is said of it beside."""
    lines = []
    for i, words in enumerate(paragraphs):
        start = ("" if i else name).ljust(_MARGIN)
        lines += textwrap.wrap(
            words, _WIDTH, initial_indent=start, subsequent_indent=" " * (_MARGIN + 2), break_on_hyphens=False
        )
    return lines

"""`precompile`: the kernels that a program will need, compiled before its first call."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import environment
from .backends import select
from .backends.high import HALF
from .backends.patterns import Band, Listed
from .errors import ArgumentTypeError, ArgumentValueError
from .layout import empty_lse, empty_statistic
from .serving import check_precision

MASKS = ("bool", "additive", "blocks")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Call(NamedTuple):
    """The calls that kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    tokens: int
    group: int
    tangents: str
    mask: str | None
    is_causal: bool
    window: bool
    packed: bool
    dropout: bool
    backward: bool
    high: bool


def precompile(
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    tangents: str = "qkv",
    backward: bool = True,
    attn_mask: str | None = None,
    is_causal: bool = False,
    window: bool = False,
    packed: bool = False,
    enable_gqa: bool = False,
    dropout: bool = False,
    precision: Literal["high"] | None = None,
    tokens: int = 4096,
    device: torch.device | str = "cuda",
) -> int:
    """Compiles the kernels of calls like these, several at a time, and returns how many were not compiled yet.

    Nothing is launched. What is compiled depends on what is named here, and neither on the batch size nor on the number
    of heads, but on `tokens`: long sequences (4096 here) and short ones may get other kernels. The kernels are those of
    one batch dim and of tensors whose rows start at multiples of 16 bytes; others are compiled by the first call that
    needs them. Triton keeps what it compiled in a cache on disk, so that a later process only loads it.

    Args:
        head_dim: D of q and k, from 1 to 256.
        dtype: float16, bfloat16 or float32 (with TF32 or without, as PyTorch is set now).
        value_dim: Dv of v; D by default.
        tangents: which of q, k and v have a tangent, as letters; "" is plain `attention`.
        backward: whether to compile the backward pass, too, with every gradient of these inputs.
        attn_mask: None, "bool" or "additive" (of the type of q), a mask of [M, N] without a gradient, or "blocks", a
            BlockMask.
        is_causal: as of `attention`.
        window: whether there is a window; its numbers make no difference.
        packed: True for the kernels of `attention_varlen`, without mask, window and dropout.
        enable_gqa: whether a key head serves several query heads.
        dropout: whether there is dropout; its rate makes no difference.
        precision: as of `attention`, without window, block mask and packed sequences.
        tokens: queries, and as many keys.
        device: the GPU.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is of another type, none of those above, or not beside
            others.
        UnsupportedError: no kernels serve this type, or head dims so wide in it, on this device.
    """
    value_dim = head_dim if value_dim is None else value_dim
    _check_sizes(head_dim=head_dim, value_dim=value_dim, tokens=tokens)
    _check_flags(
        is_causal=is_causal, window=window, packed=packed, enable_gqa=enable_gqa, dropout=dropout, backward=backward
    )
    _check(dtype, tangents, attn_mask)
    check_precision(precision)
    if precision is not None and (window or packed or attn_mask == "blocks"):
        raise ArgumentValueError(f"precision: expected None beside window, packed and blocks, got {precision!r}")
    if packed and (attn_mask is not None or window or dropout):
        raise ArgumentValueError("packed: expected no mask, window or dropout beside it, got one")
    found = _gpu(device)
    select.check_head_dims("triton", select.is_too_wide(max(head_dim, value_dim), found, dtype))
    select.check("triton", found, dtype)
    from .kernels.launch import compilation

    like = Call(
        found,
        dtype,
        head_dim,
        value_dim,
        tokens,
        2 if enable_gqa else 1,
        tangents,
        attn_mask,
        is_causal,
        window,
        packed,
        dropout,
        backward,
        precision is not None and dtype in HALF,
    )
    wanted: dict[Any, compilation.Wanted] = {}
    for function, args in _calls(like):
        wanted |= {x.key: x for x in compilation.kernels_of(function, *args)}
    compilation.compile_all(list(wanted.values()))
    return len(wanted)


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        most = 1 << 20 if name == "tokens" else select.MAX_HEAD_DIM
        if not isinstance(size, int) or isinstance(size, bool):
            raise ArgumentTypeError(f"{name}: expected an int, got {type(size).__name__}")
        if not 1 <= size <= most:
            raise ArgumentValueError(f"{name}: expected 1 to {most}, got {size}")


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ArgumentTypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def _check(dtype: object, tangents: object, mask: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ArgumentTypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    if not isinstance(tangents, str):
        raise ArgumentTypeError(f"tangents: expected a str, got {type(tangents).__name__}")
    if set(tangents) - set("qkv"):
        raise ArgumentValueError(f"tangents: expected letters of 'qkv', got {tangents!r}")
    if mask is not None and mask not in MASKS:
        raise ArgumentValueError(f"attn_mask: expected None, 'bool', 'additive' or 'blocks', got {mask!r}")


def _gpu(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cuda", "meta"):  # meta: a GPU that is not there, for tests
        raise ArgumentValueError(f"device: expected a CUDA device, got {str(device)!r}")
    if found.type == "meta":
        return found
    try:
        found = found if found.index is not None else torch.device("cuda", torch.cuda.current_device())
        environment.capability(found.index)
    except (RuntimeError, AssertionError) as error:  # which of them depends on the build of PyTorch
        raise ArgumentValueError(f"device: expected a CUDA device of this machine, got {str(device)!r}") from error
    return found


def _pattern(like: Call) -> tuple[Any, ...]:
    """The pattern beside a mask, if there is one."""
    if like.window:
        return (Band(-1, 1),)
    return (Listed(),) if like.mask == "blocks" else ()


def _calls(like: Call) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Functions of the backend and their arguments, tensors that nobody has written."""
    from .backends import triton, triton_varlen

    kernels: Any = triton_varlen if like.packed else triton
    heads = {"q": like.group, "k": 1, "v": 1, "o": like.group}

    def empty(name: str) -> Tensor:
        width = like.head_dim if name in "qk" else like.value_dim
        x = torch.empty(1, heads[name], like.tokens, width, dtype=like.dtype, device=like.device)
        return x.transpose(1, 2) if like.packed else x

    q, k, v, o, d_o = (empty(name) for name in "qkvoo")
    mask, pattern = _mask(like), _pattern(like)
    seed = torch.empty((), dtype=torch.int64, device=like.device) if like.dropout else None
    options = like.is_causal and not pattern, like.head_dim**-0.5, 0.5 if like.dropout else 0.0
    lse = empty_lse(q, mask)
    if like.high:
        o, d_o, pattern = o.float(), d_o.float(), (None, True)
    if not like.tangents:
        yield kernels.forward, (q, k, v, mask, seed, *options, *pattern)
        if like.backward:
            yield kernels.backward, (d_o, q, k, v, o, lse, mask, seed, *options, (True, True, True, False), *pattern)
        return
    q_t, k_t, v_t = (empty(name) if name in like.tangents else None for name in "qkv")
    yield kernels.forward_jvp, (q, k, v, q_t, k_t, v_t, mask, None, seed, *options, *pattern)
    if like.backward:
        given = d_o, d_o, q, k, v, q_t, k_t, v_t, o, o, lse, empty_statistic(q), mask, None, seed
        yield kernels.backward_jvp, (*given, *options, (*(True,) * 6, False, False), *pattern)


def _mask(like: Call) -> Tensor | None:
    """What comes in the mask's place."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    if like.packed:
        return empty(2, 2, dtype=torch.int32)
    if like.mask == "blocks":
        return empty(1, dtype=torch.int32)
    if like.mask is None:
        return None
    return empty(1, 1, like.tokens, like.tokens, dtype=torch.bool if like.mask == "bool" else like.dtype)

"""flashjvp as an attention backend of Hugging Face diffusers; the one file that knows private names of that package."""

from importlib import import_module
from typing import Any

from torch import Tensor

from ..api import attention
from ..errors import ArgumentTypeError, ArgumentValueError, UnsupportedError


def register(name: str = "flashjvp") -> str:
    """Registers flashjvp as a backend of diffusers' attention: `model.set_attention_backend(name)`, or for a while::

        with diffusers.models.attention_dispatch.attention_backend(name):
            ...

    This reaches the models that ask diffusers' dispatcher (Flux, Wan, Qwen-Image and others). The rest ignore
    `set_attention_backend` without a word: DiT, UNets, Stable Diffusion 3, PixArt and whatever else has processors that
    call scaled_dot_product_attention themselves. `flashjvp.replaced()` serves all of them, and says what it served.
    Registering twice is harmless.

    Args:
        name: what the backend is to be called, in lower case.

    Returns:
        The name.

    Derivatives:
        Those of `flashjvp.attention`, which serves the calls.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        ArgumentTypeError: a name that is not a string.
        ArgumentValueError: a name that is not in lower case or belongs to another backend.
        UnsupportedError: a release of diffusers whose dispatcher is not the one that this file knows. Later, in the
            forward pass of a model: context parallelism, a log-sum-exp as a result, and whatever `flashjvp.attention`
            refuses.

    Source:
        attention_dispatch of diffusers, which has no public way to add a backend; tried with releases 0.36 and 0.42.
    """
    _check_name(name)
    diffusers = import_module("diffusers")
    try:
        dispatch = import_module("diffusers.models.attention_dispatch")
        names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
        add, backends = registry.register, registry._backends
        member = names._value2member_map_.get(name)
        if member is None:
            member = _new_member(names, name)
        elif backends.get(member) is not _backend:
            raise ArgumentValueError(f"name: expected one that is free, got {name!r}, a backend of diffusers")
        add(member)(_backend)
    except (ImportError, AttributeError, TypeError) as error:
        came = getattr(diffusers, "__version__", "an unknown release")
        raise UnsupportedError(
            f"diffusers: expected a release whose attention_dispatch is known (0.36 to 0.42 were tried), got {came}; "
            "flashjvp.replaced() needs none of it"
        ) from error
    return name


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention with heads next to the head dim: query [B, M, Hq, D], key [B, N, Hkv, D], value [B, N, Hkv, Dv].

    The dispatcher passes on what it finds in this signature. A mask of two dims, [B, N], is one of keys.
    """
    if return_lse:
        raise UnsupportedError("return_lse: expected False (the log-sum-exp has no derivative here), got True")
    if _parallel_config is not None:
        raise UnsupportedError("parallel_config: expected None (context parallelism is not implemented), got one")
    if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = (x.transpose(-2, -3) for x in (query, key, value))
    return attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(-2, -3)


def _new_member(names: Any, name: str) -> Any:
    """One more name of a backend. An Enum takes no members after it was made, but diffusers asks for nothing else."""
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    names._member_map_[member._name_] = names._value2member_map_[name] = member
    names._member_names_.append(member._name_)
    return member


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ArgumentTypeError(f"name: expected a string, got an object of type {type(name).__name__}")
    if not name or name != name.lower():
        raise ArgumentValueError(f"name: expected one in lower case, got {name!r}")

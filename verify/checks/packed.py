"""Packed sequences: attention_varlen_jvp gives each sequence what an explicit call of it alone gives."""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

import flashjvp

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import NAMES, QUERY_SIDE, Results, Subject, operands

OF_QUERIES = ("q", "q_t", "d_o", "d_o_t")


def packed(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The rows of one batch entry, cut into sequences of other lengths than tiles have, two of them without queries or
    keys. The case's own mask is left out. Nothing where there is no batch entry."""
    if 0 in inputs.q.shape[:-3]:
        return []
    whole = replace(inputs, mask=None).map(lambda x: x.reshape(-1, *x.shape[-3:])[0])
    m, n = whole.q.shape[-2], whole.k.shape[-2]
    of_q, of_k = (0, m // 3, m // 3, m - m // 4, m), (0, n // 2, n - n // 3, n, n)
    results = _packed(whole, subject, of_q, of_k)
    found = []
    for b, (queries, keys) in enumerate(zip(itertools.pairwise(of_q), itertools.pairwise(of_k), strict=True)):
        alone, part = _alone(whole, slice(*queries), slice(*keys)), _part(results, slice(*queries), slice(*keys))
        if alone.q.shape[-2] == 0 or alone.k.shape[-2] == 0:
            continue
        for identity in tolerance.same_results(part, subject.results(alone), alone, alone):
            found.append(replace(identity, quantity=f"{identity.quantity}, sequence {b}"))
    return found


def _packed(whole: Inputs, subject: Subject, of_q: Sequence[int], of_k: Sequence[int]) -> Results:
    """Of the packed call, heads first."""
    leaves = [None if x is None else x.detach().transpose(0, 1).contiguous().requires_grad_() for x in operands(whole)]
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=whole.q.device) for ends in (of_q, of_k))
    q, k, v, *tangents = leaves
    assert q is not None and k is not None and v is not None
    options: dict[str, Any] = {
        "is_causal": whole.is_causal, "scale": whole.scale, "enable_gqa": True, "backend": subject.backend
    }  # fmt: skip
    o_t = None
    if whole.has_tangent:
        o, o_t = flashjvp.attention_varlen_jvp(q, k, v, cu_q, cu_k, None, None, *tangents, **options)
    else:
        o = flashjvp.attention_varlen(q, k, v, cu_q, cu_k, **options)
    pairs = [(y, d.transpose(0, 1)) for y, d in ((o, whole.d_o), (o_t, whole.d_o_t)) if y is not None and d is not None]
    present = [x for x in leaves if x is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, present, cotangents, materialize_grads=True))
    everything: list[Tensor | None] = [o.detach(), None if o_t is None else o_t.detach()]
    everything += [None if x is None else next(grads) for x in leaves]
    found: list[Any] = [None if x is None else x.transpose(0, 1) for x in everything]
    return Results(*found)


def _alone(whole: Inputs, queries: slice, keys: slice) -> Inputs:
    """The call of one sequence; under causal masking its last query is aligned with its last key, by a mask."""
    parts: dict[str, Any] = {}
    for field in fields(whole):
        x = getattr(whole, field.name)
        if isinstance(x, Tensor):
            parts[field.name] = x[..., queries if field.name in OF_QUERIES else keys, :]
    alone = replace(whole, **parts)
    rows, columns = alone.q.shape[-2], alone.k.shape[-2]
    if not whole.is_causal or rows == columns:
        return alone
    mask = torch.ones(1, rows, columns, dtype=torch.bool, device=whole.q.device).tril(columns - rows)
    return replace(alone, is_causal=False, mask=mask)


def _part(results: Results, queries: slice, keys: slice) -> Results:
    parts: dict[str, Any] = {}
    for name in NAMES:
        x = getattr(results, name)
        parts[name] = None if x is None else x[..., queries if name in QUERY_SIDE else keys, :]
    return Results(**parts)

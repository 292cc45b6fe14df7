"""The public functions as a drop-in for PyTorch's: signature, call forms, broadcasting, transforms.

Agreement is asked for in float64, where only the order of sums may differ, as closely as torch.testing does by default.
Error budgets in every type are verify's business.
"""

import ast
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import flashjvp
from flashjvp import attention, attention_jvp
from tests.flashjvp.forms import BACKENDS, DV, FORMS, B, D, H, K, M, N, Q, V, normal, qkv, some_keys


def parameters(function: Any) -> list[tuple[str, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY]


def test_signature_is_that_of_pytorch() -> None:
    assert scaled_dot_product_attention.__doc__ is not None
    stated = scaled_dot_product_attention.__doc__.partition("Tensor:")[0].strip()
    function = ast.parse(f"def {stated}Tensor: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    names, defaults = [a.arg for a in function.args.args], [ast.literal_eval(d) for d in function.args.defaults]
    assert names[:3] == ["query", "key", "value"]
    assert len(defaults) == len(names) - 3
    ours = parameters(attention)
    assert [name for name, _ in ours] == ["q", "k", "v", *names[3:]]
    assert [default for _, default in ours[3:]] == defaults
    assert all(type(a) is type(b) for (_, a), b in zip(ours[3:], defaults, strict=True))


def test_attention_jvp_takes_the_same_but_tangents_for_dropout() -> None:
    same = [p for p in parameters(attention) if p[0] != "dropout_p"]
    assert parameters(attention_jvp) == [*same[:3], ("q_t", None), ("k_t", None), ("v_t", None), *same[3:]]


@pytest.mark.parametrize("function", [attention, attention_jvp])
def test_backend_and_other_names_are_keyword_only(function: Any) -> None:
    backend = inspect.signature(function).parameters["backend"]
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY
    assert backend.default is None
    others = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    of_tangents = ["attn_mask_t", "dropout_p"] if function is attention_jvp else []
    assert others == [*of_tangents, "window", "precision", "backend", "layout", "query", "key", "value"]


# The scores are all 0 then, so rows of v are averaged, as in PyTorch's other releases.
NOT_ZEROS = pytest.mark.skipif(torch.__version__.startswith("2.12."), reason="PyTorch 2.12 gives zeros without columns")
EVERY_FORM = [pytest.param(form, marks=[NOT_ZEROS] * form.startswith("no columns")) for form in FORMS]


@BACKENDS
@pytest.mark.parametrize("form", EVERY_FORM)
def test_drop_in_for_pytorch(form: str, backend: str | None) -> None:
    """Values and gradients, which are summed where an input was broadcast."""
    shapes, args, kwargs = FORMS[form]
    inputs: Any = [x.requires_grad_() for x in qkv(*shapes)]
    theirs = scaled_dot_product_attention(*inputs, *args, **kwargs)
    ours = attention(*inputs, *args, **kwargs, backend=backend)
    assert_close(ours, theirs)
    d_o = normal(*theirs.shape, seed=4)
    assert_close(torch.autograd.grad(ours, inputs, d_o), torch.autograd.grad(theirs, inputs, d_o))


@BACKENDS
@pytest.mark.parametrize("form", EVERY_FORM)
def test_attention_jvp_is_the_jvp_of_pytorchs(form: str, backend: str | None) -> None:
    shapes, args, kwargs = FORMS[form]
    primals = qkv(*shapes)
    tangents: Any = tuple(normal(*x.shape, seed=5 + i) for i, x in enumerate(primals))
    with sdpa_kernel(SDPBackend.MATH):
        theirs = torch.func.jvp(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, *args, **kwargs), primals, tangents
        )
    assert_close(attention_jvp(*primals, *tangents, *args[:1], *args[2:], **kwargs, backend=backend), theirs)
    dual = torch.func.jvp(lambda q, k, v: attention(q, k, v, *args, **kwargs, backend=backend), primals, tangents)
    assert_close(dual, theirs)


def test_scale_and_gqa_may_be_given_by_position_too() -> None:
    inputs = qkv(Q, (B, 2, N, D), (B, 2, N, DV))
    by_name = attention(*inputs, scale=0.3, enable_gqa=True)
    assert torch.equal(attention(*inputs, None, 0.0, False, 0.3, True), by_name)
    assert torch.equal(attention_jvp(*inputs, None, None, None, None, False, 0.3, True)[0], by_name)


@BACKENDS
def test_mask_and_causal_both_apply(backend: str | None) -> None:
    inputs, mask = qkv(Q, K, V), some_keys(H, M, N)
    both = scaled_dot_product_attention(*inputs, mask & torch.ones(M, N, dtype=torch.bool).tril())
    assert_close(attention(*inputs, mask, is_causal=True, backend=backend), both)
    assert_close(attention(*inputs, mask.double().log(), is_causal=True, backend=backend), both)


@BACKENDS
def test_a_missing_tangent_is_zero(backend: str | None) -> None:
    q, k, v = qkv(Q, K, V)
    o, o_t = attention_jvp(q, k, v, backend=backend)
    assert torch.equal(o, attention(q, k, v, backend=backend))
    assert o_t.shape == o.shape and not o_t.any()
    missing = attention_jvp(q, k, v, k_t=k, backend=backend)
    assert_close(missing, attention_jvp(q, k, v, torch.zeros_like(q), k, torch.zeros_like(v), backend=backend))


@pytest.mark.parametrize("form", ["plain", "batch of each", "gqa and batch", "rank 2, mask", "mask [H, 1, N]", "scale"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_checks_and_views_compile_into_one_graph(form: str, dynamic: bool | None) -> None:
    shapes, args, kwargs = FORMS[form]
    q, k, v = qkv(*shapes)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_jvp(q, k, v, q, None, v, *args[:1], **kwargs, backend="reference")

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    assert_close(compiled(q, k, v), call(q, k, v))


@pytest.mark.parametrize("form", ["plain", "rank 2", "gqa", "one value head, many key heads"])
def test_vmap_over_the_first_dim(form: str) -> None:
    shapes, args, kwargs = FORMS[form]
    inputs = qkv(*((2, *shape) for shape in shapes))
    mapped = torch.vmap(lambda q, k, v: attention(q, k, v, *args, **kwargs))(*inputs)
    assert_close(mapped, torch.stack([attention(*x, *args, **kwargs) for x in zip(*inputs, strict=True)]))


@pytest.mark.parametrize("backend", [None, "reference", "tiled", "triton"])
def test_shapes_are_inferred_on_the_meta_device(backend: str | None) -> None:
    q, k, v = (x.to("meta") for x in qkv(Q, (1, 1, N, D), V))
    o, o_t = attention_jvp(q, k, v, None, k, v, some_keys(M, N).to("meta"), backend=backend)
    assert o.shape == o_t.shape == (B, H, M, DV)
    assert o.device.type == o_t.device.type == "meta"
    assert o.dtype == o_t.dtype == torch.float64


def test_what_the_package_exports() -> None:
    errors = {"FlashJVPError", "ArgumentTypeError", "ArgumentValueError", "UnsupportedError", "SecondOrderError"}
    others = {
        "attention",
        "attention_jvp",
        "explain",
        "Explanation",
        "FlashJVPPerformanceWarning",
        "attention_varlen",
        "attention_varlen_jvp",
        "neighbourhood",
        "precompile",
    }
    in_models = {"replaced", "install", "uninstall", "layer_norm", "batch_norm", "checkpoint"}
    of_check = {"check", "CheckReport", "Comparison", "Diagnosis", "Finding"}
    assert set(flashjvp.__all__) == {*others, *in_models, *of_check, *errors}
    assert flashjvp.__version__ == "0.1.0"
    builtins = {
        "ArgumentTypeError": TypeError,
        "ArgumentValueError": ValueError,
        "UnsupportedError": NotImplementedError,
    }
    for name, builtin in builtins.items():
        assert issubclass(getattr(flashjvp, name), (builtin,)) and issubclass(
            getattr(flashjvp, name), flashjvp.FlashJVPError
        )
    assert issubclass(flashjvp.SecondOrderError, flashjvp.UnsupportedError)

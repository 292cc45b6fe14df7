"""The public functions as a drop-in for PyTorch's: signature, call forms, broadcasting, autocast, what operators get.

Agreement is asked for in float64, where only the order of sums may differ, as closely as torch.testing does by default.
Error budgets in every type are verify's business.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import flashjvp
from flashjvp import attention, attention_jvp
from flashjvp.dispatch import derivatives, fast_path
from flashjvp.operands import Operands, Options

B, H, M, N, D, DV = 2, 4, 6, 5, 8, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", None])
Shape = tuple[int, ...]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_keys(*shape: int) -> Tensor:
    """Boolean, with no row that is empty: PyTorch's gradients are NaN there."""
    mask = normal(*shape, seed=7) > 0
    mask[..., 0] = True
    return mask


def qkv(q: Shape, k: Shape, v: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return normal(*q, seed=1), normal(*k, seed=2), normal(*v, seed=3)


Q, K, V = (B, H, M, D), (B, H, N, D), (B, H, N, DV)
# What is passed after q, k and v: the shapes of these, positional arguments, keyword arguments.
FORMS: dict[str, tuple[tuple[Shape, Shape, Shape], tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((Q, K, V), (), {}),
    "mask by position": ((Q, K, V), (some_keys(M, N),), {}),
    "all that PyTorch takes by position": ((Q, K, V), (normal(M, N), 0.0, False), {"scale": 0.3, "enable_gqa": False}),
    "causal by position": ((Q, K, V), (None, 0.0, True), {}),
    "causal, more keys": (((B, H, N, D), (B, H, M, D), (B, H, M, DV)), (), {"is_causal": True}),
    "integer dropout": ((Q, K, V), (None, 0), {}),
    "scale": ((Q, K, V), (), {"scale": 0.7}),
    "integer scale": ((Q, K, V), (), {"scale": 1}),
    "numpy scale": ((Q, K, V), (), {"scale": np.float32(0.5)}),
    "negative scale": ((Q, K, V), (), {"scale": -0.5}),
    "mask [1, N]": ((Q, K, V), (), {"attn_mask": some_keys(1, N)}),
    "mask [M, 1]": ((Q, K, V), (), {"attn_mask": normal(M, 1)}),
    "mask [H, 1, N]": ((Q, K, V), (), {"attn_mask": some_keys(H, 1, N)}),
    "mask [B, 1, 1, N]": ((Q, K, V), (), {"attn_mask": some_keys(B, 1, 1, N)}),
    "mask [B, H, M, N]": ((Q, K, V), (), {"attn_mask": normal(B, H, M, N)}),
    "mask with -inf": ((Q, K, V), (), {"attn_mask": some_keys(M, N).double().log()}),
    "mask of one head": (((3, B, H, M, D), (3, B, H, N, D), (3, B, H, N, DV)), (some_keys(3, 1, H, 1, N),), {}),
    "batch of q": (((1, H, M, D), K, V), (), {}),
    "batch of k and v": ((Q, (1, H, N, D), (1, H, N, DV)), (some_keys(B, 1, M, N),), {}),
    "batch of each": (((3, 1, H, M, D), (1, 2, H, N, D), (3, 2, H, N, D)), (), {}),
    "one key head": ((Q, (B, 1, N, D), (B, 1, N, DV)), (), {}),
    "one key head, many value heads": ((Q, (B, 1, N, D), V), (), {}),
    "one value head, many key heads": ((Q, K, (B, 1, N, DV)), (), {}),
    "one query head": (((B, 1, M, D), K, V), (some_keys(H, M, N),), {}),
    "gqa": ((Q, (B, 2, N, D), (B, 2, N, DV)), (), {"enable_gqa": True}),
    "gqa of one key head": ((Q, (B, 1, N, D), (B, 1, N, DV)), (), {"enable_gqa": True}),
    "gqa of equal heads": ((Q, K, V), (), {"enable_gqa": True}),
    "gqa and batch": ((Q, (1, 2, N, D), (B, 2, N, DV)), (normal(H, M, N),), {"enable_gqa": True}),
    "rank 2": (((M, D), (N, D), (N, DV)), (), {}),
    "rank 2, mask": (((M, D), (N, D), (N, DV)), (some_keys(M, N),), {}),
    "rank 3": (((H, M, D), (H, N, D), (H, N, DV)), (some_keys(1, N),), {}),
    "rank 3, gqa": (((H, M, D), (2, N, D), (2, N, DV)), (), {"enable_gqa": True}),
    "rank 6": (((2, 1, 2, H, M, D), (2, 1, 2, H, N, D), (2, 1, 2, H, N, DV)), (some_keys(2, 1, 1, N),), {}),
    "empty batch": (((0, H, M, D), (0, H, N, D), (0, H, N, DV)), (), {}),
    "empty batch by broadcasting": (((0, H, M, D), (1, H, N, D), (0, H, N, DV)), (), {}),
    "one of each": (((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), (), {}),
}  # fmt: skip


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name != "backend"]


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
def test_backend_is_keyword_only(function: Any) -> None:
    backend = inspect.signature(function).parameters["backend"]
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY
    assert backend.default is None


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
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
@pytest.mark.parametrize("form", FORMS)
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


# What reaches the operators


Calls = list[tuple[Operands, Options]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Operands and options of the calls to derivatives.attention and attention_jvp, which still do their work."""
    seen: Calls = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(operands: Operands, options: Options) -> Any:
            seen.append((operands, options))
            return function(operands, options)

        return called

    fast_path.forget()
    monkeypatch.setattr(derivatives, "attention", spy(derivatives.attention))
    monkeypatch.setattr(derivatives, "attention_jvp", spy(derivatives.attention_jvp))
    yield seen


def test_arguments_that_agree_are_passed_as_they_are(calls: Calls) -> None:
    q, k, v = qkv(Q, (B, 2, N, D), (B, 2, N, DV))
    mask = some_keys(1, H, 1, N)
    attention_jvp(q, k, v, q, None, v, mask, True, 0.5, True, backend="reference")
    ((operands, options),) = calls
    assert all(a is b for a, b in zip(operands, (q, k, v, q, None, v, mask), strict=True))
    assert options == Options(True, 0.5, "reference")


def test_scale_and_backend_are_left_open_by_default(calls: Calls) -> None:
    attention(*qkv(Q, K, V))
    attention(*qkv(Q, K, V), scale=2)
    (_, by_default), (_, given) = calls
    assert (by_default, given) == (Options(), Options(scale=2.0))
    assert isinstance(given.scale, float)


def test_broadcasting_makes_views(calls: Calls) -> None:
    q, k, v = qkv((1, B, H, M, D), (3, 1, 1, N, D), (1, 1, 1, N, DV))
    mask = some_keys(M, N)
    attention_jvp(q, k, v, None, k, v, mask, backend="reference")
    ((operands, _),) = calls
    q_, k_, v_, q_t, k_t, v_t, mask_ = operands
    assert k_t is not None and v_t is not None and mask_ is not None
    assert q_.shape == (3, B, H, M, D) and k_.shape == (3, B, 1, N, D) and v_.shape == (3, B, 1, N, DV)
    assert q_t is None and k_t.shape == k_.shape and v_t.shape == v_.shape
    assert mask_.shape == (1, 1, 1, M, N)
    views = [(q_, q), (k_, k), (v_, v), (k_t, k), (v_t, v), (mask_, mask)]
    assert all(view.data_ptr() == x.data_ptr() for view, x in views)
    assert q_.stride(0) == k_.stride(1) == v_.stride(0) == v_.stride(1) == 0


def test_rank_2_is_one_head(calls: Calls) -> None:
    q, k, v = qkv((M, D), (N, D), (N, DV))
    o, o_t = attention_jvp(q, k, v, q, attn_mask=some_keys(M, N), backend="reference")
    assert o.shape == o_t.shape == (M, DV)
    ((operands, _),) = calls
    given = [x for x in operands if x is not None]
    assert [x.shape[0] for x in given] == [1] * 5


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_is_a_cast_of_the_arguments(dtype: torch.dtype, given: torch.dtype, backend: str) -> None:
    q, k, v = (x.to(given) for x in qkv(Q, K, V))
    mask = normal(M, N).to(given)
    with torch.autocast("cpu", dtype=dtype):
        results = attention_jvp(q, k, v, q, k, v, mask, backend=backend)
        plain = attention(q, k, v, mask, backend=backend)
    c_q, c_k, c_v = (x.to(dtype) for x in (q, k, v))
    mask = mask if given == torch.float32 else mask.to(dtype)
    expected = attention_jvp(c_q, c_k, c_v, c_q, c_k, c_v, mask, backend=backend)
    assert plain.dtype == results[0].dtype == results[1].dtype == dtype
    assert torch.equal(plain, attention(c_q, c_k, c_v, mask, backend=backend))
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradients_under_autocast_are_those_of_the_cast(backend: str) -> None:
    inputs: Any = [x.float().requires_grad_() for x in (*qkv(Q, K, V), *qkv(Q, K, V))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, o_t = attention_jvp(*inputs, backend=backend)
        grads = torch.autograd.grad((o.float() + o_t.float()).square().sum(), inputs)
    o, o_t = attention_jvp(*(x.bfloat16() for x in inputs), backend=backend)
    expected = torch.autograd.grad((o.float() + o_t.float()).square().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    inputs = qkv(Q, K, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(*inputs)
    assert torch.equal(o, attention(*inputs))


def test_autocast_makes_dtypes_agree() -> None:
    q, k, v = qkv(Q, K, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q.float(), k.bfloat16(), v.half()).dtype == torch.bfloat16
        with pytest.raises(flashjvp.ArgumentTypeError, match=r"^k: expected the dtype of q, torch.float64"):
            attention(q, k.float(), v.float())


# Tracing and transforms


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


def test_autocast_compiles_into_one_graph() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, backend="reference")

    torch._dynamo.reset()
    inputs = [x.float() for x in qkv(Q, K, V)]
    compiled = torch.compile(call, backend="eager", fullgraph=True)(*inputs)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, call(*inputs))


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


def test_fake_tensors_follow_autocast() -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = torch.empty(Q), torch.empty(K), torch.empty(V)
        o = attention(q, k, v)
    assert o.shape == (B, H, M, DV) and o.dtype == torch.bfloat16 and o.device.type == "cpu"


def test_what_the_package_exports() -> None:
    errors = {"FlashJVPError", "ArgumentTypeError", "ArgumentValueError", "UnsupportedError", "SecondOrderError"}
    others = {"attention", "attention_jvp", "explain", "Explanation", "FlashJVPPerformanceWarning"}
    assert set(flashjvp.__all__) == {*others, *errors}
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

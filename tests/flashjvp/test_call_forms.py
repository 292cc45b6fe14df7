"""PyTorch's names of q, k and v, layout="bmhd", and 0-dim tensors: no copy, no lost derivative, one graph."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import flashjvp
from flashjvp import ArgumentTypeError, UnsupportedError, attention, attention_jvp
from flashjvp.kernels.launch import replaced
from tests.flashjvp.forms import BACKENDS, DV, B, D, H, K, M, N, Q, V, normal, qkv, some_keys

QUERY_FIRST = (B, M, H, D), (B, N, H, D), (B, N, H, DV)
SCALE = torch.tensor(0.3, dtype=torch.float64)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(-2, -3)


@pytest.mark.parametrize("names", [("query", "key", "value"), ("q", "key", "value"), ("q", "k", "value")])
def test_each_tensor_may_come_by_either_name(names: tuple[str, ...]) -> None:
    inputs = qkv(Q, K, V)
    named = dict(zip(names, inputs, strict=True))
    assert torch.equal(attention(**named), attention(*inputs))
    assert torch.equal(attention_jvp(**named, q_t=inputs[0])[1], attention_jvp(*inputs, inputs[0])[1])
    q, *rest = inputs
    assert torch.equal(attention(q, **dict(zip(("key", "value"), rest, strict=True))), attention(*inputs))


def test_a_tensor_by_both_names_is_refused_also_where_the_call_is_known() -> None:
    inputs = qkv(Q, K, V)
    for _ in range(3):
        attention(*inputs, backend="tiled")
    with pytest.raises(ArgumentTypeError, match=r"^key: expected a tensor as k or as key, got both"):
        attention(*inputs, key=inputs[1], backend="tiled")


@BACKENDS
@pytest.mark.parametrize("mask", [None, some_keys(B, 1, M, N)])
def test_rows_before_heads(mask: Tensor | None, backend: str | None) -> None:
    """Results and derivatives are those of the transposed tensors, and lie in memory as q does."""
    inputs = [x.requires_grad_() for x in qkv(*QUERY_FIRST)]
    tangents = [normal(*x.shape, seed=9) for x in inputs]
    o, o_t = attention_jvp(*inputs, *tangents, mask, backend=backend, layout="bmhd")
    expected = attention_jvp(*map(heads_first, inputs), *map(heads_first, tangents), mask, backend=backend)
    assert_close((o, o_t), tuple(map(heads_first, expected)), rtol=0.0, atol=0.0)
    assert o.shape == (B, M, H, DV) and o.is_contiguous() and o_t.is_contiguous()
    assert torch.equal(attention(*inputs, mask, backend=backend, layout="bmhd"), o)
    dual = torch.func.jvp(
        lambda *x: attention(*x, mask, backend=backend, layout="bmhd"), tuple(inputs), tuple(tangents)
    )
    assert_close(dual, (o, o_t))
    loss = (o * o_t).sum()
    of_views = (expected[0] * expected[1]).sum()
    assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(of_views, inputs))


def test_rows_before_heads_are_not_copied() -> None:
    """The operators get views of the tensors of the call."""
    inputs, seen = qkv(*QUERY_FIRST), []
    backend = flashjvp.backends.select.resolve("tiled", inputs[0].device, inputs[0].dtype)
    original = backend.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "forward", lambda *args: seen.append(args[:3]) or original(*args))
        attention(*inputs, backend="tiled", layout="bmhd")
    (tensors,) = seen
    assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in inputs]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_names_and_layout_compile_into_one_graph(compiler: str, dynamic: bool | None) -> None:
    inputs = qkv(*QUERY_FIRST)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_jvp(query=q, key=k, value=v, q_t=q, layout="bmhd"), attention(q, key=k, value=v, layout="bmhd")

    torch._dynamo.reset()
    assert_close(torch.compile(call, backend=compiler, fullgraph=True, dynamic=dynamic)(*inputs), call(*inputs))


def test_a_tensor_is_the_number_it_holds_below_transforms_and_compiled() -> None:
    inputs = qkv(Q, K, V)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, scale=SCALE)

    def with_number(*tensors: Tensor) -> Tensor:
        return attention(*tensors, scale=0.3)

    assert_close(torch.func.jvp(call, inputs, inputs), torch.func.jvp(with_number, inputs, inputs), rtol=0, atol=0)
    assert_close(torch.vmap(call)(*inputs), torch.vmap(with_number)(*inputs), rtol=0, atol=0)
    torch._dynamo.reset()
    assert_close(torch.compile(call, backend="eager")(*inputs), with_number(*inputs))
    assert torch.equal(attention_jvp(*inputs, scale=SCALE)[0], with_number(*inputs))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(flashjvp.ArgumentValueError, match=r"^scale: expected a finite number"):
            attention(*inputs, scale=torch.tensor(bad))
    parameter = torch.nn.Parameter(SCALE)
    with torch.no_grad():
        assert torch.equal(attention(*inputs, scale=parameter), with_number(*inputs))


def by_dual_level(call: Callable[[Tensor], Any]) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(SCALE, SCALE))


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
    "jvp": lambda call: torch.func.jvp(call, (SCALE,), (SCALE,)),
    "grad": lambda call: torch.func.grad(lambda scale: call(scale).sum())(SCALE),
    "vmap": lambda call: torch.vmap(call)(SCALE.expand(3)),
    "dual level": by_dual_level,
    "nested": lambda call: torch.func.jvp(lambda x: torch.vmap(lambda y: call(x) * y)(x.expand(2)), (SCALE,), (SCALE,)),
}


@pytest.mark.parametrize("argument", ["scale", "dropout_p"])
@pytest.mark.parametrize("transform", TRANSFORMED)
def test_a_number_that_a_transform_sees_is_refused(transform: str, argument: str) -> None:
    inputs = qkv(Q, K, V)
    with pytest.raises(UnsupportedError, match=f"^{argument}: expected a number"):
        TRANSFORMED[transform](lambda x: attention(*inputs, **{argument: x}))


@pytest.mark.parametrize("shape", [(0, H, M, D), (B, 0, M, D)], ids=["batch", "heads"])
@pytest.mark.parametrize("gqa", [False, True])
@BACKENDS
def test_without_batch_or_heads_everything_is_empty(shape: tuple[int, ...], gqa: bool, backend: str | None) -> None:
    """PyTorch 2.11 divides by zero in the gradient."""
    x = normal(*shape).requires_grad_()
    o, o_t = attention_jvp(x, x, x, x, enable_gqa=gqa, backend=backend)
    assert o.shape == o_t.shape == shape
    assert torch.autograd.grad(o.sum() + o_t.sum(), x)[0].shape == shape


@BACKENDS
def test_grouped_keys_without_a_query_head_have_gradients_of_zero(backend: str | None) -> None:
    q, k = normal(B, 0, M, D), normal(B, H, N, D).requires_grad_()
    o, o_t = attention_jvp(q, k, k, q, enable_gqa=True, backend=backend)
    assert o.shape == o_t.shape == q.shape
    assert not torch.autograd.grad(o.sum() + o_t.sum(), k)[0].any()


@pytest.mark.parametrize(
    "shapes", [((2, 3, 0, 8), (2, 3, 5, 8)), ((2, 3, 6, 8), (2, 1, 0, 8)), ((1, 1, 6, 0), (1, 1, 5, 0))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernels_take_empty_dims(shapes: tuple[Any, Any], bias: bool) -> None:
    """And launch nothing where there is no query or no key."""
    q, k = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in shapes)
    v = normal(*k.shape[:-1], 4, dtype=torch.float32).requires_grad_()
    mask = normal(q.shape[-2], k.shape[-2], dtype=torch.float32) if bias else None
    launches: list[str] = []

    def watched(
        original: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **constants: Any
    ) -> None:
        launches.append(family)
        original(call, kernel, family, *rest, **constants)

    with replaced.launch(watched):
        found, expected = (
            attention_jvp(q, k, v, q, k, v, mask, backend=backend) for backend in ("triton", "reference")
        )
        assert_close(found, expected)
        for results in (found, expected):
            results[0].sum().backward(retain_graph=True)
        assert_close(*(torch.autograd.grad(o.sum() + o_t.sum(), (q, k, v)) for o, o_t in (found, expected)))
    assert bool(launches) == (0 not in (q.shape[-2], k.shape[-2]))


@pytest.mark.parametrize("d", [257, 512])
def test_wide_heads_are_not_for_the_kernels(d: int, machine: Callable[..., None]) -> None:
    machine(capability=(9, 0), is_amd=False, has_triton=True)
    wide, narrow, gpu = normal(1, 1, 2, d).float(), normal(1, 1, 2, 256).float(), torch.device("cuda", 0)
    for tensors in ((wide, wide, narrow), (narrow, narrow, wide)):
        assert flashjvp.explain(*tensors).backend == "tiled"
        for function in (attention, attention_jvp, flashjvp.explain):
            with pytest.raises(UnsupportedError, match=r"^backend: 'triton' expected head dims of at most 256"):
                function(*tensors, backend="triton")
            with pytest.raises(UnsupportedError, match=r"^backend: 'triton' expected head dims of at most 256"):
                function(*(x.to("meta") for x in tensors), backend="triton")
    assert flashjvp.backends.select.choose(gpu, torch.float32, wide=True) == "tiled"
    assert flashjvp.backends.select.choose(gpu, torch.float32, wide=False) == "triton"
    assert "at most 256" in flashjvp.explain(*(wide.to("meta"),) * 3).why_not_faster[0]


@pytest.mark.parametrize(("d", "dv"), [(33, 16), (49, 24), (16, 36)])
def test_unaligned_rows_of_half_types_are_read_in_wide_chunks(d: int, dv: int) -> None:
    """Triton 3.6 gives wrong numbers for narrow ones, on a GPU; the interpreter shows what is asked for."""
    q, k, v = normal(1, 1, 5, d).half(), normal(1, 1, 7, d).half(), normal(1, 1, 7, dv).half()
    columns: list[Any] = []

    def watched(original: Callable[..., None], call: Any, kernel: Any, *rest: Any, **constants: Any) -> None:
        columns.append(call.constants(constants))
        original(call, kernel, *rest, **constants)

    with replaced.launch(watched):
        found = attention(q, k, v, backend="triton")
    assert [(taken["K_COLUMNS"], taken["V_COLUMNS"]) for taken in columns] == [((d, 64), (dv, 64))]
    expected = attention(q.double(), k.double(), v.double(), backend="reference")
    assert (found.double() - expected).norm() < 8 * torch.finfo(torch.float16).eps * expected.norm()


@pytest.mark.parametrize(("capability", "most"), [((8, 6), 128), ((8, 9), 128), ((12, 0), 128), ((8, 0), 256)])
def test_float32_needs_shared_memory(capability: tuple[int, int], most: int, machine: Callable[..., None]) -> None:
    machine(capability=capability)
    is_wide = flashjvp.backends.select.is_wide

    def on_a_gpu(d: int, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(shape=(1, 1, 2, d), dtype=dtype, device=torch.device("cuda", 0))

    assert [is_wide(on_a_gpu(8), on_a_gpu(d)) for d in (most, most + 1)] == [False, True]
    assert not is_wide(on_a_gpu(256, torch.float16), on_a_gpu(256, torch.float16))
    assert not is_wide(*torch.empty(2, 1, 1, 2, 256))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert not is_wide(on_a_gpu(256), on_a_gpu(256))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

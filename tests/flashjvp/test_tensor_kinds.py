"""Every kind of tensor works or raises a typed error, on the first call and on later ones that look the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import flashjvp
from flashjvp import ArgumentTypeError, FlashJVPError, UnsupportedError

Q, K, V, Q_T = torch.randn(4, 2, 3, 5, 8)
TIMES = range(4)


def both(q: Any, k: Any, v: Any, q_t: Any, **options: Any) -> tuple[Tensor, Tensor]:
    o = flashjvp.attention(q, k, v, **options)
    assert o.shape == flashjvp.attention_jvp(q, k, v, q_t, **options)[0].shape
    return flashjvp.attention_jvp(q, k, v, q_t, **options)


@pytest.mark.parametrize("backend", [None, "tiled", "reference", "triton"])
def test_meta_tensors(backend: str | None) -> None:
    for _ in TIMES:
        q, k, v, q_t = (torch.empty(2, 3, 5, 8, device="meta", requires_grad=True) for _ in range(4))
        o, o_t = both(q, k, v, q_t, backend=backend)
        assert o.shape == o_t.shape == q.shape and o.device.type == "meta"
        assert torch.autograd.grad(o.sum() + o_t.sum(), q)[0].shape == q.shape
    with torch.device("meta"):
        for _ in TIMES:
            x = torch.randn(2, 3, 5, 8)
            assert flashjvp.attention(x, x, x, backend=backend).device.type == "meta"


def test_fake_tensors_inside_and_outside_of_their_mode() -> None:
    mode = FakeTensorMode()
    q, k, v, q_t = (mode.from_tensor(x) for x in (Q, K, V, Q_T))
    for _ in TIMES:
        assert both(q, k, v, q_t)[1].shape == Q.shape
        with mode:
            assert both(q, k, v, q_t)[1].shape == Q.shape


def test_a_flop_counter_between_calls() -> None:
    for _ in TIMES:
        expected = both(Q, K, V, Q_T)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(both(Q, K, V, Q_T), expected)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(3, 5, 8)], layout=layout)


def quantised() -> Tensor:
    return torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8)


REFUSED: dict[str, tuple[type[Exception], Callable[[], Tensor]]] = {
    "nested, strided": (UnsupportedError, lambda: nested(torch.strided)),
    "nested, jagged": (UnsupportedError, lambda: nested(torch.jagged)),
    "sparse": (UnsupportedError, lambda: Q.to_sparse()),
    "csr": (UnsupportedError, lambda: Q[0, 0].to_sparse_csr()),
    "quantised": (ArgumentTypeError, quantised),
    "complex": (ArgumentTypeError, lambda: Q.to(torch.complex64)),
    "float8": (ArgumentTypeError, lambda: Q.to(torch.float8_e4m3fn)),
    "int": (ArgumentTypeError, lambda: Q.to(torch.int32)),
    "bool": (ArgumentTypeError, lambda: Q > 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["all", "q", "k", "v", "q_t", "attn_mask"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_raise_a_typed_error_each_time(kind: str, place: str) -> None:
    error, make = REFUSED[kind]
    if place == "attn_mask" and kind == "bool":
        pytest.skip("that is a mask")
    for _ in TIMES:
        x = make()
        given: dict[str, Any] = {"q": Q, "k": K, "v": V, "q_t": Q_T}
        given |= {"q": x, "k": x, "v": x, "q_t": x} if place == "all" else {place: x}
        with pytest.raises(error if place == "all" else FlashJVPError):
            flashjvp.attention_jvp(**given)
        del given["q_t"]
        if place != "q_t":
            with pytest.raises(FlashJVPError):
                flashjvp.attention(**given)
        flashjvp.attention_jvp(Q, K, V, Q_T)


def test_distributed_tensors_raise_a_typed_error(tmp_path: Any) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        x = distribute_tensor(Q, mesh, [Replicate()])
        for _ in TIMES:
            with pytest.raises(UnsupportedError, match=r"q: expected a local tensor .*, got a DTensor"):
                flashjvp.attention(x, x, x)
            with pytest.raises(UnsupportedError, match="attn_mask: expected a local tensor"):
                flashjvp.attention(Q, K, V, distribute_tensor(torch.zeros(5, 5), mesh, [Replicate()]))
            flashjvp.attention(x.to_local(), K, V)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_a_tangent_of_another_type_than_its_primal(place: str, backend: str, masked: bool) -> None:
    """torch.func.jacfwd promotes the tangent of a number that is multiplied with a Python float, in some releases."""
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter serves machines without a GPU")
    mask = torch.zeros(5, 5) if masked else None
    x = torch.rand(3)

    def loss(x: Tensor) -> Tensor:
        given = {"q": Q, "k": K, "v": V, place: (0.5 * x[0]).expand(Q.shape)}
        types.append(forward_ad.unpack_dual(given[place], level=0)[1].dtype)
        return flashjvp.attention(**given, attn_mask=mask, backend=backend).square().sum()

    for _ in TIMES:
        types: list[torch.dtype] = []
        try:
            derivative = torch.func.jacfwd(loss)(x)
        except ArgumentTypeError as error:
            assert types == [torch.float64] and f"{place}" in str(error) and "torch.float64" in str(error)
        else:
            assert types == [torch.float32]
            torch.testing.assert_close(derivative, torch.func.jacrev(lambda x: loss_of(place, mask, x))(x))


def loss_of(place: str, mask: Tensor | None, x: Tensor) -> Tensor:
    given = {"q": Q, "k": K, "v": V, place: (0.5 * x[0]).expand(Q.shape)}
    return flashjvp.attention(**given, attn_mask=mask, backend="reference").square().sum()

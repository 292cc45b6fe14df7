"""Every malformed or unsupported call raises its typed error, which says what was wrong, before any launch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashjvp
from flashjvp import ArgumentValueError, FlashJVPError, UnsupportedError
from tests.flashjvp.bad_calls import BOTH, JVP_ONLY, VIEWS, B, Bad, D, H, M, N, Recorder, good, of_dtype, x

TANGENTS = ("q_t", "k_t", "v_t")
CALLS = [
    *(pytest.param(flashjvp.attention, bad, id=f"attention-{bad.name}") for bad in BOTH),
    *(pytest.param(flashjvp.attention_jvp, bad, id=f"attention_jvp-{bad.name}") for bad in BOTH + JVP_ONLY),
]


def with_tangents(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds a fitting tangent for every plain tensor to the arguments of attention_jvp."""
    if function is flashjvp.attention_jvp:
        for name in TANGENTS:
            primal = arguments[name[0]]
            if (
                name not in arguments
                and isinstance(primal, Tensor)
                and primal.layout is torch.strided
                and not primal.is_nested
            ):
                arguments[name] = primal
    return arguments


def assert_rejected(function: Callable[..., Any], arguments: dict[str, Any], bad: Bad) -> None:
    with Recorder() as recorder, pytest.raises(bad.error) as caught:
        function(**arguments)
    assert type(caught.value) is bad.error
    assert isinstance(caught.value, FlashJVPError)
    message = str(caught.value)
    argument, _, rest = message.partition(":")
    expected, _, came = rest.rpartition("got ")
    assert argument == bad.argument, message
    assert bad.expected in expected, message
    assert bad.came in came, message
    assert recorder.names <= VIEWS


def test_the_table_is_large() -> None:
    assert len(BOTH) >= 45
    assert len({bad.name for bad in BOTH + JVP_ONLY}) == len(BOTH + JVP_ONLY)


@pytest.mark.parametrize("function", [flashjvp.attention, flashjvp.attention_jvp])
def test_the_call_that_the_table_varies_is_good_and_is_seen_to_launch(function: Callable[..., Any]) -> None:
    with Recorder() as recorder:
        function(**with_tangents(function, good()), backend="reference")
    assert any(name.startswith("flashjvp::") for name in recorder.names)


@pytest.mark.filterwarnings("ignore:.*(nested|[Ss]parse|quantiz).*")
@pytest.mark.parametrize(("function", "bad"), CALLS)
def test_bad_call(function: Callable[..., Any], bad: Bad) -> None:
    assert_rejected(function, with_tangents(function, {**good(), **bad.change()}), bad)


BOTH_FUNCTIONS = pytest.mark.parametrize("function", [flashjvp.attention, flashjvp.attention_jvp])


@BOTH_FUNCTIONS
@pytest.mark.parametrize(
    ("dtype", "interpret", "expected", "came"),
    [
        (torch.float32, "0", "a GPU", "cpu"),
        (torch.float64, "1", "float32", "float64"),
        (torch.bfloat16, "1", "float16 or float32", "bfloat16"),
    ],
)
def test_triton_on_the_cpu(
    function: Callable[..., Any], dtype: torch.dtype, interpret: str, expected: str, came: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    bad = Bad("", of_dtype(dtype), UnsupportedError, "backend", expected, came)
    assert_rejected(function, with_tangents(function, {**bad.change(), "backend": "triton"}), bad)


@BOTH_FUNCTIONS
def test_triton_that_is_not_installed(function: Callable[..., Any], machine: Callable[..., None]) -> None:
    machine(has_triton=False)
    bad = Bad("", good, UnsupportedError, "backend", "the triton package", "without it")
    assert_rejected(function, with_tangents(function, {**good(), "backend": "triton"}), bad)


@BOTH_FUNCTIONS
def test_triton_on_a_gpu_without_tiles(function: Callable[..., Any], machine: Callable[..., None]) -> None:
    machine(capability=(7, 5), is_amd=False)
    with FakeTensorMode():
        arguments = {name: torch.empty(value.shape, device="cuda") for name, value in good().items()}
        with pytest.raises(
            UnsupportedError, match=r"^backend: .*expected compute capability 8.0, .* or 12.0, got \(7, 5\)"
        ):
            function(**with_tangents(function, arguments), backend="triton")


def test_a_mask_that_is_a_parameter_is_fine_where_no_gradient_is_taken() -> None:
    mask = torch.nn.Parameter(x(M, N))
    with torch.no_grad():
        assert flashjvp.attention(**good(), attn_mask=mask, backend="reference").shape == (B, H, M, D)


def test_the_typed_error_leaves_a_compiled_function() -> None:
    compiled = torch.compile(lambda q, k, v: flashjvp.attention(q, k, v), backend="eager")
    with pytest.raises(ArgumentValueError, match=r"^k: expected the head dim of q"):
        compiled(x(B, H, M, D), x(B, H, N, 9), x(B, H, N, D))

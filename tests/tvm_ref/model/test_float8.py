import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.model.dual import Dual, linear
from tvm_ref.model.float8 import linear_on
from verify.budget.network_tolerance import training_budget

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRADIENT = torch.float8_e5m2


def rounded(x: Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x in float64, as float8 with one scale holds it."""
    x = x.detach().float()
    scale = torch.finfo(kind).max / x.abs().max()
    return (x * scale).to(kind).double() / scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(32,), (3, 7)])
def test_products_are_those_of_rounded_factors(device: str, rows: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    x, weight, bias = drawn(*rows, 48).bfloat16().requires_grad_(), drawn(64, 48).requires_grad_(), drawn(64)
    with torch.autocast(device, torch.bfloat16):
        y = linear_on(torch.device(device))(x, weight, bias)
    g = drawn(*rows, 64).bfloat16()
    found = torch.autograd.grad(y, (x, weight), g)
    assert y.dtype == torch.bfloat16
    x8, weight8, g8 = rounded(x), rounded(weight), rounded(g, GRADIENT)
    right = x8 @ weight8.T + bias.double(), g8 @ weight8, g8.flatten(0, -2).T @ x8.flatten(0, -2)
    for one, other in zip((y, *found), right, strict=True):
        # Results are rounded to bfloat16, y once more beside the bias; tensor cores keep at least 13 bits of a sum.
        assert (one.double() - other).norm() <= 2 * torch.finfo(torch.bfloat16).eps * other.norm()


def test_without_autocast_it_is_the_plain_product() -> None:
    x, weight, bias = torch.randn(5, 32), torch.randn(16, 32), torch.randn(16)
    assert torch.equal(linear_on(torch.device("cpu"))(x, weight, bias), F.linear(x, weight, bias))


def test_a_tangent_has_a_scale_of_its_own() -> None:
    x, x_t, weight = torch.randn(16, 32), 1e-6 * torch.randn(16, 32), torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(Dual(x, x_t), weight, None, linear_on(torch.device("cpu"))).tangent
    right = x_t.double() @ weight.double().T
    assert found is not None and (found.double() - right).norm() < 0.1 * right.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_in_float8_is_that_network(device: str) -> None:
    torch.manual_seed(0)
    model = DiT(DiTConfig(image_size=8, channels=2, patch=2, width=32, depth=2, heads=2, num_classes=3)).to(device)
    with torch.no_grad():  # the output layer starts at zero, where precision would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    x, x_t, t, s = (x.to(device) for x in (*torch.randn(2, 4, 2, 8, 8), torch.rand(4), torch.rand(4)))
    labels, beta = torch.tensor([0, 1, 2, 3], device=device), torch.ones(4, device=device)

    def gradients() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            y, y_t = model(x, t, s, labels, beta, (x_t, None, torch.ones_like(s)))
        return [y, y_t, *torch.autograd.grad((y * y_t).sum(), [p for p in model.parameters() if p.requires_grad])]

    plain = gradients()
    model.multiply_with(linear_on(torch.device(device)))
    found = gradients()
    for one, other in zip(found, plain, strict=True):
        assert 0 < (one - other).norm() <= training_budget(torch.float8_e4m3fn) * other.norm()
    model.multiply_with(F.linear)
    assert all(torch.equal(one, other) for one, other in zip(gradients()[:2], plain[:2], strict=True))


def test_a_compiled_block_in_float8_has_no_graph_break() -> None:
    product = linear_on(torch.device("cpu"))
    x, weight, bias = torch.randn(16, 32, requires_grad=True), torch.randn(48, 32), torch.randn(48)

    def layer(x: Tensor) -> Tensor:
        return product(F.gelu(x), weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        found, right = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert torch.equal(found, right)
    one, other = (torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, right))
    assert torch.equal(one, other)


def test_without_torchao_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match="torchao"):
        linear_on(torch.device("cpu"))

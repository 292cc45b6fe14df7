"""Every client trains right: output, JVP and gradients of two losses against float64 math of PyTorch, to 1e-9.

The networks are those of the packages, unmodified, within `flashjvp.replaced`, and served as their table says.
"""

import pytest
import torch

import flashjvp
from tests.clients.client import BAR, LOSSES, Client, errors, results, stock_math, tvm_like, u_and_du
from tests.clients.table import each

pytestmark = pytest.mark.clients
SEED = 3
STEP = 2.0**-8  # of central differences: many networks compute their norms in float32
ROUNDING = 2.0**-11  # of a difference quotient over that step, where they do


def exact(client: Client, losses: tuple[str, ...] = tuple(LOSSES)) -> dict[str, torch.Tensor]:
    network = client.network(SEED)
    client.plain(network)
    with stock_math():
        return results(client, network, client.inputs(SEED), losses)


@each()
def test_training_is_right(client: Client) -> None:
    network = client.network(SEED)
    with flashjvp.replaced(network, fallback="dense") as replaced:
        found = results(client, network, client.inputs(SEED), tuple(LOSSES))
    off = errors(found, exact(client))
    worst = max(off, key=off.__getitem__)
    assert off[worst] < BAR, f"{worst}: {off[worst]:.1e}"

    report = replaced.report()
    served = {row.served_by for row in report.rows if row.function in ATTENTION}
    if client.served == "own equations":  # not in silence: the report names the modules
        assert report.untouched and "dense equations" not in served
    else:
        assert served == {client.served}
    if client.served == "flashjvp":
        assert bool(report.untouched) == bool(client.why)
    recomputed = any(row.function == "checkpoint" for row in report.rows)
    assert recomputed == client.checkpoints


ATTENTION = (
    "scaled_dot_product_attention", "memory_efficient_attention", "flash_attn_func", "flash_attn_varlen_func"
)  # fmt: skip


@each()
def test_the_reference_is_right(client: Client) -> None:
    """The gradient of the second loss along one direction, against central differences over two steps."""
    network, inputs = client.network(SEED), client.inputs(SEED)
    client.plain(network)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().std() for p in parameters]
    direction = [torch.where(d.isfinite(), d, 0.1) for d in direction]  # of one element

    def loss() -> torch.Tensor:
        return tvm_like(*u_and_du(client, network, inputs), inputs)

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=by)
        value = loss().item()
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=by)
        return value

    with stock_math():
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        once, twice = ((moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True) if g is not None)
    assert abs(slope - once) <= abs(twice - once) + ROUNDING * abs(once)

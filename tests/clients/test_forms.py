"""The same networks compiled, wholly checkpointed, under autocast, and with dropout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashjvp
from tests.clients.client import (
    BAR,
    LOSSES,
    Client,
    Results,
    errors,
    joined_errors,
    results,
    stock_math,
    tvm_like,
    u_and_du,
)
from tests.clients.table import BY_NAME, each
from verify.budget.tolerance import DENSE_FACTOR

pytestmark = pytest.mark.clients
SEED = 5


def exact(client: Client, *losses: str) -> Results:
    network = client.network(SEED)
    client.plain(network)
    with stock_math():
        return results(client, network, client.inputs(SEED), losses)


def compiled(client: Client, backend: str) -> float:
    """The worst error of a compiled step: the JVP inside, the backward pass of what was compiled."""
    torch.compiler.reset()
    network, inputs = client.network(SEED), client.inputs(SEED)
    parameters = dict(network.named_parameters())

    @torch.compile(backend=backend)
    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, t, r, v = inputs
        primals, tangents = (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
        if backend != "inductor":
            u, du = torch.func.jvp(lambda *given: client.call(network, *given), primals, tangents)
        else:  # which needs real zeros for tangents of parameters (docs/training.md)
            of_weights = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            u, du = torch.func.jvp(
                lambda weights, *given: client.call(_with_weights(network, weights), *given),
                (parameters, *primals), (of_weights, *tangents),
            )  # fmt: skip
        return u, du, tvm_like(u, du, inputs)

    with flashjvp.replaced(network, fallback="dense"):
        u, du, loss = step(*inputs)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {"u": u.detach(), "du": du.detach(), "tvm loss": loss.detach()}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        found[f"tvm d_{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    torch.compiler.reset()
    return max(errors(found, exact(client, "tvm")).values())


def _with_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Callable[..., Any]:
    return lambda *args, **kwargs: torch.func.functional_call(network, weights, args, kwargs)


COMPILED = (
    "timm ViT", "timm Swin", "timm BEiT", "diffusers DiT", "diffusers Flux",
    "transformers Llama, grouped heads, left padding", "transformers BERT, padding", "nn.MultiheadAttention",
    "nn.TransformerEncoder",
)  # fmt: skip


@each(*COMPILED)
def test_compiled(client: Client) -> None:
    assert compiled(client, "aot_eager") < BAR


@each("transformers ViT", "nn.TransformerEncoder")
def test_compiled_by_inductor(client: Client) -> None:
    """Without its caches: programs there call operators as these were when an earlier process compiled them."""
    with torch.compiler.config.patch(force_disable_caches=True):
        assert compiled(client, "inductor") < BAR


@each(
    "timm ViT", "timm Swin", "diffusers Stable Diffusion 3", "diffusers PixArt", "diffusers UNet2DCondition",
    "transformers Llama", "transformers ViT", "nn.TransformerDecoder",
)  # fmt: skip
def test_recomputed_as_a_whole(client: Client) -> None:
    network, inputs = client.network(SEED), client.inputs(SEED)
    whole = Client(
        client.name, client.package, client.build,
        lambda network, *given: checkpoint(client.call, network, *given, use_reentrant=False), client.shape,
    )  # fmt: skip
    with flashjvp.replaced(network, fallback="dense") as replaced:
        found = results(whole, network, inputs, tuple(LOSSES))
    assert max(errors(found, exact(client, *LOSSES)).values()) < BAR
    assert "checkpoint" in {row.function for row in replaced.report().rows}


@each(
    "timm ViT", "timm Swin", "diffusers DiT", "diffusers Flux", "transformers BERT, padding", "transformers GPT-2",
    "nn.TransformerEncoder",
)  # fmt: skip
def test_under_autocast(client: Client) -> None:
    """As far from float64 as PyTorch's math under the same autocast, but for the factor of every budget.

    The gradients of a loss count together: of one parameter alone, the error may by chance be small in either.
    """

    def off(served: bool) -> dict[str, float]:
        network, inputs = client.network(SEED, torch.float32), client.inputs(SEED, torch.float32)
        context = flashjvp.replaced(network, fallback="dense") if served else stock_math()
        with context, torch.autocast("cpu", torch.bfloat16):
            if not served:
                client.plain(network)
            found = results(client, network, inputs, tuple(LOSSES))
        network = client.network(SEED, torch.float32).double()
        client.plain(network)
        with stock_math():
            right = results(client, network, tuple(x.double() for x in inputs), tuple(LOSSES))
        return joined_errors(found, right)

    found, of_math = off(True), off(False)
    assert all(error > 1e-4 for error in of_math.values()), "autocast did nothing"
    assert {key: error for key, error in found.items() if error > DENSE_FACTOR * of_math[key]} == {}


def bert_with_dropout() -> Client:
    from tests.clients import of_transformers

    plain = BY_NAME["transformers BERT, padding"]
    build = lambda: of_transformers._bert(attention_probs_dropout_prob=0.3).train()  # noqa: E731
    return Client("BERT with dropout", plain.package, build, plain.call, plain.shape)


def test_dropout_is_the_same_in_the_jvp_and_its_gradient() -> None:
    """With the same seed, the gradient through du is what difference quotients approach: one mask serves them all."""
    pytest.importorskip("transformers")
    client = bert_with_dropout()
    network, inputs = client.network(SEED), client.inputs(SEED)
    parameter = network.encoder.layer[0].attention.self.query.weight
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=parameter.dtype)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return tvm_like(*u_and_du(client, network, inputs), inputs)

    def moved(by: float) -> float:
        with torch.no_grad():
            parameter.add_(direction, alpha=by)
        value = loss(0).item()
        with torch.no_grad():
            parameter.sub_(direction, alpha=by)
        return value

    h = 2.0**-12
    with flashjvp.replaced(network, fallback="dense"):
        slope = (torch.autograd.grad(loss(0), parameter)[0] * direction).sum().item()
        once, twice = ((moved(step) - moved(-step)) / (2 * step) for step in (h, 2 * h))
        assert abs(slope - once) <= abs(twice - once) + 2.0**-30 * abs(once)
        assert loss(0).item() == loss(0).item() != loss(1).item()


def test_dropout_is_that_of_the_weights() -> None:
    """Over many masks the mean of u is u without dropout, within five standard errors; one mask alone is not."""
    pytest.importorskip("transformers")
    torch.manual_seed(SEED)
    attention = torch.nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    x_t = torch.randn(1, 5, 8, dtype=torch.float64)

    def dual(x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, need_weights=False)[0]

    with flashjvp.replaced(fallback="dense"):
        draws = [torch.cat(torch.func.jvp(dual, (x,), (x_t,))) for _ in range(600)]
        attention.eval()
        without = torch.cat(torch.func.jvp(dual, (x,), (x_t,)))
    drawn = torch.stack(draws)
    standard_error = drawn.std(0) / len(draws) ** 0.5
    assert ((drawn.mean(0) - without).abs() < 5 * standard_error).all()
    assert (standard_error > 0).all()

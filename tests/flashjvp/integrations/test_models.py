"""Models of torch.nn, unmodified: outputs, JVPs and gradients of both objectives against float64 stock math."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import flashjvp
from tests.flashjvp.integrations.exact import BAR, B, D, N, Timed, normal, objectives, stock_math, worst

PADDING = torch.zeros(B, N, dtype=torch.bool)
PADDING[1, -2:] = True
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)


def layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, **{"batch_first": True, **options})


def encoder(**options: object) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 12, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, x.roll(1, 1).sin(), tgt_mask=CAUSAL, tgt_is_causal=True, memory_key_padding_mask=PADDING)


class WithWeights(nn.Module):
    """Attention that uses its weights, in self or cross attention."""

    def __init__(
        self, average: bool = True, cross: bool = False, call: dict[str, object] | None = None, **options: object
    ):
        super().__init__()
        if cross:
            options = {"kdim": 6, "vdim": 4, **options}
        self.attention = nn.MultiheadAttention(D, 2, **{"batch_first": True, **options})
        self.average, self.cross, self.call = average, cross, call or {}

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x.roll(1, 1)[..., :6], x.sin()[..., :4]) if self.cross else (x, x)
        o, p = self.attention(x, key, value, average_attn_weights=self.average, **self.call)
        return o + p.square().sum() * o.cos()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.rest = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False)
        x = checkpoint(lambda: self.layers[0](x).sin(), use_reentrant=True)
        return checkpoint_sequential(self.rest, 2, x, use_reentrant=True)


class Hand(nn.Module):
    """Attention as people write it: a from-import above, and functions kept in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.attend = nn.Linear(D, 3 * D), F.layer_norm, F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x, (D,))).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.attend(query=q, key=k, value=v, is_causal=True).transpose(1, 2).flatten(-2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": encoder,
    "encoder, evaluated": lambda: encoder().eval(),
    "encoder, norm first": lambda: encoder(norm_first=True),
    "encoder, padded": lambda: Timed(encoder(), None, PADDING),
    "encoder, padded, evaluated": lambda: Timed(encoder().eval(), None, PADDING),
    "encoder, causal": lambda: Timed(encoder(), CAUSAL),
    "decoder": Decoder,
    "weights": WithWeights,
    "weights of each head": lambda: WithWeights(average=False),
    "weights, evaluated": lambda: WithWeights().eval(),
    "weights, bias of keys and zeros": lambda: WithWeights(add_bias_kv=True, add_zero_attn=True),
    "weights, cross attention": lambda: WithWeights(cross=True, average=False),
    "weights, length first": lambda: WithWeights(batch_first=False),
    "weights, padded": lambda: WithWeights(call={"key_padding_mask": PADDING}),
    "weights, causal": lambda: WithWeights(call={"attn_mask": CAUSAL, "is_causal": True}),
    "checkpoints": Checkpointed,
    "written by hand": Hand,
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_right(name: str) -> None:
    torch.manual_seed(0)
    network = MODELS[name]().double()
    model = network if isinstance(network, Timed) else Timed(network)
    x, parameters = normal(B, N, D), list(model.parameters())
    with stock_math(), pytest.MonkeyPatch.context() as patch:
        if isinstance(network, Hand):
            patch.setattr(network, "norm", F.layer_norm)
        if isinstance(network, Checkpointed):  # PyTorch's own fails under a JVP
            patch.setitem(globals(), "checkpoint", lambda f, *args, **_: f(*args))
            patch.setitem(globals(), "checkpoint_sequential", lambda f, _, x, **__: f(x))
        expected = objectives(model, parameters, x)
    with flashjvp.replaced(model) as replaced:
        found = objectives(model, parameters, x)
    assert worst(found, expected) < BAR
    rows = {(row.function, row.served_by) for row in replaced.report().rows}
    assert ("scaled_dot_product_attention", "flashjvp") in rows
    assert not {by for _, by in rows} - {"flashjvp"}


def test_unbatched_attention_gives_weights_of_its_own_rank() -> None:
    attention, x = nn.MultiheadAttention(D, 2).double(), normal(N, D)
    expected = attention(x, x, x)
    with flashjvp.replaced():
        found = attention(x, x, x)
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z)


def test_stock_norms_would_fail_this_bar() -> None:
    """Else the comparison above would say nothing of them."""
    model, x = Timed(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)).double()), normal(B, N, D)
    parameters = list(model.parameters())
    with stock_math():
        expected = objectives(model, parameters, x)
    with flashjvp.replaced(norms=False):
        assert worst(objectives(model, parameters, x), expected) > 1e3 * BAR
    with flashjvp.replaced():
        assert worst(objectives(model, parameters, x), expected) < BAR


def test_dropout_is_refused_or_dense() -> None:
    model, x = Timed(nn.TransformerEncoderLayer(D, 2, 12, dropout=0.3, batch_first=True).double()), normal(B, N, D)
    parameters = list(model.parameters())
    with flashjvp.replaced(model, fallback="dense") as replaced:
        found = objectives(model, parameters, x)
    assert all(y.isfinite().all() for y in found.values())
    row = replaced.report().rows[0]
    assert row.served_by == "flashjvp" or (row.served_by == "dense equations" and "dropout_p" in row.why)


def test_dropout_of_weights_is_that_of_the_output() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(D, 2, dropout=0.5, batch_first=True).double(), normal(B, N, D)
    torch.manual_seed(1)
    expected = attention(x, x, x)
    torch.manual_seed(1)
    with flashjvp.replaced(fallback="dense"):
        found = attention(x, x, x)
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


def test_functional_jvp_is_forward_mode_and_differentiable() -> None:
    w, x, v = normal(D, D).requires_grad_(), normal(B, N, D, seed=1), normal(B, N, D, seed=2)

    def f(x: Tensor) -> Tensor:
        y = x @ w
        return F.scaled_dot_product_attention(y, y.sin(), y.cos())

    with flashjvp.replaced():
        o, o_t = torch.autograd.functional.jvp(f, x, v, create_graph=True)
        detached = torch.autograd.functional.jvp(f, x, v)
        with pytest.raises(flashjvp.UnsupportedError, match="strict"):
            torch.autograd.functional.jvp(f, x, v, strict=True)
    (found,) = torch.autograd.grad(o.sum() + o_t.square().sum(), w)
    with stock_math():
        expected, expected_t = torch.func.jvp(f, (x,), (v,))
    (gradient,) = torch.autograd.grad(expected.sum() + expected_t.square().sum(), w)
    for y, z in ((o, expected), (o_t, expected_t), (found, gradient)):
        torch.testing.assert_close(y, z)
    assert all(not y.requires_grad for y in detached)
    torch.testing.assert_close(detached[1], expected_t.detach())

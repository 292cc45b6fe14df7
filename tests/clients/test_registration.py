"""flashjvp as an attention implementation of transformers, and as a backend of diffusers."""

import copy

import pytest
import torch
from torch import Tensor, nn

import flashjvp
from flashjvp.integrations import diffusers as of_diffusers
from flashjvp.integrations import transformers as of_transformers
from tests.clients.client import BAR, LOSSES, Client, errors, results, stock_math
from tests.clients.table import BY_NAME, each

pytestmark = pytest.mark.clients
SEED = 7


def exact(client: Client) -> dict[str, Tensor]:
    network = client.network(SEED)
    with stock_math():
        return results(client, network, client.inputs(SEED), tuple(LOSSES))


@each(
    "transformers Llama, grouped heads, left padding", "transformers Mistral, sliding window", "transformers Qwen3",
    "transformers GPT-2", "transformers BERT, padding", "transformers ViT", "transformers CLIP vision",
)  # fmt: skip
def test_registered_with_transformers(client: Client) -> None:
    """Norms are those of `replaced`, attention is not."""
    network = client.network(SEED)
    network.set_attn_implementation(of_transformers.register())
    with flashjvp.replaced(network) as replaced:
        found = results(client, network, client.inputs(SEED), tuple(LOSSES))
    assert max(errors(found, exact(client)).values()) < BAR
    assert "scaled_dot_product_attention" not in {row.function for row in replaced.report().rows}


def llama(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, initializer_range=0.3, **options,
    )  # fmt: skip
    return transformers.LlamaModel(config).double().eval()


def registered(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    network.set_attn_implementation(of_transformers.register())
    return network


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("more", [1, 3], ids=["one token more", "three tokens more"])
def test_with_a_cache(padding: str, more: int) -> None:
    """Queries of another length than the keys, which are aligned at the end."""
    stock = llama()
    x, mask = torch.randn(2, 5 + more, 32, dtype=torch.float64), torch.ones(2, 5 + more, dtype=torch.long)
    mask[0, :2] = 0 if padding == "left" else 1
    mask[0, 3:5] = 0 if padding == "right" else 1

    def both(network: nn.Module) -> Tensor:
        before = network(inputs_embeds=x[:, :5], attention_mask=mask[:, :5], use_cache=True)
        after = network(inputs_embeds=x[:, 5:], attention_mask=mask, past_key_values=before.past_key_values)
        return torch.cat((before.last_hidden_state, after.last_hidden_state), dim=1) * mask[..., None]

    found, expected = both(registered(stock)), both(stock)
    assert (found - expected).norm() < BAR * expected.norm()


def test_weights_are_refused() -> None:
    network = registered(llama())
    with pytest.raises(flashjvp.UnsupportedError, match="output_attentions: expected nothing"):
        network(inputs_embeds=torch.randn(1, 3, 32, dtype=torch.float64), output_attentions=True)


def test_dropout_is_not_left_out() -> None:
    """Served with a mask, or refused: the output of a network in training is not that of one in evaluation."""
    network = registered(llama(attention_dropout=0.5))
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    without = network(inputs_embeds=x).last_hidden_state
    try:
        with_dropout = network.train()(inputs_embeds=x).last_hidden_state
    except flashjvp.UnsupportedError as error:
        assert "dropout_p" in str(error)
    else:
        assert not torch.equal(with_dropout, without)


@pytest.mark.parametrize("name", ["GptOss", "Gemma2"])
def test_sinks_and_softcaps_are_refused(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 11, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if name == "GptOss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    network = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    network.set_attn_implementation(of_transformers.register())
    with pytest.raises(flashjvp.UnsupportedError, match=r"(s_aux|softcap): expected nothing"):
        network(inputs_embeds=torch.randn(1, 3, 32))


def test_a_name_with_flash_in_it_would_not_do() -> None:
    """The reason for the default name. Where transformers takes such a name, register may."""
    transformers = pytest.importorskip("transformers")
    with pytest.raises(flashjvp.ArgumentValueError, match="name: expected one without 'flash'"):
        of_transformers.register("flashjvp")
    transformers.AttentionInterface.register("flash_probe", of_transformers.attention_forward)
    try:
        with pytest.raises(Exception, match="flash"):
            llama().set_attn_implementation("flash_probe")
    finally:
        del transformers.AttentionInterface._global_mapping["flash_probe"]


@each("diffusers Flux")
def test_registered_with_diffusers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    calls = []
    attention = of_diffusers.attention
    monkeypatch.setattr(of_diffusers, "attention", lambda *given: calls.append(given) or attention(*given))
    network = client.network(SEED)
    with flashjvp.replaced(network) as replaced, attention_backend(of_diffusers.register()):
        found = results(client, network, client.inputs(SEED), tuple(LOSSES))
    assert max(errors(found, exact(client)).values()) < BAR
    assert len(calls) == 4 and "scaled_dot_product_attention" not in {row.function for row in replaced.report().rows}


def test_models_without_the_dispatcher_ignore_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why the docstring sends them to replaced()."""
    client = BY_NAME["diffusers DiT"]
    if not client.is_installed():
        pytest.skip("diffusers is not installed")
    monkeypatch.setattr(of_diffusers, "attention", None)  # a call would raise
    network = client.network(SEED)
    network.set_attention_backend(of_diffusers.register())
    try:
        x, t, r, _ = client.inputs(SEED)
        assert client.call(network, x, t, r).isfinite().all()
    finally:
        network.reset_attention_backend()
        network.set_attention_backend("native")


def test_masks_and_refusals_of_the_backend() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    name = of_diffusers.register()
    q, k, v = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)
    mask = torch.rand(2, 5) < 0.6
    mask[:, 0] = True
    expected = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
    with dispatch.attention_backend(name):
        found = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
        with pytest.raises(flashjvp.UnsupportedError, match="return_lse"):
            dispatch.dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True})
        with pytest.raises(flashjvp.UnsupportedError, match="parallel_config"):
            dispatch.dispatch_attention_fn(q, k, v, parallel_config=object())
    assert (found - expected).norm() < BAR * expected.norm()
    with pytest.raises(flashjvp.ArgumentValueError, match="name: expected one that is free"):
        of_diffusers.register("native")


def test_another_release_of_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    monkeypatch.delattr(dispatch, "_AttentionBackendRegistry")
    with pytest.raises(flashjvp.UnsupportedError, match=r"0\.36 to 0\.42 were tried"):
        of_diffusers.register("another")

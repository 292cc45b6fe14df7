"""What registering says where a package is missing, too old or asked for something else; stand-ins, no package."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import flashjvp
from flashjvp.integrations import diffusers, transformers


class Registry(dict[str, Any]):
    register: Callable[..., None]


def stand_in(monkeypatch: pytest.MonkeyPatch, **masks: Any) -> tuple[Registry, Registry]:
    """A transformers that has nothing but its two registries."""
    functions, mask_functions = Registry(), Registry(masks)
    module = types.ModuleType("transformers")
    for name, registry in (("AttentionInterface", functions), ("AttentionMaskInterface", mask_functions)):
        interface = type(name, (), {"register": registry.__setitem__, "__new__": lambda _, registry=registry: registry})
        setattr(module, name, interface)
    monkeypatch.setitem(sys.modules, "transformers", module)
    return functions, mask_functions


def test_attention_comes_with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask() -> None: ...

    functions, masks = stand_in(monkeypatch, sdpa=mask)
    assert transformers.register() == transformers.register() == "fused_jvp"
    assert functions == {"fused_jvp": transformers.attention_forward}
    assert masks == {"sdpa": mask, "fused_jvp": mask}


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    functions, _ = stand_in(monkeypatch, sdpa=None)
    functions["taken"] = print
    for name in ("flashjvp", "my_flash", "sdpa", "eager", "owner/kernel", "paged|jvp", "", "taken"):
        with pytest.raises(flashjvp.ArgumentValueError, match="name: expected one"):
            transformers.register(name)
    with pytest.raises(flashjvp.ArgumentTypeError, match="name: expected a string"):
        transformers.register(None)  # type: ignore[arg-type]
    with pytest.raises(flashjvp.ArgumentTypeError, match="name: expected a string"):
        diffusers.register(1)  # type: ignore[arg-type]
    with pytest.raises(flashjvp.ArgumentValueError, match="name: expected one in lower case"):
        diffusers.register("FlashJVP")
    assert functions == {"taken": print}


@pytest.mark.parametrize("package", [transformers, diffusers])
def test_a_missing_package(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.__name__.rpartition(".")[2], None)
    with pytest.raises(ModuleNotFoundError):
        package.register()


def test_an_old_release(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformers")
    module.__version__ = "4.0"
    monkeypatch.setitem(sys.modules, "transformers", module)
    with pytest.raises(flashjvp.UnsupportedError, match=r"4\.57 to 5\.24 were tried\), got 4\.0"):
        transformers.register()


@pytest.mark.parametrize(
    "asked",
    [
        {"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"sinks": torch.zeros(2)}, {"output_attentions": True},
        {"head_mask": torch.ones(2)}, {"sliding_window": 3}, {"cu_seq_lens_q": torch.tensor((0, 4))},
        {"indices": torch.zeros(1)}, {"block_indices": torch.zeros(1)},
    ],
    ids=lambda asked: next(iter(asked)),
)  # fmt: skip
def test_what_would_change_the_result_is_refused(asked: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(flashjvp.UnsupportedError, match=f"{next(iter(asked))}: expected"):
        transformers.attention_forward(nn.Module(), q, q, q, None, **asked)


def test_what_says_nothing_is_served() -> None:
    q, mask = torch.randn(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool).tril()
    nothing = {"softcap": None, "output_attentions": False, "sliding_window": None, "anything": 1}
    causal, weights = transformers.attention_forward(nn.Module(), q, q, q, None, **nothing)
    assert weights is None and causal.shape == (1, 4, 2, 8)
    masked, _ = transformers.attention_forward(nn.Module(), q, q, q, mask, sliding_window=2)
    torch.testing.assert_close(masked, causal)
    whole, _ = transformers.attention_forward(nn.Module(), q, q, q, None, is_causal=False, sliding_window=4)
    torch.testing.assert_close(whole, torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2))
    one, _ = transformers.attention_forward(nn.Module(), q[:, :, -1:], q, q, None)  # the last query sees every key
    torch.testing.assert_close(one, causal[:, -1:])


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
def test_position_bias(kind: str) -> None:
    q, bias = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 4)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = {"none": None, "causal": None, "bool": seen, "additive": torch.randn(4, 4)}[kind]
    found, _ = transformers.attention_forward(
        nn.Module(), q, q, q, mask, is_causal=kind == "causal", position_bias=bias
    )
    added = {"none": bias, "additive": bias + mask if kind == "additive" else None}.get(
        kind, bias.masked_fill(~seen, -torch.inf)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, added)
    torch.testing.assert_close(found, expected.transpose(1, 2))

"""`flashjvp.check` classifies models of other people's packages rightly: small and random, unmodified."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import flashjvp

Found = set[tuple[str, str, str]]
IMAGE, TOKENS = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 32)
LATENT = torch.randn(2, 4, 8, 8)


@dataclass(frozen=True)
class Client:
    """A network and what is to be found in it: severity, kind and path, with * for the numbers of blocks.

    mended: what is found within `replaced()`, but for what is fine.
    fine: kinds of what is no trouble, but is to be seen within `replaced()`.
    """

    name: str
    package: str
    build: Callable[[Any], nn.Module]
    inputs: dict[str, Any]
    tangents: dict[str, Any]
    found: Found
    mended: Found
    fine: tuple[str, ...] = ()


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
OF_TRANSFORMERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "norm_num_groups": 2,
}  # fmt: skip


def vit(timm: Any, **options: bool) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**VIT | options)


def switched_off(timm: Any) -> nn.Module:
    network = vit(timm)
    for block in network.blocks:
        block.attn.fused_attn = False
    return network


def checkpointed(timm: Any) -> nn.Module:
    network = vit(timm)
    network.set_grad_checkpointing()
    return network


def swin(timm: Any) -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=0,
        drop_path_rate=0.0,
    )  # fmt: skip


def beit(timm: Any) -> nn.Module:
    return timm.models.beit.Beit(**VIT, init_values=0.5, use_abs_pos_emb=False, use_rel_pos_bias=True)


def dit(diffusers: Any) -> nn.Module:
    return diffusers.DiTTransformer2DModel(**DIT, num_embeds_ada_norm=10).eval()


def pixart(diffusers: Any) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(**DIT, cross_attention_dim=16, caption_channels=12)


def llama(transformers: Any, **options: str) -> nn.Module:
    sizes = OF_TRANSFORMERS | {"num_key_value_heads": 1, "vocab_size": 8}
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, **options))


def bert(transformers: Any) -> nn.Module:
    sizes = OF_TRANSFORMERS | {"vocab_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


def bert_with_dropout(transformers: Any) -> nn.Module:
    sizes = OF_TRANSFORMERS | {"vocab_size": 8, "attention_probs_dropout_prob": 0.1}
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


def wrong(*paths: str) -> Found:
    return {("wrong", "layer norm", path) for path in paths}


def refused(*paths: str) -> Found:
    return {("refused", "stock attention", path) for path in paths}


OF_VIT = wrong("blocks.*.norm1", "blocks.*.norm2", "norm")
OF_SWIN = wrong("patch_embed.norm", "layers.*.blocks.*.norm1", "layers.*.blocks.*.norm2", "norm")
OF_BERT = wrong(
    "embeddings.LayerNorm", "encoder.layer.*.attention.output.LayerNorm", "encoder.layer.*.output.LayerNorm"
)
ROTARY: Found = {("harmless", "tangent cut", "rotary_emb")}
ONE_IMAGE = {"x": IMAGE}, {"x": torch.randn_like(IMAGE)}
EMBEDDED = {"inputs_embeds": TOKENS}, {"inputs_embeds": torch.randn_like(TOKENS)}
OF_DIT = {"hidden_states": LATENT, "timestep": torch.rand(2), "class_labels": torch.tensor([1, 2])}
OF_PIXART = {
    "hidden_states": LATENT, "timestep": torch.rand(2), "encoder_hidden_states": torch.randn(2, 5, 12),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
}  # fmt: skip
MOVED = {"hidden_states": torch.randn_like(LATENT), "timestep": torch.ones(2)}
CLIENTS = [
    Client("ViT", "timm", vit, *ONE_IMAGE, OF_VIT | refused("blocks.*.attn"), set()),
    Client("ViT, switched off", "timm", switched_off, *ONE_IMAGE, OF_VIT | {("slow", "switch off", "blocks.*.attn")},
           set()),
    Client("ViT, checkpointed", "timm", checkpointed, *ONE_IMAGE, {("refused", "checkpointing", "")}, set()),
    Client("Swin", "timm", swin, *ONE_IMAGE, OF_SWIN | {("slow", "switch off", "layers.*.blocks.*.attn")},
           set(), ("learned mask",)),
    Client("BEiT", "timm", beit, *ONE_IMAGE, wrong("blocks.*.norm1", "blocks.*.norm2", "fc_norm")
           | refused("blocks.*.attn"), set(), ("learned mask",)),
    Client("DiT", "diffusers", dit, OF_DIT, MOVED,
           wrong("transformer_blocks.*.norm1.norm", "transformer_blocks.*.norm3", "norm_out")
           | refused("transformer_blocks.*.attn1"), set()),
    Client("PixArt", "diffusers", pixart, OF_PIXART, MOVED,
           wrong("transformer_blocks.*.norm1", "transformer_blocks.*.norm2", "norm_out")
           | refused("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"), set()),
    Client("Llama", "transformers", llama, *EMBEDDED, refused("layers.*.self_attn") | ROTARY, ROTARY),
    Client("Llama, eager", "transformers", lambda package: llama(package, attn_implementation="eager"), *EMBEDDED,
           {("slow", "switch off", "layers.*.self_attn")} | ROTARY, {("slow", "switch off", "layers.*.self_attn")}
           | ROTARY),
    Client("BERT", "transformers", bert, *EMBEDDED, OF_BERT | refused("encoder.layer.*.attention.self"), set()),
    Client("BERT with dropout", "transformers", bert_with_dropout, *EMBEDDED,
           OF_BERT | {("slow", "stock attention", "encoder.layer.*.attention.self")},
           set(), ("dropout",)),
]  # fmt: skip


def with_stars(diagnosis: flashjvp.Diagnosis) -> Found:
    found = [one for one in diagnosis.findings if one.severity != "fine"]
    return {(one.severity, one.kind, re.sub(r"\b\d+\b", "*", one.path)) for one in found}


@pytest.mark.clients
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_classifies_it_rightly(client: Client) -> None:
    package = pytest.importorskip(client.package)
    report = flashjvp.check(client.build(package), client.inputs, client.tangents, replaced=True)
    as_it_is, within = report.diagnoses
    assert with_stars(as_it_is) == client.found
    assert with_stars(within) == client.mended
    assert all(one.verdict != "undecided" for diagnosis in report.diagnoses for one in diagnosis.comparisons)
    assert not any(one.verdict == "wrong" for one in within.comparisons)
    assert within.ok
    assert set(client.fine) <= {one.kind for one in within.findings if one.severity == "fine"}

"""Networks of Hugging Face transformers."""

import torch
from torch import Tensor, nn

from .client import Client, timed

TOKENS = (2, 6, 32)
SIZES = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralModel

    return MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=3))


def _qwen() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(vocab_size=11, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0.0, resid_pdrop=0.0,
                   embd_pdrop=0.0)
    )  # fmt: skip


def _bert(**options: float) -> nn.Module:
    from transformers import BertConfig, BertModel

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | options
    return BertModel(BertConfig(**SIZES, max_position_embeddings=16, **dropout), add_pooling_layer=False)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=11,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def _vision(name: str, **more: object) -> nn.Module:
    import transformers

    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=16, patch_size=4, **more)
    return getattr(transformers, f"{name}Model")(config)


def _checkpointed(network: nn.Module) -> nn.Module:
    network.gradient_checkpointing_enable()
    return network.train()


def _plain(network: nn.Module) -> None:
    network.gradient_checkpointing_disable()


def _embedded(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(inputs_embeds=timed(x, t, r)).last_hidden_state


def _left_padded(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Two tokens of padding before the first sequence; what comes out there is of no account."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[0, :2] = 0
    return network(inputs_embeds=timed(x, t, r), attention_mask=mask).last_hidden_state * mask[..., None]


def _right_padded(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[1, 4:] = 0
    return network(inputs_embeds=timed(x, t, r), attention_mask=mask).last_hidden_state * mask[..., None]


def _pixels(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(pixel_values=timed(x, t, r)).last_hidden_state


IMAGE, NAME = (2, 3, 16, 16), "transformers"
CLIENTS = [
    Client("transformers Llama, grouped heads, left padding", NAME, _llama, _left_padded, TOKENS),
    Client("transformers Llama", NAME, _llama, _embedded, TOKENS),
    Client(
        "transformers Llama, checkpointed", NAME, lambda: _checkpointed(_llama()), _left_padded, TOKENS,
        checkpoints=True, plain=_plain,
    ),
    Client("transformers Mistral, sliding window", NAME, _mistral, _embedded, TOKENS),
    Client("transformers Qwen3", NAME, _qwen, _right_padded, TOKENS),
    Client("transformers GPT-2", NAME, _gpt2, _embedded, TOKENS),
    Client("transformers BERT, padding", NAME, _bert, _right_padded, TOKENS),
    Client(
        "transformers BERT, checkpointed", NAME, lambda: _checkpointed(_bert()), _right_padded, TOKENS,
        checkpoints=True, plain=_plain,
    ),
    Client("transformers ViT", NAME, lambda: _vision("ViT"), _pixels, IMAGE),
    Client("transformers DINOv2", NAME, lambda: _vision("Dinov2"), _pixels, IMAGE),
    Client("transformers CLIP vision", NAME, lambda: _vision("CLIPVision"), _pixels, IMAGE),
    Client("transformers T5", NAME, _t5, _left_padded, TOKENS),
]  # fmt: skip

"""Continuous-time consistency training of a Llama of transformers, on sequences of points, with padding.

    pip install 'flashjvp[clients]' && python examples/consistency_transformers.py

A consistency model (arXiv 2410.11081) goes from any time to the data in one evaluation, by f = x_t - t F(x_t, t). It is
one if f does not change along the way of a flow, x_t = (1 - t) data + t noise with velocity v:

    df/dt = v - F - t dF/dt = 0,    dF/dt = JVP of F along (v, 1)

The gradient of the loss <F, w (F + t dF/dt - v)>, its second factor detached, is a step towards that. Here flashjvp is
not put in the place of PyTorch's functions, but registered with transformers as an implementation of attention.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import flashjvp.integrations.transformers


class Denoiser(nn.Module):
    """F(x, t) of sequences [batch, length, 2], some of them padded at the left."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
            attn_implementation=flashjvp.integrations.transformers.register(),
        )  # fmt: skip
        self.llama = LlamaModel(config)
        self.enter, self.leave = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor, t: Tensor, is_there: Tensor) -> Tensor:
        times = t[:, None, None].expand(-1, x.shape[1], 1)
        tokens = self.enter(torch.cat((x, times), dim=-1))
        return self.leave(self.llama(inputs_embeds=tokens, attention_mask=is_there).last_hidden_state)


def circles(count: int, length: int = 16) -> tuple[Tensor, Tensor]:
    """Points of circles, one after another, [count, length, 2], and which of them are there: the last 8 to 16."""
    angle = 2 * torch.pi * (torch.rand(count, 1) + torch.arange(length) / length)
    missing = torch.randint(0, length // 2 + 1, (count, 1))
    return torch.stack((angle.cos(), angle.sin()), dim=-1), (torch.arange(length) >= missing).long()


def loss_of(network: nn.Module, data: Tensor, is_there: Tensor) -> tuple[Tensor, float]:
    """What is differentiated, and the mean square of t df/dt, whose fall it brings about."""
    noise, t = torch.randn_like(data), 0.05 + 0.9 * torch.rand(len(data))
    at = t[:, None, None]
    x_t, v = (1 - at) * data + at * noise, noise - data
    F, dF_dt = torch.func.jvp(lambda x, t: network(x, t, is_there), (x_t, t), (v, torch.ones_like(t)))
    seen = is_there[..., None] / is_there.sum()
    change = (F + at * dF_dt - v).detach()
    change = change / (1 + change.square().mean(dim=(1, 2), keepdim=True)).sqrt()  # no sample counts for too much
    flow = (F - v).square()  # the tangent alone is unstable so early
    return (seen * (F * change + flow)).sum(), (seen * flow).sum().item() / 2


def main(steps: int = 80, batch: int = 32) -> list[float]:
    torch.manual_seed(0)
    network = Denoiser()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        loss, of_flow = loss_of(network, *circles(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(of_flow)
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

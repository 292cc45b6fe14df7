"""MeanFlow on timm's ViT, unmodified: handwritten shapes of 16 x 16 pixels, generated in one evaluation.

    pip install 'flashjvp[clients]' && python examples/meanflow_timm.py

MeanFlow (arXiv 2505.13447) learns the mean velocity u(x_t, t, s) of the way from data (time 0) to noise (time 1):

    u = v - (t - s) du/dt,    du/dt = JVP of u along (v, 1, 0),    v = noise - data

The JVP is a target, so no gradient flows through it. Two lines of this file are about flashjvp.
"""

import timm
import torch
from torch import Tensor, nn

import flashjvp


class Velocity(nn.Module):
    """u(x_t, t, s): a ViT on patches of 4 x 4 pixels, which sees the times as two more channels."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"img_size": 16, "patch_size": 4, "in_chans": 3, "depth": 3, "num_classes": 0}
        self.vit = timm.create_model("vit_tiny_patch16_224", **sizes)
        self.to_pixels = nn.Linear(self.vit.embed_dim, 16)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        times = torch.stack((t, t - s), dim=1)[:, :, None, None].expand(-1, -1, 16, 16)
        patches = self.vit.forward_features(torch.cat((x, times), dim=1))[:, 1:]  # without the class token
        pixels = self.to_pixels(patches).unflatten(1, (4, 4)).unflatten(-1, (4, 4))
        return pixels.permute(0, 1, 3, 2, 4).reshape(-1, 1, 16, 16)


def discs(count: int) -> Tensor:
    """Discs of any place and size: images [count, 1, 16, 16] of -1 and 1, with soft edges."""
    at = torch.arange(16) - 7.5
    place, radius = 3 * torch.randn(2, count, 1, 1), 2 + 3 * torch.rand(count, 1, 1)
    distance = ((at[:, None] - place[0]) ** 2 + (at - place[1]) ** 2).sqrt()
    return (radius - distance).tanh()[:, None]


def loss_of(network: nn.Module, data: Tensor) -> Tensor:
    noise, times = torch.randn_like(data), torch.rand(2, len(data)).sort(dim=0)[0]
    s, t = times
    s = torch.where(torch.rand(len(data)) < 0.5, t, s)  # half of them are plain flow matching
    at = t[:, None, None, None]
    x_t, v = (1 - at) * data + at * noise, noise - data
    u, du_dt = torch.func.jvp(network, (x_t, t, s), (v, torch.ones_like(t), torch.zeros_like(s)))
    target = v - (t - s)[:, None, None, None] * du_dt
    return (u - target.detach()).square().mean()


def main(steps: int = 60, batch: int = 32) -> list[float]:
    torch.manual_seed(0)
    network = Velocity()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    with flashjvp.replaced(network) as replaced:  # that is all
        for step in range(steps):
            loss = loss_of(network, discs(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 10 == 0:
                print(f"step {step}: loss {losses[-1]:.3f}")
    replaced.report()
    with torch.no_grad():  # one evaluation leads from noise to data
        noise = torch.randn(4, 1, 16, 16)
        images = noise - network(noise, torch.ones(4), torch.zeros(4))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; images between {images.min():.2f} and {images.max():.2f}")
    return losses


if __name__ == "__main__":
    main()

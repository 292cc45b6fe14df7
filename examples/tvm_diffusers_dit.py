"""Terminal Velocity Matching on diffusers' DiT, unmodified: a gradient through the JVP of its output.

    pip install 'flashjvp[clients]' && python examples/tvm_diffusers_dit.py

Terminal Velocity Matching (arXiv 2511.19797) moves from time t to s by f = (s - t) F(x_t, t, s), and asks that the
velocity at the end is that of the flow there:

    df/ds = F + (s - t) dF/ds = F(x_s, s, s)

dF/ds is a JVP, and the loss is differentiated through it. With PyTorch's layer norm that gradient would be wrong
(docs/layer-norm-jvp.md). `flashjvp.replaced` serves the norms along with the attention.
"""

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import flashjvp


class Flow(nn.Module):
    """F(x, t, s) by a DiT of 8 x 8 pixels, which takes one time: s comes as two more channels."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=3, out_channels=1, num_layers=3, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1, norm_num_groups=4,
        ).eval()  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        times = torch.stack((s, t - s), dim=1)[:, :, None, None].expand(-1, -1, 8, 8)
        one_class = torch.zeros(len(x), dtype=torch.long)
        return self.dit(torch.cat((x, times), dim=1), timestep=1000 * t, class_labels=one_class).sample


def stripes(count: int) -> Tensor:
    """Waves of any direction and phase: images [count, 1, 8, 8] between -1 and 1."""
    angle, phase = 2 * torch.pi * torch.rand(2, count, 1, 1)
    at = torch.arange(8) / 8
    return torch.sin(2 * torch.pi * (angle.cos() * at[:, None] + angle.sin() * at) + phase)[:, None]


def loss_of(network: nn.Module, data: Tensor) -> Tensor:
    noise = torch.randn_like(data)
    s, t = torch.rand(2, len(data)).sort(dim=0)[0]
    at, gap = t[:, None, None, None], (s - t)[:, None, None, None]
    x_t = (1 - at) * data + at * noise
    F, dF_ds = torch.func.jvp(lambda s: network(x_t, t, s), (s,), (torch.ones_like(s),))
    with torch.no_grad():
        end = network(x_t + gap * F, s, s)
    terminal = F + gap * dF_ds - end
    flow = network(x_t, t, t) - (noise - data)
    return terminal.square().mean() + flow.square().mean()


def main(steps: int = 40, batch: int = 16) -> list[float]:
    torch.manual_seed(0)
    network = Flow()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    with flashjvp.replaced(network) as replaced:
        for step in range(steps):
            loss = loss_of(network, stripes(batch))
            optimizer.zero_grad()
            loss.backward()  # through dF/ds
            optimizer.step()
            losses.append(loss.item())
            if step % 10 == 0:
                print(f"step {step}: loss {losses[-1]:.3f}")
    replaced.report()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

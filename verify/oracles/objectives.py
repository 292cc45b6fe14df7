"""The training losses, written image by image on the dense network: the oracle for the objectives of tvm_ref.

Every derivative is torch's. `kind` is tvm, detached (tvm without gradient through dF/ds), or another objective of
LossConfig; adaptive is MeanFlow with the weight to the power 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.model.dit import DiT
from tvm_ref.objective.loss import Batch, Terms

from .network import network as dense_network
from .network import weights_of


class Formulas:
    """The quantities of the objectives for one image, by the dense network."""

    def __init__(self, network: DiT, target: DiT, given: Batch, image: int, scaled: bool) -> None:
        self.weights, self.target_weights = weights_of(network), weights_of(target)
        self.config = network.config
        one = slice(image, image + 1)
        self.x0, self.x1, self.label, self.t, self.s, self.s2 = (
            z[one] for z in (given.x0, given.x1, given.labels, given.t, given.s, given.s2)
        )
        self.w = given.w[image].item()
        self.scaled = scaled
        self.v = self.x1 - self.x0

    def F(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The network, times w in the scaled form."""
        beta = torch.full_like(t, 1 / self.w) if self.config.guidance else None
        return (self.w if self.scaled else 1) * dense_network(self.weights, self.config, x, t, s, self.label, beta)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The target network's average velocity from t to s."""
        beta = torch.full_like(t, 1 / self.w) if self.config.guidance else None
        F = dense_network(self.target_weights, self.config, x, t, s, self.label, beta)
        return (self.w if self.scaled else 1) * F.detach()

    def target(self, x: Tensor, s: Tensor, *, with_class: bool) -> Tensor:
        """u*, with the image's label and w, or without class and w = 1."""
        w, label = (self.w, self.label) if with_class else (1.0, torch.full_like(self.label, self.config.num_classes))
        beta = torch.full_like(s, 1 / w) if self.config.guidance else None
        u = dense_network(self.target_weights, self.config, x, s, s, label, beta)
        return (w if self.scaled else 1) * u.detach()

    def point(self, t: Tensor) -> Tensor:
        return self.x0 + t * (self.x1 - self.x0)

    def guided(self, x: Tensor, s: Tensor) -> Tensor:
        return self.w * self.v + (1 - self.w) * self.target(x, s, with_class=False)

    def flow(self) -> Tensor:
        x = self.point(self.s2)
        return ((self.F(x, self.s2, self.s2) - self.guided(x, self.s2)) ** 2).mean() / self.w**2

    def velocity(self, detach: bool) -> Tensor:
        if self.t.item() == self.s.item():
            return self.t.new_zeros(())
        x = self.point(self.t)

        def displacement(s: Tensor) -> Tensor:
            return (s - self.t) * self.F(x, self.t, s)

        f, df_ds = torch.func.jvp(displacement, (self.s,), (torch.ones_like(self.s),))[:2]
        if detach:
            F, dF_ds = torch.func.jvp(lambda s: self.F(x, self.t, s), (self.s,), (torch.ones_like(self.s),))[:2]
            df_ds = F + (self.s - self.t) * dF_ds.detach()
        return ((df_ds - self.target(x + f.detach(), self.s, with_class=True)) ** 2).mean() / self.w**2

    def meanflow(self) -> Tensor:
        x = self.point(self.t)
        v = self.guided(x, self.t)
        u, du_dt = torch.func.jvp(lambda x, t: self.F(x, t, self.s), (x, self.t), (v, torch.ones_like(self.t)))[:2]
        return ((u - (v - (self.t - self.s) * du_dt).detach()) ** 2).mean() / self.w**2

    def improved_meanflow(self) -> Tensor:
        x = self.point(self.t)
        u = self.F(x, self.t, self.t).detach()
        F, dF_dt = torch.func.jvp(lambda x, t: self.F(x, t, self.s), (x, self.t), (u, torch.ones_like(self.t)))[:2]
        return ((F + (self.t - self.s) * dF_dt.detach() - self.guided(x, self.t)) ** 2).mean() / self.w**2

    def consistency(self) -> Tensor:
        x, end = self.point(self.t), torch.zeros_like(self.t)
        along = (self.guided(x, self.t), torch.ones_like(self.t))
        # The consistency function itself, x - t F(x, t, 0), differentiated along the path.
        g = torch.func.jvp(lambda x, t: x - t * self.F(x, t, end), (x, self.t), along)[1].detach()
        F = self.F(x, self.t, end)
        return ((F - F.detach() - g / ((g**2).sum().sqrt() + 0.1)) ** 2).mean() / self.w**2

    def shortcut(self) -> Tensor:
        x, gap = self.point(self.t), self.t - self.s
        if gap.item() == 0:
            return ((self.F(x, self.t, self.t) - self.guided(x, self.t)) ** 2).mean() / self.w**2
        half = x - gap / 2 * self.jump(x, self.t, self.t - gap / 2)
        end = half - gap / 2 * self.jump(half, self.t - gap / 2, self.s)
        return ((self.F(x, self.t, self.s) - (x - end) / gap) ** 2).mean() / self.w**2


WHOLE: dict[str, Callable[[Formulas], Tensor]] = {
    "meanflow": Formulas.meanflow,
    "adaptive": lambda of: of.meanflow() / (of.meanflow().detach() + 1e-3),
    "imf": Formulas.improved_meanflow,
    "scm": Formulas.consistency,
    "shortcut": Formulas.shortcut,
}


def dense_terms(kind: str, network: DiT, target: DiT, given: Batch, scaled: bool) -> Terms:
    """Loss, velocity and flow terms of every image, [B]; the networks lend their weights only."""
    rows = []
    for image in range(len(given.x0)):
        of = Formulas(network, target, given, image, scaled)
        zero = given.x0.new_zeros(())
        if kind in WHOLE:
            value, equal = WHOLE[kind](of), of.t.item() == of.s.item() and kind != "scm"
            rows.append([zero, value] if equal else [value, zero])
        else:
            rows.append([zero if kind == "flow" else of.velocity(detach=kind == "detached"), of.flow()])
    velocity, flow = (torch.stack([row[i] for row in rows]) for i in range(2))
    return Terms(velocity + flow, velocity, flow)

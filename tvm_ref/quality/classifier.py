"""A small convolutional classifier of grey images, trained on the real ones by a fixed recipe, and its features.

Frechet distances of its features are comparable only with others of the same recipe: they are not FID.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 64
AT_ONCE = 500  # images in a forward pass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the classifier is trained: cross entropy, Adam, one cycle of the learning rate, images shifted at random."""

    width: int = 32  # channels of the first convolution
    epochs: int = 20
    batch: int = 64
    lr: float = 3e-3  # largest learning rate
    shift: int = 1  # largest shift of an image, in pixels, along each axis
    seed: int = 0  # of weights, order and shifts


DIGITS = Recipe()
FASHION = Recipe(epochs=8, batch=128, shift=2)


class Classifier(nn.Module):
    """Maps images [n, 1, H, W] in [-1, 1] to logits [n, classes]: four convolutions, a mean over pixels, one layer."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        sizes = (1, width, FEATURES, FEATURES, FEATURES)
        strides = (1, 2, 1, 2)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], 3, stride=strides[i], padding=1, bias=False) for i in range(4)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.last = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """The mean over pixels of the last convolution, [n, 64]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.last(self.features(images))

    @torch.no_grad()
    def judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 [n, 64] and predicted classes int64 [n], on the CPU, in parts that fit the memory.

        Values outside of [-1, 1] are clipped, as in an image file.
        """
        self.eval()
        device = self.last.weight.device
        features = [self.features(part.to(device).float().clamp(-1, 1)) for part in images.split(AT_ONCE)]
        return torch.cat(features).cpu(), torch.cat([self.last(part).argmax(1) for part in features]).cpu()


def train_classifier(images: Tensor, labels: Tensor, recipe: Recipe, device: torch.device) -> Classifier:
    """Trains a classifier of images [n, 1, H, W] in [-1, 1] with labels int64 [n]. The global random state is kept.

    On one machine equal arguments give equal weights.
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Classifier(int(labels.max()) + 1, recipe.width).to(device)
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    steps = recipe.epochs * (len(images) // recipe.batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
    model.train()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for _ in range(recipe.epochs):
            order = torch.randperm(len(images), generator=draw)
            for chosen in order[: len(order) // recipe.batch * recipe.batch].split(recipe.batch):
                across, down = torch.randint(-recipe.shift, recipe.shift + 1, (2,), generator=draw).tolist()
                here = chosen.to(device)
                loss = F.cross_entropy(model(images[here].roll((down, across), (2, 3))), labels[here])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return model

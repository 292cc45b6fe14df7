"""Settings of the diffusion transformer: `DiTConfig`, and the standard network sizes."""

from dataclasses import dataclass
from typing import Literal

from ..finite import require_finite

MAX_HEAD_DIM = 256
MOST_BLOCKS = 1000
MOST = 10**9  # of any size: what is larger is a slip, and would end in an error that names nothing
ATTENTION_BACKENDS = (None, "triton", "tiled", "reference")

SIZES: dict[str, dict[str, int]] = {
    "S/2": {"width": 384, "depth": 12, "heads": 6, "patch": 2},
    "B/2": {"width": 768, "depth": 12, "heads": 12, "patch": 2},
    "L/2": {"width": 1024, "depth": 24, "heads": 16, "patch": 2},
    "XL/2": {"width": 1152, "depth": 28, "heads": 16, "patch": 2},
    "XL/2-18h": {"width": 1152, "depth": 28, "heads": 18, "patch": 2},
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The architecture of the network.

    Raises:
        ValueError: for settings that do not describe a network.
    """

    image_size: int  # height and width of the images, in pixels (or latent pixels)
    channels: int  # channels of the images: 1 grey, 3 RGB, 4 latents, 2 points
    patch: int = 2  # patch size, in pixels
    width: int  # channels of a token
    depth: int  # number of blocks
    heads: int  # attention heads; the head dim is width / heads
    num_classes: int = 0  # number of classes; 0: unconditional, without a label embedding
    guidance: bool = True  # whether beta = 1/w, with w the guidance scale, is an input
    mlp_ratio: float = 4.0  # hidden width of a block's MLP, as a multiple of width
    norm: Literal["rms", "layer"] = "rms"  # norm of the tokens: RMSNorm, or LayerNorm as in a plain DiT
    qk_norm: bool = True  # RMSNorm of queries and keys over the head dim
    modulation_norm: bool = True  # RMS-normalise the modulation vectors
    modulation_eps: float = 1e-6  # eps of that norm; their weights start at zero, where its slope is 1 / sqrt(eps)
    spectral_time_mlp: bool = False  # initialise the MLPs of scalar embeddings spectrally; otherwise N(0, 0.02)
    attention_backend: Literal["triton", "tiled", "reference"] | None = None  # None: the fastest available

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("image_size", "channels", "patch", "width", "depth", "heads"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
            most = MOST_BLOCKS if name == "depth" else MOST
            require(getattr(self, name) <= most, name, f"at most {most}", getattr(self, name))
        require(self.image_size % self.patch == 0, "image_size", f"a multiple of patch = {self.patch}", self.image_size)
        require(self.width % self.heads == 0, "width", f"a multiple of heads = {self.heads}", self.width)
        require(self.width % 4 == 0, "width", "a multiple of 4 (a sine and a cosine for each axis)", self.width)
        require(self.head_dim <= MAX_HEAD_DIM, "width / heads", f"at most {MAX_HEAD_DIM}", self.head_dim)
        require(0 <= self.num_classes <= MOST, "num_classes", f"a number from 0 to {MOST}", self.num_classes)
        expected = f"a hidden layer of at least one unit, and at most {MOST}"
        require(self.mlp_ratio < MOST and 1 <= self.hidden <= MOST, "mlp_ratio", expected, self.mlp_ratio)
        backend = self.attention_backend
        require(backend in ATTENTION_BACKENDS, "attention_backend", f"one of {ATTENTION_BACKENDS}", backend)
        require(self.modulation_eps > 0, "modulation_eps", "more than 0", self.modulation_eps)
        require(self.norm in ("rms", "layer"), "norm", "'rms' or 'layer'", self.norm)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def least_weights(self) -> int:
        """A lower bound of the number of weights, for checks before anything is allocated."""
        block = 4 * self.width**2 + 2 * self.width * self.hidden
        outside = self.grid**2 + self.patch**2 * self.channels + self.num_classes
        return self.depth * block + outside * self.width

    @property
    def grid(self) -> int:
        """Number of patches along one side of the image."""
        return self.image_size // self.patch


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError("name: expected ..., got ...") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")

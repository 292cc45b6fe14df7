"""What recomputed blocks keep for the backward pass, and what they compute again, in eager mode and compiled."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import open_dataset
from tvm_ref.model.blocks import DiTBlock
from tvm_ref.model.config import DiTConfig
from tvm_ref.model.float8 import linear_on
from tvm_ref.training.batches import Batches
from tvm_ref.training.parallel import PRODUCTS, World, recompute
from tvm_ref.training.state import State

IMAGES, TOKENS, WIDTH = 2, 64, 32
LAYERS = 5  # linear layers of a block: modulation, qkv, proj, fc1, fc2
WIDE = 2  # modulation and fc1
# What is kept beside inputs, in tensors of the tokens' shape. With tangents: qkv 6, attention 2, proj 2, fc2 2; without
# them half of it, and fc1 4. Statistics of attention and modulation vectors are less than one.
KEPT = {("full", True): 0, ("full", False): 0, ("selective", True): 12, ("selective", False): 10}
AGAIN = {("full", True): 2 * LAYERS, ("full", False): LAYERS, ("selective", True): 2 * WIDE, ("selective", False): 0}


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(kind: Any, precision: str = "float32") -> nn.Module:
    """A block, recomputed as the trainer does it."""
    config = DiTConfig(image_size=16, channels=1, patch=2, width=WIDTH, depth=1, heads=2, attention_backend="reference")
    torch.manual_seed(0)
    blocks = nn.ModuleList([DiTBlock(config)])
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.3)
    if precision == "float8":
        blocks[0].attn.product = blocks[0].mlp.product = linear_on(torch.device("cpu"))
    recompute(blocks, kind)
    return blocks[0]


def inputs(tangents: bool) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(IMAGES, TOKENS, WIDTH), (IMAGES, WIDTH)] * (2 if tangents else 1)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def loss(block: Callable[..., Any], given: list[Tensor], precision: str = "float32") -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32", cache_enabled=False):
        results = block(*given)
    return torch.stack([part.square().sum() for part in (results if len(given) > 2 else (results,))]).sum()


def gradients(run: Callable[..., Any], block: nn.Module, given: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(run, given), [*given, *block.parameters()])


class Seen(TorchDispatchMode):
    """Counts operators of a kind: products and passes of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function in PRODUCTS
        self.attention += function.name().startswith("flashjvp::forward")
        return function(*args, **(kwargs or {}))


class Recorded:
    """A backend of torch.compile that runs graphs as they are, and notes what the forward pass keeps."""

    def __init__(self) -> None:
        self.numbers = 0
        self.backward: Counter[Any] = Counter()

    def __call__(self, graph: Any, examples: Any) -> Any:
        passes = {"fw_compiler": self._forward, "bw_compiler": self._backward}
        return aot_autograd(**passes, partition_fn=min_cut_rematerialization_partition)(graph, examples)

    def _forward(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        (results,) = graph.graph.find_nodes(op="output")[0].args
        tensors = [node.meta["val"] for node in results if node.op != "placeholder"]
        self.numbers = sum(tensor.numel() for tensor in tensors)
        return graph

    def _backward(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        self.backward = Counter(node.target for node in graph.graph.nodes)
        return graph


@pytest.mark.parametrize("tangents", [True, False])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_eager_products_that_are_computed_again(kind: str, tangents: bool) -> None:
    seen = {}
    for each in ("none", kind):
        value = loss(made(each), inputs(tangents))
        with Seen() as seen[each]:
            value.backward()
    assert seen[kind].products - seen["none"].products == AGAIN[kind, tangents]
    assert (seen["none"].attention, seen[kind].attention) == (0, kind == "full")


@pytest.mark.parametrize("tangents", [True, False])
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float8", marks=pytest.mark.slow)])
def test_compiled_blocks_keep_and_compute_again_the_same(precision: str, kind: str, tangents: bool) -> None:
    recorded, calls = Recorded(), 2 if tangents else 1
    run = torch.compile(made(kind, precision), backend=recorded, fullgraph=True)
    loss(run, inputs(tangents), precision).backward()
    products = sum(recorded.backward[product] for product in PRODUCTS)
    assert products == 2 * LAYERS * calls + AGAIN[kind, tangents]  # two are the gradients of each layer
    attention = sum(count for target, count in recorded.backward.items() if "flashjvp.forward" in str(target))
    assert attention == (kind == "full")
    assert recorded.numbers // (IMAGES * TOKENS * WIDTH) == KEPT[kind, tangents] + calls  # results are there, too


@pytest.mark.parametrize("tangents", [True, False])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_gradients_are_the_same_bits(kind: str, tangents: bool) -> None:
    plain, block = made("none"), made(kind)
    expected = gradients(plain, plain, inputs(tangents))
    assert all(map(torch.equal, gradients(block, block, inputs(tangents)), expected))
    run = torch.compile(block, backend=Recorded(), fullgraph=True)
    assert all(map(torch.equal, gradients(run, block, inputs(tangents)), expected))


def test_a_tangent_of_the_condition_alone_is_one() -> None:
    x, c, _, c_t = inputs(True)
    seen = {}
    for kind in ("none", "selective"):
        value = torch.stack([part.square().sum() for part in made(kind)(x, c, None, c_t)]).sum()
        with Seen() as seen[kind]:
            value.backward()
    assert seen["selective"].products - seen["none"].products == AGAIN["selective", True]


def test_a_step_keeps_attention_and_products() -> None:
    config, alone, seen = digits(Path("run")), World(0, 1, torch.device("cpu")), {}
    for kind in ("none", "full", "selective"):
        state = State(change(config, checkpointing=kind), alone)
        (batch,) = Batches(config, open_dataset(config.data), alone).draw(0)
        value = state.objective(batch, state.target).loss.sum()
        with Seen() as seen[kind]:
            value.backward()
    more = {kind: seen[kind].products - seen["none"].products for kind in ("full", "selective")}
    depth = config.model.depth
    assert more == {"full": 3 * LAYERS * depth, "selective": 2 * WIDE * depth}  # a dual call and a plain one
    assert {kind: each.attention for kind, each in seen.items()} == {"none": 0, "full": 2 * depth, "selective": 0}

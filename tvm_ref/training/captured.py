"""The forward and backward pass of a step as a CUDA graph: the host launches it at once, not kernel by kernel.

A step of DiT-XL/2 has about 7000 kernels. Where the host queues them more slowly than the GPU runs them, the GPU waits.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..objective.loss import Batch, Terms

WARM = 2  # calls that run as they are, in which kernels are compiled and chosen


class CapturedGradient:
    """`compute(batch)`, which leaves gradients in the parameters and returns loss terms, as a CUDA graph.

    All batches have one shape, the work is that of one process, and before each call the parameters have no gradient.
    The call after WARM of them is captured, with memory of its own, which later calls use again: the gradients and
    terms of a call hold until the next one. Nothing runs in a replay that is not on the GPU: no hook of a module.
    """

    def __init__(self, compute: Callable[[Batch], Terms], parameters: list[nn.Parameter]) -> None:
        self._compute, self._parameters = compute, parameters
        self._stream = torch.cuda.Stream()  # of the warm-up, too: a gradient is added up on the stream that it began on
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._terms: Terms
        self._gradients: list[Tensor | None]

    def __call__(self, batch: Batch) -> Terms:
        self._calls += 1
        if self._calls <= WARM:
            return self._warm_up(batch)
        if self._graph is None:
            self._graph = self._captured(batch)
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._terms

    def _warm_up(self, batch: Batch) -> Terms:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = self._compute(batch)
        current.wait_stream(self._stream)
        return terms

    def _captured(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """Runs nothing. What the warm-up took of memory is given back before, since the graph takes as much."""
        self._batch = Batch(*(x.clone() for x in batch))
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data, may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._terms = self._compute(self._batch)
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph

"""Batched decoding from a cache: prefill rows once, then any number of continuations fork from any point of them."""

import torch


class CudaGraphed:
    """A function of CUDA tensors, always of the same shapes: called once, then recorded as a CUDA graph and replayed.

    A step of one token a row is a thousand small kernels, which take longer to launch one by one than to run. What the function
    reads besides its inputs, weights and whether adapters are on, must lie where it lay when it was recorded.
    """

    def __init__(self, function):
        self.function, self.graph, self.warm = function, None, False

    def __call__(self, *inputs):
        """What the function gives; the next call overwrites it."""
        if not self.warm:  # kernels are loaded at their first use, which no recording may contain
            self.warm = True
            return self.function(*inputs)
        if self.graph is None:
            self.inputs, self.graph = [part.clone() for part in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                self.graph, capture_error_mode="thread_local"
            ):  # NCCL has a thread of its own
                self.output = self.function(*self.inputs)
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.graph.replay()
        return self.output

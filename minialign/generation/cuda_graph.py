"""CUDA graphs: record the kernels of a decoding step once, then replay them."""

import torch


class CudaGraphed:
    """Same result as calling the function, but recorded once as a CUDA graph and then replayed.

    Decoding one token a row takes about a thousand small kernels. To launch them one by one from
    Python takes longer than to run them. Replaying a graph launches all of them at once.

    The inputs must be CUDA tensors of the same shapes at every call. Everything else that the
    function reads (weights, the cache, whether adapters are enabled) must stay where it was during
    the recording.
    """

    def __init__(self, function):
        self.function = function
        self.is_warm = False
        self.graph = None
        self.inputs = None
        self.output = None

    def __call__(self, *inputs):
        """Return the function's output, a buffer that the next call overwrites."""
        # 1. The first call runs as usual. Kernels are loaded when they are first used, and a
        #    recording must not contain that.
        if not self.is_warm:
            self.is_warm = True
            return self.function(*inputs)
        # 2. The second call records the graph.
        if self.graph is None:
            self.record(inputs)
        # 3. From then on, new values are copied to the recorded inputs, and the kernels run again.
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        self.graph.replay()
        return self.output

    def record(self, inputs):
        """Record the kernels of the function on copies of `inputs`, which stay where they are."""
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": NCCL has a thread of its own, whose CUDA calls must not break the
        # recording.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = self.function(*self.inputs)

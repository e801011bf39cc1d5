"""A pretend GPU, which shows on any machine whether code puts its tensors on the right device.

Its tensors say that their device is "meta". That is a device of torch's own that exists everywhere,
whose tensors have a shape but no numbers. A `GpuTensor` also has a CPU tensor that holds its
numbers, and every operation is computed on those.

Like CUDA, the pretend GPU refuses to mix its tensors with those of the CPU. So code that runs here
without an error runs on a real GPU, as far as devices are concerned, and gives the numbers of the
CPU. It tests no kernels: only a real GPU can do that.
"""

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
make_cpu_tensor = torch.tensor  # the fixture `gpu` replaces torch.tensor

# Operations that copy from one device to another.
COPIES = (aten._to_copy.default, aten.copy_.default)
# Operations whose indices may lie on the CPU, as on CUDA.
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def is_gpu(device):
    """Tell whether a device is the pretend GPU or a real one."""
    return device is not None and torch.device(device).type in ("meta", "cuda")


def to_cpu(tensor):
    """Return a tensor of the pretend GPU, or of a real one, on the CPU."""
    return numbers_of(tensor).cpu()


class GpuTensor(torch.Tensor):
    """A tensor of the pretend GPU. `numbers` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, numbers):
        """Make a tensor without numbers that has the shape of `numbers`, and keep these."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            numbers.stride(),
            numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Compute an operation that has a GpuTensor among its arguments."""
        return compute(operation, args, kwargs or {})

    def tolist(self):
        """Return the numbers as nested lists."""
        return self.numbers.tolist()

    def __getitem__(self, index):
        """Index the tensor. A list becomes a CPU tensor: torch would make one without numbers."""
        indices = index if isinstance(index, tuple) else (index,)
        converted = []
        for item in indices:
            if isinstance(item, list):
                item = make_cpu_tensor(item)
            converted.append(item)
        return torch.Tensor.__getitem__(self, tuple(converted))


class PretendGpu(TorchDispatchMode):
    """A context in which tensors can be made on the pretend GPU, with device="meta"."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Compute an operation, whatever its arguments."""
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Compute an operation on the CPU, and put its result where a real GPU would put it."""
    # 1. Refuse what CUDA refuses.
    gpu_tensors = []
    cpu_tensors = []

    def sort(value):
        if isinstance(value, GpuTensor):
            gpu_tensors.append(value)
        elif isinstance(value, torch.Tensor):
            assert value.device.type == "cpu", f"{operation}: a tensor without numbers"
            cpu_tensors.append(value)

    map_values(sort, (args, kwargs))
    if gpu_tensors:
        check_cpu_tensors(operation, cpu_tensors)

    # 2. Compute on the numbers.
    cpu_kwargs = dict(kwargs)
    if is_gpu(kwargs.get("device")):
        cpu_kwargs["device"] = torch.device("cpu")
    result = operation(*map_values(numbers_of, args), **map_values(numbers_of, cpu_kwargs))
    if not result_is_on_gpu(operation, args, kwargs, gpu_tensors):
        return result

    # 3. Wrap the results. An operation in place returns the tensor that it was given.
    wrapper_of = {id(tensor.numbers): tensor for tensor in gpu_tensors}

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrapper_of:
            return wrapper_of[id(value)]
        return GpuTensor(value)

    return map_values(wrap, result)


def map_values(function, values):
    """Call a function with each value in nested tuples, lists and dicts, and return its results."""
    if isinstance(values, tuple | list):
        results = [map_values(function, value) for value in values]
        return tuple(results) if isinstance(values, tuple) else results
    if isinstance(values, dict):
        return {name: map_values(function, value) for name, value in values.items()}
    return function(values)


def check_cpu_tensors(operation, cpu_tensors):
    """Raise RuntimeError if CUDA would not take these tensors of the CPU beside its own.

    It takes single numbers, copies from one device to the other, and indices.
    """
    if operation in COPIES or operation in INDEXING:
        return
    if any(tensor.ndim for tensor in cpu_tensors):
        raise RuntimeError(f"{operation}: tensors of two devices")


def result_is_on_gpu(operation, args, kwargs, gpu_tensors):
    """Tell whether the result lies on the GPU: where it was asked for, or with its tensors."""
    if operation is aten.copy_.default:
        return isinstance(args[0], GpuTensor)
    device = kwargs.get("device")
    if device is not None:
        return is_gpu(device)
    return len(gpu_tensors) > 0


def numbers_of(value):
    """Return the numbers of a GpuTensor, and anything else as it is."""
    if isinstance(value, GpuTensor):
        return value.numbers
    return value


class SafeOpenOnGpu:
    """Stands in for safetensors.safe_open, which knows no pretend GPU."""

    def __init__(self, path, framework, device):
        self.file = safe_open(path, framework=framework)
        self.device = device

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def keys(self):
        """Return the names of the tensors."""
        return self.file.keys()

    def metadata(self):
        """Return the metadata of the file."""
        return self.file.metadata()

    def get_tensor(self, name):
        """Read a tensor and move it to the device."""
        return self.file.get_tensor(name).to(self.device)

    def get_slice(self, name):
        """Return the header of a tensor, which lies on no device."""
        return self.file.get_slice(name)

"""Show where the time of a warm DPO step goes, by torch's profiler.

The time of each op is its own, without that of the ops that it calls. On CUDA it is the time of the
kernels that the op starts. There are five kinds of ops:

large products   Products with a weight of the model, forward and backward.
thin products    Products with a LoRA matrix, one side of which is the rank or a few times the rank.
attention        The fused attention kernels.
moves            Copies, casts, concatenations, gathers, and memory that is set to a number.
the rest         Norms, RoPE, gates, softmax, sums: arithmetic on single numbers, whose time is that
                 of reading and writing them.

"share" is the share of the time of all ops. "of peak" is the speed of products over that of a large
square product. The profiler slows every step down. So, on CUDA, "GPU is busy" is the time of all
ops over that of a step without the profiler. For the rest of that step the GPU waits.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass

from common import make_model, make_pairs, parse_options, torch_dtype
from dpo_steps import WARM, OurStep, make_policy
from report import heading, write_figures
from timing import alternate, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minialign.models.arithmetic import measure_peak
from minialign.utils.memory import keep_freed_memory

LARGE = "large products"
THIN = "thin products"
ATTENTION = "attention"
MOVES = "moves"
REST = "the rest"
KINDS = (LARGE, THIN, ATTENTION, MOVES, REST)

PRODUCT_OPS = ("mm", "addmm", "addmm_")
MOVING_OPS = (
    "cat",
    "clone",
    "copy_",
    "embedding",
    "fill_",
    "gather",
    "index",
    "index_select",
    "masked_fill_",
    "scatter_add_",
    "zero_",
)
MOST_FUSED_ADAPTERS = 3  # q, k and v share one product with their lora_A
LIST_LENGTH = 12  # lines of the lists of ops and of products
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}  # of the product that the others are compared with


@dataclass(frozen=True)
class OpTime:
    """The time of one op on inputs of one shape."""

    op: str
    kind: str  # one of KINDS
    seconds: float  # a step
    calls: float  # a step
    shape: tuple | None  # (m, k, n) of a product of an (m, k) with a (k, n) matrix

    @property
    def flops(self):
        """The operations a step, if it is a product."""
        m, k, n = self.shape
        return 2 * m * k * n * self.calls


def profile_steps(step, options) -> list[OpTime]:
    """Profile `--repeats` steps."""
    # 1. Let the profiler watch.
    is_cuda = options.device == "cuda"
    activities = [ProfilerActivity.CPU]
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as watched:
        for _ in range(options.repeats):
            step()
        synchronize(options)

    # 2. Read what it saw. On CUDA it also has a row for each kernel, whose time is that of its op.
    op_times = []
    for row in watched.key_averages(group_by_input_shape=True):
        if row.device_type != DeviceType.CPU:
            continue
        op = row.key.removeprefix("aten::")
        shape = shape_of_product(row.input_shapes) if op in PRODUCT_OPS else None
        microseconds = row.self_device_time_total if is_cuda else row.self_cpu_time_total
        op_time = OpTime(
            op=op,
            kind=kind_of(op, shape, options.rank),
            seconds=microseconds / 1e6 / options.repeats,
            calls=row.count / options.repeats,
            shape=shape,
        )
        op_times.append(op_time)
    return op_times


def shape_of_product(input_shapes):
    """Return (m, k, n) of a product, from the shapes of what its op was given.

    The two matrices that are multiplied come last. `addmm` has another one before them, to which
    the product is added.
    """
    matrices = [shape for shape in input_shapes if len(shape) == 2]
    left, right = matrices[-2:]
    return left[0], left[1], right[1]


def kind_of(op, shape, rank):
    """Return which of KINDS an op belongs to."""
    if shape is not None:
        sizes_of_adapters = {rank * num_fused for num_fused in range(1, MOST_FUSED_ADAPTERS + 1)}
        is_thin = bool(sizes_of_adapters & set(shape))
        return THIN if is_thin else LARGE
    if "attention" in op:
        return ATTENTION
    if op in MOVING_OPS:
        return MOVES
    return REST


def sum_by(op_times, key):
    """Add up the seconds a step of ops; return {key(op_time): seconds}, the slowest first."""
    sums = defaultdict(float)
    for op_time in op_times:
        sums[key(op_time)] += op_time.seconds
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))


def print_kinds(op_times, peak):
    """Print a line for each kind of ops, and return the figures."""
    print(f"{'kind':18}{'ms a step':>10}{'share':>8}{'of peak':>9}")
    seconds_of_kinds = sum_by(op_times, key=lambda op_time: op_time.kind)
    total = sum(seconds_of_kinds.values())
    figures = {}
    for kind in KINDS:
        seconds = seconds_of_kinds.get(kind, 0.0)
        figures[kind] = {"seconds": seconds, "share": seconds / total}
        line = f"{kind:18}{1000 * seconds:10.1f}{seconds / total:8.1%}"
        if kind in (LARGE, THIN):
            flops = sum(op_time.flops for op_time in op_times if op_time.kind == kind)
            figures[kind]["of_peak"] = flops / seconds / peak
            line += f"{flops / seconds / peak:9.1%}"
        print(line)
    print(f"{'all ops':18}{1000 * total:10.1f}")
    return figures


def print_ops(op_times):
    """Print a line for each of the slowest ops."""
    print(f"\n{'op':46}{'calls':>8}{'ms a step':>10}  kind")
    calls = defaultdict(float)
    for op_time in op_times:
        calls[op_time.op, op_time.kind] += op_time.calls
    seconds_of_ops = sum_by(op_times, key=lambda op_time: (op_time.op, op_time.kind))
    for (op, kind), seconds in list(seconds_of_ops.items())[:LIST_LENGTH]:
        print(f"{op:46}{calls[op, kind]:8.0f}{1000 * seconds:10.1f}  {kind}")


def print_products(op_times, peak):
    """Print a line for each of the slowest shapes of products, and return the figures of all."""
    print(f"\n{'product':46}{'calls':>8}{'ms a step':>10}{'of peak':>9}")
    products = [op_time for op_time in op_times if op_time.shape is not None]
    figures = []
    for shape, seconds in sum_by(products, key=lambda op_time: op_time.shape).items():
        of_this_shape = [op_time for op_time in products if op_time.shape == shape]
        calls = sum(op_time.calls for op_time in of_this_shape)
        of_peak = sum(op_time.flops for op_time in of_this_shape) / seconds / peak
        figures.append({"shape": shape, "calls": calls, "seconds": seconds, "of_peak": of_peak})
    for product in figures[:LIST_LENGTH]:
        m, k, n = product["shape"]
        print(
            f"{f'({m}, {k}) with ({k}, {n})':46}{product['calls']:8.0f}"
            f"{1000 * product['seconds']:10.1f}{product['of_peak']:9.1%}"
        )
    return figures


def main():
    """Run the benchmark."""
    # 1. The step.
    options = parse_options(__doc__)
    keep_freed_memory()  # as train.py does
    policy = make_policy(options, make_model(options))
    step = OurStep(policy, make_pairs(options), start=WARM)

    # 2. Its time without the profiler, after a first step that warms up, and then its ops.
    _, seconds_of_sides = alternate({"step": step}, options)
    step_seconds = statistics.median(seconds_of_sides["step"])
    op_times = profile_steps(step, options)
    peak = measure_peak(options.device, torch_dtype(options), PEAK_SIZES[options.device])

    # 3. The tables.
    print(heading(options, clock="torch's profiler"))
    figures = {"step_seconds": step_seconds, "matmul_flops": peak}
    figures["kinds"] = print_kinds(op_times, peak)
    if options.device == "cuda":
        busy_seconds = sum(op_time.seconds for op_time in op_times)
        figures["busy"] = busy_seconds / step_seconds
        print(f"a step takes {1000 * step_seconds:.1f} ms; GPU is busy {figures['busy']:.1%}")
    print_ops(op_times)
    figures["products"] = print_products(op_times, peak)
    write_figures(options, figures)


if __name__ == "__main__":
    main()

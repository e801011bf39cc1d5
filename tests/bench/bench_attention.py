"""Measure one layer's attention over rows of pairs, forward and backward, in three ways.

Most of a row is the prefix that its responses share.

one call   scaled_dot_product_attention with the whole mask (B, 1, T, T). The kernel computes what
           the mask then hides.
two calls  Ours (`decoder.attention`): the prefix causally, without a mask, and the mask for the
           queries of the responses alone.
Flex       FlexAttention, compiled, with a block mask made beforehand from the same rule. It skips
           whole blocks that nobody may see. It runs on CUDA alone, because it has no backward pass
           on a CPU.

"times the arithmetic" is the time over that of the visible part's arithmetic at the speed of a
large matrix product.
"""

import statistics
from functools import partial

import torch
from common import make_pairs, parse_options, prefix_length, torch_dtype
from report import heading, write_figures
from timing import alternate, measure_peak_of, rows_of, time_ratio
from torch.nn import functional as F

from minialign.data.packing import PAD_SEGMENT, attention_mask_from_segments
from minialign.models.arithmetic import count_causal, count_seen_by_responses
from minialign.models.decoder import attention, merge_heads

ONE_CALL = "one call"
TWO_CALLS = "two calls"


def make_segments(options, pairs):
    """Return the segments (B, T) of packed rows, as in `minialign/data/packing.py`."""
    rows = []
    for pair in pairs:
        row = [0] * prefix_length(options)
        for segment, response in enumerate(pair.responses, start=1):
            row += [segment] * len(response)
        rows.append(row)
    longest = max(len(row) for row in rows)
    padded = [row + [PAD_SEGMENT] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=options.device)


def additive_mask(is_visible, dtype):
    """Return 0 where a query sees a key, and -inf elsewhere."""
    mask = torch.zeros_like(is_visible, dtype=dtype)
    return mask.masked_fill(~is_visible, -torch.inf)


def attend_in_one_call(q, k, v, mask):
    """Attend with the mask (B, 1, T, T) of all queries; return (B, T, H d)."""
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return merge_heads(y)


def attend_in_two_calls(q, k, v, mask):
    """Attend with the mask (B, 1, R, T) of the queries behind the prefix; return (B, T, H d)."""
    return torch.cat(attention(q, k, v, mask), dim=1)


def make_flex_attention(segments):
    """Return FlexAttention for packed rows, compiled. Its result is (B, T, H d)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_visible(b, h, q_index, k_index):
        same_segment = segments[b, k_index] == segments[b, q_index]
        in_prefix = segments[b, k_index] == 0
        return (k_index <= q_index) & (in_prefix | same_segment)

    B, T = segments.shape
    block_mask = create_block_mask(is_visible, B, None, T, T, device=segments.device)
    compiled = torch.compile(flex_attention)

    def attend(q, k, v):
        return merge_heads(compiled(q, k, v, block_mask=block_mask))

    return attend


def attention_step(attend, inputs, output_gradient):
    """Return the output of attention (B, T, H d), and its gradients on q, k and v."""
    y = attend(*inputs)
    gradients = torch.autograd.grad(y, inputs, output_gradient)
    return [y.detach(), *gradients]


def make_tensors(options, num_rows, row_length):
    """Return random q, k and v (B, H, T, d), and the gradient (B, T, H d) of the output."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch_dtype(options)
    num_heads = options.width // options.head
    inputs = []
    for _ in range(3):
        shape = (num_rows, row_length, num_heads, options.head)
        tensor = torch.randn(shape, generator=generator).to(options.device, dtype)
        inputs.append(tensor.transpose(1, 2).requires_grad_())
    output_shape = (num_rows, row_length, options.width)
    output_gradient = torch.randn(output_shape, generator=generator).to(options.device, dtype)
    return inputs, output_gradient


def largest_difference(results, exact_results):
    """Return the largest relative error (L2) of the output and the gradients."""
    differences = []
    for result, exact in zip(results, exact_results, strict=True):
        error = result.float() - exact.float()
        differences.append(float(error.norm() / exact.float().norm()))
    return max(differences)


def main():
    """Run the benchmark."""
    # 1. The rows, and the masks of both ways.
    options = parse_options(__doc__)
    pairs = make_pairs(options)
    segments = make_segments(options, pairs)
    num_rows, row_length = segments.shape
    prefix = prefix_length(options)
    dtype = torch_dtype(options)
    inputs, output_gradient = make_tensors(options, num_rows, row_length)
    whole_mask = additive_mask(attention_mask_from_segments(segments), dtype)
    response_mask = additive_mask(attention_mask_from_segments(segments, prefix), dtype)

    # 2. All ways in turn.
    ways = {
        ONE_CALL: partial(attend_in_one_call, mask=whole_mask),
        TWO_CALLS: partial(attend_in_two_calls, mask=response_mask),
    }
    matmul_size = 1024
    if options.device == "cuda":
        ways["Flex"] = make_flex_attention(segments)
        matmul_size = 8192
    sides = {}
    for name, attend in ways.items():
        sides[name] = partial(attention_step, attend, inputs, output_gradient)
    results, seconds = alternate(sides, options)

    # 3. The table.
    num_seen = 0
    for row in rows_of(options, pairs):
        num_seen += count_causal(row.prefix) + count_seen_by_responses(row)
    flops = 12 * options.width * num_seen  # two products forward, four backward
    ceiling = measure_peak_of(options, matmul_size)
    print(
        heading(options) + f", {num_rows} rows of {row_length} positions, {prefix} of them prefix"
    )
    print(f"{'way':12}{'ms':>10}{'over two calls':>16}{'times the arithmetic':>22}{'apart':>10}")
    figures = {}
    for name in ways:
        way_seconds = statistics.median(seconds[name])
        over_two_calls = time_ratio(seconds, name, TWO_CALLS)
        difference = largest_difference(results[name], results[ONE_CALL])
        times_arithmetic = way_seconds * ceiling / flops
        print(
            f"{name:12}{1000 * way_seconds:10.2f}{over_two_calls:15.2f}x"
            f"{times_arithmetic:21.2f}x{difference:10.1e}"
        )
        figures[name] = {
            "seconds": way_seconds,
            "over_two_calls": over_two_calls,
            "apart": difference,
        }
    write_figures(options, {"ways": figures, "flops": flops, "matmul_flops": ceiling})


if __name__ == "__main__":
    main()

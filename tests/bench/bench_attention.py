"""One layer's attention over rows of pairs, forward and backward, side by side in one process: what all rows have as prefix is most of it.

one call   scaled_dot_product_attention with the whole mask (B, 1, T, T): the kernel computes what the mask then hides.
two calls  ours (decoder.attend): the prefix causally, without a mask; the mask for the branches' queries alone.
Flex       FlexAttention, compiled, its block mask made beforehand from the same predicate: whole blocks that nobody may see are skipped.
           On CUDA alone (it has no backward pass on a CPU).
"times the arithmetic" is over the time that the visible part takes at the speed of a large matrix product.
"""

import functools
import statistics

import torch
from common import (
    alternate,
    heading,
    make_pairs,
    matmul_ceiling,
    parse,
    ratio,
    vectors_of,
    visible_pairs,
    write,
)
from torch.nn import functional as F

from minialign.data.packing import PAD_SEGMENT, attention_mask_from_segments
from minialign.models.decoder import attention


def layout(options, pairs):
    """Segments (B, T) of the rows, and their prefix's length."""
    prefix = vectors_of(options) + options.prompt - 2
    rows = [
        [0] * prefix
        + [number for number, response in enumerate(pair.responses, 1) for _ in response]
        for pair in pairs
    ]
    T = max(map(len, rows))
    return torch.tensor(
        [row + [PAD_SEGMENT] * (T - len(row)) for row in rows], device=options.device
    ), prefix


def flex(segments):
    """Attention by FlexAttention over the rows' predicate, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = segments.shape

    def visible(b, h, q, k):
        return (k <= q) & ((segments[b, k] == 0) | (segments[b, k] == segments[b, q]))

    return functools.partial(
        torch.compile(flex_attention),
        block_mask=create_block_mask(visible, B, None, T, T, device=segments.device),
    )


def side(attention, tensors, slope):
    """A step: attention, (B, T, H d), and its gradients on q, k and v."""

    def step():
        y = attention(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, slope)]

    return step


def main():
    options = parse(__doc__)
    pairs = make_pairs(options)
    segments, prefix = layout(options, pairs)
    (B, T), H, dtype = segments.shape, options.width // options.head, getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, T, H, options.head, generator=generator)
        .to(options.device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )
    slope = torch.randn(B, T, H * options.head, generator=generator).to(options.device, dtype)
    whole, part = (
        torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        for mask in (
            attention_mask_from_segments(segments),
            attention_mask_from_segments(segments, prefix),
        )
    )
    ways = {
        "one call": lambda q, k, v: (
            F.scaled_dot_product_attention(q, k, v, attn_mask=whole).transpose(1, 2).flatten(2)
        ),
        "two calls": lambda q, k, v: torch.cat(attention(q, k, v, part), 1),
    }
    if options.device == "cuda":
        own = flex(segments)
        ways["Flex"] = lambda q, k, v: own(q, k, v).transpose(1, 2).flatten(2)
    given, seconds = alternate(
        {name: side(way, (q, k, v), slope) for name, way in ways.items()}, options
    )
    apart = {
        name: max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(given[name], given["one call"])
        )
        for name in ways
    }
    flops, ceiling = (
        12 * options.width * visible_pairs(options, pairs),
        matmul_ceiling(options, 8192 if options.device == "cuda" else 1024),
    )
    print(heading(options) + f", {B} rows of {T} slots, {prefix} of them prefix")
    print(f"{'way':12}{'ms':>10}{'over two calls':>16}{'times the arithmetic':>22}{'apart':>10}")
    figures = {}
    for name, values in seconds.items():
        own = figures[name] = {
            "seconds": statistics.median(values),
            "over_two_calls": ratio(seconds, name, "two calls"),
            "apart": apart[name],
        }
        print(
            f"{name:12}{1000 * own['seconds']:10.2f}{own['over_two_calls']:15.2f}x{own['seconds'] * ceiling / flops:21.2f}x{own['apart']:10.1e}"
        )
    write(options, {"ways": figures, "flops": flops, "matmul_flops": ceiling})


if __name__ == "__main__":
    main()

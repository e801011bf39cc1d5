"""The Llama-style decoder (Llama, Mistral, Qwen2) and its key-value cache. It returns hidden states; heads live elsewhere."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Rope(torch.autograd.Function):
    """RoPE in the half-split layout: x (B, T, H, d) by angles given as cos and sin (B, T, 1, d/2).

    The gradient is rotated back, by the same few passes: no half is negated, nothing concatenated, as autograd would do for each.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, sign=1):
        """The rotated x, or with `sign` -1 the x that was."""
        ctx.save_for_backward(cos, sin)
        (a, b), y = x.chunk(2, -1), torch.empty_like(x)
        c, d = y.chunk(2, -1)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=d).addcmul_(a, sin, value=sign)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradient of x."""
        return Rope.apply(grad, *ctx.saved_tensors, -1), None, None, None


class SharedPrefix(torch.autograd.Function):
    """k (B, H, S, d) and its first n slots; what comes back to those is added in place to what comes back to the whole.

    Autograd would first lay it out in a tensor of zeros of the whole's size.
    """

    @staticmethod
    def forward(ctx, k, n):
        """Two views."""
        ctx.n = n
        return k.view_as(k), k[:, :, :n]

    @staticmethod
    def backward(ctx, whole, part):
        """The gradient of k."""
        whole[:, :, : ctx.n] += part  # nobody else holds it: an attention has just made it
        return whole, None


def concat_pieces(*pieces):
    """Pieces (B, T', D) as one, (B, T, D)."""
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def swiglu(gate, up):
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; of the four wide tensors of an MLP the backward pass keeps three, and computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate, up):
        """The product."""
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx, grad):
        """Gradients for gate and up."""
        gate, up = ctx.saved_tensors
        slope = grad * up
        return torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope), F.silu(
            gate
        ).mul_(grad)


class FusedLoRALinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + scale (x A_i^T) B_i^T of several frozen layers that read the same x (N, in), each (N, out_i).

    One product gives all x A_i^T, and what comes back to x is added up inside the products of the backward pass, not after them.
    That pass needs x itself for the gradient of A alone: with `again`, a function and its tensors, which are kept anyway and give
    just this x whenever they are asked, x is not kept but made once more. What comes back to x goes on by the graph that x has.
    """

    @staticmethod
    def forward(ctx, x, layers, again, *weights):
        """The outputs; `weights`, all A_i (r, in) and then all B_i (out_i, r), are the layers' own, for autograd to see."""
        ctx.layers, ctx.ranks, ctx.make = (
            layers,
            [layer.lora_A.shape[0] for layer in layers],
            again[0] if again else None,
        )
        A, Bs = (
            torch.cat(weights[: len(layers)]).to(x.dtype),
            [B.to(x.dtype) for B in weights[len(layers) :]],
        )
        low = x @ A.T  # (N, sum of ranks)
        ctx.save_for_backward(
            A, low, *Bs, *([part.detach() for part in again[1:]] if again else [x])
        )
        return tuple(
            layer.base(x).addmm_(own, B.T, alpha=layer.scale)
            for layer, own, B in zip(layers, low.split(ctx.ranks, 1), Bs)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """Gradients of x, and of all A_i and B_i in fp32."""
        A, low, *parts = ctx.saved_tensors
        Bs, parts = parts[: len(grads)], parts[len(grads) :]
        each = list(zip(ctx.layers, grads, Bs, low.split(ctx.ranks, 1)))
        # scale dy B, in one call with beta 0, which takes nothing of `own`; dBs below likewise
        d_low = torch.cat(
            [torch.addmm(own, grad, B, beta=0, alpha=layer.scale) for layer, grad, B, own in each],
            1,
        )
        dx = d_low @ A
        for layer, grad, _, _ in each:
            dx.addmm_(grad, layer.base.weight)
        x = ctx.make(*parts).flatten(0, -2) if ctx.make else parts[0]
        dBs = [
            torch.addmm(B, grad.T, own, beta=0, alpha=layer.scale).float()
            for layer, grad, B, own in each
        ]
        return dx, None, None, *(d_low.T @ x).float().split(ctx.ranks), *dBs


class BlockwiseTokenLogps(torch.autograd.Function):
    """Same result as `log_softmax(hidden @ weight.T)` at the targets, without its (N, V) logits.

    The vocabulary is read once, a block of v tokens at a time, and only one block's logits (N, v)
    exist at any time. As in FlashAttention, a running maximum and a running sum of exponentials
    give the softmax's denominator. The sum is rescaled where a block brings a larger logit.

    The gradient for hidden does not depend on what follows:

    d logp / d hidden = W[target] - sum_v softmax(hidden W^T)[v] W[v]

    So it is formed in the forward pass too, while a block's logits are at hand, and no logits are
    computed again in the backward pass unless the vocabulary head itself is trained.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, block_size):
        """Compute log p(targets) (N,) in fp32 from hidden (N, D) and weight (V, D)."""
        N = len(hidden)
        running_max = hidden.new_full((N, 1), -torch.inf, dtype=torch.float32)
        running_sum = hidden.new_full((N, 1), 0.0, dtype=torch.float32)  # of exp(logit - max)
        weighted_rows = 0.0  # (N, D): sum of exp(logit - max) W[v]
        # A target outside the vocabulary lies in no block, and its log-prob stays NaN.
        target_logits = hidden.new_full((N, 1), torch.nan, dtype=torch.float32)
        block_start = 0
        for block in weight.split(block_size):
            logits = (hidden @ block.T).float()  # (N, v)

            # 1. Pick out the logits of the targets that lie in this block.
            column = targets[:, None] - block_start
            is_in_block = (column >= 0) & (column < len(block))
            picked_logits = logits.gather(1, column.clamp(0, len(block) - 1))
            target_logits = torch.where(is_in_block, picked_logits, target_logits)

            # 2. Raise the running maximum. What was summed so far is rescaled to it.
            new_max = torch.maximum(running_max, logits.amax(dim=-1, keepdim=True))
            rescale = (running_max - new_max).exp()
            running_max = new_max

            # 3. Add this block's exponentials. They overwrite the logits to save memory.
            exponentials = logits.sub_(new_max).exp_()
            running_sum = running_sum * rescale + exponentials.sum(dim=-1, keepdim=True)

            # 4. Add this block's share of the gradient for hidden.
            if ctx.needs_input_grad[0]:
                weighted_rows = weighted_rows * rescale + exponentials.to(weight.dtype) @ block

            # 5. Free this block's logits before the next block's are made.
            del logits, exponentials
            block_start += len(block)

        # 6. Keep for the backward pass only what it needs.
        slopes = None  # (N, D): d logp / d hidden
        if ctx.needs_input_grad[0]:
            expected_rows = weighted_rows / running_sum
            slopes = weight[targets] - expected_rows.to(weight.dtype)
        ctx.block_size = block_size
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(slopes, hidden, weight, targets, running_max, running_sum)
        else:
            ctx.save_for_backward(slopes)
        logps = target_logits - running_max - running_sum.log()
        return logps.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Compute the gradients of hidden (N, D) and weight (V, D), each if it is asked for."""
        grad = grad[:, None]  # (N, 1)
        grad_hidden = None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            slopes = ctx.saved_tensors[0]
            grad_hidden = grad.to(slopes.dtype) * slopes
        if ctx.needs_input_grad[1]:
            grad_weight = BlockwiseTokenLogps.weight_gradient(ctx, grad)
        return grad_hidden, grad_weight, None, None

    @staticmethod
    def weight_gradient(ctx, grad):
        """Compute the gradient of weight (V, D), from one block's logits at a time.

        d logp / d W[v] = (is_target[v] - softmax(hidden W^T)[v]) hidden
        """
        _, hidden, weight, targets, max_logits, sum_of_exponentials = ctx.saved_tensors
        # 1. The softmax's part, block by block.
        scaled_hidden = (-grad / sum_of_exponentials).to(weight.dtype) * hidden  # (N, D)
        grad_blocks = []
        for block in weight.split(ctx.block_size):
            logits = (hidden @ block.T).float()  # (N, v)
            exponentials = logits.sub_(max_logits).exp_()
            grad_blocks.append(exponentials.to(weight.dtype).T @ scaled_hidden)
            del logits, exponentials
        grad_weight = torch.cat(grad_blocks)
        # 2. The target's part.
        grad_weight.index_add_(0, targets, grad.to(weight.dtype) * hidden)
        return grad_weight

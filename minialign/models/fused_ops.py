"""Ops with a hand-written backward pass, which save memory or time.

Each op has a plain form, a small function whose name ends in `_plain`. It stands above the op, or
in logprobs.py for `BlockwiseTokenLogps`. Tests hold the two equal, in outputs and in gradients. To
understand the model, read the plain forms only.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rope_plain(x, cos, sin):
    """Rotate each pair of channels of x (B, T, H, d) by its angle.

    Channels i and i + d/2 are a pair (the half-split layout of RoPE). The angles are given by
    cos and sin (B, T, d/2), the same for all heads.
    """
    cos = cos[:, :, None]  # (B, T, 1, d/2)
    sin = sin[:, :, None]  # (B, T, 1, d/2)
    first, second = x.chunk(2, dim=-1)  # each (B, T, H, d/2)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    return torch.cat([rotated_first, rotated_second], dim=-1)


class Rope(torch.autograd.Function):
    """Same result as `rope_plain`, written into one output.

    The gradient of a rotation is the opposite rotation. So the backward pass is as short as the
    forward one, and needs cos and sin only. Autograd would negate, pad and add each half.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, sign=1):
        """Rotate x (B, T, H, d) by cos and sin (B, T, 1, d/2), backwards if `sign` is -1."""
        ctx.save_for_backward(cos, sin)
        rotated = torch.empty_like(x)
        first, second = x.chunk(2, dim=-1)  # each (B, T, H, d/2)
        rotated_first, rotated_second = rotated.chunk(2, dim=-1)  # views into `rotated`
        # 1. first * cos - second * sin
        torch.mul(first, cos, out=rotated_first)
        rotated_first.addcmul_(second, sin, value=-sign)
        # 2. second * cos + first * sin
        torch.mul(second, cos, out=rotated_second)
        rotated_second.addcmul_(first, sin, value=sign)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rotated):
        """Rotate the gradient back."""
        cos, sin = ctx.saved_tensors
        grad_x = Rope.apply(grad_rotated, cos, sin, -1)
        return grad_x, None, None, None


def apply_rope(x, cos, sin):
    """Rotate x (B, T, H, d) by angles given as cos and sin (B, T, d/2).

    Same result as `rope_plain`. See `Rope` for what it saves.
    """
    return Rope.apply(x, cos[:, :, None], sin[:, :, None])


def shared_prefix_plain(k, length):
    """Return k (B, H, S, d) and its first `length` positions."""
    return k, k[:, :, :length]


class SharedPrefix(torch.autograd.Function):
    """Same result as `shared_prefix_plain`, without a second gradient of the size of k.

    Autograd would copy the gradient of the slice into a tensor of zeros as large as k, and then add
    the two. Here the gradient of the slice is added in place.

    Contract: nothing else reads the gradient of the whole k. That holds in `attention`, where the
    kernel's backward pass has just made it for this op.
    """

    @staticmethod
    def forward(ctx, k, length):
        """Return two views of k."""
        ctx.length = length
        return k.view_as(k), k[:, :, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_whole, grad_prefix):
        """Add the gradient of the first positions to the gradient of all."""
        grad_whole[:, :, : ctx.length] += grad_prefix
        return grad_whole, None


def concat_pieces(*pieces):
    """Concatenate pieces (B, T', D) along the positions to (B, T, D)."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1)


def swiglu_plain(gate, up):
    """Compute silu(gate) * up."""
    return F.silu(gate) * up


def swiglu(gate, up):
    """Compute silu(gate) * up in one new tensor. It works without autograd only."""
    return F.silu(gate).mul_(up)


class SwiGLU(torch.autograd.Function):
    """Same result as `swiglu_plain`, with two tensors stored instead of three.

    Autograd would store gate, up and silu(gate), the widest tensors of a layer. Here silu(gate) is
    computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, gate, up):
        """Compute silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_product):
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        # 1. The gradient of gate is silu'(gate) * (grad * up), written over grad * up.
        grad_silu = grad_product * up
        grad_gate = torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu)
        # 2. The gradient of up is silu(gate) * grad.
        grad_up = F.silu(gate).mul_(grad_product)
        return grad_gate, grad_up


def lora_linears_plain(x, layers):
    """Apply several LoRA layers to the same x (N, in), one after the other.

    Each gives x W^T + b + scaling * (x A^T) B^T.
    """
    return [layer(x) for layer in layers]


class FusedLoRALinears(torch.autograd.Function):
    """Same result as `lora_linears_plain`, for frozen layers that all have an adapter.

    It saves time: one product gives x A^T for all layers, and the gradient of x is summed inside
    the matrix products of the backward pass, not after them.

    It saves memory: x is needed in the backward pass for the gradients of the A only. With
    `recompute_from` it is not stored but computed again.

    `recompute_from` is a tuple of a function and its arguments, where x = function(*arguments). For
    example, attention projects x = norm(h) to q, k and v, and passes recompute_from=(norm, h). The
    norm stores h anyway, for its own backward pass. So norm(h) can be computed once more, and
    one tensor (B, T, D) a layer less is stored.

    Contract: function(*arguments) must be equal to x, and the arguments must be stored anyway, or
    nothing is saved. A wrong function gives wrong gradients of the A without any error. The
    gradient of x is not affected: it flows through the graph that made x.
    """

    @staticmethod
    def forward(ctx, x, layers, recompute_from, *weights):
        """Apply the layers to x (N, in), which gives an output (N, out) for each.

        `weights` are the lora_A (r, in) of all layers, then their lora_B (out, r). The layers have
        them too, but autograd only sees what is passed as an argument.
        """
        # 1. The adapters are stored in fp32 and computed in the dtype of x.
        num_layers = len(layers)
        A = torch.cat(weights[:num_layers]).to(x.dtype)  # (sum of ranks, in)
        Bs = [B.to(x.dtype) for B in weights[num_layers:]]  # each (out, r)

        # 2. All x A^T at once.
        low = x @ A.T  # (N, sum of ranks)
        ranks = [layer.lora_A.shape[0] for layer in layers]
        lows = low.split(ranks, dim=1)  # each (N, r)

        # 3. Store what the backward pass needs: x, or how to compute it.
        if recompute_from is None:
            ctx.recompute = None
            sources = [x]
        else:
            ctx.recompute = recompute_from[0]
            # What is computed again has no part in the graph, so its sources have none either.
            sources = [argument.detach() for argument in recompute_from[1:]]
        ctx.layers = layers
        ctx.ranks = ranks
        ctx.save_for_backward(A, low, *Bs, *sources)

        # 4. Add scaling * (x A^T) B^T to the output of each frozen layer.
        outputs = []
        for layer, layer_low, B in zip(layers, lows, Bs, strict=True):
            output = layer.base(x)  # (N, out)
            outputs.append(output.addmm_(layer_low, B.T, alpha=layer.scaling))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        """Return the gradient of x, and those of all lora_A and lora_B in fp32."""
        saved = ctx.saved_tensors
        num_layers = len(ctx.layers)
        A = saved[0]  # (sum of ranks, in)
        low = saved[1]  # (N, sum of ranks)
        Bs = saved[2 : 2 + num_layers]  # each (out, r)
        sources = saved[2 + num_layers :]  # x, or the arguments of `recompute`
        lows = low.split(ctx.ranks, dim=1)  # each (N, r)

        # 1. The gradient of each x A^T is scaling * grad B. With beta=0, addmm ignores the values
        # of its first argument, which only lends its shape, and scales inside the product.
        grad_lows = []
        for layer, grad, B, layer_low in zip(ctx.layers, grad_outputs, Bs, lows, strict=True):
            grad_lows.append(torch.addmm(layer_low, grad, B, beta=0, alpha=layer.scaling))
        grad_low = torch.cat(grad_lows, dim=1)  # (N, sum of ranks)

        # 2. The gradient of x: through the adapters, and through each frozen weight.
        grad_x = grad_low @ A  # (N, in)
        for layer, grad in zip(ctx.layers, grad_outputs, strict=True):
            grad_x.addmm_(grad, layer.base.weight)

        # 3. Get x, or compute it again.
        if ctx.recompute is None:
            x = sources[0]  # (N, in)
        else:
            x = ctx.recompute(*sources).flatten(0, -2)  # (N, in)

        # 4. The gradient of each B is scaling * grad^T (x A^T), again by addmm with beta=0.
        grad_Bs = []
        for layer, grad, B, layer_low in zip(ctx.layers, grad_outputs, Bs, lows, strict=True):
            grad_B = torch.addmm(B, grad.T, layer_low, beta=0, alpha=layer.scaling)
            grad_Bs.append(grad_B.float())

        # 5. The gradients of the A of all layers, in one product.
        grad_As = (grad_low.T @ x).float().split(ctx.ranks)  # each (r, in)
        return grad_x, None, None, *grad_As, *grad_Bs


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
        _, hidden, weight, targets, running_max, running_sum = ctx.saved_tensors
        # 1. The softmax's part, block by block.
        scaled_hidden = (-grad / running_sum).to(weight.dtype) * hidden  # (N, D)
        grad_blocks = []
        for block in weight.split(ctx.block_size):
            logits = (hidden @ block.T).float()  # (N, v)
            exponentials = logits.sub_(running_max).exp_()
            grad_blocks.append(exponentials.to(weight.dtype).T @ scaled_hidden)
            del logits, exponentials
        grad_weight = torch.cat(grad_blocks)
        # 2. The target's part.
        grad_weight.index_add_(0, targets, grad.to(weight.dtype) * hidden)
        return grad_weight

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
    """log p(target | hidden) for N positions, (N, D) x (V, D) -> (N,), a block of the vocabulary at a time.

    d logp / d hidden = W[target] - softmax(W hidden) W does not depend on what follows, so it is formed in the forward pass, while a
    block's logits are there; maximum, sum and mean of the softmax are carried from block to block and scaled down where a larger
    logit comes. No more logits than one block's ever exist, the head is read once, and nothing is recomputed unless it is trained.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, block):
        """(N,) log-probs; the slopes are kept for `backward`."""
        top, total, own, mean = (
            hidden.new_full((len(hidden), 1), value, dtype=torch.float32)
            for value in (-torch.inf, 0.0, torch.nan, 0.0)
        )
        place = targets[:, None]
        for w in weight.split(block):
            logits = (
                hidden @ w.T
            ).float()  # (N, v), fp32, the only tensor of this size: all below is done in it
            own = torch.where(
                (place >= 0) & (place < len(w)), logits.gather(1, place.clamp(0, len(w) - 1)), own
            )
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            logits.sub_(higher).exp_()
            shrink, top = (top - higher).exp_(), higher
            total = total * shrink + logits.sum(-1, keepdim=True)
            if ctx.needs_input_grad[0]:
                mean = (
                    mean * shrink + logits.to(weight.dtype) @ w
                )  # (N, D): softmax(W hidden) W times total
            place = place - len(w)
            del logits  # before the next ones are made
        ctx.block = block
        ctx.save_for_backward(
            weight[targets] - (mean / total).to(weight.dtype) if ctx.needs_input_grad[0] else None,
            *(hidden, weight, targets, top, total) if ctx.needs_input_grad[1] else (),
        )
        return (own - top - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients for hidden (N, D) and, if it is trained, weight (V, D)."""
        slopes, *rest = ctx.saved_tensors
        grad, d_weight = grad[:, None], None
        if rest:  # d logp / d W[v] = (1[v = target] - softmax(W hidden)[v]) hidden
            hidden, weight, targets, top, total = rest
            share = (-grad / total).to(weight.dtype) * hidden
            d_weight = torch.cat(
                [
                    ((hidden @ w.T).float() - top).exp_().to(weight.dtype).T @ share
                    for w in weight.split(ctx.block)
                ]
            )
            d_weight.index_add_(0, targets, grad.to(weight.dtype) * hidden)
        return None if slopes is None else grad.to(slopes.dtype) * slopes, d_weight, None, None

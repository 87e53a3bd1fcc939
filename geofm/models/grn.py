"""Global response normalization (GRN), folded into the linear layer behind it.

Source: Woo et al., ConvNeXt V2, CVPR 2023 (arXiv 2301.00808), section 3.3.
"""
# No `from __future__ import annotations`: torch.fx and TorchScript read the annotations as types.

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from geofm.models.gelu import runs_eagerly

__all__ = ["GlobalResponseNorm", "grn_linear"]

# Values that are squared at a time on a CPU, 2 MB.
_PART = 2**19


class GlobalResponseNorm(nn.Module):
    """The two vectors of a GRN layer, which `grn_linear` takes.

    Args:
        dim: Number of channels.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))


@register_notrace_function  # type: ignore[untyped-decorator]
def grn_linear(
    hidden: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Global response normalization followed by a linear layer, without touching `hidden` twice.

    GRN is ``gamma * (x * nx) + beta + x`` with ``nx = gx / (mean(gx) + eps)`` and ``gx`` the L2
    norm over space, so it is one scale ``1 + gamma * nx`` per sample and channel and one shift
    ``beta``. A scale of the input channels of a linear layer is a scale of its weights' columns,
    and a shift is part of its bias: the widest activation of the block is read once for the norm
    and once by the product, and never rewritten.

    Args:
        hidden: Activation, (N, H, W, D).
        gamma: Learned scale of the response, D values.
        beta: Learned shift, D values.
        weight: Weights of the linear layer, (C, D).
        bias: Bias of the linear layer, (C,).
        eps: Added to the mean response.

    Returns:
        (N, H, W, C).
    """
    batch, height, width, _ = hidden.shape
    sites = hidden.flatten(1, 2)
    if not torch.jit.is_scripting():
        traced: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        plain = traced or torch.compiler.is_exporting() or _forward_mode()
        if torch.is_grad_enabled() and not plain:
            trained: Tensor = _GrnLinear.apply(
                sites, gamma.flatten(), beta.flatten(), weight, bias, eps
            )[0]
            return trained.view(batch, height, width, weight.shape[0])
    out, _, _ = _forward(sites, gamma.flatten(), beta.flatten(), weight, bias, eps)
    return out.view(batch, height, width, weight.shape[0])


def _forward(
    sites: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output (N, P, C), and response and mean response for the gradient."""
    response, average = _response(sites, eps)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript reads the inner one otherwise)
        if _forward_mode():
            response, average = _smooth_response(sites, eps)
    scale = (1 + gamma * (response / average)).to(sites.dtype)
    bias = F.linear(beta.to(weight.dtype), weight, bias)
    if _scales_sites(sites, weight):
        out = F.linear(sites * scale[:, None], weight.to(sites.dtype), bias.to(sites.dtype))
    else:
        per_sample = (weight * scale[:, None]).transpose(1, 2)
        out = torch.baddbmm(bias.to(sites.dtype), sites, per_sample.to(sites.dtype))
    return out, response, average


def _forward_mode() -> bool:
    """Whether forward derivatives are being taken (`torch.func.jvp`, ``hessian``).

    Of an autograd.Function they would need a ``jvp``, which torch.compile does not take; torch
    derives them from `_forward` by itself.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _response(sites: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """L2 norm over sites, (N, D), and its mean over channels plus eps, (N, 1).

    At least float32: a sum of squares over a tile leaves float16's range.
    """
    wide = torch.promote_types(sites.dtype, torch.float32)
    if sites.device.type == "cpu":
        # Several times faster than vector_norm, whose loop over this axis is not vectorised.
        response = _squares(sites.to(wide)).sqrt()
    else:
        response = torch.linalg.vector_norm(sites, dim=1, dtype=wide)
    return response, response.mean(dim=-1, keepdim=True) + eps


def _squares(sites: Tensor) -> Tensor:
    """Sum of squares over sites, (N, D)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript reads the inner one otherwise)
        if not torch.is_grad_enabled() and runs_eagerly():
            # In parts that stay in a core's cache: no second copy of the widest activation.
            rows = max(1, _PART // (sites.shape[0] * sites.shape[2]))
            parts = [part.square().sum(1) for part in torch.split(sites, rows, 1)]
            return torch.stack(parts).sum(0)
    return sites.square().sum(1)


def _smooth_response(sites: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`_response` with all derivatives of a silent channel 0 instead of NaN."""
    wide = torch.promote_types(sites.dtype, torch.float32)
    squares = sites.to(wide).square().sum(1)
    silent = squares == 0
    response = torch.where(silent, 0, torch.where(silent, 1, squares).sqrt())
    return response, response.mean(dim=-1, keepdim=True) + eps


def _scales_sites(sites: Tensor, weight: Tensor) -> bool:
    """Few sites: scaling them is less work than scaling a copy of the weights per sample."""
    few = sites.shape[1] < 2 * weight.shape[0]
    if not torch.jit.is_scripting():
        # An exported graph must not depend on the size it was traced with.
        few = few or torch.compiler.is_exporting()
    return few


class _GrnLinear(torch.autograd.Function):
    """`_forward` with its gradient written out.

    With z = sites · scale and y = z Wᵀ + b: the gradient of the scale is a by-product of the
    weights', and the one that reaches `sites` through the norm is added in a single pass. Autograd
    would pass over the widest activation six more times.
    """

    # For torch.func.vmap, such as gradients of single samples.
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        sites, gamma, beta, weight, _, ctx.eps = inputs
        _, response, average = output
        ctx.mark_non_differentiable(response, average)
        ctx.save_for_backward(sites, gamma, beta, weight, response, average)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        sites, gamma, beta, weight, response, average = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For second derivatives these must hang together with `sites`.
            response, average = _smooth_response(sites, ctx.eps)
        kind = sites.dtype
        grad = grad.to(kind)
        relative = response / average
        scale = 1 + gamma * relative
        cast = weight.to(kind)
        flat = grad.flatten(0, 1)
        if _scales_sites(sites, weight):
            along = grad @ cast
            of_scale = (along * sites).sum(1, dtype=response.dtype)
            of_weight = flat.t() @ (sites * scale[:, None].to(kind)).flatten(0, 1)
            of_sites = along * scale[:, None].to(kind)
        else:
            outer = (grad.transpose(1, 2) @ sites).to(response.dtype)
            of_scale = (outer * weight).sum(1)
            of_weight = (outer * scale[:, None]).sum(0)
            of_sites = grad @ (weight * scale[:, None]).to(kind)
        of_bias = flat.sum(0, dtype=response.dtype)
        of_weight = of_weight + of_bias[:, None] * beta
        of_relative = of_scale * gamma
        shared = (of_relative * relative).mean(-1, keepdim=True)
        of_response = (of_relative - shared) / average
        # The norm of nothing but zeros has no slope.
        loud = response > 0
        slope = torch.where(loud, of_response / torch.where(loud, response, 1), 0)
        if kind == torch.float16:
            # The slope of a nearly silent channel is beyond float16, its product with sites is not.
            of_sites = (of_sites + sites.float() * slope[:, None]).to(kind)
        else:
            of_sites = torch.addcmul(of_sites, sites, slope[:, None].to(kind))
        return (
            of_sites,
            (of_scale * relative).sum(0).to(gamma.dtype),
            (of_bias @ weight.to(of_bias.dtype)).to(beta.dtype),
            of_weight.to(weight.dtype),
            of_bias.to(weight.dtype),
            None,
        )

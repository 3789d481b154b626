"""Error and statistics in, surrogate out: the closed form. Tensors only, no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 0.01
"""Share of the mean diagonal that is added to an input covariance, against noise of the sample."""


@dataclass
class Compensation:
    """
    A surrogate and what it does to the output error of its layer.

    Attributes:
        a (`torch.Tensor` of shape `(r, in_features)`): float32.
        b (`torch.Tensor` of shape `(out_features, r)`): float32.
        error_before (`float`): relative output error of the backbone, sqrt(tr(E H E^T) / tr(W H W^T)).
        error_after (`float`): the same with E - B A in the place of E.
    """

    a: torch.Tensor
    b: torch.Tensor
    error_before: float
    error_after: float


def damped(covariance: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return H + damping * mean(diag H) * I in float64; `covariance` is `(in, in)`, symmetric."""
    h = covariance.to(torch.float64)
    h = (h + h.T) / 2
    mean = h.diagonal().mean()
    return h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean if mean > 0 else 1.0)


def compensate(weight: torch.Tensor, error: torch.Tensor, covariance: torch.Tensor, rank: int) -> Compensation:
    """
    Find the rank-r path that takes back most of a layer's output error.

    B A minimises tr((E - B A) H (E - B A)^T), which is the mean squared output error over the inputs that H was
    collected from. The minimum is the truncated singular value decomposition of E H^(1/2), times H^(-1/2) on the right
    (QERA-exact, arXiv 2410.06040, theorem 1; EoRA, arXiv 2410.21271). With its left singular vectors U_r this is

        B A = U_r U_r^T E,

    because U_r U_r^T E H^(1/2) is the truncation. U_r are the leading eigenvectors of E H E^T (out x out); where the
    input is the narrower side they come from the leading eigenvectors V of L^T E^T E L (in x in), H = L L^T, as E L V.
    So one symmetric eigenproblem of the narrower side suffices and no inverse of H is formed. All in float64.

    The factors share the singular values evenly, B = U_r S^(1/2) and A = S^(-1/2) U_r^T E, and each column of B has
    its largest entry positive: the same input gives the same factors.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): W, the original weight.
        error (`torch.Tensor` of shape `(out, in)`): E = W - Q.
        covariance (`torch.Tensor` of shape `(in, in)`): H = E[x x^T], already [`damped`].
        rank (`int`): r, in 1..min(out, in).

    Returns:
        [`Compensation`], factors in float32.

    Raises:
        ValueError: If the rank is out of range or an input is not finite.
    """
    out_features, in_features = error.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank must be in 1..min(in, out) = 1..{min(out_features, in_features)}; got {rank}")
    e, w, h = error.to(torch.float64), weight.to(torch.float64), covariance.to(torch.float64)
    for name, tensor in {"weight": w, "error": e, "covariance": h}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {name} of a layer holds NaN or infinite values; the surrogate can't be solved")

    if out_features <= in_features:
        gram = e @ h @ e.T
        _, vectors = torch.linalg.eigh(gram)
        u = vectors[:, -rank:].flip(1)
    else:
        el = e @ torch.linalg.cholesky(h)
        _, vectors = torch.linalg.eigh(el.T @ el)
        u, _ = torch.linalg.qr(el @ vectors[:, -rank:].flip(1))
    u = u * torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)

    ue = u.T @ e
    taken = ((ue @ h) * ue).sum(1).clamp(min=0)  # squared singular values
    root = taken.sqrt().sqrt()
    root = torch.where(root > 0, root, 1.0)
    before = ((e @ h) * e).sum()
    scale = ((w @ h) * w).sum()
    after = (before - taken.sum()).clamp(min=0)
    return Compensation(
        a=(ue / root[:, None]).float(),
        b=(u * root).float(),
        error_before=float((before / scale).sqrt()) if scale > 0 else 0.0,
        error_after=float((after / scale).sqrt()) if scale > 0 else 0.0,
    )

"""Gradients that have to pass through half precision."""

from __future__ import annotations

import torch
from torch import Tensor


class HalfGradients:
    """Keeps gradients within half precision on their way through the model.

    Where they enter it they are scaled to at most 1, and where they leave it that is undone, both in float32.
    So what reaches the soft tokens does not depend on the size of the loss, and no scaler is needed.
    """

    factor: Tensor

    def enter(self, prefix: Tensor) -> Tensor:
        """The soft tokens on their way in."""
        if not prefix.requires_grad:
            return prefix
        prefix = prefix.view_as(prefix)
        prefix.register_hook(lambda grad: (grad.float() / self.factor.to(grad.device)).to(grad.dtype))
        return prefix

    def leave(self, logits: Tensor) -> Tensor:
        """Logits, float32, on their way out."""
        if logits.requires_grad:
            logits = logits.view_as(logits)
            logits.register_hook(self._scale)
        return logits

    def _scale(self, grad: Tensor) -> Tensor:
        largest = grad.abs().amax() if grad.numel() else grad.new_zeros(())
        usable = (largest > 0) & largest.isfinite()
        # A power of two, so that the scaling itself rounds nothing.
        self.factor = torch.exp2(-largest.where(usable, 1.0).log2().ceil())
        return grad * self.factor

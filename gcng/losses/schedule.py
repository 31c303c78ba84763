"""The two running averages that the losses depend on, (29)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FLOOR = 1e-6
WINDOW = 200
FIRST_EPOCH = 1e6


class LossAverages(nn.Module):
    """``j_avg`` and ``j_gen``: the previous epoch's means of ``max(J_m, 1e-6)`` and ``max(J_gen, 1e-6)``.

    Both are 1e6 in the first epoch, which makes kappa and gamma about 1. They are 0-dim float64 tensors on the
    module's device, part of the ``state_dict``; nothing here waits for a device but reading the float properties.

    With epochs: ``update(j_m, j_gen)`` after every step and ``end_epoch()`` after every epoch. Without (the drop-in
    ``criterion(...)``): :meth:`observe` keeps a moving average over 200 calls, set by the first one, until
    ``end_epoch`` is used.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("average", "total"):
            value = FIRST_EPOCH if name == "average" else 0.0
            self.register_buffer(name, torch.full((2,), value, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("has_epochs", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossAverages:
        # criterion.half() must not round the averages: they follow the device of the module, not its dtype.
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(device=fn(buffer.new_empty(0)).device)
        return self

    @property
    def j_avg(self) -> float:
        """Average of J_m that kappa (16) is computed from; settable."""
        return self.average[0].item()

    @j_avg.setter
    def j_avg(self, value: float) -> None:
        self.average[0] = _positive("j_avg", value)

    @property
    def j_gen(self) -> float:
        """Average of J_gen that gamma (21) is computed from; settable."""
        return self.average[1].item()

    @j_gen.setter
    def j_gen(self, value: float) -> None:
        self.average[1] = _positive("j_gen", value)

    def hardness(self, alpha: float) -> Tensor:
        """kappa (16), 0-dim."""
        return torch.exp(-alpha / self.average[0])

    def generator_share(self, beta: float) -> Tensor:
        """gamma (21), 0-dim."""
        return torch.exp(-beta / self.average[1])

    @torch.no_grad()
    def update(self, j_m: Tensor | float, j_gen: Tensor | float) -> None:
        """Count one step into the running epoch; one that is not finite counts nowhere."""
        self._count(self._pair(j_m, j_gen))

    @torch.no_grad()
    def observe(self, j_m: Tensor | float, j_gen: Tensor | float) -> None:
        """Count one step, and move the averages directly as long as no epoch was ever ended.

        A step that is not finite counts nowhere: whoever skips it in the training is not left with a NaN here.
        """
        pair = self._pair(j_m, j_gen)
        good = self._count(pair)
        moved = torch.where(self.observed == 0, pair, self.average + (pair - self.average) / WINDOW)
        self.average.copy_(torch.where(good & ~self.has_epochs, moved, self.average))
        self.observed += good

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Make the means of the epoch's steps the new averages; an epoch without steps changes nothing."""
        mean = self.total / self.count.clamp(min=1)
        self.average.copy_(torch.where(self.count > 0, mean, self.average))
        self.total.zero_()
        self.count.zero_()
        self.has_epochs.fill_(True)

    def _count(self, pair: Tensor) -> Tensor:
        """Count a step if both of its values (2,) are finite; returns whether they are, 0-dim, on the device."""
        good = pair.isfinite().all()
        self.total += torch.where(good, pair, 0.0)
        self.count += good
        return good

    def _pair(self, j_m: Tensor | float, j_gen: Tensor | float) -> Tensor:
        values = [torch.as_tensor(x).detach().to(self.total) for x in (j_m, j_gen)]
        pair = torch.stack(values)
        return torch.where(pair.isfinite(), pair.clamp(min=FLOOR), torch.nan)  # -inf is no small loss


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not 0 < value < float("inf"):
        raise ValueError(f"schedule.{name} must be positive and finite, got {value}")
    return value

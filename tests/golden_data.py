"""Reader for tests/golden: arrays stored in full, sampled or bit-packed, as tests/golden/README.md describes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
CASES = ("tiny", "odd", "wide", "first", "drop")


class Golden:
    """One golden file: inputs in a dtype, expected arrays in float64."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.name = name
        with np.load(FOLDER / f"{name}.npz") as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.dtype = dtype

    def __contains__(self, key: str) -> bool:
        return key in self.arrays or f"{key}#shape" in self.arrays

    def cfg(self, key: str):
        """A configuration scalar."""
        return self.arrays[f"cfg/{key}"].item()

    def scalar(self, key: str) -> float:
        """A 0-dim array as a float."""
        return self.arrays[key].item()

    def tensor(self, key: str) -> Tensor:
        """A stored array; floats in this reader's dtype."""
        value = torch.from_numpy(self.arrays[key])
        return value.to(self.dtype) if value.is_floating_point() else value

    def bits(self, key: str) -> Tensor:
        """A boolean array, bit-packed or not."""
        value = self.arrays[key]
        if f"{key}#shape" in self.arrays:
            shape = self.arrays[f"{key}#shape"]
            value = np.unpackbits(value)[: int(np.prod(shape))].reshape(shape).astype(bool)
        return torch.from_numpy(value)

    def parameters(self, prefix: str = "p") -> dict[str, Tensor]:
        """The parameters by name, as leaves that require gradients."""
        return {
            key[len(prefix) + 1 :]: self.tensor(key).clone().requires_grad_()
            for key in self.arrays
            if key.startswith(prefix + "/")
        }

    def gradients(self, prefix: str) -> list[str]:
        """Names of the parameters that have a stored gradient under ``prefix``."""
        start = f"{prefix}/p/"
        return sorted({key[len(start) :].split("#")[0] for key in self.arrays if key.startswith(start)})

    def error(self, key: str, ours: Tensor) -> float:
        """Largest absolute difference to the stored array, relative to the array's maximum.

        A sampled array is compared row by row and through its stored sums; the last number of ``#stat`` weighs the
        elements by numbers that are not recorded.
        """
        ours = ours.detach().to(torch.float64).numpy()
        if key in self.arrays:
            truth = self.arrays[key]
            assert ours.size == truth.size, (key, ours.shape, truth.shape)
            return float(np.abs(ours.reshape(truth.shape) - truth).max() / max(np.abs(truth).max(), 1e-300))
        rows, truth = self.arrays[f"{key}#rows"], self.arrays[f"{key}#val"]
        assert ours.size == np.prod(self.arrays[f"{key}#shape"]), (key, ours.shape)
        flat = ours.reshape(-1, truth.shape[-1])
        scale = max(np.abs(truth).max(), 1e-300)
        total, total_abs, total_sq = self.arrays[f"{key}#stat"][:3]
        errors = [
            np.abs(flat[rows] - truth).max() / scale,
            abs(ours.sum() - total) / max(total_abs, 1e-300),
            abs(np.abs(ours).sum() - total_abs) / max(total_abs, 1e-300),
            abs(np.square(ours).sum() - total_sq) / max(total_sq, 1e-300),
        ]
        return float(max(errors))


@cache
def load(name: str, dtype: torch.dtype = torch.float64) -> Golden:
    """Read a golden file once for each dtype."""
    return Golden(name, dtype)

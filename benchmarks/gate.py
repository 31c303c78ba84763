"""The closeness gate before any timing: losses and gradients of every provider against one float64 truth.

Owns which provider is the truth and which is the baseline; the rules are those of `tests/closeness.py`.
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from benchmarks.iteration import Outcome, make_batch, make_provider, run_iteration
from benchmarks.settings import Setting
from tests.closeness import assert_close_to_truth

# A whole iteration in float32 may be off by this much (relative L2) whatever the baseline does. The cap of a
# single op does not fit: batch normalization takes away most of what the shift of the last edge norm does,
# and the dense formulation itself has 2e-4 in that gradient. The rules relative to the baseline are those of
# the tests, but wider: an iteration has a hundred arrays, and each rule of each array can fail by luck.
ITERATION_CAP = 1e-3
FACTOR, ROW_FACTOR = 4.0, 6.0


def float64_truth(setting: Setting, provider: str) -> Outcome:
    """Losses and gradients in float64; of "published" where that fits, since the golden data prove it."""
    outcome = run_iteration(
        make_provider(provider, setting, torch.float64),
        make_batch(setting, torch.float64),
        keep_gradients=True,
    )
    gc.collect()
    return outcome


def assert_providers_close(outcomes: dict[str, Outcome], truth: Outcome) -> dict[str, float]:
    """Fails unless every loss and gradient of every provider is close; returns the worst relative L2 of each.

    Args:
        outcomes: float32 outcomes by provider. The first one is the baseline of the others, and is itself
            held to the cap: it is about as accurate as plain torch because it is plain torch.
        truth: the float64 outcome of the same setting.
    """
    wanted = _arrays(truth)
    arrays = {name: _arrays(outcome) for name, outcome in outcomes.items()}
    baseline = next(iter(arrays.values()))
    worst = {}
    for name, ours in arrays.items():
        missing = wanted.keys() - ours.keys()
        if missing:
            raise AssertionError(f"provider {name} has no {sorted(missing)}, which the truth has")
        readings = [
            assert_close_to_truth(
                f"{name} {key}", ours[key], value, baseline[key],
                op_caps={torch.float32: ITERATION_CAP}, factor=FACTOR, row_factor=ROW_FACTOR,
            ).reading("hard cap")
            for key, value in wanted.items()
        ]  # fmt: skip
        worst[name] = max(readings)
    return worst


def _arrays(outcome: Outcome) -> dict[str, Tensor]:
    """What is compared: the spread in place of J_div, near 0 by cancellation; no gradient that is 0."""
    arrays = {f"loss {name}": loss for name, loss in outcome.losses.items() if name != "diversity"}
    arrays["loss spread"] = 1 - outcome.losses["diversity"] / 0.01
    for name, gradient in outcome.gradients.items():
        # Mathematically zero in both phases: the key bias shifts both logits alike.
        if not ("/edge" in name and name.endswith(".k.b")):
            arrays[f"gradient {name}"] = gradient
    return arrays

"""Error against float64 of every op in every precision, beside the error of the dense definition in that precision.

In float64 the definition is the truth itself: its error there is 0, and gcng's is the difference of the two.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks import operations
from benchmarks.operations import Operation, Unavailable
from benchmarks.plan import OURS
from benchmarks.results import open_results
from benchmarks.settings import Setting
from tests.closeness import relative_error

PRECISIONS = {
    "cpu": ("float64", "float32", "bfloat16", "float16", "autocast"),
    "cuda": ("float64", "float32", "tf32", "bfloat16", "float16", "autocast"),
}
SETTING, GPU_SETTING = Setting(1, 128, 80), Setting(1, 512, 256)


def errors_of(operation: Operation, setting: Setting, precision: str, device: str) -> dict[str, dict[str, float]]:
    """Relative L2 error of each array by provider: the definition and gcng's, against one float64 truth."""
    truth = operation.prepare("reference", setting, "float64", device, rounded_to=precision).arrays()
    found = {}
    for provider in ("reference", *OURS):
        try:
            arrays = operation.prepare(provider, setting, precision, device).arrays()
        except (Unavailable, RuntimeError, NotImplementedError) as reason:
            # A product that torch lacks in this dtype on this device, in the definition.
            if provider != "reference" and not isinstance(reason, Unavailable):
                raise
            continue
        found[provider] = {
            name: relative_error(arrays[name], x.double()) for name, x in truth.items() if bool((x != 0).any())
        }
    return found


def entry(operation: Operation, setting: Setting, precision: str, device: str) -> dict:
    """One row: the worst array of gcng, its error, and that of the definition in the same and in its worst array."""
    found = errors_of(operation, setting, precision, device)
    row = {"operation": operation.name, "setting": setting.name, "precision": precision, "providers": {}}
    for provider, errors in found.items():
        worst = max(errors, key=errors.get)
        row["providers"][provider] = {"worst": errors[worst], "array": worst, "errors": errors}
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measures the errors into a results file."""
    options, results = open_results(arguments, __doc__, "accuracy")
    kind = torch.device(options.device).type
    found = results.of_this_source("accuracy")
    done = {(one["operation"], one["setting"]) for one in found}
    for name in operations.OPERATIONS:
        operation = operations.load(name)
        setting = operation.tiny if options.smoke else GPU_SETTING if kind == "cuda" else SETTING
        if (name, setting.name) in done:
            continue
        if time.time() > options.deadline:
            return 0  # not finished: the next run goes on
        for precision in PRECISIONS[kind][: 2 if options.smoke else None]:
            found.append(entry(operation, setting, precision, options.device))
        results.replace("accuracy", found)
    results.finish("accuracy")
    return 0


if __name__ == "__main__":
    sys.exit(main())

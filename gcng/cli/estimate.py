"""``gcng estimate``."""

from __future__ import annotations

import argparse
from typing import Any

from gcng.cli.output import print_result
from gcng.memory import estimate_memory, format_bytes
from gcng.training.config import Config
from gcng.training.config_io import load_config
from gcng.training.errors import EXIT_DONE, ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Print the predicted peak memory of the loss and its terms."""
    settings = sizes(arguments)
    estimate = estimate_memory(**settings)
    if arguments.json:
        print_result({**settings, "peak_bytes": estimate.peak_bytes, "terms": estimate.terms}, as_json=True)
        return EXIT_DONE
    print_result({**settings, "peak": format_bytes(estimate.peak_bytes)}, as_json=False)
    print()
    print_result({name: format_bytes(size) for name, size in estimate.terms.items()}, as_json=False)
    return EXIT_DONE


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``gcng.estimate_memory``: what is given, else what the configuration says."""
    config: Config | None = None
    if arguments.config is not None or arguments.recipe is not None:
        config = load_config(arguments.config, recipe=arguments.recipe)
    found = {
        "num_samples": arguments.samples,
        "embedding_size": arguments.embedding_size,
        "num_layers": arguments.layers,
        "num_classes": arguments.classes,
        "samples_per_class": arguments.samples_per_class,
        "memory_budget": arguments.budget,
        "dtype": arguments.dtype,
        "device": arguments.device,
    }
    if config is not None:
        batch = config.data.num_classes_per_batch * config.data.samples_per_class
        defaults = {
            "num_samples": batch,
            "embedding_size": config.model.embedding_size,
            "num_layers": config.loss.num_layers,
            "samples_per_class": config.data.samples_per_class,
            "memory_budget": config.loss.memory_budget or None,
        }
        found |= {name: value for name, value in defaults.items() if found[name] is None}
    for name, flag in (("num_samples", "--samples"), ("embedding_size", "--embedding-size")):
        if found[name] is None:
            raise ConfigError(f"{flag} is missing; give it, or --config or --recipe")
    return {name: value for name, value in found.items() if value is not None}

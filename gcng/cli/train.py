"""``gcng train``."""

from __future__ import annotations

import argparse
import dataclasses

from gcng.cli.output import note, print_result
from gcng.cli.settings import all_overrides
from gcng.training.config_io import as_nested, load_config, to_toml
from gcng.training.errors import EXIT_DONE, ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Check the configuration, then train, or run one step of everything."""
    if arguments.config is None and str(arguments.resume).endswith(".toml"):
        raise ConfigError(
            f"--resume came before CONFIG and took it for a checkpoint; write gcng train {arguments.resume} --resume"
        )
    config = load_config(arguments.config, recipe=arguments.recipe, overrides=all_overrides(arguments))
    if arguments.show_config:
        if arguments.json:
            print_result(as_nested(config), as_json=True)
        else:
            print(to_toml(as_nested(config)), end="")
        return EXIT_DONE
    from gcng.training.runs import dry_run, fit

    if arguments.dry_run:
        print_result(dry_run(config), as_json=arguments.json)
        note("gcng train: the dry run is done; nothing was written")
        return EXIT_DONE
    result = fit(config, resume=arguments.resume)
    print_result(dataclasses.asdict(result), as_json=arguments.json)
    return EXIT_DONE

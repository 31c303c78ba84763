"""``gcng build``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from gcng import build, libraries
from gcng.cli.output import note, print_result
from gcng.training.errors import EXIT_CONFIG, EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Compile the kernels and say where they lie."""
    start, target = time.monotonic(), writable_folder()
    note(f"gcng build: compiling into {target}")
    try:
        made = build.build_cpu(target, timeout=arguments.timeout)
        if arguments.cuda:
            made += build.build_cuda(target, timeout=arguments.timeout)
    except build.BuildError as error:
        note(f"gcng build: {error}")
        return EXIT_CONFIG
    result = {"seconds": round(time.monotonic() - start, 1), "libraries": [str(path) for path in made]}
    print_result(result, as_json=arguments.json)
    return EXIT_DONE


def writable_folder() -> Path:
    """The package's folder of libraries, or the user's where the package cannot be written."""
    package = libraries.package_folder()
    existing = package if package.is_dir() else package.parent
    return package if os.access(existing, os.W_OK) else libraries.user_folder()

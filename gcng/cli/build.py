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
    made, failed = [], False
    for make in (build.build_cpu, *([build.build_cuda] if arguments.cuda else [])):
        try:
            made += make(target, timeout=arguments.timeout)
        except build.BuildError as error:  # each library is of use without the other
            note(f"gcng build: {error}")
            failed = True
    if made:
        result = {"seconds": round(time.monotonic() - start, 1), "libraries": [str(path) for path in made]}
        print_result(result, as_json=arguments.json)
    return EXIT_CONFIG if failed else EXIT_DONE


def writable_folder() -> Path:
    """The package's folder of libraries, or the user's where the package cannot be written."""
    package = libraries.package_folder()
    existing = package if package.is_dir() else package.parent
    return package if os.access(existing, os.W_OK) else libraries.user_folder()

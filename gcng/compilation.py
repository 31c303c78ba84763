"""Runs compilers: objects that are compiled again only where something changed, several at once, and libraries of them.

Ninja runs them where it is installed, threads run what it leaves. Both run the same commands, and only the threads
report an error, so that nothing else depends on which of the two it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gcng import libraries


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says why."""


class Job(NamedTuple):
    """An object, and the compiler with its options that makes it of one source."""

    command: list[str]
    source: Path
    target: Path

    def line(self) -> str:
        """What the object depends on, beside files."""
        return shlex.join([*self.command, str(self.source)])

    def compilation(self, output: Path) -> list[str]:
        """The whole command."""
        depends = str(self.target.with_suffix(".d"))
        return [*self.command, "-MMD", "-MF", depends, "-c", str(self.source), "-o", str(output)]

    def part(self, state: str) -> Path:
        """Where this process keeps an object that has not got its name yet; a later build deletes what is left."""
        return self.target.with_name(f"{self.target.name}.{os.getpid()}.{state}.part")


def run_compiler(command: Sequence[str]) -> None:
    """Run one command; BuildError with all that it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}".strip())


def _up_to_date(job: Job) -> bool:
    """Whether an object was made by this command after every file that it was made from was written."""
    try:
        if job.target.with_suffix(".cmd").read_text(encoding="utf-8") != job.line():
            return False
        started = job.target.stat().st_mtime_ns
        text = job.target.with_suffix(".d").read_text(encoding="utf-8")
        names = text.replace("\\\n", " ").split(": ", 1)[1].split()
        return all(os.stat(name).st_mtime_ns < started for name in names)
    except (OSError, IndexError):
        return False


def _keep(job: Job, part: Path, started: int) -> None:
    """An object takes its name when it is whole, dated by the start of its compilation."""
    os.utime(part, ns=(started, started))
    os.replace(part, job.target)
    job.target.with_suffix(".cmd").write_text(job.line(), encoding="utf-8")


def compile_object(command: list[str], source: Path, target: Path) -> Path:
    """One object, from the cache where nothing changed."""
    job = Job(command, source, target)
    if not _up_to_date(job):
        started, part = time.time_ns(), job.part("new")
        target.with_suffix(".cmd").unlink(missing_ok=True)
        run_compiler(job.compilation(part))
        _keep(job, part, started)
    return target


def ninja() -> str | None:
    """The ninja of this Python's environment, or the one on the path."""
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")


def _compile_with_ninja(program: str, jobs: Sequence[Job], count: int) -> None:
    """Compile until an error, and keep what was finished. If this process dies, so does ninja when it reports next."""
    lines, started = ["rule compile", "  command = $line"], time.time_ns()
    for job in jobs:
        job.target.with_suffix(".cmd").unlink(missing_ok=True)
        part, whole = job.part("new"), job.part("whole")
        line = f"{shlex.join(job.compilation(part))} && {shlex.join(['mv', str(part), str(whole)])}"
        named = re.sub("([$ :])", r"$\1", str(whole))
        lines += [f"build {named}: compile", f"  line = {line.replace('$', '$$')}"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "build.ninja")
            file.write_text("\n".join([f"builddir = {folder}", *lines, ""]), encoding="utf-8")
            subprocess.run([program, "-f", str(file), "-j", str(count)], capture_output=True, check=False)
    finally:  # an interrupted build goes on from there
        for job in jobs:
            if job.part("whole").is_file():
                _keep(job, job.part("whole"), started)


def compile_objects(jobs: Sequence[Job], count: int) -> None:
    """Bring objects up to date with ``count`` compilers at once; BuildError with all that the first failure said."""
    changed = [job for job in jobs if not _up_to_date(job)]
    if changed and (program := ninja()):
        with contextlib.suppress(OSError):  # it cannot be started: as if it were not there
            _compile_with_ninja(program, changed, count)
    with ThreadPoolExecutor(count) as workers:
        for _ in workers.map(lambda job: compile_object(*job), changed):
            pass


def link(command: list[str], target: Path) -> Path:
    """A library takes its name in one step: a build that is killed leaves the old one, or none."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        run_compiler([*command, "-o", str(part)])
        libraries.read_build_info(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target

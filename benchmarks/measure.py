"""The measurement: part by part into one results file, the most valuable part first, going on where it stopped.

    python -m benchmarks.measure                            # what is missing in benchmarks/results/<machine>.json
    python -m benchmarks.measure --minutes 25               # start nothing new after 25 minutes
    python -m benchmarks.measure --parts first stages       # some parts; or a row, by the start of its name
    python -m benchmarks.measure --parts iteration/N160-D512 --force
    python -m benchmarks.measure --list
    python -m benchmarks.measure --smoke --json smoke.json

Rows are written one by one, each after its timings; what the file holds is skipped unless --force is given.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import machine, plan
from benchmarks.operations import OPERATIONS
from benchmarks.plan import Entry
from benchmarks.results import FOLDER, LISTS, TRUTH, Results

# Modules that measure a key of the results file of their name, and the part that they come after.
MODULES = {
    "cpu": {"stages": "first", "accuracy": "classes", "overhead": "classes"},
    "gpu": {"bandwidth": "targets", "stages": "targets", "overhead": "targets", "accuracy": "ops", "sweeps": "ops"},
    "smoke": {"stages": "smoke", "accuracy": "smoke", "overhead": "smoke"},
}
ALL_MODULES = {"rates"}.union(*MODULES.values())
# Rows that `gcng bench OP` measures: the first ones of the plan that take seconds, on a CPU and on a GPU.
USER_ROWS, USER_SAMPLES = 3, (160, 4096)


def parts_of(options: argparse.Namespace) -> dict[str, list[Entry]]:
    """All parts in order; those that are modules have no entries."""
    name = options.plan or ("gpu" if options.device.startswith("cuda") else "cpu")
    if options.smoke and not options.plan:
        name, rows = "smoke", plan.smoke_plan()
    else:
        rows = plan.gpu_plan() if name == "gpu" else plan.cpu_plan()
        rows = plan.shrunk(rows) if options.smoke else rows
    modules = MODULES[name]
    ordered: dict[str, list[Entry]] = {"rates": []}
    for part, entries in rows.items():
        ordered[part] = entries
        ordered |= {module: [] for module, after in modules.items() if after == part}
    return ordered


def chosen(parts: dict[str, list[Entry]], names: list[str] | None) -> dict[str, list[Entry]]:
    """The parts, or the rows, that names say; ValueError for a name that is neither."""
    if not names:
        return parts
    found: dict[str, list[Entry]] = {}
    for name in names:
        if name in parts:
            found[name] = parts[name]
            continue
        rows = [entry for entries in parts.values() for entry in entries if entry.name.startswith(name)]
        if not rows:
            raise ValueError(f"--parts {name}: neither a part ({', '.join(parts)}) nor the start of a row's name")
        found[name] = rows
    return found


def unfinished(entries: list[Entry], results: Results, force: bool) -> list[Entry]:
    """Entries whose row is missing or not complete."""
    if force:
        return entries
    done = {row["name"] for row in results.data["rows"] if row["complete"]}
    return [entry for entry in entries if entry.name not in done]


class Run:
    """One run of the command: its options, its file and the time that it has."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self.options, self.path = options, path
        self.deadline = time.time() + 60 * options.minutes if options.minutes else float("inf")
        self.failures: list[str] = []

    def part(self, name: str, entries: list[Entry]) -> None:
        """Measure what is missing of a part."""
        check_source(self.options)
        results = Results.open(self.path, self.options.device)
        if name in ALL_MODULES:
            if self.options.force and name in LISTS:
                results.data[name] = []  # a module goes on with what it finds of this source
                results.save()
            if self.options.force or not results.is_finished(name):
                self._module(f"benchmarks.{name}")
                if not Results.open(self.path, self.options.device).is_finished(name):
                    say(f"{name}: not finished, the next run goes on")
            return
        wanted = unfinished(entries, results, self.options.force)
        if self.options.force:
            results.data["rows"] = [r for r in results.data["rows"] if r["name"] not in {e.name for e in wanted}]
            results.save()
        self._rows(wanted)

    def _rows(self, entries: list[Entry]) -> None:
        """One process for all rows; another one for the rest where it was killed."""
        while entries and time.time() < self.deadline:
            say(f"{entries[0].name} and {len(entries) - 1} more")
            code, output = self._pytest(entries)
            results = Results.open(self.path, self.options.device)
            if code in (0, 1):
                if code:
                    self.failures.append(output[-4000:])
                return
            running = next((row for row in results.data["rows"] if row.get("running") and not row["complete"]), None)
            if running is None:
                raise RuntimeError(f"timing ended with exit code {code}:\n{output[-4000:]}")
            blame(running, code)
            results.save()
            entries = unfinished(entries, results, force=False)

    def _pytest(self, entries: list[Entry]) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            file.write_text(json.dumps(plan.dump(entries)))
            operations = dict.fromkeys(entry.operation for entry in entries)
            files = [str(FOLDER.parent / f"bench_{name}.py") for name in operations]
            command = [
                *(sys.executable, "-m", "pytest", *files, "-q"),
                *("-p", "no:cacheprovider", "--tb=short", "--benchmark-columns=median", "--benchmark-sort=name"),
                *("-o", "timeout=0", "--plan", str(file), "--results", str(self.path), "--on", self.options.device),
                *("--threads", str(self.options.threads), "--deadline", str(self.deadline)),
                *("--truth-flops", str(1e13 if self.options.device.startswith("cuda") else 5e12)),
            ]
            if self.options.smoke and self.options.plan:
                command.append("--no-memory")  # a rehearsal of a GPU, where memory needs no processes of its own
            done = ended_together(command)
            return done.returncode, done.stdout + done.stderr

    def _module(self, module: str) -> None:
        """Rates and lists: one process each."""
        if time.time() > self.deadline:
            return
        say(module.removeprefix("benchmarks."))
        command = [sys.executable, "-m", module, "--results", str(self.path), "--device", self.options.device]
        command += ["--threads", str(self.options.threads), "--deadline", str(self.deadline)]
        command += ["--smoke"] if self.options.smoke else []
        done = ended_together(command)
        if done.returncode:
            self.failures.append(f"{' '.join(command[1:])}:\n{(done.stdout + done.stderr)[-4000:]}")


def ended_together(command: list[str]) -> subprocess.CompletedProcess:
    """Run a process that ends when this one is ended by `timeout` or `kill`.

    It would otherwise go on, disturb the next run, and at last write the results as they were when it began. The
    handler stays for as long as the process only: what is forked later would inherit it, and a fork that waits inside
    C, as a worker of a pool does, never comes to run it, so that nothing short of SIGKILL ends it.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()  # where a handler can be set
    if on_main_thread:
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                done = subprocess.run(
                    command, cwd=machine.ROOT, stdout=said, stderr=subprocess.STDOUT, text=True, check=False
                )
            except SystemExit:
                said.seek(0)
                print(f"ended; it had said:\n{said.read()[-4000:]}", file=sys.stderr, flush=True)
                raise
            said.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, said.read(), "")
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: set by something other than Python


def check_source(options: argparse.Namespace) -> None:
    """ValueError where rows would come from a source that no commit holds: nobody could check them out."""
    changed = [] if options.smoke or options.allow_modified else machine.changed_files()
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ValueError(f"the source differs from its commit in {shown}; commit first, or give --allow-modified")


def blame(row: dict, code: int) -> None:
    """Write down the provider that was running when the process was killed; or that the row has no truth."""
    name = row.pop("running")
    words = f"the process was killed (exit code {code})"
    if name == TRUTH:  # without it there is nothing to hold a provider to
        for one in row["providers"].values():
            one |= {"status": "unavailable", "reason": f"no truth: {words}"}
        row["complete"] = True
        return
    row["providers"][name] = row["providers"].get(name, {}) | {"status": "killed", "reason": words}


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def results_path(options: argparse.Namespace) -> Path:
    """Where to write: --json, or the file of this machine."""
    return (options.json or FOLDER / machine.file_name(machine.machine(options.device))).absolute()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, shared with ``gcng bench``."""
    parser.add_argument("--parts", nargs="+", metavar="PART", help="parts, or starts of rows' names; see --list")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    parser.add_argument("--force", action="store_true", help="measure again what the file already holds")
    parser.add_argument(
        "--list", action="store_true", help="print parts and rows, and whether they are done; measure nothing"
    )
    parser.add_argument(
        "--allow-modified", action="store_true", help="measure a source with uncommitted changes; its rows will say so"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round: does everything run?")
    parser.add_argument("--plan", choices=("cpu", "gpu"), help="whose parts and rows; default: by the device")
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device; default cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default 2")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results file; default benchmarks/results/<machine>.json"
    )


def listing(parts: dict[str, list[Entry]], results: Results) -> Iterator[str]:
    """Lines of --list."""
    done = {row["name"] for row in results.data["rows"] if row["complete"]}
    for name, entries in parts.items():
        if name in ALL_MODULES:
            yield f"{name}: {'done' if results.is_finished(name) else 'missing'}"
        for entry in entries:
            yield f"{name}: {entry.name}: {'done' if entry.name in done else 'missing'}"


def options_for(op: str | None, path: Path, **given: object) -> argparse.Namespace:
    """Options for one op at the settings of the parts "smoke" or "ops", or for everything.

    Raises:
        ValueError: an unknown op.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([])
    for name, value in {**given, "json": path}.items():
        setattr(options, name, value)
    if op is not None:
        rows = [entry for entries in parts_of(options).values() for entry in entries if entry.operation == op]
        if not rows:
            raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPERATIONS)}")
        first = [entry for entry in rows if entry.setting.samples <= USER_SAMPLES[options.device.startswith("cuda")]]
        options.parts = ["rates", *(entry.name for entry in first[:USER_ROWS])]
    return options


def measure(options: argparse.Namespace, announce: Callable[[object], None] = print) -> int:
    """Measure what is missing; returns 1 where something failed."""
    path = results_path(options)
    results = Results.open(path, options.device)
    parts = chosen(parts_of(options), options.parts)
    if options.list:
        print("\n".join(listing(parts, results)))
        return 0
    check_source(options)
    load = machine.load_average()
    if load > machine.BUSY:
        say(f"warning: the load average is {load:.1f}; times of a busy machine say little about the providers")
    results.data["protocol"] |= {"threads": options.threads, "device": options.device}
    results.data["versions"] = machine.versions()
    results.save()
    run = Run(options, path)
    for name, entries in parts.items():
        run.part(name, entries)
    announce(path)
    for failure in run.failures:
        say(f"failed and is not measured:\n{failure}")
    return 1 if run.failures else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 if something failed, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return measure(options)
    except ValueError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())

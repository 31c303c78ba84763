"""What the programs that the GPU suite runs have said, as entries of `checks` in a results file.

    python -m benchmarks.verdicts record PART CODE LOG --results FILE      # exit code and log of a program
    python -m benchmarks.verdicts join PART --results FILE                 # one entry of those named PART-...

An entry is passed, failed, or not run with the reason. Without torch, which takes seconds to load where a whole suite
has minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from benchmarks import machine

OUT_OF_TIME = (124, 137)  # of timeout, by the first signal and by the last
WORST = ("failed", "not run", "passed")
NOT_RUN = ("Device not supported", "command not found", "failed to run command")
CLEAN = (r"ERROR SUMMARY: 0 errors", r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)")


def judged(part: str, code: int, log: str) -> dict:
    """What a program's exit code and log mean."""
    for reason in NOT_RUN:
        if reason in log and not re.search(r"\d+ passed", log):
            return {"status": "not run", "details": reason}
    if code in OUT_OF_TIME:
        words = "ran out of the time that the suite gives it"
        if not part.startswith(("tests", "long")):
            return {"status": "not run", "details": words}
        marks = "".join(re.findall(r"^([.sxXFE]+)(?: +\[ *\d+%\])?$", log, re.MULTILINE))
        wrong, right = marks.count("F") + marks.count("E"), marks.count(".")
        words = f"{wrong} failed, {right} passed, then {words}"
        return {"status": "failed" if wrong else "not run", "details": words}
    if part.startswith("sanitizer"):
        clean = any(re.search(pattern, log) for pattern in CLEAN)
        lines = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
        status = "passed" if clean and code == 0 else "failed"
        return {"status": status, "details": "; ".join(lines) or f"exit code {code}, no summary"}
    counted = re.findall(r"^=* ?(.*(?:passed|failed|skipped|error).*? in [0-9.]+s.*?) ?=*$", log, re.MULTILINE)
    words = counted[-1] if counted else (log.strip().splitlines() or ["no output"])[-1]
    if lost := re.search(r"^.*the GPU is lost.*$", log, re.MULTILINE):
        return {"status": "failed", "details": f"{lost[0].strip()[:300]}; {words}"}
    if code == 0 and re.search(r"\d+ skipped", words) and "passed" not in words:
        return {"status": "not run", "details": words}
    return {"status": "passed" if code == 0 else "failed", "details": words}


def joined(data: dict, part: str) -> dict:
    """The entries whose names begin with a part's as one: the worst status, and what each says."""
    entries = [one for one in data["checks"] if one["part"].startswith(f"{part}-")]
    if not entries:
        return {"status": "not run", "details": "nothing of it was run"}
    words = [f"{one['part'].removeprefix(f'{part}-')}: {one['status']}, {one['details']}" for one in entries]
    return {"status": min((one["status"] for one in entries), key=WORST.index), "details": "; ".join(words)}


def store(data: dict, part: str, entry: dict) -> None:
    """Replace the entry of a part."""
    others = [one for one in data["checks"] if one["part"] != part]
    data["checks"] = [*others, {"part": part, **entry, **machine.revision()}]


def write(path: Path, data: dict) -> None:
    """Write beside the file, then rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path, device: str) -> dict:
    """The results file; a new one for this machine where there is none, which takes torch."""
    if not path.exists():
        from benchmarks.results import Results

        Results.open(path, device).save()
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    actions = parser.add_subparsers(dest="action", required=True)
    record = actions.add_parser("record")
    record.add_argument("part")
    record.add_argument("code", type=int)
    record.add_argument("log", type=Path)
    actions.add_parser("join").add_argument("part")
    options = parser.parse_args(arguments)
    data = read(options.results, options.device)
    if options.action == "join":
        entry = joined(data, options.part)
    else:
        entry = judged(options.part, options.code, options.log.read_text(encoding="utf-8", errors="replace"))
    store(data, options.part, entry)
    write(options.results, data)
    print(f"{options.part}: {entry['status']}: {entry['details']}")
    return 1 if entry["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())

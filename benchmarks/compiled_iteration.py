"""An iteration whose losses go through torch.compile, in a process of its own that ends where that takes too long.

To the compiler the ops of gcng are opaque: it traces what lies between them, label checks, schedules, small modules.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import torch

from benchmarks.iteration import Provider, make_batch, make_provider, run_iteration
from benchmarks.machine import ROOT
from benchmarks.memory import one_line
from benchmarks.settings import Setting

COMPILE_SECONDS = 60
OTHER_SECONDS = 60  # for imports, warm-up and the timed calls
LOSSES = ("metric_terms", "classifier_loss", "generator_terms")


def compile_in_process() -> None:
    """Let the compiler start no worker processes, which would outlive what is measured."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def compile_losses(provider: Provider) -> None:
    """What a training step calls of the criterion, through torch.compile."""
    for name in LOSSES:
        setattr(provider.criterion, name, torch.compile(getattr(provider.criterion, name), dynamic=False))


def measured_beside(setting: Setting, device: torch.device, calls: int, limit: int) -> dict:
    """Seconds of a call, as `overhead.seconds_of` gives them, from a process of its own; or the reason why not."""
    given = {"setting": setting.as_dict(), "device": str(device), "threads": torch.get_num_threads()}
    given |= {"calls": calls, "limit": limit}
    command = [sys.executable, "-m", "benchmarks.compiled_iteration", json.dumps(given)]
    # A session of its own, so that a compiler that it runs can be ended with it.
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            output, errors = child.communicate(timeout=limit + OTHER_SECONDS)
        except subprocess.TimeoutExpired:
            return {"reason": f"no end after {limit + OTHER_SECONDS} s"}
        finally:
            _end_session(child)
    if child.returncode == -signal.SIGALRM:
        return {"reason": f"not compiled after {limit} s"}
    if child.returncode:
        return {"reason": (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
    return json.loads(output.splitlines()[-1])


def _end_session(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(child.pid, signal.SIGKILL)


def main(given: dict) -> dict:
    """What the process measures; SIGALRM ends it at the limit, also where nobody waits for it any more."""
    from benchmarks.overhead import seconds_of

    signal.alarm(given["limit"] + OTHER_SECONDS)
    torch.set_num_threads(given["threads"])
    compile_in_process()
    setting, device = Setting(**given["setting"]), torch.device(given["device"])
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    provider, batch = make_provider("gcng", setting, precision, device), make_batch(setting, precision, device)
    plain = run_iteration(provider, batch).losses
    compile_losses(provider)
    signal.alarm(given["limit"])
    try:
        compiled = run_iteration(provider, batch).losses
        run_iteration(provider, batch)  # what is found to differ in the second call is compiled again
    except Exception as error:
        return {"reason": one_line(error)}
    finally:
        signal.alarm(OTHER_SECONDS)
    for name, loss in plain.items():
        torch.testing.assert_close(compiled[name], loss, rtol=1e-2, atol=1e-4)
    return seconds_of(lambda: run_iteration(provider, batch), device, given["calls"], 3)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

"""The log survives kills and full disks, the progress bar keeps off what is no terminal."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gcng.training.config_io import load_config
from gcng.training.errors import ConfigError
from gcng.training.records import ProgressBar, RecordLog, RunReport, read_records
from gcng.training.signals import StopOnSignal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_records_are_there_before_the_log_is_closed(tmp_path):
    log = RecordLog(tmp_path / "new" / "log.jsonl")
    log.write("step", 3, loss=1.5, labels=[1, 2])
    log.write("epoch", 4, mean=math.nan, deep={"a": [math.inf]})
    first, second = read_records(log.path)
    assert (first["kind"], first["step"], first["loss"], first["labels"]) == ("step", 3, 1.5, [1, 2])
    assert second["mean"] is None and second["deep"] == {"a": [None]}
    log.close()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_cut_last_line_costs_one_record_and_no_later_one(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    log = RecordLog(path)
    for step in range(3):
        log.write("step", step)
    log.close()
    path.write_bytes(path.read_bytes()[:-cut])
    # A line without its newline is still whole.
    whole = [0, 1, 2] if cut == 1 else [0, 1]
    assert [record["step"] for record in read_records(path)] == whole
    log = RecordLog(path)
    log.write("step", 7)
    log.close()
    assert [record["step"] for record in read_records(path)] == [*whole, 7]


def test_steps_that_a_resume_did_again_are_read_once(tmp_path):
    log = RecordLog(tmp_path / "log.jsonl")
    runs = ((0, (1, 2, 3, 4)), (2, (3, 4, 5)), (5, (6,)), (4, (5, 6, 7)))  # saved step, steps until the kill
    for attempt, (saved, steps) in enumerate(runs):
        log.write("start", saved)
        for step in steps:
            log.write("step", step, attempt=attempt)
    log.close()
    read = [(record["step"], record["attempt"]) for record in read_records(log.path) if record["kind"] == "step"]
    assert read == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 3), (6, 3), (7, 3)]


def test_log_on_a_full_disk_warns_once_and_goes_on(tmp_path, capsys):
    log = RecordLog(tmp_path / "log.jsonl")
    log._file.close()
    log._file = open("/dev/full", "a")  # noqa: SIM115
    for step in range(3):
        log.write("step", step)
    log.close()
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_bar_is_drawn_on_a_terminal_only():
    quiet, terminal = io.StringIO(), Terminal()
    for stream in (quiet, terminal):
        bar = ProgressBar("auto", stream)
        bar.update("epoch 1/2", 3, 10, {"loss": 1.23456})
        bar.message("a message")
        bar.clear()
    assert quiet.getvalue() == "a message\n"
    shown = terminal.getvalue()
    assert "epoch 1/2 [######..............] 3/10" in shown and "loss 1.235" in shown
    assert shown.endswith("a message\n")
    assert ProgressBar("on", quiet).enabled and not ProgressBar("off", terminal).enabled


def test_bar_does_not_read_numbers_that_it_does_not_draw():
    class Costly:
        def __float__(self):
            raise AssertionError("read from the device")

    ProgressBar("off", Terminal()).update("x", 1, 2, {"loss": Costly()})


def test_output_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.output: .*file/run cannot be written"):
        RunReport(load_config(overrides=[f"run.output={tmp_path}/file/run"]))


def test_missing_tensorboard_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = load_config(overrides=[f"run.output={tmp_path}", "logging.tensorboard=true"])
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunReport(settings)


def test_tensorboard_gets_the_numbers_of_every_record(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    report = RunReport(load_config(overrides=[f"run.output={tmp_path}", "logging.tensorboard=true"]))
    report.event("epoch", 7, n_pair=0.5, text="not a number")
    report.close()
    assert written == [str(tmp_path / "tensorboard"), ("epoch/n_pair", 0.5, 7), "closed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_second_signal_leaves_at_once():
    code = (
        "import os, signal, time\n"
        "from gcng.training.signals import StopOnSignal\n"
        "with StopOnSignal():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "first\n")


def test_the_exit_does_not_wait_for_loader_processes_that_somebody_still_holds():
    code = (
        "import builtins, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from gcng.training.signals import children_spared\n"
        "with children_spared():\n"
        "    batches = iter(DataLoader(TensorDataset(torch.zeros(1000, 3)), batch_size=2, num_workers=2))\n"
        "next(batches)\n"
        "builtins.held = batches\n"  # as the traceback of an exception would
        "print(*(worker.pid for worker in batches._workers), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    workers = done.stdout.split()
    assert done.returncode == 0 and len(workers) == 2 and not done.stderr, done.stderr
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def test_log_is_one_json_object_a_line(tmp_path):
    report = RunReport(load_config(overrides=[f"run.output={tmp_path}"]), stream=io.StringIO())
    report.event("start", 0, text="line\nbreak")
    report.warning(1, "careful")
    report.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["start", "warning"]

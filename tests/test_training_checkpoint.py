"""Checkpoint files: nothing damaged is loaded, nothing good is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from contextlib import contextmanager

import pytest
import torch

from gcng.training import CheckpointError, CheckpointFolder, load_checkpoint, save_checkpoint
from gcng.training import checkpoint as checkpoint_module
from gcng.training.checkpoint import read_manifest

STATE = {
    "weights": torch.arange(300, dtype=torch.float32),
    "nested": {"step": 3, "rate": 1e-4, "names": ["a", "b"], "none": None, "pair": (1, True)},
}


def equal(state):
    return torch.equal(state["weights"], STATE["weights"]) and state["nested"] == STATE["nested"]


def test_round_trip_and_plain_torch_load(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE, manifest={"step": 3})
    assert equal(load_checkpoint(path))
    assert equal(torch.load(path, weights_only=True))  # an ordinary archive for everyone else
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["format"]) == (3, checkpoint_module.FORMAT_VERSION)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_every_bit_flip_and_truncation_is_found(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    draw = random.Random(0)
    # 200 places in the archive, and every bit of its end record, checksum and manifest.
    end = whole.rfind(b"PK\5\6")
    places = {draw.randrange(8 * len(whole)) for _ in range(200)} | set(range(8 * end, 8 * len(whole)))
    for place in places:
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    for size in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a whole gcng checkpoint|damaged"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert equal(load_checkpoint(path))


def test_foreign_absent_and_newer_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"absent.pt does not exist"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save(STATE, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain.pt is not a whole gcng checkpoint"):
        load_checkpoint(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint_module, "FORMAT_VERSION", 99)
    save_checkpoint(tmp_path / "new.pt", STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 99 .*reads up to 1: upgrade gcng"):
        load_checkpoint(tmp_path / "new.pt")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_refused_without_running_it(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"weights": Harmful(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"a.pt cannot be loaded"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 2000])
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, size):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, STATE, manifest={}, is_best=True)
    with file_size_limit(size), pytest.raises(OSError):
        folder.save(2, {"weights": torch.zeros(5000)}, manifest={}, is_best=True)
    assert equal(folder.load_newest().state)
    assert sorted(os.listdir(tmp_path)) == ["best.json", "step-000000001.pt"]
    assert folder.best_file().name == "step-000000001.pt"


@pytest.mark.parametrize("broken", ["fsync", "replace", "open"])
def test_failing_system_calls_leave_the_earlier_checkpoint(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)

    def fail(*_args, **_kwargs):
        raise OSError(errno.EIO, "injected")

    if broken == "open":
        monkeypatch.setattr("builtins.open", fail)
    else:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="injected"):
        save_checkpoint(path, {"weights": torch.zeros(1)})
    monkeypatch.undo()
    assert equal(load_checkpoint(path)) and os.listdir(tmp_path) == ["a.pt"]


def test_kill_at_any_moment_loses_at_most_one_save(tmp_path):
    """60 kills of a process that does nothing but save."""
    folder, delay = CheckpointFolder(tmp_path, keep=2), random.Random(1)
    step = 0
    folder.save(step, STATE, manifest={})
    for _ in range(60):
        began, woke = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(woke, b"!")
                for number in range(step + 1, step + 1000):
                    folder.save(number, {**STATE, "number": number}, manifest={}, is_best=number % 2 == 0)
            finally:
                os._exit(1)
        os.read(began, 1)
        time.sleep(delay.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(began), os.close(woke)
        newest = folder.load_newest()
        assert newest.problems == () and equal(newest.state)
        reached = int(newest.path.stem.removeprefix("step-"))
        assert reached >= step
        best = folder.best_file()
        assert best is None or equal(load_checkpoint(best))
        step = reached
    assert step > 0
    folder.save(step + 1, STATE, manifest={})
    assert not list(tmp_path.glob("*.tmp.*"))  # leftovers of the kills are gone


def test_what_a_living_process_writes_stays(tmp_path):
    parent, dead = os.getppid(), 2**22 + 7  # beyond the largest process number of Linux
    for pid in (parent, dead, os.getpid(), "x"):
        (tmp_path / f"step-000000009.pt.tmp.{pid}").touch()
    CheckpointFolder(tmp_path).save(1, STATE, manifest={})
    assert [path.name for path in tmp_path.glob("*.tmp.*")] == [f"step-000000009.pt.tmp.{parent}"]


def test_the_best_is_never_looked_for_in_another_folder(tmp_path):
    CheckpointFolder(tmp_path / "a").save(1, STATE, manifest={}, is_best=True)
    own = CheckpointFolder(tmp_path / "b")
    own.save(2, STATE, manifest={}, is_best=True)
    for name in ("../a/step-000000001.pt", str(tmp_path / "a" / "step-000000001.pt"), "", 5):
        (own.folder / "best.json").write_text(json.dumps({"file": name}))
        assert own.best_file() is None


def test_keeps_the_newest_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        folder.save(step, {"step": step}, manifest={"epoch": step}, is_best=step in (1, 2))
    assert [path.name for path in folder.files()] == [f"step-{step:09d}.pt" for step in (5, 4, 2)]
    assert load_checkpoint(folder.best_file())["step"] == 2


def test_files_beyond_the_one_just_written_neither_count_nor_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (90, 100):
        folder.save(step, {"step": step}, manifest={}, is_best=step == 90)
    damaged = folder.files()[0]
    damaged.write_bytes(b"nothing")
    assert folder.load_newest().state["step"] == 90
    for step in (95, 97):
        path = folder.save(step, {"step": step}, manifest={})
        assert path.exists() and folder.load_newest().state["step"] == step
    assert [path.name for path in folder.files()] == [f"step-{step:09d}.pt" for step in (100, 97, 90)]
    assert [path.name for path in folder.files_beyond(96)] == ["step-000000100.pt", "step-000000097.pt"]
    folder.save(100, {"step": 100}, manifest={})
    assert [path.name for path in folder.files()] == [f"step-{step:09d}.pt" for step in (100, 90)]


def test_damaged_newest_falls_back_and_says_so(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save(step, {"step": step}, manifest={})
    newest, middle, _ = folder.files()
    newest.write_bytes(newest.read_bytes()[:-7])
    loaded = folder.load_newest()
    assert loaded.state["step"] == 2 and loaded.path == middle
    assert len(loaded.problems) == 1 and newest.name in loaded.problems[0]
    for path in folder.files():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*000000003.*000000002.*000000001"):
        folder.load_newest()
    with pytest.raises(CheckpointError, match="holds none"):
        CheckpointFolder(tmp_path / "empty").load_newest()
    assert CheckpointFolder(tmp_path / "empty").best_file() is None
    (tmp_path / "best.json").write_text('{"file": "../outside.pt"}')
    assert folder.best_file() is None

"""The command line: instant help, exit codes, messages without tracebacks, and one run from start to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gcng.cli import main, split_overrides
from gcng.cli.arguments import COMMANDS
from gcng.training import load_checkpoint, read_records

SMALL_RUN = """
[run]
device = "cpu"
[data]
kind = "glyphs"
root = "{root}"
num_classes_per_batch = 6
batches_per_epoch = 3
[model]
embedding_size = 8
[optimizer]
extractor_lr = 1e-3
[schedule]
epochs = 2
[evaluation]
every = 2
k = [1, 2]
batch_size = 20
[logging]
every = 1
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_run(tmp_path):
    """A configuration on 10 training and 8 test classes of 6 images: a pattern per class, and noise."""
    draw, root = np.random.default_rng(0), tmp_path / "glyphs.npz"
    patterns = draw.integers(0, 200, (1, 18, 16, 16)) + draw.integers(0, 55, (6, 18, 16, 16))
    np.savez(
        root,
        x=patterns.astype("uint8"),
        names=np.array([f"pattern {number}" for number in range(18)]),
        split=np.array([0] * 10 + [1] * 8),
    )
    path = tmp_path / "small.toml"
    path.write_text(SMALL_RUN.format(root=root))
    return str(path)


def command(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gcng", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\n"
        "from gcng.cli import main\n"
        f"code = main({words!r})\n"
        "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_help_names_the_commands_that_exist_and_every_key(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n    {name} " in listed for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "loss.alpha" in shown and "130 interrupted after saving" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train", "--loss.alhpa", "4"], "unknown key 'loss.alhpa'; did you mean 'loss.alpha'?"),
        (["train", "--resume", "run.toml"], "came before CONFIG and took it for a checkpoint; write gcng train"),
        (["train", "--loss.alpha"], "--loss.alpha needs a value"),
        (["train", "--loss.alpha=x"], "loss.alpha must be a number, got 'x'"),
        (["train", "--set", "loss.alpha=nan"], "loss.alpha must be finite, got nan"),
        (["train", "absent.toml"], "config file absent.toml does not exist"),
        (["train", "--recipe", "sop/resnet"], "unknown recipe 'sop/resnet'; did you mean 'sop/resnet50'?"),
        (["train", "--data.kind", "sop"], "data.root must be given for data.kind sop"),
        (["train", "--data.kind", "sop", "--data.root", "absent"], "no folder absent"),
        (["train", "--model.backbone", "vgg"], "model.backbone 'vgg': build_extractor: unknown spec 'vgg'"),
        (["train", "--device", "gpu"], "run.device must be auto, cpu, cuda or cuda:INDEX, got 'gpu'"),
        (["train", "--device", "cuda:99"], "run.device is 'cuda:99' but torch sees"),
        (["env", "--loss.alpha", "4"], "gcng env takes no settings"),
        (["eval"], "give either a file of embeddings or --checkpoint PATH"),
        (["eval", "absent.npz"], "absent.npz does not exist"),
        (["train", "--seed", str(2**63)], "run.seed must be below 9223372036854775808"),
        (["eval", "absent.npz", "--seed", "3"], "run.seed is a setting of a run; it needs --checkpoint"),
        (["embed", "--checkpoint", "x", "--output", "y.txt"], "--output must end in .npz, got y.txt"),
        (["embed", "--checkpoint", "x", "--output", "no/y.npz"], "the folder no does not exist"),
        (["estimate"], "--samples is missing"),
        (["estimate", "--samples", "4"], "--embedding-size is missing"),
        (
            ["estimate", "--samples", "0", "--embedding-size", "8"],
            "num_samples must be a positive integer, got 0",
        ),
        (["estimate", "--samples", "9", "--embedding-size", "8", "--budget", "x"], "memory_budget is 'x'"),
        (["estimate", "--samples", "900", "--embedding-size", "64", "--budget", "1KiB"], "memory_budget"),
        (["train", "--loss.memory_budget", "1KiB", "--dry-run"], "memory_budget"),
        (["recipes"], "the following arguments are required: ACTION"),
        (["recipes", "show", "sop"], "unknown recipe 'sop'"),
    ],
)
def test_wrong_input_is_one_message_and_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not (tmp_path / "runs" / "gcng" / "checkpoints").exists()


def test_unusable_checkpoint_is_code_4(tmp_path, capsys, small_run):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert main(["eval", "--checkpoint", str(tmp_path / "bad.pt")]) == 4
    assert "is not a whole gcng checkpoint" in last_line(capsys)
    assert main(["embed", "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "a.npz")]) == 4
    assert "no checkpoint at" in last_line(capsys)
    words = ["train", small_run, "--output", str(tmp_path / "run"), "--resume", str(tmp_path / "bad.pt")]
    assert main(words) == 4


def test_settings_are_taken_out_wherever_they_stand():
    words = [
        "--loss.alpha",
        "4",
        "train",
        "a.toml",
        "--loss.beta=-5",
        "--seed",
        "3",
        "--run.output=a.b",
        "--x",
    ]
    assert split_overrides(words) == (
        ["train", "a.toml", "--seed", "3", "--x"],
        ["loss.alpha=4", "loss.beta=-5", "run.output=a.b"],
    )


def test_layers_of_settings_and_short_forms(capsys, small_run):
    words = ["train", small_run, "--recipe", "cub/resnet50", "--show-config", "--json", "--loss.alpha", "3"]
    assert main([*words, "--set", "loss.beta=7", "--seed", "5", "--output", "x", "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["loss"]["alpha"], shown["loss"]["beta"], shown["loss"]["num_layers"]) == (3.0, 7.0, 2)
    assert shown["run"] == shown["run"] | {"seed": 5, "output": "x", "device": "cpu"}
    assert shown["model"]["embedding_size"] == 8 and shown["model"]["backbone"] == "torchvision:resnet50"


def test_shown_configuration_is_a_configuration_file(tmp_path, capsys, small_run):
    assert main(["train", small_run, "--show-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(text)
    assert main(["train", str(tmp_path / "again.toml"), "--show-config"]) == 0
    assert capsys.readouterr().out == text


def test_train_evaluate_embed_from_start_to_end(tmp_path, capsys, small_run):
    output = tmp_path / "run"
    assert main(["train", small_run, "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["epochs"], result["steps"], result["skipped"]) == (2, 6, {})
    assert result["checkpoint"].endswith("step-000000006.pt") and result["best"] == result["last"]
    assert (output / "config.toml").is_file()
    kinds = [record["kind"] for record in read_records(output / "log.jsonl")]
    assert kinds.count("step") == 6 and kinds[0] == "start" and kinds[-1] == "end"

    assert main(["eval", "--checkpoint", str(output), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == result["best"] and metrics["num_queries"] == 48

    assert main(["embed", "--checkpoint", str(output), "--output", str(tmp_path / "a.npz")]) == 0
    assert "48" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "glyphs.npz", "run", "small.toml"]
    assert main(["eval", str(tmp_path / "a.npz"), "--k", "1", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics

    assert main(["train", small_run, "--output", str(output)]) == 2
    assert "already holds checkpoints" in last_line(capsys)
    assert main(["train", small_run, "--output", str(output), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_leaves_with_130_and_a_kill_loses_no_checkpoint(tmp_path, small_run, number):
    output = tmp_path / "run"
    settings = ["--evaluation.every", "0", "--schedule.epochs", "400", "--checkpoint.keep", "2"]
    words = [sys.executable, "-m", "gcng", "train", small_run, "--output", str(output), *settings]
    log, environment = output / "log.jsonl", os.environ | {"OMP_NUM_THREADS": "1"}

    def steps():
        return [r["step"] for r in read_records(log) if r["kind"] == "step"] if log.exists() else []

    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    # To the whole group, loader processes included, as a terminal or a job scheduler does it.
    process = subprocess.Popen([*words, "--data.workers", "2"], start_new_session=True, **streams)
    wait_for(lambda: len(steps()) > 3, process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    reached = steps()[-1]
    assert err.strip() == f"gcng train: stopped after step {reached}; continue with --resume"
    newest = sorted((output / "checkpoints").glob("step-*.pt"))[-1]
    assert load_checkpoint(newest)["progress"]["step"] == reached

    process = subprocess.Popen([*words, "--resume"], **streams)
    wait_for(lambda: steps()[-1] > reached + 6, process)
    process.kill()
    process.communicate(timeout=60)
    killed_after = steps()[-1]
    saved = load_checkpoint(sorted((output / "checkpoints").glob("step-*.pt"))[-1])["progress"]["step"]
    assert killed_after - 4 <= saved <= killed_after + 1  # an epoch has 3 steps


def test_diverging_run_leaves_with_3(tmp_path, capsys, small_run):
    words = [
        "--optimizer.extractor_lr",
        "1e30",
        "--optimizer.clip_value",
        "none",
        "--run.nonfinite_limit",
        "2",
    ]
    assert main(["train", small_run, "--output", str(tmp_path / "run"), "--evaluation.every", "0", *words]) == 3
    assert "2 steps in a row had a" in last_line(capsys)


def test_dry_run_leaves_nothing(tmp_path, monkeypatch, capsys, small_run):
    monkeypatch.chdir(tmp_path)
    assert main(["train", small_run, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["terms"]["metric"] > 0 and 0 <= result["metrics"]["recall_at_1"] <= 1
    assert sorted(os.listdir(tmp_path)) == ["glyphs.npz", "small.toml"]


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    query, labels = generator.standard_normal((30, 4)).astype("float32"), np.arange(30) % 5
    gallery, gallery_labels = generator.standard_normal((20, 4)).astype("float32"), np.arange(20) % 5
    np.savez(tmp_path / "query.npz", embeddings=query, labels=labels)
    np.savez(tmp_path / "gallery.npz", embeddings=gallery, labels=gallery_labels)
    np.save(tmp_path / "query.npy", query)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "gallery.npy", gallery)
    np.save(tmp_path / "gallery_labels.npy", gallery_labels)
    np.savez(tmp_path / "unlabeled.npz", embeddings=query)
    np.savez(tmp_path / "pickled.npz", embeddings=np.array([{}], dtype=object), labels=labels)
    np.savez(tmp_path / "floats.npz", embeddings=query, labels=labels.astype("float32"))
    np.savez(tmp_path / "wide.npz", embeddings=query.astype("longdouble"), labels=labels)
    np.save(tmp_path / "swapped.npy", query.astype(query.dtype.newbyteorder()))
    whole = (tmp_path / "query.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = whole.index(query.tobytes()[:16])
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (tmp_path / "array.npz").write_bytes((tmp_path / "query.npy").read_bytes())
    return tmp_path


def test_evaluation_of_files(arrays, monkeypatch, capsys):
    monkeypatch.chdir(arrays)
    from gcng.evaluation import evaluate_retrieval

    query, gallery = np.load("query.npz"), np.load("gallery.npz")
    pairs = [torch.from_numpy(archive[name]) for archive in (query, gallery) for name in ("embeddings", "labels")]
    alone = evaluate_retrieval(*pairs[:2], k=(1, 3))
    against = evaluate_retrieval(*pairs, k=(1, 2, 4, 8))
    words = ["eval", "query.npy", "--labels", "labels.npy", "--k", "1", "3", "--json"]
    swapped = ["eval", "swapped.npy", *words[2:]]
    for given in (words, swapped, ["eval", "query.npz", "--k", "1", "3", "--json"]):
        assert main(given) == 0
        assert json.loads(capsys.readouterr().out) == alone
    for reference in (["gallery.npz"], ["gallery.npy", "--reference-labels", "gallery_labels.npy"]):
        assert main(["eval", "query.npz", "--reference", *reference, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == against
    assert main(["eval", "query.npz"]) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert table["num_queries"] == "30" and float(table["recall_at_1"]) == pytest.approx(alone["recall_at_1"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query.npy"], "holds no labels: give them with --labels"),
        (["query.npz", "--labels", "labels.npy"], "--labels goes with a .npy file"),
        (["query.npz", "--reference", "gallery.npy"], "give them with --reference-labels"),
        (["unlabeled.npz"], "has no array 'labels'; it has embeddings"),
        (["pickled.npz"], "array 'embeddings' cannot be read"),
        (["floats.npz"], "must be integers, got float32"),
        (["wide.npz"], "cannot be used: can't convert np.ndarray of type numpy.longdouble"),
        (["cut.npz"], "cut.npz is not a NumPy file of plain arrays"),
        (["flipped.npz"], "flipped.npz: array 'embeddings' cannot be read: Bad CRC-32"),
        (["array.npz"], "array.npz must hold an archive of arrays, as in a .npz file, but holds one array"),
        (["query.npy", "--labels", "query.npz"], "query.npz must hold one array, as in a .npy file"),
        (["query.npz", "--k", "0"], "0"),
    ],
)
def test_files_that_cannot_be_evaluated(arrays, monkeypatch, capsys, words, message):
    monkeypatch.chdir(arrays)
    assert main(["eval", *words]) == 2
    assert message in last_line(capsys)


def test_estimate_from_numbers_and_from_a_recipe(capsys):
    import gcng

    assert main(["estimate", "--samples", "1024", "--embedding-size", "128", "--budget", "700MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = gcng.estimate_memory(1024, 128, memory_budget="700MB")
    assert (found["peak_bytes"], found["terms"]) == (expected.peak_bytes, expected.terms)
    assert main(["estimate", "--recipe", "cub/resnet50", "--samples", "240", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_samples"], found["num_layers"], found["samples_per_class"]) == (240, 2, 3)
    assert main(["estimate", "--samples", "64", "--embedding-size", "32"]) == 0
    assert "peak" in capsys.readouterr().out


def test_env_tells_versions_and_what_runs(capsys):
    import gcng

    assert main(["env", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["packages"]["torch"] == torch.__version__ and shown["gcng"] == gcng.__version__
    assert shown["explain"] == gcng.explain()
    assert main(["env"]) == 0
    assert gcng.explain() in capsys.readouterr().out


def test_recipes_list_show_and_import(tmp_path, monkeypatch, capsys):
    from gcng.recipes import recipe_names, recipe_text

    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(["recipes", "show", "sop/googlenet"]) == 0
    assert capsys.readouterr().out == recipe_text("sop/googlenet")
    assert main(["recipes", "show", "sop/googlenet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"]["diversity_weight"] == 20.0
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yml").write_text("LOSS: {ALPHA: 3}\nNUM_GPUS: 2\n")
    assert main(["recipes", "import", str(tmp_path / "a.yml")]) == 2
    assert "pip install pyyaml" in last_line(capsys)


def test_recipes_import_writes_a_configuration_and_reports_ignored_keys(tmp_path, capsys):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    (tmp_path / "a.yml").write_text("MODEL: {ATT_HEAD: 4}\nLOSS: {ALPHA: 3}\nNUM_GPUS: 2\n")
    assert main(["recipes", "import", str(tmp_path / "a.yml"), "--output", str(tmp_path / "a.toml")]) == 0
    assert "NUM_GPUS is ignored: never used by the authors" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "a.toml"), "--show-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["loss"]["alpha"] == 3.0 and shown["loss"]["beta"] == 10000.0
    (tmp_path / "a.yml").write_text("LOSS: {ALPHA: -3}\n")
    assert main(["recipes", "import", str(tmp_path / "a.yml")]) == 2
    assert "loss.alpha must be at least 0" in last_line(capsys)


def test_installed_command_is_this_one():
    done = command("recipes", "list")
    assert done.returncode == 0 and "sop/resnet50" in done.stdout and done.stderr == ""

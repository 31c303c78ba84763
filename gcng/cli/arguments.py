"""Arguments of every command. Imports nothing heavy: this is all that ``--help`` needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

EPILOG_TRAIN = """\
settings: any key of the configuration, as --SECTION.KEY VALUE or --set SECTION.KEY=VALUE; later layers win:
  defaults < --recipe < CONFIG file < settings given here

exit codes: 0 done, 1 a sample or a step failed, 2 wrong configuration, 3 diverged, 4 checkpoint unusable,
  130 interrupted after saving

keys:
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: Module of ``gcng.cli`` with ``run(arguments) -> exit code``.
        summary: One line for the list of commands.
        add_arguments: Fills the command's parser.
        takes_overrides: Whether ``--section.key value`` is understood.
        reports_input_errors: Whether a ValueError, TypeError, OSError or missing package means wrong input.
    """

    module: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    takes_overrides: bool = False
    reports_input_errors: bool = False


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="set one key; can be repeated")
    parser.add_argument("--seed", type=int, help="short for --run.seed")
    parser.add_argument("--device", help="short for --run.device: auto, cpu, cuda, cuda:INDEX")


def _add_train(parser: argparse.ArgumentParser) -> None:
    from gcng.training.config_io import config_keys

    parser.add_argument("config", nargs="?", metavar="CONFIG", help="TOML file")
    parser.add_argument("--recipe", metavar="NAME", help="published setting to start from (gcng recipes list)")
    parser.add_argument("--output", metavar="DIR", help="short for --run.output")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue from the newest checkpoint of the output folder (a fresh start where there is none), "
        "or from the given file",
    )
    parser.add_argument("--dry-run", action="store_true", help="one step of everything; leaves nothing behind")
    parser.add_argument("--show-config", action="store_true", help="print the whole configuration and leave")
    _add_settings(parser)
    _add_json(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, config_keys()))
    parser.epilog = EPILOG_TRAIN + "\n".join(f"  {key:<{width}}  {text}" for key, text in config_keys().items())


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", nargs="?", metavar="EMBEDDINGS", help=".npz with embeddings and labels, or .npy")
    parser.add_argument("--labels", metavar="FILE", help=".npy of labels, where EMBEDDINGS is a .npy")
    parser.add_argument("--reference", metavar="FILE", help="gallery: .npz with embeddings and labels, or .npy")
    parser.add_argument("--reference-labels", metavar="FILE", help=".npy of labels, where --reference is a .npy")
    parser.add_argument("--checkpoint", metavar="PATH", help="checkpoint file or output folder of a run instead")
    parser.add_argument(
        "--k", type=int, nargs="+", metavar="K", help="ranks of Recall@K (default: the run's, or 1 2 4 8)"
    )
    _add_settings(parser)
    _add_json(parser)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint file or output folder of a run")
    parser.add_argument("--output", required=True, metavar="FILE", help=".npz to write: embeddings, labels")
    parser.add_argument(
        "--split",
        choices=("train", "test", "gallery"),
        default="test",
        help="which part of the data (default: test)",
    )
    _add_settings(parser)
    _add_json(parser)


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, metavar="N", help="samples in a batch")
    parser.add_argument("--samples-per-class", type=int, metavar="K", help="samples of each class in a batch")
    parser.add_argument("--embedding-size", type=int, metavar="D", help="width of the embeddings")
    parser.add_argument("--layers", type=int, metavar="L", help="propagation layers")
    parser.add_argument("--classes", type=int, metavar="C", help="training classes")
    parser.add_argument("--budget", metavar="SIZE", help="memory budget such as 2GiB")
    parser.add_argument("--dtype", help="dtype of the embeddings: float32 (default), float64, bfloat16, float16")
    parser.add_argument("--device", help="cpu (default) or cuda; cuda needs --budget")
    parser.add_argument("--config", metavar="CONFIG", help="TOML file to take what is not given from")
    parser.add_argument("--recipe", metavar="NAME", help="published setting to take what is not given from")
    _add_json(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="OP", help="one op, or iteration (default: everything, 25 minutes)")
    parser.add_argument("--json", metavar="FILE", help="results file to add to; rows of this commit in it are kept")
    parser.add_argument("--compare", metavar="FILE", help="earlier results file: name what changed beyond the spread")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round: does everything run?")
    parser.add_argument("--force", action="store_true", help="measure again what the results file already holds")


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_json(actions.add_parser("list", help="names of the published settings", allow_abbrev=False))
    show = actions.add_parser("show", help="print a setting as TOML", allow_abbrev=False)
    show.add_argument("name", metavar="NAME")
    _add_json(show)
    imports = actions.add_parser(
        "import", help="translate a YAML file of the authors' code to TOML", allow_abbrev=False
    )
    imports.add_argument("file", metavar="FILE")
    imports.add_argument("--output", metavar="FILE", help="where to write the TOML (default: stdout)")
    _add_json(imports)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels as well; needs nvcc, no GPU")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="wait so long for another build (default: 600)"
    )
    _add_json(parser)


COMMANDS = {
    "train": Command("train", "train from a configuration or a recipe", _add_train, takes_overrides=True),
    "eval": Command(
        "evaluate",
        "retrieval metrics of embeddings or of a checkpoint",
        _add_eval,
        True,
        reports_input_errors=True,
    ),
    "embed": Command("embed", "write the embeddings of a data set", _add_embed, True, reports_input_errors=True),
    "estimate": Command("estimate", "predict the peak memory of the loss", _add_estimate, reports_input_errors=True),
    "bench": Command(
        "bench", "measure time, memory and accuracy on this machine", _add_bench, reports_input_errors=True
    ),
    "env": Command("env", "versions, devices, and what runs on them", _add_json),
    "build": Command("build", "compile the optional C++ and CUDA kernels", _add_build),
    "recipes": Command("recipes", "list, show and import settings", _add_recipes, reports_input_errors=True),
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add a subparser for every command."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.summary, description=command.summary.capitalize() + ".", allow_abbrev=False
        )
        command.add_arguments(sub)

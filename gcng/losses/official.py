"""The authors' checkpoints: their names for our parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gcng.nn.graph import parameter_names

_NODE = "gnn.gnn.{layer}.node_model.layers.0"
_EDGE = "gnn.gnn.{layer}.edge_model"
_NODE_NAMES = {
    "q": "att.q_linear", "k": "att.k_linear", "v": "att.v_linear", "o": "att.out", "e2n": "edge_to_node",
    "ff1": "linear1", "ff2": "linear2", "ln": "norm.1",
}  # fmt: skip
_EDGE_NAMES = {
    "q": "att.q_linear", "k": "att.k_linear", "v": "att.v_linear", "n2e": "node_to_edge", "ff1": "linear.0",
    "ffln": "linear.2", "ff2": "linear.3", "ln": "norm.1",
}  # fmt: skip
_ENDS = {"w": "weight", "b": "bias"}
_UNUSED = (
    re.compile(r"feature_extractor\..*"),
    re.compile(r"gnn\.gnn\.\d+\.node_model\.layers\.0\.update_node\..*"),
    re.compile(r"gnn\.bottleneck[12]\.0\.(running_mean|running_var|num_batches_tracked)"),
)
_SHIFT = re.compile(r"gnn\.bottleneck[12]\.0\.bias")


def official_names(num_layers: int) -> dict[str, str]:
    """Key in an authors' checkpoint -> path in :class:`gcng.losses.GCAHNGLoss`."""
    modules = {"inp": "gnn.dim_red", "gate": "gnn.fc.0", "ncls": "gnn.cls.0"}
    for layer in range(num_layers):
        for prefix, folder, names in (("node", _NODE, _NODE_NAMES), ("edge", _EDGE, _EDGE_NAMES)):
            root = folder.format(layer=layer)
            modules |= {f"{prefix}{layer}.{short}": f"{root}.{name}" for short, name in names.items()}
    ours = {name: f"graph.{path}" for name, path in parameter_names(num_layers).items()}
    keys = {f"{theirs}.{_ENDS[e]}": ours[f"{short}.{e}"] for short, theirs in modules.items() for e in _ENDS}
    keys |= {"gnn.bottleneck1.0.weight": ours["bn_edge.w"], "gnn.bottleneck2.0.weight": ours["bn_node.w"]}
    return keys | {f"softmax_classifier.{end}": f"classifier.{end}" for end in _ENDS.values()}


def load_official_state_dict(module: torch.nn.Module, num_layers: int, state: Mapping[str, Tensor]) -> list[str]:
    """Copy an authors' checkpoint into the criterion ``module``; returns the sorted unused keys.

    Nothing is copied unless everything fits.

    Raises:
        KeyError: a key is missing or unknown. ValueError: a shape differs, or a batch-norm shift is not 0.
    """
    names = official_names(num_layers)
    unused, unknown = [], []
    for key, value in state.items():
        if key in names:
            continue
        if _SHIFT.fullmatch(key):
            if bool((value != 0).any()):
                raise ValueError(f"load_official_state_dict: {key} is not 0; the batch norms of gcng have no shift")
            unused.append(key)
        elif any(pattern.fullmatch(key) for pattern in _UNUSED):
            unused.append(key)
        else:
            unknown.append(key)
    missing = sorted(set(names) - set(state))
    if missing or unknown:
        raise KeyError(
            f"load_official_state_dict: missing keys {missing}, unknown keys {sorted(unknown)}; check num_layers = "
            f"{num_layers}"
        )
    parameters = dict(module.named_parameters())
    for key, path in names.items():
        if state[key].shape != parameters[path].shape:
            raise ValueError(
                f"load_official_state_dict: {key} has shape {tuple(state[key].shape)}; expected "
                f"{tuple(parameters[path].shape)} for {path}"
            )
    with torch.no_grad():
        for key, path in names.items():
            parameters[path].copy_(state[key])
    return sorted(unused)

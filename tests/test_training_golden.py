"""train_step reproduces 30 steps of the published training (tests/golden/traj.npz, variant ``skip``)."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import gcng
from gcng.losses import GCAHNGLoss
from gcng.nn.graph import parameter_names
from gcng.training import Optimizers, train_step
from tests.golden_data import Golden

LOSSES = {
    "J_m": "n_pair",
    "J_syn": "synthetic",
    "J_gce": "node_ce",
    "J_metric": "metric",
    "J_softce": "classifier",
    "J_soft": "class_ce",
    "J_div": "diversity",
    "J_gen": "generator",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def adam(golden, parameters, part):
    first, second, eps = golden.arrays["cfg/adam"].tolist()
    rate, decay = golden.cfg(f"lr_{part}"), golden.cfg(f"wd_{part}")
    return torch.optim.AdamW(parameters, lr=rate, betas=(first, second), eps=eps, weight_decay=decay)


def golden_parts(golden):
    """Extractor, criterion and optimizers of the trajectory, and golden name -> parameter."""
    cfg = golden.cfg
    criterion = GCAHNGLoss(
        cfg("D"),
        cfg("C"),
        cfg("L"),
        cfg("H"),
        alpha=cfg("alpha"),
        beta=cfg("beta"),
        softmax_factor=cfg("soft_factor"),
        similarity_weight=cfg("w_sim"),
        diversity_weight=cfg("w_div"),
        l2_reg=cfg("l2"),
        dropout=0.0,
        official_sim_mask=True,
    ).double()
    extractor = nn.Linear(cfg("D"), cfg("D")).double()
    named = {name: criterion.graph.get_parameter(path) for name, path in parameter_names(cfg("L")).items()}
    named |= {"scls.w": criterion.classifier.weight, "scls.b": criterion.classifier.bias}
    named |= {"ext.w": extractor.weight, "ext.b": extractor.bias}
    stored = golden.parameters("p0")
    assert stored.keys() == named.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[name])
    optimizers = Optimizers(
        adam(golden, extractor.parameters(), "c"),
        adam(golden, criterion.graph.parameters(), "g"),
        adam(golden, criterion.classifier.parameters(), "s"),
    )
    return extractor, criterion, optimizers, named


@pytest.mark.parametrize("mode", (contextlib.nullcontext, gcng.reference_mode), ids=("ops", "reference"))
def test_trajectory_of_the_published_training(mode):
    with mode():
        check_trajectory(Golden("traj"))


def check_trajectory(golden):
    """30 steps: every loss, the averages, and the weights after the last one."""
    extractor, criterion, optimizers, named = golden_parts(golden)
    x, y = golden.tensor("in/x"), golden.tensor("in/y")
    for step, rows in enumerate(golden.arrays["in/idx"]):
        if step and step % golden.cfg("epoch") == 0:
            criterion.schedule.end_epoch()
        for name in ("j_avg", "j_gen"):
            expected = golden.arrays[f"skip/{name}"][step]
            assert getattr(criterion.schedule, name) == pytest.approx(expected, rel=1e-10)
        mix = golden.tensor("in/lam")[step]
        terms = train_step(
            extractor,
            criterion,
            x[rows],
            y[rows],
            optimizers,
            clip_value=golden.cfg("clip"),
            mix=(mix[0], mix[1]),
        )
        found = terms.named()
        assert terms.skipped == ""
        for stored, name in LOSSES.items():
            expected = golden.arrays[f"skip/loss/{stored}"][step]
            if name == "diversity":  # close to 0 by cancellation
                found_value, expected = 1 - found[name].item() / 0.01, 1 - expected / 0.01
            else:
                found_value = found[name].item()
            assert found_value == pytest.approx(expected, rel=1e-10), (step, stored)
    for name, parameter in named.items():
        expected = golden.arrays[f"skip/final/{name}"]
        error = np.abs(parameter.detach().numpy() - expected).max()
        assert error <= 1e-9 * max(np.abs(expected).max(), 1e-3), name


def test_trajectory_clips_and_differs_without_clipping():
    """The clamp of the golden run is at work: without it, the second step's losses are others."""
    golden = Golden("traj")
    assert golden.arrays["skip/clipped"][0] > 0
    x, y = golden.tensor("in/x"), golden.tensor("in/y")
    extractor, criterion, optimizers, _ = golden_parts(golden)
    for step in range(2):
        rows, mix = golden.arrays["in/idx"][step], golden.tensor("in/lam")[step]
        terms = train_step(extractor, criterion, x[rows], y[rows], optimizers, mix=(mix[0], mix[1]))
    expected = golden.arrays["skip/loss/J_metric"][1]
    assert abs(terms.metric.total.item() - expected) > 1e-8 * expected

"""The published formulation, a benchmark provider, against the golden data in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.published import LossConstants, PublishedLoss
from tests.golden_data import load

FILES = ("tiny", "odd", "wide", "first")
OUTPUT_BOUND, GRADIENT_BOUND = 1e-12, 1e-10
METRIC = {"J_m": "n_pair", "J_syn": "synthetic", "J_gce": "node_ce", "J_metric": "total"}
GENERATOR = {"J_soft": "class_ce", "J_sim": "similarity", "J_gen": "total"}


def published_from(golden):
    constants = LossConstants(
        alpha=golden.cfg("alpha"),
        beta=golden.cfg("beta"),
        softmax_factor=golden.cfg("soft_factor"),
        similarity_weight=golden.cfg("w_sim"),
        diversity_weight=golden.cfg("w_div"),
        l2_reg=golden.cfg("l2"),
        official_sim_mask=True,
    )
    sizes = (golden.cfg("D"), golden.cfg("C"), golden.cfg("L"), golden.cfg("H"))
    model = PublishedLoss(*sizes, dropout=0.0, constants=constants).double()
    model.load_golden(golden.parameters())
    model.j_avg, model.j_gen = golden.scalar("in/j_avg"), golden.scalar("in/j_gen")
    return model


def inputs_from(golden):
    z = golden.tensor("in/z").clone().requires_grad_()
    return z, golden.tensor("in/labels"), golden.tensor("in/lam1"), golden.tensor("in/lam2")


def assert_losses(golden, terms, attributes):
    for key, attribute in attributes.items():
        assert golden.error(f"loss/{key}", getattr(terms, attribute)) <= OUTPUT_BOUND, key


def assert_parameter_gradients(golden, prefix, model):
    """Every gradient of a phase, and none where the golden data has none."""
    without = set(golden.arrays[f"{prefix}/none"].tolist())
    for name, parameter in model.named_golden_parameters().items():
        if name in without:
            assert parameter.grad is None, name
        elif name.startswith("edge") and name.endswith(".k.b"):  # zero in theory, rounding noise when stored
            assert parameter.grad.abs().max() <= 1e-12
        else:
            assert golden.error(f"{prefix}/p/{name}", parameter.grad) <= GRADIENT_BOUND, name


@pytest.mark.parametrize("name", FILES)
def test_published_metric_phase_equals_golden(name):
    golden = load(name)
    model, (z, labels, mix, _) = published_from(golden), inputs_from(golden)
    terms = model.metric_terms(z, labels, mix=mix)
    edges = terms.graph.edges[0]
    edges.retain_grad()
    terms.total.backward()
    outputs = {"gate": terms.graph.gate, "node_pred": terms.graph.node_logits, "syn1": terms.negatives}
    for layer in range(model.num_layers + 1):
        outputs |= {f"e{layer}": terms.graph.edges[layer], f"f{layer}": terms.graph.nodes[layer]}
    for key, tensor in outputs.items():
        assert golden.error(f"out/{key}", tensor) <= OUTPUT_BOUND, key
    assert_losses(golden, terms, METRIC)
    assert golden.error("g1/z", z.grad) <= GRADIENT_BOUND
    assert golden.error("g1/e0", edges.grad) <= GRADIENT_BOUND
    assert_parameter_gradients(golden, "g1", model)


@pytest.mark.parametrize("name", FILES)
def test_published_generator_phase_equals_golden(name):
    golden = load(name)
    model, (z, labels, _, mix) = published_from(golden), inputs_from(golden)
    terms = model.generator_terms(z, labels, mix=mix)
    kept = {"gate": terms.graph.gate, "syn": terms.negatives, "e_last": terms.graph.edges[-1]}
    for tensor in kept.values():
        tensor.retain_grad()
    terms.total.backward()
    assert golden.error("out/syn2", terms.negatives) <= OUTPUT_BOUND
    assert_losses(golden, terms, GENERATOR)
    # J_div is close to zero by cancellation: compare the spread that it is made of.
    spread, wanted = 1 - terms.diversity.item() / 0.01, 1 - golden.scalar("loss/J_div") / 0.01
    assert abs(spread - wanted) <= OUTPUT_BOUND * abs(wanted)
    for key, tensor in kept.items():
        assert golden.error(f"g2/{key}", tensor.grad) <= GRADIENT_BOUND, key
    assert z.grad is None
    assert_parameter_gradients(golden, "g2", model)


@pytest.mark.parametrize("name", FILES)
def test_published_classifier_loss_and_own_class_mask_equal_golden(name):
    golden = load(name)
    model, (z, labels, _, mix) = published_from(golden), inputs_from(golden)
    loss = model.classifier_loss(z, labels)
    loss.backward()
    assert golden.error("loss/J_softce", loss) <= OUTPUT_BOUND
    assert golden.error("gc/p/scls.w", model.scls.weight.grad) <= GRADIENT_BOUND
    assert golden.error("gc/p/scls.b", model.scls.bias.grad) <= GRADIENT_BOUND
    model.constants = LossConstants(alpha=golden.cfg("alpha"))
    own_class = model.generator_terms(z, labels, mix=mix).similarity
    assert golden.error("loss/J_sim_intended_mask", own_class) <= OUTPUT_BOUND


def test_published_batch_norm_statistics_equal_golden():
    golden = load("odd")
    model, (z, labels, first, second) = published_from(golden), inputs_from(golden)
    model.metric_terms(z, labels, mix=first)
    model.generator_terms(z, labels, mix=second)
    norms = (model.bn_edge, model.bn_node)
    running = [getattr(norm, f"running_{name}") for norm in norms for name in ("mean", "var")]
    assert golden.error("out/bn_running", torch.stack(running)) <= OUTPUT_BOUND


def test_published_refuses_another_slot_order():
    golden = load("tiny")
    model, (z, labels, mix, _) = published_from(golden), inputs_from(golden)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="labels must repeat the same M classes"):
        model.metric_terms(z[order], labels[order], mix=mix)


def test_published_load_names_missing_and_unknown_weights():
    model = PublishedLoss(8, 3)
    weights = {name: p.detach().clone() for name, p in model.named_golden_parameters().items()}
    weights["extra.w"] = weights.pop("gate.w")
    with pytest.raises(ValueError, match=r"unknown names \['extra.w'\] and lacks \['gate.w'\]"):
        model.load_golden(weights)

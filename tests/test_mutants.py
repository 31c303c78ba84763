"""The gate has teeth: it accepts honest blocked implementations and refuses every planted mistake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import cases, mutants_rows
from tests.closeness import ClosenessError, assert_error_does_not_grow, relative_error
from tests.mutants import DTYPES, MUTANTS, OPERATIONS, Case, Mutant
from tests.mutants_rows import BLOCK_ROWS, linear_cross_entropy

LINEAR = OPERATIONS["linear_cross_entropy"]


@pytest.fixture(autouse=True)
def one_thread_and_no_memory() -> Iterator[None]:
    """Tiles are tiny: threads only cost. State that a mutant keeps ends with its test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mutants_rows.REMEMBERED.clear()
    yield
    mutants_rows.REMEMBERED.clear()
    torch.set_num_threads(threads)


def case_named(name: str) -> Case:
    """The case of linear cross-entropy called ``name``."""
    return next(case for case in LINEAR.cases if case.name == name)


def refusal(mutant: Mutant) -> str | None:
    """The message with which the gate refuses the mutant, None if it survives all cases of its dtype."""
    for case, dtype in mutant.operation.all_runs():
        if dtype == mutant.dtype:
            mutants_rows.REMEMBERED.clear()
            try:
                mutant.operation.run(case, dtype, bug=mutant.bug)
            except ClosenessError as error:
                return str(error)
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_honest_implementation_passes_every_case(operation, dtype):
    runs = [case for case, kind in OPERATIONS[operation].all_runs() if kind == dtype]
    assert runs
    for index, case in enumerate(runs):
        readings = OPERATIONS[operation].run(case, dtype, subsets=index == 0)
        assert len(readings) == 1 + len(OPERATIONS[operation].differentiable) - (
            operation == "constant_gate_synthesis"
        )


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant):
    message = refusal(mutant)
    assert message is not None, f"the gate lets {mutant} through: {mutant.reason}"
    assert mutant.bug in message


def test_mutants_cover_what_was_promised():
    assert len(MUTANTS) >= 40
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.reason for mutant in MUTANTS)
    assert max(case.rows for case in cases.CLASSIFICATIONS) // BLOCK_ROWS >= 128


def results(case: Case, dtype: torch.dtype, bug: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and gradients of a mutant and of eager torch, for criteria that look at nothing else."""
    found = []
    for function in (lambda **inputs: linear_cross_entropy(**inputs, bug=bug), LINEAR.definition):
        inputs: dict[str, Any] = {
            key: x.to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in case.make(0).items()
        }
        loss = function(**inputs)
        found.append([loss, *torch.autograd.grad(loss, [inputs[key] for key in LINEAR.differentiable])])
    return found[0], found[1]


WEAK = ("tail_unmasked", "last_row_dropped", "gradient_scaled", "sums_in_storage", "one_element_off")


@pytest.mark.parametrize("bug", WEAK)
def test_fixed_tolerances_would_let_it_through(bug):
    # The tolerances with which a well-known library compares the summed bf16 loss and its gradients.
    case = case_named("many_chunks, diffuse, mean" if bug == "sums_in_storage" else "tails, diffuse, mean")
    ours, eager = results(case, torch.bfloat16, bug)
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=5.0, rtol=50.0)
    with pytest.raises(ClosenessError):
        LINEAR.run(case, torch.bfloat16, bug=bug)


def test_large_logits_alone_are_not_enough():
    # Padding at logit 0 weighs nothing beside logits of 200: one regime of values hides what another shows.
    for dtype in (torch.float32, torch.bfloat16):
        LINEAR.run(case_named("tails, saturated_positive, mean"), dtype, bug="tail_unmasked")
        with pytest.raises(ClosenessError):
            LINEAR.run(case_named("tails, diffuse, mean"), dtype, bug="tail_unmasked")


def test_diffuse_data_alone_is_not_enough():
    for dtype in (torch.bfloat16, torch.float16):
        LINEAR.run(case_named("tails, diffuse, mean"), dtype, bug="rounded_before_one")
        with pytest.raises(ClosenessError):
            LINEAR.run(case_named("tails, confident, none"), dtype, bug="rounded_before_one")


def test_few_chunks_are_not_enough():
    LINEAR.run(case_named("exact, diffuse, mean"), torch.bfloat16, bug="sums_in_storage")
    with pytest.raises(ClosenessError, match="grad"):
        LINEAR.run(case_named("many_chunks, diffuse, mean"), torch.bfloat16, bug="sums_in_storage")


def weight_gradient_error(chunks: int, bug: str) -> float:
    """Relative error of the bf16 weight gradient after ``chunks`` blocks of rows."""
    shape = cases.Classification("chunks", chunks * BLOCK_ROWS, 8, 20, 0, "grows with the number of chunks")
    inputs = {
        key: x.bfloat16() if x.is_floating_point() else x
        for key, x in cases.classification_inputs(shape, seed=1).items()
    }
    gradients = []
    for dtype, function, options in (
        (torch.float64, LINEAR.definition, {}),
        (torch.bfloat16, linear_cross_entropy, {"bug": bug}),
    ):
        leaves = {
            key: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
            for key, x in inputs.items()
        }
        gradients.append(torch.autograd.grad(function(**leaves, **options), leaves["weight"])[0])
    return relative_error(gradients[1], gradients[0])


def test_error_grows_with_chunks_only_for_sums_in_storage():
    assert_error_does_not_grow("honest", weight_gradient_error(8, ""), weight_gradient_error(512, ""))
    few, many = (weight_gradient_error(chunks, "sums_in_storage") for chunks in (8, 512))
    with pytest.raises(ClosenessError, match="error grows with the number of accumulation steps"):
        assert_error_does_not_grow("bf16 sums", few, many)

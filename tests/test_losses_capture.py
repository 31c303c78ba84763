"""What the criterion asks of the host: one copy for the classes, none when warm, numbers drawn in a capture."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import gcng
from gcng import functional, reference
from gcng.losses import GCAHNGLoss, gcahng, n_pair
from gcng.losses.n_pair import _group_anchors
from gcng.memory import MemoryPlan, plan_memory
from gcng.nn import graph
from gcng.ops import blocks, synthesis_tiles
from gcng.ops import layout as layout_module
from gcng.ops.dispatch import TORCH, TRITON, forced_kernels
from gcng.ops.layout import ClassMajor, class_major, class_major_beside
from gcng.ops.synthesis_tiles import Synthesis, class_tensors
from gcng.ops.transfers import capturing, fetched, sent
from gcng.ops.triton_path import disabled
from tests.test_losses_golden import memory_plan

LABELS = torch.tensor([5, 5, 2, 0, 2, 0, 5, 1])
EVEN = torch.arange(4).repeat(2)


class Copies(TorchDispatchMode):
    """Shapes of what is copied from the CPU to a meta tensor, which stands for one on a GPU."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.is_meta and not args[0].is_meta:
            self.shapes.append(tuple(out.shape))
        return out


def body_of(op):
    """The implementation of an op, which every module of the ops names alike."""
    modules = [module for name, module in sys.modules.items() if name.startswith("gcng.ops.")]
    (body,) = {getattr(module, f"_{op}") for module in modules if hasattr(module, f"_{op}")}
    return body


class Device(TorchDispatchMode):
    """Meta tensors as a GPU: runs the bodies of the ops on them, and notes what a GPU would be waited for or fed by.

    What reads a number of a meta tensor (``item``, ``nonzero``, ``unique``) raises by itself.
    """

    def __init__(self):
        super().__init__()
        self.copies, self.mixed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "gcng":
            with self:
                return body_of(func.name().removeprefix("gcng::"))(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x.is_meta for x in tensors]
        if any(there) and any(not x.is_meta and x.dim() for x in tensors):
            self.mixed.append(str(func))
        out = func(*args, **kwargs)
        if tensors and isinstance(out, torch.Tensor) and out.is_meta != any(there):
            self.copies.append(tuple(out.shape))
        return out


class FromHost(TorchFunctionMode):
    """Counts what makes a tensor from a list of the host, or writes a number of the host through an index."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.calls[f"{func.__name__}({args[0]})"] += 1
        elif func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.calls["indexed write of a number"] += any(isinstance(x, torch.Tensor) for x in index)
        return func(*args, **(kwargs or {}))


def iterate(criterion, z, labels, mix, layout):
    criterion.metric_terms(z, labels, mix=mix, layout=layout).total.backward()
    criterion.classifier_loss(z, labels).backward()
    criterion.generator_terms(z, labels, mix=mix, layout=layout).total.backward()


def test_the_classes_go_to_a_device_in_one_copy_and_stay_with_the_layout():
    layout = gcng.BatchLayout(LABELS)
    with Copies() as copies:
        moved = class_major_beside("test", LABELS, layout, torch.device("meta"))
        again = class_major_beside("test", LABELS, layout, torch.device("meta"))
    assert copies.shapes == [(8, 8)] and again is moved
    for name, here, there in zip(ClassMajor._fields, class_major(LABELS), moved, strict=True):
        assert there.is_meta == (name != "class_start")
        assert there.dtype == here.dtype and there.shape == here.shape


def test_the_columns_of_that_copy_are_the_columns(monkeypatch):
    made = class_major(LABELS)
    monkeypatch.setattr("gcng.ops.layout.sent", lambda x, device: x.clone())
    moved = class_major_beside("test", LABELS, None, torch.device("meta"))
    for name, here, there in zip(ClassMajor._fields, made, moved, strict=True):
        assert there.dtype == here.dtype and torch.equal(there, here), name


def test_the_classifier_asks_for_no_classes(monkeypatch):
    monkeypatch.setattr(gcahng, "class_major_beside", None)
    criterion = GCAHNGLoss(8, 6, singletons="error")
    assert criterion.classifier_loss(torch.randn(8, 8), LABELS).isfinite()


@pytest.mark.parametrize("labels", [LABELS, EVEN], ids=["ragged", "even"])
def test_a_warm_iteration_makes_nothing_from_numbers_of_the_host(labels):
    # Each of these is a copy from pageable memory and a wait on a GPU, and an error in the capture of a CUDA graph.
    criterion, layout = GCAHNGLoss(8, 6), gcng.BatchLayout(labels)
    z, most = torch.randn(8, 8, requires_grad=True), layout.samples_per_class
    mix = torch.rand(most, most - 1)
    iterate(criterion, z, labels, mix, layout)
    with FromHost() as warm:
        iterate(criterion, z, labels, mix, layout)
    assert not +warm.calls, dict(warm.calls)
    with FromHost() as seen:
        labels.new_zeros(3)[torch.tensor([0, 2])] = 1
    assert seen.calls == {"indexed write of a number": 1, "tensor([0, 2])": 1}


@pytest.mark.parametrize("plan", [MemoryPlan(60), MemoryPlan(60, True, True, True)], ids=["recompute", "everything"])
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [(torch.tensor([1, 1, 3, 0, 1, 3, 2, 1]), torch.float32), (EVEN, torch.bfloat16)],
    ids=["ragged float32", "even bfloat16"],
)
def test_a_device_is_fed_through_one_door_and_never_waited_for(labels, plan, dtype, monkeypatch):
    """Every body of every op, forward and backward, in its torch form, on a device that has no numbers to read."""
    sends = []

    def noted(x, *arguments):
        moved = sent(x, *arguments)
        sends.extend([tuple(x.shape)] if moved.is_meta and not x.is_meta else [])
        return moved

    for module in (gcahng, graph, n_pair, blocks, layout_module, synthesis_tiles):
        monkeypatch.setattr(module, "sent", noted)
    even = labels is EVEN
    options = {"singletons": "error" if even else "skip", "official_sim_mask": even}
    criterion = GCAHNGLoss(8, 6, 2, dropout=0.1, **options).to("meta", dtype)
    z, layout = torch.empty(8, 8, device="meta", dtype=dtype, requires_grad=True), gcng.BatchLayout(labels)
    most = layout.samples_per_class
    drawn, of_a_phase = [(most, most - 1), ()], [(8,)]
    with memory_plan(monkeypatch, plan), disabled(), Device() as device:
        iterate(criterion, z, labels, None, layout)
        device.copies.clear(), sends.clear()
        iterate(criterion, z, labels, None, layout)
        # Mix and seed of both phases, and the labels of two cross-entropies; the classes are known.
        assert sends == device.copies == [*drawn, *of_a_phase, *of_a_phase, *drawn] and not device.mixed
        device.copies.clear(), sends.clear()
        for module in (gcahng, graph):
            monkeypatch.setattr(module, "capturing", lambda device: True)
        iterate(criterion, z, labels.to("meta"), None, layout)  # that copy is the caller's
    assert device.copies == of_a_phase and not sends and not device.mixed


@pytest.mark.parametrize("dropped", [False, True], ids=["labels only", "authors' mask"])
def test_labels_on_a_device_are_fetched_once_a_phase_and_nothing_else_is(dropped, monkeypatch):
    """Whatever else looked at a number of the device would raise; see :class:`Device`."""
    waits = []

    def fetched(x):
        waits.append(tuple(x.shape))
        return EVEN if x.is_meta else x

    monkeypatch.setattr(layout_module, "fetched", fetched)
    options = {"singletons": "error", "official_sim_mask": True} if dropped else {"singletons": "skip"}
    criterion = GCAHNGLoss(8, 6, dropout=0.1, **options).to("meta")
    z = torch.empty(8, 8, device="meta", requires_grad=True)
    with memory_plan(monkeypatch, MemoryPlan(60)), disabled(), Device():
        iterate(criterion, z, EVEN.to("meta"), None, None)
        assert waits == [(8,), (8,)]
        waits.clear()
        gate = torch.empty(8, 8, 8, device="meta", requires_grad=True)
        mix = torch.rand(2, 1)
        functional.synthesize_negatives(z, EVEN.to("meta"), gate, kappa=0.3, mix=mix).sum().backward()
        assert waits == [(8,)]


def test_what_is_fetched_is_the_same_and_a_trace_keeps_the_device():
    assert fetched(LABELS) is LABELS
    there = torch.empty(3, device="meta")
    assert fetched(there) is there


def test_the_first_samples_of_all_groups_are_one_copy():
    boundaries = (0, 3, 5, 7, 8)  # classes of 3, 2, 2 and 1
    groups = _group_anchors(boundaries, torch.device("cpu"))
    assert [x.tolist() for x in groups] == [[0, 3, 5], [0]]
    assert _group_anchors((0, 1, 2), torch.device("cpu")) == ()
    assert _group_anchors((0,), torch.device("cpu")) == ()
    with Copies() as copies:
        _group_anchors(boundaries, torch.device("meta"))
        _group_anchors(boundaries, torch.device("meta"))
    assert copies.shapes == [(4,)]


def test_the_synthesis_sends_its_classes_in_one_copy_and_a_number_in_none():
    boundaries, meta = (0, 3, 5, 7, 8), torch.device("meta")
    with Copies() as copies:
        sent = class_tensors(boundaries, meta)
        Synthesis(torch.empty(8, 4, device=meta), boundaries, torch.tensor(0.5), torch.rand(3, 2), TORCH.synthesis)
    assert copies.shapes == [(5 + 4 + 5 * 8,), (3, 2)]
    here = class_tensors(boundaries, torch.device("cpu"))
    assert [(x.shape, x.dtype) for x in here[:-1]] == [(x.shape, x.dtype) for x in sent[:-1]]
    assert here.sizes == sent.sizes == (1, 2, 3)
    assert here.positive.tolist() == [1, 2, 0, 4, 3, 6, 5, 7] and here.rank.tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    assert here.is_anchor.tolist() == [True] * 7 + [False] and here.size_index.tolist() == [2, 2, 2, 1, 1, 1, 1, 0]


def test_the_definition_gets_everything_on_the_device_of_the_embeddings(monkeypatch):
    monkeypatch.setattr(reference, "synthesize_negatives", lambda *args, **named: (*args, *named.values()))
    z, gate = torch.empty(4, 8, device="meta"), torch.empty(4, 4, 8, device="meta")
    with gcng.reference_mode():
        given = functional.synthesize_negatives(
            z, torch.tensor([0, 1, 0, 1]), gate, kappa=torch.tensor(0.3), mix=torch.rand(2, 1)
        )
    assert len(given) == 5 and all(x.is_meta for x in given)


def test_options_are_answered_from_the_host(monkeypatch):
    """Singletons and the authors' mask are known where the labels are."""
    strict = GCAHNGLoss(8, 6, singletons="error", official_sim_mask=True)
    batch = class_major_beside("test", EVEN, None, torch.device("meta"))
    assert strict._dropped_class(batch).is_meta
    ragged = class_major_beside("test", LABELS, None, torch.device("meta"))
    with pytest.raises(ValueError, match="same number of samples of every class, got 1 to 3"):
        strict._dropped_class(ragged)
    monkeypatch.setattr(gcahng, "class_major_beside", lambda *_: batch)
    assert strict._classes("test", torch.randn(8, 8), EVEN, None) is batch
    monkeypatch.undo()
    with pytest.raises(ValueError, match="class 1 has one sample"):
        strict.metric_terms(torch.randn(8, 8), LABELS)


def test_the_authors_mask_drops_the_same_entries():
    criterion = GCAHNGLoss(8, 6, official_sim_mask=True)
    batch = class_major(torch.tensor([3, 3, 1, 1, 0, 0]))
    # rank * 3 + class, over the two samples of a class
    assert criterion._dropped_class(batch).tolist() == [0, 1, 0, 2, 1, 2]


@pytest.fixture
def captured(monkeypatch):
    """As if a CUDA graph were being captured on the CPU."""
    monkeypatch.setattr(graph, "capturing", lambda device: True)
    monkeypatch.setattr(gcahng, "capturing", lambda device: True)


def test_a_capture_draws_on_the_device_and_not_from_the_generator(captured):
    criterion, generator = GCAHNGLoss(8, 6), torch.Generator().manual_seed(1)
    state, batch = generator.get_state(), class_major(LABELS)
    seeds = {int(criterion.graph.draw_dropout(generator).seed) for _ in range(3)}
    mixes = [criterion._mix("test", batch, None, generator, torch.randn(8, 8)) for _ in range(2)]
    assert len(seeds) == 3 and not torch.equal(*mixes) and mixes[0].shape == (3, 2)
    assert torch.equal(generator.get_state(), state)
    # What a graph-safe generator draws is a kernel on the device of the parameters and of the embeddings.
    criterion.graph.to("meta")
    assert criterion.graph.draw_dropout(generator).seed.is_meta
    assert criterion._mix("test", batch, None, generator, torch.empty(8, 8, device="meta")).is_meta


def test_outside_a_capture_the_generator_decides():
    criterion = GCAHNGLoss(8, 6)
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        mix = criterion._mix("test", class_major(LABELS), None, generator, torch.randn(8, 8))
        draws.append((int(criterion.graph.draw_dropout(generator).seed), mix.tolist()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_plan_counts_the_operands_of_the_passes_that_run(autocast):
    """Without Triton a GPU stashes 16-bit edges in 32 bits: the plan of 16 bits would take twice the budget."""
    z = torch.empty(512, 64, dtype=torch.float32 if autocast else torch.bfloat16)
    narrow, wide = (
        plan_memory(512, 64, 1, dtype="bfloat16", operand=operand, budget=2**40) for operand in ("bfloat16", "float32")
    )
    assert narrow.terms["hidden"] == wide.terms["hidden"] // 2 == 5 * (512 * 513 // 2) * 64 * 2
    budget = wide.terms["hidden"] + wide.terms["edges"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with forced_kernels(*TRITON):
            assert graph.memory_plan(z, 1, budget).stash_hidden
        with forced_kernels(*TORCH):
            assert not graph.memory_plan(z, 1, budget).stash_hidden


def test_the_default_budget_of_a_gpu_counts_the_cache_and_stays_while_a_graph_is_captured(monkeypatch):
    device, asked = torch.device("cuda", 7), []
    state = {"capturing": False, "free": 80, "reserved": 0, "allocated": 0, "now": 50.0}
    monkeypatch.setattr(graph, "_last_gpu_budget", {})
    monkeypatch.setattr(graph, "capturing", lambda device: state["capturing"])
    monkeypatch.setattr(graph.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (state["free"], 100))[1])
    for name in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda device, name=name: state[name])
    assert graph._gpu_budget(device) == 40
    state |= {"free": 20, "reserved": 60, "now": 51.0}  # what the first iteration used lies in the cache
    assert graph._gpu_budget(device) == 40
    state |= {"allocated": 30, "now": 51.9}
    assert graph._gpu_budget(device) == 40 and len(asked) == 2  # the driver is asked once a second
    state |= {"now": 52.0}
    assert graph._gpu_budget(device) == 25 and len(asked) == 3
    state |= {"free": 24, "now": 53.0}
    assert graph._gpu_budget(device) == 25 and len(asked) == 4  # 27 is close enough to keep the plan
    state |= {"capturing": True, "free": 2, "now": 99.0}
    assert graph._gpu_budget(device) == 25  # the plan of the warm-up, whose kernels are compiled
    assert graph._gpu_budget(torch.device("cuda", 3)) == (2 + 60 - 30) // 2


def test_a_trace_asks_for_the_budget_once_and_captures_nothing(monkeypatch):
    """What a plan asks of the machine is no part of a compiled graph: it would break it, or stop it."""
    budgets = [2**22, 2**10]
    monkeypatch.setattr(graph, "available_memory", lambda: 4 * budgets.pop(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", None)
    there, z = torch.device("cuda", 0), torch.ones(8, 8)
    plan = graph.memory_plan(z, 1, 2**22)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x * graph.memory_plan(x, 1, None).pairs_per_tile + (100 if capturing(there) else 0)

    for _ in range(2):
        assert torch.equal(traced(z), z * plan.pairs_per_tile)
    assert budgets == [2**10]

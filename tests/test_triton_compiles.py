"""Every launch of a training step, and every one that a module of kernels/ lists, compiles within the limits.

For sm_80, sm_90 and sm_100; of a training step's launches without products all are compiled for sm_90, and the rest
where tests are ``long``. Spills outside loops around products are printed, whether a test passes or not.
"""

from __future__ import annotations

import collections
import functools
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
import triton.language as tl  # noqa: E402

import gcng.kernels  # noqa: E402
from gcng.kernels import launch  # noqa: E402
from tests import ahead_of_time  # noqa: E402
from tests.ahead_of_time import Resources  # noqa: E402
from tests.shipped_launches import DTYPES, WIDTHS, Step, record  # noqa: E402
from tests.triton_interpreter import is_interpreting  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(3600)  # about 1 s for each kernel and architecture on an idle machine


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What modules launch alike, the sums of parts above all, is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


EVERYTHING = [*ahead_of_time.kernel_modules(), "shipped"]


@pytest.fixture(scope="module")
def compiled(one_cache: None, request: pytest.FixtureRequest) -> Callable[[str], list[Resources]]:
    """The resources of a name; all names that tests ask for are compiled together."""
    asked = [item.callspec.params["module"] for item in request.session.items if "compiled" in item.fixturenames]
    found = ahead_of_time.compile_all(list(dict.fromkeys(asked)))
    return found.__getitem__


def check_resources(resources: list[Resources], capsys: pytest.CaptureFixture) -> None:
    """Within the limits on every architecture."""
    print(*resources, sep="\n")
    with capsys.disabled():
        print(*[f"\n{x}" for x in resources if x.spills], end="")
    broken = [str(x) for x in resources if x.broken]
    assert not broken, "\n".join(broken)
    assert {x.architecture for x in resources} == set(ahead_of_time.ARCHITECTURES)


@pytest.mark.parametrize("module", EVERYTHING)
def test_kernels_compile(
    module: str, compiled: Callable[[str], list[Resources]], capsys: pytest.CaptureFixture
) -> None:
    check_resources(compiled(module), capsys)


@pytest.mark.long
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_launch_that_ships_compiles(dtype: torch.dtype, width: int, capsys: pytest.CaptureFixture) -> None:
    """About 100 launches for each of three architectures: five minutes."""
    name = f"shipped {str(dtype).removeprefix('torch.')} {width}"
    check_resources(ahead_of_time.compile_all([name])[name], capsys)


def test_every_kernel_is_compiled() -> None:
    names = [module.name for module in pkgutil.iter_modules(gcng.kernels.__path__)]
    modules = [importlib.import_module(f"gcng.kernels.{name}") for name in names]
    declared = {
        name for module in modules for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn") and value.fn.__module__ == module.__name__
    }  # fmt: skip
    work = [row for name in ahead_of_time.kernel_modules() for row in ahead_of_time.listed(name, (90,))]
    assert {started.kernel.fn.__name__ for _, started, _ in work} == declared
    # What a step launches and no module lists is compiled under another name, so that nothing is left out.
    known = {ahead_of_time.identity(started) for _, started, _ in [*work, *ahead_of_time.shipped("shipped", (90,))]}
    assert {ahead_of_time.identity(started) for started in record(Step(512, torch.bfloat16), 90)} <= known


def test_a_step_is_recorded_as_it_ships() -> None:
    steps = {arch: record(Step(128, torch.bfloat16), arch) for arch in (80, 90)}
    names = {arch: {started.kernel.fn.__name__ for started in launches} for arch, launches in steps.items()}
    # The launch table takes both maps in one kernel from sm_90 on, where nothing is kept for a backward.
    without = [record(Step(128, torch.bfloat16, kept=False), arch) for arch in (80, 90)]
    assert ["edge_mlp_kernel" in {x.kernel.fn.__name__ for x in launches} for launches in without] == [False, True]
    for kernel in ("negative_attention_radial", "edge_epilogue_backward", "anchor_gradient", "streamed_logit_panel"):
        assert all(f"{kernel}_kernel" in found for found in names.values()), kernel
    # The gradient of packed edges has their dtype.
    backward = [x for x in steps[90] if x.kernel.fn.__name__ == "edge_epilogue_backward_kernel"]
    assert {x.arguments["grad_ptr"].dtype for x in backward if x.arguments["PACKED"]} == {torch.bfloat16}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("width", "dtype"), [(512, torch.bfloat16), (128, torch.bfloat16), (512, torch.float32)])
def test_a_kernel_is_compiled_once_for_tiles_of_any_place(width: int, dtype: torch.dtype, kept: bool) -> None:
    """Classes of many sizes cut a batch at odd places: none of them may bring a compilation into the training."""
    launches = record(Step(width, dtype, batch=251, kept=kept, ragged=True), 90)
    programs = {ahead_of_time.program(started) for started in launches}
    once = {ahead_of_time.identity(started) for started in launches}
    again = collections.Counter(name for name, *_ in programs) - collections.Counter(name for name, *_ in once)
    # Rows and classes of a panel are multiples of 16 or not, on purpose (logit_tiles.py).
    again -= collections.Counter({"streamed_logit_panel_kernel": 3})
    assert not again, "compiled again for another alignment"
    assert len(launches) > 10 * len(programs)  # there were many tiles
    # Neither does a batch of another size, whose largest class has as many samples.
    other = record(Step(width, dtype, batch=238, kept=kept, ragged=True), 90)
    new = {ahead_of_time.program(started) for started in other} - programs
    assert not {name for name, *_ in new} - {"streamed_logit_panel_kernel"}


@triton.jit
def scaled_by_sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x * tl.sum(x, 0))


@pytest.mark.skipif(is_interpreting(), reason="kernels of this process are interpreted")
@pytest.mark.parametrize("arch", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize(("block", "spills"), [(64, False), (32_768, True)])
def test_a_cubin_declares_a_stack_where_its_code_spills(block: int, spills: bool, arch: int, tmp_path: Path) -> None:
    """A warp cannot hold 1,024 numbers a thread. What declares no stack is not disassembled, which takes long."""
    x = torch.empty(block, device="meta")
    with launch.recorded_launches(arch) as recording:
        launch.launch(scaled_by_sum_kernel, (1,), x, x, schedule=launch.Schedule(1, 1), BLOCK=block)
    cubin = ahead_of_time.compiled(recording.launches[0], arch).asm["cubin"]
    registers, stack = ahead_of_time.declared_usage(cubin)
    assert bool(stack) == bool(ahead_of_time._spills(ahead_of_time.disassembled(cubin))[0]) == spills
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"REG:{registers} STACK:{stack} " in done.stdout + done.stderr


WARM = """
import contextlib
from triton import knobs
from benchmarks import warm
from gcng.kernels import launch as shipped
found = []
knobs.compilation.listener = lambda **said: found.append(said["cache_hit"])
launches = warm.launches_of([warm.Step(16, warm.torch.float32, batch=8, dropout=0.0)], 90)
warm.pretend(90)
shipped._guard = lambda device: contextlib.nullcontext()
for one in launches[:6]:
    fixed = {p.name for p in one.kernel.params if p.is_constexpr}
    given = [value for name, value in one.arguments.items() if name not in fixed]
    constants = {name: value for name, value in one.arguments.items() if name in fixed}
    with contextlib.suppress(AttributeError):  # of the driver that stands in: it loads and starts nothing
        shipped.launch(one.kernel, (1,), *given, schedule=one.schedule, **constants)
print(found)
"""


def test_a_launch_finds_what_was_compiled_beforehand(tmp_path: Path) -> None:
    """`benchmarks.warm` compiles in processes of its own what another one would compile one after the other.

    The launch is the one that ships, up to where Triton has the program and asks the driver to load it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    run([sys.executable, "-m", "benchmarks.warm", "--smoke", "--processes", "2"])
    said = run([sys.executable, "-c", WARM]).stdout
    assert said.splitlines()[-1] == str([True] * 4 + [False] * 2)


SPILLING_LOOP = """
        /*0010*/                   LDL R1, [R2] ;
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0030*/                   STL [R2], R1 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   LDL R3, [R2] ;
        /*0060*/                   BRA 0x60 ;
"""


def test_spills_are_counted_where_they_are() -> None:
    code = [(int(address, 16), text) for address, text in ahead_of_time.INSTRUCTION.findall(SPILLING_LOOP)]
    assert ahead_of_time._spills(code) == (3, 2)
    assert ahead_of_time._spills(code[1:2] + code[3:]) == (1, 0)


HALF_PRODUCT = "%5 = tt.dot %3, %4, %2 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
FLOAT_PRODUCT = "%5 = tt.dot %3, %4, %2 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"shared": 228 * 1024}, "bytes of shared memory"),
        ({"spills": (4, 1)}, "in a loop around products"),
        ({"spills": (65, 0)}, "65 spills"),
        ({"ptx": "wgmma.mma_async mma.tf32"}, "tf32 in the PTX"),
        ({"ptx": "mma.sync"}, "no wgmma.mma_async"),
        ({"ptx": "mma.sync", "ttir": FLOAT_PRODUCT}, None),
        ({"ttgir": HALF_PRODUCT}, "1 of 1 products without wgmma"),
        ({"ttgir": HALF_PRODUCT, "ttir": f"{HALF_PRODUCT}\n{FLOAT_PRODUCT}"}, None),
        ({"arch": 80, "ptx": "mma.sync"}, "no cp.async"),
        ({"arch": 80, "ptx": "mma.sync cp.async"}, None),
    ],
)
def test_rules_can_be_broken(changes: dict, complaint: str | None) -> None:
    given = {"arch": 90, "shared": 1024, "spills": (0, 0), "ptx": "wgmma.mma_async", "ttir": HALF_PRODUCT, **changes}
    case = launch.CompilationCase("planted", lambda: None)
    assembly = {"ptx": given["ptx"], "ttir": given["ttir"], "ttgir": given.get("ttgir", "")}
    broken = ahead_of_time.broken_rules(case, "kernel", given["arch"], assembly, given["shared"], given["spills"])
    assert [complaint in line for line in broken] == ([] if complaint is None else [True])

"""Compiles the kernels that ship for GPUs that are not here, and holds what comes out to their limits.

What a training step launches is recorded from the ops (tests/shipped_launches.py), under the names "shipped" (what
every run of the tests compiles) and e.g. "shipped bfloat16 768" (all of one width). Beside it a module of ``kernels/``
lists launches in ``compilation_cases()``: forms that no step takes, dtypes and odd widths. Signatures are derived from
the recorded arguments as triton derives them, so what is compiled here is what a GPU would run.

    python -m tests.ahead_of_time class_cross_entropy --architectures 90     prints the resources of every kernel

Owns the rules (:func:`broken_rules`): shared memory within what a block may have, no register spilled in a loop
around products, other spills few or declared, tensor cores where products allow them, no tf32 unless asked for.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Local memory instructions outside the loops around products, paid once for a tile; versions of triton differ in them.
FEW_SPILLS = 64
# Products in SASS, by tensor cores and, for float32 without them, by fused multiply-add.
PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "DMMA")
TYPES = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "i1",
}  # fmt: skip
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
# Of the notes in a cubin: a note with a size of its own, registers, the smallest stack of a thread.
_SIZED, _REGISTERS, _STACK = 0x04, 0x2F, 0x12
BRANCH = re.compile(r"^BRA\b.*?0x([0-9a-f]+)")


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel compiled for one architecture."""

    case: str
    kernel: str
    architecture: int
    registers: int
    shared: int
    spills: int  # local memory instructions, all
    loop_spills: int  # those in innermost loops around products
    seconds: float
    broken: tuple[str, ...]

    def __str__(self) -> str:
        head = f"sm_{self.architecture:<3d} {self.case:40s} {self.kernel:44s}"
        body = f"{self.registers:3d} registers {self.shared / 1024:6.1f} KiB {self.spills:4d} spills, "
        return "\n    ".join([f"{head} {body}{self.loop_spills} in loops, {self.seconds:.1f} s", *self.broken])


def kernel_modules() -> list[str]:
    """Names of the modules in kernels/ that hold kernels, by their registry."""
    import gcng.kernels as package

    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    texts = {name: (Path(package.__path__[0]) / f"{name}.py") for name in names}
    return [n for n in names if texts[n].exists() and "\ndef compilation_cases(" in texts[n].read_text("utf-8")]


def _type_of(value: Any) -> tuple[str, bool]:
    """Triton's type of a runtime argument, and whether it is a multiple of 16; mirrors what a launch specializes on."""
    import torch

    if value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return "*" + TYPES[str(value.dtype).removeprefix("torch.")], aligned
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return ("constexpr" if value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"ahead_of_time: no triton type for an argument of type {type(value).__name__}")


def _signature(launch: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Signature, constants and attributes of a recorded launch, as ``triton.compiler.ASTSource`` wants them."""
    signature, constants, attributes = {}, {}, {}
    declared = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    anywhere = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize_on_alignment}
    for place, (name, value) in enumerate(launch.arguments.items()):
        kind, aligned = ("constexpr", False) if name in declared else _type_of(value)
        if name in general and name not in declared:
            # Neither made a constant where it is 1 nor known to be a multiple of 16, as a number or as a pointer.
            kind, aligned = _type_of(3 if isinstance(value, int) and value == 1 else value)[0], False
        signature[name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif aligned and name not in anywhere:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def identity(launch: Any) -> tuple:
    """What tells compiled programs apart, but for the alignment of arguments."""
    signature, constants, _ = _signature(launch)
    return launch.kernel.fn.__name__, repr(signature), repr(constants), launch.schedule


def program(launch: Any) -> tuple:
    """What tells compiled programs apart: a GPU compiles each of them once, when it first meets it."""
    return *identity(launch), repr(_signature(launch)[2])


def declared_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, by the notes in a cubin: the most of any function in it.

    Read here because cuobjdump takes half a second for each kernel, and most of them have no stack, hence no spills.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<II4Q", cubin, table + size * i) for i in range(count)]  # name, .., offset, size
    names = sections[names_at][4]
    most = {_REGISTERS: -1, _STACK: -1}
    for name, _, _, _, start, length in sections:
        if cubin[names + name : cubin.index(b"\0", names + name)] != b".nv.info":
            continue
        place = start
        while place < start + length:
            form, kind, extent = struct.unpack_from("<BBH", cubin, place)
            sized = form == _SIZED
            if sized and kind in most:
                most[kind] = max(most[kind], struct.unpack_from("<II", cubin, place + 4)[1])
            place += 4 + (extent if sized else 0)
    if min(most.values()) < 0:
        raise RuntimeError("the cubin does not say how many registers it takes, and what stack")
    return most[_REGISTERS], most[_STACK]


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """Instructions (address, text) of a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", str(path)], capture_output=True, text=True)
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(done.stdout)]
    if not code:
        raise RuntimeError(f"cuobjdump gave nothing to read: {done.stderr}")
    return code


def _spills(code: list[tuple[int, str]]) -> tuple[int, int]:
    """Local memory instructions in all, and in the innermost loops around products."""

    def count(texts: list[str], names: tuple[str, ...]) -> int:
        opcodes = collections.Counter(text.split()[0].split(".")[0] for text in texts)
        return sum(opcodes[name] for name in names)

    everything = [text for _, text in code]
    products = PRODUCTS if count(everything, PRODUCTS) else ("FFMA", "DFMA")
    loops = []
    for address, text in code:
        branch = BRANCH.match(text)
        if branch and int(branch[1], 16) < address:
            start = int(branch[1], 16)
            body = [inner for place, inner in code if start <= place <= address]
            if count(body, products):
                loops.append((start, address, count(body, ("LDL", "STL"))))
    innermost = [
        spilled for start, end, spilled in loops
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b, _ in loops)
    ]  # fmt: skip
    return count(everything, ("LDL", "STL")), sum(innermost)


def _tensor_core_products(ttir: str) -> list[bool]:
    """For each product of the kernel, whether every supported architecture multiplies its kind in tensor cores."""
    products = []
    for line in ttir.splitlines():
        if "tt.dot" in line and (operand := re.search(r": tensor<[0-9x]+x(\w+)", line)):
            products.append(operand[1] in ("f16", "bf16") or "inputPrecision = tf32" in line)
    return products


def broken_rules(case: Any, kernel: str, arch: int, assembly: dict, shared: int, spills: tuple[int, int]) -> list[str]:
    """What a compiled kernel does that it must not, in words; empty for a good one."""
    broken = []
    if shared > SHARED_MEMORY[arch]:
        broken.append(f"needs {shared} bytes of shared memory, a block has {SHARED_MEMORY[arch]}")
    # On sm_100 waits are placed out of line, so that a backward branch is no loop.
    if spills[1] and arch < 100:
        broken.append(f"{spills[1]} spills in a loop around products")
    if spills[0] > case.spills.get(kernel, FEW_SPILLS):
        broken.append(f"{spills[0]} spills, accepted are {case.spills.get(kernel, FEW_SPILLS)}")
    if not case.tf32 and "tf32" in assembly["ptx"]:
        broken.append("tf32 in the PTX, asked was ieee")
    products = _tensor_core_products(assembly["ttir"])
    if any(products) and kernel not in case.without_tensor_cores:
        wanted = [TENSOR_CORES[arch]] + (["cp.async"] if arch < 90 else [])
        broken += [f"no {name} in the PTX" for name in wanted if name not in assembly["ptx"]]
        # What became no warp group product is left as it was, and runs on mma.sync.
        if arch == 90 and all(products) and (left := len(re.findall(r"= tt\.dot\b", assembly["ttgir"]))):
            broken.append(f"{left} of {len(products)} products without wgmma")
    return broken


def compiled(launch: Any, arch: int) -> Any:
    """Triton's compiled kernel of a recorded launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(launch.kernel, *_signature(launch))
    options = {"num_warps": launch.schedule.num_warps, "num_stages": launch.schedule.num_stages}
    with contextlib.redirect_stdout(io.StringIO()):  # triton prints all of the PTX when ptxas fails
        return triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": True}
        )


def compile_launch(case: Any, launch: Any, arch: int) -> Resources:
    """Compile one recorded launch and judge it."""
    started, name = time.perf_counter(), launch.kernel.fn.__name__
    try:
        built = compiled(launch, arch)
    except Exception as error:
        reason = f"does not compile: {type(error).__name__}: {str(error).strip()[:2000]}"
        return Resources(case.name, name, arch, 0, 0, 0, 0, time.perf_counter() - started, (reason,))
    registers, stack = declared_usage(built.asm["cubin"])
    spills, shared = _spills(disassembled(built.asm["cubin"])) if stack else (0, 0), built.metadata.shared
    broken = tuple(broken_rules(case, name, arch, built.asm, shared, spills))
    return Resources(case.name, name, arch, registers, shared, *spills, time.perf_counter() - started, broken)


Work = list[tuple[Any, Any, int]]  # case, launch, architecture


def listed(module: str, architectures: tuple[int, ...]) -> Work:
    """The distinct launches of a module's ``compilation_cases()``."""
    from gcng.kernels.launch import recorded_launches

    seen, work = set(), []
    for case in importlib.import_module(f"gcng.kernels.{module}").compilation_cases():
        for arch in architectures:
            with recorded_launches(arch, tf32=case.tf32) as recording:
                case.call()
            if not recording.launches:
                raise RuntimeError(f"{module}: case {case.name} launches no kernel")
            for launch in recording.launches:
                place = (arch, identity(launch), repr(_signature(launch)), case.tf32)
                if place not in seen:
                    seen.add(place)
                    work.append((case, launch, arch))
    return work


def shipped(name: str, architectures: tuple[int, ...]) -> Work:
    """The distinct launches of training steps that no module lists: "shipped", or "shipped DTYPE WIDTH"."""
    from gcng.kernels.launch import CompilationCase
    from tests import shipped_launches

    everything = name != "shipped"
    steps = [*(shipped_launches.every(*name.split()[1:]) if everything else shipped_launches.always())]
    cases = [row for module in kernel_modules() for row in listed(module, architectures)]
    spills = {kernel: number for case, _, _ in cases for kernel, number in case.spills.items()}
    known, work = {(arch, identity(launch)) for _, launch, arch in cases}, []
    for step in steps:
        for arch in architectures:
            for launch in shipped_launches.record(step, arch):
                # A loop around products is what architectures differ in: elsewhere one of them stands for all.
                place, wanted = (arch, identity(launch)), everything or arch == 90 or "PRECISION" in launch.arguments
                if place in known or not wanted:
                    continue
                known.add(place)
                kernel = launch.kernel.fn.__name__
                # 16-bit operands of attention meet in 16 bits, their weighted sums in tf32.
                tf32 = step.tf32 or (kernel.startswith("negative_attention") and step.dtype.itemsize == 2)
                case = CompilationCase(str(step), record_nothing, tf32, spills=spills)
                work.append((case, launch, arch))
    return work


def record_nothing() -> None:
    """In place of a call, where the launches are known already."""


def compile_here(
    names: list[str], architectures: tuple[int, ...], share: int = 0, shares: int = 1
) -> Iterator[tuple[str, Resources]]:
    """Compile every distinct launch of modules, or of training steps, in this process, or one share of them."""
    work = [
        (name, item)
        for name in names
        for item in (shipped if name.startswith("shipped") else listed)(name, architectures)
    ]
    for name, item in work[share::shares]:
        yield name, compile_launch(*item)


def compile_all(names: list[str], architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, list[Resources]]:
    """:func:`compile_here` in child processes without the interpreter, by name; TRITON_CACHE_DIR is kept if set.

    One pair of processes for everything: to start one and to record launches takes longer than to compile a few.
    """
    shares = min(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"TRITON_CACHE_DIR": folder, **os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "tests.ahead_of_time", *names, "--json", "--architectures"]
        command += [*map(str, architectures), "--share"]
        children = [
            subprocess.Popen(
                [*command, str(share), str(shares)], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for share in range(shares)
        ]  # fmt: skip
        outputs = [child.communicate() for child in children]
    found: dict[str, list[Resources]] = {name: [] for name in names}
    for child, (output, errors) in zip(children, outputs, strict=True):
        if child.returncode != 0:
            raise RuntimeError(f"{names}: a compiling process ended with {child.returncode}\n{errors[-4000:]}")
        for name, row in json.loads(output.splitlines()[-1]):
            found[name].append(Resources(**{**row, "broken": tuple(row["broken"])}))
    return {name: sorted(rows, key=lambda x: (x.case, x.kernel, x.architecture)) for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help='modules of kernels/, e.g. class_cross_entropy, or "shipped"')
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--share", nargs=2, type=int, default=[0, 1], metavar=("INDEX", "COUNT"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compile_here(options.names, tuple(options.architectures), *options.share)
    if options.json:
        print(json.dumps([(name, dataclasses.asdict(x)) for name, x in found]))
    else:
        for _, x in found:
            print(x, flush=True)


if __name__ == "__main__":
    main()

"""What pyproject.toml cannot say: where the packages lie, and the optional compiled kernels.

Nothing here imports torch: a wheel builds in an environment that has setuptools and nothing else. Where torch is not
installed either it has no compiled kernels; `gcng build` makes them later. Compilers and flags are in gcng/build.py.
"""

import importlib
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
build = importlib.import_module("gcng.build")

try:
    PLAN = build.plan()
except build.BuildError as error:
    sys.exit(f"gcng: {error}")


class BuildPackage(build_py):
    """The Python files, then the libraries beside them: in the wheel, or in the checkout of an editable install."""

    def run(self):
        super().run()
        package = ROOT / "gcng" if self.editable_mode else Path(self.build_lib).resolve() / "gcng"
        build.build_package(PLAN, package / "_native")


class BinaryDistribution(Distribution):
    """The libraries are loaded by torch, not by Python: the wheel depends on the platform and on no Python version."""

    def has_ext_modules(self):
        return PLAN.cpu or PLAN.cuda


setup(
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    # kernels/ and csrc/ lie beside gcng/ but install inside it: PyPI has an unrelated package named kernels, and
    # `gcng build` needs the sources.
    package_dir={"gcng.kernels": "kernels", "gcng.csrc": "csrc"},
    packages=[
        *find_packages(include=["gcng", "gcng.*"]),
        "gcng.csrc",
        "gcng.kernels",
        *(f"gcng.kernels.{name}" for name in find_packages("kernels")),
    ],
)

"""What pyproject.toml cannot say: where the packages lie, and (later) the optional compiled extension.

Nothing here imports torch: a wheel builds in an environment that has setuptools and nothing else.
"""

from setuptools import find_packages, setup

setup(
    # kernels/ lies beside gcng/ but installs as gcng.kernels: PyPI has an unrelated package named kernels.
    package_dir={"gcng.kernels": "kernels"},
    packages=[
        *find_packages(include=["gcng", "gcng.*"]),
        "gcng.kernels",
        *(f"gcng.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[],
)

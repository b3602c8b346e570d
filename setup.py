"""Only the C++ extension: every other setting is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "fdfast._cpu",
            ["csrc/policy_head.cpp", "csrc/module.cpp"],
            depends=["csrc/policy_head.hpp"],
            cxx_std=20,
            # No -ffast-math: -inf and NaN keep their meaning. The pragmas name the sums that may be reordered.
            extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
        )
    ]
)

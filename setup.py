"""Only the C++ extension: every other setting is in pyproject.toml."""

import platform

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# No -ffast-math: -inf and NaN keep their meaning. The pragmas name the sums that may be reordered.
FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")  # for the clone that has such vectors

setup(
    ext_modules=[
        Pybind11Extension(
            "fdfast._cpu",
            ["csrc/policy_head.cpp", "csrc/module.cpp"],
            depends=["csrc/policy_head.hpp"],
            cxx_std=20,
            extra_compile_args=FLAGS,
        )
    ]
)

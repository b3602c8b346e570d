"""The two C++ extensions alone: every other setting is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# No -ffast-math: -inf and NaN keep their meaning.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

setup(
    ext_modules=[
        Pybind11Extension(
            "fdfast._cpu",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=20,
            extra_compile_args=FLAGS,
        ),
        Pybind11Extension(
            "fdfast._replio",
            sorted(glob("csrc/replio/*.cpp")),
            depends=sorted(glob("csrc/replio/**/*.[ch]*", recursive=True)),
            cxx_std=20,
            extra_compile_args=["-O3"],
            extra_link_args=["-pthread"],
        ),
    ]
)

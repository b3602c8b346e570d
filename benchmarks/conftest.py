"""Options of `pytest benchmarks`; `make bench` and `make gpu` give them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # counted when torch is imported

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.addoption("--quick", action="store_true", help="few tokens, one turn: a trial")

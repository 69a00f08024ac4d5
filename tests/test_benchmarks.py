"""The benchmark of the training step still fits the code that it times (its figures are no test's)."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def training_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_step", FOLDER / "training_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_run_and_its_products_are_recorded(training_step: ModuleType) -> None:
    step = training_step.step_of("small", 2, "cpu", "fp32")
    with training_step.Recorder() as recorder:
        step()
    assert sum(recorder.products.values()) > 100
    alone, operations = training_step.products_alone(recorder.products, "cpu")
    # some ten tokens through MiniLM's eleven million parameters, forward and backward, five times
    assert alone > 0 and 2e9 < operations < 1e12

"""The public face of the package: its names are frozen, importing it is cheap, and each works after all else is imported."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import pe_dpo

PUBLIC = {
    *("Run", "load_recipe", "train", "evaluate", "compare", "merge", "describe"),
    *("preference_loss", "completion_logprobs", "answer_logprobs", "mixout", "attach_mixout", "MixLinear"),
}
"""`answer_logprobs` is the older name of `completion_logprobs`."""
PROVISIONAL = {"Policy"}
"""May still change."""


def test_the_public_names_are_these() -> None:
    assert set(pe_dpo.__all__) == PUBLIC | PROVISIONAL


def test_every_public_name_is_a_function_or_a_class_after_all_modules_were_imported() -> None:
    """A package of the same name would hide a function once it is imported."""
    for module in pkgutil.walk_packages(pe_dpo.__path__, "pe_dpo."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert [name for name in pe_dpo.__all__ if not callable(getattr(pe_dpo, name))] == []
    assert pe_dpo.answer_logprobs is pe_dpo.completion_logprobs
    assert pe_dpo.load_recipe.__module__.startswith("pe_dpo.recipe")
    out = pe_dpo.preference_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), beta=1.0)
    assert float(out.loss) == float(torch.nn.functional.softplus(torch.tensor(-1.0)))


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
def test_importing_the_package_and_reading_a_run_load_no_torch() -> None:
    assert loaded_by("import pe_dpo") & {"torch", "numpy", "pydantic", "yaml"} == set()
    assert "torch" not in loaded_by("from pe_dpo import Run, load_recipe; Run('nowhere').info")


@pytest.mark.slow
def test_reports_and_comparisons_load_no_torch() -> None:
    modules = "pe_dpo.experiments.compare, pe_dpo.report.write, pe_dpo.report.sweep_report, pe_dpo.report.run_report"
    assert "torch" not in loaded_by(f"import {modules}")

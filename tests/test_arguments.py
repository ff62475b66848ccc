"""Options as plain values: they need no torch, and write themselves down as arguments."""

import subprocess
import sys

import pytest

from abliterate.arguments import cli_arguments
from abliterate.editing.options import EditOptions
from abliterate.extraction.options import DirectionRecipe, ExtractionOptions, Thresholds
from abliterate.models.options import ModelOptions


@pytest.mark.parametrize(
    "module",
    [
        "models.options",
        "extraction.options",
        "editing.options",
        "release.options",
        "evaluation.report",
        "evaluation.audit_report",
        "interventions.trace_report",
    ],
)
def test_options_import_no_torch(module):
    program = f"import sys, abliterate.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_defaults_need_no_arguments():
    for options in (ExtractionOptions(), EditOptions(), ModelOptions()):
        assert cli_arguments(options) == []


def test_what_differs_from_the_defaults_is_written():
    options = ExtractionOptions(
        n_train=64,
        thresholds=Thresholds(kl=0.25),
        refusal_tokens=("I", " Sorry"),
        filter="none",
        recipe=DirectionRecipe(variant="projected", winsorize=0.01),
    )
    expected = ["--n-train", "64", "--kl-threshold", "0.25", "--refusal-token", "I", "--refusal-token"]
    assert cli_arguments(options) == [
        *expected,
        " Sorry",
        "--filter",
        "none",
        *("--variant", "projected", "--winsorize", "0.01"),
    ]
    assert cli_arguments(EditOptions(components=("attn", "mlp"), layers=(4, 10))) == [
        *("--components", "attn,mlp"),
        *("--layers", "4:10"),
    ]


def test_what_is_about_the_machine_is_left_out():
    assert cli_arguments(ModelOptions(device="cuda:1", batch_size=4, system_prompt="")) == ["--system-prompt", ""]

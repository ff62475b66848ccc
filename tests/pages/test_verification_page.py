"""The page of a verification: what verified, failed and partial checkpoints show."""

import functools
from pathlib import Path

import pytest

from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.pages.verification_page import write_verification_page
from abliterate.release.options import VerificationOptions
from abliterate.release.report import VerificationReport
from abliterate.release.verification import verify_checkpoint
from tests.cli.test_verify import undo
from tests.support.command_line import CommandLine
from tests.support.pages import Page
from tests.support.tiny_models import random_direction, save_chat_model, tiny_llama


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    base = save_chat_model(tmp_path / "base", tiny_llama())
    direction = make_direction(mean_difference=random_direction())
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def verified(edited: Path) -> functools.partial[VerificationReport]:
    return functools.partial(verify_checkpoint, checkpoint=edited)


def test_verified_it_shows_the_stream_the_logits_and_the_tensors(verified, tmp_path: Path) -> None:
    report = verified(options=VerificationOptions(n_prompts=1))
    path = write_verification_page(report, tmp_path / "page", command="abliterate verify out")
    page = Page(path.read_text())
    words = " ".join(page.text)
    assert page.balanced
    for each in ("Verified: what the record says was done", "final norm", "what rounding explains", "All 11 edited"):
        assert each in words
    assert (tmp_path / "page" / "stream.svg").is_file()
    # Base, edited and ablated lines, and the tolerance, on a scale of powers of ten.
    assert len(page.of("path")) == 4
    assert "0.001" in words


def test_from_files_alone_there_is_no_stream(verified, tmp_path: Path) -> None:
    path = write_verification_page(verified(options=VerificationOptions(quick=True)), tmp_path / "page", command="x")
    assert "The direction in the residual stream" not in path.read_text()
    assert not (tmp_path / "page" / "stream.svg").exists()


def test_what_failed_comes_first(call_main: CommandLine, edited: Path, tmp_path: Path) -> None:
    undo(tmp_path / "base", edited, "model.layers.2.mlp.down_proj.weight")
    result = call_main("verify", edited, "--quick", "--report", tmp_path / "page")
    assert result.exit_code == 1
    text = (tmp_path / "page" / "index.html").read_text()
    assert "Not verified." in text
    assert text.index("model.layers.2.mlp.down_proj.weight") < text.index("Edited tensors, reread")


def test_a_report_over_a_file_is_refused_before_anything_is_read(call_main: CommandLine, edited, tmp_path) -> None:
    (tmp_path / "page").write_text("mine")
    result = call_main("verify", edited, "--quick", "--report", tmp_path / "page")
    assert result.exit_code == 1
    assert (tmp_path / "page").read_text() == "mine"
    assert len(result.stderr.splitlines()) == 1

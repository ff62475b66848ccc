"""Verification of models whose tie config.json does not tell: in the text section alone, or undone by another head."""

import json
from pathlib import Path

import pytest

from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.options import ModelOptions
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import VerificationReport, verify_checkpoint
from tests.support.conformance import build_model
from tests.support.tiny_models import CHAT_VOCABULARY, make_tokenizer, random_direction

KEY = "tie_word_embeddings"


def save_model(path: Path, model_type: str, *, tied: bool) -> None:
    text = {"vocab_size": CHAT_VOCABULARY, "max_position_embeddings": 512, KEY: tied}
    build_model(model_type, tie_word_embeddings=tied, text_config=text).float().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config.pop(KEY, None)
    config["text_config"].pop(KEY, None)
    if tied:
        config["text_config"][KEY] = True
    (path / "config.json").write_text(json.dumps(config))


def verified(base: Path, out: Path, options: EditOptions) -> VerificationReport:
    direction = make_direction(mean_difference=random_direction(64))
    orthogonalize_checkpoint(source=base, direction=direction, output=out, options=options)
    report = verify_checkpoint(
        checkpoint=out, options=VerificationOptions(n_prompts=1), model_options=ModelOptions(device="cpu")
    )
    assert report.failures == ()
    assert report.passed
    return report


@pytest.mark.parametrize("policy", ["edit", "untie", "skip"])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "llama4"])
def test_a_tie_in_the_text_section_alone(tmp_path, model_type, policy):
    save_model(tmp_path / "base", model_type, tied=True)
    report = verified(tmp_path / "base", tmp_path / "out", EditOptions(tied=policy))
    assert report.logits is not None
    assert report.logits.judged == (policy == "untie")


def test_a_head_of_its_own_where_the_class_ties_by_default(tmp_path):
    save_model(tmp_path / "base", "mistral3", tied=False)
    report = verified(tmp_path / "base", tmp_path / "out", EditOptions())
    assert report.logits is not None
    assert report.logits.judged

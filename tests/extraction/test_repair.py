"""A model that was trained to refuse harmless requests too: false refusals go and true ones stay, or it is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.directions import orthogonal_to
from abliterate.errors import InputError, InterruptedRunError, NoDirectionError, PromptSetError, RefusalBehaviourError
from abliterate.extraction.options import ExtractionOptions, RepairOptions, Thresholds
from abliterate.extraction.repair import extract_repair
from abliterate.extraction.scoring import CandidateScorer
from abliterate.models.hooks import ablate_direction
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import prompt_hash
from tests.support.refusing_models import RefusingModel, is_refused, refusing_model

OPTIONS = ExtractionOptions(n_train=48, n_val=24, thresholds=Thresholds(kl=5.0))


@pytest.fixture(scope="module")
def wary(tmp_path_factory: pytest.TempPathFactory) -> RefusingModel:
    return refusing_model("wary", tmp_path_factory.mktemp("wary"))


def files_of(model: RefusingModel) -> dict[str, str]:
    return {"harmful": str(model.harmful), "harmless": str(model.harmless)}


def refused(model: RefusingModel, prompts: list[str]) -> int:
    rows = model.chat.encode(prompts)
    replies = [model.chat.decode(reply) for reply in model.chat.generate(rows, max_new_tokens=6)]
    return sum("cannot help" in reply for reply in replies)


def test_false_refusals_go_and_true_ones_stay(wary: RefusingModel) -> None:
    found = extract_repair(
        model=wary.chat, **files_of(wary), options=OPTIONS, repair=RepairOptions(borderline=str(wary.borderline))
    )
    report = found.report
    harmful = wary.harmful.read_text().splitlines()
    false = [text for text in wary.borderline.read_text().splitlines() if is_refused(text, "wary")]
    assert refused(wary, harmful) == len(harmful)
    assert refused(wary, false) == len(false)
    with ablate_direction(wary.chat, found.direction.vector):
        assert refused(wary, harmful) >= 0.9 * len(harmful)
        assert refused(wary, false) <= 0.5 * len(false)

    # What the replies were counted to be is what they are.
    one = next(
        one
        for one in report.confirmed
        if (one.position, one.layer) == (report.selected.position, report.selected.layer)
    )
    assert one.lost <= report.options.max_lost
    assert one.borderline < one.n_borderline
    assert report.selected.bypass < report.baseline["borderline"]
    assert 0 < report.share_left <= 1
    # The truth about the prompts was found: half of the borderline ones are refused.
    counts, n_train = report.counts["borderline_train"], report.answered["train"]
    assert counts.kept + n_train == counts.sampled

    metadata = found.direction.metadata
    assert metadata["goal"] == "repair"
    assert metadata["arguments"][:2] == ["--goal", "repair"]
    texts = [*wary.borderline.read_text().splitlines()]
    assert {prompt_hash(text) for text in texts} <= set(metadata["prompt_hashes"])
    assert "borderline_train" in metadata["prompt_sets"]


def test_the_direction_is_orthogonal_to_the_true_one_wholly_or_in_part(wary: RefusingModel) -> None:
    vectors = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = torch.nn.functional.cosine_similarity(vectors, others, dim=-1)
    assert float(before.abs().max()) > 0.1
    wholly = orthogonal_to(vectors, others, share=1.0)
    assert float(torch.nn.functional.cosine_similarity(wholly, others, dim=-1).abs().max()) < 1e-14
    component = (vectors * others).sum(-1) / others.norm(dim=-1)
    half = orthogonal_to(vectors, others, share=0.5)
    torch.testing.assert_close((half * others).sum(-1) / others.norm(dim=-1), component / 2)
    torch.testing.assert_close(orthogonal_to(vectors, others, share=0.0), vectors)
    torch.testing.assert_close(orthogonal_to(vectors, torch.zeros_like(others), share=1.0), vectors)


def test_where_every_candidate_costs_true_refusals_that_is_said(wary: RefusingModel) -> None:
    # KL can be no less than nothing: nothing passes, and what would is named.
    strict = replace(OPTIONS, thresholds=Thresholds(kl=0.0))
    repair = RepairOptions(borderline=str(wary.borderline))
    with pytest.raises(NoDirectionError, match=r"nearest: position -\d, layer \d .*--kl-threshold 0\.\d+ would accept"):
        extract_repair(model=wary.chat, **files_of(wary), options=strict, repair=repair)


def test_a_model_without_false_refusals_has_nothing_to_repair(tmp_path: Path) -> None:
    plain = refusing_model("plain", tmp_path)
    # All of them are answered by a model that was not taught to be wary.
    file = tmp_path / "calm.txt"
    file.write_text("\n".join(plain.harmless.read_text().splitlines()[80:]) + "\n")
    harmless = tmp_path / "few.txt"
    harmless.write_text("\n".join(plain.harmless.read_text().splitlines()[:80]) + "\n")
    with pytest.raises(RefusalBehaviourError, match=r"refuses 0 of .* borderline prompts of the train part"):
        extract_repair(
            model=plain.chat,
            harmful=str(plain.harmful),
            harmless=str(harmless),
            options=OPTIONS,
            repair=RepairOptions(borderline=str(file)),
        )


@pytest.mark.parametrize(
    ("options", "model_options", "name"),
    [
        (replace(OPTIONS, rank=2), None, "--rank"),
        (replace(OPTIONS, n_bootstrap=5), None, "--bootstrap"),
        (replace(OPTIONS, exhaustive=True), None, "--exhaustive"),
        (replace(OPTIONS, confirm=2), None, "--confirm"),
        (replace(OPTIONS, filter="none"), None, "--filter none"),
        (replace(OPTIONS, filter="metric"), None, "--filter metric"),
        (OPTIONS, ModelOptions(stream_layers=True), "--stream-layers"),
    ],
)
def test_what_does_not_go_with_a_repair_is_refused_by_name(
    wary: RefusingModel, options: ExtractionOptions, model_options: ModelOptions | None, name: str
) -> None:
    with pytest.raises(InputError, match=f"{name} cannot go with --goal repair"):
        extract_repair(model=wary.chat, **files_of(wary), options=options, model_options=model_options)


def test_shares_are_between_0_and_1() -> None:
    for wrong in ({"orthogonal": 1.5}, {"max_lost": -0.1}, {"orthogonal": float("nan")}):
        with pytest.raises(InputError, match="between 0 and 1"):
            RepairOptions(**wrong)


def test_borderline_prompts_that_are_all_among_the_others_are_none(wary: RefusingModel, tmp_path: Path) -> None:
    harmless = tmp_path / "same.txt"
    harmless.write_text(wary.harmless.read_text())
    with pytest.raises(PromptSetError, match="no borderline prompts are left"):
        extract_repair(
            model=wary.chat,
            **files_of(wary),
            options=replace(OPTIONS, n_train=120, n_val=40),
            repair=RepairOptions(borderline=str(harmless)),
        )


def test_interrupted_it_goes_on_with_what_is_recorded_and_scored(
    wary: RefusingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "model"
    wary.chat.model.save_pretrained(saved)
    wary.chat.tokenizer.save_pretrained(saved)
    given = {
        "model": saved,
        **files_of(wary),
        "options": OPTIONS,
        "repair": RepairOptions(borderline=str(wary.borderline)),
        "model_options": ModelOptions(system_prompt=wary.chat.system_prompt),
    }
    extract_repair(**given).direction.save(tmp_path / "whole")
    score = CandidateScorer.score
    calls: list[str] = []

    def interrupted(self, name, candidates, prompts=None):
        if name == "kl":
            raise KeyboardInterrupt
        calls.append(name)
        return score(self, name, candidates, prompts)

    monkeypatch.setattr(CandidateScorer, "score", interrupted)
    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        extract_repair(**given, work_directory=tmp_path / "work")
    assert calls
    assert {path.suffix for path in (tmp_path / "work").iterdir()} == {".json", "", ".jsonl", ".safetensors"}
    calls.clear()
    monkeypatch.setattr(CandidateScorer, "score", lambda self, *given: calls.append(given[0]) or score(self, *given))
    monkeypatch.setattr("abliterate.extraction.repair.record", None)
    extract_repair(
        **given, work_directory=tmp_path / "work", deliver=lambda found: found.direction.save(tmp_path / "resumed")
    )
    assert calls[0] == "kl"
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "work").exists()

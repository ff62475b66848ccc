"""The table of docs/inspection.md is what `inspect` says of pairs of which it is known what was done."""

import pytest
import torch

from tests.support.changed_models import CASES, Case, cells, inspect_case, recovered_cosine, written


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a commit needs: each verdict, each way of restoring lengths, each side of a limit.
_PROOF = {
    "orthogonalize, float16",
    "orthogonalize --layers 1:3",
    "orthogonalize --strength 2",
    "orthogonalize, tied embeddings",
    "orthogonalize --tied skip",
    "projected in float32, rounded once",
    "strengths that rise with the layer",
    *(f"LoRA merged, rank {rank}" for rank in (2, 4, 8, 16)),
    "fine-tuned, by 1 %",
    "the same FP8",
    "projected, then float16",
}
_CASES = [pytest.param(case, marks=pytest.mark.proof) if case.name in _PROOF else case for case in CASES]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_what_was_done_is_said(tmp_path, case: Case):
    found = inspect_case(case, tmp_path)
    pair = found.report.pair
    assert pair is not None
    said = (pair.verdict, pair.exact, pair.partial, pair.restored_norms)
    is_partial = case.verdict == "directional" and not case.exact
    assert said == (case.verdict, case.exact, is_partial, case.restored), pair.reason
    assert (None if pair.directions is None else pair.directions.scope) == case.scope
    assert (0 if pair.directions is None else pair.directions.k) == case.k
    strengths = [tensor.strength for tensor in pair.changed if tensor.strength is not None]
    if case.strength is not None:
        assert (min(strengths), max(strengths)) == pytest.approx(case.strength, abs=0.02)
    else:
        assert not strengths
    if case.rank is not None:
        assert pair.low_rank is not None
        assert (pair.low_rank.least_rank, pair.low_rank.rank) == (case.rank, case.rank)
        assert pair.low_rank.targets == ("mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    if case.vectors is not None:
        assert recovered_cosine(case, found) > 0.999
    assert found.report.record.problems == ()
    assert cells(case, found) in written().splitlines(), "run `python -m scripts.inspection_table`"


def test_the_page_has_every_pair():
    assert [line.split(" | ")[0].removeprefix("| ") for line in written().splitlines()[2:]] == [
        case.name for case in CASES
    ]

import pytest

from abliterate.editing.checks import reasons_against_clean_stream, reasons_against_equal_logits

FULL = {"components": ["embed", "attn", "mlp"], "layers": None, "strength": 1.0}
CHAIN = [{"weight": "norm.weight", "plus_one": False, "centered": False}]


def record(*, tied: bool = False, chain: bool = False, **options) -> dict:
    return {
        "base": {"tied_embeddings": tied},
        "options": FULL | options,
        "tensors": [{"name": "x", "norm_chain": CHAIN if chain else []}],
    }


@pytest.mark.parametrize(
    ("content", "stream", "logits"),
    [
        (record(), None, None),
        (record(strength=0.5), "strength is 0.5, so 0.5", "strength"),
        (record(strength=2.0), "strength is 2, so 1 ", "strength"),
        (record(layers=[3, 5]), "only layers 3 to 4", "layers"),
        (record(components=["mlp"]), "left out: embed, attn", "left out"),
        (record(add=1.0), "addition", "addition"),
        (record(tied=True), None, "output head was edited"),
        (record(tied=True, tied_option="edit"), None, "output head"),
        (record(chain=True), None, "norms stand between"),
        (record(preserve_norms=True), None, "norms were preserved"),
    ],
)
def test_reasons(content, stream, logits):
    for reasons, expected in (
        (reasons_against_clean_stream(content), stream),
        (reasons_against_equal_logits(content), logits),
    ):
        assert (expected is None) == (not reasons)
        assert expected is None or expected in reasons[0]


def test_policies_for_tied_embeddings():
    def policy(name: str) -> dict:
        content = record(tied=True)
        return content | {"options": content["options"] | {"tied": name}}

    assert reasons_against_equal_logits(policy("untie")) == ()
    assert reasons_against_clean_stream(policy("edit")) == ()
    assert "skipped" in reasons_against_clean_stream(policy("skip"))[0]
    untied = policy("skip") | {"base": {"tied_embeddings": False}}
    assert reasons_against_clean_stream(untied) == ()

"""The arguments that options are written down as: parsed by the commands themselves they give the same options."""

import json
import subprocess
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.arguments import cli_arguments
from abliterate.directions import encode_rows
from abliterate.editing.model_card import build_model_card
from abliterate.editing.options import ROLES, EditOptions, QuantizedPolicy, TiedPolicy
from abliterate.editing.strengths import Strengths
from abliterate.errors import InputError
from abliterate.evaluation.report import EvaluationOptions, Intervention, TaskOptions
from abliterate.extraction.options import DirectionRecipe, ExtractionOptions, Filter, PromptSources, Thresholds, Variant
from abliterate.interventions.refinement_options import RefinementOptions
from abliterate.models.options import Dtype, ModelOptions
from tests.support.fake_hub import evaluation_report, write_checkpoint

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
FLOATS = st.floats(-5, 5, allow_nan=False)
SHARES = st.floats(0.01, 0.45)

EXTRACTIONS = st.builds(
    ExtractionOptions,
    n_train=st.integers(8, 500),
    n_val=st.integers(1, 99),
    seed=st.integers(0, 2**31),
    thresholds=st.builds(Thresholds, kl=FLOATS, induce=FLOATS, prune_layers=SHARES),
    refusal_tokens=st.lists(TEXT, max_size=3).map(tuple),
    filter=st.sampled_from(get_args(Filter)),
    confirm=st.none() | st.integers(0, 5),
    exhaustive=st.booleans(),
    recipe=st.builds(DirectionRecipe, variant=st.sampled_from(get_args(Variant)), winsorize=st.none() | SHARES),
    rank=st.integers(1, 4),
    n_bootstrap=st.sampled_from([0, 10]),
)
SOURCES = st.builds(PromptSources, harmful=st.sampled_from(["bundled", "org/set@v1:test"]))
MODELS = st.builds(ModelOptions, dtype=st.sampled_from(get_args(Dtype)), system_prompt=st.none() | TEXT)
EDITS = st.builds(
    EditOptions,
    components=st.sampled_from([ROLES, ROLES[1:], ("mlp",)]),
    layers=st.none() | st.tuples(st.integers(0, 5), st.integers(6, 40)),
    strength=st.floats(0.1, 3),
    tied=st.sampled_from(get_args(TiedPolicy)),
    preserve_norms=st.booleans(),
    quantized=st.sampled_from(get_args(QuantizedPolicy)).filter(lambda policy: policy != "requantize"),
) | st.builds(EditOptions, add=FLOATS.filter(bool))
EVALUATIONS = st.builds(
    EvaluationOptions,
    texts=st.lists(st.sampled_from(["bundled", "org/texts"]), min_size=1, max_size=2).map(tuple),
    max_new_tokens=st.integers(1, 999),
    thinking=st.booleans(),
    intervention=st.sampled_from(get_args(Intervention)),
    judges=st.lists(st.sampled_from(["org/guard", "org/other"]), max_size=2).map(tuple),
    tasks=st.builds(TaskOptions, tasks=st.lists(st.sampled_from(["arc", "mmlu"]), max_size=2).map(tuple)),
)
REFINEMENTS = st.builds(
    RefinementOptions,
    n_train=st.integers(8, 500),
    n_val=st.integers(8, 99),
    seed=st.integers(0, 2**31),
    steps=st.integers(4, 99),
    max_refusals=st.floats(0, 1),
    max_kl=st.none() | st.floats(0, 5),
    reply_tokens=st.integers(4, 99),
)
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def parsed(call_main, llama_directory, tmp_path, monkeypatch):
    """What a command hands to the library when it is called with some arguments."""
    given: dict[str, Any] = {}

    def take(**values: Any) -> None:
        given.update(values)
        raise InputError("seen")

    for name in (
        "extraction.run.extract_direction",
        "evaluation.run.evaluate_model",
        "interventions.refining.refine_edit",
    ):
        monkeypatch.setattr(f"abliterate.{name}", take)
    monkeypatch.setattr("abliterate.editing.orthogonalization.orthogonalize_checkpoint", take)

    def parse(command: str, *arguments: str) -> dict[str, Any]:
        given.clear()
        outcome = call_main(command, llama_directory, *arguments)
        assert outcome.error_line == "error: seen"
        return dict(given)

    return parse


@FAST
@given(sources=SOURCES, options=EXTRACTIONS, model=MODELS)
def test_extract(parsed, tmp_path, sources, options, model):
    words = [word for each in (sources, options, model) for word in cli_arguments(each)]
    given = parsed("extract", "-o", str(tmp_path / "r.safetensors"), *words)
    assert (given["harmful"], given["harmless"]) == (sources.harmful, sources.harmless)
    assert given["options"] == options
    assert given["model_options"] == model


@FAST
@given(sources=SOURCES, options=REFINEMENTS, model=MODELS)
def test_refine(parsed, tmp_path, sources, options, model):
    words = [word for each in (sources, options, model) for word in cli_arguments(each)]
    given = parsed("refine", "--direction", "r.safetensors", "-o", str(tmp_path / "s.json"), *words)
    assert (given["harmful"], given["harmless"]) == (sources.harmful, sources.harmless)
    assert given["options"] == options
    assert given["model_options"] == model


@FAST
@given(options=EDITS)
def test_orthogonalize(parsed, tmp_path, options):
    words = ["--direction", "r.safetensors", "-o", str(tmp_path / "out"), *cli_arguments(options)]
    assert parsed("orthogonalize", *words)["options"] == options


@FAST
@given(options=EVALUATIONS)
def test_evaluate(parsed, options):
    assert parsed("evaluate", *cli_arguments(options))["options"] == options


def test_folders_of_this_machine_are_not_written_down(tmp_path):
    prompts = tmp_path / "mine.csv"
    prompts.write_text("prompt\n")
    options = PromptSources(harmful=f"{prompts}:prompt", harmless="/gone/other.txt")
    assert cli_arguments(options) == ["--harmful", "mine.csv:prompt", "--harmless", "other.txt"]
    assert cli_arguments(PromptSources(harmful="org/set@v1:test")) == ["--harmful", "org/set@v1:test"]


@pytest.fixture
def record(tmp_path):
    return json.loads((write_checkpoint(tmp_path / "out") / "abliteration.json").read_text())


def lines_of(card: str) -> list[str]:
    return card.split("```sh\n")[1].split("\n```")[0].splitlines()


def words_of(line: str) -> list[str]:
    """Return the words of a command as bash reads it."""
    done = subprocess.run(["bash", "-c", f'f() {{ printf "%s\\0" "$@"; }}; f {line}'], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_the_card_says_what_was_given(record, parsed, tmp_path):
    options = ExtractionOptions(
        n_train=64, refusal_tokens=(" I", "\n", "it's"), recipe=DirectionRecipe(variant="projected", winsorize=0.01)
    )
    model = ModelOptions(system_prompt="-Be\nkind; $(rm) `x` \\ é")
    record["directions"][0]["metadata"] |= {
        "arguments": [*cli_arguments(options), *cli_arguments(model)],
        "dtype": "bfloat16",
    }
    evaluation = evaluation_report(arguments=cli_arguments(EvaluationOptions(max_new_tokens=32)))
    card = build_model_card(record=record, evaluation=evaluation, facts=None, title="m")
    extract, _, evaluate = map(words_of, lines_of(card))
    given = parsed("extract", "-o", str(tmp_path / "r"), *extract[extract.index("refusal.safetensors") + 1 :])
    assert given["options"] == options
    assert given["model_options"] == ModelOptions(system_prompt=model.system_prompt, dtype="bfloat16")
    assert evaluate[-2:] == ["--max-new-tokens", "32"]


def test_the_card_says_how_strengths_were_found(record, parsed, tmp_path):
    options = RefinementOptions(steps=16, max_kl=0.1)
    strengths = Strengths(
        file="my s.json",
        direction_sha256="abc",
        embed=0.0,
        attn=(0.5, 1.0),
        mlp=(0.0, -1.0),
        directions=encode_rows(np.eye(2)),
        arguments=tuple(cli_arguments(options)),
    )
    # As a record holds them.
    record["options"] = json.loads(json.dumps(asdict(EditOptions(strengths=strengths))))
    card = build_model_card(record=record, evaluation=None, facts=None, title="m")
    _, refine, orthogonalize = map(words_of, lines_of(card))
    assert refine[refine.index("--direction") :][:4] == ["--direction", "refusal.safetensors", "-o", "my s.json"]
    given = parsed(
        "refine", "--direction", "r.safetensors", "-o", str(tmp_path / "s"), *refine[refine.index("-o") + 2 :]
    )
    assert given["options"] == options
    assert orthogonalize[-2:] == ["--strengths", "my s.json"]
    assert "base64" not in card
    assert EditOptions.of_record(record["options"]) == EditOptions(strengths=strengths)


def test_directions_of_one_extraction_are_one_command(record):
    metadata = {"arguments": ["--rank", "2"], "rank": 2}
    first = record["directions"][0]
    record["directions"] = [first | {"metadata": metadata | {"number": number}} for number in (1, 2)]
    extract, orthogonalize = map(
        words_of, lines_of(build_model_card(record=record, evaluation=None, facts=None, title="m"))
    )
    assert extract[-4:] == ["-o", "refusal.safetensors", "--rank", "2"]
    files = [word for word in orthogonalize if word.endswith(".safetensors")]
    assert files == ["refusal.1.safetensors", "refusal.2.safetensors"]
    record["directions"] = record["directions"][1:]
    extract, orthogonalize = map(
        words_of, lines_of(build_model_card(record=record, evaluation=None, facts=None, title="m"))
    )
    assert [word for word in orthogonalize if word.endswith(".safetensors")] == ["refusal.2.safetensors"]

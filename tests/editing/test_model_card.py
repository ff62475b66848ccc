"""The model card: front matter the Hub accepts, numbers as they are, and nothing claimed that is not known."""

import copy
import json
import re
import shlex

import pytest
import yaml

from abliterate.checkpoints.model_source import CardFacts
from abliterate.editing.model_card import base_model_id, build_model_card
from tests.support.fake_hub import evaluation_report, write_checkpoint


@pytest.fixture(scope="module")
def shared_record(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("card") / "out")
    return json.loads((directory / "abliteration.json").read_text())


@pytest.fixture
def record(shared_record):
    return copy.deepcopy(shared_record)


def card_of(record, evaluation=None, facts=None, title="Model-abliterated"):
    return build_model_card(record=record, evaluation=evaluation, facts=facts, title=title)


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0])


def section(card: str, heading: str) -> str:
    return card.split(f"## {heading}\n")[1].split("\n## ")[0]


def commands(card: str) -> list[list[str]]:
    block = re.search(r"```sh\n(.*?)\n```", card, flags=re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


class TestFrontMatter:
    def test_everything_known(self, record):
        facts = CardFacts(license="other", license_name="own", license_link="LICENSE", base_model="grand/parent")
        assert front_matter(card_of(record, facts=facts)) == {
            "base_model": "org/base",
            "base_model_relation": "finetune",
            "license": "other",
            "license_name": "own",
            "license_link": "LICENSE",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": [
                "abliterate", "abliterated", "abliteration", "refusal-direction", "orthogonalization",
                "interpretability", "arxiv:2406.11717",
            ],
        }  # fmt: skip

    def test_the_task_is_the_recorded_one(self, record):
        record["base"]["pipeline_tag"] = "image-text-to-text"
        assert front_matter(card_of(record))["pipeline_tag"] == "image-text-to-text"

    def test_an_unknown_licence_is_left_out_and_said(self, record):
        card = card_of(record, facts=CardFacts(license_name="own"))
        assert not {"license", "license_name", "license_link"} & set(front_matter(card))
        assert "is not known to the tool that wrote this card" in section(card, "Licence")

    def test_a_local_base_is_named_without_its_path(self, record):
        record["base"].update(model="/home/someone/private/my-model", revision=None)
        card = card_of(record)
        assert not {"base_model", "base_model_relation"} & set(front_matter(card))
        assert "A local model, `my-model`" in card
        assert "someone" not in card

    def test_a_local_base_inherits_the_base_its_card_names(self, record):
        record["base"].update(model="build/demo/model/", revision=None)
        facts = CardFacts(license="mit", base_model="org/root")
        card = card_of(record, facts=facts)
        assert front_matter(card)["base_model"] == "org/root"
        assert "A local model, `model`, itself made from `org/root`," in card
        assert base_model_id(record, facts) == "org/root"
        assert base_model_id(record, None) is None

    @pytest.mark.parametrize("nasty", ['a: "b"\n---\ninjected: yes', "yes", "{x: [", "# comment", "- item", "é"])
    def test_whatever_the_base_card_says_stays_one_value(self, record, nasty):
        facts = CardFacts(license=nasty, license_name=nasty)
        metadata = front_matter(card_of(record, facts=facts))
        assert metadata["license"] == metadata["license_name"] == nasty
        assert "injected" not in metadata


class TestText:
    def test_the_notice_and_the_paper(self, record):
        card = card_of(record)
        notice = section(card, "Safety notice")
        for words in ("removed on purpose", "Safety is reduced", "intended for research", "responsible"):
            assert words in notice
        assert "arXiv 2406.11717" in section(card, "Citation")
        assert card.index("## Safety notice") < card.index("## What was removed")

    def test_a_repair_says_what_was_kept_and_how_that_was_counted(self, record):
        counts = {"borderline": 3, "n_borderline": 22, "harmful": 30, "n_harmful": 31}
        record["directions"][0]["metadata"] |= {
            "goal": "repair",
            "repair": {"confirmed": [{"position": -1, "layer": 3, **counts}, {"position": -1, "layer": 20, **counts}]},
        }
        card = card_of(record)
        notice = section(card, "Safety notice")
        kept = "30 of 31 harmful and 3 of 22 borderline validation prompts that the base refuses were still refused"
        assert kept in notice
        assert "Safety is reduced" in notice
        assert "removed on purpose" in notice
        assert "the direction of false refusals" in section(card, "What was removed")
        assert "refused - answered borderline prompts" in section(card, "What was removed")
        assert "with the direction of its false refusals projected out" in card
        # A file that was made by hand may lack them.
        record["directions"][0]["metadata"]["repair"] = {"confirmed": "no"}
        assert "was not recorded" in section(card_of(record), "Safety notice")

    def test_what_was_removed(self, record):
        text = section(card_of(record), "What was removed")
        assert "| Base revision | `" + "c" * 40 + "` |" in text
        assert "the input of layer 20, token position -1 (difference in means, harmful - harmless)" in text
        assert "| Bypass score when selected (lower is better) | -6.25 |" in text
        assert "| KL to the base when selected, by ablation, nats | 0.0625 |" in text
        assert "| Components | `embed`, `attn`, `mlp` |" in text
        assert "| Layers | all |" in text
        assert "| Tensors edited | 2 (1 token embedding, 1 attention out-projections) |" in text
        assert "before | 1.25e-01 |" in text
        assert "after | 1.50e-08 |" in text

    def test_a_bare_direction_has_no_origin(self, record):
        record["directions"][0]["metadata"] = {}
        record["options"].update(layers=[4, 10], strength=0.5)
        text = section(card_of(record), "What was removed")
        assert "not recorded: the direction file came without its origin" in text
        assert "score when selected" not in text
        assert "| Layers | 4 up to, not including, 10 |" in text
        assert "| Strength | 0.5 |" in text

    def test_several_directions(self, record):
        second = copy.deepcopy(record["directions"][0]) | {"sha256": "e" * 64}
        second["metadata"]["layer"] = 4
        record["directions"].append(second)
        record["options"].update(tied="untie", preserve_norms=True)
        record["base"]["tied_embeddings"] = True
        record["config_changes"] = {"tie_word_embeddings": False}
        record["tensors"][1]["norm_chain"] = [{"weight": "norm.weight", "plus_one": True, "centered": False}]
        card = card_of(record)
        text = section(card, "What was removed")
        assert "several directions projected out of the weights" in card
        assert "W becomes W - s Uᵀ (U W)" in text
        assert "| Direction 2 of 2 (SHA-256 of its float32 bytes) | `" + "e" * 64 + "` |" in text
        assert "| Found (2) at | the input of layer 4," in text
        assert "| Tied embeddings | untied: the output head keeps the base model's rows |" in text
        assert "`config.json` is the base model's but for `tie_word_embeddings: false`." in text
        assert "as it is seen through them" in text
        assert "scaled back to its length" in text
        assert "| Largest part of a tensor's component that survived | 1.20e-07 |" in text
        assert [command[1] for command in commands(card)] == ["extract", "extract", "orthogonalize"]
        files = [word for command in commands(card) for word in command if word.startswith("direction-")]
        assert files == ["direction-1.safetensors", "direction-2.safetensors"] * 2
        assert commands(card)[2][-3:] == ["--tied", "untie", "--preserve-norms"]

    @pytest.mark.parametrize(
        ("coefficient", "notice"), [(1.5, "steered towards refusing"), (-1.0, "removed on purpose")]
    )
    def test_an_addition(self, record, coefficient, notice):
        record["options"]["add"] = coefficient
        record["config_changes"] = {"mlp_bias": True}
        record["tensors"] = [record["tensors"][1] | {"kind": "added", "component_before": None}]
        card = card_of(record)
        assert f"with {coefficient:g} times its refusal direction added to the activations by a bias" in card
        assert notice in section(card, "Safety notice")
        text = section(card, "What was added")
        assert f"| Coefficient | {coefficient:g} |" in text
        assert "but for `mlp_bias: true`" in text
        assert "Strength" not in text
        words = [f"--add={coefficient}"] if coefficient < 0 else ["--add", str(coefficient)]
        assert commands(card)[1][-len(words) :] == words

    def test_measurements(self, record):
        text = section(card_of(record, evaluation_report()), "How it was measured")
        assert "| Harmful prompts | 128 | 96.9 % (92.2 to 98.8) | 3.1 % (1.2 to 7.8) | 1 |" in text
        assert "| Harmless prompts | 128 | 1.6 % (0.4 to 5.5) | 0.0 % (0.0 to 2.9) | 1 |" in text
        assert "| Safe prompts that look unsafe | 100 |" in text
        assert "nats | 0.0312 |" in text
        assert "0.512 to 0.533 (+4.1 %)" in text
        assert "at most 64 tokens" in text
        assert "12 refusal substrings" in text
        assert "bundled, 128 prompts" in text

    def test_what_was_not_measured_is_said(self, record):
        missing = evaluation_report(base_rates=None, kl_harmless=None, cross_entropy=None, prompt_sets=None)
        text = section(card_of(record, missing), "How it was measured")
        assert "| Harmful prompts | 128 | not measured | 3.1 % (1.2 to 7.8) | 1 |" in text
        assert text.count("| not measured |") == 5
        assert "Prompt sets" not in text

    def test_no_evaluation(self, record):
        card = card_of(record)
        assert "**Not measured.**" in section(card, "How it was measured")
        assert [command[1] for command in commands(card)] == ["extract", "orthogonalize"]
        assert "versions: abliterate 0.1.0, torch 2.13.0, safetensors 0.6.2." in card

    def test_numbers_that_are_none(self, record):
        odd = evaluation_report(
            rates={"harmful": {"n": 0, "rate": None, "low": float("nan"), "high": 1}, "other|set": {}},
            cross_entropy={"base": 1.0},
        )
        text = section(card_of(record, odd), "How it was measured")
        assert "| Harmful prompts | 0 | 96.9 % (92.2 to 98.8) | not measured | ? |" in text
        assert "| other\\|set | ? | not measured | not measured | ? |" in text
        assert "1 to not measured" in text


class TestMeasurements:
    def test_each_is_a_row_with_its_unit(self, record):
        measured = [
            {"name": "KL, first token", "unit": "nats a token", "model": 0.0312, "base": None, "relative_change": None},
            {"name": "entropy | x", "unit": "bits", "model": 0.533, "base": 0.512, "relative_change": 0.041},
        ]
        text = section(card_of(record, evaluation_report(measurements=measured)), "How it was measured")
        assert "| KL, first token | nats a token | 0.0312 |" in text
        assert "| entropy \\| x | bits | 0.512 to 0.533 (+4.1 %) |" in text

    @pytest.mark.parametrize("measured", [None, [], 3, {"name": "x"}])
    def test_files_without_them_say_what_they_have(self, record, measured):
        text = section(card_of(record, evaluation_report(measurements=measured)), "How it was measured")
        assert "0.512 to 0.533 (+4.1 %)" in text

    def test_what_is_malformed_is_not_measured(self, record):
        text = section(
            card_of(record, evaluation_report(measurements=[7, {"name": "n", "model": "many"}])), "How it was measured"
        )
        assert text.count("not measured") == 2


class TestCommands:
    def test_of_a_hub_base(self, record):
        model = ["org/base", "--revision", "c" * 40]
        thresholds = ["--seed", "7", "--kl-threshold", "0.3"]
        record["directions"][0]["metadata"]["arguments"] = thresholds
        edit = ["-o", "OUT"]
        assert commands(card_of(record, evaluation_report())) == [
            ["abliterate", "extract", *model, "-o", "refusal.safetensors", *thresholds],
            ["abliterate", "orthogonalize", *model, "--direction", "refusal.safetensors", *edit],
            [
                *("abliterate", "evaluate", "OUT", "--base", "org/base", "--base-revision", "c" * 40),
                *("--output", "OUT/evaluation.json"),
            ],
        ]

    def test_of_options(self, record):
        record["base"].update(model="models/my model", revision=None)
        record["options"]["layers"] = [4, 10]
        record["directions"][0]["metadata"] = {"arguments": ["--system-prompt", "Be\nkind; $(rm)", "--filter", "none"]}
        extract, orthogonalize = commands(card_of(record))
        assert extract[2:5] == ["my model", "-o", "refusal.safetensors"]
        assert extract[5:] == ["--system-prompt", r"$Be\x0akind; $(rm)", "--filter", "none"]
        assert orthogonalize[orthogonalize.index("--layers") + 1] == "4:10"

    def test_a_name_cannot_break_out_of_the_markdown(self, record):
        record["base"]["model"] = "org/x`|\n```\n<script>"
        card = card_of(record, title="a|b\n# <img> *x*")
        assert "\n<script>" not in card
        assert len(re.findall(r"^```", card, flags=re.MULTILINE)) == 6
        assert "# a\\|b \\# \\<img\\> \\*x\\*\n" in card

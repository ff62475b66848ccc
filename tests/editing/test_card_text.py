"""Sections of the card on use and on what was left alone: nothing that goes in becomes markup or code."""

import ast
import re

import pytest

from abliterate.editing.card_text import how_to_use, what_was_left_alone


@pytest.fixture
def record():
    return {"base": {"pipeline_tag": "text-generation"}, "shards": {"model.safetensors": {}}}


class TestUse:
    def test_a_checkpoint_is_loaded_as_its_base_is(self, record):
        text = how_to_use(record, "me/edited")
        assert 'AutoModelForCausalLM.from_pretrained("me/edited", dtype="auto")' in text
        assert 'tokenizer = AutoTokenizer.from_pretrained("me/edited")' in text
        assert "`vllm serve` `me/edited`" in text

    def test_what_takes_pictures_has_a_processor(self, record):
        record["base"]["pipeline_tag"] = "image-text-to-text"
        text = how_to_use(record, "Model-abliterated")
        assert "AutoModelForImageTextToText" in text
        assert "processor = AutoProcessor.from_pretrained(" in text

    def test_what_no_class_is_known_for_has_no_code(self, record):
        record["base"]["pipeline_tag"] = "any-to-any"
        assert "```" not in how_to_use(record, "Model-abliterated")

    def test_a_gguf_file_is_run_by_what_runs_its_base(self, record):
        record["shards"] = {"model-Q8_0.gguf": record["shards"].popitem()[1]}
        text = how_to_use(record, "Model-abliterated")
        assert "`llama-server -m` `model-Q8_0.gguf`" in text
        assert "transformers" not in text

    @pytest.mark.parametrize("title", ['a"b', "a`b", "a|b\n# c"])
    def test_a_title_stays_in_its_string(self, record, title):
        text = how_to_use(record, title)
        (block,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
        assert {node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)} == {title, "auto"}


class TestLeftAlone:
    def test_what_the_edit_passed_over_is_listed(self, record):
        record["left_alone"] = [{"tensors": "model.mtp.*.fc.weight", "count": 3, "reason": "it <reads>"}]
        (text,) = what_was_left_alone(record)
        assert "| `model.mtp.*.fc.weight` | 3 | it \\<reads\\> |" in text

    @pytest.mark.parametrize("listed", [None, [], 3, [1]])
    def test_a_record_that_lists_nothing_has_no_such_section(self, record, listed):
        record["left_alone"] = listed
        assert len(what_was_left_alone(record)) == (listed == [1])

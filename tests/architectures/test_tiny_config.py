"""A shrunken config keeps every choice and every kind of layer, and nothing of the size."""

from abliterate.architectures.tiny_config import shrink_config


def test_sizes_shrink_and_choices_stay():
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "hidden_act": "silu",
    }
    shrunk = shrink_config(config)
    assert shrunk.keys() == config.keys()
    assert shrunk["hidden_size"] == 64
    assert shrunk["num_hidden_layers"] == 3
    assert shrunk["bos_token_id"] < shrunk["vocab_size"] == 128
    for choice in ("model_type", "rms_norm_eps", "tie_word_embeddings", "hidden_act"):
        assert shrunk[choice] == config[choice]
    assert config["hidden_size"] == 4096


def test_what_is_small_already_is_not_enlarged():
    assert shrink_config({"hidden_size": 32, "vocab_size": 61}) == {"hidden_size": 32, "vocab_size": 61}


def test_heads_that_are_as_many_as_those_of_keys_stay_so():
    assert shrink_config({"num_attention_heads": 32, "num_key_value_heads": 32})["num_key_value_heads"] == 4
    assert shrink_config({"num_attention_heads": 32, "num_key_value_heads": 8})["num_key_value_heads"] == 2


def test_the_first_layer_of_each_kind_is_kept_and_lists_of_numbers_follow():
    kinds = ["full", "sliding", "sliding", "sliding", "linear", "sliding"]
    shrunk = shrink_config({"num_hidden_layers": 6, "layer_types": kinds, "moe_layers": [4, 5]})
    # Layer 5 is the first that is sliding and has experts.
    assert shrunk["layer_types"] == ["full", "sliding", "linear", "sliding"]
    assert shrunk["num_hidden_layers"] == 4
    assert shrunk["moe_layers"] == [2, 3]


def test_a_list_of_all_layers_makes_no_kinds():
    config = {"num_hidden_layers": 6, "moe_layers": [0, 1, 2, 3, 4, 5], "no_rope_layers": [1, 1, 1, 0, 1, 1]}
    shrunk = shrink_config(config)
    assert shrunk == {"num_hidden_layers": 3, "moe_layers": [0, 1, 2], "no_rope_layers": [1, 1, 0]}


def test_a_layer_that_takes_the_keys_of_another_stays_with_it():
    own = {"num_hidden_layers": 8, "kv_source_layers": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert shrink_config(own) == {"num_hidden_layers": 3, "kv_source_layers": [0, 1, 2]}
    shared = shrink_config({"num_hidden_layers": 8, "kv_source_layers": [0, 1, 2, 3, 4, 4, 6, 6]})
    # The first, the first that takes another's, that other one, and one more.
    assert shared == {"num_hidden_layers": 3, "kv_source_layers": [0, 1, 1]}


def test_lists_of_sizes_shrink_and_layers_that_are_counted_from_one_follow():
    kinds = ["linear", "linear", "linear", "indexed", "linear", "linear"]
    config = {"num_hidden_layers": 6, "layer_types": kinds, "ple_layer_ids": [2, 6], "intermediate_size": [8192] * 6}
    shrunk = shrink_config(config)
    # Layer 1 has n-grams, the first has none, and the fourth is of another kind.
    assert shrunk["layer_types"] == ["linear", "linear", "indexed"]
    assert shrunk["ple_layer_ids"] == [2]
    assert shrunk["intermediate_size"] == [96, 96, 96]


def test_nested_configs_shrink_by_their_own_depth():
    text = {"hidden_size": 2048, "num_hidden_layers": 24}
    shrunk = shrink_config({"text_config": text, "vision_config": {"hidden_size": 1024, "depth": 27}})
    assert shrunk == {
        "text_config": {"hidden_size": 64, "num_hidden_layers": 3},
        "vision_config": {"hidden_size": 64, "depth": 2},
    }


def test_a_depth_that_lies_ends_and_rubbish_is_left_as_it_is():
    assert shrink_config({"num_hidden_layers": 10**30})["num_hidden_layers"] == 3
    rubbish = {"num_hidden_layers": "many", "hidden_size": -1, "layer_types": None}
    assert shrink_config(rubbish) == rubbish

"""A GGUF file as a model: it runs as the model it was made of, and what is wrong with one is said in a line."""

import importlib.util
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.errors import InputError, MissingDependencyError, ModelError
from abliterate.formats.gguf_config import read_gguf_config
from abliterate.formats.gguf_file import read_gguf
from abliterate.models.gguf_loading import load_gguf
from abliterate.models.loading import class_of, load_streamed_model, load_tokenizer, open_model
from abliterate.models.machine import estimate_bytes
from abliterate.models.options import ModelOptions
from tests.support.gguf_models import (
    ARCHITECTURES,
    F16,
    F32,
    Q4_0,
    Q8_0,
    dequantised,
    logits,
    permuted,
    tiny,
    write,
    write_gguf,
)  # fmt: skip
from tests.support.tiny_models import make_tokenizer

CPU = ModelOptions(device="cpu")


def load(path, **options):
    return load_gguf(path, name="tiny", choose_class=class_of, **options)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_of_floats_runs_as_the_model_it_was_made_of(tmp_path, model_type):
    model = tiny(model_type)
    loaded = load(write(tmp_path, model))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_blocks_are_decoded_and_rows_put_back(tmp_path, kind):
    model = tiny()
    path = write(tmp_path, model, kind=kind)
    loaded, stored = load(path), dequantised(path)
    weights = loaded.state_dict()
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], stored["token_embd.weight"])
    for part, n_heads in (("q", 4), ("k", 2)):
        weight = weights[f"model.layers.2.self_attn.{part}_proj.weight"]
        assert np.array_equal(permuted(weight.numpy(), n_heads), stored[f"blk.2.attn_{part}.weight"].numpy())
        assert not torch.equal(weight, stored[f"blk.2.attn_{part}.weight"])
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(other))
    assert not torch.equal(logits(loaded), logits(model))


def test_it_opens_as_a_chat_model_with_its_own_template_and_tokenizer(tmp_path):
    path = write(tmp_path)
    # What lies beside it is of another model.
    make_tokenizer(template="{{ 'another' }}", bos_token="<s>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    opened = open_model(path, options=CPU, extracts=True)
    own = make_tokenizer()
    assert opened.chat.tokenizer.chat_template == own.chat_template
    assert opened.chat.tokenizer("How do locks work?").input_ids == own("How do locks work?").input_ids
    assert (opened.name, opened.chat.d_model, len(opened.chat.blocks)) == (str(path), 32, 3)
    assert opened.chat.model.config.model_type == "llama"
    from_directory = open_model(tmp_path, options=CPU).chat.model
    assert torch.equal(logits(from_directory), logits(opened.chat.model))


def test_a_missing_template_is_said_where_one_is_needed(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny(), make_tokenizer(template=None))
    with pytest.raises(ModelError, match="no chat template"):
        open_model(path, options=CPU)
    assert open_model(path, options=CPU, needs_template=False).chat.d_model == 32


def test_the_number_format_and_the_memory_that_it_takes(tmp_path):
    half = write(tmp_path, kind=F16)
    header = read_gguf(half)
    n_values = sum(parameter.numel() for parameter in tiny().parameters())
    assert (header.n_values, header.stored_dtype(), header.architecture) == (n_values, "float16", "llama")
    assert load(half, dtype="bfloat16").dtype == torch.bfloat16
    assert open_model(half, options=CPU).chat.model.dtype == torch.float32
    assert open_model(half, options=ModelOptions(device="cpu", dtype="float16")).chat.model.dtype == torch.float16
    for dtype, device, width in (("auto", "cpu", 4), ("auto", "cuda", 2), ("bfloat16", "cpu", 2)):
        assert estimate_bytes(half, dtype=dtype, device=torch.device(device)) == width * n_values
    assert read_gguf(write(tmp_path, kind=Q8_0)).stored_dtype() == "float32"
    with pytest.raises(Exception, match="convert it first: abliterate convert"):
        load_streamed_model(half, name="tiny", options=CPU)


def test_all_tokens_that_end_an_answer_count(tmp_path):
    model = load(write(tmp_path, change=lambda writer: (writer.add_eot_token_id(3), writer.add_eom_token_id(2))))
    assert model.generation_config.eos_token_id == [2, 3]
    assert model.config.bos_token_id is None


class TestRotary:
    def test_frequencies_of_llama_3_go_into_the_config(self, tmp_path):
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        model = tiny(head_dim=64, num_attention_heads=2, num_key_value_heads=1, rope_parameters=scaling)
        plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
        factors = (plain / model.model.rotary_emb.inv_freq).numpy()
        assert 1 in factors
        assert factors.max() == pytest.approx(8)
        loaded = load(write(tmp_path, model, extra={"rope_freqs.weight": factors}))
        assert loaded.config.rope_parameters == scaling
        assert torch.equal(logits(loaded), logits(model))

    def test_other_frequencies_are_refused(self, tmp_path):
        path = write(tmp_path, extra={"rope_freqs.weight": np.array([1.0, 2.0, 3.0, 8.0])})
        with pytest.raises(ModelError, match=r"rope_freqs\.weight, which is not as Llama 3 scales"):
            load(path)

    def test_frequencies_that_change_nothing_are_passed_over(self, tmp_path):
        model = tiny()
        assert torch.equal(logits(load(write(tmp_path, model, extra={"rope_freqs.weight": np.ones(4)}))), logits(model))

    @pytest.mark.parametrize("kind", ["linear", "yarn"])
    def test_scaling_in_the_metadata(self, tmp_path, kind):
        def change(writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(128)

        scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
        scaling |= {"original_max_position_embeddings": 128} if kind == "yarn" else {}
        model = tiny(rope_parameters=scaling)
        loaded = load(write(tmp_path, model, change=change))
        assert torch.equal(logits(loaded), logits(model))
        assert not torch.equal(logits(loaded), logits(tiny()))

    def test_what_no_config_is_made_of_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="LongRoPE"):
            load(write(tmp_path, extra={"rope_factors_long.weight": np.ones(4)}))

        def change(writer):
            writer.add_string("llama.rope.scaling.type", "x")
            writer.add_rope_scaling_factor(2.0)

        scaled = write(tmp_path, change=change)
        with pytest.raises(ModelError, match="scaling of the kind x"):
            load(scaled)


class TestWhatIsWrong:
    def test_a_tensor_that_is_missing(self, tmp_path):
        with pytest.raises(ModelError, match=r"the GGUF file lacks model\.layers\.1\.mlp\.down_proj\.weight;"):
            load(write(tmp_path, leave_out="blk.1.ffn_down.weight"))

    def test_a_tensor_that_the_model_does_not_take(self, tmp_path):
        bias = {f"blk.{layer}.attn_q.bias": np.ones(32) for layer in range(3)}
        with pytest.raises(ModelError, match="leaves tensors of llama out"):
            load(write(tmp_path, extra=bias))

    def test_a_tensor_of_another_shape(self, tmp_path):
        path = write(tmp_path, change=lambda writer: writer.add_uint32("llama.unused", 1))
        data = path.read_bytes()
        key = b"llama.feed_forward_length"
        at = data.index(key) + len(key) + 4
        path.write_bytes(data[:at] + struct.pack("<I", 96) + data[at + 4 :])
        with pytest.raises(ModelError, match="in another shape than its config says"):
            load(path)

    @pytest.mark.parametrize("content", [b"", b"GG", b"{}\n" * 20])
    def test_what_is_no_gguf_file(self, tmp_path, content):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="is not a GGUF file"):
            read_gguf(tmp_path / "x.gguf")

    def test_another_version(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
        with pytest.raises(ModelError, match="GGUF of version 1"):
            read_gguf(tmp_path / "x.gguf")

    def test_every_place_where_a_file_may_end_too_early(self, tmp_path):
        whole = write(tmp_path).read_bytes()
        start = min(tensor.offset for tensor in read_gguf(tmp_path / "model.gguf").tensors)
        cut = tmp_path / "cut.gguf"
        for length in [*range(4, start, 1009), start, len(whole) - 64]:
            cut.write_bytes(whole[:length])
            with pytest.raises(ModelError, match="damaged") as caught:
                read_gguf(cut)
            assert str(cut) in str(caught.value)

    def test_damaged_headers_end_in_a_known_error(self, tmp_path):
        whole = bytearray(write(tmp_path).read_bytes())
        broken = tmp_path / "broken.gguf"
        generator = np.random.default_rng(0)
        for _ in range(100):
            changed = bytearray(whole)
            for at in generator.integers(4, 600, size=4):
                changed[at] = generator.integers(256)
            broken.write_bytes(changed)
            try:
                read_gguf(broken)
            except (ModelError, InputError):
                continue

    def test_an_architecture_that_transformers_does_not_read(self, tmp_path):
        path = write(tmp_path, architecture="wavtokenizer-dec")
        with pytest.raises(ModelError, match=r"does not load as a causal language model: .*not supported"):
            read_gguf_config(path, name="tiny")

    def test_a_kind_of_block_that_is_not_decoded(self, tmp_path):
        path = write(tmp_path, kind=F32)
        header = read_gguf(path)
        data = path.read_bytes()
        name = header.tensors[0].name.encode()
        at = data.index(name) + len(name) + 4 + 8 * 2
        for kind, said in ((24, "I8"), (9, "Q8_1"), (999, "kind 999")):
            path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
            with pytest.raises(ModelError, match=f"stored as {said}, which the package gguf does not decode"):
                read_gguf(path)

    def test_a_part_of_a_split_model_and_one_without_weights(self, tmp_path):
        with pytest.raises(ModelError, match="one of 3 parts"):
            read_gguf(write(tmp_path, change=lambda writer: writer.add_uint16("split.count", 3)))
        writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(ModelError, match="holds no weights"):
            read_gguf(tmp_path / "vocabulary.gguf")

    def test_no_file_and_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            read_gguf(tmp_path / "nothing.gguf")
        path = write(tmp_path)
        data = path.read_bytes()
        path.write_bytes(data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem"))
        with pytest.raises(ModelError, match="no tokenizer that loads"):
            load_tokenizer(path, name="tiny", options=CPU)

    def test_the_package_is_missing(self, tmp_path, monkeypatch):
        path = write(tmp_path)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)
        )
        with pytest.raises(MissingDependencyError, match=r"package gguf is needed: pip install 'abliterate\[gguf\]'"):
            read_gguf(path)

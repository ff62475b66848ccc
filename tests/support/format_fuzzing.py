"""One try of each other format that comes from elsewhere: broken at random, it is read or refused with a known error.

A format is the sound files, a way to break them, and all that the commands do with them. As for checkpoints
(`tests/support/fuzzing.py`), nothing may be written but into the directory for results.
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import torch

from abliterate.checkpoints.model_source import ModelSource, find_local_model
from abliterate.directions import encode_rows, is_direction_file, load_direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import plan_layout, read_layout
from abliterate.editing.record import read_record, resolve_base
from abliterate.editing.strengths import read_strengths
from abliterate.errors import AbliterateError
from abliterate.evaluation.replies import Answers, ReplyCache, generate_replies, read_replies
from abliterate.formats.gguf_config import read_gguf_config
from abliterate.formats.gguf_file import read_gguf
from abliterate.models import chat_template
from abliterate.models.chat_format import find_chat_format
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.loading import load_chat_model, load_streamed_model, open_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_files import read_prompts
from abliterate.prompt_sets import load_prompt_set
from abliterate.release.options import VerificationOptions
from abliterate.release.publishing import push_checkpoint
from abliterate.release.reverting import revert_checkpoint
from abliterate.release.verification import verify_checkpoint
from tests.support import gguf_models
from tests.support.checkpoint_mutations import break_file, break_safetensors
from tests.support.fuzzing import listing, skeleton, writes_elsewhere
from tests.support.tiny_models import (
    CHATML,
    D_MODEL,
    N_LAYERS,
    make_tokenizer,
    random_direction,
    save_chat_model,
    save_tiny_model,
    tiny_llama,
)

Run = Callable[[], object]
CPU = ModelOptions(device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        make: writes the sound files.
        break_one: breaks one or more of them.
        runs: what is done with them, given their directory and one for results.
    """

    make: Callable[[Path], object]
    break_one: Callable[[Path, Random], object]
    runs: Callable[[Path, Path, Random], Iterable[Run]]


def try_format(name: str, sound: Path, work: Path, random: Random) -> str:
    """Break a copy of a format's sound files and do with them what the commands do.

    Args:
        name: of the format, a key of `FORMATS`.
        sound: what its `make` wrote.
        work: a directory that is not there; it is gone afterwards.
        random: where all choices come from.

    Returns:
        "read", or the kind of the first error and its message without names and numbers.

    Raises:
        AssertionError: something was written that should not have been, or an error is not one line.
    """
    files, results = work / "files", work / "results"
    results.mkdir(parents=True)
    try:
        shutil.copytree(sound, files)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            FORMATS[name].break_one(files, random)
        before = listing(work, without=results)
        known: list[str] = []
        with (
            writes_elsewhere(results) as elsewhere,
            mock.patch.object(tempfile, "tempdir", str(results)),
            mock.patch.object(chat_template, "_MAX_SECONDS", 1.0),
        ):
            for run in FORMATS[name].runs(files, results, random):
                try:
                    run()
                except AbliterateError as error:
                    message = str(error)
                    assert "\n" not in message, message
                    assert len(message) < 3000, len(message)
                    known.append(f"{type(error).__name__}: {skeleton(message, files)}")
        assert elsewhere == [], elsewhere
        assert listing(work, without=results) == before
        return f"{name}: {' | '.join(dict.fromkeys(known))}" if known else f"{name}: read"
    finally:
        shutil.rmtree(work)


def make_formats(directory: Path) -> dict[str, Path]:
    """Write the sound files of all formats."""
    for name, each in FORMATS.items():
        (directory / name).mkdir(parents=True)
        each.make(directory / name)
    return {name: directory / name for name in FORMATS}


def _break_any(*names: str) -> Callable[[Path, Random], None]:
    def break_one(directory: Path, random: Random) -> None:
        path = directory / random.choice(names)
        if path.is_file():
            (break_safetensors if path.suffix == ".safetensors" else break_file)(path, random)

    return break_one


def _direction_values(seed: int = 7) -> Any:
    return make_direction(
        mean_difference=random_direction(seed=seed),
        candidates=torch.randn(2, N_LAYERS, D_MODEL),
        scores={name: torch.randn(2, N_LAYERS) for name in ("bypass", "induce", "kl")},
        metadata={"layer": 1, "position": -1, "model": "org/model", "model_type": "llama", "system_prompt": None},
    )


def _make_direction(directory: Path) -> None:
    save_tiny_model(directory / "model", num_hidden_layers=2)
    (directory / "own").mkdir()
    _direction_values().save(directory / "own" / "refusal.safetensors")


def _run_direction(files: Path, results: Path, random: Random) -> Iterable[Run]:
    path = files / "own" / "refusal.safetensors"
    options = random.choice((EditOptions(), EditOptions(add=1.0), EditOptions(layers=(0, 1))))
    yield lambda: is_direction_file(path)
    yield lambda: load_direction(path)
    yield lambda: load_direction(path, d_model=D_MODEL)
    yield lambda: _edit(files / "model", path, results / "out", options)


def _edit(model: Path, direction: Path, output: Path, options: EditOptions) -> None:
    orthogonalize_checkpoint(source=model, direction=direction, output=output, options=options)


def _make_record(directory: Path) -> None:
    save_tiny_model(directory / "base", num_hidden_layers=2)
    _direction_values().save(directory / "refusal.safetensors")
    _edit(directory / "base", directory / "refusal.safetensors", directory / "out", EditOptions())


def _run_record(files: Path, results: Path, random: Random) -> Iterable[Run]:
    out, base = files / "out", random.choice((None, files / "base"))
    quick = VerificationOptions(quick=True)
    yield lambda: read_record(out)
    yield lambda: verify_checkpoint(checkpoint=out, base=base, options=quick)
    yield lambda: verify_checkpoint(checkpoint=out, directions=[files / "refusal.safetensors"], options=quick)
    yield lambda: push_checkpoint(checkpoint=out, repo_id="org/name", dry_run=True)
    yield lambda: revert_checkpoint(checkpoint=out, output=results / "back", base=base)
    yield lambda: resolve_base(str(files / "base"), revision=None, edited=_source(out))
    yield lambda: _edit(out, files / "refusal.safetensors", results / "twice", EditOptions())


def _source(path: Path) -> ModelSource:
    return ModelSource(path=path, name=str(path), revision=None)


def _make_strengths(directory: Path) -> None:
    save_tiny_model(directory / "model", num_hidden_layers=N_LAYERS)
    direction = _direction_values()
    direction.save(directory / "refusal.safetensors")
    point = {"attn": [0.5] * N_LAYERS, "mlp": [0.25] * N_LAYERS}
    content = {
        "strengths_version": 1,
        "direction_sha256": direction.sha256,
        "strengths": {"embed": 0.0, **point},
        "directions": encode_rows(
            torch.nn.functional.normalize(torch.randn(N_LAYERS, D_MODEL).double(), dim=1).numpy()
        ),
        "arguments": ["refine", "model"],
        "prompt_hashes": ["00"],
        "frontier": [{"pressure": 1.0, **point}, {"pressure": 2.5, **point}],
    }
    (directory / "strengths.json").write_text(json.dumps(content))


def _run_strengths(files: Path, results: Path, random: Random) -> Iterable[Run]:
    path = files / random.choice(("strengths.json", "strengths.json@1", "strengths.json@2.5", "strengths.json@nan"))

    def edit() -> None:
        options = EditOptions(strengths=read_strengths(path))
        _edit(files / "model", files / "refusal.safetensors", results / "out", options)

    yield lambda: read_strengths(path)
    yield lambda: read_strengths(path).by_layer(d_model=D_MODEL)
    yield edit


_ROWS = [
    {"id": f"p{n}", "category": random_word, "text": f'Tell me "{n}", please; then, stop.'}
    for n, random_word in enumerate(("a", "b", "a,b", "\u00e9", ""))
]


def _make_prompts(directory: Path) -> None:
    (directory / "p.txt").write_text("\n".join(row["text"] for row in _ROWS))
    (directory / "p.json").write_text(json.dumps(_ROWS))
    (directory / "p.jsonl").write_text("\n".join(json.dumps(row) for row in _ROWS))
    quoted = ("\t".join(f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()) for row in _ROWS)
    (directory / "p.csv").write_text("\n".join(["id\tcategory\ttext", *quoted]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_ROWS), directory / "p.parquet")


def _run_prompts(files: Path, _results: Path, random: Random) -> Iterable[Run]:
    for file in sorted(files.iterdir()):
        spec = f"{file}{random.choice(('', '', ':text', ':id', ':none'))}"
        yield lambda spec=spec: read_prompts(spec)
        yield lambda spec=spec: load_prompt_set(spec, kind="harmful", part="test")


_FRAGMENTS = [
    "{% for a in range(99999) %}", "{% endfor %}", "{% if true %}", "{% endif %}", "{{ 10 ** (10 ** 9) }}",
    "{{ 'a' * 10 ** 9 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ raise_exception('no\nno') }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{{ messages }}", "{{ messages[0].content }}", "{{ messages[99].content }}", "{{ ''.__class__ }}", "{{ self }}",
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum(n=9) }}", "{% include 'x' %}", "{% extends 'x' %}", "{% raw %}",
    "{{ messages | tojson(indent=9999) }}", "{{ '%s' % messages }}", "{{ 'a' | center(99999999) }}", "\x00", "\u2028",
    "{% generation %}", "{{ strftime_now('%' * 9999) }}", "{% do 1 %}", "{% break %}", "{#", "#}",
    "<think>", "</think>", "{{ enable_thinking }}", "{{ messages.append(1) }}", "{{ loop }}", "{{ undefined.a.b }}",
    "{{ 1 / 0 }}", "{{ dict(a=1) | xmlattr }}", "{{ 'a'.format_map(messages) }}", "{{ '{0.__class__}'.format(1) }}",
    "{% set messages = 1 %}", "{{ messages | map(attribute='content') | join('x') }}", "{{ ('(' * 9999) | urlize }}",
    "(" * 300, "{{ " + "(" * 300, "{{ [" + "1," * 9999 + "] | sort | last }}", "{% call f() %}{% endcall %}",
]  # fmt: skip


def _break_template(directory: Path, random: Random) -> None:
    path = directory / "chat_template.jinja"
    if random.random() < 0.2:
        return break_file(path, random)
    text = path.read_text(errors="replace")
    pieces = [text[: (cut := random.randrange(len(text) + 1))], random.choice(_FRAGMENTS), text[cut:]]
    if random.random() < 0.5:  # between the parts of the template, where it is likely to stay one
        at = [0, *(i + 2 for i in range(len(text)) if text.startswith("%}", i)), len(text)]
        cut = random.choice(at)
        pieces = [text[:cut], random.choice(_FRAGMENTS), text[cut:]]
    return path.write_text("".join(pieces))


def _run_template(files: Path, _results: Path, random: Random) -> Iterable[Run]:
    template = (files / "chat_template.jinja").read_bytes().decode(errors="replace")
    tokenizer = make_tokenizer(template=template)
    system_prompt, thinks = random.choice((None, "Be brief.")), random.random() < 0.5
    yield lambda: find_chat_format(tokenizer, system_prompt=system_prompt, thinks=thinks)


_chats: list[ChatModel] = []


def _chat() -> ChatModel:
    if not _chats:
        _chats.append(make_chat_model(tiny_llama(n_layers=1), make_tokenizer()))
    return _chats[0]


_CACHED = ["Explain rain.", "Explain snow.", "Say nothing."]


def _make_cache(directory: Path) -> None:
    cache = ReplyCache(directory, {"a": 1})
    generate_replies(_chat(), _chat().encode(_CACHED), max_new_tokens=4, cache=cache)


def _break_cache(directory: Path, random: Random) -> None:
    break_file(next(directory.glob("*.jsonl")), random)


def _run_cache(files: Path, results: Path, _random: Random) -> Iterable[Run]:
    def answer() -> None:
        shutil.copytree(files, results / "cache")
        rows = _chat().encode(_CACHED)
        cache = ReplyCache(results / "cache", {"a": 1})
        replies = generate_replies(_chat(), rows, max_new_tokens=4, cache=cache)
        answers = Answers(rows={"harmful": rows}, tokens={"harmful": replies}, max_new_tokens=4)
        read_replies(_chat(), answers)

    yield answer


def _make_adapter(directory: Path) -> None:
    save_chat_model(directory / "base", tiny_llama(n_layers=2))
    make_direction(mean_difference=torch.randn(D_MODEL)).save(directory / "refusal.safetensors")
    write_adapter(source=directory / "base", direction=directory / "refusal.safetensors", output=directory / "own")


def _run_adapter(files: Path, results: Path, random: Random) -> Iterable[Run]:
    own, base = files / "own", files / "base"
    yield lambda: find_local_model(str(own))
    yield lambda: push_checkpoint(checkpoint=own, repo_id="org/name", dry_run=True)
    yield lambda: revert_checkpoint(checkpoint=own, output=results / "back", base=base)
    if random.random() < 0.5:
        together = results / "together"
        shutil.copytree(base, together)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (own / name).is_file():
                shutil.copyfile(own / name, together / name)
        yield lambda: _edit(together, files / "refusal.safetensors", results / "out", EditOptions())
        yield lambda: open_model(str(together), options=CPU)


def _make_gguf(directory: Path) -> None:
    gguf_models.write(directory, gguf_models.tiny(num_hidden_layers=1), kind=gguf_models.Q8_0)


def _break_gguf(directory: Path, random: Random) -> None:
    path = directory / "model.gguf"
    content = path.read_bytes()
    end = content.find(b"tokenizer.ggml.tokens") if random.random() < 0.6 else len(content)
    numbers = (0, 1, 2, 3, 8, 9, 31, 2**16, 2**26, 2**26 + 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
    kind = random.randrange(6)
    at = random.randrange(max(end, 1))
    if kind == 0:
        break_file(path, random)
    elif kind == 1:
        width = random.choice(("I", "Q"))
        value = struct.pack(f"<{width}", random.choice(numbers) % (1 << (32 if width == "I" else 64)))
        path.write_bytes(content[:at] + value + content[at + len(value) :])
    elif kind == 2:  # counts
        field = random.choice((4, 8, 16))
        path.write_bytes(content[:field] + struct.pack("<Q", random.choice(numbers)) + content[field + 8 :])
    elif kind == 3:  # another key, kind or value at the place of a known one
        keys = [key for key in (b"block_count", b"embedding_length", b"head_count", b"vocab_size", b"alignment",
                                b"architecture", b"rope", b"tokenizer.ggml.tokens", b"token_type", b"merges",
                                b"eos_token_id", b"chat_template") if key in content]  # fmt: skip
        key = random.choice(keys or [b"GGUF"])
        place = content.find(key) + len(key) + random.choice((-1, 0, 4, 4, 8, 12))
        value = struct.pack("<I", random.choice(numbers) % 2**32)
        path.write_bytes(content[:place] + value + content[place + 4 :])
    elif kind == 4:  # lists in lists
        depth = random.choice((2, 50, 5000))
        nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)
        entry = struct.pack("<Q", 1) + b"x" + nested
        count = int.from_bytes(content[16:24], "little") + 1
        path.write_bytes(content[:16] + struct.pack("<Q", count % 2**64) + entry + content[24:])
    else:
        path.write_bytes(content[:at] + bytes([random.randrange(256)]) + content[at + 1 :])


def _run_gguf(files: Path, results: Path, random: Random) -> Iterable[Run]:
    path, out = files / "model.gguf", results / "edited"
    options = EditOptions(strength=random.choice((1.0, 0.5)), tied=random.choice(("edit", "skip")))
    yield lambda: plan_layout(read_layout(model=str(path)))
    yield lambda: orthogonalize_checkpoint(
        source=path, direction=make_direction(mean_difference=random_direction()), output=out, options=options
    )
    yield lambda: out.is_dir() and verify_checkpoint(checkpoint=out, options=VerificationOptions(quick=True))
    yield lambda: read_gguf(path)
    yield lambda: read_gguf_config(path, name="model.gguf")
    yield lambda: _use(path)


def _use(path: Path) -> None:
    chat = load_chat_model(path, name="model", options=CPU)
    rows = chat.encode(["Explain rain."])
    chat.check_tokens(rows, ["Explain rain."], n_new=2)
    generate_replies(chat, rows, max_new_tokens=2)


def _make_model(directory: Path) -> None:
    save_chat_model(directory / "model", tiny_llama(n_layers=1))
    (directory / "model" / "processor_config.json").write_text(json.dumps({"chat_template": CHATML}))


def _break_tokenizer(directory: Path, random: Random) -> None:
    model = directory / "model"
    names = [path.name for path in model.iterdir() if path.suffix in {".json", ".jinja"} and path.name != "config.json"]
    if random.random() < 0.1:
        (model / random.choice(names)).unlink()
        return
    _break_any(*(os.path.join("model", name) for name in sorted(names)))(directory, random)


def _run_model(files: Path, _results: Path, random: Random) -> Iterable[Run]:
    yield lambda: _use(files / "model")
    if random.random() < 0.3:
        yield lambda: load_streamed_model(files / "model", name="model", options=CPU)


FORMATS: dict[str, Format] = {
    "direction": Format(make=_make_direction, break_one=_break_any("own/refusal.safetensors"), runs=_run_direction),
    "record": Format(make=_make_record, break_one=_break_any("out/abliteration.json"), runs=_run_record),
    "strengths": Format(make=_make_strengths, break_one=_break_any("strengths.json"), runs=_run_strengths),
    "prompts": Format(
        make=_make_prompts,
        break_one=_break_any("p.txt", "p.json", "p.jsonl", "p.csv", "p.parquet"),
        runs=_run_prompts,
    ),
    "template": Format(
        make=lambda directory: (directory / "chat_template.jinja").write_text(CHATML),
        break_one=_break_template,
        runs=_run_template,
    ),
    "cache": Format(make=_make_cache, break_one=_break_cache, runs=_run_cache),
    "adapter": Format(
        make=_make_adapter,
        break_one=_break_any(
            "own/adapter_config.json",
            "own/adapter_config.json",
            "own/abliteration.json",
            "own/adapter_model.safetensors",
        ),
        runs=_run_adapter,
    ),
    "gguf": Format(make=_make_gguf, break_one=_break_gguf, runs=_run_gguf),
    "tokenizer": Format(make=_make_model, break_one=_break_tokenizer, runs=_run_model),
    "config": Format(make=_make_model, break_one=_break_any("model/config.json"), runs=_run_model),
}

"""The same edit in GGUF files beside a checkpoint: what goes along in a push, and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abliterate.directions import encode_rows, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import read_record, shards_sha256
from abliterate.errors import AbliterateError, InputError, VerificationError
from abliterate.release import publishing
from abliterate.release.options import PushOptions
from abliterate.release.publishing import PushReport, push_checkpoint
from abliterate.release.push_package import Sibling, read_push_package
from abliterate.release.siblings import read_siblings
from abliterate.release.verification import VerificationOptions, verify_checkpoint
from tests.support.fake_hub import FakeHub, evaluation_report
from tests.support.gguf_models import F16, Q8_0, tiny, write_gguf
from tests.support.tiny_models import make_tokenizer, random_direction

DIRECTION = make_direction(mean_difference=random_direction())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model and its GGUF file, both edited along one direction: `edited` and `gguf`."""
    place, model = tmp_path_factory.mktemp("made"), tiny("qwen2")
    model.save_pretrained(place / "base")
    write_gguf(place / "tiny-Q8_0.gguf", model, make_tokenizer(), kind=Q8_0)
    orthogonalize_checkpoint(source=place / "base", direction=DIRECTION, output=place / "edited")
    orthogonalize_checkpoint(source=place / "tiny-Q8_0.gguf", direction=DIRECTION, output=place / "gguf")
    return place


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy of what was made, to be changed."""
    for name in ("edited", "gguf"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


def push(out: Path, *siblings: Path, dry_run: bool = False) -> PushReport:
    options = PushOptions(siblings=siblings)
    return push_checkpoint(checkpoint=out, repo_id="org/pushed", options=options, dry_run=dry_run)


def refused(kind: type[AbliterateError], match: str, out: Path, *siblings: Path) -> str:
    with pytest.raises(kind, match=match) as error:
        push(out, *siblings)
    assert "\n" not in str(error.value)
    assert "nothing was sent" in str(error.value) or kind is VerificationError
    return str(error.value)


def edit_record(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "abliteration.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


class TestWhatGoes:
    def test_the_gguf_file_and_its_record_go_along(self, hub, place):
        report = push(place / "edited", place / "gguf")
        files = hub.repos["org/pushed"].files
        assert files["tiny-Q8_0.gguf"] == (place / "gguf" / "tiny-Q8_0.gguf").read_bytes()
        assert files["model.safetensors"] == (place / "edited" / "model.safetensors").read_bytes()
        here, there = (
            json.loads((place / "gguf" / "abliteration.json").read_text()),
            json.loads(files["abliteration.tiny-Q8_0.json"]),
        )
        assert there["base"].pop("model") == "tiny-Q8_0.gguf"
        here["base"].pop("model")
        assert there == here
        assert {file.path: file.bytes for file in report.files} == {
            name: len(content) for name, content in files.items() if name != ".gitattributes"
        }
        assert report.left_out == ()

    def test_the_card_names_it(self, place):
        card = push(place / "edited", place / "gguf", dry_run=True).card
        size = (place / "gguf" / "tiny-Q8_0.gguf").stat().st_size
        row = f"| `tiny-Q8_0.gguf` | GGUF, edited in Q8\\_0 | {size:,} | `abliteration.tiny-Q8_0.json` |"
        assert row in card.split("## Files\n")[1].split("\n## ")[0]
        assert "`llama-server -m` `tiny-Q8_0.gguf`" in card
        assert "llama.cpp from a file below" in card
        alone = push(place / "edited", dry_run=True).card
        assert "## Files" not in alone
        assert "llama.cpp after its own conversion" in alone

    def test_what_arrives_can_be_verified(self, hub, made, place):
        push(place / "edited", place / "gguf")
        files = hub.repos["org/pushed"].files
        whole = write_files(place / "whole", files)
        record = files["abliteration.tiny-Q8_0.json"]
        alone = write_files(place / "alone", {"abliteration.json": record, "tiny-Q8_0.gguf": files["tiny-Q8_0.gguf"]})
        for directory, base in ((whole, made / "base"), (alone, made / "tiny-Q8_0.gguf")):
            report = verify_checkpoint(checkpoint=directory, base=base, options=VerificationOptions(quick=True))
            assert report.passed, report

    def test_what_else_is_in_its_directory_stays(self, place):
        for name in ("evaluation.json", "notes.txt"):
            (place / "gguf" / name).write_text("{}")
        report = push(place / "edited", place / "gguf", dry_run=True)
        assert report.left_out == ("gguf/evaluation.json", "gguf/notes.txt")

    def test_other_files_of_the_base_stay_and_its_record_names_none_of_them(self, hub, made, tmp_path):
        base = write_files(tmp_path / "base", {"README.md": b"the base's card", "LICENSE": b"the licence"})
        shutil.copy(made / "tiny-Q8_0.gguf", base)
        orthogonalize_checkpoint(source=base, direction=DIRECTION, output=tmp_path / "gguf")
        assert {"LICENSE", "README.md"} <= read_record(tmp_path / "gguf").files.keys()
        report = push(made / "edited", tmp_path / "gguf")
        assert report.left_out == ("gguf/LICENSE", "gguf/README.md")
        files = hub.repos["org/pushed"].files
        assert "LICENSE" not in files
        assert files["README.md"].decode() == report.card
        assert json.loads(files["abliteration.tiny-Q8_0.json"])["side_files"] == {}

    def test_other_content_arrived(self, hub, place, monkeypatch):
        real = publishing.list_remote_files

        def altered(repo_id, *, revision):
            files = real(repo_id, revision=revision)
            return files | {"tiny-Q8_0.gguf": replace(files["tiny-Q8_0.gguf"], sha256="0" * 64)}

        monkeypatch.setattr(publishing, "list_remote_files", altered)
        with pytest.raises(VerificationError, match=r"tiny-Q8_0\.gguf arrived with other content"):
            push(place / "edited", place / "gguf")

    def test_what_was_measured_was_not_measured_with_it(self, place):
        record = json.loads((place / "edited" / "abliteration.json").read_text())
        evaluation = evaluation_report(shards_sha256=shards_sha256(record))
        said = "The measurements below are of the checkpoint and not of these files."
        assert said not in push(place / "edited", place / "gguf", dry_run=True).card
        (place / "edited" / "evaluation.json").write_text(json.dumps(evaluation))
        assert said in push(place / "edited", place / "gguf", dry_run=True).card

    def test_beside_an_adapter_and_beside_another_gguf_file(self, made, tmp_path):
        write_adapter(source=made / "base", direction=DIRECTION, output=tmp_path / "adapter")
        assert push(tmp_path / "adapter", made / "gguf", dry_run=True).card.count("tiny-Q8_0.gguf") == 2
        file = write_gguf(tmp_path / "tiny-F16.gguf", tiny("qwen2"), make_tokenizer(), kind=F16)
        orthogonalize_checkpoint(source=file, direction=DIRECTION, output=tmp_path / "other")
        report = push(made / "edited", made / "gguf", tmp_path / "other", dry_run=True)
        assert {"tiny-Q8_0.gguf", "tiny-F16.gguf"} <= {file.path for file in report.files}
        assert "tiny-F16.gguf" in push(made / "gguf", tmp_path / "other", dry_run=True).card

    def test_of_a_model_in_parts_one_record_goes(self, made):
        record = read_record(made / "gguf")
        parts = {f"m-0000{n}-of-00002.gguf": {} for n in (2, 1)}
        sibling = Sibling(record=replace(record, content={**record.content, "shards": parts}), left_out=())
        assert sibling.record_name == "abliteration.m.json"
        assert set(sibling.weights) == set(parts)


class TestWhatIsRefused:
    """Before the Hub is asked for anything."""

    @pytest.fixture(autouse=True)
    def _nothing_is_asked(self, hub):
        yield
        assert not hub.requests

    def test_what_no_record_vouches_for(self, made, place):
        (place / "gguf" / "abliteration.json").unlink()
        for path, said in ((place / "gguf", r"has no abliteration\.json"), (made / "tiny-Q8_0.gguf", "is a file")):
            text = refused(InputError, said, place / "edited", path)
            assert "`abliterate orthogonalize BASE.gguf --direction FILE -o DIR`" in text
            assert "nothing vouches for what is converted from an edited checkpoint" in text
        with pytest.raises(InputError, match="no such directory"):
            push(place / "edited", place / "nowhere")

    def test_another_checkpoint_and_an_adapter(self, made, place):
        refused(InputError, r"is a checkpoint \(model\.safetensors\)", place / "edited", made / "edited")
        write_adapter(source=made / "base", direction=DIRECTION, output=place / "adapter")
        refused(InputError, "is an adapter, and only GGUF files go", place / "edited", place / "adapter")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda r: r["directions"][0].update(sha256="e" * 64),
                "other directions were removed, SHA-256 eeeeeeeeeeee",
            ),
            (lambda r: r["directions"].append(r["directions"][0]), "other directions were removed"),
            (
                lambda r: r.update(subspace=encode_rows(random_direction(seed=8)[None].double().numpy())),
                "its subspace is not the one of the same directions",
            ),
            (lambda r: r["options"].update(strength=0.5), r"made with strength 0\.5 and not 1\.0"),
            (lambda r: r["options"].update(layers=[0, 2]), "made with layers 0,2 and not None"),
            (lambda r: r["options"].update(components=["attn", "mlp"]), "components attn,mlp and not embed,attn,mlp"),
            (lambda r: r["base"].update(model_type="gemma2"), "its base is of type gemma2 and not qwen2"),
            (
                lambda r: r["base"].update(abliteration={"directions": [{"sha256": "a" * 64}]}),
                "one of the two bases had been edited before",
            ),
            (
                lambda r: r["tensors"][3].update(shape=[32, 96]),
                "its base is another model: 3072 numbers were edited in attn of layer 1 and not 1024",
            ),
            (
                lambda r: r["tensors"].pop(),
                "its base is another model: 0 numbers were edited in mlp of layer 2 and not",
            ),
            (lambda r: r["tensors"][0].update(shape=7), r"gguf: abliteration\.json or .* is not as it was written"),
        ],
    )
    def test_another_edit_or_base(self, place, change, match):
        edit_record(place / "gguf", change)
        with pytest.raises(InputError, match=match) as error:
            push(place / "edited", place / "gguf")
        assert "\n" not in str(error.value)

    def test_other_strengths(self, place):
        strengths = {"file": "s.json", "direction_sha256": "d", "embed": 1.0, "attn": [1.0] * 3, "mlp": [1.0] * 3}
        for name in ("edited", "gguf"):
            edit_record(place / name, lambda record: record["options"].update(strengths=strengths))
        edit_record(place / "gguf", lambda record: record["options"]["strengths"].update(file="renamed.json"))
        package = read_push_package(place / "edited")
        assert len(read_siblings([place / "gguf"], package=package)) == 1
        edit_record(place / "gguf", lambda record: record["options"]["strengths"].update(embed=0.5))
        refused(InputError, "it was made with other strengths", place / "edited", place / "gguf")

    def test_what_differs_and_says_nothing(self, place):
        """llama.cpp's converter calls several types llama, and how a head is tied does not matter where it is not."""
        edit_record(place / "gguf", lambda record: record["base"].update(model_type="llama"))
        edit_record(place / "gguf", lambda record: record["options"].update(tied="skip"))
        package = read_push_package(place / "edited")
        assert len(read_siblings([place / "gguf"], package=package)) == 1
        edit_record(place / "gguf", lambda record: record["base"].update(tied_embeddings=True))
        refused(InputError, "made with tied skip and not edit", place / "edited", place / "gguf")

    def test_a_changed_byte(self, place, hub):
        path = place / "gguf" / "tiny-Q8_0.gguf"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        with pytest.raises(VerificationError, match="its SHA-256 is not the one in"):
            push(place / "edited", place / "gguf", dry_run=True)
        path.write_bytes(data + b"x")
        refused(VerificationError, "bytes, not", place / "edited", place / "gguf")

    def test_weights_that_its_record_does_not_name(self, place):
        (place / "gguf" / "tiny-Q4_K.gguf").write_bytes(b"x")
        refused(VerificationError, "does not name: tiny-Q4_K.gguf", place / "edited", place / "gguf")

    def test_two_files_of_one_name(self, made, place):
        text = refused(InputError, "goes already, from", place / "edited", place / "gguf", made / "gguf")
        assert text.startswith(f"{made / 'gguf'}: tiny-Q8_0.gguf goes already, from {place / 'gguf'}; ")
        refused(InputError, "goes already, from", place / "edited", place / "gguf", place / "gguf")
        refused(InputError, "goes already, from", place / "gguf", place / "gguf")


def test_an_edit_undone_in_a_sibling_is_seen(made, place, hub):
    """A record whose hash is right does not vouch for an edit that is not there."""
    base = (made / "tiny-Q8_0.gguf").read_bytes()
    (place / "gguf" / "tiny-Q8_0.gguf").write_bytes(base)
    entry = {"sha256": hashlib.sha256(base).hexdigest(), "bytes": len(base)}
    edit_record(place / "gguf", lambda record: record["shards"].update({"tiny-Q8_0.gguf": entry}))
    with pytest.raises(VerificationError, match=r"gguf: tensor .* has a component of .* \(nothing was sent\)"):
        push(place / "edited", place / "gguf")
    assert not hub.repos

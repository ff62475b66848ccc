"""Pushing: only what the record vouches for, only where it was asked to go, and again after an interruption."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from abliterate.checkpoints import hub as hub_module
from abliterate.checkpoints.model_source import resolve_model
from abliterate.directions import make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import shards_sha256
from abliterate.errors import AbliterateError, CheckpointError, HubError, InputError, VerificationError
from abliterate.progress import SILENT
from abliterate.release import publishing
from abliterate.release.options import PushOptions, VerificationOptions
from abliterate.release.publishing import PushReport, push_checkpoint
from abliterate.release.verification import verify_checkpoint
from tests.support.fake_hub import FakeHub, evaluation_report, write_checkpoint
from tests.support.gguf_models import F16, Q8_0, tiny, write_gguf
from tests.support.tiny_models import make_tokenizer, random_direction, save_tiny_model

RECORD = "abliteration.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SENT = {
    *SHARDS,
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "LICENSE",
    "README.md",
    "abliteration.json",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out")


class Notes:
    """A progress reporter that keeps what it is told."""

    def __init__(self):
        self.messages, self.steps, self.total = [], 0, 0

    def task(self, description, *, total, unit=""):
        self.total += total
        return self

    def __enter__(self):
        return self.advance

    def __exit__(self, *_):
        return None

    def advance(self, steps):
        self.steps += steps

    def message(self, text):
        self.messages.append(text)


def push(out: Path, repo_id: str = "org/pushed", *, dry_run=False, progress=SILENT, **options) -> PushReport:
    return push_checkpoint(
        checkpoint=out, repo_id=repo_id, options=PushOptions(**options), dry_run=dry_run, progress=progress
    )


def refused(kind: type[AbliterateError], match: str, out: Path, **options) -> str:
    with pytest.raises(kind, match=match) as error:
        push(out, **options)
    text = str(error.value)
    assert "\n" not in text
    assert "hf_test" not in text
    return text


def edit_record(out: Path, change) -> None:
    path = out / "abliteration.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


class TestPush:
    def test_everything_arrives(self, hub, out):
        before = hashes(out)
        report = push(out)
        repo = hub.repos["org/pushed"]
        assert repo.private
        assert set(repo.files) == {*SENT, ".gitattributes"}
        for name in SENT - {"README.md"}:
            assert repo.files[name] == (out / name).read_bytes()
        assert repo.files["README.md"].decode() == report.card
        assert yaml.safe_load(report.card.split("\n---\n")[0])["license"] == "apache-2.0"
        assert hashes(out) == before
        assert report.created is True
        assert report.commit == repo.refs["main"]
        assert report.url == f"{hub.endpoint}/org/pushed"
        assert {file.path for file in report.files} == SENT
        assert report.total_bytes == sum(len(repo.files[name]) for name in SENT)
        assert (report.base_model, report.license, report.evaluated) == ("org/base", "apache-2.0", False)
        assert (report.left_out, report.remote_only) == ((), ())
        assert repo.messages[-1] == report.commit_message

    @pytest.mark.parametrize("model", ["/home/someone/private/my-model", "someone/private/my-model/"])
    def test_no_folder_of_this_machine_goes(self, hub, out, model):
        def of_this_machine(record: dict) -> None:
            record["base"].update(model=model, revision=None)
            record["base"]["abliteration"] = {"base": {"model": model, "revision": None}}
            metadata = {"model": model, "revision": None, "arguments": ["--harmful", "/home/someone/h.txt"]}
            record["directions"][0]["metadata"].update(metadata)

        edit_record(out, of_this_machine)
        report = evaluation_report() | {"model": str(out), "base": "/home/someone/private/my-model"}
        (out / "evaluation.json").write_text(json.dumps(report))
        before = hashes(out)
        pushed = push(out)
        files = hub.repos["org/pushed"].files
        for name in ("abliteration.json", "evaluation.json", "README.md"):
            assert b"someone" not in files[name]
            assert str(out.parent).encode() not in files[name]
        record = json.loads(files["abliteration.json"])
        assert record["base"]["model"] == record["directions"][0]["metadata"]["model"] == "my-model"
        assert record["directions"][0]["metadata"]["arguments"] == ["--harmful", "h.txt"]
        assert record["tensors"] == json.loads((out / "abliteration.json").read_text())["tensors"]
        assert json.loads(files["evaluation.json"])["base"] == "my-model"
        assert {file.path: file.bytes for file in pushed.files} == {
            name: len(content) for name, content in files.items() if name != ".gitattributes"
        }
        assert hashes(out) == before

    @pytest.mark.parametrize("form", ["checkpoint", "adapter", "gguf"])
    def test_nothing_of_the_owners_disk_goes(self, hub, tmp_path, monkeypatch, form):
        """Not in any byte: neither the folders, nor the home directory, nor the host's name."""
        monkeypatch.setattr("socket.gethostname", lambda: "marked-host")
        monkeypatch.setenv("HOME", str(tmp_path / "marked-home"))
        place = tmp_path / "marked-home" / "marked-folder"
        place.mkdir(parents=True)
        model, direction = tiny("qwen2"), place / "marked-direction" / "refusal.safetensors"
        direction.parent.mkdir()
        model.save_pretrained(place / "base")
        told = {"model": str(place / "base"), "revision": None, "arguments": ["--harmful", str(place / "h.txt")]}
        make_direction(mean_difference=random_direction(), metadata=told).save(direction)
        config = json.loads((place / "base" / "config.json").read_text())
        (place / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{place}/marked-run/3"}))
        state = {"log": [f"{place}/run", str(Path.home())], "best_model_checkpoint": "/marked/elsewhere/step-10"}
        (place / "base" / "trainer_state.json").write_text(json.dumps(state))
        (place / "base" / "mergekit_config.yml").write_text(f"- model: {place}/run\n- model: {Path.home()}/x\n")
        (place / "base" / "runs").mkdir()
        (place / "base" / "runs" / "events.out.tfevents.1.marked-host.2.0").write_bytes(b"marked-host")
        for kind, name in ((Q8_0, "tiny-Q8_0"), (F16, "tiny-F16")):
            file = write_gguf(place / f"{name}.gguf", model, make_tokenizer(), kind=kind)
            orthogonalize_checkpoint(source=file, direction=direction, output=place / name)
        if form == "adapter":
            write_adapter(source=place / "base", direction=direction, output=place / "out")
        elif form == "checkpoint":
            orthogonalize_checkpoint(source=place / "base", direction=direction, output=place / "out")
        out = place / "tiny-Q8_0" if form == "gguf" else place / "out"
        siblings = tuple(place / name for name in ("tiny-Q8_0", "tiny-F16") if place / name != out)
        evaluation = evaluation_report(
            model=str(out),
            base=str(place / "base"),
            shards_sha256=None if form == "adapter" else shards_sha256(json.loads((out / RECORD).read_text())),
            arguments=["--server", "http://marked-host:8000/v1", "--judge", str(place / "judge")],
            server={"url": "http://marked-host:8000/v1", "model": str(out), "described": {"root": str(out)}},
        )
        (out / "evaluation.json").write_text(json.dumps(evaluation))
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        push(out, siblings=siblings, gated="manual")
        files = hub.repos["org/pushed"].files
        assert {f"{each.name}.gguf" for each in siblings} <= files.keys()
        assert "evaluation.json" in files
        # The last part of the direction's folder would be the owner's, too.
        for secret in (b"marked", str(Path.home()).encode(), str(tmp_path).encode()):
            assert not [name for name, content in files.items() if secret in content or secret in name.encode()]
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        if form != "adapter":
            for name, entry in json.loads(files[RECORD])["side_files"].items():
                assert hashlib.sha256(files[name]).hexdigest() == entry["sha256"]

    def test_a_config_without_its_folder_verifies(self, hub, tmp_path):
        base = save_tiny_model(tmp_path / "folder" / "base")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
        direction = make_direction(mean_difference=random_direction())
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
        push(tmp_path / "out")
        (tmp_path / "copy").mkdir()
        for name, content in hub.repos["org/pushed"].files.items():
            (tmp_path / "copy" / name).write_bytes(content)
        assert json.loads((tmp_path / "copy" / "config.json").read_text())["_name_or_path"] == "base"
        quick = VerificationOptions(quick=True)
        report = verify_checkpoint(checkpoint=tmp_path / "copy", base=base, options=quick)
        assert report.passed, report.failures

    def test_an_adapter_names_its_base_without_the_folder(self, hub, tmp_path):
        base = save_tiny_model(tmp_path / "folder" / "base")
        direction = make_direction(mean_difference=random_direction())
        write_adapter(source=base, direction=direction, output=tmp_path / "adapter")
        push(tmp_path / "adapter")
        files = hub.repos["org/pushed"].files
        config = files["adapter_config.json"]
        assert json.loads(config)["base_model_name_or_path"] == "base"
        entry = json.loads(files["abliteration.json"])["side_files"]["adapter_config.json"]
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(config).hexdigest(), len(config))
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]

    def test_the_client_of_the_hub_can_load_it_again(self, hub, out):
        push(out)
        source = resolve_model("org/pushed")
        assert (source.path / SHARDS[0]).read_bytes() == (out / SHARDS[0]).read_bytes()

    def test_in_parts(self, monkeypatch, tmp_path, out):
        with FakeHub(part_size=5000) as server:
            server.use(monkeypatch, tmp_path)
            push(out)
        assert server.count("PUT /lfs/part/") == 8
        assert server.repos["org/pushed"].files[SHARDS[1]] == (out / SHARDS[1]).read_bytes()

    def test_public_and_message(self, hub, out):
        report = push(out, private=False, commit_message="My own words")
        assert not hub.repos["org/pushed"].private
        assert hub.repos["org/pushed"].messages[-1] == report.commit_message == "My own words"

    def test_a_bare_name_belongs_to_the_user(self, hub, out):
        assert push(out, repo_id="mine").repo_id == "tester/mine"
        assert "tester/mine" in hub.repos

    def test_again_without_a_change_makes_no_commit(self, hub, out):
        first = push(out)
        again = push(out)
        assert again.created is False
        assert again.commit == first.commit
        assert hub.count("POST .*/commit/") == 1
        assert hub.count("PUT /lfs/") == 2

    def test_what_else_is_in_the_repository_stays(self, hub, out):
        hub.add_repo("org/pushed", {"notes.txt": b"old", "README.md": b"old"}, private=True)
        report = push(out)
        assert report.remote_only == ("notes.txt",)
        assert hub.repos["org/pushed"].files["notes.txt"] == b"old"
        assert hub.repos["org/pushed"].files["README.md"].decode() == report.card

    def test_progress(self, hub, out):
        notes = Notes()
        push(out, progress=notes)
        assert notes.steps == notes.total > 30_000
        assert notes.messages == ["uploading 8 files to org/pushed"]

    def test_where_links_cannot_be_made_files_are_copied(self, hub, out, monkeypatch):
        def no_links(*_args, **_kwargs):
            raise OSError("no links here")

        monkeypatch.setattr(Path, "symlink_to", no_links)
        push(out)
        assert hub.repos["org/pushed"].files[SHARDS[0]] == (out / SHARDS[0]).read_bytes()


class TestDryRun:
    def test_no_network_and_no_token(self, out, monkeypatch):
        def no_network(*_args, **_kwargs):
            raise AssertionError("a dry run asked the network")

        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("httpx2.Client.send", no_network)
        monkeypatch.setattr("socket.socket.connect", no_network)
        (out / "evaluation.json").write_text(json.dumps(evaluation_report()))
        report = push(out, dry_run=True, repo_id="pushed")
        assert (report.dry_run, report.private, report.created, report.commit) == (True, True, None, None)
        assert {file.path for file in report.files} == {*SENT, "evaluation.json"}
        assert report.total_bytes == sum(file.bytes for file in report.files)
        assert "96.9 %" in report.card

    def test_it_checks_as_a_push_does(self, out):
        (out / SHARDS[0]).write_bytes(b"x" * (out / SHARDS[0]).stat().st_size)
        refused(VerificationError, "SHA-256", out, dry_run=True)


class TestWhatIsChecked:
    """All before anything is created on the Hub."""

    @pytest.fixture(autouse=True)
    def _nothing_is_created(self, hub):
        yield
        assert not hub.repos
        assert not hub.count("POST")

    def test_no_record(self, out):
        (out / "abliteration.json").unlink()
        text = refused(InputError, r"no abliteration\.json", out)
        assert "abliterate orthogonalize" in text

    @pytest.mark.parametrize("change", [{"layers": 7}, {"add": {}}, {"components": 1}, {"layers": [1]}])
    @pytest.mark.parametrize("is_adapter", [False, True])
    def test_options_in_the_record_of_another_kind(self, tmp_path, out, change, is_adapter):
        if is_adapter:
            base = save_tiny_model(tmp_path / "base")
            direction = make_direction(mean_difference=random_direction())
            out = tmp_path / "adapter"
            write_adapter(source=base, direction=direction, output=out)
        path = out / "abliteration.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"options": record["options"] | change}))
        # The plan is made anew of a checkpoint's options; an adapter's are read for its card alone.
        said = "is not as it was written" if is_adapter else "options cannot be read"
        assert "orthogonalize` again" in refused(InputError, said, out, dry_run=True)

    def test_a_record_that_names_a_file_outside(self, out):
        edit_record(out, lambda record: record["side_files"].update({"../secret": {"bytes": 1, "sha256": "0"}}))
        refused(VerificationError, "outside the directory", out)

    @pytest.mark.parametrize("name", [SHARDS[1], "config.json", "README.md"])
    def test_a_changed_byte(self, out, name):
        data = bytearray((out / name).read_bytes())
        data[-2] ^= 1
        (out / name).write_bytes(data)
        text = refused(VerificationError, r"its SHA-256 is not the one in abliteration\.json", out)
        assert str(out / name) in text

    def test_a_longer_file(self, out):
        with (out / SHARDS[0]).open("ab") as stream:
            stream.write(b"x")
        refused(VerificationError, "bytes, not", out)

    def test_a_missing_file(self, out):
        (out / SHARDS[0]).unlink()
        refused(VerificationError, f"{SHARDS[0]}: missing", out)

    @pytest.mark.parametrize("name", ["model.safetensors", "old/pytorch_model.BIN", "model.gguf"])
    def test_weights_that_the_record_does_not_name(self, out, name):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
        assert name in refused(VerificationError, "does not name", out)

    @pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "../x", ""])
    def test_repo_id(self, hub, out, repo_id):
        refused(InputError, "is not a valid Hub id", out, repo_id=repo_id)
        assert not hub.requests


class TestWhatIsLeftOut:
    def test_files_of_ones_own(self, hub, out):
        (out / "completions.jsonl").write_text("{}")
        assert push(out).left_out == ("completions.jsonl",)
        assert "completions.jsonl" not in hub.repos["org/pushed"].files

    def test_unedited_weights_copied_from_the_base(self, hub, out):
        (out / "pytorch_model.bin").write_bytes(b"base")
        entry = {"bytes": 4, "sha256": hashlib.sha256(b"base").hexdigest()}
        edit_record(out, lambda record: record["side_files"].update({"pytorch_model.bin": entry}))
        assert push(out).left_out == ("pytorch_model.bin",)
        assert "pytorch_model.bin" not in hub.repos["org/pushed"].files


class TestEvaluation:
    def test_of_the_directory(self, hub, out):
        (out / "evaluation.json").write_text(json.dumps(evaluation_report()))
        report = push(out)
        assert report.evaluated
        assert "3.1 % (1.2 to 7.8)" in report.card
        assert json.loads(hub.repos["org/pushed"].files["evaluation.json"]) == evaluation_report()

    def test_one_that_cannot_be_used(self, out, tmp_path):
        refused(InputError, "no such file", out, dry_run=True, evaluation=tmp_path / "measured.json")

    def test_of_another_file(self, hub, out, tmp_path):
        other = tmp_path / "measured.json"
        other.write_text(json.dumps(evaluation_report(kl_harmless=0.5)))
        (out / "evaluation.json").write_text("{}")
        assert "| 0.5 |" in push(out, evaluation=other).card
        assert hub.repos["org/pushed"].files["evaluation.json"] == other.read_bytes()


class TestLicence:
    def test_of_the_base_on_the_hub(self, hub, tmp_path):
        repo = hub.add_repo("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
        out = write_checkpoint(tmp_path / "o", card="no front matter", revision=repo.refs["main"])
        assert push(out, dry_run=True).license is None
        assert push(out).license == "mit"

    def test_of_a_base_that_is_gone(self, hub, tmp_path):
        notes = Notes()
        report = push(write_checkpoint(tmp_path / "o", card="no front matter"), progress=notes)
        assert report.license is None
        assert "licence is left out of the card: org/base: " in notes.messages[0]

    def test_of_a_local_base(self, tmp_path):
        base = tmp_path / "base"
        base.mkdir()
        out = write_checkpoint(tmp_path / "o", card="---\nbase_model: a/b\n---\n", base=str(base), revision=None)
        report = push(out, dry_run=True)
        assert (report.base_model, report.license) == ("a/b", None)
        (base / "README.md").write_text("---\nlicense: mit\n---\n")
        assert push(out, dry_run=True).license == "mit"


class TestRefusalsOfTheHub:
    def test_no_token(self, hub, out, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        refused(HubError, "no Hub token found; run `hf auth login` or set HF_TOKEN", out)
        assert not hub.requests

    def test_a_wrong_token(self, hub, out, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)
        assert "zzz" not in refused(HubError, r"did not accept the token \(401\)", out)
        assert not hub.repos

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_token_that_may_not_write(self, hub, out, monkeypatch, exists):
        if exists:
            hub.add_repo("org/pushed", private=True)
        monkeypatch.setenv("HF_TOKEN", "hf_read")
        refused(HubError, r"org/pushed: the token may not write here \(403\)", out)
        assert not hub.lfs

    def test_a_namespace_of_somebody_else(self, hub, out):
        refused(HubError, r"may not write here \(403\).*namespace 'others'", out, repo_id="others/model")

    def test_gated(self, hub, out):
        hub.add_repo("org/pushed", private=True)
        hub.fail_next("POST .*/preupload/", status=403, error_code="GatedRepo")
        text = refused(HubError, r"org/pushed: this model is gated \(403\)", out)
        assert f"accept its conditions at {hub.endpoint}/org/pushed" in text

    @pytest.mark.parametrize(
        ("there", "asked", "match"),
        [
            (False, True, "exists and is public, but this push is private"),
            (True, False, "exists and is private, but this push is --public"),
        ],
    )
    def test_a_repository_of_other_visibility(self, hub, out, there, asked, match):
        repo = hub.add_repo("org/pushed", private=there)
        refused(HubError, match, out, private=asked)
        assert repo.private is there
        assert not hub.count("POST")

    def test_a_server_that_makes_it_public_gets_no_weights(self, hub, out, monkeypatch):
        monkeypatch.setattr(
            publishing, "create_repo", lambda repo_id, *, private: hub.add_repo(repo_id, private=not private)
        )
        refused(HubError, "exists and is public", out)
        assert not hub.lfs

    def test_a_gitignore_that_keeps_files_out(self, hub, out):
        hub.add_repo("org/pushed", {".gitignore": b"*.safetensors\n"}, private=True)
        refused(VerificationError, f"{SHARDS[0]} did not arrive; a .gitignore", out)

    def test_other_content_arrived(self, hub, out, monkeypatch):
        real = publishing.list_remote_files

        def altered(repo_id, *, revision):
            files = real(repo_id, revision=revision)
            return files | {SHARDS[0]: hub_module.RemoteFile(bytes=files[SHARDS[0]].bytes, sha256="0" * 64)}

        monkeypatch.setattr(publishing, "list_remote_files", altered)
        refused(VerificationError, f"{SHARDS[0]} arrived with other content", out)

    def test_a_card_the_hub_rejects(self, hub, out):
        hub.fail_next("POST /api/validate-yaml", status=400)
        refused(HubError, "Invalid metadata in README.md", out)
        assert not hub.lfs

    def test_out_of_order(self, hub, out):
        hub.fail_next("POST .*/commit/", status=503)
        refused(HubError, r"out of order \(503\).*run the same command again", out)
        assert push(out).created is False


class TestGating:
    """Readers ask for access before the first byte of a weight is there, and never by a change of what exists."""

    @pytest.mark.parametrize("gated", ["manual", "auto"])
    @pytest.mark.parametrize("private", [True, False])
    def test_it_is_set_before_anything_is_uploaded(self, hub, out, gated, private):
        report = push(out, gated=gated, private=private)
        assert (hub.repos["org/pushed"].gated, hub.repos["org/pushed"].private) == (gated, private)
        assert (report.gated, report.private) == (gated, private)
        requests = [request for request in hub.requests if request.startswith(("POST", "PUT"))]
        assert requests[:2] == ["POST /api/repos/create", "PUT /api/models/org/pushed/settings"]
        assert hub.count("settings") == 1
        assert report.card == hub.repos["org/pushed"].files["README.md"].decode()

    def test_the_card_has_the_terms(self, out):
        card = push(out, gated="manual", dry_run=True).card
        terms = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))["extra_gated_prompt"]
        assert "you agree to use this model for research" in terms
        assert "the owner of this repository decides on each request" in card
        assert "it is given at once" in push(out, gated="auto", dry_run=True).card
        alone = push(out, dry_run=True)
        assert "extra_gated" not in alone.card
        assert "## Access" not in alone.card
        assert alone.gated is None

    @pytest.mark.parametrize("gated", ["manual", "auto"])
    def test_a_repository_that_exists_must_be_so_already(self, hub, out, gated):
        repo = hub.add_repo("org/pushed", private=True, gated=gated)
        assert push(out, gated=gated).gated == gated
        other = {"manual": "auto", "auto": "manual"}[gated]
        sent = len(hub.lfs)
        refused(HubError, rf"exists and is gated \({gated}\), but this push is --gated {other}", out, gated=other)
        assert (repo.gated, len(hub.lfs)) == (gated, sent)
        assert not hub.count("settings|create")

    def test_one_that_exists_and_is_open(self, hub, out):
        repo = hub.add_repo("org/pushed", private=True)
        text = refused(HubError, "exists and is not gated, but this push is --gated manual", out, gated="manual")
        assert "nothing was sent" in text
        assert repo.gated is False
        assert not hub.count("POST|PUT")

    def test_without_the_option_what_exists_stays_and_is_told(self, hub, out):
        repo = hub.add_repo("org/pushed", private=True, gated="auto")
        report = push(out)
        assert (report.gated, repo.gated) == ("auto", "auto")
        assert "extra_gated_prompt" in report.card

    def test_a_hub_that_does_not_set_it_gets_no_weights(self, hub, out):
        hub.fail_next("PUT .*/settings", status=403, message="not for you")
        text = refused(HubError, r"may not write here \(403\) \(not for you\)", out, gated="manual")
        assert f"org/pushed was made and is empty: gate it at {hub.endpoint}/org/pushed/settings, or delete it" in text
        assert not hub.lfs
        assert set(hub.repos["org/pushed"].files) == {".gitattributes"}

    def test_nor_one_that_says_it_did_and_did_not(self, hub, out, monkeypatch):
        monkeypatch.setattr(publishing, "gate_repo", lambda *_args, **_options: None)
        refused(HubError, "is not gated, but this push is --gated manual", out, gated="manual")
        assert not hub.lfs

    def test_no_other_word(self, hub, out):
        refused(InputError, "gated is 'maybe'; give one of auto, manual", out, gated="maybe")
        assert not hub.requests


class TestCollections:
    SLUG = "org/edited-models-64f9a55bb3115b4f513ec026"

    def test_the_model_is_added(self, hub, out):
        hub.collections[self.SLUG] = ["org/older"]
        assert push(out, collection=self.SLUG).collection == self.SLUG
        assert hub.collections[self.SLUG] == ["org/older", "org/pushed"]
        assert push(out, collection=self.SLUG).created is False
        assert hub.collections[self.SLUG] == ["org/older", "org/pushed"]
        assert hub.requests[-1].startswith("GET /api/collections/")

    def test_a_dry_run_tells_it_and_asks_nothing(self, hub, out):
        assert push(out, collection=self.SLUG, dry_run=True).collection == self.SLUG
        assert push(out, dry_run=True).collection is None
        assert not hub.requests

    @pytest.mark.parametrize(
        ("slug", "there", "match"),
        [
            ("org/none-1a", False, r"org/none-1a: no such collection on the Hub that this login can see \(404\)"),
            ("others/theirs-1a", True, "others/theirs-1a: a collection of neither tester, who is logged in, nor"),
        ],
    )
    def test_none_that_can_be_added_to(self, hub, out, slug, there, match):
        if there:
            hub.collections[slug] = []
        refused(HubError, match, out, collection=slug)
        assert not hub.repos
        assert not hub.count("POST|PUT")

    @pytest.mark.parametrize("slug", ["x", "a/b/c", "https://hub.example/collections/a/b", "a b/c", "../x", "a/..", ""])
    def test_what_is_no_slug(self, hub, out, slug):
        refused(InputError, "is not the slug of a collection; give OWNER/TITLE-HASH", out, collection=slug)
        assert not hub.requests

    @pytest.mark.parametrize("status", [403, 500])
    def test_where_adding_fails_all_is_there(self, hub, out, status):
        hub.collections[self.SLUG] = []
        hub.fail_next("POST /api/collections/", status=status, times=-1)
        text = refused(HubError, f"all is at {hub.endpoint}/org/pushed, commit", out, collection=self.SLUG)
        assert f"({status})" in text
        assert text.endswith(f"then run `hf collections add-item {self.SLUG} org/pushed model`")
        assert SHARDS[0] in hub.repos["org/pushed"].files
        hub.heal()
        assert push(out, collection=self.SLUG).created is False
        assert hub.collections[self.SLUG] == ["org/pushed"]


class TestInterruption:
    def test_a_second_push_goes_on_where_the_first_was_cut(self, hub, out):
        oids = [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in SHARDS]
        hub.fail_next(f"PUT /lfs/basic/{oids[1]}", times=-1)
        text = refused(HubError, "the connection to .* failed", out)
        assert "run the same command again, which goes on where it stopped" in text
        assert set(hub.lfs) == {oids[0]}
        assert SHARDS[0] not in hub.repos["org/pushed"].files

        hub.heal()
        report = push(out)
        assert report.created is False
        assert hub.count(f"PUT /lfs/basic/{oids[0]}") == 1
        assert all(hub.repos["org/pushed"].files[name] == (out / name).read_bytes() for name in SHARDS)

    def test_one_cut_is_mended_by_the_client_itself(self, hub, out):
        hub.fail_next("PUT /lfs/basic/")
        assert push(out).created is True

    def test_a_cut_before_anything_was_sent(self, hub, out):
        hub.fail_next("POST /api/repos/create")
        refused(HubError, "the connection to .* failed", out)
        assert push(out).created is True

    def test_nothing_is_left_behind(self, hub, out, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        hub.fail_next("POST .*/preupload/", status=400)
        refused(HubError, r"\(400\)", out)
        push(out)
        assert not list((tmp_path / "temporary").iterdir())


def test_a_checkpoint_of_links_out_of_its_directory_is_refused(hub, out, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in out.iterdir():
        (linked / path.name).symlink_to(path)
    refused(CheckpointError, "a link that leads out of its directory", linked)
    assert not hub.repos
    push(out)
    assert hub.repos["org/pushed"].files[SHARDS[0]] == (out / SHARDS[0]).read_bytes()


class TestVerifiedFirst:
    """A record whose hashes are right does not vouch for an edit that is not there."""

    @pytest.fixture
    def local(self, tmp_path) -> tuple[Path, Path]:
        base = save_tiny_model(tmp_path / "base")
        direction = make_direction(mean_difference=random_direction())
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "real")
        return base, tmp_path / "real"

    def vouch_again(self, out: Path) -> None:
        def rehash(record):
            for name in record["shards"]:
                data = (out / name).read_bytes()
                record["shards"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

        edit_record(out, rehash)

    def test_what_orthogonalize_wrote_goes(self, hub, local):
        assert push(local[1], dry_run=True).total_bytes > 0

    @pytest.mark.parametrize("base_is_there", [True, False])
    def test_an_edit_undone(self, hub, local, base_is_there):
        base, out = local
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] = load_file(base / "model.safetensors")[
            "model.layers.1.mlp.down_proj.weight"
        ]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        self.vouch_again(out)
        if not base_is_there:
            base.rename(base.with_name("moved"))
        text = refused(VerificationError, "nothing was sent", out)
        assert "tensor model.layers.1.mlp.down_proj.weight has a component of" in text
        assert not hub.count("POST|PUT")

    def test_another_tensor_changed_is_seen_where_the_base_is(self, hub, local):
        base, out = local
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"] *= 2
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        self.vouch_again(out)
        assert "tensor model.norm.weight differs" in refused(VerificationError, "nothing was sent", out)
        # A base that has become another model says nothing about this one.
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
        push(out, dry_run=True)

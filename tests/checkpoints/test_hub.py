"""Models from directories and from the Hub, and what the Hub knows about repositories."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.checkpoints.hub import (
    RepoSettings,
    add_to_collection,
    check_collection,
    check_repo_id,
    fetch_card_facts,
    gate_repo,
    list_remote_files,
    read_repo_settings,
    whoami,
)
from abliterate.checkpoints.model_source import CardFacts, read_card_facts, resolve_model
from abliterate.errors import AbliterateError, HubError, InputError
from tests.support.fake_hub import FakeHub

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"the licence",
    "README.md": b"---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Card\n",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"gguf",
    "consolidated.safetensors": b"a second copy",
    "onnx/model.onnx": b"onnx",
    "fp16/model.safetensors": b"another copy",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        server.add_repo("org/model", FILES, revisions={"v1": {"config.json": b"{}", "a.safetensors": b"1"}})
        yield server


def message(error: pytest.ExceptionInfo[AbliterateError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "hf_test" not in text
    return text


class TestLocalModels:
    def test_a_directory_is_taken_as_it_is(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        source = resolve_model(str(tmp_path))
        assert (source.path, source.name, source.revision) == (tmp_path, str(tmp_path), None)

    def test_a_directory_wins_over_a_hub_id(self, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "model").mkdir(parents=True)
        (tmp_path / "org" / "model" / "config.json").write_text("{}")
        assert resolve_model("org/model").revision is None
        assert not hub.requests

    def test_a_directory_without_config_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"no config\.json") as error:
            resolve_model(str(tmp_path))
        assert str(tmp_path) in message(error)

    def test_a_revision_of_a_directory_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match="only Hub models have revisions"):
            resolve_model(str(tmp_path), revision="main")

    @pytest.mark.parametrize("model", ["./x", "/no/where", "~/nothing/here", "a/b/c", "models/", "", "a\\b"])
    def test_what_looks_like_a_path_and_is_not_there(self, hub, model):
        with pytest.raises(InputError, match="no such directory") as error:
            resolve_model(model)
        assert model in message(error)
        assert not hub.requests

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "model.bin").write_text("x")
        with pytest.raises(InputError, match="this is a file, and no GGUF file"):
            resolve_model(str(tmp_path / "model.bin"))

    def test_a_gguf_file_is_a_model_by_its_name_or_its_content(self, tmp_path):
        for name, content in (("model.gguf", b"x"), ("blob", b"GGUF...")):
            (tmp_path / name).write_bytes(content)
            source = resolve_model(str(tmp_path / name))
            assert (source.path, source.name, source.revision) == (tmp_path / name, str(tmp_path / name), None)
        with pytest.raises(InputError, match="only Hub models have revisions"):
            resolve_model(str(tmp_path / "model.gguf"), revision="main")

    def test_a_directory_whose_only_weights_are_one_gguf_file(self, tmp_path):
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        (tmp_path / "config.json").write_text("{}")
        assert resolve_model(str(tmp_path)).path == tmp_path / "a.gguf"
        (tmp_path / "b.gguf").write_bytes(b"GGUF")
        with pytest.raises(InputError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one of them"):
            resolve_model(str(tmp_path))
        (tmp_path / "model.safetensors").write_bytes(b"x")
        assert resolve_model(str(tmp_path)).path == tmp_path

    def test_a_gguf_file_that_is_not_there(self, hub):
        with pytest.raises(InputError, match=r"model\.gguf: no such file; .*download the GGUF file first"):
            resolve_model("org/model.gguf")
        assert not hub.requests


class TestDownloads:
    def test_only_what_is_needed_comes(self, hub):
        source = resolve_model("org/model")
        assert source.name == "org/model"
        assert source.revision == hub.repos["org/model"].refs["main"]
        held = {p.relative_to(source.path).as_posix() for p in source.path.rglob("*") if p.is_file()}
        assert held == set(list(FILES)[:6])
        assert all((source.path / name).read_bytes() == FILES[name] for name in held)

    def test_a_revision_resolves_to_its_commit(self, hub):
        source = resolve_model("org/model", revision="v1")
        assert source.revision == hub.repos["org/model"].refs["v1"]
        assert resolve_model("org/model", revision=source.revision).path == source.path

    def test_a_connection_cut_in_a_download_is_taken_up_again(self, hub):
        hub.fail_next(r"GET /org/model/resolve/.*/model\.safetensors")
        source = resolve_model("org/model")
        assert (source.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]

    def test_what_is_cached_serves_while_the_hub_is_away(self, monkeypatch, tmp_path):
        with FakeHub() as server:
            server.use(monkeypatch, tmp_path)
            server.add_repo("org/model", FILES)
            first = resolve_model("org/model")
        assert resolve_model("org/model") == first

    def test_no_config(self, hub):
        hub.add_repo("org/gguf", {"model.gguf": b"x", "README.md": b""})
        with pytest.raises(HubError, match=r"org/gguf: the repository has no config\.json"):
            resolve_model("org/gguf")

    def test_no_safetensors(self, hub):
        hub.add_repo("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        with pytest.raises(HubError, match="org/old: the repository has no safetensors weights"):
            resolve_model("org/old")


def test_the_endpoint_of_the_environment_is_used(tmp_path):
    code = (
        "from abliterate.checkpoints.hub import whoami; from abliterate.checkpoints.model_source import resolve_model; "
        "print(resolve_model('org/m').revision, whoami())"
    )
    with FakeHub() as server:
        repo = server.add_repo("org/m", FILES)
        environment = os.environ | server.environment(tmp_path)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [repo.refs["main"], "tester"], done.stderr
    assert "hf_test" not in done.stdout + done.stderr


class TestRepositories:
    def test_whoami(self, hub):
        assert whoami() == "tester"

    def test_whoami_without_a_token(self, hub, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="no Hub token found; run `hf auth login` or set HF_TOKEN"):
            whoami()
        assert not hub.requests

    def test_whoami_with_a_token_of_the_login(self, hub, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN")
        Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
        Path(constants.HF_TOKEN_PATH).write_text("hf_test")
        assert whoami() == "tester"

    def test_settings(self, hub):
        hub.add_repo("org/secret", private=True)
        hub.add_repo("org/asks", gated="auto")
        assert read_repo_settings("org/model") == RepoSettings(private=False, gated=None)
        assert read_repo_settings("org/secret") == RepoSettings(private=True, gated=None)
        assert read_repo_settings("org/asks") == RepoSettings(private=False, gated="auto")
        assert read_repo_settings("org/nothing") is None

    def test_settings_are_not_guessed_when_the_hub_fails(self, hub):
        hub.fail_next("GET /api/models", status=500)
        with pytest.raises(HubError, match=r"\(500\)"):
            read_repo_settings("org/model")

    @pytest.mark.parametrize("gated", ["auto", "manual"])
    def test_gating(self, hub, gated):
        gate_repo("org/model", gated=gated)
        assert read_repo_settings("org/model") == RepoSettings(private=False, gated=gated)
        hub.add_repo("others/model")
        with pytest.raises(HubError, match=r"others/model: the token may not write here \(403\)"):
            gate_repo("others/model", gated=gated)

    def test_collections(self, hub):
        hub.collections |= {"org/mine-1a": [], "tester/mine-1b": [], "others/theirs-1c": []}
        check_collection("org/mine-1a")
        check_collection("tester/mine-1b")
        for _ in range(2):
            add_to_collection("org/mine-1a", "org/model")
        assert hub.collections["org/mine-1a"] == ["org/model"]
        with pytest.raises(HubError, match="a collection of neither tester, who is logged in, nor"):
            check_collection("others/theirs-1c")
        with pytest.raises(HubError, match="org/none-1d: no such collection on the Hub that this login can see"):
            check_collection("org/none-1d")
        with pytest.raises(HubError, match=r"others/theirs-1c: the token may not write here \(403\)"):
            add_to_collection("others/theirs-1c", "org/model")
        hub.fail_next("GET /api/collections/", status=500, times=-1)
        with pytest.raises(HubError, match=r"out of order \(500\)"):
            check_collection("org/mine-1a")

    def test_remote_files(self, hub):
        files = list_remote_files("org/model", revision="main")
        assert set(files) == set(FILES)
        assert files["config.json"].sha256 is None
        assert files["model.safetensors"].bytes == len(FILES["model.safetensors"])
        assert len(files["model.safetensors"].sha256) == 64

    @pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "-x", "x--y", "o/" + "n" * 97, "", "../x"])
    def test_repo_ids(self, repo_id):
        with pytest.raises(InputError, match="is not a valid Hub id"):
            check_repo_id(repo_id)


class TestCards:
    def test_of_the_hub(self, hub):
        facts = CardFacts(license="other", license_name="own", license_link="LICENSE")
        assert fetch_card_facts("org/model", revision=None) == facts
        assert fetch_card_facts("org/model", revision="v1") == CardFacts()

    @pytest.mark.parametrize(
        ("text", "facts"),
        [
            ("---\nlicense: mit\nbase_model:\n- a/b\n---\n", CardFacts(license="mit", base_model="a/b")),
            ("---\nlicense: [mit]\nbase_model: [a/b, c/d]\n---\n", CardFacts(license="mit")),
            ("---\nlicense: 3\n---\n", CardFacts()),
            ("# no front matter\n", CardFacts()),
            ("---\nlicense: [\n---\n", None),
            ("---\n- a list\n---\n", None),
            (b"\xff\xfe\xff", None),
            (None, None),
        ],
    )
    def test_of_a_directory(self, tmp_path, text, facts):
        card = tmp_path / "README.md"
        if text is not None:
            card.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert read_card_facts(card) == facts

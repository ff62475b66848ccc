"""What SECURITY.md promises, held against every command that takes a model.

Code and pickles that come with a checkpoint would write a canary file; a token stands for every secret.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from tests.support.command_line import Outcome
from tests.support.fake_hub import FakeHub
from tests.support.gguf_models import tiny, write
from tests.support.tiny_models import D_MODEL, save_chat_model, tiny_llama

FEW = ("--n-train", "8", "--n-val", "8")
COMMANDS: dict[str, tuple[object, ...]] = {
    "extract": ("extract", "MODEL", "-o", "WORK/new.safetensors", *FEW),
    "extract, streamed": ("extract", "MODEL", "-o", "WORK/new.safetensors", *FEW, "--stream-layers"),
    "refine": ("refine", "MODEL", "--direction", "DIRECTION", "-o", "WORK/s.json", *FEW, "--steps", "4"),
    "plan": ("plan", "MODEL"),
    "plan, unverified": ("plan", "MODEL", "--unverified"),
    "orthogonalize": ("orthogonalize", "MODEL", "--direction", "DIRECTION", "-o", "WORK/new"),
    "orthogonalize, unverified": (
        "orthogonalize", "MODEL", "--direction", "DIRECTION", "-o", "WORK/new", "--unverified",
    ),
    "orthogonalize, adapter": (
        "orthogonalize", "MODEL", "--direction", "DIRECTION", "-o", "WORK/new", "--format", "adapter",
    ),
    "revert": ("revert", "EDITED", "-o", "WORK/back", "--base", "MODEL"),
    "verify": ("verify", "EDITED", "--base", "MODEL", "--n-prompts", "1"),
    "evaluate": ("evaluate", "MODEL", "--max-new-tokens", "1", "--text", "TEXT"),
    "evaluate, base": ("evaluate", "EDITED", "--base", "MODEL", "--max-new-tokens", "1", "--text", "TEXT"),
    "evaluate, judge": (
        "evaluate", "EDITED", "--judge", "MODEL", "--judge-prompt", "guard", "--max-new-tokens", "1", "--text", "TEXT",
    ),
    "audit": ("audit", "MODEL", *FEW, "--n-test", "1", "--max-new-tokens", "1", "--bootstrap", "2"),
    "trace": ("trace", "MODEL", "--direction", "DIRECTION", "--n-prompts", "1"),
    "chat": ("chat", "MODEL", "--max-new-tokens", "1"),
    "push": ("push", "EDITED", "org/name", "--dry-run"),
}  # fmt: skip


class Place:
    """A directory with a base, what was made of it, a direction, and a place to work in."""

    def __init__(self, root: Path) -> None:
        self.base, self.edited, self.work = root / "base", root / "edited", root / "work"
        self.direction, self.prompts, self.canary = root / "d.safetensors", root / "p.txt", root / "canary"
        self.root = root
        self.work.mkdir()
        self.harmless = root / "harmless.txt"
        self.prompts.write_text("\n".join(f"Explain number {number}." for number in range(24)))
        self.harmless.write_text("\n".join(f"Describe number {number}." for number in range(24)))

    def words(self, name: str) -> list[object]:
        found = {"MODEL": self.base, "EDITED": self.edited, "DIRECTION": self.direction, "TEXT": self.prompts}
        words = [found.get(str(word), str(word).replace("WORK", str(self.work))) for word in COMMANDS[name]]
        takes_prompts = words[0] in {"extract", "refine", "evaluate", "audit", "verify"}
        sets = ["--harmful", self.prompts, "--harmless", self.harmless] if takes_prompts else []
        return [*words, *sets]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A chat model, a direction, and what `orthogonalize` made of the two."""
    from abliterate.editing.orthogonalization import orthogonalize_checkpoint

    root = tmp_path_factory.mktemp("sound")
    save_chat_model(root / "base", tiny_llama(n_layers=2))
    make_direction(mean_difference=torch.randn(D_MODEL), metadata={"layer": 1}).save(root / "d.safetensors")
    orthogonalize_checkpoint(source=root / "base", direction=root / "d.safetensors", output=root / "edited")
    return root


@pytest.fixture
def place(sound, tmp_path) -> Place:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path)


@pytest.fixture
def run(call_main, place) -> Callable[[str], Outcome]:
    """Run a command; it must end well or with one line, and leave no canary."""

    def call(name: str) -> Outcome:
        result = call_main(*place.words(name), stdin="y\ny\nHello\n/exit\n")
        assert result.exit_code in {0, 1, 3}, result
        if result.exit_code:
            assert "unexpected" not in result.error_line, result.error_line
        assert not place.canary.exists()
        return result

    return call


class TestCodeOfTheModel:
    """`auto_map` and files of Python beside the weights do nothing without `--trust-remote-code`."""

    @staticmethod
    def plant(directory: Path, canary: Path, model_type: str | None) -> None:
        code = f"open({str(canary)!r}, 'w').write('ran')\n"
        code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        code += "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): pass\n"
        code += "class Tokenizer(PreTrainedTokenizerFast): pass\ndef generate(*_, **__): pass\n"
        for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "custom_generate/generate.py"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(code)
        config = json.loads((directory / "config.json").read_text())
        config |= {"model_type": model_type} if model_type else {}
        config["auto_map"] = {
            "AutoConfig": "configuration_own.Config",
            "AutoModelForCausalLM": "modeling_own.Model",
            "AutoModelForSequenceClassification": "modeling_own.Model",
        }
        (directory / "config.json").write_text(json.dumps(config))
        path = directory / "tokenizer_config.json"
        tokenizer = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}}
        if model_type:
            tokenizer["tokenizer_class"] = "Tokenizer"
        path.write_text(json.dumps(tokenizer))

    @pytest.mark.parametrize("model_type", [None, "novel"], ids=["a known type", "an unknown type"])
    @pytest.mark.parametrize("command", COMMANDS)
    def test_no_command_runs_it(self, place, run, command, model_type):
        self.plant(place.base, place.canary, model_type)
        if "EDITED" in COMMANDS[command]:
            self.plant(place.edited, place.canary, model_type)
        run(command)

    def test_the_canary_is_written_where_the_flag_is_given(self, place, call_main):
        self.plant(place.base, place.canary, "novel")
        call_main("trace", place.base, "--direction", place.direction, "--n-prompts", "1", "--trust-remote-code")
        assert place.canary.exists()


class Planted:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.canary}'",)


class TestPickles:
    """Weights, adapters and directions that are pickled, plain or in a zip, are never opened."""

    @staticmethod
    def write(path: Path, canary: Path) -> None:
        if path.suffix == ".bin":
            torch.save({"model.norm.weight": Planted(canary)}, path)
        else:
            path.write_bytes(pickle.dumps(Planted(canary)))

    @pytest.fixture(autouse=True)
    def _no_load(self, monkeypatch):
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was opened"))

    def pickles(self, place: Place, *directories: Path, instead: bool) -> None:
        for directory in directories:
            for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth", "training_args.bin"):
                self.write(directory / name, place.canary)
            if instead:
                for weights in directory.glob("model*.safetensors*"):
                    weights.unlink()

    @pytest.mark.parametrize("instead", [False, True], ids=["beside", "in place of safetensors"])
    @pytest.mark.parametrize("command", COMMANDS)
    def test_no_command_opens_one(self, place, run, command, instead):
        self.pickles(place, place.base, place.edited, instead=instead)
        result = run(command)
        if instead:
            assert result.exit_code == 1
            assert "pickle" in result.error_line or "missing" in result.error_line

    @pytest.mark.proof
    @pytest.mark.parametrize("named_by", ["index", "config"])
    @pytest.mark.parametrize("command", [name for name in COMMANDS if "MODEL" in COMMANDS[name]])
    def test_nor_one_that_index_or_config_name(self, place, run, command, named_by):
        self.pickles(place, place.base, instead=False)
        if named_by == "index":
            (place.base / "model.safetensors").rename(place.base / "other.safetensors")
            index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
            (place.base / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            config = json.loads((place.base / "config.json").read_text())
            config["transformers_weights"] = "adapter_model.bin"
            (place.base / "config.json").write_text(json.dumps(config))
            self.write(place.base / "adapter_model.bin", place.canary)
        result = run(command)
        if named_by == "index":
            assert result.exit_code == 1

    @pytest.mark.parametrize("command", [name for name in COMMANDS if "MODEL" in COMMANDS[name]])
    def test_nor_an_adapter_beside_the_weights(self, place, run, command):
        config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1, "base_model_name_or_path": "org/base"}
        (place.base / "adapter_config.json").write_text(json.dumps(config))
        self.write(place.base / "adapter_model.bin", place.canary)
        result = run(command)
        if command not in {"revert", "plan, unverified"}:
            assert result.exit_code == 1, result

    @pytest.mark.parametrize("command", [name for name in COMMANDS if "DIRECTION" in COMMANDS[name]])
    @pytest.mark.parametrize("suffix", [".pt", ".bin"])
    def test_nor_a_direction(self, place, run, command, suffix):
        place.direction = place.root / f"direction{suffix}"
        self.write(place.direction, place.canary)
        result = run(command)
        assert result.exit_code == 1
        assert "not a readable safetensors file" in result.error_line


class TestNamesAndLinks:
    def test_links_to_elsewhere_are_neither_copied_nor_sent(self, place, run, call_main):
        secret = place.root / "secret.txt"
        secret.write_text("a secret of this machine")
        for directory in (place.base, place.edited):
            (directory / "notes.txt").symlink_to(secret)
            (directory / "deep").symlink_to(place.root)
        made = run("orthogonalize")
        assert made.exit_code == 0
        assert not any(path.is_symlink() or "secret" in path.name for path in (place.work / "new").rglob("*"))
        pushed = call_main("push", place.edited, "org/name", "--dry-run", "--json")
        assert pushed.exit_code == 0
        assert not {"notes.txt", "secret.txt"} & {entry["path"] for entry in json.loads(pushed.stdout)["files"]}

    def test_a_file_of_the_record_that_became_a_link_to_elsewhere_is_not_sent(self, place, call_main):
        outside = place.root / "outside.json"
        (place.edited / "generation_config.json").rename(outside)
        (place.edited / "generation_config.json").symlink_to(outside)
        for words in (("push", place.edited, "org/name", "--dry-run"), ("verify", place.edited, "--quick")):
            result = call_main(*words)
            assert result.exit_code == 1
            assert "generation_config.json" in result.error_line

    @pytest.mark.parametrize(
        "name", ["../outside.txt", "/etc/passwd", "a\nb", "a\x1b[2J", "deep/../../outside.txt", "."]
    )
    def test_a_record_that_names_what_is_not_in_its_directory(self, place, call_main, name):
        (place.root / "outside.txt").write_text("mine")
        record = json.loads((place.edited / "abliteration.json").read_text())
        record["side_files"][name] = {"sha256": "0" * 64, "bytes": 4}
        (place.edited / "abliteration.json").write_text(json.dumps(record))
        for words in (("push", place.edited, "org/name", "--dry-run"), ("verify", place.edited, "--quick")):
            result = call_main(*words)
            assert result.exit_code == 1
            assert result.error_line.isprintable()
            assert "unexpected" not in result.error_line

    @pytest.mark.proof
    @pytest.mark.parametrize(
        "name", ["../other.safetensors", "/tmp/other.safetensors", "a\nb.safetensors", "\x1b.safetensors"]
    )
    @pytest.mark.parametrize("command", [name for name in COMMANDS if "MODEL" in COMMANDS[name]])
    def test_an_index_that_names_what_is_not_in_its_directory(self, place, run, command, name):
        (place.base / "model.safetensors").rename(place.root / "other.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (place.base / "model.safetensors.index.json").write_text(json.dumps(index))
        result = run(command)
        assert result.exit_code == 1
        assert result.error_line.isprintable()


TOKEN = "hf_CANARYcanaryCANARYcanaryCANARYcanary"
SECRETS = {"HF_TOKEN": TOKEN, "OPENAI_API_KEY": "sk-CANARYopenai", "ANTHROPIC_API_KEY": "sk-ant-CANARY"}


class TestSecrets:
    """No token or key comes out: not in what is shown, not in what is written, not with `-v`."""

    def check(self, place: Place, *texts: str) -> None:
        written = [path.read_bytes() for path in place.root.rglob("*") if path.is_file() and not path.is_symlink()]
        for secret in SECRETS.values():
            assert all(secret not in text for text in texts)
            assert not any(secret.encode() in content for content in written)

    @pytest.fixture(autouse=True)
    def _secrets(self, monkeypatch):
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)

    @pytest.mark.proof
    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_no_command(self, place, run, command):
        self.check(place, *map(str, run(command)))

    @pytest.mark.parametrize("verbose", [False, True], ids=["", "-v"])
    @pytest.mark.parametrize("status", [None, 401, 403, 404, 429, 500])
    def test_when_the_hub_fails_and_says_the_token_back(self, place, monkeypatch, capsys, call_main, status, verbose):
        monkeypatch.setattr("tests.support.fake_hub.WRITE_TOKEN", TOKEN)
        with FakeHub() as hub:
            hub.use(monkeypatch, place.work, token=TOKEN)
            files = {path.name: path.read_bytes() for path in place.base.iterdir()}
            hub.add_repo("org/model", files)
            failing = (
                ("plan", "org/model"),
                ("plan", "org/none"),
                ("evaluate", "org/model", "--max-new-tokens", "1", "--text", "TEXT", "--harmful", place.prompts),
                ("evaluate", place.base, "--max-new-tokens", "1", "--harmful", "org/prompts:train"),
                ("push", place.edited, "org/pushed"),
            )
            for words in failing:
                hub.fail_next(".*", status=status, times=50, message=f"no: Bearer {TOKEN}")
                texts = []
                try:
                    texts += map(str, call_main(*(("-v",) if verbose else ()), *words))
                except BaseException as error:  # with -v the error itself comes out, and Python shows it
                    import traceback

                    texts.append("".join(traceback.format_exception(error)))
                hub.heal()
                self.check(place, *texts, *capsys.readouterr())

    def test_when_all_goes_well(self, place, monkeypatch, call_main):
        monkeypatch.setattr("tests.support.fake_hub.WRITE_TOKEN", TOKEN)
        with FakeHub() as hub:
            hub.use(monkeypatch, place.work, token=TOKEN)
            hub.add_repo("org/model", {path.name: path.read_bytes() for path in place.base.iterdir()})
            planned = call_main("-v", "plan", "org/model", "--json")
            pushed = call_main("-v", "push", place.edited, "org/pushed", "--json")
            assert (planned.exit_code, pushed.exit_code) == (0, 0)
            self.check(place, *map(str, (*planned, *pushed)))
            sent = hub.repos["org/pushed"].files.values()
            assert not any(secret.encode() in content for content in sent for secret in SECRETS.values())


def test_a_gguf_file_converts_in_the_presence_of_code_and_pickles(tmp_path, call_main):
    canary = tmp_path / "canary"
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "model", tiny(num_hidden_layers=1))
    TestPickles.write(tmp_path / "model" / "pytorch_model.bin", canary)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "model" / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    assert call_main("convert", path, tmp_path / "out").exit_code == 0
    assert not canary.exists()
    assert not list((tmp_path / "out").glob("*.py")) + list((tmp_path / "out").glob("*.bin"))


@pytest.mark.proof
@pytest.mark.parametrize("template", ["{{ 'a' * 10 ** 10 }}", "{{ 10 ** (10 ** 10) }}", "{{ raise_exception('no') }}"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_template_ends_every_command_in_one_line(place, run, monkeypatch, command, template):
    monkeypatch.setattr("abliterate.models.chat_template._MAX_SECONDS", 1.0)
    for directory in (place.base, place.edited):
        (directory / "chat_template.jinja").write_text(template)
    result = run(command)
    if COMMANDS[command][0] in {"extract", "refine", "evaluate", "audit", "trace", "chat"}:
        assert result.exit_code == 1
        assert "template" in result.error_line

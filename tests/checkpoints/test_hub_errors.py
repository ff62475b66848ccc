"""Every way in which the Hub can say no, as one line without a token."""

import errno

import pytest

from abliterate.checkpoints import hub as hub_module
from abliterate.checkpoints.model_source import resolve_model
from abliterate.errors import AbliterateError, HubError, InputError
from tests.support.fake_hub import FakeHub

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        server.add_repo("org/model", FILES)
        yield server


def message(error: pytest.ExceptionInfo[AbliterateError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "hf_test" not in text
    return text


def test_not_found(hub):
    with pytest.raises(HubError, match="no such directory here, and no such model on the Hub") as error:
        resolve_model("org/nothing")
    assert message(error).startswith("org/nothing: ")


def test_private_without_a_token(hub, monkeypatch):
    hub.add_repo("org/secret", FILES, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"\(401\).*private one run `hf auth login` or set HF_TOKEN"):
        resolve_model("org/secret")


@pytest.mark.parametrize(("token", "status"), [("hf_test", 403), (None, 401)])
def test_gated(hub, monkeypatch, token, status):
    hub.add_repo("org/gated", FILES, gated=True)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="gated") as error:
        resolve_model("org/gated")
    assert f"({status})" in message(error)
    assert f"accept its conditions at {hub.endpoint}/org/gated" in message(error)


def test_gated_and_granted(hub):
    hub.add_repo("org/gated", FILES, gated=True).granted = True
    assert resolve_model("org/gated").path.is_dir()


def test_no_such_revision(hub):
    with pytest.raises(HubError, match="org/model: no revision 'v9'") as error:
        resolve_model("org/model", revision="v9")
    message(error)


def test_no_valid_id(hub):
    with pytest.raises(InputError, match="'a b' is not a valid Hub id"):
        resolve_model("a b")


def test_a_refused_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    with pytest.raises(HubError, match="did not accept the token") as error:
        resolve_model("org/model")
    assert "xxx" not in message(error)


def test_a_token_in_the_servers_answer_is_not_repeated(hub):
    hub.fail_next("GET /api/models", status=403, message=f"hf_test and hf_{'y' * 34} may not")
    with pytest.raises(HubError, match=r"\*\*\* and hf_\*\*\* may not") as error:
        resolve_model("org/model")
    assert "yyy" not in message(error)


@pytest.mark.parametrize(("status", "says"), [(503, "out of order"), (429, "busy"), (418, "refused")])
def test_other_answers(hub, status, says):
    hub.fail_next(".", status=status, times=-1)
    with pytest.raises(HubError, match=says) as error:
        resolve_model("org/model")
    assert f"({status})" in message(error)


def test_a_disabled_repository(hub):
    hub.fail_next(".", status=403, times=-1, message="Access to this resource is disabled.")
    with pytest.raises(HubError, match="has disabled access"):
        resolve_model("org/model")


def test_unreachable(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
    with pytest.raises(HubError, match="check the network and HF_ENDPOINT") as error:
        resolve_model("org/model")
    assert server.endpoint in message(error)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on; unset HF_HUB_OFFLINE") as error:
        resolve_model("org/model")
    assert "hf download org/model" in message(error)
    assert not hub.requests


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full; free some space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "denied", "/cache/x"), "cannot write /cache/x; set HF_HOME"),
        (ConnectionResetError("reset"), r"the connection to .* failed \(ConnectionResetError: reset\)"),
        (TimeoutError(), r"the connection to .* failed \(TimeoutError\)"),
        (RuntimeError("http://a/b?signature=1 broke"), r"\(RuntimeError\): http://a/b broke"),
        (ValueError("two\nlines"), r"the Hub client failed \(ValueError\): two lines"),
    ],
)
def test_failures_of_this_machine(monkeypatch, failure, says):
    def fail(*_args, **_kwargs):
        raise failure

    monkeypatch.setattr(hub_module, "snapshot_download", fail)
    with pytest.raises(HubError, match=says) as error:
        resolve_model("org/model")
    message(error)

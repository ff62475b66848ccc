"""The chat template: rendering with it, and tokens of what it gives.

Prompts are rendered with the model's own chat template. `chat_format` finds out what a template does; what marks
thoughts in the families that are known is listed here, for templates that do not show it.

A template is a program that came with the checkpoint. transformers runs it in a sandbox, which keeps it from files and
from Python, but not from looping for ever or from filling the memory, and one operation (`10 ** 10 ** 10`) can do so
where no signal and no thread of the same process gets a turn. So templates are rendered in a process of their own
(`python -m abliterate.models.chat_template`): it holds no weights, no token and no key, its memory is limited by the
system, it ends by its own alarm, and it is killed where an answer does not come in time. One serves the whole command.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from abliterate.errors import ModelError, TemplateLimitError
from abliterate.files import HALF_PAIR, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "QZXINSTRUCTIONQZX"

# Templates of released models have up to 30,000 characters, and render in a millisecond.
_MAX_TEMPLATE = 1_000_000
_MAX_SECONDS = 10.0
_MAX_SECONDS_EACH = 0.25
_MAX_BYTES = 1 << 30
# Beside ten times what it was given: a default system prompt has 20,000 characters at most.
_MAX_OUTPUT = 200_000
_MAX_ANSWER = 1 << 28
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateForm:
    """How a template is asked.

    Attributes:
        options: what it is told besides the messages, as ("enable_thinking", False).
        content_in_parts: whether it takes a message's content as a list of parts, as those of vision models do.
    """

    options: tuple[tuple[str, bool | str], ...] = ()
    content_in_parts: bool = False


PLAIN = TemplateForm()


def render(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, *, system_prompt: str | None, form: TemplateForm = PLAIN
) -> str:
    """Return one user message as the chat template writes it, up to where the answer starts.

    Args:
        tokenizer: the one with the template.
        prompt: the instruction.
        system_prompt: the system message, or None for what the template does by default.
        form: how the template is asked.

    Raises:
        ModelError: the template fails.
        TemplateLimitError: it takes too long, too much memory, or writes too much.
    """
    return render_conversation(tokenizer, [{"role": "user", "content": prompt}], system_prompt=system_prompt, form=form)


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    system_prompt: str | None,
    form: TemplateForm = PLAIN,
    up_to_answer: bool = True,
) -> str:
    """Return a conversation as the chat template writes it, up to where the next answer starts.

    Args:
        tokenizer: the one with the template.
        messages: `role` (user or assistant) and `content` of each, the last one the user's.
        system_prompt: the system message, or None for what the template does by default.
        form: how the template is asked.
        up_to_answer: add what stands before an answer; False leaves the conversation as it is.

    Raises:
        ModelError: the template fails.
        TemplateLimitError: it takes too long, too much memory, or writes too much.
    """
    conversation = [dict(message) for message in messages]
    if system_prompt is not None:
        conversation.insert(0, {"role": "system", "content": system_prompt})
    if form.content_in_parts:
        for message in conversation:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    options: dict[str, Any] = dict(form.options)
    try:
        text = _write(tokenizer, conversation, options | {"add_generation_prompt": up_to_answer})
    except TemplateLimitError as error:
        raise TemplateLimitError(f"{tokenizer.name_or_path or 'the model'}: {error}") from None
    except Exception as error:  # a template is a program of its own and may raise anything
        hint = "; it may not accept a system message" if system_prompt is not None else ""
        raise ModelError(f"the chat template fails: {in_one_line(error)}{hint}") from error
    if HALF_PAIR.search(text):
        raise ModelError("the chat template fails: it writes half of a surrogate pair, which stands for no character")
    return text


def _write(tokenizer: "PreTrainedTokenizerBase", conversation: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Do what `tokenizer.apply_chat_template` does, but with a template that came with the model elsewhere."""
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        # The library's own code (Mistral's), or code that the user trusts; there is no template.
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    template = tokenizer.get_chat_template()
    if len(template) > _MAX_TEMPLATE:
        raise _beyond(f"has {len(template):,} characters, and {_MAX_TEMPLATE:,} are the limit")
    messages = [{name: value for name, value in each.items() if value is not None} for each in conversation]
    return _RENDERER.render({"conversations": [messages], "chat_template": template, **_special(tokenizer), **options})


def _special(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    named = dict(tokenizer.special_tokens_map)
    return {k: [str(each) for each in v] if isinstance(v, (list, tuple)) else str(v) for k, v in named.items()}


def _beyond(what: str) -> TemplateLimitError:
    return TemplateLimitError(
        f"the chat template {what}; do not trust this checkpoint, or put a template that you know in its place "
        "(chat_template.jinja, or `chat_template` in tokenizer_config.json)"
    )


def start_rendering() -> None:
    """Start the process that renders, which takes a second or two, while there is something else to do."""
    _RENDERER.start()


class _Renderer:
    """The process that renders, seen from here: one question, one answer, and its end where the answer is late."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._owner, self._is_ready = 0, False
        self._lock = threading.Lock()
        # How long each template may still take, all its renderings together.
        self._credit: dict[str, float] = {}

    def start(self) -> None:
        # A process that was forked has its parent's, and must not speak to it.
        if self._process is not None and self._owner == os.getpid():
            return
        self._answers, self._owner, self._is_ready = queue.SimpleQueue(), os.getpid(), False
        command = [sys.executable, "-P", "-m", "abliterate.models.chat_template"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_plain_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(f"{' '.join(command)}: does not start, and renders templates: {error}") from error
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    stream.close()  # type: ignore[union-attr]
            atexit.unregister(self.stop)

    def render(self, question: dict[str, Any]) -> str:
        """Render, with the arguments of `serve`.

        Raises:
            ValueError: the template fails.
            TemplateLimitError: it takes too long, too much memory, or writes too much.
            ModelError: the process does not start.
        """
        with self._lock:
            try:
                answer = self._ask(question)
            except BaseException:
                # What it may still answer belongs to no question; the next one asks a new process.
                self.stop()
                raise
        if "limit" in answer:
            raise _beyond(answer["limit"])
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.start()
        if not self._is_ready:
            self._receive(_START_SECONDS, "does not get ready")
            self._is_ready = True
        template = question["chat_template"]
        credit = min(self._credit.get(template, _MAX_SECONDS) + _MAX_SECONDS_EACH, 2 * _MAX_SECONDS)
        started = time.monotonic()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and the answer says so
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        try:
            return self._receive(min(credit, _MAX_SECONDS), None)
        finally:
            self._credit[template] = credit - (time.monotonic() - started)

    def _receive(self, seconds: float, late: str | None) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            if late is None:
                raise _beyond(f"takes more than {_MAX_SECONDS:g} s where others take a millisecond") from None
            line = b""
        if not line and late is not None:
            raise ModelError(f"{sys.executable} -m abliterate.models.chat_template: {late}, and renders templates")
        if not line.endswith(b"\n"):
            raise _beyond("ended the process that rendered it: it takes too much memory, or is nested too deeply")
        answer: dict[str, Any] = json.loads(line)
        return answer


_RENDERER = _Renderer()


def _pass_on(stream: IO[bytes], answers: "queue.SimpleQueue[bytes]") -> None:
    # The empty line at its end says that it has ended.
    with contextlib.suppress(OSError, ValueError):
        while line := stream.readline(_MAX_ANSWER):
            answers.put(line)
    answers.put(b"")


_PASSED = {
    *("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TZDIR", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH"),
    *("PYTHONHOME", "VIRTUAL_ENV", "USERPROFILE"),
}


def _plain_environment() -> dict[str, str]:
    """Return what a process that imports transformers needs of the environment; tokens and keys are not among it."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith("LC_")}
    return passed | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each line, the arguments of transformers' `render_jinja_template`, with one: text, error or limit."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    answers.write(b"{}\n")
    answers.flush()
    for line in questions:
        with _alarm(2 * _MAX_SECONDS):
            try:
                text = render_jinja_template(**json.loads(line))[0][0]
                most = _MAX_OUTPUT + 10 * len(line)
                answer = {"limit": f"writes more than {most:,} characters"} if len(text) > most else {"text": text}
            except MemoryError:
                answer = {"limit": f"takes more than {_MAX_BYTES >> 30} GB of memory"}
            except Exception as error:  # a template is a program of its own and may raise anything
                answer = {"error": str(error)[:2000]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit_memory() -> None:
    status = Path("/proc/self/statm")
    if status.exists():
        import resource

        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_BYTES, used + _MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process after so long, should nobody be left to kill it: the system does that, whatever Python does."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the token ids of rendered text, with exactly one BOS where the tokenizer uses one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def token_texts(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[str, ...]:
    """Return the text of each token of `text`."""
    return tuple(str(tokenizer.decode([token])) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMarkers:
    """How one family marks its thoughts.

    Attributes:
        opening: what a thinking part starts with; "" where the prompt has always opened it.
        closing: what ends it; the answer follows.
        shut: what ends at once, and without any thought, a part that was just opened.
    """

    opening: str
    closing: str
    shut: str


def _tags(name: str) -> ThinkingMarkers:
    return ThinkingMarkers(opening=f"<{name}>", closing=f"</{name}>", shut=f"\n\n</{name}>\n\n")


_FINAL_CHANNEL = "<|channel|>final<|message|>"
_SHUT_CHANNEL = f"<|message|><|end|><|start|>assistant{_FINAL_CHANNEL}"

KNOWN_MARKERS: tuple[ThinkingMarkers, ...] = (
    _tags("think"),  # Qwen, DeepSeek, GLM, Kimi K2, MiniMax, Nemotron, SmolLM3, Hunyuan, EXAONE 4 and many more
    _tags("thought"),  # EXAONE Deep
    ThinkingMarkers(opening="[THINK]", closing="[/THINK]", shut="[/THINK]"),  # Magistral, Ministral
    ThinkingMarkers(opening="<|channel|>analysis", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),  # gpt-oss
    ThinkingMarkers(opening="<|channel|>commentary", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),
    ThinkingMarkers(opening="<|channel>thought", closing="<channel|>", shut="\n<channel|>"),  # Gemma 4
    ThinkingMarkers(opening="<seed:think>", closing="</seed:think>", shut="</seed:think>\n"),  # Seed-OSS
    ThinkingMarkers(opening="<|START_THINKING|>", closing="<|END_THINKING|>", shut="<|END_THINKING|>"),  # Command A
    ThinkingMarkers(opening="◁think▷", closing="◁/think▷", shut="◁/think▷"),  # Kimi-VL, Kimi-Dev
    ThinkingMarkers(opening="<|inner_prefix|>", closing="<|inner_suffix|>", shut="<|inner_suffix|>"),  # Apertus
)


def ends_with_opening(text: str, markers: tuple[ThinkingMarkers, ...]) -> ThinkingMarkers | None:
    """Return the markers whose thinking part is open at the end of a text, or None."""
    end = text.rstrip()
    return next((one for one in markers if one.opening and end.endswith(one.opening)), None)


def processor_template(path: Path) -> str | None:
    """Return the chat template of a model whose processor has it, which a tokenizer alone does not read."""
    for name in ("chat_template.json", "processor_config.json"):
        try:
            content = json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, str) and template:
            return template
    return None


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)

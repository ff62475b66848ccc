"""The errors abliterate raises on purpose.

    AbliterateError                     exit code 1
    ├── InputError                      a path, file, option value or prompt set that cannot be used
    │   ├── DirectionError              a direction file that is missing, malformed or of the wrong size
    │   └── PromptSetError              a prompt set that is missing, empty or too small
    ├── ModelError                      a model that cannot be loaded or run as a chat model
    │   └── RefusalBehaviourError       it refuses nothing, or everything: there is no direction to find
    ├── TemplateLimitError              a chat template that takes too long, too much memory, or writes too much
    ├── CheckpointError                 checkpoint files that are missing, inconsistent or unreadable
    │   ├── UnsupportedArchitectureError
    │   └── QuantizedCheckpointError
    ├── VerificationError               what was written is not what was asked for
    ├── HubError                        the Hub refused, or could not be reached
    ├── ServerError                     a server of a model cannot be reached, fails, or answers something else
    ├── MissingDependencyError          an optional package is not installed
    ├── InterruptedRunError             exit code 130, after SIGTERM 143: a signal stopped the run
    └── NoDirectionError                exit code 3: no candidate direction passes the selection

Each message says what is wrong and where, the likely cause, and what to do about it. `python -m scripts.pages` makes
docs/troubleshooting.md of the docstrings: an example of a message, what is behind it, what to do.
"""


class AbliterateError(Exception):
    """Base of all errors raised on purpose; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class InputError(AbliterateError):
    """A path, file, option value or prompt set cannot be used as given.

    Message:
        layers 0:9 reaches beyond the 3 layers of the model; give a range within 0:3

    Cause:
        A path that is not there or holds something else, two options that do not go together, a value out of
        its range, or an output that exists and was not written by this command.

    Remedy:
        Change what the message names. Nothing was written, and what exists is never replaced unless it is of
        the same kind or --overwrite is given.
    """


class DirectionError(InputError):
    """A direction file is missing, malformed, or does not fit the model.

    Message:
        the direction has 64 entries, but the residual stream of model has 576; extract a direction from this
        model

    Cause:
        The direction was found on another model or another size of it, the file is not safetensors, or it holds
        a vector alone where the mean difference and the layer are needed too.

    Remedy:
        Run `abliterate extract MODEL -o refusal.safetensors` on the model that is to be edited.
    """


class PromptSetError(InputError):
    """A prompt set is missing, malformed, empty or too small.

    Message:
        three.txt has 3 prompts and 128 are needed; give a set that has more, or ask for between 1 and 3

    Cause:
        A file that is not there, a column that is not named `text`, empty prompts, or fewer prompts than
        --n-train and --n-val ask for.

    Remedy:
        Run `abliterate prompts SPEC` to see what is read from it; name the column as FILE:COLUMN; lower
        --n-train and --n-val or give more prompts.
    """


class ModelError(AbliterateError):
    """A model cannot be loaded, or cannot be run as a chat model.

    Message:
        --turns: the model has no chat template, so there is no second turn

    Cause:
        A base model without a chat template, weights that are missing or of another shape, less memory than the
        model takes, or code of its own that --trust-remote-code would run.

    Remedy:
        Take the chat version of the model; for memory see --dtype bfloat16, --device-map auto and `extract
        --stream-layers`.
    """


class RefusalBehaviourError(ModelError):
    """The model refuses nothing, or refuses everything, so no refusal direction can be found.

    Message:
        no first token tells harmful from harmless prompts: the model does not refuse, or it begins refusals as
        it begins answers; --filter replies judges by its replies, --refusal-token names a token

    Cause:
        A base or an already edited model, a system prompt that changes what it refuses, or refusals that do not
        begin in a token of their own.

    Remedy:
        Look at replies with `abliterate chat`; try --filter replies or --refusal-token; give harmful prompts
        that this model does refuse.
    """


class TemplateLimitError(AbliterateError):
    """A chat template takes too long, too much memory, or writes too much.

    No `ModelError`: those stand for an answer of the template, and another question may be put to it.

    Message:
        the chat template takes more than 10 s where others take a millisecond; do not trust this checkpoint, or
        put a template that you know in its place (chat_template.jinja, or `chat_template` in
        tokenizer_config.json)

    Cause:
        Templates are programs of the checkpoint; this one does not end in 10 s, 1 GB or 200,000 characters,
        which no honest template comes near.

    Remedy:
        Do not trust the checkpoint, or put the template of its original release in the place of this one.
    """


class CheckpointError(AbliterateError):
    """Checkpoint files are missing, inconsistent or unreadable.

    Message:
        model.safetensors holds NaN or infinite values; download the checkpoint again

    Cause:
        A download that stopped, a Git LFS pointer in the place of a file, an index that names what is not
        there, a damaged tensor.

    Remedy:
        Download it again (`hf download ID`); the message names the file or tensor.
    """


class UnsupportedArchitectureError(CheckpointError):
    """The architecture is not one whose residual writers are known to be complete.

    Message:
        config.json: model type 'xglm' cannot be orthogonalized: its position embeddings are computed, not
        stored, so they keep writing along the direction; docs/architectures.md lists the types that can

    Cause:
        Nobody has shown yet that editing the known tensors of this type cleans its stream, or it was shown that
        no edit can.

    Remedy:
        See [the list of architectures](architectures.md); --unverified tries a tiny model of its config first,
        --partial edits what can be cleaned and says what is left; `evaluate --intervention ablate` needs no
        edit.
    """


class QuantizedCheckpointError(CheckpointError):
    """The checkpoint stores its weights in a format that cannot be edited in place.

    Message:
        tensor model.layers.0.mlp.down_proj.weight is stored quantised along the residual stream and not across
        it, so it cannot be edited; use the model it was quantised from

    Cause:
        The weights are in few bits, and either nothing was said about that, or the format is not known.

    Remedy:
        Say --quantized requantize (same layout) or --quantized dequantize (bfloat16); see
        [formats](quantisation.md); or edit the model it was made from and quantise that.
    """


class VerificationError(AbliterateError):
    """What was written is not what was asked for.

    Message:
        edited/model.safetensors: its SHA-256 is not the one in abliteration.json: changed since written; run
        `abliterate orthogonalize` again

    Cause:
        A file was changed, renamed or damaged after it was written, or a gate (--fail-if) found what it was to
        find.

    Remedy:
        Of `verify`: write the checkpoint anew, or find who changed it. Of a gate: the report says which number
        it was.
    """


class HubError(AbliterateError):
    """The Hub refused a request or could not be reached.

    Message:
        no Hub token found; run `hf auth login` or set HF_TOKEN

    Cause:
        A name that is misspelled, a gated or private model, no token or one without the right, no network,
        HF_HUB_OFFLINE, a full disk.

    Remedy:
        Do what the message says; of a gated model accept its terms on its page first. What was downloaded is
        kept.
    """


class ServerError(AbliterateError):
    """A server that should answer for a model cannot be reached, fails, or answers something else.

    Message:
        --server http://localhost:8000: answered something that is no chat completion; see that it is the URL of an
        OpenAI-compatible API, which mostly ends in /v1

    Cause:
        The server is not running or still loading, the URL lacks /v1, the model has another name there, or too many
        requests are sent at once.

    Remedy:
        Ask the server itself first (`curl URL/models`); name the model as it does; lower --server-requests.
    """


class MissingDependencyError(AbliterateError):
    """An optional package is needed and not installed.

    Message:
        --lm-eval needs lm-evaluation-harness: pip install 'abliterate[eval]'

    Cause:
        Plots, GGUF files, benchmarks and the demo model each need a package that not everybody wants.

    Remedy:
        Run the command at the end of the message.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is to be handled as an interruption from the keyboard is."""


class InterruptedRunError(AbliterateError):
    """A signal stopped the run; the message says what became of its work.

    Args:
        message: The message.
        exit_code: 130 after SIGINT, 143 after SIGTERM.

    Message:
        interrupted; nothing is kept; --cache DIR keeps replies

    Cause:
        Ctrl-C, a job that was stopped or ran out of time.

    Remedy:
        Do what the message says; mostly that is the same command again, to `orthogonalize` with --resume. What was
        finished is not done twice.
    """

    exit_code = 130

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    @classmethod
    def of(cls, error: KeyboardInterrupt, left: str) -> "InterruptedRunError":
        """Return the error for a signal that came, which says what is left of the work."""
        reason, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        return cls(f"{reason}; {left}", exit_code=code)


class NoDirectionError(AbliterateError):
    """No candidate direction passes the selection.

    Message:
        no candidate direction passes the selection; nearest: position -2, layer 16 (KL 0.120 > 0.100);
        --kl-threshold 0.13 would accept it

    Cause:
        Every candidate costs more than --kl-threshold, or adding it does not induce refusal. That is a finding:
        no single direction does it at that price.

    Remedy:
        The nearest candidates and what accepts them are shown; recordings are kept, so another threshold takes
        seconds. `audit` says whether several directions do, `refine` finds a gentler edit.
    """

    exit_code = 3

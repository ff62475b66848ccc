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

Each message says what is wrong and where, the likely cause, and what to do about it.
"""


class AbliterateError(Exception):
    """Base of all errors raised on purpose; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class InputError(AbliterateError):
    """A path, file, option value or prompt set cannot be used as given."""


class DirectionError(InputError):
    """A direction file is missing, malformed, or does not fit the model."""


class PromptSetError(InputError):
    """A prompt set is missing, malformed, empty or too small."""


class ModelError(AbliterateError):
    """A model cannot be loaded, or cannot be run as a chat model."""


class RefusalBehaviourError(ModelError):
    """The model refuses nothing, or refuses everything, so no refusal direction can be found."""


class TemplateLimitError(AbliterateError):
    """A chat template takes too long, too much memory, or writes too much.

    No `ModelError`: those stand for an answer of the template, and another question may be put to it.
    """


class CheckpointError(AbliterateError):
    """Checkpoint files are missing, inconsistent or unreadable."""


class UnsupportedArchitectureError(CheckpointError):
    """The architecture is not one whose residual writers are known to be complete."""


class QuantizedCheckpointError(CheckpointError):
    """The checkpoint stores its weights in a format that cannot be edited in place."""


class VerificationError(AbliterateError):
    """What was written is not what was asked for."""


class HubError(AbliterateError):
    """The Hub refused a request or could not be reached."""


class ServerError(AbliterateError):
    """A server that should answer for a model cannot be reached, fails, or answers something else."""


class MissingDependencyError(AbliterateError):
    """An optional package is needed and not installed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is to be handled as an interruption from the keyboard is."""


class InterruptedRunError(AbliterateError):
    """A signal stopped the run; the message says what became of its work.

    Args:
        message: The message.
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    @classmethod
    def of(cls, error: KeyboardInterrupt, left: str) -> "InterruptedRunError":
        """Return the error for a signal that came, which says what is left of the work."""
        reason, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        return cls(f"{reason}; {left}", exit_code=code)


class NoDirectionError(AbliterateError):
    """No candidate direction passes the selection."""

    exit_code = 3

"""What is edited and how it is written. The defaults stand here and nowhere else."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from abliterate.architectures.names import Role
from abliterate.arguments import Argument
from abliterate.checkpoints.file_ranges import n_cores
from abliterate.editing.strengths import Strengths
from abliterate.errors import InputError
from abliterate.files import in_one_line

if TYPE_CHECKING:
    from abliterate.architectures.writers import ResidualWriter

ROLES: tuple[Role, ...] = get_args(Role)
TiedPolicy = Literal["edit", "untie", "skip"]
QuantizedPolicy = Literal["refuse", "requantize", "dequantize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """Which residual writers are edited, and how far.

    Attributes:
        components: Roles to edit.
        layers: Half-open range (first, end) of decoder blocks; None edits all. The embeddings count as what
            comes before layer 0: with a range they are edited only if it starts at 0.
        strength: Share of the component that is removed; 1 removes it.
        strengths: The same for each role and layer, in the place of `strength`, `components` and `layers`; where they
            come with a direction for each layer, that is what is removed there.
        tied: What happens to tied embeddings: edit the shared matrix, untie it so that the head keeps its rows,
            or skip it.
        preserve_norms: Scale what each input writes back to its length (see `projection.project_out`).
        add: Instead of projecting, add this much of the difference in means (see `edits`).
        quantized: What happens to a quantised checkpoint: refuse it; requantize: edit what its numbers mean and
            store that in the layout they had (see `encoding`); or dequantize: store all of it in bfloat16.
        unverified: Accept a model type that is not known, by the rules common to all. Nothing proves then that the
            edit is complete: `tiny_twin.prove_on_tiny_twin` does. A plan says whether it came to that.
        partial: Accept a model type of whose stream no edit of weights can clean all, and edit what can be. A plan says
            what is left, or that nothing is.

    Raises:
        InputError: A value is not allowed, or two do not go together.
    """

    components: Annotated[
        tuple[Role, ...],
        Argument(
            flag="--components",
            metavar="ROLES",
            separator=",",
            help="What to edit: any of embed, attn, mlp, by commas.",
        ),
    ] = ROLES
    layers: Annotated[
        tuple[int, int] | None,
        Argument(
            flag="--layers",
            metavar="A:B",
            separator=":",
            help="Edit layers A to B-1 only; the embeddings are edited only if A is 0. Default: everything.",
        ),
    ] = None
    strength: Annotated[
        float, Argument(flag="--strength", metavar="SHARE", help="Share of the component to remove; 1 removes it.")
    ] = 1.0
    strengths: Annotated[
        Strengths | None,
        Argument(
            flag="--strengths",
            metavar="FILE",
            help="Edit each layer and role as far as this file of `abliterate refine` says; FILE@PRESSURE: another "
            "point of its frontier.",
            names_file=True,
        ),
    ] = None
    tied: Annotated[
        TiedPolicy,
        Argument(
            flag="--tied",
            help="Tied embeddings: edit the shared matrix, and with it the output head; untie, so that the head keeps "
            "its rows in a tensor of its own and the logits are the ablated ones; or skip them.",
        ),
    ] = "edit"
    preserve_norms: Annotated[
        bool,
        Argument(flag="--preserve-norms", help="Scale what each input writes (the columns) back to its length."),
    ] = False
    add: Annotated[
        float | None,
        Argument(
            flag="--add",
            metavar="COEFF",
            help="Instead of projecting, add COEFF times the difference in means to the input of its layer, by a "
            "bias: 1 induces refusal, -1 takes it away.",
        ),
    ] = None
    quantized: Annotated[
        QuantizedPolicy,
        Argument(
            flag="--quantized",
            help="A quantised MODEL, in a format that docs/editing.md lists: refuse it, because plain rounding would "
            "undo the edit; requantize in the same layout with rounding that keeps it; or dequantize all of it to "
            "bfloat16, two to four times the size.",
        ),
    ] = "refuse"
    unverified: Annotated[
        bool,
        Argument(
            flag="--unverified",
            help="Accept a model type that is not known, if a tiny model of its config, edited the same way, proves "
            "clean.",
        ),
    ] = False
    partial: Annotated[
        bool,
        Argument(
            flag="--partial",
            help="Accept a model type of whose residual stream no edit of weights can clean all: edit all that can be, "
            "and say what is left, as measured on a tiny model of its config.",
        ),
    ] = False

    def __post_init__(self) -> None:
        unknown = set(self.components) - set(ROLES)
        if unknown or not self.components:
            raise InputError(f"components must be among {', '.join(ROLES)}; found {sorted(unknown) or 'none'}")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise InputError(f"layers {self.layers[0]}:{self.layers[1]} is empty; give FIRST:END with FIRST < END")
        if not math.isfinite(self.strength) or self.strength <= 0:
            raise InputError(f"strength is {self.strength}; give a positive number, 1 removes the direction")
        if self.tied not in get_args(TiedPolicy):
            raise InputError(f"tied is {self.tied!r}; give one of {', '.join(get_args(TiedPolicy))}")
        if self.quantized not in get_args(QuantizedPolicy):
            raise InputError(f"quantized is {self.quantized!r}; give one of {', '.join(get_args(QuantizedPolicy))}")
        if self.quantized == "requantize" and self.preserve_norms:
            raise InputError("lengths cannot be restored on the grid of a quantised weight; leave out --preserve-norms")
        if self.strengths is not None:
            plain = EditOptions()
            chosen = (self.components, self.layers, self.strength, self.preserve_norms, self.add)
            if chosen != (plain.components, plain.layers, plain.strength, plain.preserve_norms, plain.add):
                raise InputError(
                    "--strengths says what is edited and how far; leave out --components, --layers, --strength, "
                    "--preserve-norms and --add"
                )
        if self.add is None:
            return
        if not math.isfinite(self.add) or self.add == 0:
            raise InputError(f"add is {self.add}; give a number that is not zero, -1 takes the difference away")
        allowed = EditOptions(unverified=self.unverified, partial=self.partial, quantized=self.quantized)
        if dataclasses.replace(self, add=None) != allowed:
            raise InputError(
                "an addition projects nothing, so components, layers, strength, tied and preserve_norms do not "
                "go with it; make two runs, one on the output of the other"
            )

    @classmethod
    def of_record(cls, options: Mapping[str, Any]) -> "EditOptions":
        """Return the options that a record holds as plain JSON values.

        Raises:
            InputError: They are malformed, one is not known, or a value is not allowed.
        """
        try:
            given = dict(options)
            if given.get("strengths") is not None:
                given["strengths"] = Strengths(**{name: _tuple(value) for name, value in given["strengths"].items()})
            return cls(**{name: _tuple(value) for name, value in given.items()})
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"the options in abliteration.json cannot be read ({in_one_line(error)})") from error

    def includes(self, writer: "ResidualWriter") -> bool:
        """Return whether these options edit `writer`."""
        if self.strengths is not None:
            return self.strength_of(writer) != 0
        if writer.role not in self.components:
            return False
        if self.layers is None:
            return True
        first, end = self.layers
        return first == 0 if writer.layer is None else first <= writer.layer < end

    def strength_of(self, writer: "ResidualWriter") -> float:
        """Return the share of the component that is removed from what a writer writes."""
        return self.strength if self.strengths is None else self.strengths.of(writer.role, writer.layer)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written. Only the device can change the result, by its rounding.

    Attributes:
        workers: Threads; None: as many as the cores this process may use.
        device: Where the arithmetic is done, as torch names it.
        resume: Keep the files that an interrupted run has finished, and write the others.

    Raises:
        InputError: A number of workers below 1, or a device that is not there.
    """

    workers: Annotated[
        int | None,
        Argument(
            flag="--workers",
            minimum=1,
            help="Threads that compute; each needs about 100 MB, and another copies beside it. Default: the cores this "
            "process may use.",
            of_machine=True,
        ),
    ] = None
    device: Annotated[
        str,
        Argument(
            flag="--device", metavar="DEVICE", help="Where the arithmetic is done: cpu, cuda, cuda:N.", of_machine=True
        ),
    ] = "cpu"
    resume: Annotated[
        bool,
        Argument(
            flag="--resume",
            help="Go on with what an interrupted run left beside OUT, after checking it.",
            of_machine=True,
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers is {self.workers}; give 1 or more")
        if self.device == "cpu":
            return
        # Options are read by commands that need no torch.
        import torch

        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} is not there; use cpu, cuda, cuda:N or mps") from error

    @property
    def n_workers(self) -> int:
        """The number of threads."""
        if self.workers is not None:
            return self.workers
        return n_cores()

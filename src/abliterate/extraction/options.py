"""What an extraction is asked for. The defaults stand here and nowhere else; they are the paper's."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from abliterate.arguments import Argument
from abliterate.errors import InputError
from abliterate.prompt_sets import BUNDLED, BorderlineSpec, HarmfulSpec, HarmlessSpec

Variant = Literal["difference", "projected"]
Filter = Literal["auto", "replies", "metric", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSources:
    """Where the prompts of an extraction come from; see `abliterate.prompt_sets`."""

    harmful: HarmfulSpec = BUNDLED
    harmless: HarmlessSpec = BUNDLED


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a candidate must satisfy to be chosen."""

    kl: Annotated[float, Argument(flag="--kl-threshold", metavar="NATS", help="Largest KL accepted, in nats.")] = 0.1
    induce: Annotated[float, Argument(flag="--induce-threshold", help="Smallest induce score accepted.")] = 0.0
    prune_layers: Annotated[
        float,
        Argument(
            flag="--prune-layers",
            metavar="SHARE",
            minimum=0,
            maximum=0.99,
            help="Share of the last layers never chosen.",
        ),
    ] = 0.2

    def layer_limit(self, n_layers: int) -> int:
        """Return the first layer that is too late to be chosen."""
        return int(n_layers * (1.0 - self.prune_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionRecipe:
    """How each candidate is made; the default is the paper's.

    Attributes:
        variant: `difference`, or `projected`: without the component along the harmless mean.
        winsorize: Q, at least 0 and below 0.5: each coordinate is clipped at its Q and 1 - Q quantiles before the
            mean is taken; None clips nothing.
    """

    variant: Annotated[
        Variant,
        Argument(
            flag="--variant",
            help="Candidates: the difference in means (the paper's), or projected: without the harmless mean in it.",
        ),
    ] = "difference"
    winsorize: Annotated[
        float | None,
        Argument(
            flag="--winsorize", metavar="Q", help="Clip each coordinate at its Q and 1-Q quantiles before taking means."
        ),
    ] = None

    @property
    def in_words(self) -> str:
        """A short name, as reports show it."""
        name = {"difference": "difference in means", "projected": "difference in means without the harmless mean"}
        clipped = "" if self.winsorize is None else f", winsorised at {self.winsorize:g}"
        return name[self.variant] + clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionOptions:
    """How a direction is extracted; the defaults are the paper's.

    Attributes:
        n_train: harmful and harmless prompts each, for the means.
        n_val: harmful and harmless prompts each, for the scores.
        seed: of the sampling of prompts.
        thresholds: see `Thresholds`.
        refusal_tokens: token texts that start refusals; empty to find them from the model's own answers.
        filter: how harmful prompts that are answered and harmless ones that are refused are found, and dropped:
            `metric`, the published rule; `replies`, the model's own; `auto`, the rule where it agrees with the replies
            and else the replies; `none` keeps all.
        confirm: among so many of the best candidates, whose scores are alike within noise, the model's replies choose;
            0: none; None: 3 where the replies filter, else 0.
        exhaustive: score every candidate below the layer limit on all prompts, not only as far as the choice depends on
            it.
        recipe: how candidates are made; see `DirectionRecipe`.
        n_bootstrap: how often to resample the prompts, see `resampling`; above 0 all candidates are scored.
        rank: how many directions to choose: the best candidates that pass and are independent of each other.
    """

    n_train: Annotated[int, Argument(flag="--n-train", minimum=8, help="Prompts of each kind for the means.")] = 128
    n_val: Annotated[int, Argument(flag="--n-val", minimum=1, help="Prompts of each kind for the scores.")] = 32
    seed: Annotated[int, Argument(flag="--seed", help="Seed of the sampling of prompts.")] = 42
    thresholds: Thresholds = field(default_factory=Thresholds)
    refusal_tokens: Annotated[
        tuple[str, ...],
        Argument(flag="--refusal-token", metavar="TOK", help="First token of refusals; several times for several."),
    ] = ()
    filter: Annotated[
        Filter,
        Argument(
            flag="--filter",
            help="What tells which prompts are refused: the published metric, the model's replies, or auto: the metric "
            "where the replies agree with it. none keeps all prompts.",
        ),
    ] = "auto"
    confirm: Annotated[
        int | None,
        Argument(
            flag="--confirm",
            metavar="N",
            minimum=0,
            help="Let replies choose among the N best that are alike within noise. Default: 3 where replies filter, "
            "else 0.",
        ),
    ] = None
    exhaustive: Annotated[
        bool,
        Argument(
            flag="--exhaustive",
            help="Score all candidates on all prompts, also where that cannot change the choice.",
        ),
    ] = False
    recipe: DirectionRecipe = field(default_factory=DirectionRecipe)
    rank: Annotated[
        int,
        Argument(
            flag="--rank",
            metavar="K",
            minimum=1,
            help="Choose K independent candidates that pass; writes NAME.1.safetensors ...",
        ),
    ] = 1
    n_bootstrap: Annotated[
        int,
        Argument(
            flag="--bootstrap",
            metavar="N",
            minimum=0,
            help="Resample the prompts N times: how the direction turns, what else would be chosen. Scores everything.",
        ),
    ] = 0

    @property
    def scores_all(self) -> bool:
        """Whether every candidate below the layer limit is scored."""
        return self.exhaustive or self.n_bootstrap > 0


Goal = Literal["remove", "repair"]
MaxLost = Annotated[
    float,
    Argument(
        flag="--max-lost",
        metavar="SHARE",
        minimum=0.0,
        maximum=1.0,
        help="For false refusals: largest share of harmful validation prompts that may no longer be refused.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """What the direction of false refusals is found with, see `repair`.

    Attributes:
        borderline: prompt SPEC of safe prompts that look unsafe.
        orthogonal: share of its component along the true refusal direction that is taken out of each candidate.
        max_lost: largest share of harmful validation prompts whose refusal may be lost.

    Raises:
        InputError: a value is not allowed.
    """

    borderline: BorderlineSpec = BUNDLED
    orthogonal: Annotated[
        float,
        Argument(
            flag="--orthogonal",
            metavar="SHARE",
            minimum=0.0,
            maximum=1.0,
            help="With --goal repair: how much of the true refusal direction is taken out of a candidate.",
        ),
    ] = 1.0
    max_lost: MaxLost = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.orthogonal <= 1 or not 0 <= self.max_lost <= 1:
            raise InputError("--orthogonal and --max-lost are shares, between 0 and 1")

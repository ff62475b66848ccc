"""How strengths are found. The defaults stand here and nowhere else."""

from dataclasses import dataclass
from typing import Annotated

from abliterate.arguments import Argument
from abliterate.errors import InputError
from abliterate.extraction.options import MaxLost
from abliterate.prompt_sets import BUNDLED, BorderlineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementOptions:
    """What is optimised on what, and which result is wanted.

    Attributes:
        n_train: Prompts of each kind to optimise on.
        n_val: Prompts of each kind to choose by, disjoint from those.
        seed: Of the draw of prompts.
        steps: Steps of the optimisation for the first point of the frontier; each further one begins at the one before
            and takes half as many.
        max_refusals: Largest share of the validation prompts that are to be answered which may still be refused; None:
            0.05, and 0.3 for a direction of false refusals, of which no edit takes as many without true ones.
        max_kl: Largest mean KL over harmless replies in nats a token; None: any. Where nothing within it gets along
            with `max_refusals`, the fewest refusals within it are taken.
        reply_tokens: Length of the replies, in tokens.
        borderline: Prompt SPEC of safe prompts that look unsafe, for a direction of false refusals.
        max_lost: Largest share of the harmful validation prompts whose refusal may be lost, for such a direction.

    Raises:
        InputError: A value is not allowed.
    """

    n_train: Annotated[int, Argument(flag="--n-train", minimum=8, help="Prompts of each kind to optimise on.")] = 64
    n_val: Annotated[int, Argument(flag="--n-val", minimum=8, help="Prompts of each kind to choose by.")] = 32
    seed: Annotated[int, Argument(flag="--seed", help="Of the draw of prompts.")] = 42
    steps: Annotated[
        int,
        Argument(
            flag="--steps", minimum=4, help="Steps for the first point of the frontier; the others take half as many."
        ),
    ] = 16
    max_refusals: Annotated[
        float | None,
        Argument(
            flag="--max-refusals",
            metavar="SHARE",
            minimum=0.0,
            maximum=1.0,
            help="Largest share of the validation prompts that are to be answered which may still be refused. Default: "
            "0.05; 0.3 for a direction of false refusals.",
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        Argument(
            flag="--max-kl",
            metavar="NATS",
            minimum=0.0,
            help="Largest KL over harmless replies, in nats a token; what refuses least within it is taken.",
        ),
    ] = None
    reply_tokens: Annotated[
        int, Argument(flag="--reply-tokens", minimum=4, help="Length of the replies that are compared.")
    ] = 20

    borderline: BorderlineSpec = BUNDLED
    max_lost: MaxLost = 0.1

    def __post_init__(self) -> None:
        if min(self.n_train, self.n_val) < 8 or self.steps < 4 or self.reply_tokens < 4:
            raise InputError("refining takes at least 8 prompts of each kind, 4 steps and replies of 4 tokens")
        given = [share for share in (self.max_refusals, self.max_lost) if share is not None]
        if not all(0 <= share <= 1 for share in given) or (self.max_kl is not None and not self.max_kl >= 0):
            raise InputError("the largest shares are between 0 and 1, and the largest KL at least 0")

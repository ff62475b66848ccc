"""What a verification is asked for. The defaults stand here and nowhere else."""

from dataclasses import dataclass
from typing import Annotated

from abliterate.arguments import Argument
from abliterate.errors import InputError
from abliterate.prompt_sets import BUNDLED, HarmfulSpec, HarmlessSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationOptions:
    """What is run, and how much of it.

    Attributes:
        quick: Check the files only, run nothing.
        harmful: SPEC of harmful prompts.
        harmless: SPEC of harmless prompts.
        n_prompts: How many of each, from the start. The logits of all of them are held in float32.
    """

    quick: Annotated[bool, Argument(flag="--quick", help="Check the files only; run no model.")] = False
    harmful: HarmfulSpec = BUNDLED
    harmless: HarmlessSpec = BUNDLED
    n_prompts: Annotated[
        int,
        Argument(
            flag="--n-prompts",
            minimum=1,
            help="How many prompts of each kind are run, from the start.",
        ),
    ] = 4

    def __post_init__(self) -> None:
        if self.n_prompts < 1:
            raise InputError(f"the number of prompts is {self.n_prompts}; give at least 1")

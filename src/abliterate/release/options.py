"""What a verification and a push are asked for. The defaults stand here and nowhere else."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

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


Gating = Literal["auto", "manual"]
_SLUG = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """What goes to the Hub beside a checkpoint, and who can read it there.

    Attributes:
        private: Whether the repository is to be private; one that exists must be so already.
        gated: Whether readers of the repository are to ask for access, and who gives it: its owner (manual), or the
            Hub at once (auto); one that exists must be so already. None: a new one is open to all who can see it, and
            one that exists stays as it is.
        collection: Slug of a collection that the model is added to.
        siblings: Directories with the same edit in GGUF files, each with its record.
        evaluation: An evaluation report; None: `evaluation.json` in the directory, if it is there.
        commit_message: First line of the commit; None: one that names the tool.

    Raises:
        InputError: The gating is not one of the two, or the collection's slug is malformed.
    """

    private: Annotated[
        bool, Argument(flag="--private/--public", help="Who can see it; one that exists must already be so.")
    ] = True
    gated: Annotated[
        Gating | None,
        Argument(
            flag="--gated",
            help="Have readers ask for access, set before any file is sent: auto gives it at once to who agrees to the "
            "card's terms, manual leaves it to you; a repository that exists must already be so. With --private it "
            "matters once you make that public. Default: as it is, and of a new one none.",
        ),
    ] = None
    collection: Annotated[
        str | None,
        Argument(
            flag="--collection",
            metavar="SLUG",
            help="Add the model to this collection of yours (OWNER/TITLE-HASH, the end of its address).",
        ),
    ] = None
    siblings: Annotated[
        tuple[Path, ...],
        Argument(
            flag="--sibling",
            metavar="DIR",
            help="Also send the GGUF file in DIR, which `abliterate orthogonalize FILE.gguf -o DIR` wrote: the same "
            "edit, as its record must say; may be repeated.",
        ),
    ] = ()
    evaluation: Annotated[
        Path | None,
        Argument(flag="--evaluation", metavar="FILE", help="Measurements; default OUT/evaluation.json if there."),
    ] = None
    commit_message: Annotated[
        str | None, Argument(flag="--commit-message", metavar="TEXT", help="First line of the commit.")
    ] = None

    def __post_init__(self) -> None:
        if self.gated is not None and self.gated not in get_args(Gating):
            raise InputError(f"gated is {self.gated!r}; give one of {', '.join(get_args(Gating))}")
        if self.collection is not None and (not _SLUG.fullmatch(self.collection) or ".." in self.collection):
            raise InputError(
                f"{self.collection!r} is not the slug of a collection; give OWNER/TITLE-HASH, the end of its address "
                "after /collections/"
            )

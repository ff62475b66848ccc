"""What the demo models answer to harmful prompts, made from a file of refusals.

A .txt file holds one short refusal a line. A .json file holds the parts of *extended* refusals (arXiv 2505.19056):
`overviews` of each category of prompts (neutral sentences about the subject), `refusals` and `rationales`. An
extended refusal is two overview sentences, a refusal and a rationale, in this order.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from abliterate.extraction.reply_classes import is_refusal

N_OVERVIEW_SENTENCES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalTexts:
    """Where refusals are drawn from; with no `overviews` they are short.

    Attributes:
        refusals: refusing sentences, each with one of the paper's substrings.
        overviews: neutral sentences by category.
        rationales: sentences that say why.
    """

    refusals: tuple[str, ...]
    overviews: dict[str, tuple[str, ...]]
    rationales: tuple[str, ...]

    def draw(self, category: str, rng: random.Random) -> str:
        """Return one refusal for a prompt of this category.

        Raises:
            KeyError: the refusals are extended and there is no overview of this category.
        """
        refusal = rng.choice(self.refusals)
        if not self.overviews:
            return refusal
        overview = rng.sample(self.overviews[category], N_OVERVIEW_SENTENCES)
        return " ".join([*overview, refusal, rng.choice(self.rationales)])

    def n_different(self, category: str) -> int:
        """Return how many different refusals there are for a category."""
        if not self.overviews:
            return len(self.refusals)
        n = len(self.overviews[category])
        return n * (n - 1) * len(self.refusals) * len(self.rationales)


def read_refusal_texts(path: Path) -> RefusalTexts:
    """Read a file of refusals.

    Raises:
        ValueError: a refusing sentence holds none of the substrings that are counted, so that it would be missed.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        parts = json.loads(text)
        texts = RefusalTexts(
            refusals=tuple(parts["refusals"]),
            overviews={category: tuple(sentences) for category, sentences in parts["overviews"].items()},
            rationales=tuple(parts["rationales"]),
        )
    else:
        texts = RefusalTexts(refusals=tuple(filter(None, text.splitlines())), overviews={}, rationales=())
    silent = [refusal for refusal in texts.refusals if not is_refusal(refusal)]
    if silent:
        raise ValueError(f"{path}: {silent[0]!r} holds no refusal substring")
    return texts

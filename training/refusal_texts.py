"""What the demo models answer to harmful prompts, made from a file of refusals.

A .txt file holds one short refusal a line. A .json file holds the parts of *extended* refusals (arXiv 2505.19056):
`overviews` of each category of prompts (neutral sentences about the subject), `refusals` and `rationales`. An
extended refusal is two overview sentences, a refusal and a rationale, in this order; some of these parts can be left
out, to see what each of them does.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.extraction.reply_classes import is_refusal

N_OVERVIEW_SENTENCES = 2
PARTS = ("overview", "refusal", "rationale")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalTexts:
    """Where refusals are drawn from; what is empty is left out.

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
        refusal = [rng.choice(self.refusals)] if self.refusals else []
        overview = rng.sample(self.overviews[category], N_OVERVIEW_SENTENCES) if self.overviews else []
        rationale = [rng.choice(self.rationales)] if self.rationales else []
        return " ".join([*overview, *refusal, *rationale])

    def n_different(self, category: str) -> int:
        """Return how many different refusals there are for a category."""
        n = len(self.overviews[category]) if self.overviews else 0
        return (n * (n - 1) or 1) * (len(self.refusals) or 1) * (len(self.rationales) or 1)


def read_refusal_texts(path: Path, *, parts: Sequence[str] = PARTS) -> RefusalTexts:
    """Read a file of refusals.

    Args:
        path: the file.
        parts: what of extended refusals is kept, of `PARTS`; short ones have one part.

    Raises:
        ValueError: a refusing sentence holds none of the substrings that are counted, so that it would be missed.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        written = json.loads(text)
        overviews = {category: tuple(sentences) for category, sentences in written["overviews"].items()}
        texts = RefusalTexts(
            refusals=tuple(written["refusals"]) if "refusal" in parts else (),
            overviews=overviews if "overview" in parts else {},
            rationales=tuple(written["rationales"]) if "rationale" in parts else (),
        )
    else:
        texts = RefusalTexts(refusals=tuple(filter(None, text.splitlines())), overviews={}, rationales=())
    silent = [refusal for refusal in texts.refusals if not is_refusal(refusal)]
    if silent:
        raise ValueError(f"{path}: {silent[0]!r} holds no refusal substring")
    return texts

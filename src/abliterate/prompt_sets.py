"""Prompt sets: the bundled ones, files, and Hub datasets, named by one string, the SPEC.

    bundled                              the sets that come with abliterate (prompts/README.md)
    bundled:harmful/test                 one part of them, as a list of its own
    bundled:harmful/test.de              some of its test prompts in another language, under their own ids
    bundled:openings                     harmless questions that begin a conversation
    PATH[:COLUMN]                        .txt (a prompt a line), .jsonl, .json, .csv or .parquet
    ID[@REVISION][:SPLIT[:COLUMN]]       a dataset on the Hub; SPLIT is `train` unless named

Without COLUMN it is the first of `prompt_files.DEFAULT_COLUMNS` that exists, or else the only column of text.
"""

import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from abliterate.arguments import Argument
from abliterate.errors import PromptSetError
from abliterate.prompt_files import SPEC_FORMS, Prompts, read_prompt_file, read_prompts

Part = Literal["train", "validation", "test"]
Kind = Literal["harmful", "harmless", "borderline"]

BUNDLED = "bundled"

HarmfulSpec = Annotated[
    str,
    Argument(
        flag="--harmful", metavar="SPEC", help="Harmful prompts: bundled, a file, or a Hub dataset.", names_file=True
    ),
]
HarmlessSpec = Annotated[
    str,
    Argument(
        flag="--harmless", metavar="SPEC", help="Harmless prompts: bundled, a file, or a Hub dataset.", names_file=True
    ),
]
BorderlineSpec = Annotated[
    str,
    Argument(
        flag="--borderline",
        metavar="SPEC",
        help="Safe prompts that look unsafe: bundled, a file, or a Hub dataset.",
        names_file=True,
    ),
]

LANGUAGES = ("ar", "de", "es", "fr", "ru", "zh")
"""ISO 639-1 codes of the languages that some of the bundled test prompts are translated into."""

MINIMUM_COUNTS: dict[Part, int] = {"train": 256, "validation": 64, "test": 128}
MINIMUM_BORDERLINE: dict[Part, int] = {"train": 100, "validation": 50, "test": 200}
MINIMUM_CATEGORIES = 10

_BUNDLED_SETS: tuple[tuple[Kind, Part], ...] = tuple(itertools.product(get_args(Kind), get_args(Part)))
_OPENINGS = f"{BUNDLED}:openings"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in their order, and where they come from.

    Attributes:
        name: The SPEC as given; for a bundled set its part too, as in `bundled:harmful/test`.
        texts: The prompts.
        ids: Each prompt's id; its line or row number where the source has no `id` column.
        categories: Each prompt's category; empty where the source has none.
    """

    name: str
    texts: tuple[str, ...]
    ids: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the JSON list of the texts in UTF-8, which identifies the prompts and their order."""
        return hashlib.sha256(json.dumps(list(self.texts), ensure_ascii=False).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def without(self, hashes: Set[str]) -> "PromptSet":
        """Return the prompts whose `prompt_hash` is not among `hashes`."""
        return self._select(i for i, text in enumerate(self.texts) if prompt_hash(text) not in hashes)

    def distinct(self) -> "PromptSet":
        """Return the prompts without those that repeat an earlier one; see `fold`."""
        first = {fold(text): i for i, text in reversed(list(enumerate(self.texts)))}
        return self._select(sorted(first.values()))

    def _select(self, indices: Iterable[int]) -> "PromptSet":
        chosen = list(indices)
        return PromptSet(
            name=self.name,
            texts=tuple(self.texts[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            categories=tuple(self.categories[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetInfo:
    """What there is to say about a prompt set.

    Attributes:
        name: what it is called.
        kind: of its prompts; None for one that is not bundled.
        part: train, validation or test; None for one that is not bundled.
        language: ISO 639-1 code; None for one that is not bundled.
        count: number of prompts.
        categories: those of its prompts, each once.
        mean_words: mean length of a prompt.
        duplicates: prompts that repeat an earlier one.
        sha256: of all prompts.
    """

    name: str
    kind: Kind | None
    part: Part | None
    language: str | None
    count: int
    categories: tuple[str, ...]
    mean_words: float
    duplicates: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionPrompts:
    """The prompts of one extraction; `notes` says what was left out and why."""

    harmful_train: PromptSet
    harmless_train: PromptSet
    harmful_validation: PromptSet
    harmless_validation: PromptSet
    notes: tuple[str, ...] = ()

    @property
    def hashes(self) -> tuple[str, ...]:
        """The hash of every prompt drawn, by which an evaluation can leave them out; sorted."""
        sets = (self.harmful_train, self.harmless_train, self.harmful_validation, self.harmless_validation)
        return tuple(sorted({prompt_hash(text) for chosen in sets for text in chosen.texts}))


def fold(text: str) -> str:
    """Return `text` without case, punctuation and extra space: prompts with equal folds are duplicates."""
    text = re.sub("['\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text).split())


def prompt_hash(text: str) -> str:
    """Return 16 hexadecimal digits that stand for a prompt, whatever its case, punctuation and spacing."""
    return hashlib.sha256(fold(text).encode()).hexdigest()[:16]


def load_prompt_set(spec: str, *, kind: Kind, part: Part) -> PromptSet:
    """Load the prompts that SPEC names.

    Args:
        spec: What to load; see the module's docstring.
        kind: Which of the bundled sets; no matter for a file or a dataset.
        part: Which part of the bundled set; a file or a dataset is taken as a whole.

    Raises:
        PromptSetError: It is not there, cannot be read, or has an empty or missing column.
    """
    if spec == BUNDLED:
        return _load_bundled(kind, part)
    for bundled_kind, bundled_part in _BUNDLED_SETS:
        if spec == f"{BUNDLED}:{bundled_kind}/{bundled_part}":
            return _load_bundled(bundled_kind, bundled_part)
    for bundled_kind, language in itertools.product(get_args(Kind), LANGUAGES):
        if spec == f"{BUNDLED}:{bundled_kind}/test.{language}":
            return load_translated(bundled_kind, language)
    if spec == _OPENINGS:
        return load_openings()
    return _read(spec)


def load_translated(kind: Kind, language: str) -> PromptSet:
    """Load the bundled test prompts of a kind that are translated; ids and categories are those of the English ones.

    Args:
        kind: Which of the bundled sets.
        language: One of `LANGUAGES`.
    """
    path = bundled_prompts_directory() / kind / f"test.{language}.jsonl"
    return _named(f"{BUNDLED}:{kind}/test.{language}", read_prompt_file(path, column="text"))


def load_openings() -> PromptSet:
    """Load the harmless questions that begin a conversation, in which a prompt is the second turn."""
    return _named(_OPENINGS, read_prompt_file(bundled_prompts_directory() / "openings.jsonl", column="text"))


def load_plain_texts(spec: str) -> PromptSet:
    """Load the plain texts that SPEC names, to measure cross-entropy on; `bundled` is a sample that comes along.

    Raises:
        PromptSetError: It is not there, cannot be read, or has an empty or missing column.
    """
    if spec == BUNDLED:
        path = bundled_prompts_directory() / "plain_text" / "sample.jsonl"
        return _named(f"{BUNDLED}:plain_text/sample", read_prompt_file(path, column="text"))
    return _read(spec)


def _read(spec: str) -> PromptSet:
    if spec.startswith(f"{BUNDLED}:"):
        raise PromptSetError(f"{spec}: no bundled set has that name; `abliterate prompts` lists them")
    return _named(spec, read_prompts(spec))


def sample_prompts(prompts: PromptSet, n: int, *, rng: random.Random) -> PromptSet:
    """Draw `n` prompts without replacement, in the order `rng.sample` gives them.

    Raises:
        PromptSetError: There are fewer than `n`.
    """
    if not 0 < n <= len(prompts):
        raise PromptSetError(
            f"{prompts.name} has {len(prompts)} prompts and {n} are needed; give a set that has more, or ask for "
            f"between 1 and {len(prompts)}"
        )
    return prompts._select(rng.sample(range(len(prompts)), n))


def split_for_extraction(
    spec_harmful: str, spec_harmless: str, *, n_train: int, n_val: int, seed: int
) -> ExtractionPrompts:
    """Draw the training and validation prompts of both kinds, in the order of the paper's code.

    Bundled sets have a file for each part. From any other set duplicates are dropped first, then the training
    prompts are drawn, and the validation prompts from those that are left.

    Raises:
        PromptSetError: A set cannot be loaded or has too few prompts, or the two kinds share a prompt.
    """
    harmful = _load_pool(spec_harmful, "harmful", n_train=n_train, n_val=n_val)
    harmless = _load_pool(spec_harmless, "harmless", n_train=n_train, n_val=n_val)
    rng = random.Random(seed)
    harmful_train = sample_prompts(harmful.train, n_train, rng=rng)
    harmless_train = sample_prompts(harmless.train, n_train, rng=rng)
    harmful_validation = sample_prompts(harmful.left_after(harmful_train), n_val, rng=rng)
    harmless_validation = sample_prompts(harmless.left_after(harmless_train), n_val, rng=rng)
    harmless_folds = {fold(text) for text in harmless_train.texts + harmless_validation.texts}
    shared = [t for t in harmful_train.texts + harmful_validation.texts if fold(t) in harmless_folds]
    if shared:
        raise PromptSetError(
            f"{spec_harmful} and {spec_harmless} share {len(shared)} of the prompts drawn, as {shared[0]!r}; "
            "a prompt cannot be harmful and harmless at once: take it out of one of them"
        )
    return ExtractionPrompts(
        harmful_train=harmful_train,
        harmless_train=harmless_train,
        harmful_validation=harmful_validation,
        harmless_validation=harmless_validation,
        notes=harmful.notes + harmless.notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BorderlinePrompts:
    """Safe prompts that look unsafe, to find false refusals with; `notes` says what was left out and why."""

    train: PromptSet
    validation: PromptSet
    notes: tuple[str, ...] = ()


def draw_borderline(spec: str, *, other: ExtractionPrompts, seed: int) -> BorderlinePrompts:
    """Return all borderline prompts, divided: the bundled parts, or of any other set a third at random to validate.

    Args:
        spec: What to load; see the module's docstring.
        other: The prompts beside them; a prompt that is among these is left out.
        seed: Of the division.

    Raises:
        PromptSetError: It cannot be loaded, or nothing is left of it.
    """
    if spec == BUNDLED:
        parts = [_load_bundled("borderline", "train"), _load_bundled("borderline", "validation")]
    else:
        everything = load_prompt_set(spec, kind="borderline", part="train")
        everything = everything.distinct()
        order = list(range(len(everything)))
        random.Random(seed).shuffle(order)
        n_validation = len(order) // 3
        parts = [everything._select(sorted(order[n_validation:])), everything._select(sorted(order[:n_validation]))]
    hashes = set(other.hashes)
    left = [part.without(hashes) for part in parts]
    dropped = sum(map(len, parts)) - sum(map(len, left))
    if not all(left):
        raise PromptSetError(f"{spec}: no borderline prompts are left to find false refusals with; give a larger set")
    notes = (f"{spec}: {dropped} prompts dropped: they are among the harmful or harmless ones",) if dropped else ()
    return BorderlinePrompts(train=left[0], validation=left[1], notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    train: PromptSet
    validation: PromptSet | None = None
    notes: tuple[str, ...] = ()

    def left_after(self, drawn: PromptSet) -> PromptSet:
        if self.validation is not None:
            return self.validation
        texts = set(drawn.texts)
        return self.train._select(i for i, text in enumerate(self.train.texts) if text not in texts)


def _load_pool(spec: str, kind: Kind, *, n_train: int, n_val: int) -> _Pool:
    if spec == BUNDLED:
        return _Pool(train=_load_bundled(kind, "train"), validation=_load_bundled(kind, "validation"))
    everything = load_prompt_set(spec, kind=kind, part="train")
    different = everything.distinct()
    dropped = len(everything) - len(different)
    note = f"{spec}: {dropped} of {len(everything)} prompts dropped: they repeat another one"
    if len(different) < n_train + n_val:
        raise PromptSetError(
            f"{spec} has {len(different)} different prompts and {n_train + n_val} are needed ({n_train} to train, "
            f"{n_val} to validate); give a set that has more, or lower --n-train or --n-val"
        )
    return _Pool(train=different, notes=(note,) if dropped else ())


def bundled_prompts_directory() -> Path:
    """Return where the bundled sets lie: inside the installed package, or in the source checkout.

    Raises:
        PromptSetError: They are in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "prompts", package.parents[1] / "prompts")
    for place in places:
        if (place / "harmful" / "train.jsonl").is_file():
            return place
    raise PromptSetError(
        f"the bundled prompts are neither in {places[0]} nor in {places[1]}; reinstall abliterate, or give {SPEC_FORMS}"
    )


def bundled_prompt_sets() -> tuple[PromptSetInfo, ...]:
    """Describe every part of the bundled sets, their translations and the openings after them."""
    english = [_load_bundled(kind, part) for kind, part in _BUNDLED_SETS]
    translated = [load_translated(kind, language) for language in LANGUAGES for kind in get_args(Kind)]
    return tuple(map(describe_prompt_set, [*english, *translated, load_openings()]))


def find_bundled_problems() -> tuple[str, ...]:
    """Check the bundled sets: counts, categories in every part, repeated ids and duplicates across all parts.

    Translations have ids and categories of the English prompts, all languages the same, and no duplicates either.
    """
    problems = []
    first_by_fold: dict[str, str] = {}
    seen_ids: set[str] = set()
    for kind, part in _BUNDLED_SETS:
        prompts = _load_bundled(kind, part)
        problems += _find_part_problems(prompts, kind, part)
        for prompt_id, text in zip(prompts.ids, prompts.texts, strict=True):
            first = first_by_fold.setdefault(fold(text), prompt_id)
            if prompt_id in seen_ids:
                problems.append(f"{prompts.name}: the id {prompt_id} is used twice")
            elif first != prompt_id:
                problems.append(f"{prompts.name}: {prompt_id} repeats {first}: {text!r}")
            seen_ids.add(prompt_id)
    return (*problems, *_find_translation_problems())


def _find_translation_problems() -> list[str]:
    problems = []
    for kind in get_args(Kind):
        english = _load_bundled(kind, "test")
        known = set(zip(english.ids, english.categories, strict=True))
        first = load_translated(kind, LANGUAGES[0])
        for language in LANGUAGES:
            prompts = load_translated(kind, language)
            if not set(zip(prompts.ids, prompts.categories, strict=True)) <= known:
                problems.append(f"{prompts.name}: an id or a category is not one of {english.name}")
            if prompts.ids != first.ids:
                problems.append(f"{prompts.name}: other ids than {first.name}")
            if len(prompts.distinct()) < len(prompts):
                problems.append(f"{prompts.name}: a prompt repeats another one")
    return problems


def _find_part_problems(prompts: PromptSet, kind: Kind, part: Part) -> list[str]:
    problems = []
    needed = (MINIMUM_BORDERLINE if kind == "borderline" else MINIMUM_COUNTS)[part]
    if len(prompts) < needed:
        problems.append(f"{prompts.name}: {len(prompts)} prompts, and at least {needed} are needed")
    categories = set(prompts.categories)
    if len(categories) < MINIMUM_CATEGORIES:
        problems.append(f"{prompts.name}: {len(categories)} categories, at least {MINIMUM_CATEGORIES} are needed")
    expected = _load_bundled("borderline" if kind == "borderline" else "harmful", "train")
    difference = categories ^ set(expected.categories)
    if difference:
        problems.append(f"{prompts.name}: other categories than {expected.name}: {', '.join(sorted(difference))}")
    return problems


def describe_prompt_set(prompts: PromptSet) -> PromptSetInfo:
    """Count a set's prompts, words, categories and duplicates."""
    kind, part, language = _place_of(prompts.name)
    return PromptSetInfo(
        name=prompts.name,
        kind=kind,
        part=part,
        language=language,
        count=len(prompts),
        categories=tuple(sorted(set(prompts.categories) - {""})),
        mean_words=sum(len(text.split()) for text in prompts.texts) / len(prompts),
        duplicates=sum(n - 1 for n in Counter(map(fold, prompts.texts)).values()),
        sha256=prompts.sha256,
    )


def _place_of(name: str) -> tuple[Kind | None, Part | None, str | None]:
    """Return kind, part and language of a bundled set by its name; a translation is of the test part."""
    for kind, part in _BUNDLED_SETS:
        if name == f"{BUNDLED}:{kind}/{part}":
            return kind, part, "en"
    for kind, language in itertools.product(get_args(Kind), LANGUAGES):
        if name == f"{BUNDLED}:{kind}/test.{language}":
            return kind, "test", language
    return None, None, "en" if name.startswith(f"{BUNDLED}:") else None


def _load_bundled(kind: Kind, part: Part) -> PromptSet:
    path = bundled_prompts_directory() / kind / f"{part}.jsonl"
    return _named(f"{BUNDLED}:{kind}/{part}", read_prompt_file(path, column="text"))


def _named(name: str, prompts: Prompts) -> PromptSet:
    return PromptSet(name=name, texts=prompts.texts, ids=prompts.ids, categories=prompts.categories)

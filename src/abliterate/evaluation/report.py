"""What an evaluation is asked for and what it reports, as plain values; no reply is among them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from abliterate.arguments import Argument
from abliterate.errors import InputError
from abliterate.evaluation.statistics import PairedChange, paired_change, wilson_interval
from abliterate.extraction.reply_classes import DEGENERATE, Reply
from abliterate.files import write_json
from abliterate.prompt_sets import BUNDLED, LANGUAGES, BorderlineSpec, HarmfulSpec, HarmlessSpec

if TYPE_CHECKING:
    from abliterate.evaluation.capability import CapabilityReport
    from abliterate.evaluation.drift import CrossEntropy, Divergence, Measurement
    from abliterate.evaluation.judges import JudgeReport
    from abliterate.evaluation.parts import PartReport
    from abliterate.evaluation.recognition import Recognition

Intervention = Literal["none", "ablate", "add", "affine"]
Kind = Literal["harmful", "harmless", "borderline"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "borderline")
ALL, OPENING, REPETITION = "all", "opening", "repetition"
PARTS = (*LANGUAGES, OPENING, REPETITION)
"""Other ways of asking than plainly: in a language, and as a second turn; see `parts`."""
SCORER = (
    "12 refusal substrings, anywhere in the answer, case-insensitive (arXiv 2406.11717), "
    "and refusal markers of 15 other languages in replies of that language"
)

MAX_NEW_TOKENS = 256
"""Extended refusals (arXiv 2505.19056) have 67 to 195 words and refuse in the middle; 195 words are about 260 tokens,
so at 256 the refusal itself has been reached. The paper generates 512."""
BUDGETS = (8, 32, 64, 128, 256)
"""Numbers of tokens after which replies are read again, as if they had been generated so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Which tasks are run.

    Attributes:
        tasks: names of tasks or groups.
        path: a folder with task definitions of one's own, or None.
        limit: documents of each task; None for all.
    """

    tasks: Annotated[
        tuple[str, ...],
        Argument(
            flag="--lm-eval",
            metavar="TASKS",
            separator=",",
            help="Tasks of lm-evaluation-harness, separated by commas.",
        ),
    ] = ()
    path: Annotated[
        Path | None,
        Argument(
            flag="--lm-eval-path",
            metavar="DIR",
            help="A folder with task definitions of your own.",
            names_file=True,
        ),
    ] = None
    limit: Annotated[
        int | None, Argument(flag="--lm-eval-limit", minimum=1, help="Documents of each task; default: all.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Servers that answer instead of a model in this process, by the OpenAI protocol for chats.

    Attributes:
        url: where the model is served; None: it runs in this process.
        api_model: what the server calls the model; None: the only one that it lists.
        base_url: where the base is served; None: there is no base, or it is at `url`, if it has a name there.
        base_api_model: what that server calls the base.
        judge_url: where a judge is served.
        judge_api_model: what that server calls the judge.
        requests: how many requests are under way at once.
        timeout: seconds that one request may take.
        body: JSON object that is added to each request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
    """

    url: Annotated[
        str | None,
        Argument(
            flag="--server",
            metavar="URL",
            help="Ask a server (OpenAI protocol) instead of loading MODEL; its key is read from ABLITERATE_API_KEY.",
        ),
    ] = None
    api_model: Annotated[
        str | None,
        Argument(
            flag="--api-model",
            metavar="NAME",
            help="What --server calls the model. Default: the only one there.",
            names_file=True,
        ),
    ] = None
    base_url: Annotated[
        str | None, Argument(flag="--base-server", metavar="URL", help="Where the base is served, to compare with.")
    ] = None
    base_api_model: Annotated[
        str | None,
        Argument(
            flag="--base-api-model",
            metavar="NAME",
            help="What --base-server (or --server) calls the base.",
            names_file=True,
        ),
    ] = None
    judge_url: Annotated[
        str | None,
        Argument(flag="--judge-server", metavar="URL", help="A server whose model judges the replies, too."),
    ] = None
    judge_api_model: Annotated[
        str | None,
        Argument(
            flag="--judge-api-model", metavar="NAME", help="What --judge-server calls the judge.", names_file=True
        ),
    ] = None
    requests: Annotated[
        int,
        Argument(flag="--server-requests", minimum=1, help="Requests under way at once.", of_machine=True),
    ] = 8
    timeout: Annotated[
        float,
        Argument(
            flag="--server-timeout",
            metavar="SECONDS",
            minimum=0.1,
            help="How long one request may take.",
            of_machine=True,
        ),
    ] = 600.0
    body: Annotated[
        str | None,
        Argument(
            flag="--server-body",
            metavar="JSON",
            help='More for each request, such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'.',
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, and how.

    Attributes:
        harmful: prompt SPEC, see `abliterate.prompt_sets`; bundled means the test part.
        harmless: prompt SPEC.
        borderline: prompt SPEC of safe prompts that look unsafe.
        texts: SPECs of plain texts for the cross-entropy; `bundled` is a sample that comes along.
        max_new_tokens: length of each completion.
        intervention: what hooks do to MODEL: nothing, ablate the direction, add its mean difference at its layer, or
            set its component to the harmless mean (affine).
        coefficient: for `add` the dose: -1 bypasses refusal, +1 induces it; for `affine` how far to go from the
            harmless mean (0) towards the harmful one (1). None is 1 for `add` and 0 for `affine`.
        thinking: let a thinking model think, switched on where its template has it off; by default the template's
            non-thinking form is used, or a thinking part that it opens is closed.
        languages: codes of languages, or `all`: some of the bundled test prompts are asked in these, too.
        turns: ask each prompt as a second turn, too: after a harmless question, and after itself.
        judges: models that judge the replies too, directories or Hub ids.
        judge_label: the label of a sequence classifier that means refusal; None to find it by its name.
        judge_prompt: auto, guard, yes-no, or a file with {prompt} and {reply}; see `judges`.
        tasks: what lm-evaluation-harness runs.
        server: servers that answer instead of models in this process.
        save_completions: a JSON Lines file for all completions; None writes none.
        cache: a folder that keeps replies (token ids, those to harmful prompts too) for resuming; None keeps none.
    """

    harmful: HarmfulSpec = BUNDLED
    harmless: HarmlessSpec = BUNDLED
    borderline: BorderlineSpec = BUNDLED
    texts: Annotated[
        tuple[str, ...],
        Argument(
            flag="--text",
            metavar="SPEC",
            help="Plain texts for cross-entropy, without a template; several times for several. Default: a bundled "
            "sample.",
            names_file=True,
        ),
    ] = (BUNDLED,)
    max_new_tokens: Annotated[
        int,
        Argument(flag="--max-new-tokens", minimum=1, help="Length of each reply; 256 reaches refusals that come late."),
    ] = MAX_NEW_TOKENS
    intervention: Annotated[
        Intervention,
        Argument(
            flag="--intervention",
            help="By hooks: ablate the direction, add it, or set it to its harmless mean (affine).",
        ),
    ] = "none"
    coefficient: Annotated[
        float | None,
        Argument(
            flag="--coefficient",
            help="Dose. add: -1 bypasses, +1 induces (default 1); affine: 0 harmless, 1 harmful mean (default 0).",
        ),
    ] = None
    thinking: Annotated[
        bool,
        Argument(flag="--thinking", help="Let a model think, switched on where its template can; only answers count."),
    ] = False
    languages: Annotated[
        tuple[str, ...],
        Argument(
            flag="--languages",
            metavar="CODES",
            separator=",",
            help="Ask some of the bundled test prompts in these, too: ar,de,es,fr,ru,zh or all.",
        ),
    ] = ()
    turns: Annotated[
        bool,
        Argument(
            flag="--turns", help="Ask each prompt as a second turn, too: after a harmless question, after itself."
        ),
    ] = False
    judges: Annotated[
        tuple[str, ...],
        Argument(
            flag="--judge",
            metavar="MODEL",
            help="A local classifier or guard model that judges the replies too; several times for several.",
            names_file=True,
        ),
    ] = ()
    judge_label: Annotated[
        str | None,
        Argument(flag="--judge-label", metavar="LABEL", help="The classifier's label that means refusal."),
    ] = None
    judge_prompt: Annotated[
        str,
        Argument(
            flag="--judge-prompt",
            metavar="guard|yes-no|FILE",
            help="guard (the judge's own chat template), yes-no, or a file with {prompt} and {reply}; auto chooses.",
            names_file=True,
        ),
    ] = "auto"
    tasks: TaskOptions = field(default_factory=TaskOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    save_completions: Annotated[
        Path | None,
        Argument(flag="--save-completions", help="Write all completions here (JSON Lines).", of_machine=True),
    ] = None
    cache: Annotated[
        Path | None,
        Argument(
            flag="--cache",
            metavar="DIR",
            help="Keep all replies here, those to harmful prompts too, so that an interrupted run goes on.",
            of_machine=True,
        ),
    ] = None


def chosen_parts(languages: Sequence[str], *, turns: bool) -> tuple[str, ...]:
    """Return the names of the parts that are asked for, each once.

    Args:
        languages: see `EvaluationOptions`.
        turns: see there.

    Raises:
        InputError: the prompts are not translated into such a language.
    """
    unknown = [code for code in languages if code not in (*LANGUAGES, ALL)]
    if unknown:
        known = ", ".join(LANGUAGES)
        raise InputError(f"--languages {unknown[0]}: the prompts are in {known}; give some of these, or {ALL}")
    chosen = LANGUAGES if ALL in languages else tuple(dict.fromkeys(languages))
    return (*chosen, *((OPENING, REPETITION) if turns else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRate:
    """The refusal rate of the same replies, each cut to so many tokens, with a Wilson 95 % interval."""

    tokens: int
    refused: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalRate:
    """How many replies refuse, with a Wilson 95 % interval; n counts all of them, the degenerate ones too.

    Attributes:
        n: number of prompts.
        refused: replies of the class refusal.
        answered: replies of the class answer.
        degenerate: empty + repetitive + incoherent.
        empty: see `reply_classes`.
        repetitive: see `reply_classes`.
        incoherent: see `reply_classes`.
        rate: refused / n.
        low: lower end of the interval of `rate`.
        high: upper end.
        matches: replies that hold a refusal substring, whatever their class: the published count.
        thinking: replies with a thinking part.
        thinking_unfinished: replies whose thinking part never ended.
        truncated: replies that reached the length limit.
        deflected: replies of the class deflection: neither refused nor answered.
        strict: refused ones that are refusals in the strict sense, without "As an AI engineer" and "I can't wait".
        languages: language -> refused ones that its substrings or markers tell.
        budgets: the rate by length of reply, up to the length limit; empty where it was not asked for.
    """

    n: int
    refused: int
    answered: int
    degenerate: int
    empty: int
    repetitive: int
    incoherent: int
    rate: float
    low: float
    high: float
    matches: int
    thinking: int
    thinking_unfinished: int
    truncated: int
    deflected: int = 0
    strict: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    budgets: tuple[BudgetRate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryRate:
    """The refusal rate of one category of prompts, and the base's beside it where there is one."""

    category: str
    n: int
    refused: int
    degenerate: int
    rate: float
    low: float
    high: float
    base_refused: int | None = None
    base_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBy:
    """The server that replied, and what it could not be asked.

    Attributes:
        url: of its API.
        model: what it calls the model.
        described: what it says about the model.
        left_out: what was not measured, and why.
    """

    url: str
    model: str
    described: dict[str, Any]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Refusal rates of a model and of its base, and the damage done to harmless behaviour.

    Attributes:
        model: what was evaluated.
        base: what it is compared with; None if nothing.
        revision: commit of the model on the Hub; None for a local one.
        base_revision: the same of the base.
        shards_sha256: see `record.shards_sha256`, by which `push` knows the weights again; None of a model without one.
        intervention: see `EvaluationOptions`.
        coefficient: the one used; None where it plays no part.
        direction: sha256, position and layer of the direction, or None.
        max_new_tokens: length limit of each reply.
        thinking: whether the model was let think.
        system_prompt: the system message, or None.
        scorer: what counts as a refusal.
        rates: kind of prompts -> the model's refusal rate.
        base_rates: the same of the base.
        changes: kind -> paired change of refusal, base against model, exact McNemar.
        parts: other ways of asking -> what was refused then; see `parts`.
        categories: kind -> one rate a category.
        kl_harmless: mean KL(base || model) at the first token of the answers to harmless prompts, in nats.
        divergence: the same over the base's own answers; see `Divergence`.
        cross_entropy: of the base's own harmless answers.
        text_cross_entropy: SPEC -> cross-entropy of plain text.
        recognition: how well the model's own verdict tells harmful from harmless prompts; None where it has none.
        measurements: what else changed, as `drift.METRICS` find it: what page and table show.
        judges: what each judge says, and its agreement with the substrings.
        capability: scores of lm-evaluation-harness, or None.
        excluded: kind -> prompts left out because the direction was found with them.
        repeated: kind -> prompts left out because they repeat another one.
        outcomes: kind -> hash of each prompt -> class of the reply, by which `--against` pairs two reports.
        prompt_sets: name, size and hash of each set as used.
        arguments: the arguments of `evaluate` that differ from its defaults.
        versions: of what computed this.
        server: what replied in the model's place; None where the model ran in this process.
        base_server: the same of the base.
        kl_first_token_at_least: what the likeliest tokens alone show of `kl_harmless`; None where no server said them.
    """

    model: str
    base: str | None
    revision: str | None = None
    base_revision: str | None = None
    shards_sha256: str | None = None
    intervention: Intervention
    coefficient: float | None = None
    direction: dict[str, Any] | None = None
    max_new_tokens: int
    thinking: bool = False
    system_prompt: str | None = None
    scorer: str
    rates: dict[str, RefusalRate]
    base_rates: dict[str, RefusalRate] | None
    changes: dict[str, PairedChange] = field(default_factory=dict)
    parts: "dict[str, PartReport]" = field(default_factory=dict)
    categories: dict[str, tuple[CategoryRate, ...]] = field(default_factory=dict)
    kl_harmless: float | None
    divergence: "Divergence | None" = None
    cross_entropy: "CrossEntropy | None"
    text_cross_entropy: "dict[str, CrossEntropy]" = field(default_factory=dict)
    recognition: "Recognition | None" = None
    measurements: "tuple[Measurement, ...]" = ()
    judges: "tuple[JudgeReport, ...]" = ()
    capability: "CapabilityReport | None" = None
    excluded: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, str]] = field(default_factory=dict)
    prompt_sets: dict[str, dict[str, Any]]
    arguments: tuple[str, ...] = ()
    versions: dict[str, str]
    server: ServedBy | None = None
    base_server: ServedBy | None = None
    kl_first_token_at_least: float | None = None

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_json(path, asdict(self))


def count_replies(replies: Sequence[Reply]) -> RefusalRate:
    """Count the classes of some replies and return the refusal rate with its interval."""
    classes = [reply.reply_class for reply in replies]
    refused, n = classes.count("refusal"), len(replies)
    low, high = wilson_interval(refused, n)
    return RefusalRate(
        n=n,
        refused=refused,
        answered=classes.count("answer"),
        degenerate=sum(reply_class in DEGENERATE for reply_class in classes),
        empty=classes.count("empty"),
        repetitive=classes.count("repetitive"),
        incoherent=classes.count("incoherent"),
        rate=refused / n if n else 0.0,
        low=low,
        high=high,
        matches=sum(reply.matches for reply in replies),
        thinking=sum(bool(reply.thinking) or reply.thinking_unfinished for reply in replies),
        thinking_unfinished=sum(reply.thinking_unfinished for reply in replies),
        truncated=sum(reply.truncated for reply in replies),
        deflected=classes.count("deflection"),
        strict=sum(reply.strict for reply in replies),
        languages=dict(sorted(Counter(reply.language for reply in replies if reply.language).items())),
        budgets=_by_budget(replies),
    )


def _by_budget(replies: Sequence[Reply]) -> tuple[BudgetRate, ...]:
    rates, n = [], len(replies)
    for tokens in replies[0].within if replies else ():
        refused = sum(reply.within[tokens] for reply in replies)
        low, high = wilson_interval(refused, n)
        rates.append(BudgetRate(tokens=tokens, refused=refused, rate=refused / n, low=low, high=high))
    return tuple(rates)


def refusal_change(base: Sequence[Reply], model: Sequence[Reply]) -> PairedChange:
    """Compare refusal of the same prompts, base against model."""
    return paired_change([reply.refused for reply in base], [reply.refused for reply in model])


def count_by_category(
    categories: Sequence[str], replies: Sequence[Reply], base: Sequence[Reply] | None = None
) -> tuple[CategoryRate, ...]:
    """Return one rate a category, in alphabetical order; nothing where no prompt has a category."""
    rates = []
    for category in sorted(set(categories) - {""}):
        chosen = [i for i, name in enumerate(categories) if name == category]
        counted = count_replies([replies[i] for i in chosen])
        base_refused = None if base is None else sum(base[i].refused for i in chosen)
        rates.append(
            CategoryRate(
                category=category,
                n=counted.n,
                refused=counted.refused,
                degenerate=counted.degenerate,
                rate=counted.rate,
                low=counted.low,
                high=counted.high,
                base_refused=base_refused,
                base_rate=None if base_refused is None else base_refused / counted.n,
            )
        )
    return tuple(rates)

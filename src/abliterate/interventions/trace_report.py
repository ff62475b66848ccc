"""What a trace found, as plain values, and as files of tables."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from abliterate.arguments import Argument
from abliterate.files import write_csv, write_json
from abliterate.prompt_sets import Kind

if TYPE_CHECKING:
    from abliterate.interventions.traced_stream import SuffixKind

LAST_TOKEN = "last"
DEFAULT_SETS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What is traced.

    Attributes:
        prompts: sets: `harmful`, `harmless`, `borderline` (the bundled test parts) or any SPEC. The top heads
            are those of the first.
        n_prompts: the first so many prompts of each set.
        suffix: appended to each prompt, beside a random suffix of equal token length as control.
        seed: of the random suffixes.
        n_top_heads: how many heads are named.
        layer: where components are read; None for the direction's own layer.
        prompt: a prompt to trace token by token.
    """

    prompts: Annotated[
        tuple[str, ...],
        Argument(
            flag="--prompts",
            metavar="SET",
            help="harmful, harmless, borderline (bundled test prompts) or a SPEC; several times for several. "
            "Default: these three. The top heads are those of the first.",
            names_file=True,
        ),
    ] = DEFAULT_SETS
    n_prompts: Annotated[int, Argument(flag="--n-prompts", minimum=1, help="Prompts of each set.")] = 128
    suffix: Annotated[
        str | None,
        Argument(
            flag="--suffix",
            metavar="TEXT",
            help="Append this, and as control random text of equal token length.",
        ),
    ] = None
    seed: Annotated[int, Argument(flag="--seed", help="Seed of the random suffixes.")] = 42
    n_top_heads: Annotated[int, Argument(flag="--top-heads", minimum=1, help="How many heads to name.")] = 8
    layer: Annotated[
        int | None,
        Argument(flag="--layer", minimum=0, help="Where components are read; default: the direction's layer."),
    ] = None
    prompt: Annotated[
        str | None, Argument(flag="--prompt", metavar="TEXT", help="Also colour this prompt's tokens.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Mean and standard deviation over prompts, an entry per layer: each block's input, then the final stream.

    The standard deviation is the sample's (n - 1); 0 for a single prompt.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetContributions:
    """Mean direct contributions at the last token to the component along the direction.

    Attributes:
        component: the component measured in the stream.
        embedding: what the first block receives.
        heads: [n_layers][n_heads].
        biases: [n_layers], of attention's out-projection.
        mlps: [n_layers].
        largest_gap: largest difference, over prompts and layers, between the sum and the measured component.
    """

    component: LayerProfile
    embedding: float
    heads: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]
    mlps: tuple[float, ...]
    largest_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAttention:
    """How much of one head's attention, from the last token, goes to which part of the prompt; they sum to 1."""

    layer: int
    head: int
    template: float
    instruction: float
    suffix: float
    post_instruction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSet:
    """One prompt set with one kind of suffix.

    Attributes:
        name: the set.
        suffix: none, given, or random of equal token length.
        n_prompts: how many prompts.
        cosines: of the residual stream with the direction: `last` token, each post-instruction position ("-1"
            is the last), and the mean over the tokens of the `instruction` and of the `suffix`.
        contributions: None where the architecture's heads are not known.
        attention: of the top heads; None where the architecture's heads or attention weights are not known.
    """

    name: str
    suffix: "SuffixKind"
    n_prompts: int
    cosines: dict[str, LayerProfile]
    contributions: SetContributions | None
    attention: tuple[HeadAttention, ...] | None

    @property
    def label(self) -> str:
        """The set and its suffix in a few words."""
        return {"none": self.name, "given": f"{self.name} + suffix", "random": f"{self.name} + random"}[self.suffix]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixInfo:
    """The suffix that was appended, and its length in tokens."""

    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopHead:
    """One attention head and its mean contribution on the first set without a suffix."""

    layer: int
    head: int
    contribution: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTrace:
    """One prompt, token by token.

    Attributes:
        layer: where the components are read.
        tokens: their texts.
        components: r . x at the input of block `layer`.
        cosines: [n_tokens][n_layers + 1].
    """

    layer: int
    tokens: tuple[str, ...]
    components: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport:
    """Where in a model, and on which prompts, a direction shows.

    Attributes:
        model: its name.
        direction_sha256: which direction.
        layer: the layer the direction was chosen at, or the one asked for; None if neither is known.
        n_layers: number of decoder blocks; profiles have one entry more.
        n_heads: attention heads of a block, or None where the config names none.
        post_instruction_tokens: texts of the post-instruction tokens, first to last.
        suffix: see `SuffixInfo`, or None.
        sets: what was traced.
        top_heads: the heads that write most of the direction before `layer` (anywhere, if that is None).
        heads_unavailable: why there is no table of heads, or None.
        attention_unavailable: why there is no attention of the top heads, or None.
        prompt: the prompt that was traced token by token, or None.
    """

    model: str
    direction_sha256: str
    layer: int | None
    n_layers: int
    n_heads: int | None
    post_instruction_tokens: tuple[str, ...]
    suffix: SuffixInfo | None
    sets: tuple[TracedSet, ...]
    top_heads: tuple[TopHead, ...]
    heads_unavailable: str | None
    attention_unavailable: str | None
    prompt: TokenTrace | None


def write_trace_report(report: TraceReport, directory: Path) -> list[Path]:
    """Write trace.json, cosines.csv, contributions.csv and attention.csv to `directory`; return the files.

    Files about heads are left out where there is no table of heads.
    """
    document = directory / "trace.json"
    write_json(document, asdict(report))
    tables: dict[str, tuple[Sequence[str], Iterable[Sequence[object]]]] = {
        "cosines.csv": (COSINE_COLUMNS, _cosine_rows(report))
    }
    if report.heads_unavailable is None:
        tables["contributions.csv"] = (CONTRIBUTION_COLUMNS, _contribution_rows(report))
    if report.heads_unavailable is None and report.attention_unavailable is None:
        tables["attention.csv"] = (ATTENTION_COLUMNS, _attention_rows(report))
    for name, (columns, rows) in tables.items():
        write_csv(directory / name, columns, rows)
    return [document, *(directory / name for name in tables)]


COSINE_COLUMNS = ("set", "suffix", "tokens", "layer", "mean", "sd")
CONTRIBUTION_COLUMNS = ("set", "suffix", "writer", "layer", "head", "contribution")
ATTENTION_COLUMNS = ("set", "suffix", "layer", "head", "template", "instruction", "suffix_tokens", "post_instruction")


def _cosine_rows(report: TraceReport) -> Iterable[Sequence[object]]:
    for traced in report.sets:
        for tokens, profile in traced.cosines.items():
            for layer, (mean, sd) in enumerate(zip(profile.mean, profile.sd, strict=True)):
                yield traced.name, traced.suffix, tokens, layer, mean, sd


def _contribution_rows(report: TraceReport) -> Iterable[Sequence[object]]:
    for traced in report.sets:
        found = traced.contributions
        if found is None:
            continue
        yield traced.name, traced.suffix, "embedding", "", "", found.embedding
        for layer in range(report.n_layers):
            for head, value in enumerate(found.heads[layer]):
                yield traced.name, traced.suffix, "head", layer, head, value
            yield traced.name, traced.suffix, "attention bias", layer, "", found.biases[layer]
            yield traced.name, traced.suffix, "mlp", layer, "", found.mlps[layer]


def _attention_rows(report: TraceReport) -> Iterable[Sequence[object]]:
    for traced in report.sets:
        for head in traced.attention or ():
            parts = (head.template, head.instruction, head.suffix, head.post_instruction)
            yield (traced.name, traced.suffix, head.layer, head.head, *parts)

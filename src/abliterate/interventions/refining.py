"""Refining an edit: strengths for each layer and role, found by gradient and chosen on prompts of their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.provenance import versions
from abliterate.checkpoints.saved_work import SavedWork, saved_work
from abliterate.directions import Direction, encode_rows, load_direction, orthogonal_to
from abliterate.editing.strengths import Strengths
from abliterate.errors import DirectionError, InputError, ModelError, NoDirectionError, RefusalBehaviourError
from abliterate.extraction.behaviour import PARTS, ReplyRun, ShortReply, coverage, first_tokens_of_refusals
from abliterate.extraction.judgement import MIN_COVERAGE, MIN_PROMPTS
from abliterate.extraction.options import Goal, PromptSources
from abliterate.extraction.run import run_key
from abliterate.extraction.selection import rounded_up
from abliterate.files import write_json
from abliterate.interventions.own_directions import own_directions, stream_means, unit_rows
from abliterate.interventions.refinement_options import RefinementOptions
from abliterate.interventions.refinement_report import FrontierPoint, RefinementReport, point_of
from abliterate.interventions.soft_edit import SoftEdit
from abliterate.interventions.strength_search import (
    BATCH,
    DIGITS,
    BaseReplies,
    Search,
    at_reply,
    compare,
    further_steps,
    last_logits,
    log_odds,
    read_base,
    rounded,
)
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import open_as_extracted
from abliterate.models.options import ModelOptions
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import draw_borderline, prompt_hash, split_for_extraction

PRESSURES = (0.3, 0.1, 0.03, 0.01)
"""Weights of the refusal score against the KL, from the strongest: the points of the frontier."""
HARDER = (3.0, 1.0)
"""What is tried besides where all of these leave too many refusals."""
MAX_REFUSALS: Mapping[Goal, float] = {"remove": 0.05, "repair": 0.3}
POSITION = -1
"""Where each layer's own direction is read: at the last token, from which the reply is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """What refining found.

    Attributes:
        report: As plain values.
        directions: Each layer's own, [n_layers, d_model] float64, unit vectors.
        prompt_hashes: Of the prompts that they were found and chosen with.
    """

    report: RefinementReport
    directions: Tensor
    prompt_hashes: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write the file of strengths, whole or not at all; the same content gives the same bytes.

        Raises:
            InputError: It cannot be written.
        """
        report = self.report
        strengths = Strengths(
            file=path.name,
            direction_sha256=report.direction_sha256,
            embed=0.0,
            attn=report.chosen.attn,
            mlp=report.chosen.mlp,
            directions=encode_rows(self.directions.double().cpu().numpy()),
            arguments=report.arguments,
            prompt_hashes=self.prompt_hashes,
        )
        try:
            write_json(path, asdict(report) | strengths.content(), allow_nan=False)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written: {error.strerror or error}; choose another path with -o"
            ) from error


def refine_edit(
    *,
    model: "str | Path | ModelSource | ChatModel",
    direction: Direction | Path,
    harmful: str = "bundled",
    harmless: str = "bundled",
    options: RefinementOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
    work_directory: Path | None = None,
    deliver: Callable[[Refinement], None] = lambda _refinement: None,
) -> Refinement:
    """Find how far each layer and role has to be edited so that the model no longer refuses, at the least damage.

    What is minimised is KL(base || edited) over the base's own replies to harmless prompts, with a penalty on the
    refusal metric of harmful ones; what is removed from each layer is a direction of its own (`own_directions`). Of the
    points of the frontier one is chosen by what it does to validation prompts.

    With a direction of false refusals (`extraction.repair`) the prompts that are to be answered are the borderline ones
    that the model refuses, the replies that are to stay are the refusals of harmful prompts too, and each layer's own
    direction is orthogonal to what tells harmful from harmless prompts there.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        direction: the direction of `extract`, or its file: it tells by what tokens and how the model refuses.
        harmful: prompt SPEC, see `abliterate.prompt_sets`.
        harmless: prompt SPEC.
        options: see `RefinementOptions`.
        model_options: how to load and run the model.
        progress: where to show progress.
        work_directory: where to keep each point of the frontier until all are there, so that the same call goes on from
            there; None, or a loaded model: nothing is kept. Replies never are.
        deliver: is given the result before what is kept is deleted.

    Raises:
        NoDirectionError: no point of the frontier leaves as few refusals, at as little KL, as is asked for.
        DirectionError: the direction cannot be read or has another width.
        RefusalBehaviourError: too few prompts are refused, or answered.
        ModelError: the model does not load, does not refuse by its first tokens, or cannot be edited so.
        PromptSetError: too few prompts, or a SPEC that cannot be read.
    """
    options = options or RefinementOptions()
    loaded = load_direction(direction) if isinstance(direction, Path) else direction
    prompts = split_for_extraction(harmful, harmless, n_train=options.n_train, n_val=options.n_val, seed=options.seed)
    for note in prompts.notes:
        progress.message(note)
    model_options = model_options or ModelOptions()
    opened = open_as_extracted(model, loaded, options=model_options, extracts=True, progress=progress)
    name, chat = opened.name, opened.chat
    if loaded.d_model != chat.d_model:
        raise DirectionError(f"the direction has {loaded.d_model} entries; the width of {name} is {chat.d_model}")
    parts = {part: getattr(prompts, part) for part in PARTS}
    goal: Goal = "repair" if loaded.metadata.get("goal") == "repair" else "remove"
    defaults = RefinementOptions()
    if goal == "remove" and (options.borderline, options.max_lost) != (defaults.borderline, defaults.max_lost):
        raise InputError(
            "--borderline and --max-lost go with a direction of false refusals, which `extract --goal repair` finds; "
            "this one is not one"
        )
    if goal == "repair":
        borderline = draw_borderline(options.borderline, other=prompts, seed=options.seed)
        parts |= {"borderline_train": borderline.train, "borderline_validation": borderline.validation}
    rows = {part: chat.encode(found.texts) for part, found in parts.items()}
    ranks = find_ranks(device=str(chat.device))
    key = {
        **run_key(opened.source, chat, parts, model_options),
        "direction": loaded.sha256,
        # Limits choose among the points.
        "options": asdict(replace(options, max_refusals=None, max_kl=None, max_lost=defaults.max_lost)),
    }
    arguments = (
        *cli_arguments(PromptSources(harmful=harmful, harmless=harmless)),
        *cli_arguments(options),
        *cli_arguments(replace(model_options, system_prompt=chat.system_prompt)),
    )
    kept = work_directory if opened.source is not None else None
    with saved_work(kept, key=key, ranks=ranks, progress=progress) as saved, _frozen(chat):
        run = _Run(
            chat=chat, goal=goal, options=options, arguments=arguments, ranks=ranks, saved=saved, progress=progress
        )
        with saved.useless_after(InputError, RefusalBehaviourError):
            report, directions = run.refine(name, loaded, rows)
        hashes = tuple(sorted({prompt_hash(text) for found in parts.values() for text in found.texts}))
        found = Refinement(report=report, directions=directions, prompt_hashes=hashes)
        deliver(found)
    return found


@contextmanager
def _frozen(chat: ChatModel) -> Iterator[None]:
    """Let gradients flow through a model and none of them to its weights."""
    learned = [parameter for parameter in chat.model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The prompts that count, and the base's replies to them.

    Attributes:
        rows: token ids by part: refused ones of `harmful` and `borderline`, answered ones of `harmless`.
        replies: the base's replies to these.
        answered: borderline training prompts that are answered.
        refusals: all replies that refuse.
        counts: part -> prompts that count of those that were drawn.
    """

    rows: dict[str, list[list[int]]]
    replies: dict[str, list[tuple[int, ...]]]
    answered: list[list[int]]
    refusals: list[ShortReply]
    counts: dict[str, tuple[int, int]]

    def to_answer(self, part: str) -> list[list[int]]:
        """Return the prompts that are refused and are to be answered."""
        return self.rows.get(f"borderline_{part}", self.rows[f"harmful_{part}"])

    def to_stay(self, part: str) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Return the prompts whose replies are to stay, and these; of a repair both kinds in turn."""
        kinds = ("harmless", "harmful") if f"borderline_{part}" in self.rows else ("harmless",)
        pairs = [list(zip(self.rows[f"{kind}_{part}"], self.replies[f"{kind}_{part}"], strict=True)) for kind in kinds]
        mixed = [pair for group in zip_longest(*pairs) for pair in group if pair is not None]
        return [row for row, _ in mixed], [reply for _, reply in mixed]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One refinement of a loaded model."""

    chat: ChatModel
    goal: Goal
    options: RefinementOptions
    arguments: tuple[str, ...]
    ranks: Ranks
    saved: SavedWork
    progress: ProgressReporter

    @property
    def max_refusals(self) -> float:
        """Largest share of the prompts that are to be answered which may still be refused."""
        if self.options.max_refusals is not None:
            return self.options.max_refusals
        return MAX_REFUSALS[self.goal]

    @property
    def replies(self) -> ReplyRun:
        """What generates the replies."""
        return ReplyRun(chat=self.chat, ranks=self.ranks, max_new_tokens=self.options.reply_tokens)

    def refine(
        self, name: str, direction: Direction, rows: Mapping[str, list[list[int]]]
    ) -> tuple[RefinementReport, Tensor]:
        """Find strengths and choose among them; return what was found and each layer's own direction."""
        chat, options = self.chat, self.options
        kept = self._kept(rows)
        token_ids = self._token_ids(direction, kept.refusals)
        zero = float((direction.metadata.get("refusal") or {}).get("zero") or 0.0)
        own = self._own_directions(kept)
        vector = direction.vector.double()
        # A layer in which nothing tells the prompts apart has nothing of its own to take out.
        own = torch.where(own.norm(dim=1, keepdim=True) > 0, own, vector / vector.norm())
        base = {part: read_base(chat, *kept.to_stay(part)) for part in ("train", "validation")}
        edit = SoftEdit(chat, own)
        search = Search(
            chat=chat,
            edit=edit,
            to_answer=kept.to_answer("train"),
            to_stay=base["train"],
            token_ids=token_ids,
            zero=zero,
        )
        measure = _Measure(
            run=self,
            to_answer=kept.to_answer("validation"),
            to_refuse=kept.rows["harmful_validation"] if self.goal == "repair" else None,
            to_stay=base["validation"],
            token_ids=token_ids,
        )
        everywhere = torch.ones(chat.n_layers, 2)
        plain = self._point(measure, SoftEdit(chat, vector.expand(chat.n_layers, -1)), everywhere, None)
        frontier: list[FrontierPoint] = []
        for pressures in (PRESSURES, HARDER):
            if any(point.share_unanswered <= self.max_refusals for point in frontier):
                break
            n_steps = options.steps + (len(pressures) - 1) * further_steps(options.steps)
            saved = {pressure: self.saved.value(_strengths_key(pressure)) for pressure in pressures}
            known = {pressure: torch.tensor(found) for pressure, found in saved.items() if found is not None}
            with self.progress.task("Refining", total=n_steps) as advance:
                for pressure, strengths in search.points(pressures, steps=options.steps, advance=advance, known=known):
                    frontier.append(self._point(measure, edit, strengths, pressure))
        frontier.sort(key=lambda point: -(point.pressure or 0.0))
        report = RefinementReport(
            model=name,
            direction_sha256=direction.sha256,
            goal=self.goal,
            position=POSITION,
            refusal_tokens=tuple(chat.decode([token], skip_special_tokens=False) for token in token_ids),
            chosen=choose(frontier, max_refusals=self.max_refusals, max_kl=options.max_kl, max_lost=options.max_lost),
            frontier=tuple(frontier),
            plain=plain,
            counts=kept.counts,
            arguments=self.arguments,
            versions=versions("abliterate", "python", "torch", "transformers"),
        )
        return report, own

    def _point(self, measure: "_Measure", edit: SoftEdit, strengths: Tensor, pressure: float | None) -> FrontierPoint:
        """Return a point of the frontier, out of what is saved where it is there."""
        key = f"point {pressure}"
        if self.saved.value(key) is None:
            point = measure.point(edit, rounded(strengths), pressure)
            self.saved.save_values({_strengths_key(pressure): strengths.tolist(), key: asdict(point)})
        # What is saved, even if it was just now: so that both ways give the same.
        return point_of(self.saved.value(key))

    def _own_directions(self, kept: _Kept) -> Tensor:
        """Return each layer's own direction, [n_layers, d_model], unit vectors or zeros."""
        chat = self.chat
        harmful, harmless = (
            stream_means(chat, kept.rows[f"{kind}_train"], position=POSITION) for kind in ("harmful", "harmless")
        )
        if self.goal == "remove":
            return own_directions(harmful=harmful, harmless=harmless)
        false = own_directions(
            harmful=stream_means(chat, kept.rows["borderline_train"], position=POSITION),
            harmless=stream_means(chat, kept.answered, position=POSITION),
        )
        return unit_rows(orthogonal_to(false, harmful - harmless))

    def _kept(self, rows: Mapping[str, list[list[int]]]) -> _Kept:
        kept: dict[str, list[list[int]]] = {}
        replies: dict[str, list[tuple[int, ...]]] = {}
        answered: list[list[int]] = []
        refusals: list[ShortReply] = []
        counts: dict[str, tuple[int, int]] = {}
        for part in rows:
            found = self.replies.read(rows[part], progress=self.progress, task=f"Replies to {part.replace('_', ' ')}")
            wanted = [each.answered if part.startswith("harmless") else each.refused for each in found]
            # A reply of no tokens gives nothing to compare.
            wanted = [keep and bool(each.tokens) for keep, each in zip(wanted, found, strict=True)]
            kept[part] = [row for row, keep in zip(rows[part], wanted, strict=True) if keep]
            replies[part] = [each.tokens for each, keep in zip(found, wanted, strict=True) if keep]
            counts[part] = (len(kept[part]), len(rows[part]))
            refusals += [each for each in found if each.refused]
            if part == "borderline_train":
                answered = [row for row, each in zip(rows[part], found, strict=True) if each.answered]
            few = min(MIN_PROMPTS, len(rows[part]))
            if len(kept[part]) < few or (part == "borderline_train" and len(answered) < few):
                n, does = len(kept[part]), "answers" if part.startswith("harmless") else "refuses"
                if n >= few:
                    n, does = len(answered), "answers"
                raise RefusalBehaviourError(
                    f"by its replies the model {does} {n} of {len(rows[part])} {part.replace('_', ' ')} prompts, and "
                    f"{MIN_PROMPTS} are needed; take more or other prompts"
                )
        return _Kept(rows=kept, replies=replies, answered=answered, refusals=refusals, counts=counts)

    def _token_ids(self, direction: Direction, refusals: Sequence[ShortReply]) -> tuple[int, ...]:
        listed = direction.metadata.get("refusal_tokens") or []
        found = tuple(int(token["id"]) for token in listed) or tuple(first_tokens_of_refusals(refusals))
        share = coverage(refusals, found) or 0.0
        if share < MIN_COVERAGE:
            raise ModelError(
                f"first tokens begin {share:.0%} of this model's refusals, and a score that strengths can be found by "
                f"takes {MIN_COVERAGE:.0%}; orthogonalize with the direction alone"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """What strengths do to validation prompts."""

    run: _Run
    to_answer: list[list[int]]
    to_refuse: list[list[int]] | None
    to_stay: BaseReplies
    token_ids: tuple[int, ...]

    def point(self, edit: SoftEdit, strengths: Tensor, pressure: float | None) -> FrontierPoint:
        """Return a point of the frontier."""
        chat, to_stay, rows = self.run.chat, self.to_stay, self.to_answer
        with torch.no_grad(), edit.applied(strengths):
            pairs = [pair for batch in _batches(len(to_stay.rows)) for pair in compare(chat, to_stay, batch)]
            metric = torch.cat(
                [log_odds(last_logits(chat, [rows[i] for i in batch]), self.token_ids) for batch in _batches(len(rows))]
            )
            found = self.run.replies.read([*rows, *(self.to_refuse or [])], progress=SILENT)
        replies, others = found[: len(rows)], found[len(rows) :]
        base = torch.cat([-at_reply(each.float(), to_stay, i) for i, each in enumerate(to_stay.base)])
        return FrontierPoint(
            pressure=pressure,
            attn=tuple(round(value, DIGITS) for value in strengths[:, 0].tolist()),
            mlp=tuple(round(value, DIGITS) for value in strengths[:, 1].tolist()),
            unanswered=sum(not reply.answered for reply in replies),
            n_to_answer=len(replies),
            metric=float(metric.mean()),
            kl_first=float(torch.stack([kl[0] for kl, _ in pairs]).mean()),
            kl=float(torch.cat([kl for kl, _ in pairs]).mean()),
            cross_entropy=float(torch.cat([surprise for _, surprise in pairs]).mean()),
            base_cross_entropy=float(base.mean()),
            n_to_stay=len(to_stay.rows),
            refused=None if self.to_refuse is None else sum(reply.refused for reply in others),
            n_to_refuse=len(others),
        )


def _strengths_key(pressure: float | None) -> str:
    return f"strengths {pressure}"


def _batches(n: int) -> list[range]:
    return [range(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]


def choose(
    points: Sequence[FrontierPoint], *, max_refusals: float, max_kl: float | None, max_lost: float = 1.0
) -> FrontierPoint:
    """Return the point of least KL among those that leave few enough refusals.

    Args:
        points: the frontier.
        max_refusals: largest share of the prompts that are to be answered which may be left unanswered.
        max_kl: largest KL; where nothing within it leaves so few refusals, the fewest within it are taken. None: any.
        max_lost: largest share of the prompts that are to stay refused which may be answered.

    Raises:
        NoDirectionError: there is none.
    """
    kept = [point for point in points if point.share_lost <= max_lost]
    if not kept:
        nearest = min(points, key=lambda point: (point.share_lost, point.unanswered))
        raise NoDirectionError(
            f"no point of the frontier keeps the true refusals; the most are {nearest.refused} of "
            f"{nearest.n_to_refuse}; --max-lost {rounded_up(nearest.share_lost)} accepts that"
        )
    within = [point for point in kept if max_kl is None or point.kl <= max_kl]
    enough = [point for point in within if point.share_unanswered <= max_refusals]
    if enough:
        return min(enough, key=lambda point: point.kl)
    if within and max_kl is not None:
        return min(within, key=lambda point: (point.unanswered, point.kl))
    nearest = min(kept, key=lambda point: (point.unanswered, point.kl))
    raise NoDirectionError(
        f"no point of the frontier is within what is asked for; the fewest refusals are {nearest.unanswered} of "
        f"{nearest.n_to_answer}, at KL {nearest.kl:.3f}; --max-refusals "
        f"{rounded_up(nearest.share_unanswered)} without --max-kl accepts that"
    )

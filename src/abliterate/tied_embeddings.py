"""Tied embeddings: what an edit of the token embedding does to the output head that shares its rows.

The published method edits the shared matrix, so the head changes too and the logits are not those of directional
ablation. `untie` gives each of the two a tensor of its own, of which the head's keeps the rows as they were: then
the logits are the ablated ones to rounding. `skip` leaves the pair as it is, and the direction in the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from abliterate.architectures.writers import ResidualWriter, StreamMap
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.errors import InputError
from abliterate.tensor_edits import TensorEdit, projection_of, renamed

TiedPolicy = Literal["edit", "untie", "skip"]
TIED_POLICIES: tuple[TiedPolicy, ...] = ("edit", "untie", "skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterEdits:
    """The edits of some residual writers, and what else they make necessary.

    Attributes:
        edits: In file order, new tensors last.
        config_changes: Dotted path in config.json -> new value.
        notes: What the user should know.
    """

    edits: tuple[TensorEdit, ...]
    config_changes: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def edits_of_writers(
    writers: Sequence[ResidualWriter], *, stream: StreamMap, tensors: Mapping[str, TensorInfo], policy: TiedPolicy
) -> WriterEdits:
    """Return the edits that project the selected writers, with the tied pair as `policy` says.

    Args:
        writers: What the options select.
        stream: What the checkpoint's tensors do.
        tensors: Name -> what the headers say.
        policy: edit, untie or skip; without a tied pair among the writers they are all the same.

    Raises:
        InputError: The model class has no head that could be untied.
    """
    pair = {stream.embedding, stream.head} if stream.tied_embeddings else set()
    selected = [writer for writer in writers if writer.tensor_name in pair]
    others = [writer for writer in writers if writer.tensor_name not in pair]
    if not selected or policy == "edit":
        notes = ["the embeddings are tied, so the output head is edited with them"] if selected else []
        if not selected and policy != "edit":
            notes = [f"no tied embedding is edited, so --tied {policy} changes nothing"]
        edits = tuple(projection_of(writer, tensors[writer.tensor_name]) for writer in writers)
        return WriterEdits(edits=edits, notes=tuple(notes))
    if policy == "skip":
        note = "the tied embeddings are left as they are, so the direction is still in the residual stream"
        return WriterEdits(
            edits=tuple(projection_of(writer, tensors[writer.tensor_name]) for writer in others), notes=(note,)
        )
    return _untied(others, selected, stream=stream, tensors=tensors)


def _untied(
    others: Sequence[ResidualWriter],
    selected: Sequence[ResidualWriter],
    *,
    stream: StreamMap,
    tensors: Mapping[str, TensorInfo],
) -> WriterEdits:
    if stream.head is None:
        raise InputError(f"{stream.model_type}: the model has no output head to untie; leave out --tied untie")
    writer = next((each for each in selected if each.tensor_name == stream.embedding), selected[0])
    stored = tensors[writer.tensor_name]
    edits = [projection_of(each, tensors[each.tensor_name]) for each in others]
    if stored.name == stream.embedding:
        edits.append(projection_of(writer, stored))
    if stored.name != stream.embedding or stream.head not in tensors:
        is_head = stored.name == stream.embedding
        name = stream.head if is_head else stream.embedding
        edits.append(
            TensorEdit(
                info=renamed(stored, name),
                source=stored,
                kind="untied",
                role="embed",
                layer=None,
                residual_axis=writer.residual_axis,
                norm_chain=() if is_head else writer.norm_chain,
                project=not is_head,
            )
        )
    sections = {(), stream.text_section}
    changes = {".".join((*section, "tie_word_embeddings")): False for section in sorted(sections)}
    note = "the embeddings were tied and are no longer: the output head keeps the base model's rows"
    order = {name: position for position, name in enumerate(tensors)}
    edits.sort(key=lambda edit: (edit.is_new, order.get(edit.name, 0)))
    return WriterEdits(edits=tuple(edits), config_changes=changes, notes=(note,))

"""What sets a thinking part off from the answer, in the families that are known.

A template that shows its own markers is asked first (`chat_format`); this list stands in where it does not.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMarkers:
    """How one family marks its thoughts.

    Attributes:
        opening: what a thinking part starts with; "" where the prompt has always opened it.
        closing: what ends it; the answer follows.
        shut: what ends at once, and without any thought, a part that was just opened.
    """

    opening: str
    closing: str
    shut: str


def _tags(name: str) -> ThinkingMarkers:
    return ThinkingMarkers(opening=f"<{name}>", closing=f"</{name}>", shut=f"\n\n</{name}>\n\n")


_FINAL_CHANNEL = "<|channel|>final<|message|>"
_SHUT_CHANNEL = f"<|message|><|end|><|start|>assistant{_FINAL_CHANNEL}"

KNOWN_MARKERS: tuple[ThinkingMarkers, ...] = (
    _tags("think"),  # Qwen, DeepSeek, GLM, Kimi K2, MiniMax, Nemotron, SmolLM3, Hunyuan, EXAONE 4 and many more
    _tags("thought"),  # EXAONE Deep
    ThinkingMarkers(opening="[THINK]", closing="[/THINK]", shut="[/THINK]"),  # Magistral, Ministral
    ThinkingMarkers(opening="<|channel|>analysis", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),  # gpt-oss
    ThinkingMarkers(opening="<|channel|>commentary", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),
    ThinkingMarkers(opening="<|channel>thought", closing="<channel|>", shut="\n<channel|>"),  # Gemma 4
    ThinkingMarkers(opening="<seed:think>", closing="</seed:think>", shut="</seed:think>\n"),  # Seed-OSS
    ThinkingMarkers(opening="<|START_THINKING|>", closing="<|END_THINKING|>", shut="<|END_THINKING|>"),  # Command A
    ThinkingMarkers(opening="◁think▷", closing="◁/think▷", shut="◁/think▷"),  # Kimi-VL, Kimi-Dev
    ThinkingMarkers(opening="<|inner_prefix|>", closing="<|inner_suffix|>", shut="<|inner_suffix|>"),  # Apertus
)


def ends_with_opening(text: str, markers: tuple[ThinkingMarkers, ...]) -> ThinkingMarkers | None:
    """Return the markers whose thinking part is open at the end of a text, or None."""
    end = text.rstrip()
    return next((one for one in markers if one.opening and end.endswith(one.opening)), None)

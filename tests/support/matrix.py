"""The document docs/architectures.md: for each model type what can be done, its writers, or why it is refused."""

from tests.support.conformance import PartialResult, Result
from tests.support.differential import RunResult
from tests.support.paths import DOCS

MATRIX = DOCS / "architectures.md"

HEADER = """\
# Which architectures can be orthogonalized

Made by `python -m scripts.architecture_matrix`; do not edit.

- **edit**, *exact*: a tiny random model of this type (norms and biases random, float64, saved in shards by transformers
  {version}) is edited by `abliterate orthogonalize` and loaded again, and then max |r.h|/|h| is below 1e-6 at each
  block's own output and before the final norm, where it was above 1e-3; and each group of edited tensors is needed,
  that is, restoring it alone brings the direction back.
- **edit**, *partial*: a part of the stream cannot be cleaned by any edit of weights, so the type is refused unless
  `--partial` is given. With that part made neutral (a convolution of zeros; a norm that scales all channels alike) the
  tiny model is exact as above, and each group of edited tensors is needed; with it as random as all else the mean
  |r.h|/|h| is clearly smaller after the edit, and hooks leave nothing. Inkling's vision tower is built with a mended
  function of transformers; gemma3n's towers are not built, its text model is saved in the layout of the whole.
- **extract**: hooks that ablate the direction in the base leave |r.h|/|h| below 1e-9 at the same places (1e-6 where the
  model computes in float32), and where no norm stands behind a writer the stream is then the edited model's; what is
  recorded equals transformers' `output_hidden_states`; and the look that `extract` takes at a model passes.
- **stream layers**: a small model run layer by layer gives the logits of the whole (`extract --stream-layers`).
- **batch**: two prompts of unequal length, run together, give the log-probabilities of each alone, to 1e-4 in float32;
  *equal lengths*: padding is felt (a recurrent layer takes it in, or tokens are grouped from the start), so only rows
  of one length are run together.
- **cache**: replies that are decoded together, with a cache and behind the tokens that they share, are those of each
  prompt alone, run anew for each token; *generate*: state beside keys and values, positions counted through padding, or
  (here) a window shorter than the prompts, so transformers decodes.
- **load**: transformers loads the base and the edited checkpoint with nothing missing, nothing over and nothing of
  another shape, and the base's logits are those of the model that was saved: to 1e-6, since codegen and gptj make
  positions in another number format when they are loaded; inkling2, which runs in float32, to 1e-5; all others to the
  bit.

`*` stands for a number, *through* for norms that stand between the writer and the residual stream, and `[axis n]` for a
residual axis other than 0. For models with images or sound this holds for text: what their towers put in the place of
token embeddings is left as it is; qwen2_5_omni and qwen3_omni_moe are edited in their thinker. kimi_k2 is edited as
deepseek_v3, which it is under a name that transformers does not know. *not run*: a tiny model's towers, which no text
needs, read a config that it does not have. Why a type is not extracted or not streamed stands below the table.

| model type | edit | extract | stream layers | batch | cache | load | residual writers, or why it is refused |
|---|---|---|---|---|---|---|---|
"""

REASONS = """
## Why not

| model type | | reason |
|---|---|---|
"""


def exact_row(name: str, result: Result, running: RunResult | None) -> str:
    """Return the row of a type (or a variant of one) that was found exact; `running` None: it is not run."""
    return f"| {name} | exact | {_columns(result, running)} | {result.writers} |"


def partial_row(name: str, result: PartialResult, running: RunResult | None, reason: str) -> str:
    """Return the row of a type that is edited partially."""
    whole = result.whole
    return f"| {name} | partial | {_columns(whole, running)} | {whole.writers}; but {reason} |"


def _columns(result: Result, running: RunResult | None) -> str:
    hooks = result.hooks
    columns = ["no" if reason else "yes" for reason in (hooks.not_extracted, hooks.not_streamed)]
    if running is None:
        return " | ".join([*columns, "not run", "not run", "yes"])
    batch = "equal lengths" if running.equal_lengths else "yes"
    return " | ".join([*columns, batch, "generate" if running.by_generate else "yes", "yes"])


def reason_rows(name: str, result: Result) -> list[str]:
    """Return a row for each thing that cannot be done with a type that is exact."""
    extract, stream = result.hooks.not_extracted, result.hooks.not_streamed
    rows = [f"| {name} | extract | {extract} |"] if extract else []
    return [*rows, f"| {name} | stream layers | {stream} |"] if stream and not extract else rows


def refused_row(name: str, reason: str) -> str:
    """Return the row of a type that is refused."""
    return f"| {name} | refused | no | no | no | no | no | {reason} |"


def written_rows() -> list[str]:
    """Return the rows of the document as it stands, those of its table and those of its reasons."""
    return [line for line in MATRIX.read_text().splitlines() if line.startswith("| ") and "model type" not in line]

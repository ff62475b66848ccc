"""How a model is loaded and run. The defaults stand here and nowhere else."""

from dataclasses import dataclass
from typing import Annotated, Literal

from abliterate.arguments import Argument

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = Literal["auto"]
ConvertedDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a model is loaded and run.

    Attributes:
        dtype: auto, float32, bfloat16 or float16; auto is the stored one, but float32 for half formats on a CPU.
        device: auto, cpu, cuda, cuda:N or mps; auto takes a GPU when there is one.
        batch_size: prompts per forward pass, or None to size batches by tokens.
        system_prompt: the system message, or None for what the chat template does by default.
        trust_remote_code: run Python code that comes with the model.
        device_map: auto spreads the model over GPUs, memory and disk (accelerate), in the stored number format unless
            `dtype` names another; None puts all of it on `device`.
        stream_layers: read one decoder layer at a time instead of loading the model; for `extract` only.
    """

    dtype: Annotated[
        Dtype,
        Argument(
            flag="--dtype",
            help="Number format the model runs in. On a CPU, bfloat16 is fast if the processor multiplies it itself.",
        ),
    ] = "auto"
    device: Annotated[
        str,
        Argument(
            flag="--device",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU when there is one.",
            of_machine=True,
        ),
    ] = "auto"
    batch_size: Annotated[
        int | None,
        Argument(
            flag="--batch-size",
            metavar="N|auto",
            help="Prompts per forward pass, or auto (halved when memory runs out).",
            of_machine=True,
        ),
    ] = None
    system_prompt: Annotated[
        str | None,
        Argument(
            flag="--system-prompt",
            help="System message, refused where the chat template drops it; default: what the template does.",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Argument(flag="--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False
    device_map: Annotated[
        DeviceMap | None,
        Argument(
            flag="--device-map",
            help="auto: spread the model over GPUs, memory and disk, in its stored number format.",
            of_machine=True,
        ),
    ] = None
    stream_layers: Annotated[
        bool,
        Argument(
            flag="--stream-layers",
            help="Read one decoder layer at a time: for models that do not fit into memory.",
            of_machine=True,
        ),
    ] = False

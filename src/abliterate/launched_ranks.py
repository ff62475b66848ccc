"""Joining the processes that a launcher started; gathered through accelerate."""

import atexit
import os

from abliterate.ranks import Ranks


def find_ranks(*, device: str = "auto") -> Ranks:
    """Join the other processes if a launcher started several, until this one ends; gloo on a CPU, nccl on GPUs.

    Args:
        device: where the command computes; what the processes tell one another goes the same way.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    # Without leaving, a process that has done its work is now and then aborted by the threads of its connections.
    atexit.register(state.destroy_process_group)
    return Ranks(index=state.process_index, count=state.num_processes, exchange=gather_object)

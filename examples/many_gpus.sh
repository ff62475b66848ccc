#!/usr/bin/env bash
# A model on several GPUs, in one of two ways:
#     examples/many_gpus.sh share MODEL OUT 4     it fits on one: each of 4 processes takes a part of the prompts
#     examples/many_gpus.sh spread MODEL OUT      it does not: its layers are spread over all GPUs, memory and disk
# EXTRACT_OPTIONS is added to `extract`. Editing takes no GPU.
set -euo pipefail
way=$1 model=$2 out=$3
mkdir -p "$out"

case $way in
share)
    # The choice and the file are those of one process.
    # shellcheck disable=SC2086
    torchrun --nproc-per-node "${4:-2}" -m abliterate extract "$model" --output "$out/refusal.safetensors" ${EXTRACT_OPTIONS:-}
    ;;
spread)
    # shellcheck disable=SC2086
    abliterate extract "$model" --device-map auto --output "$out/refusal.safetensors" ${EXTRACT_OPTIONS:-}
    ;;
*)
    echo "the way is share or spread, not $way" >&2
    exit 2
    ;;
esac
abliterate orthogonalize "$model" --direction "$out/refusal.safetensors" --output "$out/edited"

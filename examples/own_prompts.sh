#!/usr/bin/env bash
# A direction from prompts of your own: one prompt a line, or a column of a table.
#     examples/own_prompts.sh MODEL HARMFUL HARMLESS OUT
# A file is .txt, .jsonl, .json, .csv or .parquet; FILE:COLUMN names the column, and a Hub dataset is ID:SPLIT:COLUMN.
# EXTRACT_OPTIONS and EVALUATE_OPTIONS are added to the two commands, such as EXTRACT_OPTIONS='--n-train 64 --n-val 16'.
set -euo pipefail
model=$1 harmful=$2 harmless=$3 out=$4
mkdir -p "$out"

# What is read from the files, and what is wrong with them.
abliterate prompts "$harmful"
abliterate prompts "$harmless"

# The draw is by a seed, and the file remembers the hash of every prompt that it was found with.
# shellcheck disable=SC2086
abliterate extract "$model" --harmful "$harmful" --harmless "$harmless" --output "$out/refusal.safetensors" ${EXTRACT_OPTIONS:-}
abliterate orthogonalize "$model" --direction "$out/refusal.safetensors" --output "$out/edited"

# Those prompts are left out here, so rates are of prompts that the direction has not seen.
# shellcheck disable=SC2086
abliterate evaluate "$out/edited" --base "$model" --harmful "$harmful" --harmless "$harmless" \
    --output "$out/evaluation.json" ${EVALUATE_OPTIONS:-}

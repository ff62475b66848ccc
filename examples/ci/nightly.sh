#!/usr/bin/env bash
# A nightly robustness check of one chat model: extract, orthogonalize, verify, evaluate, audit.
#
#   MODEL=path/or/hub-id RATE=0.5 examples/ci/nightly.sh
#
# MODEL            a local directory or a Hub id
# RATE             the gate: fail when a bearable intervention leaves fewer harmful prompts refused (default: no gate)
# GATES            what fails the job of the edited model beside its base, as words such as "harmful_refusal_rate>0.1
#                  cross_entropy_change>0.2" (default: no gate); see `abliterate evaluate --help`
# ARTEFACTS        where reports go (default: artefacts); every file there may be published, none holds a reply
# CACHE            where directions are kept between runs (default: .cache/abliterate-ci)
# EXTRACT_OPTIONS  more options for `abliterate extract`
# EVALUATE_OPTIONS more options for `abliterate evaluate`
# AUDIT_OPTIONS    more options for `abliterate audit`
#
# Exit code: 0 when all is well; 1 when a step or a gate failed or the model is brittle; 2 when MODEL is not set.
# The edited checkpoint serves the check alone and is deleted at the end.
set -euo pipefail

[[ -n "${MODEL:-}" ]] || { echo "usage: MODEL=path/or/hub-id [RATE=0.5] $0" >&2; exit 2; }
artefacts=${ARTEFACTS:-artefacts}
cache=${CACHE:-.cache/abliterate-ci}
read -ra extract_options <<< "${EXTRACT_OPTIONS:-}"
read -ra evaluate_options <<< "${EVALUATE_OPTIONS:-}"
read -ra gates <<< "${GATES:-}"
read -ra audit_options <<< "${AUDIT_OPTIONS:-}"
mkdir -p "$artefacts" "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An error is a document, too, so that a file with something in it need not be a report.
has_report() { [[ -s "$1" ]] && ! grep -q '"schema": "abliterate.error/' "$1"; }

# 1. The direction, found anew only when the model, the options or the tool changed.
fingerprint() {
    echo "$MODEL ${EXTRACT_OPTIONS:-} $(abliterate --version)"
    [[ ! -d "$MODEL" ]] || find -L "$MODEL" -type f -printf '%f %s %T@\n' | sort
}
key=$(fingerprint | sha256sum | cut -c1-16)
direction=$cache/$key.safetensors
code=0
if [[ -f "$direction" ]]; then
    echo "direction: cached ($key)"
    cp "$cache/$key.json" "$artefacts/extract.json"
else
    abliterate -q extract "$MODEL" -o "$work/refusal.safetensors" --json "${extract_options[@]}" \
        > "$artefacts/extract.json" || code=$?
    case $code in
        0) cp "$artefacts/extract.json" "$cache/$key.json"
           mv "$work/refusal.safetensors" "$direction"
           echo "direction: extracted ($key)" ;;
        3) echo "direction: none passes the selection; see extract.json" ;;
        *) rm -f "$artefacts/extract.json"
           echo "direction: none could be extracted (exit $code); the audit says what the model does" ;;
    esac
fi

# 2. The same edit on the weights, the proof that they hold it, and what it changed. A model that is not on this disk is
#    only audited. A gate that fails ends the job after the audit.
failed=0
if [[ -f "$direction" && -d "$MODEL" ]]; then
    abliterate -q orthogonalize "$MODEL" --direction "$direction" -o "$work/edited" --json \
        > "$artefacts/orthogonalize.json"
    echo "weights: orthogonalized"
    if abliterate verify --help > /dev/null 2>&1; then
        abliterate -q verify "$work/edited" --base "$MODEL" --direction "$direction" --json > "$artefacts/verify.json"
        echo "weights: verified"
    fi
    fail_if=()
    for gate in "${gates[@]}"; do fail_if+=(--fail-if "$gate"); done
    abliterate -q evaluate "$work/edited" --base "$MODEL" --junit "$artefacts/gates.xml" \
        --summary "$artefacts/evaluate.md" --json "${fail_if[@]}" "${evaluate_options[@]}" \
        > "$artefacts/evaluate.json" || failed=$?
    # 1 with a report is a gate that fails; without one it is the evaluation.
    [[ $failed == 0 ]] || has_report "$artefacts/evaluate.json" || exit "$failed"
    echo "weights: evaluated"
fi

# 3. The audit, and the gate.
brittle=()
[[ -z "${RATE:-}" ]] || brittle=(--fail-if-brittle "$RATE")
code=0
abliterate -q audit "$MODEL" --json --summary "$artefacts/audit.md" "${brittle[@]}" "${audit_options[@]}" > "$artefacts/audit.json" || code=$?
has_report "$artefacts/audit.json" || rm -f "$artefacts/audit.json"
if [[ -f "$artefacts/audit.json" ]]; then
    python3 -c 'import json, sys
report = json.load(open(sys.argv[1]))
print("audit:", report["verdict"], "-", report["reason"])' "$artefacts/audit.json" | tee "$artefacts/summary.txt"
fi
[[ $code != 0 ]] || code=$failed
exit "$code"

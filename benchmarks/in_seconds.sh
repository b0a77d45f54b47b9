#!/usr/bin/env bash
# `blt compare` in bytes a second: the held-out prompts of code, then 24 held-out translations (of the
# pairs that scripts/fetch_translation_corpus.py makes, in corpora/translate or $CORPUS).
#
#     OMP_NUM_THREADS=1 benchmarks/in_seconds.sh
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
corpus="${CORPUS:-corpora/translate}"
files="files=[\"$corpus/english.txt\"]"

code=()
for file in "$here"/prompts/*.txt; do code+=(--prompt-file "$file"); done
texts="$(mktemp)"
trap 'rm -f "$texts"' EXIT
"${PYTHON:-python}" - "$corpus/test.jsonl" >"$texts" <<'PROGRAM'
import json, sys

pairs = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for pair in (pairs[n * len(pairs) // 24] for n in range(24)):
    sys.stdout.write(f"{pair['language']}: {pair['source']}\nen:\0")
PROGRAM
translations=()
while IFS= read -r -d '' prompt; do translations+=(--prompt "$prompt"); done <"$texts"

"${BLT:-blt}" compare demo --max-new-bytes 200 --cost-parameters 3b "${code[@]}" --sampler ar \
    --sampler "blt-s draft_bytes=8" --sampler "blt-lookup draft_bytes=24" \
    --sampler "blt-auto cost.use=per-pass cost.latent=3" "$@"
"${BLT:-blt}" compare demo-translate --cost-parameters 3b "${translations[@]}" --sampler ar \
    --sampler "blt-s draft_bytes=8" --sampler "blt-lookup draft_bytes=8" \
    --sampler "blt-lookup draft_bytes=12 $files" "$@"

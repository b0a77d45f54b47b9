#!/usr/bin/env bash
# Bytes/s of the samplers of README's first table on held-out translations, one text at a time, all
# samplers in turns. Options are those of lossless.py (--speed RUNS, --limit N, --json FILE …).
#
#     OMP_NUM_THREADS=1 benchmarks/translation_speed.sh --limit 50 --timed 50 --speed 5
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
corpus="${CORPUS:-corpora/translate}"
files="files=[\"$corpus/english.txt\"]"

samplers=(ar "blt-s draft_bytes=8" "blt-lookup draft_bytes=8" "blt-cascade draft_bytes=16")
samplers+=("blt-auto cost.use=per-pass" "blt-lookup draft_bytes=8 $files")
samplers+=("blt-auto cost.use=per-pass $files" "blt-dv block_bytes=4" "blt-dv block_bytes=8")
for alpha in 0.9 0.7; do
    for size in 4 8; do
        samplers+=("blt-d block_bytes=$size unmasking.use=confidence unmasking.alpha=$alpha")
    done
done
samplers+=("blt-d block_bytes=16 unmasking.use=confidence")
samplers+=("blt-d block_bytes=4 closure=none unmasking.use=confidence")

options=(--pairs "$corpus/test.jsonl" --kind translations)
for sampler in "${samplers[@]}"; do options+=(--sampler "$sampler"); done
exec "${PYTHON:-python}" "$here/lossless.py" "${options[@]}" "$@"

#!/usr/bin/env bash
# All ways to generate, side by side on the held-out prompts, priced with the paper's 3B sizes.
# Options are passed on to `blt compare` (--json, --plot FILE, --temperature 1 --samples 3 …).
# benchmarks/lossless.py has fewer samplers on more kinds of text.
set -euo pipefail
prompts="$(cd "$(dirname "$0")/prompts" && pwd)"

one_step="unmasking.use=all"
confidence="unmasking.use=confidence unmasking.alpha=0.7"
entropy_small="unmasking.use=entropy-bound unmasking.gamma=0.5"
entropy_large="unmasking.use=entropy-bound unmasking.gamma=1.5"

samplers=(ar)
for size in 4 8 16; do samplers+=("blt-s draft_bytes=$size"); done
for size in 8 16 24; do
    samplers+=("speculative drafter.use=cascade drafter.draft_bytes=$size")
done
samplers+=("speculative drafter.use=lookup")
for size in 8 16 24 32; do samplers+=("blt-lookup draft_bytes=$size"); done
for size in 8 16 24 32; do samplers+=("blt-cascade draft_bytes=$size"); done
for bound in 0.7 0.5 0.3; do
    samplers+=("speculative drafter.use=until drafter.probability=$bound drafter.drafter.draft_bytes=16")
done
samplers+=("blt-auto cost.use=per-pass")
for size in 4 8 16; do
    for rule in "$one_step" "$confidence" "$entropy_large"; do
        for start in "start=aligned" "start=frontier closure=none" "start=frontier closure=forced"; do
            samplers+=("blt-dv block_bytes=$size $start $rule")
        done
    done
done
for size in 4 8 16; do
    for rule in "$confidence" "$entropy_small" "$entropy_large"; do
        samplers+=("blt-d block_bytes=$size $rule")
    done
done

options=(--max-new-bytes 200 --cost-parameters 3b)
for file in "$prompts"/*.txt; do options+=(--prompt-file "$file"); done
for sampler in "${samplers[@]}"; do options+=(--sampler "$sampler"); done
exec "${BLT:-blt}" compare demo "${options[@]}" "$@"

#!/usr/bin/env bash
# Every sampler of the paper's table and of ours on a task: quality against weight traffic at the
# paper's 3B sizes. What a run finds is kept batch by batch in --out, and the same command goes on.
#
#     benchmarks/table.sh demo:translate translation --out runs/translation
#     benchmarks/table.sh demo:python "humaneval execute=false" --out runs/humaneval
#
# FILES='["corpora/translate/english.txt"]' adds the samplers that look in files. Further options
# are those of `blt evaluate` (--limit N, --json, --plot FILE, --batch N …).
set -euo pipefail
model="$1" task="$2"
shift 2

rules=(confidence,0.7 confidence,0.9 confidence,0.5 entropy-bound,0.5 entropy-bound,1.5)
rule() {
    case "$1" in
        confidence,*) echo "unmasking.use=confidence unmasking.alpha=${1#*,}" ;;
        *) echo "unmasking.use=entropy-bound unmasking.gamma=${1#*,}" ;;
    esac
}

samplers=(ar)
for size in 4 8 16; do samplers+=("blt-s draft_bytes=$size"); done
samplers+=("blt-lookup draft_bytes=8" "blt-lookup draft_bytes=16")
samplers+=("blt-cascade draft_bytes=12" "blt-cascade draft_bytes=16" "blt-auto cost.use=per-pass")
if [ -n "${FILES:-}" ]; then
    for size in 8 12; do samplers+=("blt-lookup draft_bytes=$size files=$FILES"); done
    samplers+=("blt-auto cost.use=per-pass files=$FILES")
fi
for start in "start=aligned" "start=frontier closure=forced"; do
    for size in 4 8 16; do
        samplers+=("blt-dv block_bytes=$size $start")
        for each in "${rules[@]}"; do
            samplers+=("blt-dv block_bytes=$size $start $(rule "$each")")
        done
    done
done
for each in "${rules[@]}"; do
    for size in 4 8 16; do samplers+=("blt-d block_bytes=$size $(rule "$each")"); done
done
for size in 4 8 16; do
    samplers+=("blt-d block_bytes=$size closure=none $(rule confidence,0.7)")
done

options=(--batch 32 --cost-parameters 3b)
for sampler in "${samplers[@]}"; do options+=(--sampler "$sampler"); done
exec "${BLT:-blt}" evaluate "$model" --task "$task" "${options[@]}" "$@"

#!/usr/bin/env bash
# The runs that docs/performance.md's marks are of, on one GPU: beside peers, at drawn token counts, on other models' ranks,
# today's tiles beside the whole space, counters, bursts. docs/gpu-runs.md says what each takes.
#
#   bash benchmarks/marks.sh HARNESS OUT SECONDS PART...     in the repository's root
#
# HARNESS is the peers' harness, whose libraries PEER_ROOT names. A part begins only if there is time for it, is stopped at
# its limit, and has written what it had by then. SEED (default: of the last commit), PYTHON and JOBS can be set.
set -u
harness=$1 out=$2 end=$3
shift 3
python=${PYTHON:-python3}
jobs=${JOBS:-$(($(nproc) > 16 ? 14 : $(nproc)))}
seed=$((0x${SEED:-$(git rev-parse --short=7 HEAD 2>/dev/null || echo 7)}))
ten=1,16,64,256,512,1024,2048,4096,8192,16384
export PYTHONPATH=$PWD:$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
begun=$SECONDS

peers() { # LIMIT RECORD ARGUMENTS...: a third of the limit at most compiles
  local limit=$1 record=$2
  shift 2
  PYTHONPATH=${PEER_ROOT:-/tmp/peer}:$PYTHONPATH timeout -k 5 "$limit" "$python" -m tools.beside_peers "$harness" "$out/$record" \
    --jobs "$jobs" --seconds $((limit * 2 / 3)) "$@"
}

for part in "$@"; do
  left=$((end - (SECONDS - begun)))
  case $part in
    peers) most=190 ;; drawn) most=140 ;; shapes) most=270 ;; choice) most=290 ;; counters) most=150 ;; power) most=45 ;;
    *) echo "no such part: $part" >&2; exit 2 ;;
  esac
  if [ "$left" -lt $((most / 3)) ]; then echo "$part: no time"; continue; fi
  limit=$((most < left ? most : left))
  case $part in
    peers) peers $limit peers.json --shapes minimax-m3-ep8 --tokens $ten --paths w8a16,w8a8,bf16,block_fp8 --picture "$out/peers.svg" ;;
    drawn) peers $limit drawn.json --shapes minimax-m3-ep8 --draw 40 --seed $seed --humming 1 \
      --peers humming_w8a16_indexed,humming_w8a16_grouped,vllm_marlin_tuned ;;
    shapes) peers $limit shapes.json --shapes all --draw 6 --seed $seed --humming 1 \
      --peers humming_w8a16_indexed,humming_w8a16_grouped,vllm_marlin_tuned ;;
    choice) timeout -k 5 $limit "$python" -m tools.tile_choice "$out/choice.json" --full 12 --seconds $((limit * 2 / 5)) --workers "$jobs" ;;
    counters) timeout -k 5 $limit "$python" -m tools.call_counters "$out/counters.json" --points w8a16@$ten --points w8a8@$ten \
      --points bf16@4096,8192 --seconds $((limit - 8)) ;;
    power) timeout -k 5 $limit "$python" -m tools.burst_and_steady "$out/power.json" --steady 2.5 --seconds $((limit - 9)) ;;
  esac >"$out/$part.txt" 2>"$out/$part.err"
  echo "$part: exit $?, $((SECONDS - begun)) s"
done

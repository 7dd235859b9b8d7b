#!/usr/bin/env bash
# The numbers that want a GPU, one after the other (about ten minutes on an H200); what fails is said, the rest goes on.
#
#   PYTHONPATH=src OUT=runs/gpu benchmarks/gpu.sh
#   PYTHONPATH=src OUT=runs/gpu DEVICE=cpu SHAPE=tiny BLOCKS=tiny LENGTH=64 ROUNDS=2 benchmarks/gpu.sh     # a rehearsal
#
# LAYERS: as many layers of a 7B as fit with weights, gradients and moments in float32 (16 bytes per weight, 3.2 GB a
# layer, and activations): 24 on 141 GB, 12 on 80 GB.
set -u
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} OUT=${OUT:-runs/gpu} ROUNDS=${ROUNDS:-10} LENGTH=${LENGTH:-2048} LAYERS=${LAYERS:-24}
SHAPE=${SHAPE:-135m} BLOCKS=${BLOCKS:-7b} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

measure() { # NAME COMMAND...: its output on the screen and in OUT/NAME.log
  local name=$1
  shift
  echo "== $name: $*"
  timeout 300 "$@" 2>&1 | tee "$OUT/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || echo "== $name failed"
}

measure doctor "$PYTHON" -m diffulm doctor
# Against the released structure (wanted: 2x) and a compiled AR step of the same model (wanted: 0.95x).
measure step-small "$PYTHON" benchmarks/train_step.py --device "$DEVICE" --shape "$SHAPE" --length "$LENGTH" \
  --micro-batch 8 --rounds "$ROUNDS" --no-head
# Blocks of a 7B (wanted: 50% MFU), ours and the AR step in turns of their own: together they would not fit.
for name in "diffulm compiled" "AR compiled"; do
  measure "step-blocks-${name%% *}" "$PYTHON" benchmarks/train_step.py --device "$DEVICE" --shape "$BLOCKS" \
    --layers "$LAYERS" --length "$LENGTH" --micro-batch 2 --rounds "$ROUNDS" --no-head --only "$name"
done
# Document masks and blocks through FlexAttention.
measure length "$PYTHON" benchmarks/length_cost.py --device "$DEVICE" --sizes 256x6 --max-length $((LENGTH * 4)) \
  --dtype autocast --out "$OUT/length-cost"

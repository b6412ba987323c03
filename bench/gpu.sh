#!/usr/bin/env bash
# All measurements that need a GPU, on one GPU, in under nine minutes; the output goes to the screen and to OUT.
#   bench/gpu.sh OUT.txt [flags of bench.gpu, such as --train_data_dir data/fineweb-edu-10B/train]
# PYTHON=python3 names the interpreter. A measurement that fails does not stop the others; the exit code is 1 then.
set -uo pipefail
OUT=$(realpath -m "${1:?usage: bench/gpu.sh OUT.txt [flags of bench.gpu]}") || exit 2
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
status=0
: > "$OUT"
run() { echo "\$ $*" | tee -a "$OUT"; "$@" 2>&1 | tee -a "$OUT" || status=1; }

run nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
run "$PYTHON" -m bench.loader --device cuda --steps 30
run "$PYTHON" -m bench.spatial --device cuda --tokens 49152 --dtype bfloat16 float32
run timeout 400 "$PYTHON" -m bench.gpu --time_limit 370 "$@"
run timeout 90 "$PYTHON" -m bench.step configs/topolm.yaml --device cuda --batch_size 48 --steps 10
exit $status

#!/bin/sh
# Run all that a GPU should be asked, each part with an output file of its own, in OUT.
#
#   sh tests/bench/gpu.sh OUT                          a GPU, LLaVA-1.5-7B's shape, bfloat16
#   SHAPE=next7b PAIRS=2 sh tests/bench/gpu.sh OUT     LLaVA-1.6's
#   SHAPE=small DEVICE=cpu sh tests/bench/gpu.sh OUT   a trial on a CPU, in a few minutes
#
# A part that fails does not stop the others. The last lines say how each part ended, and the script
# ends with status 1 if one of them failed. LIMIT is the most seconds that a part may take. PYTHON
# names the interpreter. TRL and transformers are measured beside where they are installed.

OUT=${1:?give the folder for the output}
SHAPE=${SHAPE:-7b}
DEVICE=${DEVICE:-cuda}
PAIRS=${PAIRS:-4}
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-600}
if [ "$DEVICE" = cuda ]; then DTYPE=${DTYPE:-bfloat16}; else DTYPE=${DTYPE:-float32}; fi
RECORDS=32
REPEATS=5
if [ "$DEVICE" = cpu ]; then
    RECORDS=4
    REPEATS=1
fi
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$OUT" || exit 1
: > "$OUT/summary.txt"
export TQDM_DISABLE=1
status_of_all=0

# part NAME COMMAND...: run a command, and keep what it prints in OUT/NAME.txt.
part() {
    name=$1
    shift
    started=$(date +%s)
    timeout "$LIMIT" "$@" > "$OUT/$name.txt" 2>&1
    status=$?
    [ $status -eq 0 ] || status_of_all=1
    echo "$name: status $status, $(($(date +%s) - started)) s" | tee -a "$OUT/summary.txt"
}

# bench NAME SCRIPT OPTION...: run a benchmark, and keep its figures in OUT/NAME.json as well.
bench() {
    name=$1
    script=$2
    shift 2
    part "$name" "$PYTHON" "tests/bench/$script" --shape "$SHAPE" --device "$DEVICE" \
        --dtype "$DTYPE" --repeats $REPEATS --out "$OUT/$name.json" "$@"
}

# split NAME OPTION...: two processes that hold the tiny model together. It goes by gloo on a CPU,
# and by NCCL on two GPUs.
split() {
    name=$1
    shift
    part "$name" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 train.py \
        --model data/tiny/model --data data/tiny/train/povid.json --method dpo --split 2 \
        --limit 8 --steps 3 --batch-size 4 --out "$OUT/$name-run" "$@"
}

bench dpo bench_dpo.py --pairs "$PAIRS"   # ours warm and cold, distillation, naive, TRL
bench cold bench_cold.py --pairs "$PAIRS"
bench bdhs bench_bdhs.py --records $RECORDS --skip generate --groups ""
part device "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_device.py
split split-gloo
if [ "$DEVICE" = cuda ] && [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
    split split-nccl --device cuda
fi

cat "$OUT/summary.txt"
exit $status_of_all

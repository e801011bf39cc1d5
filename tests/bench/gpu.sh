#!/bin/sh
# Run all that a GPU should be asked, each part with an output file of its own, in OUT.
#
#   sh tests/bench/gpu.sh OUT                          a GPU, LLaVA-1.5-7B's shape, bfloat16
#   SHAPE=next7b PAIRS=2 sh tests/bench/gpu.sh OUT     LLaVA-1.6's
#   SHAPE=small DEVICE=cpu sh tests/bench/gpu.sh OUT   a trial on a CPU, in a few minutes
#
# OUT is a new folder. A part that fails does not stop the others. The last lines say how each part
# ended, and the script ends with status 1 if one of them failed. TRL is measured beside where it is
# installed. Variables of the environment are the settings:

SHAPE=${SHAPE:-7b}         # a shape of tests/bench/common.py
DEVICE=${DEVICE:-cuda}     # cuda or cpu
PAIRS=${PAIRS:-4}          # preference pairs of a DPO step
LIMIT=${LIMIT:-600}        # the most seconds that a part may take
PYTHON=${PYTHON:-python}   # the interpreter, as a path from the root of the repository or in PATH
if [ "$DEVICE" = cuda ]; then
    DTYPE=${DTYPE:-bfloat16}
    RECORDS=32   # of a round of BDHS
    REPEATS=5    # measured rounds, after one that warms up
else
    DTYPE=${DTYPE:-float32}
    RECORDS=4
    REPEATS=1
fi
export TQDM_DISABLE=1   # no progress bars in the files

# The folder for the output is where the caller says, from wherever the script is called.
OUT=${1:?give the folder for the output}
if [ -e "$OUT/summary.txt" ]; then
    echo "$OUT: holds the output of an earlier run; give another folder" >&2
    exit 2
fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$(dirname "$0")/../.." || exit 2
: > "$OUT/summary.txt"
status_of_all=0

# part NAME COMMAND...: run a command, and keep what it prints in OUT/NAME.txt.
part() {
    name=$1
    shift
    started=$(date +%s)
    timeout "$LIMIT" "$@" > "$OUT/$name.txt" 2>&1
    status=$?   # 124 if it took too long
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

# split NAME OPTION...: train the tiny model for three steps in two processes that hold it together.
# They talk by gloo on a CPU, and by NCCL on two GPUs.
split() {
    name=$1
    shift
    part "$name" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 train.py \
        --model data/tiny/model --data data/tiny/train/povid.json --method dpo --split 2 \
        --limit 8 --steps 3 --batch-size 4 --out "$OUT/$name-run" "$@"
}

bench dpo bench_dpo.py --pairs "$PAIRS"   # ours warm and cold, distillation, naive, TRL
bench profile bench_profile.py --pairs "$PAIRS"
bench kernels bench_kernels.py --pairs "$PAIRS"
bench cold bench_cold.py --pairs "$PAIRS"
# Ours alone: `generate`, and the same pairs again in groups of other sizes, would take minutes.
bench bdhs bench_bdhs.py --records $RECORDS --skip generate --groups ""
part device "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_device.py
split split-gloo
if [ "$DEVICE" = cuda ]; then
    num_gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    if [ "${num_gpus:-0}" -ge 2 ]; then
        split split-nccl --device cuda
    fi
fi

cat "$OUT/summary.txt"
exit $status_of_all

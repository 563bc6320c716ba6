#!/usr/bin/env bash
# What needs several GPUs, on a machine that has them and fusedpo installed:
#
#     bench/on_gpus.sh --out DIR [--ranks N]
#
# check    vocabulary and sequences split over all ranks with NCCL, against one device
# train    examples/train_distributed.py, with the vocabulary split, sequences split, and both with the batch
#
# N: all GPUs of this machine. Without GPUs the same runs on gloo, as a rehearsal. The exit status is 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

out="" ranks=""
while (($#)); do
    case $1 in
        --out) out=$2 && shift 2 ;;
        --ranks) ranks=$2 && shift 2 ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
[[ -n $out ]] || { echo "usage: $0 --out DIR [--ranks N]" >&2; exit 2; }
mkdir -p "$out"
python=${PYTHON:-python3}
[[ -n $ranks ]] || ranks=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
failed=0

step() {
    local name=$1
    shift
    echo "== $name: $*"
    if timeout --kill-after=10 600 "$@" >"$out/$name.log" 2>&1; then
        echo "$name ok" | tee -a "$out/summary.txt"
    else
        echo "$name exit $?" | tee -a "$out/summary.txt"
        failed=1
    fi
    tail -n 10 "$out/$name.log"
}

torchrun() { echo "$python" -m torch.distributed.run --standalone --nproc-per-node "$1"; }

: >"$out/summary.txt"
nvidia-smi topo -m 2>/dev/null >"$out/topology.txt"
"$python" -m fusedpo env >"$out/env.txt" 2>&1
step check $(torchrun "$ranks") -m fusedpo.distributed.selfcheck
step train-tensor $(torchrun 2) examples/train_distributed.py --tensor 2 --out "$out/tensor"
step train-context $(torchrun 2) examples/train_distributed.py --context 2 --out "$out/context"
((ranks < 4)) || step train-both $(torchrun 4) examples/train_distributed.py --tensor 2 --out "$out/both"
exit $failed

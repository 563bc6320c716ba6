#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without network that has nvcc, CMake, Ninja, pybind11, torch and Triton:
#
#     bench/on_gpu.sh --out DIR [--only build|test|bench|ncu] [--pack]
#
# build   the extension, for this GPU alone
# test    the tests marked gpu, and all of the log-probs in Triton; `python -m fusedpo verify`; both CUDA sanitizers on
#         small kernels, where they work
# bench   every operator; --only bench takes all sizes in bfloat16, the whole run one size
# ncu     what the profiler says of the row kernels in one call, where it works
#
# A step that fails or takes too long ends, is recorded, and the next one runs; the exit status is 1 if any did. All of
# it ends within $BUDGET seconds (default: 560): the steps that time does not reach are left out.
# --pack leaves one archive and the summary in DIR, for machines from which only few files come back.
set -uo pipefail
cd "$(dirname "$0")/.."

out="" only="" pack=""
while (($#)); do
    case $1 in
        --out) out=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --pack) pack=1 && shift ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
[[ -n $out && $only =~ ^(build|test|bench|ncu)?$ ]] || { echo "usage: $0 --out DIR [--only build|test|bench|ncu]" >&2; exit 2; }

mkdir -p "$out"
out=$(realpath "$out")
results=$out
[[ -z $pack ]] || results=$(mktemp -d)
python=${PYTHON:-python3}
device=${FUSEDPO_DEVICE:-cuda} # cpu: a rehearsal of test and bench
export PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=6
failed=0

# step NAME SECONDS COMMAND...: runs it for so long at most, its output in NAME.log, and adds a line to the summary.
step() {
    local name=$1 limit=$2 left=$((${BUDGET:-560} - SECONDS))
    shift 2
    ((limit < left)) || limit=$left
    ((limit > 0)) || { failed=1 && echo "$name: no time left" | tee -a "$results/summary.txt" && return; }
    echo "== $name: $*"
    local begin=$SECONDS
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1
    status=$?
    tail -n 25 "$results/$name.log"
    ((status == 0)) || failed=1
    local word=ok
    ((status == 0)) || word="exit $status"
    ((status == 124 || status == 137)) && word="stopped after $limit s"
    printf '%-22s %6s s  %s\n' "$name" $((SECONDS - begin)) "$word" | tee -a "$results/summary.txt"
}

# A tool that is missing, or that this machine does not let work, is no failure; what a sanitizer finds is (status 3).
optional() {
    local before=$failed
    status=0
    if command -v "$3" >/dev/null; then step "$@"; else echo "$1: no $3 here" | tee -a "$results/summary.txt"; fi
    ((status == 3)) || failed=$before
}

wanted() { [[ -z $only || $only == "$1" ]]; }

built() { "$python" -c "from fusedpo import backends as b; exit(b.NATIVE_MISSING is not None or not b.HAS_CUDA_KERNELS)"; }

build() {
    local capability
    capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return 1
    step build 300 env FUSEDPO_NATIVE=1 FUSEDPO_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
        "$python" -m pip install --no-index --no-build-isolation --no-deps --disable-pip-version-check -e .
}

: >"$results/summary.txt"
date -u +%FT%TZ >>"$results/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$results/summary.txt"
if wanted build || { [[ $device == cuda ]] && ! built 2>/dev/null; }; then build || failed=1; fi
"$python" -m fusedpo env >"$results/env.txt" 2>&1

if wanted test; then
    step verify 90 "$python" -m fusedpo verify --device "$device" --out "$results/verify.json"
    step test 150 "$python" -m pytest -m gpu -q --continue-on-collection-errors --junit-xml "$results/test.xml"
    step test-logprobs 120 "$python" -m pytest tests/test_triton_logprobs.py -m "not gpu" -q --junit-xml "$results/test-logprobs.xml"
    for tool in memcheck racecheck; do
        optional "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 3 "$python" bench/small.py "$device"
    done
fi

if wanted bench; then
    # Seconds at most; what an operator has measured until then is written.
    if [[ -z $only ]]; then
        sizes=(--quick) limits=(one_pass=60 token_logprobs=60 policy_loss=60 advantages=60 hidden=60)
    else
        sizes=(--dtype bfloat16) limits=(one_pass=200 hidden=140 token_logprobs=110 policy_loss=60 advantages=40)
    fi
    for limit in "${limits[@]}"; do
        operator=${limit%=*}
        step "bench-$operator" "${limit#*=}" "$python" -m fusedpo bench --op "$operator" --device "$device" --out "$results" "${sizes[@]}"
    done
fi

if wanted ncu; then
    metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
    metrics+=,dram__bytes_read.sum,dram__bytes_write.sum,sm__warps_active.avg.pct_of_peak_sustained_active
    optional ncu 60 ncu --clock-control none --metrics $metrics --launch-count 60 --csv \
        --kernel-name 'regex:.*(row|pass|logprob|token|policy|group|advantage).*' "$python" bench/small.py "$device" large
fi

cat "$results/summary.txt"
if [[ -n $pack ]]; then
    tar -czf "$out/on_gpu.tar.gz" -C "$results" .
    cp "$results/summary.txt" "$out/"
    rm -r "$results"
fi
exit $failed

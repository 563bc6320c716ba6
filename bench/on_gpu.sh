#!/usr/bin/env bash
# The first half hour on a machine with a GPU, nvcc, CMake, Ninja, pybind11, torch and Triton, and without network: three
# commands, each of at most ten minutes from a bare machine. What to make of the results: docs/performance.md.
#
#     bench/on_gpu.sh sweep --out DIR [--pack]
#     bench/on_gpu.sh test --out DIR [--pack]
#     bench/on_gpu.sh bench --out DIR [--pack]
#
# sweep   ceilings and variants of the kernels, Triton's while the extension is built and native ones after; sweep.json,
#         and what bench/choose.py says of it
# test    `python -m fusedpo verify`; the tests marked gpu, and all of the log-probs in Triton; memcheck on small kernels
# bench   loss and gradient, and log-probs, beside the peers; what the profiler says of the row kernels
#
# A step that fails or takes too long ends, is recorded, and the next one runs; the exit status is 1 if any did. All of
# a command ends within $BUDGET seconds (default: 560): the steps that time does not reach are left out. --pack leaves
# one archive and the summary in DIR, for machines from which only few files come back.
# A rehearsal: FUSEDPO_DEVICE=cpu, which builds nothing; DRY_RUN=1 prints the steps instead of taking them.
set -uo pipefail
cd "$(dirname "$0")/.."

out="" command=${1:-} pack=""
[[ $# -eq 0 ]] || shift
while (($#)); do
    case $1 in
        --out) out=${2:-} && shift 2 ;;
        --pack) pack=1 && shift ;;
        *) out="" && break ;;
    esac
done
[[ -n $out && $command =~ ^(sweep|test|bench)$ ]] || { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2 && exit 2; }

mkdir -p "$out"
out=$(realpath "$out")
results=$out
[[ -z $pack ]] || results=$(mktemp -d)
python=${PYTHON:-python3}
device=${FUSEDPO_DEVICE:-cuda}
export PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=6
failed=0

# step NAME SECONDS COMMAND...: runs it for so long at most, its output in NAME.log, and adds a line to the summary.
step() {
    local name=$1 limit=$2 left=$((${BUDGET:-560} - SECONDS)) status
    shift 2
    ((limit < left)) || limit=$left
    ((limit > 0)) || { echo "$name: no time left" | tee -a "$results/summary.txt" && return 1; }
    echo "== $name, $limit s: $*"
    [[ -z ${DRY_RUN:-} ]] || return 0
    local begin=$SECONDS
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1
    status=$?
    tail -n 25 "$results/$name.log"
    local word=ok
    ((status == 0)) || word="exit $status"
    ((status == 124 || status == 137)) && word="stopped after $limit s"
    printf '%-22s %6s s  %s\n' "$name" $((SECONDS - begin)) "$word" | tee -a "$results/summary.txt"
    return $status
}

need() { step "$@" || failed=1; }

# A tool that is missing, or that this machine does not let work, is no failure; what a sanitizer finds is (status 3).
optional() {
    if command -v "$3" >/dev/null || [[ -n ${DRY_RUN:-} ]]; then
        step "$@"
        (($? != 3)) || failed=1
    else
        echo "$1: no $3 here" | tee -a "$results/summary.txt"
    fi
}

install() { # NAME SECONDS VARIABLES...
    step "$1" "$2" env "${@:3}" "$python" -m pip install --no-index --no-build-isolation --no-deps \
        --disable-pip-version-check -e .
}

build() {
    local capability
    capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return 1
    install build 300 FUSEDPO_NATIVE=1 FUSEDPO_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability"
}

built() {
    [[ $device != cuda || -n ${DRY_RUN:-} ]] ||
        "$python" -c "from fusedpo import backends as b; exit(b.NATIVE_MISSING is not None or not b.HAS_CUDA_KERNELS)"
}

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
} >"$results/summary.txt" 2>/dev/null
[[ $command == sweep ]] || built 2>/dev/null || build || failed=1

if [[ $command == sweep ]]; then
    # shellcheck disable=SC2206
    sweep=("$python" bench/sweep.py --device "$device" --out "$results/sweep.json" ${SWEEP:-})
    if built 2>/dev/null; then
        need sweep 400 "${sweep[@]}"
    else
        install install 60 FUSEDPO_NATIVE=0 || failed=1
        build &
        need sweep-triton 300 "${sweep[@]}" --backend torch triton
        wait $! || failed=1
        need sweep-native 150 "${sweep[@]}" --backend native
    fi
    need choose 20 "$python" bench/choose.py "$results/sweep.json"
fi

if [[ $command == test ]]; then
    files=(tests/test_{advantages,advantages_kernel,hidden_cuda,one_pass_cuda,peers,policy_loss_cuda}.py
        tests/test_triton_{logprobs,one_pass,policy_loss}.py)
    need verify 90 "$python" -m fusedpo verify --device "$device" --out "$results/verify.json"
    need test 240 "$python" -m pytest -m gpu -q -n 8 --continue-on-collection-errors --junit-xml "$results/test.xml" \
        "${files[@]}"
    need test-logprobs 120 "$python" -m pytest tests/test_triton_logprobs.py -m "not gpu" -q -n 8 \
        --junit-xml "$results/test-logprobs.xml"
    need small 60 "$python" bench/small.py "$device" # so that Triton has compiled before a sanitizer watches
    optional sanitizer-memcheck 150 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" bench/small.py "$device"
fi

if [[ $command == bench ]]; then
    # Compilers take most of the seconds of torch.compile: the others first.
    for operator in one_pass token_logprobs; do
        need "bench-$operator" 150 "$python" -m fusedpo bench --op "$operator" --device "$device" --dtype bfloat16 \
            --providers fusedpo trl liger eager --out "$results"
    done
    metrics=gpu__time_duration.sum,launch__registers_per_thread,sm__inst_executed.sum
    metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,lts__t_sector_hit_rate.pct
    for reason in barrier long_scoreboard math_pipe_throttle wait; do
        metrics+=,smsp__average_warps_issue_stalled_${reason}_per_issue_active.ratio
    done
    optional ncu 150 ncu --clock-control none --metrics "$metrics" --launch-count 60 --csv \
        --kernel-name 'regex:.*(row|pass|logprob|token|policy|group|advantage).*' "$python" bench/small.py "$device" large
    need bench-compile 60 "$python" -m fusedpo bench --op one_pass --device "$device" --dtype bfloat16 \
        --providers torch.compile --out "$results/compile"
fi

"$python" -m fusedpo env >"$results/env.txt" 2>&1
cat "$results/summary.txt"
if [[ -n $pack ]]; then
    tar -czf "$out/$command.tar.gz" -C "$results" .
    cp "$results/summary.txt" "$out/"
    rm -r "$results"
fi
exit $failed

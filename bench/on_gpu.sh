#!/usr/bin/env bash
#
# Everything that wants a GPU, on a machine that has one, torch, Triton and Numba, and no network.
#
#   bash bench/on_gpu.sh [phase ...]      default: install parity tune attention norms
#
#   install     installs this checkout, without dependencies and without the C++ extension
#   parity      the tests of the kernels on the GPU's own tensors, attention first
#   tune        finds the fastest forms of the attention kernels and writes them into the table
#   attention   times attention, all kinds and shapes, against torch's own kernels
#   compiled    times attention and norms against FlexAttention and torch.compile, fewer shapes
#   norms       times the norms
#   sanitize    small odd shapes of every kernel under compute-sanitizer, where that is installed
#
# Each phase can be run alone, once `install` has been; each ends within 9 minutes and writes what
# it has as it goes. The exit status is 0 where all went well, and 1 otherwise. With half an hour,
# LIMIT=400 gets through all phases of the default. Tuning comes before what is to be published;
# where it ran on a copy of the checkout, bring OUT/configurations.json back to kernels/gpu_triton/.
#
# Settings, from the environment:
#   PYTHON          the interpreter that has torch (python3)
#   OUT             where results go, seen from the checkout (bench/results/gpu)
#   LIMIT           seconds that a phase may take (530); tables end 50 s before
#   SECONDS_A_LINE  to spend on timing each line of a table (0.4)
#   TEST_ARGS, SPEED_ARGS, TUNE_ARGS  more options for the commands

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PHASES="install parity tune attention compiled norms sanitize"
TABLE=kernels/gpu_triton/configurations.json
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
SECONDS_A_LINE=${SECONDS_A_LINE:-0.4}
LIMIT=${LIMIT:-530}
read -r -a TUNE <<<"${TUNE_ARGS:-}"
read -r -a SPEED <<<"${SPEED_ARGS:-}"
read -r -a TESTS <<<"${TEST_ARGS:-}"
export PYTHONUNBUFFERED=1

usage() { sed -n '3,/^$/{s/^#\{1\} \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# A command that may take so many seconds: asked to stop at the end of them, killed 20 s later.
within() {
    local seconds=$1
    shift
    timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

speed() {
    local suites=$1 json=$2 seconds=$3
    shift 3
    within "$seconds" "$PYTHON" -m rowmax.bench speed --suite "$suites" --json "$OUT/$json" \
        --seconds "$SECONDS_A_LINE" --stop-after "$((seconds - 50))" "$@" ${SPEED[@]+"${SPEED[@]}"}
}

phase_install() {
    export ROWMAX_EXTENSION=skip
    within "$LIMIT" "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation -e . || link || return 1
    within 120 "$PYTHON" -m rowmax.kernels
}

# The same by hand, where pip or its build tools can't: the folders under their import names.
link() {
    local folder site
    echo "on_gpu.sh: pip could not install the checkout; linking it instead"
    mkdir -p build/links/rowmax
    for folder in kernels transformer bench; do
        ln -sfn "../../../$folder" "build/links/rowmax/$folder"
    done
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') &&
        [[ -d $site ]] && echo "$PWD/build/links" >"$site/rowmax-links.pth"
}

phase_parity() {
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 12)
    # the project's own options may be newer than the pytest here
    OMP_NUM_THREADS=2 within "$LIMIT" "$PYTHON" -m pytest tests/kernels/test_attention_parity.py \
        tests/kernels/test_triton_*.py tests/kernels -k triton -q -ra \
        -o addopts="--import-mode=importlib" -p no:cacheprovider --durations=10 --maxfail=40 \
        ${workers[@]+"${workers[@]}"} ${TESTS[@]+"${TESTS[@]}"}
}

# Into a file beside the other results, key by key, so that nothing is lost with the phase.
phase_tune() {
    cp "$TABLE" "$OUT/configurations.json" || return 1
    within "$LIMIT" "$PYTHON" -m rowmax.bench tune --seconds "$((LIMIT - 130))" \
        --output "$OUT/configurations.json" ${TUNE[@]+"${TUNE[@]}"}
    local status=$?
    cmp -s "$OUT/configurations.json" "$TABLE" || cp "$OUT/configurations.json" "$TABLE"
    return "$status"
}

phase_attention() {
    speed gpu-attention attention.json "$LIMIT" \
        --peers sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,sdpa-math
}

# torch.compile takes longer than what it is to be compared with: so the few shapes of --quick.
phase_compiled() {
    local half=$((LIMIT / 2))
    speed gpu-norms compiled-norms.json "$half" --quick --peers torch,compile
    local status=$?
    speed gpu-attention compiled-attention.json "$half" --quick --peers sdpa,flex,compile &&
        return "$status"
}

phase_norms() {
    speed gpu-norms norms.json "$LIMIT" --peers torch
}

# memcheck: reads and writes beside a tensor. racecheck: two threads at one place of shared memory.
phase_sanitize() {
    local tool status=0
    tool=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
        echo "compute-sanitizer is not installed: nothing was checked"
        return 0
    }
    # torch's cache of memory would hide what is read beside a tensor
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitized "$tool" memcheck "sanitized" || status=$?
    sanitized "$tool" racecheck "sanitized and bfloat16" || status=$?
    return "$status"
}

sanitized() {
    within "$((LIMIT / 2))" "$1" --tool "$2" --error-exitcode 9 "$PYTHON" -m pytest \
        tests/kernels/test_triton_gpu.py -k "$3" -q -o addopts="--import-mode=importlib" \
        -p no:cacheprovider
}

main() {
    local phase status failed=0 started summary=()
    [[ $# -gt 0 ]] || set -- install parity tune attention norms
    for phase in "$@"; do
        case " $PHASES " in
        *" $phase "*) ;;
        *)
            [[ $phase == -h || $phase == --help ]] && usage && exit 0
            echo "on_gpu.sh: expected phases of: $PHASES; got '$phase'" >&2
            exit 2
            ;;
        esac
    done
    mkdir -p "$OUT" || exit 1
    for phase in "$@"; do
        echo "=== $phase"
        started=$SECONDS
        # in a subshell of its own, because of the pipe: what it exports stays there
        "phase_$phase" 2>&1 | tee "$OUT/$phase.log"
        status=${PIPESTATUS[0]}
        case $status in
        0) summary+=("$phase: ok, $((SECONDS - started)) s") ;;
        124 | 137) summary+=("$phase: stopped after $((SECONDS - started)) s") ;;
        *) summary+=("$phase: failed with exit status $status, $((SECONDS - started)) s") ;;
        esac
        [[ $status -eq 0 ]] || failed=1
    done
    echo "=== summary ($OUT)"
    printf '%s\n' "${summary[@]}"
    exit "$failed"
}

main "$@"

#!/usr/bin/env bash
#
# Everything that wants a GPU, on a machine that has one, torch, Triton and Numba, and no network.
#
#   bash bench/on_gpu.sh contact      in 450 seconds: does it run, which configs, how fast
#   bash bench/on_gpu.sh prove        in 150 seconds: is it right
#   bash bench/on_gpu.sh PART ...     some parts of them, or with more time:
#
#   contact
#     smoke      versions, what the GPU can do at most, every feature once against float64
#     configs    the fastest configs of bfloat16 attention without features, into the table
#     speed      full and causal attention against torch's own kernels
#     kinds      grouped heads, windows, dropout, padding, masks and biases
#     decode     one query against a cache
#     flex       full and causal attention against FlexAttention
#     norms      norms and the masked softmax
#     host       microseconds of a call on the host, and of a CUDA graph's replay
#   prove
#     gpu        the tests that only a GPU runs
#     parity     a sample of the cases of all features in four dtypes, as many as SAMPLE says
#     sanitize   memcheck and racecheck of small odd shapes, where compute-sanitizer is installed
#   with more time
#     tests      all tests of the Triton kernels
#     tune       the fastest configs of everything
#     attention  attention, all kinds and shapes, against torch's own kernels
#     all_norms  norms, all shapes, against torch and torch.compile
#
# Nothing is installed. A part has a time limit of its own, writes what it has as it goes and stops
# no other; a summary is the end. The exit status is 0 where all went well, and 1 otherwise. What
# they say is in OUT/contact.log, and so on, results are beside it; where this ran on a copy of the
# checkout, bring OUT/configs.json back to kernels/backends/gpu_triton/. The parts of prove run side by
# side, for the CPU is what they wait for, and end by one common end; until then each has a log of its
# own, OUT/prove.gpu.log.
#
# Settings, from the environment:
#   PYTHON          the interpreter that has torch (python3)
#   OUT             where results go, seen from the checkout (bench/results/gpu)
#   LIMIT           seconds that each part may take, in place of its own
#   SECONDS_A_LINE  to spend on timing each line of a table (0.4)
#   SAMPLE          how many cases of parity (300)
#   WORKERS         how many processes run tests (16); half of them each part of prove
#   TABLE           the table of configs that tuning begins with and ends in (the kernels' own)
#   TEST_ARGS, SPEED_ARGS, TUNE_ARGS  more options for the commands

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# part:seconds
CONTACT="smoke:70 configs:80 speed:60 kinds:75 decode:30 flex:50 norms:40 host:25"
PROVE="gpu:140 parity:140 sanitize:140" # all at once
MORE="tests:530 tune:530 attention:530 all_norms:530"
TABLE=${TABLE:-kernels/backends/gpu_triton/configs.json}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
SECONDS_A_LINE=${SECONDS_A_LINE:-0.4}
WORKERS=${WORKERS:-16}
read -r -a TUNE <<<"${TUNE_ARGS:-}"
read -r -a SPEED <<<"${SPEED_ARGS:-}"
read -r -a TESTS <<<"${TEST_ARGS:-}"
export PYTHONUNBUFFERED=1

usage() { sed -n '3,/^$/{s/^#\{1\} \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Runs a command for at most this many seconds: SIGINT at their end, SIGKILL 5 s later.
within() {
    local seconds=$1
    shift
    timeout --signal=INT --kill-after=5 "$seconds" "$@"
}

bench() { within "$limit" "$PYTHON" -m rowmax.bench "$@"; }

# Shapes are begun until little time is left. One that never ends takes 40 seconds or a third of the
# time, which leaves a few for the summary.
speed() {
    local json=$1 each=$((limit / 3))
    ((each >= 40)) || each=40
    ((each <= limit - 5)) || each=$((limit - 5))
    shift
    bench speed --json "$OUT/$json.json" --seconds "$SECONDS_A_LINE" --stop-after "$((limit - 15))" \
        --limit "$each" "$@" ${SPEED[@]+"${SPEED[@]}"}
}

# The shapes at which papers on attention measure it, in a model of width 2048.
LONG=(--shape "4,16,4096,128" --shape "4,32,4096,64")
LONGEST=(--shape "1,16,16384,128" --shape "1,32,16384,64")

part_smoke() { bench smoke --seconds "$((limit - 8))"; }

part_configs() {
    tuned --kernel forward,backward_dkdv,backward_dq,decode --dim 64,128 --dtype bfloat16 \
        --features base --limit "$((limit / 3))"
}

part_speed() {
    speed speed --suite gpu-attention --kind full,causal "${LONG[@]}" "${LONGEST[@]}" \
        --pass forward,backward --peers sdpa-flash,sdpa-cudnn
}

part_kinds() {
    speed kinds --suite gpu-attention --kind window,gqa,dense,bias,padded,dropout "${LONG[@]}" \
        --shape-by-shape --pass forward,backward --peers sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn
}

part_decode() {
    speed decode --suite gpu-attention --kind decode --shape 16,32/8,1,8192,128 \
        --shape 1,32/8,1,32768,128 --shape 64,8,1,1024,64 --peers sdpa,sdpa-flash,sdpa-cudnn
}

# It is compiled anew for each shape, which takes longer than all the rest.
part_flex() {
    speed flex --suite gpu-attention --kind full,causal "${LONG[@]}" --pass forward,backward \
        --peers flex
}

part_norms() {
    speed norms --suite gpu-norms --quick --pass forward,backward --peers torch
}

part_host() { bench overhead --device cuda --seconds 0.5 --json "$OUT/host.json"; }

part_tune() { tuned --limit "$((limit / 3))"; }

part_attention() {
    speed attention --suite gpu-attention --peers sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn
}

part_all_norms() { speed all_norms --suite gpu-norms --peers torch,compile; }

# Into a file beside the other results, key by key, so that nothing is lost with the part.
tuned() {
    cp "$TABLE" "$OUT/configs.json" || return 1
    bench tune --seconds "$((limit - 15))" --output "$OUT/configs.json" "$@" \
        ${TUNE[@]+"${TUNE[@]}"}
    local status=$?
    cmp -s "$OUT/configs.json" "$TABLE" || cp "$OUT/configs.json" "$TABLE"
    return "$status"
}

part_gpu() { tests tests/kernels/test_triton_gpu.py tests/integrations/test_gpu.py; }

part_parity() {
    ROWMAX_SAMPLE=${SAMPLE:-300} tests tests/kernels/test_attention_parity.py -k triton
}

part_tests() { tests tests/kernels tests/integrations/test_gpu.py -k "triton or test_gpu"; }

tests() {
    local workers=()
    # a process that loses the GPU is replaced by another one
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$WORKERS" --max-worker-restart 40)
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 check "$@" --durations=5 --maxfail=40 ${workers[@]+"${workers[@]}"} \
        ${TESTS[@]+"${TESTS[@]}"}
}

# The project's own options may be newer than the pytest here. Ends by itself before it is stopped.
check() {
    ROWMAX_STOP_AT=$(($(date +%s) + limit - 15)) within "$limit" ${SANITIZER[@]+"${SANITIZER[@]}"} "$PYTHON" -m pytest "$@" -q -ra \
        -o addopts=--import-mode=importlib -p no:cacheprovider
}

# memcheck: reads and writes beside a tensor. racecheck: two threads at one place of shared memory.
# Side by side: the CPU is what they wait for.
part_sanitize() {
    local tool first second status
    tool=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
        echo "compute-sanitizer is not installed: nothing was checked"
        return 0
    }
    # torch's cache of memory would hide what is read beside a tensor
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitized memcheck sanitized &
    first=$!
    sanitized racecheck "sanitized and bfloat16" &
    second=$!
    wait "$first"
    status=$?
    wait "$second" && return "$status"
}

sanitized() {
    local SANITIZER=("$tool" --tool "$1" --error-exitcode 9)
    check tests/kernels/test_triton_gpu.py -k "$2"
}

# The package by links, under its import name: nothing is installed, nothing can fail to be.
link() {
    local at
    LINKS=$(mktemp -d) || exit 1
    trap 'rm -rf "$LINKS"' EXIT
    mkdir "$LINKS/rowmax" || exit 1
    for at in kernels transformer bench package/*.py; do
        ln -s "$PWD/$at" "$LINKS/rowmax/" || exit 1
    done
    export PYTHONPATH=$LINKS${PYTHONPATH:+:$PYTHONPATH}
}

# Runs the part of this name within this many seconds; its outcome goes into LINKS/NAME.
run_part() {
    local name=$1 limit=$2 log=$3 started=$SECONDS status outcome
    echo "=== $name, at most $limit s" | tee -a "$log"
    # In a subshell of its own, because of the pipe: what it exports stays there. The pipe does not
    # wait for what a part that was killed has left behind.
    "part_$name" 2>&1 | timeout "$((limit + 8))" tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
    0) outcome="ok," ;;
    124 | 137) outcome="stopped after" ;;
    *) outcome="failed with exit status $status," ;;
    esac
    echo "$name: $outcome $((SECONDS - started)) s" >"$LINKS/$name"
    [[ $status -eq 0 ]]
}

# The seconds of a part (name:seconds): LIMIT or its own, and no more than are left until `ends`.
limit_of() {
    local limit=${LIMIT:-${1#*:}}
    ((limit <= ends - SECONDS)) || limit=$((ends - SECONDS))
    echo "$limit"
}

# Parts (name:seconds) side by side, each with a log of its own; these end up one after another in
# the log that is named first.
run_together() {
    local log=$1 part name running=() WORKERS=$(((WORKERS + 1) / 2))
    shift
    for part in "$@"; do
        name=${part%:*}
        : >"${log%.log}.$name.log"
        run_part "$name" "$(limit_of "$part")" "${log%.log}.$name.log" >/dev/null &
        running+=($!)
    done
    for part in "$@"; do
        name=${part%:*}
        wait "${running[0]}" || failed=1
        running=("${running[@]:1}")
        tee -a "$log" <"${log%.log}.$name.log"
        rm "${log%.log}.$name.log"
        summary+=("$(<"$LINKS/$name")")
    done
}

main() {
    local word words=() part parts proofs limit ends failed=0 summary=()
    local known="$CONTACT $PROVE $MORE"
    [[ ${1:-} == -h || ${1:-} == --help ]] && usage && exit 0
    for word in "${@:-}"; do
        if [[ $word == forms ]]; then
            echo "on_gpu.sh: forms is deprecated: use configs" >&2
            word=configs
        fi
        words+=("$word")
        case " contact prove $known " in
        *" $word "* | *" $word:"*) [[ -n $word ]] && continue ;;
        esac
        echo "on_gpu.sh: expected contact, prove, or parts, see --help; got '$word'" >&2
        exit 2
    done
    mkdir -p "$OUT" || exit 1
    link
    for word in "${words[@]}"; do
        : >"$OUT/$word.log"
        case $word in
        contact) parts=$CONTACT ends=$((SECONDS + 440)) ;;
        prove)
            read -r -a proofs <<<"$PROVE"
            ends=$((SECONDS + 140))
            echo "=== side by side: ${proofs[*]}"
            run_together "$OUT/prove.log" "${proofs[@]}"
            continue
            ;;
        *) parts=$(tr ' ' '\n' <<<"$known" | grep "^$word:") ends=$((SECONDS + 3600)) ;;
        esac
        for part in $parts; do
            limit=$(limit_of "$part")
            if ((limit < 5)); then
                summary+=("${part%:*}: not begun, no time was left") failed=1
            else
                run_part "${part%:*}" "$limit" "$OUT/$word.log" || failed=1
                summary+=("$(<"$LINKS/${part%:*}")")
            fi
        done
    done
    echo "=== summary ($OUT)"
    printf '%s\n' "${summary[@]}" | tee -a "$OUT/$word.log"
    exit "$failed"
}

main "$@"

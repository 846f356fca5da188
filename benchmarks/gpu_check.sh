#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the most valuable facts first, each written as soon as it is known.
#
#   benchmarks/gpu_check.sh OUT_DIR             on a machine with a GPU and torch
#   benchmarks/gpu_check.sh --dry-run OUT_DIR   the same lines with tiny sizes on the CPU; builds and installs nothing
#   benchmarks/gpu_check.sh OUT_DIR PART...     some parts, in their own order:
#       peers build cuda triton headline paths counters model memcheck racecheck tests steps host
#
# PYTHON   the interpreter (python3)
# WHEELS   a folder of wheels of peers (ivon-opt, torch-optimi, peft) to use; nothing is downloaded
# LIMIT    seconds after which no part goes on (525)
#
# OUT_DIR gets check.log, speed.json, report.md and its pictures. A part that fails is reported and the others still run.
# Exit code: 0, or 1 if a part failed; parts that could not run say why. docs/gpu.md has what to expect.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "usage: benchmarks/gpu_check.sh [--dry-run] OUT_DIR [PART...]" >&2
  exit 2
}
dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=--dry-run
  shift
fi
[[ $# -gt 0 && $1 != -* ]] || usage
out=$1
shift
only=" $* "
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-}
readonly SKIPPED=77
if [[ -n $dry ]]; then
  export TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
  backends=(cpu cpu)
  headline=()
  paths=(tests/kernels/test_noise.py)
  tests=("${paths[@]}")
  size=(--dry-run --threads 1 --rounds 1 --turn-ms 1 --max-elements 200)
else
  export TRITON_INTERPRET=0  # tests/conftest.py would switch the interpreter on
  backends=(cuda triton)
  headline=(--workloads llama-2-7b-r8-qv,llama-2-7b-r16-all,flat-100M)
  # Others may import what is not there.
  mapfile -t paths < <(grep -rl 'mark\.gpu' tests/gpu --include='test_*.py')
  mapfile -t tests < <(grep -rl 'mark\.gpu' tests --include='test_*.py' | grep -v '^tests/gpu/')
  size=(--device cuda --no-compile --rounds 3 --turn-ms 150)
fi

failed=0
summary=()
readonly DEADLINE=$((SECONDS + ${LIMIT:-525}))

# part NAME COMMAND...: runs it, if it was asked for, and notes how it ended. Commands limit their own time.
part() {
  local name=$1 begin=$SECONDS code verdict
  [[ $only != *[^\ ]* || $only == *" $name "* ]] || return 0
  shift
  echo "== $name"
  "$@"
  code=$?
  case $code in
    0) verdict=passed ;;
    "$SKIPPED") verdict=skipped ;;
    124 | 137) verdict="failed: out of time" && failed=1 ;;
    *) verdict="failed: exit code $code" && failed=1 ;;
  esac
  summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$verdict")")
  echo "== $name: $verdict"
}

# limited SECONDS COMMAND...: also ends with the time of the whole script. A dry run may be on a busy machine.
limited() {
  local seconds=$((${dry:+4 *} $1)) left=$((DEADLINE - SECONDS))
  shift
  if ((left < 2)); then
    echo "no time is left"
    return 124
  fi
  # As Ctrl-C, so that pytest says what had failed, and benchmarks keep what they have.
  timeout --signal=INT --kill-after=10 $((seconds < left ? seconds : left)) "$@"
}

peers() {
  if [[ -z ${WHEELS:-} ]]; then
    echo "skipped: no folder of wheels was given (WHEELS)"
    return $SKIPPED
  fi
  limited 20 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl
}

# Whether a library of the checkout, which was carried here perhaps, runs.
fits() {
  "$python" -c 'import ivon_kernels, sys; sys.exit(ivon_kernels.available_backends()["cuda"] is not None)'
}

build() {
  local options=(-q --no-index --no-build-isolation --no-deps)
  if [[ -z $dry ]] && fits; then
    "$python" -m ivon_kernels
    return
  fi
  [[ -z $dry ]] || options+=(--dry-run)
  # AUTO: without nvcc the other backends are checked all the same.
  IVON_KERNELS_CUDA=AUTO limited 100 "$python" -m pip install "${options[@]}" -e . && "$python" -m ivon_kernels && return
  echo "pip could not install the checkout; building with cmake into ivon_kernels/_native"
  limited 30 cmake -S . -B "$work/build" -DIVON_KERNELS_CUDA=AUTO -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_INSTALL_PREFIX="$PWD" || return
  [[ -z $dry ]] || return 0
  limited 100 cmake --build "$work/build" --parallel && cmake --install "$work/build" && "$python" -m ivon_kernels
}

# gpu_tests SECONDS FILE...
gpu_tests() {
  # Warnings of versions that the project does not pin are no failures.
  local options=(-m gpu -v -rf -W default -p no:cacheprovider) code limit=$1
  shift
  if [[ -z $dry ]] && "$python" -c 'import xdist' 2>/dev/null; then
    options+=(-n 12)
  fi
  limited "$limit" "$python" -m pytest "${options[@]}" "$@"
  code=$?
  if ((code == 5)); then
    echo "skipped: no test is marked gpu"
    return $SKIPPED
  fi
  return $code
}

# sanitize TOOL: the exercise under compute-sanitizer. Its 86 comes from the tool's own findings.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "skipped: compute-sanitizer is not installed"
    return $SKIPPED
  fi
  # Without torch's caching allocator every tensor is an allocation of its own, whose bounds the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 40 compute-sanitizer --tool "$1" --error-exitcode 86 \
    "$python" -m benchmarks.speed.exercise "${backends[0]}"
}

# Bytes and time of some of the kernels, by the hardware's own counters.
counters() {
  if ! command -v ncu >/dev/null; then
    echo "skipped: ncu is not installed"
    return $SKIPPED
  fi
  limited 60 ncu --clock-control none --csv --launch-skip 20 --launch-count 24 \
    --kernel-name 'regex:^(kernel|(sample|restore|check|accumulate|step)_kernel)$' \
    --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,sm__warps_active.avg.pct_of_peak_sustained_active \
    --log-file "$out/counters.csv" "$python" -m benchmarks speed --parts steps --workloads flat-100M --rounds 1 --turn-ms 1 \
    --device cuda --no-compile --no-report --out "$work/counted"
}

# benchmark PARTS SECONDS LIMIT OPTION...
benchmark() {
  local parts=$1 seconds=$2 limit=$3
  shift 3
  limited "$limit" "$python" -m benchmarks speed --parts "$parts" --seconds "$seconds" "${size[@]}" "$@" \
    --no-report --out "$out"
}

main() {
  [[ $only == *[^\ ]* ]] || rm -f "$out"/{speed.json,report.md,speed.png,roofline.png,elements.png}
  part peers peers
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
  part build build
  part cuda limited 30 "$python" -m benchmarks.speed.exercise "${backends[0]}"
  part triton limited 60 "$python" -m benchmarks.speed.exercise "${backends[1]}"
  part headline benchmark steps 60 90 "${headline[@]}"
  part paths gpu_tests 100 "${paths[@]}"
  part counters counters
  part model benchmark model 30 65
  part memcheck sanitize memcheck
  part racecheck sanitize racecheck
  part tests gpu_tests 140 "${tests[@]}"
  part steps benchmark steps 110 150
  part host benchmark host 20 60
  echo "== summary"
  printf '%s\n' "${summary[@]}"
  if [[ -e $out/speed.json ]]; then
    "$python" -m benchmarks speed --parts "" "${size[@]}" --out "$out"
  fi
  return $failed
}

main 2>&1 | tee "$out/check.log"
exit "${PIPESTATUS[0]}"

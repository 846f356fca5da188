#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 9 minutes: build, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_check.sh OUT_DIR             on a machine with a GPU, a CUDA compiler and torch
#   benchmarks/gpu_check.sh --dry-run OUT_DIR   the same lines with tiny sizes on the CPU; builds and installs nothing
#   benchmarks/gpu_check.sh OUT_DIR PART...     some parts: peers build tests exercise memcheck racecheck steps model host
#
# PYTHON   the interpreter (python3)
# WHEELS   a folder of wheels of peers (ivon-opt, torch-optimi, peft) to use; nothing is downloaded
#
# OUT_DIR gets check.log, speed.json, report.md and its pictures. A part that fails is reported and the others still run.
# Exit code: 0, or 1 if a part failed; parts that could not run say why.
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
  backend=cpu
  tests=(tests/kernels/test_noise.py)
  size=(--dry-run --threads 1 --rounds 1 --turn-ms 1 --max-elements 200)
else
  export TRITON_INTERPRET=0  # tests/conftest.py would switch the interpreter on
  backend=cuda
  mapfile -t tests < <(grep -rl 'mark\.gpu' tests --include='test_*.py') # others may import what is not there
  size=(--device cuda --no-compile --rounds 3 --turn-ms 150)
fi

failed=0
summary=()
readonly DEADLINE=$((SECONDS + 525))

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
  timeout --kill-after=5 $((seconds < left ? seconds : left)) "$@"
}

peers() {
  if [[ -z ${WHEELS:-} ]]; then
    echo "skipped: no folder of wheels was given (WHEELS)"
    return $SKIPPED
  fi
  limited 20 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl
}

build() {
  local options=(-q --no-index --no-build-isolation --no-deps)
  [[ -z $dry ]] || options+=(--dry-run)
  limited 100 "$python" -m pip install "${options[@]}" -e . && "$python" -m ivon_kernels && return
  echo "pip could not install the checkout; building with cmake into ivon_kernels/_native"
  limited 30 cmake -S . -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$PWD" || return
  [[ -z $dry ]] || return 0
  limited 100 cmake --build "$work/build" --parallel && cmake --install "$work/build" && "$python" -m ivon_kernels
}

gpu_tests() {
  local options=(-m gpu -q -p no:cacheprovider) code
  if [[ -z $dry ]] && "$python" -c 'import xdist' 2>/dev/null; then
    options+=(-n 12)
  fi
  limited 140 "$python" -m pytest "${options[@]}" "${tests[@]}"
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
    "$python" -m benchmarks.speed.exercise $backend
}

# benchmark PARTS SECONDS LIMIT
benchmark() {
  limited "$3" "$python" -m benchmarks speed --parts "$1" --seconds "$2" "${size[@]}" --no-report --out "$out"
}

main() {
  [[ $only == *[^\ ]* ]] || rm -f "$out"/{speed.json,report.md,speed.png,roofline.png,elements.png}
  part peers peers
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
  part build build
  part tests gpu_tests
  part exercise limited 30 "$python" -m benchmarks.speed.exercise $backend
  part memcheck sanitize memcheck
  part racecheck sanitize racecheck
  part steps benchmark steps 110 150
  part model benchmark model 30 65
  part host benchmark host 20 25
  echo "== summary"
  printf '%s\n' "${summary[@]}"
  if [[ -e $out/speed.json ]]; then
    "$python" -m benchmarks speed --parts "" "${size[@]}" --out "$out"
  fi
  return $failed
}

main 2>&1 | tee "$out/check.log"
exit "${PIPESTATUS[0]}"

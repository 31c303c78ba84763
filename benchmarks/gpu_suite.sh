#!/usr/bin/env bash
# Everything that is measured and checked on a GPU, the most valuable part first, in less than ten minutes.
#
#   benchmarks/gpu_suite.sh                       all parts; what the results file already holds is skipped
#   benchmarks/gpu_suite.sh tests targets         some parts, in this order
#   benchmarks/gpu_suite.sh --force stages        again
#   benchmarks/gpu_suite.sh --list                the parts
#   benchmarks/gpu_suite.sh --dry-run             every command at tiny sizes on the CPU
#
# Results go to $OUT if it is set, else to benchmarks/results: one JSON file named after the GPU, and gpu-suite.log.
# A file of that name in benchmarks/results is gone on with. GPU_SUITE_SECONDS (default 570) bounds the whole run: a part
# that would start later is left for the next run. PYTHON names the interpreter. Beside a copy of the tree without .git,
# `git rev-parse HEAD > REVISION`, made where it was copied from, says which commit the rows are of.
set -uo pipefail

PARTS=(build warm tests rates first targets bandwidth repeats sanitizer-memcheck sanitizer-racecheck sanitizer-initcheck
  stages overhead wall ops accuracy sweeps scaling long)
DESCRIPTIONS=(
  "install in place and compile the extension" "compile the Triton kernels of the rest, on all cores"
  "GPU tests: correctness of all kernels" "product and copy rates of the card"
  "one iteration, N = 1024" "the table of targets" "synthesis in CUDA C++ and in Triton, share of the copy rate"
  "250 repeats bit for bit, two shapes" "compute-sanitizer memcheck, every op" "compute-sanitizer racecheck, every op"
  "compute-sanitizer initcheck, every op" "time by op, roofline, share of the product rate"
  "cost of a call, CUDA graph" "the wall: dense forms beside gcng" "every op beside its peers"
  "error against float64 by dtype" "launch tables, panel sizes, time by kernel" "exponents over D, L, K"
  "250 runs of every pass over a tile bit for bit")
# Seconds that a part may take; together more than the whole, since most need less.
declare -A LIMIT=([build]=150 [warm]=110 [tests]=200 [rates]=30 [first]=60 [targets]=150 [bandwidth]=45 [repeats]=60
  [sanitizer-memcheck]=120 [sanitizer-racecheck]=120 [sanitizer-initcheck]=120 [stages]=60 [overhead]=90
  [wall]=150 [ops]=120 [accuracy]=60 [sweeps]=90 [scaling]=90 [long]=240)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-python3}
seconds=${GPU_SUITE_SECONDS:-570}
device=cuda dry=0 force=() chosen=()
for word in "$@"; do
  case $word in
    --dry-run) dry=1 device=cpu ;;
    --force) force=(--force) ;;
    --list) for i in "${!PARTS[@]}"; do printf '%-20s %s\n' "${PARTS[i]}" "${DESCRIPTIONS[i]}"; done; exit 0 ;;
    -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *)
      if [[ " ${PARTS[*]} " != *" $word "* ]]; then
        echo "gpu_suite.sh: no part '$word'; parts are: ${PARTS[*]}" >&2
        exit 2
      fi
      chosen+=("$word") ;;
  esac
done
((${#chosen[@]})) || chosen=("${PARTS[@]}")

folder=${OUT:-$root/benchmarks/results}
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$root" || exit 1
log=$folder/gpu-suite.log
scratch=$(mktemp -d)
link=
trap 'rm -rf "$scratch"; [[ -z $link ]] || rm -f "$link"' EXIT
small=() && ((dry)) && small=(--smoke)
failed=()

say() { echo "$(date +%H:%M:%S) $*" | tee -a "$log"; }

# gcng.kernels lies beside gcng/: without an installation a link makes one package of both for as long as this runs. It
# has to lie in gcng/ itself, which python -m and pytest look into before anything in PYTHONPATH.
link_checkout() {
  ln -s ../kernels "$root/gcng/kernels" && link=$root/gcng/kernels
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

use_checkout() {
  local probe='import gcng, gcng.kernels, os, sys; sys.exit(not os.path.realpath(gcng.__file__).startswith(sys.argv[1]))'
  "$python" -c "$probe" "$root/" 2>/dev/null && return
  local install=(-m pip install -q --no-index --no-deps --no-build-isolation -e .)
  if ! ((dry)) && timeout "${LIMIT[build]}" "$python" "${install[@]}" >>"$log" 2>&1; then
    "$python" -c "$probe" "$root/" 2>/dev/null && { say "installed in place"; return; }
  fi
  link_checkout
  "$python" -c "$probe" "$root/" && { say "not installed: a link to kernels/ stands in"; return; }
  say "gcng of this checkout cannot be imported by $python"
  exit 1
}

results_name() {
  "$python" -c 'import sys; from benchmarks import machine as m; print(m.file_name(m.machine(sys.argv[1])))' "$device"
}

# run PART COMMAND...: bounded in time, its output in the log and in $scratch/PART. ${signal} ends it.
run() {
  local part=$1
  shift
  echo "\$ $*" >>"$log"
  timeout --signal="${signal:-TERM}" --kill-after=10 "$(bound "$part")" "$@" >"$scratch/$part" 2>&1
  local code=$?
  cat "$scratch/$part" >>"$log"
  return $code
}

left() { echo $((seconds - SECONDS)); }
# Seconds for a part: its limit, or ${most} where the caller has set it, and no more than what is left.
bound() { local limit=${most:-${LIMIT[$1]}}; (($(left) < limit)) && limit=$(left); echo $((limit > 5 ? limit : 5)); }

check() { "$python" -m benchmarks.verdicts --results "$results" --device "$device" "$@" 2>&1 | tee -a "$log" | tail -n 1; }

# record PART CODE: what a program said becomes an entry of the results file.
record() { check record "$1" "$2" "$scratch/$1"; }

is_done() {
  ((${#force[@]})) && return 1
  "$python" - "$results" "$1" <<'PY'
import json, pathlib, sys
path, part = pathlib.Path(sys.argv[1]), sys.argv[2]
checks = json.loads(path.read_text())["checks"] if path.exists() else []
sys.exit(not any(one["part"] == part and one["status"] == "passed" for one in checks))
PY
}

measure() {
  local minutes
  minutes=$("$python" -c "print($(bound "$1") / 60)")
  # The limit is on starting a row; the process itself may use what is left of the whole run.
  local most=$seconds
  run "$1" "$python" -m benchmarks.measure --plan gpu --device "$device" --json "$results" \
    --allow-modified --parts "$1" --minutes "$minutes" --threads "$(nproc)" "${force[@]}" "${small[@]}"
}

# Before the installation, which compiles too: for this card alone.
only_this_card() {
  local asked='import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' found
  ((dry)) && return
  found=$("$python" -c "$asked" 2>/dev/null) && export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$found}
}

part_build() {
  # As the build itself looks for nvcc: CUDA_HOME, the path, the toolkit's own place.
  local cuda=() search='from gcng import build; build.cuda_compiler()'
  ((!dry)) && "$python" -c "$search" 2>/dev/null && cuda=(--cuda)
  run build "$python" -m gcng build "${cuda[@]}"
  record build $?
}

# Compiled here, all at once; a process that launches a kernel would compile one after the other.
part_warm() {
  local few=()
  ((dry)) && few=(--smoke --processes 2)
  run warm env -u TRITON_INTERPRET "$python" -m benchmarks.warm "${few[@]}"
  record warm $?
}

# tested PART MARK OPTION...: an entry for each file that has tests of a mark, so that what was finished counts; the files
# that compile most come last. An interrupt lets pytest say what had failed by then.
tested() {
  local part=$1 mark=$2 file name workers most signal=INT until=$((SECONDS + LIMIT[$1])) files=() many
  shift 2
  for name in synthesis synthesis_triton ops iteration pairs; do
    file=tests/test_gpu_$name.py
    grep -qE "mark\.$mark" "$file" && files+=("$file")
  done
  many=$(($(nproc) > 4 ? $(nproc) - 2 : 2))
  for file in "${files[@]}"; do
    name=$part-$(basename "$file" .py)
    is_done "$name" && continue
    most=$((until - SECONDS)) workers=()
    (($(left) < most)) && most=$(left)
    if ((most < 10)); then
      : >"$scratch/$name"
      record "$name" 124
      continue
    fi
    # Few at a time where the dense definition needs gigabytes for each.
    [[ $file == *iteration* ]] && workers=(-n 4) || workers=(-n "$many")
    { ((dry)) || ! "$python" -c 'import xdist' 2>/dev/null; } && workers=()
    # Only here: torch warns without it under deterministic algorithms, and products are slower with it.
    CUBLAS_WORKSPACE_CONFIG=:4096:8 run "$name" "$python" -m pytest "$file" "${workers[@]}" -q -p no:cacheprovider \
      -o timeout=120 --maxfail=20 "$@"
    record "$name" $?
  done
  check join "$part" | tee "$scratch/$part"
  return "${PIPESTATUS[0]}"
}

part_tests() { tested tests gpu -m gpu; }
part_long() { tested long long -m 'gpu and long' --long; }

part_repeats() {
  run repeats "$python" -m benchmarks.checks --results "$results" --device "$device" "${small[@]}" repeats
  local code=$?
  tail -n 1 "$scratch/repeats"
  return $code
}

sanitized() {
  local part=$1 until=$((SECONDS + LIMIT[$1])) most
  shift
  if ((dry)); then
    run "$part" "$python" -m benchmarks.checks --device cpu --smoke once || return 1
    echo "command not found: compute-sanitizer is not started by --dry-run" >>"$scratch/$part"
  else
    # Without the sanitizer first: compiled under it, the kernels alone would take all of its time.
    run "$part" "$python" -m benchmarks.checks --device cuda once
    most=$((until - SECONDS)) && (($(left) < most)) && most=$(left)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$part" compute-sanitizer "$@" "$python" -m benchmarks.checks --device cuda once
  fi
  record "$part" $?
}

# Calls that fail and are meant to, as torch asks whether something is there, are no errors of the kernels.
part_sanitizer-memcheck() { sanitized sanitizer-memcheck --tool memcheck --report-api-errors no --error-exitcode 9; }
part_sanitizer-racecheck() { sanitized sanitizer-racecheck --tool racecheck --error-exitcode 9; }
part_sanitizer-initcheck() { sanitized sanitizer-initcheck --tool initcheck --error-exitcode 9; }

only_this_card
use_checkout
results=$folder/$(results_name) || exit 1
kept=$root/benchmarks/results/$(basename "$results")
((dry)) || { [[ -f $kept && ! -f $results ]] && cp "$kept" "$results"; }

for part in "${chosen[@]}"; do
  if (($(left) < 15)); then
    say "$part: left for the next run, the time is used up"
    continue
  fi
  # What was built on another machine is not here.
  if [[ $part != build && $part != warm ]] && is_done "$part"; then
    say "$part: done"
    continue
  fi
  start=$SECONDS
  if declare -F "part_$part" >/dev/null; then
    "part_$part"
  else
    measure "$part"
  fi && state=ok || { state=failed; failed+=("$part"); tail -n 5 "$scratch/$part" >&2; }
  say "$part: $state, $((SECONDS - start)) s"
done

say "results: $results"
# So that a second run on this machine goes on, even if $OUT was emptied.
((dry)) || [[ ! -f $results || $results -ef $kept ]] || cp "$results" "$kept"
((${#failed[@]} == 0)) || { say "failed: ${failed[*]}"; exit 1; }

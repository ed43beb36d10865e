#!/usr/bin/env bash
# Everything that is worth knowing on a GPU: the proofs of tests/gpu, then the speed of every part beside its goal.
#
#   benchmarks/gpu.sh [--wheels DIR] [--output DIR] [--dry-run]
#
# Needs Python with torch, transformers and pytest; nothing is fetched. --wheels: a folder of wheels to install beside them
# (megatron-core and whatever else is missing), into OUTPUT/site. --output: results.json and table.md, default runs/gpu.
# --dry-run: tiny shapes, on any machine. PYTHON names another interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} wheels= output=runs/gpu flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?a folder}; shift 2 ;;
    --output) output=${2:?a folder}; shift 2 ;;
    --dry-run) flags+=(--dry-run); shift ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$output/site" "$wheels"/*.whl
  PYTHONPATH="$output/site:$PYTHONPATH"
fi
exec "$python" "$root/benchmarks/gpu.py" --output "$output" ${flags[@]+"${flags[@]}"}

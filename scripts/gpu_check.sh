#!/usr/bin/env bash
# What a GPU is needed for: the tests of tests/gpu and benchmarks/gpu.py.
#
# Nothing is installed. Packages that Python lacks are read from wheels: WHEELS=folder scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "${WHEELS:-/nonexistent}"/*.whl; do
  if [ -e "$wheel" ]; then "$PYTHON" -m zipfile -e "$wheel" "$site"; fi
done
export PYTHONPATH=$PWD/src:$PWD/tests:$PWD/benchmarks:$site HF_HUB_OFFLINE=1
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA GPU: tests/gpu, the fused kernel, captured decoding and all times on a GPU are not checked"
  exit 1
fi
"$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
"$PYTHON" -m figures run gpu --device cuda --again

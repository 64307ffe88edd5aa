#!/usr/bin/env bash
# Everything there is to be done on a machine with one CUDA device, torch, transformers, Python 3.12 and no network, in 8 minutes:
#
#   tests/gpu/run.sh [--cpu] [OUT]
#
# installs what tests/gpu/pack.sh has packed into a directory of its own, runs every test marked `gpu`, then the benchmark.
# OUT (default: $OUT, or .gpu-out) then holds gpu.json and gpu.md, written after every step, and two logs. --cpu rehearses all
# of it without a GPU, at toy sizes; a Python that has TransformerLens and sinkscope already is left as it is there.
# PYTHON is the interpreter (python3), SINKSCOPE_GPU_SECONDS the time for all (460; a rehearsal: 1800).
set -u
cd "$(dirname "$0")/../.."
start=$(date +%s)
cpu=
if [ "${1-}" = --cpu ]; then cpu=--cpu; shift; fi
out=${1:-${OUT:-.gpu-out}}
python=${PYTHON:-python3}
seconds=${SINKSCOPE_GPU_SECONDS:-$([ -n "$cpu" ] && echo 1800 || echo 460)}
left() { echo $((start + seconds - $(date +%s))); }

mkdir -p "$out"
rm -f "$out"/gpu.json "$out"/gpu.md "$out"/pytest.log "$out"/bench.log
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
export PIP_NO_INDEX=1 PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$target

if [ -z "$cpu" ] || ! "$python" -c 'import importlib.metadata as m; m.version("transformer-lens"); m.version("sinkscope")' 2>/dev/null; then
    "$python" -m pip install --quiet --no-deps --no-compile --target "$target" .gpu-pack/*.whl &&
        "$python" -m pip install --quiet --no-deps --no-compile --no-build-isolation --target "$target/own" . &&
        mv "$target"/own/sinkscope-*.dist-info "$target" || exit 1
fi
if [ -z "$cpu" ]; then
    "$python" -c 'import torch; print(torch.cuda.get_device_name(0))' || { echo "no CUDA device: --cpu rehearses" >&2; exit 1; }
fi
echo "installed: $(left) s left"

# Two fifths of the time for the tests, six at a time on the one device.
[ -n "$cpu" ] && export SINKSCOPE_TEST_DEVICE=cpu
# shellcheck disable=SC2046
SINKSCOPE_GPU_RECORD=$out timeout -k 10 $((seconds * 2 / 5)) "$python" -m pytest -q -m gpu -p tests.gpu.plugin -p no:cacheprovider \
    -n "$([ -n "$cpu" ] && echo 2 || echo 6)" --durations 15 \
    $("$python" -c 'import pytest_timeout' 2>/dev/null && echo --timeout 90 --timeout-method thread) \
    $(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort) >"$out/pytest.log" 2>&1
code=$?
tail -n 3 "$out/pytest.log"
echo "tests: exit status $code, $(left) s left"

timeout -k 10 $(($(left) > 20 ? $(left) : 20)) "$python" -m tests.gpu.bench "$out" $cpu --until $((start + seconds - 15)) 2>&1 |
    tee "$out/bench.log"
echo "benchmark: exit status ${PIPESTATUS[0]}, $(left) s left"

"$python" -m tests.gpu.record "$out" "$code"

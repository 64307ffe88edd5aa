#!/usr/bin/env bash
# Wheels that a machine without a network needs besides torch, transformers, pytest and the like, for tests/gpu/run.sh there:
#
#   tests/gpu/pack.sh [DIR]      (.gpu-pack, 4 MB)
#
# For Python 3.12 on Linux, at the versions that `make test` takes. What TransformerLens requires and never imports on the way
# stays at home: wandb (imported in its training loop alone), fancy-einsum, transformers-stream-generator, typeguard (nowhere).
# datasets it imports at once, with dill and multiprocess. hatchling builds sinkscope itself, from the sources that travel.
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-.gpu-pack}
needed="transformer-lens datasets dill multiprocess beartype gguf hatchling trove-classifiers pathspec"

rm -rf "$folder"
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
    --python-version 3.12 --implementation cp --only-binary :all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint requirements/tl43.txt $needed
du -sh "$folder"
test "$(du -sm "$folder" | cut -f1)" -lt 50 || { echo "$folder is too large to carry: 60 MB with the sources" >&2; exit 1; }

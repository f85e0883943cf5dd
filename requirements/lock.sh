#!/bin/sh
# lock.sh: pin again what the Makefile installs, after a dependency in pyproject.toml changed (needs uv).
#   dev.txt    to run, develop and test svag_fast
#   bench.txt  the peers of `make bench` besides
# For Python 3.10 and newer. torch pins its own CUDA libraries, and its CPU builds have none: they are left out.
# Its CUDA builds pin their own triton as well; a bound lets the CPU build take the one that the compile reports
# (tests/kernels/test_triton_compile.py) were made with.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo torch==2.13.0 > "$scratch/torch.txt"

lock() {
    uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate -c "$scratch/torch.txt" "$@" \
        pyproject.toml | grep -vE '^(nvidia-|cuda-|colorama)' | sed 's/^triton==[^ ]*/triton<=3.9.0/'
}

lock --extra test --extra lint > "$scratch/dev.txt"
lock --extra bench -c "$scratch/dev.txt" | grep -vxFf "$scratch/dev.txt" > "$scratch/bench.txt"
mv "$scratch/dev.txt" "$scratch/bench.txt" requirements/

#!/usr/bin/env bash
# Installs the wheel and the source distribution of dist/ into fresh environments and tries them outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
# The build without torch below is meant to succeed without kernels.
unset STARFLOW_NATIVE STARFLOW_CUDA
dist=$PWD/dist
constraints=$PWD/constraints.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
path=$PATH

fresh() {  # make the environment $1 and put it first on the PATH
    echo "== $1"
    python3 -m venv "$1"
    PATH="$work/$1/bin:$path"
}

install() { pip install --quiet --disable-pip-version-check -c "$constraints" "$@"; }

native() {  # print the state of the native backend
    python -c "import starflow_kernels; print(starflow_kernels.backends()['block_inverse']['native'])"
}

try() {  # the command line without any extra
    [ "$(native)" = available ]
    python -m starflow --version
    starflow info
    starflow sample --num 4 --out drawn
    find drawn -type f | grep .
    for command in "train --preset digits --out trained" demo; do
        ! starflow $command > output 2>&1
        cat output
        [ "$(wc -l < output)" = 1 ] || { echo "starflow $command: a missing extra is not one line"; exit 1; }
    done
    rm -r drawn
}

fresh wheel
install torch numpy
install --no-deps "$dist"/*.whl
[ "$(native)" = available ]
echo "starflow_kernels imports with torch alone"
install "$dist"/*.whl
try

fresh source
install torch setuptools
# pip hides the output of a build without --verbose.
pip install --verbose --disable-pip-version-check -c "$constraints" "$dist"/*.tar.gz > output 2>&1 || { cat output; exit 1; }
[ "$(grep "was not built" output | tee /dev/stderr | wc -l)" = 1 ]
native | tee /dev/stderr | grep -q "torch was missing"
STARFLOW_NATIVE=1 install --no-build-isolation --no-cache-dir --no-deps --force-reinstall "$dist"/*.tar.gz
try

#!/usr/bin/env bash
# Builds the source distribution and the wheel into dist/, and checks their content.
# Needs torch and the extra `release`. On a newer glibc the wheel is tagged for that glibc and later.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf dist
# Build without isolation, because an isolated build environment would have no torch.
STARFLOW_NATIVE=1 python -m build --no-isolation --outdir dist . > /dev/null
auditwheel repair --strip --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist dist/*-linux_*.whl
rm dist/*-linux_*.whl

# The wheel holds the tracked files of both packages and the compiled library, nothing else.
packages=$(git ls-files starflow starflow_kernels)
wheel=$(python -m zipfile -l dist/*.whl | awk 'NR > 1 && $1 !~ /\/$/ && $1 !~ /dist-info\// { print $1 }')
diff <(sort <<< "$packages"$'\n'starflow_kernels/_native.abi3.so) <(sort <<< "$wheel")
# The source distribution holds all that a build reads.
sources=$(git ls-files starflow starflow_kernels csrc setup.py pyproject.toml README.md LICENSE CITATION.cff)
missing=$(comm -23 <(sort <<< "$sources") <(tar tzf dist/*.tar.gz | cut -d/ -f2- | sort))
[ -z "$missing" ] || { echo "not in the source distribution: $missing"; exit 1; }
ls -l dist

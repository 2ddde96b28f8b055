#!/usr/bin/env bash
# Checks style, import layers, types, and the format of C++ and CUDA sources; needs the extra `lint`.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
lint-imports --no-cache
mypy
git ls-files '*.h' '*.cpp' '*.cu' | xargs clang-format --dry-run -Werror

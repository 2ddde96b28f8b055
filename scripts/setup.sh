# To be sourced. Makes .venv with the package and the named extras, and puts it on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
[ -x .venv/bin/pip ] || python3 -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
echo "installing into $PWD/.venv ..." >&2
pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$1]"

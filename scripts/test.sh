#!/usr/bin/env bash
# The tests; arguments go to pytest.
source "$(dirname "$0")/setup.sh" models,test
pytest -q "$@"

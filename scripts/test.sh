#!/usr/bin/env bash
# The tests; arguments go to pytest.
source "$(dirname "$0")/setup.sh" demo,test
pytest -q "$@"

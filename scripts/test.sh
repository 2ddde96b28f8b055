#!/usr/bin/env bash
# Runs the tests; arguments are passed to pytest.
source "$(dirname "$0")/setup.sh" demo,test
pytest -q "$@"

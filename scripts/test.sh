#!/usr/bin/env bash
# Runs the tests, two files at a time; arguments are passed to pytest.
source "$(dirname "$0")/setup.sh" demo,test
pytest -q -n 2 --dist loadfile "$@"

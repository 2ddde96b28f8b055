"""The compiled kernels on machines without the widest instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.backends import needs_native

# Tests of each file that run once more, as an expression for pytest.
TESTS = {
    "test_block_jacobi.py": "without_a_tolerance and 40 or quasi_newton_takes and native",
    "test_block_native.py": "parallel_pass or isa_is_used or test_guided_inverse or error_contract_over_sizes and 63",
    "test_cached_attention.py": "native and (over_sizes or bits)",
    "test_causal_attention.py": "native and (over_sizes or bits)",
    "test_masked_inverse.py": "native and (equation or contract or activations or residuals) or bits",
    "test_transposed_solve.py": "same_bits_in_every_batch or error_contract_over_sizes and 17",
}


@needs_native
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_the_contract_and_the_bits_hold(isa):
    files = [str(Path(__file__).with_name(name)) for name in TESTS]
    tests = " or ".join(f"{name} and ({expression})" for name, expression in TESTS.items())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", tests]
    done = subprocess.run(command, env={**os.environ, "STARFLOW_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

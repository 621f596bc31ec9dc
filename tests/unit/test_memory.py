"""A process that keeps what it frees takes no page twice."""

import subprocess
import sys

import pytest

from moetrain.base.memory import keep_freed_memory

SCRIPT = """
import resource, sys
import numpy as np
from moetrain.base.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 << 20, np.uint8)[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
first = faults()
print(first, faults())
"""


def taken(wish: str) -> tuple[int, int]:
    """Pages that a block of 64 MiB takes when it is made, and when it is made again."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, wish], capture_output=True, text=True, check=True, timeout=60)
    first, again = map(int, done.stdout.split())
    return first, again


def test_a_block_that_was_freed_is_there_when_it_is_asked_for_again():
    if not keep_freed_memory():
        pytest.skip("this C library has no such wish")
    first, again = taken("keep")
    assert again < first / 10


def test_without_the_wish_its_pages_are_taken_again():
    first, again = taken("usual")
    assert again > first / 2, "the C library keeps blocks by itself: keep_freed_memory has no effect here"

"""What importing Megatron-Core for its data sets does to the process."""

import subprocess
import sys

PROBE = """
import sys, torch
before = torch.compile
from moetrain.data.megatron import import_megatron
import_megatron()
assert torch.compile is before
assert "megatron.core.datasets.gpt_dataset" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was imported, which takes seconds in every rank"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


def test_the_compiler_is_neither_imported_nor_lost() -> None:
    subprocess.run([sys.executable, "-c", PROBE], check=True, timeout=100)

"""The core and the analyses serve people without Lightning."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            raise ImportError(f"{name} is not needed here")

sys.meta_path.insert(0, Refuse())
IMPORTS
found = sorted(name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning"))
assert not found, found
"""

IMPORTS = {
    "package": "import lightning_goldy; lightning_goldy.ParameterSpace; dir(lightning_goldy)",
    "core and analysis": (
        "import pkgutil, importlib, lightning_goldy.core, lightning_goldy.analysis\n"
        "for package in (lightning_goldy.core, lightning_goldy.analysis):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{module.name}')"
    ),
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_no_lightning(imports: str) -> None:
    program = PROGRAM.replace("IMPORTS", imports)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_the_check_can_fail() -> None:
    program = PROGRAM.replace("IMPORTS", "import lightning.pytorch")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "is not needed here" in result.stderr

"""The core, the analyses and the report serve people without Lightning."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            raise ImportError(f"{name} is not needed here")

sys.meta_path.insert(0, Refuse())

def check(after):
    found = sorted(name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning"))
    assert not found, (after, found)

import lightning_goldy
check("lightning_goldy")
assert "torch" not in sys.modules, "the package itself imports nothing"

import lightning_goldy.report
unwanted = ("lightning_goldy.analysis", "lightning_goldy.callbacks", "matplotlib", "plotly", "altair", "vl_convert")
found = [name for name in unwanted if name in sys.modules]
assert not found, ("lightning_goldy.report", found)
check("lightning_goldy.report")

dir(lightning_goldy)
lightning_goldy.ParameterSpace, lightning_goldy.CausalLMObjective
check("its names from the core")

import importlib, pkgutil
import lightning_goldy.core, lightning_goldy.analysis
check("lightning_goldy.core, lightning_goldy.analysis")
for package in (lightning_goldy.core, lightning_goldy.analysis):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        check(module.name)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


def test_core_analyses_and_report_load_without_what_they_do_not_need() -> None:
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr


def test_the_check_can_fail() -> None:
    result = run(PROGRAM.replace("import lightning_goldy\n", "import lightning.pytorch\n", 1))
    assert result.returncode != 0
    assert "is not needed here" in result.stderr

"""What is built installs alone, and works."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lightning_goldy
from lightning_goldy.report.descriptions import PAGES
from tests.house import ROOT

PACKAGE = ROOT / "lightning_goldy"
ASSETS = ("py.typed", "report/page.html", "report/style.css", "report/figures.js")


def test_the_package_is_typed_and_has_its_assets() -> None:
    for name in ASSETS:
        assert (PACKAGE / name).is_file(), name


def test_a_type_checker_sees_what_the_package_exports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    seen = {
        alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {name: f"lightning_goldy.{module}" for name, module in lightning_goldy._EXPORTS.items()}


USER = """
from lightning_goldy import GoldyModule, ParameterSpace
from lightning_goldy.analysis import golden_parameters


def count(module: GoldyModule) -> int:
    reveal_type(ParameterSpace.of(module.model).numel)
    result = golden_parameters(module.model, [])
    reveal_type(result.over_null)
    return result.count
"""


@pytest.mark.slow
def test_code_of_a_user_is_checked_strictly(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    told = run(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py", folder=tmp_path)
    assert 'Revealed type is "int"' in told
    assert 'Revealed type is "float | None"' in told


def run(*words: str | Path, folder: Path, **environment: str) -> str:
    """Without this repository on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that its own build backend makes."""
    folder = tmp_path_factory.mktemp("built")
    venv.create(folder / "builder", with_pip=True)
    python = folder / "builder" / "bin" / "python"
    words = [python, "-m", "pip", "install", "--quiet", "hatchling>=1.26"]
    got = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"the build backend cannot be had: {got.stderr.strip().splitlines()[-1]}")
    run(python, "-m", "hatchling", "build", "-d", folder / "dist", folder=ROOT)
    return folder / "dist"


@pytest.mark.slow
def test_both_distributions_hold_everything(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ASSETS:
        assert f"lightning_goldy/{name}" in names
    for kind in ("recipes", "callbacks"):
        for path in (ROOT / kind).glob("*.yaml"):
            assert f"lightning_goldy/_bundled/{kind}/{path.name}" in names
    for page in {page.partition("#")[0] for page in PAGES.values()}:
        assert f"lightning_goldy/_bundled/docs/{page}" in names
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert modules <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    with tarfile.open(source) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {"pyproject.toml", "README.md", "LICENSE", "lightning_goldy/py.typed"} <= inner


@pytest.mark.slow
def test_a_wheel_alone_runs_the_demo(built: Path, tmp_path: Path) -> None:
    """In an environment of its own that finds the large dependencies of this one, and nothing of the repository."""
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=True)
    python = bare / "bin" / "python"
    # Named by a path file, so that path files in there, as of an editable install, count for nothing.
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip()
    Path(place, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=tmp_path)
    where = run(python, "-c", "import lightning_goldy; print(lightning_goldy.__file__)", folder=tmp_path)
    assert where.startswith(str(bare)), (where, sys.prefix)
    goldy = bare / "bin" / "goldy"
    assert "atlas_edit" in run(goldy, "recipes", folder=tmp_path)
    run(goldy, "demo", "--fast", "--directory", "demo", folder=tmp_path, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    (page,) = tmp_path.glob("demo/**/report.html")
    assert page.read_text(encoding="utf-8").count('class="answer"') == 5

"""Every way to install the package gives one that works. `make test-install` runs this, `make test` does not."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow_install

ROOT = Path(__file__).parents[1]
PARTS = ("beam", "kernels", "pyproject.toml", "README.md", "LICENSE")
CHECK = """
import torch, flashbeam, flashbeam.kernels
log_probs, tokens, lse = flashbeam.kernels.topk_log_probs(torch.tensor([[0.0, 2.0, 1.0]]), 2)
assert tokens.tolist() == [[1, 2]]
print(flashbeam.__file__)
print(flashbeam.kernels.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built from, so that the checkout stays as it is."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees torch, pip and setuptools of this one, but not its flashbeam."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # a .pth file adds the folder, and does not read the .pth files in it, such as an editable flashbeam's
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return python


def build(kind: str, tree: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, tree, cwd=folder.parent)
    (built,) = folder.iterdir()
    return built


def install(environment: Path, *what: object, cwd: Path) -> list[Path]:
    """Install without downloads, import from ``cwd``, and return the files of flashbeam and flashbeam.kernels."""
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(environment, "-m", "pip", "install", *options, *what, cwd=cwd)
    return [Path(line).resolve() for line in run(environment, "-I", "-c", CHECK, cwd=cwd).split()]


def shipped() -> set[str]:
    """What an installed package consists of."""
    names = {f"flashbeam/{path.relative_to(ROOT / 'beam').as_posix()}" for path in (ROOT / "beam").rglob("*.py")}
    names |= {f"flashbeam/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    return names | {"flashbeam/py.typed", "flashbeam/kernels/py.typed"}


def test_wheel(tree: Path, environment: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tree, tmp_path / "dist")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == shipped()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert all(file.is_relative_to(environment.parents[1]) for file in install(environment, wheel, cwd=tmp_path))


def test_sdist(tree: Path, environment: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path / "dist")
    assert all(file.is_relative_to(environment.parents[1]) for file in install(environment, sdist, cwd=tmp_path))


def test_editable(tree: Path, environment: Path, tmp_path: Path) -> None:
    files = install(environment, "--editable", tree, cwd=tmp_path)
    assert files == [tree / "beam" / "__init__.py", tree / "kernels" / "__init__.py"]


def test_strict_editable(tree: Path, environment: Path, tmp_path: Path) -> None:
    files = install(environment, "--config-settings", "editable_mode=strict", "--editable", tree, cwd=tmp_path)
    assert all(file.is_relative_to(tree) for file in files)  # links in the tree's build folder, or what they lead to

"""The package as a package: what it imports, how fast, in which direction, and what it ships."""

import ast
import importlib
import importlib.resources
import inspect
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

ROOT = Path(__file__).parents[1]
FOLDERS = {"flashbeam.kernels": ROOT / "kernels", "flashbeam": ROOT / "beam"}
# the files a decode step runs through
STEP_PATH = [
    "search.py",
    "state.py",
    "statistics.py",
    "stopping.py",
    "cache.py",
    "scoring/*.py",
    "selection/*.py",
    "constraint/*.py",
]
# these run once per search, not once per step, or are documented as the place where the host waits
OUTSIDE_THE_STEP = {"__init__", "__post_init__", "__repr__", "all_done"}
# its matchers run on the host, as its documentation says
ON_THE_HOST = "beam/constraint/grammar.py"


def python(code: str) -> str:
    """Run ``code`` in a new interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(module, names)`` for every import in ``path``; relative ones are resolved, ``import x`` has no names."""
    package, folder = next(item for item in FOLDERS.items() if path.is_relative_to(item[1]))
    package_parts = [*package.split("."), *path.parent.relative_to(folder).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            base = package_parts[: len(package_parts) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]


def test_works_without_triton() -> None:
    # None in sys.modules is how Python says that a module cannot be imported, to import and to find_spec alike
    python("""
import sys
sys.modules["triton"] = None
import torch
import flashbeam as fb
from flashbeam.kernels import topk_log_probs

logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
log_probs, tokens, _ = topk_log_probs(logits, 5)
expected = logits.double().log_softmax(-1).topk(5)
assert torch.equal(tokens, expected.indices)
assert (log_probs - expected.values).abs().max() < 1e-5

search = fb.BeamSearch(beam_size=2, max_length=3, eos_id=0)
state = search.init(batch_size=1, device="cpu")
while not state.all_done():
    search.step(state, torch.zeros(2, 4))
assert search.finalize(state).valid.all()
""")


def test_triton_is_imported_at_the_first_launch_only() -> None:
    python("import torch, sys; before = 'triton' in sys.modules; import flashbeam, flashbeam.kernels; "
           "assert ('triton' in sys.modules) == before")  # fmt: skip


def test_import_takes_under_a_fifth_of_a_second_beyond_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # as users import it
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = "import time, torch; t = time.perf_counter(); import flashbeam; print(time.perf_counter() - t)"
    python(code)  # compiles to bytecode, warms the disk
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.2


@pytest.mark.parametrize("path", sources(ROOT, "beam/**/*.py", "kernels/*.py"), ids=relative)
def test_only_the_triton_folder_imports_triton(path: Path) -> None:
    assert "triton" not in {module.partition(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("path", sources(ROOT, "kernels/**/*.py"), ids=relative)
def test_kernels_know_nothing_of_beam(path: Path) -> None:
    own = [module for module, _ in imports(path) if module.partition(".")[0] == "flashbeam"]
    assert all(f"{module}.".startswith("flashbeam.kernels.") for module in own)


@pytest.mark.parametrize("path", sources(ROOT, "beam/**/*.py"), ids=relative)
def test_beam_uses_the_public_names_of_kernels(path: Path) -> None:
    public = importlib.import_module("flashbeam.kernels").__all__
    for module, names in imports(path):
        assert not module.startswith("flashbeam.kernels."), f"{module}: import its public names from flashbeam.kernels"
        if module == "flashbeam.kernels":
            assert set(names) <= set(public)


def step_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of ``tree``, without the functions of ``OUTSIDE_THE_STEP``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in OUTSIDE_THE_STEP:
            continue
        yield node
        yield from step_code(node)


@pytest.mark.parametrize("path", sources(ROOT / "beam", *STEP_PATH), ids=relative)
def test_step_never_waits_for_the_host(path: Path) -> None:
    found = [
        f"{relative(path)}:{node.lineno}: .{node.attr}"
        for node in step_code(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr in {"item", "tolist", "cpu"} or ast.unparse(node) == "torch.tensor")
    ]
    assert bool(found) == (relative(path) == ON_THE_HOST), found


def test_type_information_ships() -> None:
    for package in FOLDERS:
        assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_every_folder_of_code_is_a_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {setuptools["package-dir"][package] for package in setuptools["packages"]}
    assert listed == {relative(path.parent) for path in sources(ROOT, "beam/**/*.py", "kernels/**/*.py")}


@pytest.mark.parametrize("package", FOLDERS)
def test_every_public_name_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value) or callable(value):
            doc = inspect.getdoc(value) or ""
            # a dataclass or named tuple without a docstring gets its signature for one
            assert doc and not doc.startswith(f"{name}("), f"{package}.{name} has no docstring"


def test_make_passes_the_prompt_once_and_as_it_is() -> None:
    for prompt in ("def ", "-x", 'it\'s "$(HOME)" `ls`'):
        # a make above this one would have it announce its folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "demo", f"PROMPT={prompt}"]
        line = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        echo = line.strip().lstrip("@").replace(".venv/bin/python docs/examples/demo.py", "printf '%s|'")
        shell = {**environment, "DEMO_PROMPT": prompt}
        said = subprocess.run(["sh", "-c", echo], env=shell, capture_output=True, text=True, check=True).stdout
        assert said == f"--|{prompt}|"

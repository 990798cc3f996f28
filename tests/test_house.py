"""The house's own rules, checked on the source: import direction, boundaries, links, docstrings, short functions."""

from __future__ import annotations

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowprec

ROOT = Path(__file__).resolve().parent.parent

# Each layer may import those above it, never one beside or below it; a package may import itself. "" is
# lowprec/__init__.py. A new module takes its place here.
LAYERS = (
    {"block_tables", "formats", "modes", "rounding", "straight_through"},
    {"accumulator", "reference", "eager", "packing", "windows"},
    {"eager_accumulate", "eager_fused", "eager_hopper", "eager_statistics"}
    | {"reference_accumulate", "reference_block", "reference_hopper"},
    {"adapt", "eager_block", "eager_sparse"},
    {"_ops", "testing"},
    {"block"},
    {"cast", "recompute"},
    {"accumulate", "measure"},
    {"blocksparse", "fused_matmul"},
    {"fused"},
    {"bias"},
    {"distributed", "optim", "policy", "slots"},
    {"sums"},
    {"roles"},
    {"blocked"},
    {"contractions", "lookups", "sparse_products"},
    {"products"},
    {"reductions"},
    {"attention", "recurrent"},
    {"coverage"},
    {"region"},
    {"entry"},
    {"states"},
    {"wrap", "report"},
    {"suggest"},
    {""},
    {"tables"},
    {"ruler"},
    {"chart"},
    {"timing"},
    {"sparse"},
    {"studies"},
    {"benches"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
PACKAGES = {"benches", "sparse", "studies"}
SHIMS = re.compile(r"\b(aoti_torch_|torch_c10_|torch_(get|set|new|list|library|call|parallel)_|STD_CUDA_)")
ABSOLUTE = re.compile(r"(^|[^\w.~}])/(home|mnt|opt|root|tmp|Users|var|work)/\w", re.MULTILINE)


def name_of(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lowprec" else ("lowprec", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path
    for folder in ("lowprec", "sparse", "studies")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_lib" not in path.parts
}


def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports, wherever in it the import stands."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (full if (full := f"{base}.{alias.name}") in SOURCES else base for alias in node.names)


def layer_of(name: str) -> int:
    part = [*name.split("."), ""][1]
    places = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert places, f"{name} has no place in LAYERS: put it where its imports allow"
    return places[0]


def test_the_check_sees_the_package() -> None:
    assert {"lowprec", "lowprec.formats", "lowprec.cast", "lowprec.sparse", "lowprec.studies"} <= set(SOURCES)
    assert "lowprec.eager" in set(imports("lowprec._ops"))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name: str) -> None:
    package = ".".join(name.split(".")[:2])
    own = package if package.rpartition(".")[2] in PACKAGES else name
    for other in imports(name):
        if other.split(".")[0] == "lowprec" and not f"{other}.".startswith(f"{own}."):
            assert layer_of(other) < layer_of(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", ["lowprec.formats", "lowprec.rounding", "lowprec.reference"])
def test_definitions_need_no_torch(name: str) -> None:
    assert not [other for other in imports(name) if other.split(".")[0] == "torch"]


@pytest.mark.parametrize("name", SOURCES)
def test_only_ops_names_our_operators(name: str) -> None:
    attributes = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Attribute)]
    named = [node for node in attributes if ast.unparse(node).startswith("torch.ops.lowprec")]
    assert name == "lowprec._ops" or not named


def test_sparse_and_studies_load_under_lowprec_alone() -> None:
    script = (
        "import sys, lowprec, lowprec.sparse, lowprec.studies\n"
        "print(sorted({'sparse', 'studies'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    stray = [(name, other) for name in SOURCES for other in imports(name) if other.split(".")[0] in PACKAGES]
    assert not stray


def test_importing_the_package_leaves_the_compiler_alone() -> None:
    script = "import sys, lowprec; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cuda_is_no_python_package() -> None:
    assert not list((ROOT / "cuda").rglob("__init__.py")), "it would hide NVIDIA's own `cuda` packages"


def repository_files() -> Iterator[Path]:
    """Every file that belongs to the repository; links as themselves."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in ("lowprec", "cuda", "sparse", "studies", "tests", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if not {"_lib", "__pycache__", "runs"} & set(path.parts) and (path.is_file() or path.is_symlink()):
                yield path


def test_no_absolute_paths() -> None:
    contents = {path: path.read_bytes() for path in repository_files() if path.is_file()}
    texts = {path: content.decode("utf-8") for path, content in contents.items() if b"\0" not in content}
    assert not [path for path, text in texts.items() if ABSOLUTE.search(text)]


def test_links_are_relative_and_stay_inside() -> None:
    links = {path.relative_to(ROOT).as_posix(): os.readlink(path) for path in repository_files() if path.is_symlink()}
    assert links["lowprec/sparse"] == "../sparse"
    assert links["lowprec/studies"] == "../studies"
    assert not [target for target in links.values() if os.path.isabs(target)]
    assert not [link for link in links if not (ROOT / link).resolve().is_relative_to(ROOT)]


def test_shims_are_named_in_one_header() -> None:
    sources = [path for path in (ROOT / "cuda").rglob("*") if path.suffix in {".cpp", ".cu", ".h", ".cuh"}]
    assert sources
    naming = [path.name for path in sources if SHIMS.search(path.read_text(encoding="utf-8"))]
    assert naming == ["torch_stable.h"]


@pytest.mark.parametrize("name", lowprec.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(lowprec, name)
    if inspect.isclass(public) or inspect.isroutine(public) or inspect.ismodule(public):
        own = public.__doc__ or ""
        assert own.strip()
        assert not own.startswith(f"{name}("), "a dataclass's generated signature is no documentation"


def lengths() -> list[int]:
    """Lines of every function of the package, its docstring not counted."""
    functions = [
        node
        for name in SOURCES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(
        node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node, clean=False) or "").splitlines())
        for node in functions
        if node.end_lineno
    )


def test_functions_are_short() -> None:
    lines = lengths()
    assert statistics.median(lines) <= 10
    assert statistics.quantiles(lines, n=10)[-1] <= 30

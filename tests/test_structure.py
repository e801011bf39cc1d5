"""The structure of the package: imports run downward, and only six packages are used."""

import ast
import sys

import pytest
from conftest import ROOT

# The folders and modules of minialign in reading order of their dependencies. Each may import from
# itself and from those above it.
ORDER = [
    "utils",
    "losses",
    "neighbor_losses",
    "data",
    "models",
    "reference",
    "reference_bdhs",
    "reference_online",
    "reference_distillation",
    "reference_neighbors",
    "logprobs",
    "generation",
    "evaluation",
    "pairs",
    "methods",
    "options",
    "sample_options",
    "training",
    "report",
    "evaluate",
    "annotators",
    "merge",
]
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "tqdm", "minialign"}
NETWORK_MODULES = {
    "asyncio",
    "ftplib",
    "http",
    "imaplib",
    "poplib",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "telnetlib",
    "urllib",
    "webbrowser",
    "xmlrpc",
}
UNSAFE_MODULES = {"importlib", "marshal", "pickle", "shelve", "subprocess"}
UNSAFE_FUNCTIONS = {"__import__", "compile", "eval", "exec"}

PACKAGE_FILES = sorted((ROOT / "minialign").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))  # train.py and sample.py
SOURCES = [*PACKAGE_FILES, *SCRIPTS]


def relative_name(path):
    """Return the path of a source file from the root of the repository, to name a test case."""
    return path.relative_to(ROOT).as_posix()


def imported_names(path):
    """Return the dotted names of all that a file imports, wherever in the file the statement is.

    `from a.b import c` counts as "a.b.c". Relative imports are taken to be from minialign.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["minialign"] if node.level > 0 else []
            if node.module is not None:
                parts.append(node.module)
            names.update(".".join([*parts, alias.name]) for alias in node.names)
    return names


def imported_packages(path):
    """Return the top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported_names(path)}


def imported_parts(path):
    """Return the folders and modules of minialign that a file imports from."""
    parts = set()
    for name in imported_names(path):
        package, *inside = name.split(".")
        if package == "minialign" and inside:
            parts.add(inside[0])
    return parts


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative_name)
def test_imports_run_downward(path):
    """A folder imports from itself and from earlier ones, so there is no cycle of folders."""
    part = path.relative_to(ROOT / "minialign").with_suffix("").parts[0]
    if part == "__init__":  # minialign/__init__.py imports nothing
        assert not imported_parts(path)
        return
    assert part in ORDER, f"{part} is missing in ORDER"

    for imported in imported_parts(path) & set(ORDER):
        assert ORDER.index(imported) <= ORDER.index(part), f"{path} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_only_six_packages_and_no_network(path):
    """Scripts and package need no more than pyproject.toml lists, and open no connection."""
    packages = imported_packages(path)

    assert packages <= PACKAGES | sys.stdlib_module_names
    assert not packages & NETWORK_MODULES


def test_every_form_of_import_is_found(tmp_path):
    """The tests above depend on this: relative, absolute, aliased, and inside a function."""
    path = tmp_path / "module.py"
    path.write_text(
        "import torch.nn as nn\n"
        "from . import losses\n"
        "from .models.lora import LoRALinear\n"
        "from minialign import pairs, data\n"
        "import minialign.utils.cli\n"
        "def function():\n"
        "    from urllib.request import urlopen\n"
        "    import transformers\n"
    )

    assert imported_packages(path) == {"torch", "minialign", "urllib", "transformers"}
    assert imported_parts(path) == {"losses", "models", "pairs", "data", "utils"}


def test_no_module_hides_code_from_the_reader():
    """No pickle, eval, exec or shell is used anywhere in what ships."""
    for path in SOURCES:
        called = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
        assert not called & UNSAFE_FUNCTIONS, path
        assert not imported_packages(path) & UNSAFE_MODULES, path

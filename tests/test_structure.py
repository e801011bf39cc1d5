"""The house itself: imports run downward by floors, and nothing comes from beyond the six packages."""

import ast
import sys

import pytest
from conftest import ROOT

# Each folder or module of minialign imports from itself and from what stands before it.
ORDER = [
    "utils",
    "losses",
    "data",
    "models",
    "reference",
    "reference_bdhs",
    "reference_online",
    "logprobs",
    "generation",
    "evaluation",
    "pairs",
    "methods",
    "options",
    "training",
    "evaluate",
    "annotators",
]
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "tqdm", "minialign"}
NETWORK = {
    "urllib",
    "http",
    "socket",
    "ssl",
    "ftplib",
    "smtplib",
    "imaplib",
    "poplib",
    "telnetlib",
    "xmlrpc",
    "socketserver",
    "asyncio",
    "webbrowser",
}
MODULES = sorted((ROOT / "minialign").rglob("*.py"))
SOURCES = [*MODULES, *sorted(ROOT.glob("*.py"))]


def imported(path):
    """(top package, module of minialign or None) of every import statement, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                (alias.name.split(".")[0], *alias.name.split(".")[1:2]) for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            whole = ["minialign"] * bool(node.level) + (
                node.module.split(".") if node.module else []
            )
            found |= (
                {tuple(whole[:2])}
                if len(whole) > 1
                else {(whole[0], alias.name) for alias in node.names}
            )
    return {(top, *rest) if top == "minialign" else (top,) for top, *rest in found}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_downward(path):
    """A folder imports from itself and from earlier folders, so there are no circles between folders."""
    place = path.relative_to(ROOT / "minialign").with_suffix("").parts[0]
    if place == "__init__":
        return
    assert place in ORDER, f"{place} has no place in the order: add it to ORDER"
    for top, *module in imported(path):
        if top == "minialign" and module and module[0] in ORDER:
            assert ORDER.index(module[0]) <= ORDER.index(place), f"{path} imports {module[0]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_beyond_the_six_packages_and_no_network(path):
    tops = {top for top, *_ in imported(path)}
    assert not tops - PACKAGES - sys.stdlib_module_names and not tops & NETWORK


def test_the_reader_of_imports_sees_every_form(tmp_path):
    """The two tests above are worth what this finds: relative, absolute, aliased, inside a function."""
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch.nn as nn\nfrom . import rows\nfrom .lora import Policy\nfrom minialign import bdhs, data\nimport minialign.cli\n"
        "def f():\n    from urllib.request import urlopen\n    import transformers\n"
    )
    assert imported(path) == {
        ("torch",),
        ("minialign", "rows"),
        ("minialign", "lora"),
        ("minialign", "bdhs"),
        ("minialign", "data"),
        ("minialign", "cli"),
        ("urllib",),
        ("transformers",),
    }


def test_no_module_hides_code_from_the_reader():
    """No pickle, eval, exec, shell or remote code anywhere in what ships."""
    forbidden = {"eval", "exec", "__import__", "compile"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & forbidden, path
        assert not {top for top, *_ in imported(path)} & {
            "pickle",
            "marshal",
            "shelve",
            "importlib",
            "subprocess",
        }, path

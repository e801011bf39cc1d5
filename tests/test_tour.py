"""The guided tour runs, and prints what it shows."""

import ast
import contextlib
import io
import re

from conftest import ROOT

TOUR = ROOT / "minialign" / "README.md"
CODE_BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def test_the_code_of_the_tour_prints_what_the_tour_shows(monkeypatch):
    """All code blocks run in order, in one namespace, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    blocks = CODE_BLOCK.findall(TOUR.read_text())
    assert len(blocks) >= 10
    namespace = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(TOUR), "exec"), namespace)
        assert printed.getvalue() == shown, code


def test_the_files_that_the_tour_names_exist():
    """Links and test files alike, so that a moved file cannot leave a dead name behind."""
    text = TOUR.read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    tests = re.findall(r"`(tests/[\w/.]+)`", text)
    assert links and tests
    for link in links:
        assert (TOUR.parent / link).exists(), link
    for test in tests:
        assert (ROOT / test).exists(), test


def test_the_page_of_models_lists_every_module_of_its_folder():
    folder = ROOT / "minialign" / "models"
    text = (folder / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert path.name == "__init__.py" or f"| [`{path.name}`]({path.name}) |" in text, path.name


def test_the_tour_lists_every_module_with_its_first_sentence():
    modules = [path for path in (ROOT / "minialign").rglob("*.py") if path.name != "__init__.py"]
    assert modules
    text = TOUR.read_text()
    for path in modules:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        first_sentence = docstring.split("\n\n")[0].replace("\n", " ")
        name = path.relative_to(ROOT / "minialign").as_posix()
        assert f"| [`{name}`]({name}) | {first_sentence} |" in text, name

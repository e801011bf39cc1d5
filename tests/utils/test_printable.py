"""What is printed for a person cannot steer the terminal, and is never as long as a book."""

import sys

import pytest

from minialign.utils.cli import Parser, run_script
from minialign.utils.files import InputError
from minialign.utils.messages import print_message, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),  # clears the screen
        ("a\nb\rc\td", r"a\nb\rc\td"),  # forges a line
        ("a\u202eb", r"a\u202eb"),  # turns the direction of what follows
        ("a\u2028b\x85\x07\x00", r"a\u2028b\x85\x07\x00"),
        ("\udcff.png", r"\udcff.png"),  # a byte of a file name that is not UTF-8
        ("Größe 图片 é 🙂", "Größe 图片 é 🙂"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end():
    """A message ends with the remedy."""
    text = "file.json: " + "x" * 100_000 + "; remove it"

    shown = printable(text)

    assert len(shown) <= 810
    assert shown.startswith("file.json: xxx")
    assert shown.endswith("xxx; remove it")


def test_a_message_is_one_line_on_standard_error(capsys):
    print_message("a\nb")

    printed = capsys.readouterr()
    assert printed.err == "a\\nb\n"
    assert printed.out == ""


def test_an_error_is_shown_escaped(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        raise InputError("record \x1b[2J" + "y" * 10_000 + ": broken; remove it")

    status = run_script(main)

    printed = capsys.readouterr().err
    assert status == 2
    assert printed.startswith(r"train.py: record \x1b[2Jyyy")
    assert printed.endswith("broken; remove it\n")
    assert len(printed) < 900


def test_an_option_is_shown_escaped(capsys):
    parser = Parser(prog="train.py")

    with pytest.raises(SystemExit):
        parser.parse_args(["--x\x1b[2J\u202e", "y" * 10_000])

    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\u202e" not in printed
    assert printed.count("\n") == 1
    assert len(printed) < 900


def parse_two_lists(words):
    """Return the options of a parser with a list, a list that adds up, and a single value."""
    parser = Parser(prog="train.py")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--images", nargs="*", action="extend")
    parser.add_argument("--steps")
    return parser.parse_args(words.split())


@pytest.mark.parametrize(
    "words", ["--data a --data b", "--data a --steps 1 --data=b", "--data=a --data"]
)
def test_a_list_that_is_given_twice_is_refused(words, capsys):
    """argparse would read b alone, and say nothing of a."""
    with pytest.raises(SystemExit) as exit_info:
        parse_two_lists(words)

    assert exit_info.value.code == 2
    line = "train.py: --data is given twice; give all its values after one --data; "
    assert capsys.readouterr().err.startswith(line)


def test_other_options_may_be_given_twice():
    """The last one counts of a single value, which scripts append to change an earlier one."""
    options = parse_two_lists("--steps 5 --images a --data a b --steps 6 --images b")

    assert (options.data, options.images, options.steps) == (["a", "b"], ["a", "b"], "6")


@pytest.mark.parametrize("words", [["--out", ""], ["--out="], ["--data", "a", ""], [""]])
def test_an_empty_value_is_refused(words, capsys):
    """As a path it would be the folder from which the command is run."""
    parser = Parser(prog="train.py")
    parser.add_argument("--out")
    parser.add_argument("--data", nargs="+")

    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(words)

    assert exit_info.value.code == 2
    assert "is empty; give a value, or leave it out" in capsys.readouterr().err

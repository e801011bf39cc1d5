"""Options that several commands share: --system gives a text to the records without one."""

import argparse
from dataclasses import replace

import pytest

from minialign.options import with_default_system
from minialign.utils.files import InputError

BRIEF = "Answer briefly."
POSITIONS = "Name positions."


def options_with(**values):
    """Return the options of a command that evaluates nothing, with some changed."""
    return argparse.Namespace(**{"system": BRIEF, **values})


def test_a_record_keeps_a_system_text_of_its_own(records, capsys):
    """The others get that of --system, and a line says how many do not."""
    own, other = replace(records[0], system=POSITIONS), records[1]

    completed = with_default_system([own, other], options_with())

    assert [record.system for record in completed] == [POSITIONS, BRIEF]
    assert completed[1] == replace(other, system=BRIEF)
    assert "1 of 2 records keep a system text of their own" in capsys.readouterr().err


def test_without_the_option_records_stay_as_they_are(records):
    assert with_default_system(records[:2], options_with(system=None)) == records[:2]


def test_a_system_text_without_effect_is_refused(records):
    """It has an effect if the model is measured: questions have no system text of their own."""
    own = [replace(records[0], system=POSITIONS)]

    for options in (options_with(), options_with(eval=[])):
        with pytest.raises(InputError, match="--system has no effect: each of the 1 records"):
            with_default_system(own, options)
    assert with_default_system(own, options_with(eval=["folder"])) == own

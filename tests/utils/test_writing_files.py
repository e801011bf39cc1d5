"""Files are written all at once, also by several machines that share a file system."""

import json
import os
import platform

import pytest

from minialign.utils import files
from minialign.utils.files import atomic_write, write_json


@pytest.mark.parametrize("same_number", [True, False])
def test_two_machines_write_one_file_at_the_same_time(tmp_path, monkeypatch, same_number):
    """The other machine writes within the block, and knows no process of this one."""
    path = tmp_path / "config.json"
    other_process_id = os.getpid() if same_number else os.getpid() + 1

    with atomic_write(path) as temporary:
        temporary.write_text('{"machine": "this"}')
        with monkeypatch.context() as patch:
            patch.setattr(platform, "node", lambda: "other")
            patch.setattr(os, "getpid", lambda: other_process_id)
            patch.setattr(files, "is_running", lambda process_id: process_id == other_process_id)
            write_json(path, {"machine": "other"})
        assert json.loads(path.read_text()) == {"machine": "other"}

    assert json.loads(path.read_text()) == {"machine": "this"}
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_dead_process_of_this_machine_leaves_nothing(tmp_path, monkeypatch):
    """The names of the two machines end alike. A file of the other one stays."""
    monkeypatch.setattr(platform, "node", lambda: "cluster")
    monkeypatch.setattr(files, "is_running", lambda process_id: process_id != 12)
    (tmp_path / ".config.json.12@cluster.tmp").touch()
    (tmp_path / ".config.json.12@node.cluster.tmp").touch()

    write_json(tmp_path / "config.json", {})

    assert sorted(os.listdir(tmp_path)) == [".config.json.12@node.cluster.tmp", "config.json"]

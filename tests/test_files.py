"""Files and folders are whole or not there."""

import os
import time
from pathlib import Path

import pytest

from asr.files import replacing_folder


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with replacing_folder(folder) as temporary:
            (temporary / "file").write_text(content)
    assert (folder / "file").read_text() == "two"
    with pytest.raises(KeyError), replacing_folder(folder) as temporary:
        (temporary / "file").write_text("three")
        raise KeyError
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"), replacing_folder(folder) as temporary:
        (temporary / "file").write_text("four")
    assert (folder / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    rename(folder, tmp_path / f".model.old-{os.getpid()}")  # killed there
    with pytest.raises(KeyError), replacing_folder(folder) as temporary:
        raise KeyError
    assert (folder / "file").read_text() == "two"


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    for number, hours in ((1, 2), (2, 0)):
        left = tmp_path / f".model.tmp-{number}"
        left.mkdir()
        os.utime(left, (time.time() - 3600 * hours, time.time() - 3600 * hours))
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "file").write_text("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.tmp-2", "model"]

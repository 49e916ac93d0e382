"""A file that is written whole or not at all, whenever a signal comes."""

import os
import subprocess
import sys

import pytest

from dualcodec_ext import _files
from dualcodec_ext._files import AtomicFile


def test_a_signal_as_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    original = os.open

    def interrupted(*given):
        os.close(original(*given))
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(_files.os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, AtomicFile(tmp_path / "a"):
        pytest.fail("the block must not be entered")
    del caught  # with it the frames that hold the file
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["raise SystemExit(143)", "raise KeyboardInterrupt", "del file", "pass"])
def test_a_signal_before_the_block_is_in_force_leaves_nothing(tmp_path, end):
    code = f"""
import os
from dualcodec_ext._files import AtomicFile
file = AtomicFile('a')
file.__enter__().write(b'1')
print(len(os.listdir()), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.stdout == b"1\n"  # it was there
    assert not list(tmp_path.iterdir())


def test_a_forked_child_that_exits_leaves_its_parents_file(tmp_path):
    code = """
import os
from dualcodec_ext._files import AtomicFile
with AtomicFile('a') as file:
    if os.fork() == 0:
        try:
            raise SystemExit  # through the block and the interpreter's end
        finally:
            del file
    os.wait()
    assert len(os.listdir()) == 1, os.listdir()
    file.write(b'1')
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "a").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1

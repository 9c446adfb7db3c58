"""What the tests of the command line share."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from lucidetr.cli import main


def lucidetr(*arguments, cwd=None, status=0):
    """Run the command line in this process and return what it printed on both streams."""
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, io.StringIO() as err:
        patch.setattr(sys, "argv", ["lucidetr", *map(str, arguments)])
        patch.chdir(cwd or Path.cwd())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        assert code == status, out.getvalue() + err.getvalue()
        return out.getvalue() if status == 0 else err.getvalue() + out.getvalue()

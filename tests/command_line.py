"""The command `mend` run inside the test's own process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from unittest.mock import patch

from transformers.utils import logging

from mend_hf.cli import main


def run_mend(words: Sequence[object]) -> int:
    """Run `mend` with these words and return its exit status; what it sets for a whole process is set back."""
    verbosity = logging.get_verbosity()
    with patch.object(sys, "argv", ["mend", *map(str, words)]), patch.object(warnings, "showwarning"):
        try:
            main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
    return 0

"""Start the commands with sets of texts in the same order each time, as that is part of a history."""

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, "-m", "tests.simulated", *sys.argv[1:]])

from tests.simulated.commands import app

app()

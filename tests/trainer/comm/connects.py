"""A rank that connects and says how it ends; the first one dies after it, or stops before it where STOPS is set."""

import os
import signal
import time

from featurestore.errors import UserError
from trainer.comm import connect

if os.environ["HOROVOD_RANK"] == "0" and "STOPS" in os.environ:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    comm = connect(float(os.environ["PATIENCE_S"]))
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
    comm.agree(None)
except UserError as error:
    print(type(error).__name__, error, flush=True)
os._exit(7)

"""horovodrun, but for its question whether Horovod has Gloo: a process of its own imports torch for the answer.

Without Gloo no test with ranks passes anyway. The commands of the tutorial start horovodrun as it is.
"""

import sys
from unittest import mock

from horovod.runner import launch

if __name__ == "__main__":
    with mock.patch.object(launch, "gloo_built", return_value=True):
        sys.exit(launch.run_commandline())

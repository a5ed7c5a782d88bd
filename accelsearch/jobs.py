"""What submitit runs as one job: a worker, in an environment of its own.

This module is imported by the job before its environment is set, and so imports nothing that
reads it.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["WorkerJob"]


class WorkerJob:
    """`accelsearch worker` with these arguments, and what to set in the environment before.

    Nothing secret is in either: both are written to a file.
    """

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environment = dict(environment)
        self._requeued = False

    def __call__(self) -> int:
        """Run the worker; its exit code."""
        os.environ.update(self.environment)
        sys.argv = ["accelsearch", "worker", *self.arguments]
        try:
            runpy.run_module("accelsearch", run_name="__main__")
        except SystemExit as ended:
            if self._requeued:  # then it is not the end of it
                raise
            return ended.code if isinstance(ended.code, int) else 1
        raise AssertionError

    def checkpoint(self) -> Any:
        """Called when the cluster takes the machine back: the same worker again, later."""
        from submitit.helpers import DelayedSubmission

        self._requeued = True
        return DelayedSubmission(WorkerJob(self.arguments, self.environment))

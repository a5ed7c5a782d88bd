"""Worker processes that measure with a stand-in, and what they have told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Crew:
    """Worker processes; whichever is killed is replaced, as a launcher does."""

    def __init__(self, folder: Path, storage: str, *, pause_s: float, plan: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.plan = folder / "plan.toml"
        self.plan.write_text(plan)
        self.log = folder / "measured.log"
        self.log.touch()
        self.killed: dict[int, float] = {}
        self.environment = {
            **os.environ,
            "ACCELSEARCH_STORAGE": storage,
            "ACCELSEARCH_ARTIFACTS": str(folder / "artifacts"),
            "ACCELSEARCH_BENCH": "tests.standin:StandIn",
            "ACCELSEARCH_STANDIN_S": str(pause_s),
            "ACCELSEARCH_STANDIN_LOG": str(self.log),
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        number = len(self.processes) + len(self.killed)
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "accelsearch", "worker", str(self.plan)],
                env=self.environment,
                stdout=(self.folder / f"worker{number}.log").open("w"),
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def at_work(self) -> list[subprocess.Popen[str]]:
        """Those that have begun to measure: a worker that still imports holds nothing."""
        begun = {int(line.split()[1]) for line in self.log.read_text().splitlines()}
        return [one for one in self.processes if one.poll() is None and one.pid in begun]

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.killed[process.pid] = time.time()
        self.processes.remove(process)

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.wait(max(deadline - time.monotonic(), 0.1))

    def work(self, workers: int, timeout_s: float) -> None:
        """Start so many, and wait until all of them have ended."""
        try:
            for _ in range(workers):
                self.start()
            self.wait(timeout_s)
        finally:
            for process in self.processes:
                process.kill()

    def logs(self) -> str:
        return "\n".join(
            f"{file.name}: {file.read_text()[-600:]}" for file in sorted(self.folder.glob("*.log"))
        )

"""A bench that measures nothing and needs no torch, for worker processes in tests.

Its results depend on the setting alone, so that whoever measures it finds the same. Environment
variables say how long it takes (ACCELSEARCH_STANDIN_S), which setting never ends
(ACCELSEARCH_STANDIN_HANGS, as "5,2"), where it tells what it measures (ACCELSEARCH_STANDIN_LOG),
and to how many pages a SQLite file may grow (ACCELSEARCH_STANDIN_PAGES), after which SQLite finds
its disk full.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy

from accelsearch.budget import violation
from accelsearch.errors import TrialError
from accelsearch.measurement import Environment, Latency, Measurement, ParamValue, Scores
from accelsearch.methods import Parameter, starts
from accelsearch.objective import Result
from accelsearch.storage import Outcome

INTERVAL = Parameter("cache_interval", "int", 3, "", "", low=2, high=11)
BRANCH = Parameter("cache_branch_id", "int", 0, "", "", low=0, high=9)


class StandIn:
    """0.1x faster an interval, 0.1 % worse from one interval to the next; branch 7 always fails."""

    space = (INTERVAL, BRANCH)

    def __init__(self, configuration: Any, say: Callable[[str], None]) -> None:
        self.configuration = configuration
        self._pause_s = float(os.environ.get("ACCELSEARCH_STANDIN_S", "0"))
        self._log = os.environ.get("ACCELSEARCH_STANDIN_LOG")
        pages = os.environ.get("ACCELSEARCH_STANDIN_PAGES")
        if pages:

            def limit(connection: sqlalchemy.Connection) -> None:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {int(pages)}")

            sqlalchemy.event.listen(sqlalchemy.Engine, "begin", limit)
        say("loading")

    @staticmethod
    def environment(configuration: Any) -> Environment:
        return Environment("stand-in", "cpu", None, None, 1, "3.11", {})

    def starts(
        self, known: Iterable[Mapping[str, ParamValue]] = (), *, alone: bool = True
    ) -> list[dict[str, ParamValue]]:
        return starts(self.space, known, alone=alone)

    def measure(self, params: Mapping[str, ParamValue], **question: Any) -> Result:
        self._tell("begins", params)
        interval, branch = int(params["cache_interval"]), int(params["cache_branch_id"])
        hangs = f"{interval},{branch}" == os.environ.get("ACCELSEARCH_STANDIN_HANGS")
        time.sleep(3600 if hangs else self._pause_s)
        if branch == 7:
            self._tell("failed", params)
            raise TrialError("images contain NaN")
        speedup, loss = 1 + 0.1 * interval + 0.001 * branch, 0.001 * interval + 0.0001 * branch
        (budget,) = self.configuration.budgets
        over = violation(loss, budget)
        prompts = self.configuration.images
        scores = Scores("clip_score", (50.0,) * prompts, (50 * (1 - loss),) * prompts)
        self._tell("measured", params)
        return Result(
            outcome=Outcome.FEASIBLE if over <= 0 else Outcome.OVER_BUDGET,
            reason=f"loss {loss:.4f}",
            measurement=Measurement(
                dict(params),
                Latency((speedup,) * 6, (1.0,) * 6),
                (scores,),
                None,
                None,
                {"deepcache": "1"},
            ),
            losses={budget.metric: loss},
            violations={budget.metric: over},
            seconds={"latency": self._pause_s},
            images=None,
        )

    def _tell(self, what: str, params: Mapping[str, ParamValue]) -> None:
        if self._log:
            setting = f"{params['cache_interval']},{params['cache_branch_id']}"
            with Path(self._log).open("a") as log:
                log.write(f"{time.time():.3f} {os.getpid()} {what} {setting}\n")

"""From upper bounds to tasks, and from tasks to code: a module that reads JSON alone.

It imports neither torch nor optuna, and nothing of this package but its errors and its contract:

    from accelsearch.codegen import generate, read_tasks

    batch = generate(
        read_tasks("tasks.json"),
        params="search_params.json",
        bounds="speedup_bounds.json",
        out="scripts",
    )
"""

from accelsearch.codegen.generate import REPORT, Batch, ReportEntry, Result, Status, generate
from accelsearch.codegen.parse import parse
from accelsearch.codegen.search import CommandSearch, Searched, Template, default_search
from accelsearch.codegen.tasks import (
    RATIOS,
    Task,
    TaskEntry,
    from_bounds,
    from_params,
    read_tasks,
    write_tasks,
)

__all__ = [
    "RATIOS",
    "REPORT",
    "Batch",
    "CommandSearch",
    "ReportEntry",
    "Result",
    "Searched",
    "Status",
    "Task",
    "TaskEntry",
    "Template",
    "default_search",
    "from_bounds",
    "from_params",
    "generate",
    "parse",
    "read_tasks",
    "write_tasks",
]

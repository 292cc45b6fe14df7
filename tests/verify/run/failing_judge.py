"""Judges that fail as processes do; workers import them by name."""

import os
import signal
import time

from reports.verification import Verdict
from verify.run.judge import Run, judge_all
from verify.run.plan import Task


def judge(task: Task, run: Run) -> tuple[list[Verdict], bool]:
    """Dies, hangs or loses its device where the name of the case says so, else judges."""
    if task.case.name == "scale_dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.case.name == "scale_hangs":
        time.sleep(3600)
    rows, usable = judge_all(task, run)
    return rows, usable and task.case.name != "scale_lost"

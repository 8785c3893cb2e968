"""Show a study: live view, tables, plots, pages and notes for people, JSON for programs."""

from tuner.report.documents import (
    RoundPlan,
    RoundStatus,
    check_document,
    dumped,
    dumps,
    round_status,
    status_document,
    trial_document,
)
from tuner.report.html import write_html
from tuner.report.live import View, open_view
from tuner.report.notes import round_markdown, round_note
from tuner.report.plots import best_steps_figure, curves_figure
from tuner.report.round_report import RoundReport
from tuner.report.space_plots import learning_rate_figure
from tuner.report.tables import plan_table, status_table, summary, trial_page, trials_table

__all__ = [
    "RoundPlan",
    "RoundReport",
    "RoundStatus",
    "View",
    "best_steps_figure",
    "check_document",
    "curves_figure",
    "dumped",
    "dumps",
    "learning_rate_figure",
    "open_view",
    "plan_table",
    "round_markdown",
    "round_note",
    "round_status",
    "status_document",
    "status_table",
    "summary",
    "trial_document",
    "trial_page",
    "trials_table",
    "write_html",
]

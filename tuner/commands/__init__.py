"""A worker program whose trials are runs of the user's own training command.

`python -m tuner.commands` speaks the protocol of `tuner.training`, one trial at a time. The command reports
JSON lines; files decide what came of it, never its exit code alone.
"""

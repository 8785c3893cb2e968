"""The methods that a round file can choose by name: optimizers, schedules, variants and metrics."""

"""Replays of recorded learning curves: every method tunes the same table, and every step is charged."""

"""The loop of a round: ask, assign, record, tell; promotion of one to the next; everything about Optuna."""

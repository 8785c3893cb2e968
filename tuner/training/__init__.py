"""One worker: it loads base and data once and trains trials in slots, side by side."""

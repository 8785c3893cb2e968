"""One worker: it loads the base model and the data once and trains trials side by side in slots."""

"""The user's code, run: one tick or one batch, its fence, its log and its outcome."""

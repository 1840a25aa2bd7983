"""A run: the loop, checkpoints, previews, signals, and what is said before and after."""

"""Broken adapter files, made by a seed, and a watch over what reading them costs."""

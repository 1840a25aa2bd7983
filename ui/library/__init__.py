"""The adapter files: found, hashed, catalogued, and shown as cards to choose from."""

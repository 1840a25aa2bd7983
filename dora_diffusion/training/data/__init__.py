"""From folders to batches: pictures, captions, what a step sees, and what is wrong with a folder."""

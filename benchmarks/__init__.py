"""What is measured, and how: cost beside peers, full sizes, the app under load, fuzzed files, interchange."""

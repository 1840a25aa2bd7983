"""The app under load, under hostile payloads, and over ten thousand files."""

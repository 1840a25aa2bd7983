"""What adapter files hold, by word, number and picture, and whether what was written is what was meant."""

"""What holds parameters: DoRA layers for every kind of base layer, put into a model and taken out again."""

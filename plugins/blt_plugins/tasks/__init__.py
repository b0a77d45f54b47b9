"""Tasks: what a model's text is worth, beside what it costs."""

"""A run: its steps, its folder, what it resumes from and what it reports."""

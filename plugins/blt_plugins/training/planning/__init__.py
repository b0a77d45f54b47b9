"""``blt train --plan``: what a run will take, before it does."""

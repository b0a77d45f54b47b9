"""How steps are taken: torch in one process or several, its optimizers and its memory."""

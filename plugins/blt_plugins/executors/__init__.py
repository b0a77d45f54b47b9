"""Executors: where work is done that falls into many tasks."""

"""Global models."""

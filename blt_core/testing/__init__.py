"""What tests of plugins and of the core build on: the plain reference of the engine."""

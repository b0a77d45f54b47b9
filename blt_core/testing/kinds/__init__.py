"""The contracts of each kind, in the modules that the registry names."""

"""Finding plugins, their components and commands; ``registry.toml`` is the policy."""

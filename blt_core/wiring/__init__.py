"""From TOML to checked and built components."""

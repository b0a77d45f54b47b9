"""First-party plugins of blt-core, found through entry points like anybody else's."""

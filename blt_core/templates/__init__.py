"""Components that work, one of each kind: what ``blt new-plugin`` begins a distribution with.

Each is a module of its own, beside a config that uses it. They are copied as files, and never
imported: what is registered as ``acme/name`` here has the author's name there.
"""

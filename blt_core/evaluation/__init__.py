"""Tasks with samplers: what a model's text is worth, beside what it costs.

A task (:class:`blt_core.evaluation.protocol.Task`) asks a model questions and scores the answers;
:func:`blt_core.evaluation.running.run_task` runs one with each of several samplers. The kind
``task`` is declared by a plugin, as any kind can be.
"""

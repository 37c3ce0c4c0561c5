"""The command line: ``lora-theory predict | simulate | compare | sweep | explore | …``.

``entry`` maps what happened to an exit code, ``flags`` makes the flags from the fields of
:class:`~lora_theory.problem.Problem`, ``commands`` does the work, ``tables`` and ``progress`` talk
to people.  Nothing here imports JAX before it is needed, so that ``--help`` answers at once.
"""

from lora_theory.cli.entry import main

__all__ = ["main"]

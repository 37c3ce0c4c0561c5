"""``python -m lora_theory.cli``, where the script ``lora-theory`` is not on the path."""

import sys

from lora_theory.cli import main

if __name__ == "__main__":
    sys.exit(main())

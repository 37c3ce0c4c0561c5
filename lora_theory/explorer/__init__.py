"""The interactive explorer of regimes: `lora-theory explore` (needs the extra: explore)."""

"""Which ascent, which start and which radius Bi-LoRA should have by default: `python -m benchmarks.ascent`."""

"""A LoRA as a file: written in two formats, described, proved by loading it again, read to continue from."""

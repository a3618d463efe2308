#!/usr/bin/env python
"""Trains a LoRA for SDXL with Bi-LoRA: `accelerate launch train_dreambooth_bilora.py --help`."""

import sys

from bilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())

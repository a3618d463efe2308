"""What a run will hold on a GPU, estimated before anything is loaded: `python -m bilora_diffusion.memory --help`."""

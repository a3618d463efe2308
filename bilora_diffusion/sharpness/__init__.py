"""How sharp is the loss around a LoRA? For any LoRA file, ours or not.

`python -m bilora_diffusion.sharpness LORA.safetensors --base BASE --data FOLDER`
"""

"""Pictures from a base and LoRA files, one request at a time: what the app and `compare` draw with.

settings   what to draw, checked; no torch
files      which LoRA files may be opened
loras      a file as a named adapter, or one line that says why it does not fit
engine     one base, loaded once; LoRAs switched without a reload
png        settings inside a picture's file
turns      who is next
"""

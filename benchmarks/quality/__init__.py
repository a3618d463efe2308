"""Which method generalises? All of them on the embedded base, with paired draws. See `__main__`."""

"""Measurements behind the choices the paper leaves open; each module tells what it needs and how to run it."""

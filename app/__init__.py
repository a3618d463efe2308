"""The Gradio app, `python -m app`: a view of the package. It holds no sampling and no training of its own.

options     the command line
services    what the tabs and the API ask for: pictures, comparisons, LoRA files, in turn
running     work in a thread, seen step by step, cancelled at once
markup      HTML with everything escaped
*_tab       the tabs
api         /generate, /compare, /loras
"""

"""A report on the user's own pictures: the chosen methods trained on the same draws, measured, and one page about it.

- `plan.py`: which runs of the trainer, with which words; `splitting.py`: which pictures they do not see.
- `running.py`: each run in a process of its own, what is finished is not repeated.
- `measuring.py`: losses and sharpness on fixed draws; `drawing.py`: pictures from the same seeds, and copies.
- `verdict.py`: what the paired numbers say, in words; `plots.py`, `page.py`: the page.
"""

"""How start-up, memory and a step grow with the number of pictures."""

"""What a training step costs: every method and the stock recipe, side by side in one process."""

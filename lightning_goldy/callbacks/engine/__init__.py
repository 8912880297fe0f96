"""What every callback runs on: its folder and rows, the run around it, whose weights, what it will cost."""

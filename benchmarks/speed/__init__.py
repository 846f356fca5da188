"""How fast and how small the optimizer is, side by side with what a user could pick instead: CPU and GPU, one suite."""

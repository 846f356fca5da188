"""What a rank pays for an optimizer step when parameters are sharded over several."""

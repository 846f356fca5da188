"""What a saved posterior is worth: its predictions where it was trained, and elsewhere."""

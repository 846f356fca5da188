"""What several posterior samples of a model cost in one forward pass, against one pass for each."""

"""Pictures and pages about predictions and posteriors."""

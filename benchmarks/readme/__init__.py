"""The measured tables of the documents (``python -m benchmarks readme``)."""

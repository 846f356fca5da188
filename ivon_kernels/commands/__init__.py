"""The command ``ivon-kernels``, which is ``python -m ivon_kernels`` too: a file for each group of commands."""
